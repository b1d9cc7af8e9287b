"""Rows in any container: what writing and reading an array of them means, and the sizes that all containers keep to."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from math import prod
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

#: A chunk is the least that can be read: a few rows, so that random access stays cheap.
CHUNK_BYTES = 16 * 2**10
#: No honest array has chunks or files beyond these; a header that claims more is not believed.
MOST_CHUNK_BYTES = 8 * 2**20
MOST_FILE_BYTES = 16 * 64 * 2**20

#: Which rows: a range, or row numbers in any order.
Selection = slice | npt.NDArray[np.int64]
#: A read that was begun; calling it waits for the rows. Damage is a :class:`StoreFormatError`, never numbers.
Pending = Callable[[], npt.NDArray[Any]]


class Rows(Protocol):
    """An array that was opened for reading; ``shape[0]`` is the number of its rows."""

    shape: tuple[int, ...]

    def start(self, rows: Selection) -> Pending:
        """Begin to read rows."""


class RowReader(Protocol):
    """Opens the arrays of one store."""

    def open(self, shard: str, array: str, column: str, dtype: str, needed: int) -> Rows:
        """A column of an array of ``shard`` (``features/<feature>/<shard>``), lazily.

        :class:`StoreFormatError` unless it can hold ``needed`` rows of ``dtype``.
        """


class RowWriter(ABC):
    """One array that grows by rows, (n, *row_shape). Blocks of ``block`` rows leave memory as soon as they are full."""

    def __init__(self, dtype: str, row_shape: tuple[int, ...], block: int) -> None:
        self.rows = 0
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._row_shape = row_shape
        self._block = block
        self._pending: list[npt.NDArray[Any]] = []
        self._pending_rows = 0

    def append(self, rows: npt.NDArray[Any]) -> None:
        """Add ``rows``, shape (n, *row_shape)."""
        if rows.shape[1:] != self._row_shape:
            raise ValueError(f"rows of shape {rows.shape[1:]} do not fit an array of {self._row_shape}")
        self._pending.append(np.ascontiguousarray(rows, self._dtype))
        self._pending_rows += len(rows)
        self.rows += len(rows)
        if self._pending_rows >= self._block:
            self._flush(self._pending_rows // self._block * self._block)

    def finish(self) -> None:
        """Write what is left. An array without rows leaves nothing."""
        if self._pending_rows:
            self._flush(self._pending_rows)

    def _flush(self, count: int) -> None:
        pending = np.concatenate(self._pending)
        self._write(self.rows - self._pending_rows, pending[:count])
        self._pending = [pending[count:].copy()]
        self._pending_rows -= count

    @abstractmethod
    def _write(self, start: int, rows: npt.NDArray[Any]) -> None:
        """Put ``rows`` behind the ``start`` rows that are written."""


class ShardFiles(Protocol):
    """The files of a shard that is being written, below a local folder."""

    def new_array(
        self, array: str, column: str, dtype: str, row_shape: tuple[int, ...], axes: tuple[str, ...]
    ) -> RowWriter:
        """A column of an array. ``axes`` name the axes of a row, where they have names."""

    def finish(self) -> None:
        """Put the files in place; called after every array's :meth:`RowWriter.finish`."""


def row_bytes(dtype: npt.DTypeLike, row_shape: tuple[int, ...]) -> int:
    return max(1, np.dtype(dtype).itemsize * prod(row_shape))


def chunk_rows(dtype: npt.DTypeLike, row_shape: tuple[int, ...]) -> int:
    """How many rows a chunk holds: about :data:`CHUNK_BYTES`, one at least."""
    return max(1, CHUNK_BYTES // row_bytes(dtype, row_shape))


def first_line(error: BaseException) -> str:
    return str(error).split("\n", 1)[0].split(" [tensorstore_spec=", 1)[0][:300]
