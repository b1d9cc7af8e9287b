"""An S3 server on this machine, and a door in front of it where requests can be made to go wrong.

Behind is moto, which keeps objects in memory and speaks the real protocol; it runs in a process of its own, so that
its warnings and its memory are not the tests'. In front is :class:`FaultyS3`, the endpoint that clients are given::

    def test_a_write_is_retried(s3, bucket):
        s3.fail("500", times=2, method="PUT", match="videos.parquet")
        write(f"{bucket}/store.zarr/videos.parquet")
        assert [request.fault for request in s3.made("PUT")] == ["500", "500", None]
"""

import logging
import multiprocessing
import os
import select
import sys
import threading
import urllib.parse
import uuid
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal, get_args

import pytest

#: "403", "500", "503": an error in place of the request. "hang": no answer, until the client gives up. "cut_request":
#: half of the upload is read, the connection closes, and nothing is stored. "cut_response": done, but half of the
#: answer's body is sent, or, where it has none, half of its first line. "stored_then_500": done, but the client is
#: told it failed.
Fault = Literal["403", "500", "503", "hang", "cut_request", "cut_response", "stored_then_500"]

_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "expect", "te", "upgrade"}


@dataclass(frozen=True)
class Request:
    """One request that came in. ``status`` is what the client was told: None where it got no whole answer."""

    method: str
    path: str
    status: int | None
    fault: Fault | None


@dataclass
class _Rule:
    fault: Fault
    times: float
    method: str | None
    match: str
    skip: int

    def takes(self, method: str, path: str) -> bool:
        if self.times <= 0 or self.match not in path or self.method not in (None, method):
            return False
        self.skip -= 1
        self.times -= self.skip < 0
        return self.skip < 0


class FaultyS3:
    """Passes requests on to the server at ``backend`` (host, port), except those that :meth:`fail` was told about."""

    def __init__(self, backend: tuple[str, int]) -> None:
        self.backend = backend
        self.requests: list[Request] = []
        self.rules: list[_Rule] = []
        self.lock = threading.Lock()
        self.stopping = threading.Event()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.s3 = self
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def fail(self, fault: Fault, times: float = 1, method: str | None = None, match: str = "", skip: int = 0) -> None:
        """Do ``fault`` to the next ``times`` requests (``math.inf``: to all) of ``method`` with ``match`` in the path.

        The path is unquoted and has the query: "/bucket/key?partNumber=2&…". The first ``skip`` such requests are let
        through. Rules are asked in the order they were made; the first that fits is used.
        """
        if fault not in get_args(Fault):
            raise ValueError(f"unknown fault {fault!r}: expected one of {', '.join(get_args(Fault))}")
        with self.lock:
            self.rules.append(_Rule(fault, times, method, match, skip))

    def clear(self) -> None:
        """Forget the faults and the requests."""
        with self.lock:
            self.rules.clear()
            self.requests.clear()

    def made(self, method: str, match: str = "") -> list[Request]:
        """The requests so far of ``method`` with ``match`` in the path, in the order they ended."""
        with self.lock:
            return [request for request in self.requests if request.method == method and match in request.path]

    def close(self) -> None:
        """Stop. Requests that hang are let go."""
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    request_queue_size = 128
    s3: FaultyS3

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # clients that hang up are what this is for
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # answers "Expect: 100-continue", and keeps connections open
    server: _Server

    def _handle(self) -> None:
        s3, path = self.server.s3, urllib.parse.unquote(self.path)
        with s3.lock:
            fault = next((rule.fault for rule in s3.rules if rule.takes(self.command, path)), None)
        status, answer = self._answer(fault)
        with s3.lock:  # before the client can go on
            s3.requests.append(Request(self.command, path, status, fault))
        while fault == "hang" and not s3.stopping.is_set() and not select.select([self.connection], [], [], 0.05)[0]:
            pass
        self.wfile.write(answer)
        self.close_connection = self.close_connection or status is None

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _handle

    def _answer(self, fault: Fault | None) -> tuple[int | None, bytes]:
        """Do what is asked, or ``fault``. The status and the bytes to send; None if those are not a whole answer."""
        if fault == "cut_request":
            self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
            return None, b""
        upload = self._read_body()
        if fault == "hang":
            return None, b""
        if fault in ("403", "500", "503"):
            return self._error(int(fault))
        status, headers, body = self._ask_backend(upload)
        if fault == "stored_then_500":
            return self._error(500)
        head = self._head(status, headers)
        if fault == "cut_response":
            return None, head + body[: len(body) // 2] if body else head[:10]
        return status, head + body

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():  # trailers
            pass
        return b"".join(chunks)

    def _ask_backend(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP_BY_HOP}
        with closing(HTTPConnection(*self.server.s3.backend, timeout=60)) as backend:
            backend.request(self.command, self.path, body, headers | {"Content-Length": str(len(body))})
            response = backend.getresponse()
            answer = response.read()
        kept = {name.lower(): value for name, value in response.getheaders() if name.lower() not in _HOP_BY_HOP}
        if self.command != "HEAD":  # whose answer tells the length of a body that is not sent
            kept["content-length"] = str(len(answer))
        return response.status, kept, answer

    def _error(self, status: int) -> tuple[int, bytes]:
        code = {403: "AccessDenied", 500: "InternalError", 503: "SlowDown"}[status]
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code}, as told</Message></Error>".encode()
        head = self._head(status, {"content-type": "application/xml", "content-length": str(len(body))})
        return status, head if self.command == "HEAD" else head + body

    def _head(self, status: int, headers: dict[str, str]) -> bytes:
        lines = [f"HTTP/1.1 {status} {self.responses[status][0]}", *(f"{k}: {v}" for k, v in headers.items())]
        return "\r\n".join([*lines, "", ""]).encode("latin-1")

    def log_message(self, format, *args) -> None:
        """Requests are recorded, not printed."""


@contextmanager
def moto():
    """A moto server in a process of its own; gives its (host, port)."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve_moto, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    with closing(process):
        try:
            yield ours.recv()
        finally:
            ours.close()
            process.join()


def _serve_moto(pipe) -> None:
    """Serve until the other end of ``pipe`` is closed, if only because its process died."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    pipe.send(server.get_host_and_port())
    with suppress(EOFError):
        pipe.recv()


def ask(backend: tuple[str, int], method: str, path: str) -> None:
    """One request to the server itself, past the faults and the record. No signature is checked there."""
    with closing(HTTPConnection(*backend, timeout=60)) as connection:
        connection.request(method, path)
        assert connection.getresponse().status == 200


@pytest.fixture(scope="session")
def s3_server():
    pytest.importorskip("moto.server")
    forget_clients()
    with moto() as backend, closing(FaultyS3(backend)) as server:
        yield server
    forget_clients()


def forget_clients() -> None:
    """Let s3fs make a client anew: it keeps one, with its credentials and how many retries it may still make."""
    pytest.importorskip("s3fs").S3FileSystem.clear_instance_cache()


def set_variables(variables: dict[str, str]) -> None:
    """For processes of a fork server, which has the environment of the test that it was started in."""
    os.environ.update(variables)


@pytest.fixture
def s3(s3_server, monkeypatch):
    """The server, empty and without faults, set as S3 for this process and its children by the usual variables.

    The client is kept from test to test, since it takes half a second to make.
    """
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    variables = {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": s3_server.endpoint,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,  # nobody's own accounts
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "NO_PROXY": "127.0.0.1",
        # tensorstore reads these at its first request and never again.
        "TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": "3",
        "TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES": "1",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    yield s3_server
    s3_server.clear()
    ask(s3_server.backend, "POST", "/moto-api/reset")


@pytest.fixture
def bucket(s3):
    """The URL of an empty bucket: "s3://…"."""
    name = f"test-{uuid.uuid4().hex[:12]}"
    ask(s3.backend, "PUT", f"/{name}")
    return f"s3://{name}"
