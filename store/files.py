"""The folder of a store, on a disk or in a bucket, and whole files in it.

A reader sees the old file or the new one, never half of either. Names inside a store are relative, joined by ``/``,
and cannot lead out of it.
"""

import fcntl
import hashlib
import os
import re
import stat
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from moclip.errors import FeatureError, StoreFormatError

#: What it looks like when a file is not there, as distinct from a disk or a network that does not answer.
NO_FILE = (FileNotFoundError, IsADirectoryError, NotADirectoryError)

_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_NO_LINKS = "a store has none, since they can lead out of it"
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")


class Folder(ABC):
    """The root of a store. ``url`` is an absolute path, or the address of a prefix in a bucket."""

    url: str

    def __repr__(self) -> str:
        return f"Folder({self.url!r})"

    def __str__(self) -> str:
        return self.url

    def at(self, name: str) -> str:
        """Where ``name`` lies, for messages."""
        return f"{self.url}/{name}"

    @abstractmethod
    def read(self, name: str) -> bytes:
        """A whole file. :class:`FileNotFoundError` if it is not there."""

    @abstractmethod
    def write(self, name: str, data: bytes) -> None:
        """Put a whole file in place at once."""

    @abstractmethod
    def create(self, name: str, data: bytes) -> None:
        """Like :meth:`write`, but what came there first stays, as far as the storage can tell."""

    @abstractmethod
    def put(self, local: Path, name: str) -> None:
        """Bring a finished local file into the store, at once."""

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Whether there is a file ``name``."""

    @abstractmethod
    def children(self, under: str = "") -> list[str]:
        """The names directly below ``under``, files and folders, in order; unfinished (hidden) ones left out."""

    @abstractmethod
    def files(self, under: str = "") -> dict[str, int]:
        """Every file below ``under``, hidden ones too, with its size in bytes."""

    @abstractmethod
    def modified(self, name: str) -> float:
        """When a file was last written, in seconds since 1970."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Remove one file, if it is there, and folders that it leaves empty."""

    @abstractmethod
    def open(self, name: str) -> BinaryIO:
        """A file to read from at any position. :class:`FileNotFoundError` if it is not there."""

    @abstractmethod
    def kvstore(self, name: str) -> dict[str, Any]:
        """How tensorstore names the folder ``name``."""

    @property
    def context(self) -> dict[str, Any]:
        """What tensorstore needs to know besides, shared by all arrays of the store."""
        return {}

    @property
    @abstractmethod
    def local(self) -> Path | None:
        """The folder's path where it is on a disk of this machine."""

    @abstractmethod
    def exclusive(self) -> AbstractContextManager[None]:
        """Hold the store alone while a table is read, changed and written back, where that can be had."""


def open_folder(url: str | Path) -> Folder:
    """The folder that a path or an address (``s3://bucket/prefix``, ``gs://…``) names; it may not exist yet."""
    text = os.fspath(url)
    scheme = _SCHEME.match(text)
    if scheme is None:
        return LocalFolder(text)
    if scheme[1] == "file":
        return LocalFolder(text.removeprefix("file://"))
    from moclip.store.remote import RemoteFolder

    return RemoteFolder(text, scheme[1])


class LocalFolder(Folder):
    """A folder on a disk."""

    def __init__(self, path: str) -> None:
        # Absolute at once: a pickled store must open in a process with another working directory.
        self._path = Path(os.path.abspath(path))
        self.url = str(self._path)

    @property
    def local(self) -> Path:
        return self._path

    def read(self, name: str) -> bytes:
        with self.open(name) as file:
            return file.read()

    def write(self, name: str, data: bytes) -> None:
        write_atomic(self._inside(name), data)

    def create(self, name: str, data: bytes) -> None:
        write_atomic(self._inside(name), data, into_place=_link)

    def put(self, local: Path, name: str) -> None:
        target = self._inside(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(local, target)

    def exists(self, name: str) -> bool:
        return self._inside(name).is_file()

    def children(self, under: str = "") -> list[str]:
        try:
            return sorted(name for name in os.listdir(self._inside(under)) if not name.startswith("."))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def files(self, under: str = "") -> dict[str, int]:
        found: dict[str, int] = {}
        for parent, folders, names in _walk(self._inside(under)):
            # A link to a folder is not followed, but it is there.
            for name in (*names, *(name for name in folders if os.path.islink(os.path.join(parent, name)))):
                path = os.path.join(parent, name)
                with suppress(FileNotFoundError):  # an unfinished file of a run that goes on meanwhile
                    found[os.path.relpath(path, self._path).replace(os.sep, "/")] = os.lstat(path).st_size
        return found

    def modified(self, name: str) -> float:
        return self._inside(name).stat().st_mtime

    def delete(self, name: str) -> None:
        path = self._inside(os.path.dirname(name)) / os.path.basename(name)
        path.unlink(missing_ok=True)
        for parent in path.parents:
            if parent == self._path or not parent.is_dir() or any(parent.iterdir()):
                return
            parent.rmdir()

    def open(self, name: str) -> BinaryIO:
        path = self._inside(name)
        _check_plain(path, os.lstat(path).st_mode)
        return open(path, "rb")

    def kvstore(self, name: str) -> dict[str, Any]:
        path = self._inside(name)
        for parent, folders, files in _walk(path):
            for entry in (*folders, *files):
                within = Path(parent, entry)
                _check_plain(within, os.lstat(within).st_mode)
        return {"driver": "file", "path": f"{path}/"}

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """By a lock on ``zarr.json``, which ends with the process."""
        with open(self._path / "zarr.json", "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _inside(self, name: str) -> Path:
        """The path of ``name``, without a link on the way, which a stranger may have set."""
        path = self._path / checked(name)
        if os.path.realpath(path) != os.path.normpath(os.path.join(os.path.realpath(self._path), name)):
            raise StoreFormatError(f"{path} is, or lies behind, a link; {_NO_LINKS}")
        return path


def _walk(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """As :func:`os.walk`, which leaves out a folder that it cannot list; then files would seem to be missing."""

    def fail(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise error

    return os.walk(folder, onerror=fail)


def _check_plain(path: Path, mode: int) -> None:
    """Refuse what is neither a file nor a folder: a link may lead out, and opening a pipe waits for ever."""
    if stat.S_ISLNK(mode):
        raise StoreFormatError(f"{path} is a link; {_NO_LINKS}")
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise StoreFormatError(f"{path} is a pipe or a device; a store has only files and folders")


def checked(name: str) -> str:
    """Return ``name`` unless it would lead out of the store."""
    if name.startswith("/") or ".." in name.split("/") or "\0" in name:
        raise StoreFormatError(f"{name!r} is no place inside a store")
    return name


def write_atomic(path: Path, data: bytes, into_place: Callable[[Path, Path], object] | None = None) -> None:
    """Write ``data`` under a temporary name, flush it to the disk, and rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        (into_place or os.replace)(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _link(temporary: Path, path: Path) -> None:
    """Give a finished file its name, unless that is taken."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    except OSError:  # some disks know no second names of a file
        if not path.exists():
            os.replace(temporary, path)


def exclusive(url: str | Path) -> AbstractContextManager[None]:
    """Hold a store alone while its labels are read, changed and written back; others wait.

    Object storage has no locks: there the last writer wins.
    """
    return open_folder(url).exclusive()


def check_same_process(pid: int) -> None:
    """:class:`FeatureError` in a child that was forked off process ``pid``, which had a store open.

    tensorstore's threads, HDF5's locks and connections do not survive a fork: a read would hang or abort.
    """
    if os.getpid() != pid:
        raise FeatureError(
            "this process was forked off one that had a store open; start it with 'spawn' or 'forkserver' instead"
        )


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_name(name: str, what: str) -> str:
    """Return ``name`` if it can be one part of a path inside the store; a stranger's table may hold anything."""
    if not _SAFE_NAME.fullmatch(name) or ".." in name:
        raise StoreFormatError(
            f"{what} {name!r} cannot be a name in a store: expected letters, digits, '.', '_' and '-', "
            "starting with a letter or digit"
        )
    return name
