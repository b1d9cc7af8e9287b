"""The Zarr container: a shard is a folder of sharded Zarr v3 arrays, written in aligned blocks, by tensorstore.

tensorstore reads random rows of such arrays tens of times faster than zarr-python; zarr-python reads the same files.
"""

import os
from collections.abc import Mapping
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorstore as ts

from moclip.errors import StoreFormatError
from moclip.store.containers.rows import (
    MOST_CHUNK_BYTES,
    MOST_FILE_BYTES,
    Pending,
    RowWriter,
    Selection,
    chunk_rows,
    first_line,
    row_bytes,
)
from moclip.store.files import Folder, check_same_process, write_atomic
from moclip.store.groups import GROUP

#: A Zarr shard is one file. It is also the block that a writer holds in memory before it goes to disk.
SHARD_BYTES = 64 * 2**20
#: Where the chunks of a Zarr shard lie is remembered between reads, within this much memory.
_CACHE_BYTES = 64 * 2**20

_NO_ANSWER = (
    "ABORTED",
    "DEADLINE_EXCEEDED",
    "INTERNAL",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "UNAUTHENTICATED",
    "UNAVAILABLE",
)

#: The names of the codecs that :func:`_sharding` gives: outer, inner, and of the index.
_CODECS = [["sharding_indexed"], ["bytes", "blosc", "crc32c"], ["bytes", "crc32c"]]

_threads: int | None = None
#: The process whose tensorstore this is: in one that was forked off it, even a new store would abort.
_process: int | None = None


def limit_threads(threads: int) -> None:
    """Let this process's arrays use at most ``threads`` threads each for compression and for files."""
    global _threads
    _threads = threads


def _context(cache_bytes: int, more: Mapping[str, Any] = MappingProxyType({})) -> ts.Context:
    global _process
    _process = _process or os.getpid()
    check_same_process(_process)
    limits = {} if _threads is None else {"limit": _threads}
    names = ("data_copy_concurrency", "file_io_concurrency") if limits else ()
    return ts.Context({"cache_pool": {"total_bytes_limit": cache_bytes}, **dict.fromkeys(names, limits), **more})


def block_rows(dtype: npt.DTypeLike, row_shape: tuple[int, ...]) -> int:
    """How many rows one Zarr shard holds: a whole number of chunks, about ``SHARD_BYTES`` in all."""
    chunk = chunk_rows(dtype, row_shape)
    return max(1, SHARD_BYTES // (chunk * row_bytes(dtype, row_shape))) * chunk


class ZarrShard:
    """A shard's folder: a Zarr group for each array, in it a Zarr array for each column."""

    def __init__(self, base: Path, name: str, about: str) -> None:
        self._folder = base / name

    def new_array(
        self, array: str, column: str, dtype: str, row_shape: tuple[int, ...], axes: tuple[str, ...]
    ) -> "ZarrWriter":
        group = self._folder / array
        if not group.exists():
            for folder in (self._folder, group):
                write_atomic(folder / "zarr.json", GROUP)
        return ZarrWriter(group / column, dtype, row_shape, axes)

    def finish(self) -> None:
        """Nothing to do: what no receipt names is not there."""


class ZarrWriter(RowWriter):
    """Every write but the last covers whole Zarr shards, so that no file is ever read back and rewritten."""

    def __init__(self, path: Path, dtype: str, row_shape: tuple[int, ...], axes: tuple[str, ...]) -> None:
        super().__init__(dtype, row_shape, block_rows(dtype, row_shape))
        self._path = path
        self._axes = axes
        self._array: ts.TensorStore | None = None

    def _write(self, start: int, rows: npt.NDArray[Any]) -> None:
        stop = start + len(rows)
        if self._array is None:
            self._array = self._create(stop)
        elif self._array.shape[0] < stop:
            self._array = self._array.resize(exclusive_max=[stop, *self._row_shape]).result()
        self._array[start:stop].write(rows).result()

    def _create(self, first_rows: int) -> ts.TensorStore:
        chunk = chunk_rows(self._dtype, self._row_shape)
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
            "kvstore": {"driver": "file", "path": f"{self._path}/"},
            "metadata": metadata,
            "create": True,
            # Zeros are values: a chunk that is not there must be a loss that shows, not a row of zeros.
            "store_data_equal_to_fill_value": True,
        }
        return ts.open(spec, context=_context(0)).result()


def _sharding(chunk_shape: list[int], item_bytes: int) -> dict[str, Any]:
    """Chunks of bit-shuffled zstd, each with a crc32c: a flipped bit is an error, never a feature."""
    blosc = {
        "cname": "zstd",
        # zstd's level 1. Level 5 saves 6 % of small rows, none of large ones, and takes half as long again to write.
        "clevel": 1,
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


class ZarrRows:
    """A Zarr array that was opened for reading."""

    def __init__(self, array: ts.TensorStore, where: str) -> None:
        self._array = array
        self._where = where
        self.shape = tuple(int(size) for size in array.shape)

    def start(self, rows: Selection) -> Pending:
        future = self._array[rows].read()

        def wait() -> npt.NDArray[Any]:
            try:
                values: npt.NDArray[Any] = future.result()
            except (ValueError, OSError) as error:
                raise _trouble(f"the array {self._where} is damaged", self._where, error) from error
            return values

        return wait


def _trouble(what: str, where: str, error: Exception) -> Exception:
    """Damage, unless tensorstore's error begins with the word that it has for a storage that does not answer."""
    if str(error).startswith(_NO_ANSWER):
        return ConnectionError(f"{where} does not answer, or refuses access: {first_line(error)}; try again")
    return StoreFormatError(f"{what}: {first_line(error)}")


class ZarrReader:
    """Opens the arrays of one store."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._context = _context(_CACHE_BYTES, folder.context)

    def open(self, shard: str, array: str, column: str, dtype: str, needed: int) -> ZarrRows:
        name = f"{shard}/{array}/{column}"
        where = self._folder.at(name)
        spec = {
            "driver": "zarr3",
            "kvstore": self._folder.kvstore(name),
            "open": True,
            "fill_missing_data_reads": False,
            # Files of a store never change: what was read of one stays true.
            "recheck_cached_data": False,
            "recheck_cached_metadata": False,
        }
        try:
            found = ts.open(spec, read=True, context=self._context).result()
        except (ValueError, OSError) as error:
            raise _trouble(f"cannot open the array {where}", where, error) from error
        if found.ndim < 1 or found.dtype.numpy_dtype != np.dtype(dtype):
            raise StoreFormatError(f"the array {where} holds {found.dtype.name}, its specification says {dtype}")
        _check_codecs(found, where)
        _check_sizes(found, self._folder, name, needed)
        return ZarrRows(found, where)


def _check_codecs(array: ts.TensorStore, where: str) -> None:
    """Other codecs may have no checksum, or make gigabytes of a few bytes; blosc says how much comes out."""
    codecs = array.spec().to_json()["metadata"]["codecs"]
    inner = codecs[0].get("configuration", {})
    lists = (codecs, inner.get("codecs", []), inner.get("index_codecs", []))
    if [[codec["name"] for codec in each] for each in lists] != _CODECS:
        raise StoreFormatError(f"the array {where} has other codecs than moclip writes")


def _check_sizes(array: ts.TensorStore, folder: Folder, name: str, needed: int) -> None:
    """A header may claim any number, and memory is taken for it: beyond a file's worth, the files must be there."""
    where, item = folder.at(name), array.dtype.numpy_dtype.itemsize
    layout = array.chunk_layout
    block, chunk = ([int(size or 1) for size in part.shape or ()] for part in (layout.write_chunk, layout.read_chunk))
    if block[1:] != list(array.shape[1:]) or chunk[1:] != block[1:]:
        raise StoreFormatError(f"the array {where} has chunks of {chunk} for rows of {array.shape[1:]}; never so")
    if prod(block) * item > MOST_FILE_BYTES or prod(chunk) * item > MOST_CHUNK_BYTES:
        raise StoreFormatError(f"the array {where} claims files of {block} numbers; they are never so large")
    there = array.shape[0]
    if needed * prod(array.shape[1:]) * item > SHARD_BYTES:
        there = min(there, len(folder.files(f"{name}/c")) * block[0])
    if there < needed:
        raise StoreFormatError(f"the array {where} has {there} rows; the entries name {needed} rows of it")
