"""An S3 server on loopback, which fails when asked to, as networks and servers do."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import urllib.request
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

BUCKET = "bucket"


class Store:
    """A bucket; also the WSGI application that serves it."""

    def __init__(self, served: Callable[..., Iterable[bytes]]):
        self._served = served
        self.port = 0
        self.faults: deque[str] = deque()
        """What happens to the next requests that write: an error of this number is answered; 'slow'
        answers after a second; 'cut' ends the connection in the middle; '' does nothing."""

    environment: ClassVar[dict[str, str]] = {
        "AWS_ACCESS_KEY_ID": "me",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    """Of a process that uses it; nobody checks the credentials."""

    def uri(self, folder: str) -> str:
        """Of a folder in the bucket; pyarrow's own way to name another server than Amazon's."""
        return f"s3://{BUCKET}/{folder}?scheme=http&endpoint_override=127.0.0.1%3A{self.port}"

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        writes = environ["REQUEST_METHOD"] in ("PUT", "POST")
        fault = self.faults.popleft() if writes and self.faults else ""
        if fault == "cut":
            environ["wsgi.input"].read(1)
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        if fault.isdigit():
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            code = {"403": "AccessDenied", "500": "InternalError", "503": "SlowDown"}[fault]
            start_response(f"{fault} {code}", [("Content-Type", "application/xml")])
            return [f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()]
        time.sleep(fault == "slow")
        return self._served(environ, start_response)


@contextlib.contextmanager
def object_store() -> Iterator[Store]:
    """Start one; meanwhile its `environment` is this process's."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        def log(self, type: str, message: str, *arguments: object) -> None:
            """Nobody reads it."""

    store = Store(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, store, threaded=True, request_handler=Quiet)
    store.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    before = {name: os.environ.get(name) for name in store.environment}
    os.environ.update(store.environment)
    try:
        url = f"http://127.0.0.1:{store.port}/{BUCKET}"
        with urllib.request.urlopen(urllib.request.Request(url, method="PUT")):
            pass
        yield store
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        server.shutdown()
        thread.join()
        server.server_close()
