"""Downloads: resumed, checked, and in place only when whole. The server is real, on 127.0.0.1."""

import hashlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tasks.download import fetch
from tasks.image_store import StoreError


class Server(http.server.ThreadingHTTPServer):
    files: dict[str, bytes]
    breaks: list[int]
    """After how many bytes each of the next answers breaks off."""
    ranges = True
    requests: list[str | None]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.requests.append(wanted)
        content = self.server.files.get(self.path.lstrip("/"))
        if content is None:
            self.send_error(404)
            return
        first = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        if not self.server.ranges:
            first, wanted = 0, None
        if first >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(content) - first))
        self.end_headers()
        end = first + self.server.breaks.pop(0) if self.server.breaks else len(content)
        self.wfile.write(content[first:end])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as running:
        running.files, running.breaks, running.requests = {}, [], []
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


CONTENT = np.random.default_rng(0).bytes(300_000)
MD5 = hashlib.md5(CONTENT).hexdigest()


def test_download_arrives_with_progress(server: Server, tmp_path: Path) -> None:
    server.files["file.zip"] = CONTENT
    seen: list[tuple[str, int, int]] = []
    target = tmp_path / "new" / "file.zip"
    report = lambda *progress: seen.append(progress)  # noqa: E731
    assert fetch(f"{server.url}/file.zip", target, MD5, on_progress=report) == target
    assert target.read_bytes() == CONTENT
    assert [each.name for each in target.parent.iterdir()] == ["file.zip"]
    assert seen[0] == ("file.zip", 0, 300_000)
    assert seen[-1] == ("file.zip", 300_000, 300_000)
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


def test_download_that_is_there_is_not_repeated(server: Server, tmp_path: Path) -> None:
    target = tmp_path / "file.zip"
    target.write_bytes(CONTENT)
    fetch(f"{server.url}/file.zip", target, MD5)
    assert server.requests == []


def test_damaged_download_is_replaced(server: Server, tmp_path: Path) -> None:
    server.files["file.zip"] = CONTENT
    target = tmp_path / "file.zip"
    target.write_bytes(CONTENT[:-1] + b"?")
    assert fetch(f"{server.url}/file.zip", target, MD5).read_bytes() == CONTENT


def test_broken_connection_is_taken_up_where_it_broke(server: Server, tmp_path: Path) -> None:
    server.files["file.zip"] = CONTENT
    server.breaks = [70_000, 100_000]
    fetch(f"{server.url}/file.zip", tmp_path / "file.zip", MD5)
    assert (tmp_path / "file.zip").read_bytes() == CONTENT
    assert server.requests == [None, "bytes=70000-", "bytes=170000-"]


def test_next_call_resumes_too(server: Server, tmp_path: Path) -> None:
    server.files["file.zip"] = CONTENT
    server.breaks = [70_000, 100_000]
    with pytest.raises(StoreError, match=r"cannot download .*file.zip.*\n.*it resumes"):
        fetch(f"{server.url}/file.zip", tmp_path / "file.zip", MD5, attempts=2)
    assert not (tmp_path / "file.zip").exists()
    fetch(f"{server.url}/file.zip", tmp_path / "file.zip", MD5)
    assert server.requests[-1] == "bytes=170000-"
    assert (tmp_path / "file.zip").read_bytes() == CONTENT


def test_part_file_that_is_whole_already_is_used(server: Server, tmp_path: Path) -> None:
    server.files["file.zip"] = CONTENT
    (tmp_path / "file.zip.part").write_bytes(CONTENT)
    assert fetch(f"{server.url}/file.zip", tmp_path / "file.zip", MD5).read_bytes() == CONTENT


def test_server_without_ranges_sends_it_all_again(server: Server, tmp_path: Path) -> None:
    server.files["file.zip"] = CONTENT
    server.ranges = False
    server.breaks = [70_000]
    assert fetch(f"{server.url}/file.zip", tmp_path / "file.zip", MD5).read_bytes() == CONTENT


def test_wrong_content_is_deleted_and_named(server: Server, tmp_path: Path) -> None:
    server.files["file.zip"] = CONTENT
    with pytest.raises(StoreError, match=f"has MD5 {MD5} instead of {'0' * 32}"):
        fetch(f"{server.url}/file.zip", tmp_path / "file.zip", "0" * 32)
    assert list(tmp_path.iterdir()) == []


def test_http_error_is_named_and_not_repeated(server: Server, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"gone.zip: the server answers 404"):
        fetch(f"{server.url}/gone.zip", tmp_path / "gone.zip", MD5)
    assert len(server.requests) == 1


def test_no_network_is_named(tmp_path: Path) -> None:
    with Server(("127.0.0.1", 0), Handler) as closed:
        url = closed.url
    with pytest.raises(StoreError, match=f"cannot download {url}/file.zip: .*refused"):
        fetch(f"{url}/file.zip", tmp_path / "file.zip", MD5)


def test_folder_that_cannot_be_written_is_named(server: Server, tmp_path: Path) -> None:
    server.files["file.zip"] = CONTENT
    (tmp_path / "taken").touch()
    with pytest.raises(StoreError, match=r"cannot write .*taken/file.zip"):
        fetch(f"{server.url}/file.zip", tmp_path / "taken" / "file.zip", MD5)
