"""A store in a bucket: s3fs for ``s3://`` (extra [s3]), gcsfs for ``gs://`` (extra [gs]); arrays by tensorstore.

Both libraries get the endpoint and the region that s3fs found, so that one way to say them serves both.
"""

import functools
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO, Concatenate, ParamSpec, TypeVar, cast

import fsspec

from moclip.errors import StoreFormatError
from moclip.store.files import Folder, check_same_process, checked

_SCHEMES = {"s3": "s3", "gs": "gs", "gcs": "gs"}
_CONNECT_S, _READ_S, _ATTEMPTS = 10, 60, 4

_P = ParamSpec("_P")
_T = TypeVar("_T")


def _reaching(method: Callable[Concatenate["RemoteFolder", _P], _T]) -> Callable[Concatenate["RemoteFolder", _P], _T]:
    """A storage that does not answer is a :class:`ConnectionError`, which nobody takes for damage."""

    @functools.wraps(method)
    def call(self: "RemoteFolder", *args: _P.args, **kwargs: _P.kwargs) -> _T:
        check_same_process(self.pid)
        try:
            return method(self, *args, **kwargs)
        except (FileNotFoundError, StoreFormatError, ConnectionError):
            raise
        except _troubles() as error:
            raise unreachable(self.url, error) from error

    return call


def unreachable(where: str, error: BaseException) -> ConnectionError:
    text = str(error).split(" [tensorstore_spec=", 1)[0].split("\n", 1)[0][:300]
    return ConnectionError(
        f"{where} does not answer, or refuses access ({type(error).__name__}: {text}); "
        "what was finished is kept: try again, or check the network and the credentials"
    )


@functools.cache
def _troubles() -> tuple[type[Exception], ...]:
    """What network trouble looks like in the libraries: much of it is no OSError."""
    found: list[type[Exception]] = [OSError, fsspec.exceptions.FSTimeoutError]
    for module, name in (("botocore.exceptions", "BotoCoreError"), ("aiohttp", "ClientError")):
        try:
            found.append(getattr(__import__(module, fromlist=[name]), name))
        except ImportError:
            continue
    return tuple(found)


class RemoteFolder(Folder):
    """A prefix in a bucket. One upload makes a file, so no half of one is ever seen.

    Credentials, region and endpoint come the ordinary way: from the environment and the provider's own files.
    Requests that fail are repeated; after that, :class:`ConnectionError`.
    """

    def __init__(self, url: str, scheme: str) -> None:
        if scheme not in _SCHEMES:
            raise StoreFormatError(f"{url}: no store can be at {scheme}://; expected a path, s3:// or gs://")
        self.pid = os.getpid()
        self._scheme = _SCHEMES[scheme]
        self.url = url.rstrip("/")
        self._root = self.url.split("://", 1)[1]
        if not self._root.strip("/"):
            raise StoreFormatError(f"{url} names no bucket; expected {scheme}://bucket/name")
        try:
            self._fs = _s3() if self._scheme == "s3" else fsspec.filesystem("gs", use_listings_cache=False)
        except ImportError as error:
            raise StoreFormatError(f'{url}: install what it needs with pip install "moclip[{self._scheme}]"') from error

    @property
    def local(self) -> None:
        return None

    @_reaching
    def read(self, name: str) -> bytes:
        return cast(bytes, self._fs.cat_file(self._path(name)))

    @_reaching
    def write(self, name: str, data: bytes) -> None:
        self._fs.pipe_file(self._path(name), data)

    @_reaching
    def put(self, local: Path, name: str) -> None:
        self._fs.put_file(str(local), self._path(name))

    @_reaching
    def exists(self, name: str) -> bool:
        return bool(self._fs.isfile(self._path(name)))

    @_reaching
    def children(self, under: str = "") -> list[str]:
        try:
            found = self._fs.ls(self._path(under), detail=False, refresh=True)
        except FileNotFoundError:
            return []
        names = (path.rstrip("/").rsplit("/", 1)[-1] for path in found if path.rstrip("/") != self._path(under))
        return sorted(name for name in names if not name.startswith("."))

    @_reaching
    def files(self, under: str = "") -> dict[str, int]:
        found = self._fs.find(self._path(under), detail=True, refresh=True)
        return {path.removeprefix(self._root + "/"): int(about["size"]) for path, about in found.items()}

    @_reaching
    def modified(self, name: str) -> float:
        return float(self._fs.modified(self._path(name)).timestamp())

    @_reaching
    def delete(self, name: str) -> None:
        try:
            self._fs.rm_file(self._path(name))
        except FileNotFoundError:
            pass

    @_reaching
    def open(self, name: str) -> BinaryIO:
        return cast(BinaryIO, self._fs.open(self._path(name), "rb"))

    @_reaching
    def kvstore(self, name: str) -> dict[str, Any]:
        bucket, _, prefix = self._path(name).partition("/")
        place: dict[str, Any] = {"driver": "s3" if self._scheme == "s3" else "gcs", "bucket": bucket}
        if self._scheme == "s3":
            place |= _endpoint(self._fs, bucket)
        return {**place, "path": f"{prefix}/"}

    @property
    def context(self) -> dict[str, Any]:
        return _s3_context() if self._scheme == "s3" else {}

    def exclusive(self) -> AbstractContextManager[None]:
        return nullcontext()

    def _path(self, name: str) -> str:
        return f"{self._root}/{checked(name)}".rstrip("/")


def _s3() -> Any:
    """s3fs, which remembers nothing of what a bucket holds, since others write into it, and waits for nothing long."""
    fs = fsspec.filesystem(
        "s3",
        use_listings_cache=False,
        # One GET for a file: several could mix two versions of one that is replaced meanwhile.
        max_concurrency=1,
        config_kwargs={
            "connect_timeout": _CONNECT_S,
            "read_timeout": _READ_S,
            "retries": {"mode": "standard", "total_max_attempts": _ATTEMPTS},
        },
    )
    # On top of botocore's own; a body that is cut short is asked for again only here.
    fs.retries = 2
    return fs


def _endpoint(fs: Any, bucket: str) -> dict[str, str]:
    """Where tensorstore finds the bucket. Amazon's own it finds by itself, unless the bucket's name has a dot."""
    fs.connect()
    endpoint, region = fs.s3.meta.endpoint_url, fs.s3.meta.region_name
    if ".amazonaws.com" in endpoint:
        return {"aws_region": region} if "." in bucket else {}
    return {"endpoint": endpoint, "aws_region": region or "us-east-1"}


def _s3_context() -> dict[str, Any]:
    # Read by tensorstore at its first request: without them it waits for a silent server for ever.
    for name, value in (("LOW_SPEED_TIME_SECONDS", _READ_S), ("LOW_SPEED_LIMIT_BYTES", 1)):
        os.environ.setdefault(f"TENSORSTORE_CURL_{name}", str(value))
    os.environ.setdefault("TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS", str(_CONNECT_S))
    credentials = {"type": "default", "profile": os.environ.get("AWS_PROFILE", "default")}
    if "AWS_ACCESS_KEY_ID" in os.environ:
        credentials = {"type": "environment"}
    return {
        "s3_request_retries": {"max_retries": _ATTEMPTS, "initial_delay": "200ms", "max_delay": "8s"},
        "aws_credentials": credentials,
    }
