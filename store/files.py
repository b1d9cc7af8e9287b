"""Whole files, written so that a reader sees the old one or the new one and never half of either."""

import fcntl
import hashlib
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moclip.errors import StoreFormatError

_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


def write_atomic(path: Path, data: bytes) -> None:
    """Write ``data`` under a temporary name, flush it to the disk, and rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def exclusive(root: Path) -> Iterator[None]:
    """Hold the store alone while a table is read, changed and written back; others wait. Ends with the process."""
    with open(root / "zarr.json", "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


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
