"""A store in a bucket: s3fs for ``s3://`` (extra [s3]), gcsfs for ``gs://`` (extra [gs]); arrays by tensorstore.

Both libraries get the endpoint and the region that s3fs found, so that one way to say them serves both.
"""

import functools
import io
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO, Concatenate, ParamSpec, TypeVar, cast

import fsspec

from moclip.errors import StoreFormatError, StoreNotFoundError
from moclip.store.files import Folder, check_same_process, checked

_SCHEMES = {"s3": "s3", "gs": "gs", "gcs": "gs"}
_MODIFIED = {"s3": "LastModified", "gs": "mtime"}
#: How long a connection and a silence may take, in seconds, and how often a request is sent until it is given up.
CONNECT_S, READ_S, ATTEMPTS = 10, 30, 3
#: What a file that is read bit by bit is fetched in.
_BLOCK_BYTES = 8 * 2**20
#: What network trouble looks like in the libraries: much of it is no OSError.
_TROUBLES = (
    ("botocore.exceptions", "BotoCoreError"),
    ("aiohttp", "ClientError"),
    ("gcsfs.retry", "HttpError"),
    ("gcsfs.retry", "ChecksumError"),
    ("gcsfs.retry", "NonRetryableError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("google.api_core.exceptions", "GoogleAPIError"),
)

_P = ParamSpec("_P")
_T = TypeVar("_T")


def _reaching(method: Callable[Concatenate["RemoteFolder", _P], _T]) -> Callable[Concatenate["RemoteFolder", _P], _T]:
    """A storage that does not answer is a :class:`ConnectionError`, which nobody takes for damage."""

    @functools.wraps(method)
    def call(self: "RemoteFolder", /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        check_same_process(self.pid)
        try:
            return method(self, *args, **kwargs)
        except (FileNotFoundError, StoreFormatError):
            raise
        except _troubles() as error:
            text = str(error).split("\n", 1)[0][:300]
            raise ConnectionError(
                f"{self.url} does not answer, or refuses access ({type(error).__name__}: {text}); "
                "what was finished is kept: try again, or check the network and the credentials"
            ) from error

    return call


@functools.cache
def _troubles() -> tuple[type[Exception], ...]:
    found: list[type[Exception]] = [OSError, fsspec.exceptions.FSTimeoutError]
    for module, name in _TROUBLES:
        try:
            found.append(getattr(import_module(module), name))
        except (ImportError, AttributeError):  # of the other provider, or of another version
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
        parts = [part for part in url.split("://", 1)[1].split("/") if part]
        if not parts or {".", ".."} & set(parts):
            raise StoreFormatError(f"{url} is no place in a bucket; expected {scheme}://bucket/name")
        self._root = "/".join(parts)
        self.url = f"{scheme}://{self._root}"
        try:
            self._fs = _s3() if self._scheme == "s3" else fsspec.filesystem("gs", use_listings_cache=False)
        except ImportError as error:
            library = {"s3": "s3fs", "gs": "gcsfs"}[self._scheme]
            raise StoreFormatError(f"{url} needs {library}; `pip install {library}` brings it") from error

    @property
    def local(self) -> None:
        return None

    @_reaching
    def read(self, name: str) -> bytes:
        return cast(bytes, self._fs.cat_file(self._path(name)))

    @_reaching
    def write(self, name: str, data: bytes) -> None:
        self._upload(self._fs.pipe_file, self._path(name), data)

    def create(self, name: str, data: bytes) -> None:
        try:
            self._create(name, data)
        except ConnectionError:
            # Maybe only because it is there, or the storage has no such request.
            if not self.exists(name):
                self.write(name, data)

    @_reaching
    def _create(self, name: str, data: bytes) -> None:
        self._upload(self._fs.pipe_file, self._path(name), data, mode="create")

    @_reaching
    def put(self, local: Path, name: str) -> None:
        self._upload(self._fs.put_file, str(local), self._path(name))

    def _upload(self, send: Callable[..., object], *args: object, **options: object) -> None:
        try:
            send(*args, **options)
        except FileNotFoundError as error:
            bucket = self._root.split("/", 1)[0]
            raise StoreNotFoundError(f"{self.url}: there is no bucket {bucket}; make it first") from error

    @_reaching
    def exists(self, name: str) -> bool:
        # Not isfile, for which a file that cannot be reached is one that is not there.
        try:
            return bool(self._fs.info(self._path(name))["type"] == "file")
        except FileNotFoundError:
            return False

    @_reaching
    def children(self, under: str = "") -> list[str]:
        path = self._path(under)
        try:
            if path == self._root and "/" in path:
                # Where there is nothing, ls would go on and list all that lies beside it.
                self._fs.info(path)
            found = self._fs.ls(path, detail=False, refresh=True)
        except FileNotFoundError:
            return []
        names = (child.rstrip("/").rsplit("/", 1)[-1] for child in found if child.rstrip("/") != path)
        return sorted(name for name in names if not name.startswith("."))

    @_reaching
    def files(self, under: str = "") -> dict[str, int]:
        try:
            found = self._fs.find(self._path(under), detail=True, refresh=True)
        except FileNotFoundError:
            return {}
        return {path.removeprefix(self._root + "/"): int(about["size"]) for path, about in found.items()}

    @_reaching
    def modified(self, name: str) -> float:
        return float(self._fs.info(self._path(name))[_MODIFIED[self._scheme]].timestamp())

    @_reaching
    def delete(self, name: str) -> None:
        try:
            self._fs.rm_file(self._path(name))
        except FileNotFoundError:
            pass

    def open(self, name: str) -> BinaryIO:
        return cast(BinaryIO, io.BufferedReader(_Ranges(self, name, self.size(name)), _BLOCK_BYTES))

    @_reaching
    def size(self, name: str) -> int:
        """How long a file is, in bytes."""
        return int(self._fs.info(self._path(name))["size"])

    @_reaching
    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """Some of a file's bytes."""
        return cast(bytes, self._fs.cat_file(self._path(name), start=start, end=stop))

    @_reaching
    def kvstore(self, name: str) -> dict[str, Any]:
        bucket, _, prefix = self._path(name).partition("/")
        place = {"driver": "gcs"}
        if self._scheme == "s3":
            place = {"driver": "s3", **_endpoint(self._fs, bucket)}
        return {**place, "bucket": bucket, "path": f"{prefix}/"}

    @property
    def context(self) -> dict[str, Any]:
        # Read by tensorstore at its first request: without them it waits for a silent server for ever.
        for name, value in (("LOW_SPEED_TIME_SECONDS", READ_S), ("LOW_SPEED_LIMIT_BYTES", 1)):
            os.environ.setdefault(f"TENSORSTORE_CURL_{name}", str(value))
        os.environ.setdefault("TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS", str(CONNECT_S))
        retries = {"max_retries": ATTEMPTS, "initial_delay": "200ms", "max_delay": "8s"}
        if self._scheme == "gs":
            return {"gcs_request_retries": retries}
        return {"s3_request_retries": retries, "aws_credentials": _credentials()}

    def exclusive(self) -> AbstractContextManager[None]:
        return nullcontext()

    def _path(self, name: str) -> str:
        return f"{self._root}/{checked(name)}".rstrip("/")


class _Ranges(io.RawIOBase):
    """A file in a bucket, read from wherever it is asked."""

    def __init__(self, folder: RemoteFolder, name: str, size: int) -> None:
        self._folder, self._name, self._size, self._at = folder, name, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        stop = min(self._at + len(buffer), self._size)
        data = self._folder.read_range(self._name, self._at, stop) if self._at < stop else b""
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _s3() -> Any:
    """s3fs, which remembers nothing of what a bucket holds, since others write into it, and waits for nothing long."""
    fs = fsspec.filesystem(
        "s3",
        use_listings_cache=False,
        # One GET for a file: several could mix two versions of one that is replaced meanwhile.
        max_concurrency=1,
        config_kwargs={
            "connect_timeout": CONNECT_S,
            "read_timeout": READ_S,
            "retries": {"mode": "standard", "total_max_attempts": ATTEMPTS},
        },
    )
    # On top of botocore's own; a body that is cut short is asked for again only here.
    fs.retries = 2
    return fs


def _endpoint(fs: Any, bucket: str) -> dict[str, str]:
    """Where tensorstore finds the bucket. Amazon's own it finds by itself, unless the bucket's name has a dot."""
    fs.connect()
    endpoint, region = fs.s3.meta.endpoint_url, fs.s3.meta.region_name
    if endpoint in ("https://s3.amazonaws.com", f"https://s3.{region}.amazonaws.com"):
        return {"aws_region": region} if "." in bucket else {}
    return {"endpoint": endpoint, "aws_region": region or "us-east-1"}


def _credentials() -> dict[str, str]:
    """The same ones that botocore takes: variables win over profiles."""
    if "AWS_ACCESS_KEY_ID" in os.environ:
        return {"type": "environment"}
    return {"type": "default", "profile": os.environ.get("AWS_PROFILE", "default")}
