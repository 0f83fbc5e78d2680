"""Downloads a file: resumes where it broke off, and checks the content before it is in place."""

import hashlib
import http.client
import urllib.error
import urllib.request
from pathlib import Path

from tasks.image_store import Progress, StoreError, no_progress

_BLOCK = 1 << 16  # bytes


def fetch(
    url: str,
    target: Path,
    md5: str,
    *,
    on_progress: Progress = no_progress,
    attempts: int = 3,
    timeout: float = 60.0,
) -> Path:
    """Download `url` to `target` unless it is there already, and return `target`.

    Bytes arrive in `target` + '.part'. After a broken connection the download continues from there,
    in this call (`attempts` times) or in a later one; `timeout` seconds without a byte count as
    broken. Raises StoreError for no network, an HTTP error, a folder that cannot be written, and
    content with another MD5. Such a part file is deleted, since resuming it would never help.
    """
    try:
        if target.is_file() and _md5(target) == md5:
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f"{target.name}.part")
        for attempt in range(1, attempts + 1):
            try:
                _receive(url, part, timeout, on_progress)
                break
            except urllib.error.HTTPError as error:
                error.close()
                raise StoreError(f"{url}: the server answers {error.code} {error.msg}") from error
            except (urllib.error.URLError, http.client.HTTPException, TimeoutError) as error:
                if attempt == attempts:
                    reason = getattr(error, "reason", error)
                    raise StoreError(
                        f"cannot download {url}: {reason}\n"
                        "try again (it resumes), or download it elsewhere and give its folder"
                    ) from error
        found = _md5(part)
        if found != md5:
            part.unlink()
            raise StoreError(
                f"{url}: the content has MD5 {found} instead of {md5}; it was deleted\n"
                "try again, or download it elsewhere and give its folder"
            )
        return part.replace(target)
    except OSError as error:
        raise StoreError(f"cannot write {target}: {error.strerror or error}") from error


def _receive(url: str, part: Path, timeout: float, on_progress: Progress) -> None:
    """Append to `part` what it lacks. Raises IncompleteRead where the connection breaks."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # the part file has all bytes already; `fetch` checks its MD5
            error.close()
            return
        raise
    with response:
        if response.status != 206:  # a server without ranges sends it all again
            have = 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else 0
        with part.open("ab" if have else "wb") as file:
            on_progress(part.stem, have, total)
            while block := _read(response):
                file.write(block)
                have += len(block)
                on_progress(part.stem, have, total)
    if have < total:
        raise http.client.IncompleteRead(b"", total - have)


def _read(response: http.client.HTTPResponse) -> bytes:
    """One block. Raises URLError for an error of the network, which is worth another attempt."""
    try:
        return response.read(_BLOCK)
    except OSError as error:  # tells it from an error of the disk
        raise urllib.error.URLError(error) from error


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()
