"""Rows on disk: one sharded Zarr v3 array, written in aligned blocks and read by row number, by tensorstore.

tensorstore reads random rows of such arrays tens of times faster than zarr-python; zarr-python reads the same files.
"""

import os
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorstore as ts

from moclip.errors import StoreFormatError

#: A chunk is the least that can be read: a few rows, so that random access stays cheap.
CHUNK_BYTES = 16 * 2**10
#: A Zarr shard is one file. It is also the block that a writer holds in memory before it goes to disk.
SHARD_BYTES = 64 * 2**20

_threads: int | None = None


def limit_threads(threads: int) -> None:
    """Let this process's arrays use at most ``threads`` threads each for compression and for files."""
    global _threads
    _threads = threads
    _context.cache_clear()


@lru_cache(maxsize=1)
def _context() -> ts.Context:
    if _threads is None:
        return ts.Context()
    limit = {"limit": _threads}
    return ts.Context({"data_copy_concurrency": limit, "file_io_concurrency": limit})


def block_rows(dtype: npt.DTypeLike, row_shape: tuple[int, ...]) -> int:
    """How many rows one Zarr shard holds: a whole number of chunks, about ``SHARD_BYTES`` in all."""
    row_bytes = _row_bytes(dtype, row_shape)
    chunk = _chunk_rows(row_bytes)
    return max(1, SHARD_BYTES // (chunk * row_bytes)) * chunk


def _row_bytes(dtype: npt.DTypeLike, row_shape: tuple[int, ...]) -> int:
    return max(1, np.dtype(dtype).itemsize * prod(row_shape))


def _chunk_rows(row_bytes: int) -> int:
    return max(1, CHUNK_BYTES // row_bytes)


class ArrayWriter:
    """One array that grows by rows. Blocks of ``block_rows`` go to disk as soon as they are full.

    Every write but the last covers whole Zarr shards, so that no file is ever read back and rewritten.
    """

    def __init__(self, path: Path, dtype: str, row_shape: tuple[int, ...], axes: tuple[str, ...]) -> None:
        self.path = path
        self.rows = 0
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._row_shape = row_shape
        self._axes = axes
        self._block = block_rows(dtype, row_shape)
        self._pending: list[npt.NDArray[Any]] = []
        self._pending_rows = 0
        self._array: ts.TensorStore | None = None

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
        """Write what is left. An array without rows leaves no files."""
        if self._pending_rows:
            self._flush(self._pending_rows)

    def _flush(self, count: int) -> None:
        pending = np.concatenate(self._pending)
        start = self.rows - self._pending_rows
        if self._array is None:
            self._array = self._create(count)
        elif self._array.shape[0] < start + count:
            self._array = self._array.resize(exclusive_max=[start + count, *self._row_shape]).result()
        self._array[start : start + count].write(pending[:count]).result()
        self._pending = [pending[count:].copy()]
        self._pending_rows -= count

    def _create(self, first_rows: int) -> ts.TensorStore:
        chunk = _chunk_rows(_row_bytes(self._dtype, self._row_shape))
        # An array that fits in one file gets a file of its own size, not a large one with an empty index.
        shard = min(self._block, -(-first_rows // chunk) * chunk)
        names = ["row", *self._axes] if self._axes or not self._row_shape else None
        metadata = {
            "shape": [first_rows, *self._row_shape],
            "data_type": self._dtype.name,
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": [shard, *self._row_shape]},
            },
            "codecs": [_sharding([chunk, *self._row_shape], self._dtype.itemsize)],
            **({"dimension_names": names} if names else {}),
        }
        spec = {
            "driver": "zarr3",
            "kvstore": _kvstore(self.path),
            "metadata": metadata,
            "create": True,
            # Zeros are values: a chunk that is not there must be a loss that shows, not a row of zeros.
            "store_data_equal_to_fill_value": True,
        }
        return ts.open(spec, context=_context()).result()


def _kvstore(path: Path) -> dict[str, Any]:
    return {"driver": "file", "path": f"{path}/"}


def _sharding(chunk_shape: list[int], item_bytes: int) -> dict[str, Any]:
    """Chunks of bit-shuffled zstd, each with a crc32c: a flipped bit is an error, never a feature."""
    blosc = {
        "cname": "zstd",
        "clevel": 5,
        "shuffle": "bitshuffle",
        "typesize": item_bytes,
        "blocksize": 0,
    }
    return {
        "name": "sharding_indexed",
        "configuration": {
            "chunk_shape": chunk_shape,
            "codecs": [
                {"name": "bytes", "configuration": {"endian": "little"}},
                {"name": "blosc", "configuration": blosc},
                {"name": "crc32c"},
            ],
            "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
            "index_location": "end",
        },
    }


def open_array(path: Path, dtype: str) -> ts.TensorStore:
    """Open an array for reading, lazily. :class:`StoreFormatError` if it is missing or of another dtype."""
    spec = {
        "driver": "zarr3",
        "kvstore": _kvstore(path),
        "open": True,
        "fill_missing_data_reads": False,
    }
    try:
        array = ts.open(spec, read=True, context=_context()).result()
    except ValueError as error:
        raise StoreFormatError(f"cannot open the array {path}: {_first_line(error)}") from error
    if array.dtype.numpy_dtype != np.dtype(dtype):
        raise StoreFormatError(f"the array {path} holds {array.dtype.name}, its specification says {dtype}")
    return array


def rows_on_disk(array: ts.TensorStore, path: Path) -> int:
    """How many rows the array's files can hold. A header may claim any number, and memory would be taken for it."""
    block = [int(size or 1) for size in array.chunk_layout.write_chunk.shape or ()]
    if not block:
        return 0
    if prod(block) * array.dtype.numpy_dtype.itemsize > 16 * SHARD_BYTES:
        raise StoreFormatError(f"the array {path} claims files of {block} numbers; they are never so large")
    files = sum(1 for entry in os.scandir(path / "c")) if (path / "c").is_dir() else 0
    return files * block[0]


def read_rows(array: ts.TensorStore, rows: slice | npt.NDArray[np.int64]) -> "ts.Future[Any]":
    """Start reading rows; :func:`result` waits for them."""
    return array[rows].read()


def result(future: "ts.Future[Any]", path: Path) -> npt.NDArray[Any]:
    """Wait for rows. Damage (a checksum, a chunk that does not decode) is an error, never numbers."""
    try:
        values: npt.NDArray[Any] = future.result()
    except (ValueError, OSError) as error:
        raise StoreFormatError(f"the array {path} is damaged: {_first_line(error)}") from error
    return values


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0][:300]
