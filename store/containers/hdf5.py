"""The HDF5 container: a shard is one .h5 file, a group for each array and in it a dataset for each column.

Metadata and chunks carry checksums (file format 1.10, fletcher32), compression is gzip: h5py alone reads the files.
"""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from moclip.errors import StoreFormatError
from moclip.store.containers.rows import (
    MOST_CHUNK_BYTES,
    Pending,
    RowWriter,
    Selection,
    chunk_rows,
    first_line,
    row_bytes,
)
from moclip.store.files import Folder

SUFFIX = ".h5"
#: What a writer holds in memory before it goes to disk, about.
_BLOCK_BYTES = 2**20
#: HDF5's own names for gzip, shuffle and fletcher32; a file that asks for other filters asks for code.
_FILTERS = [h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_FLETCHER32]
#: Each open file takes a descriptor, of which a process has about a thousand; one from a bucket is in memory whole.
_OPEN_FILES, _REMOTE_FILES = 256, 8
#: The system's numbers for a disk or a process in trouble, which is no damage. HDF5 passes them on.
_TROUBLES = {errno.EACCES, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EPERM, errno.ESTALE}


class Hdf5Shard:
    """A shard's file. It has a hidden name until it is finished."""

    def __init__(self, base: Path, name: str, about: str) -> None:
        self._path = base / (name + SUFFIX)
        self._hidden = self._path.with_name(f".{self._path.name}.tmp")
        self._about = about
        self._file: h5py.File | None = None

    def new_array(
        self, array: str, column: str, dtype: str, row_shape: tuple[int, ...], axes: tuple[str, ...]
    ) -> "Hdf5Writer":
        if self._file is None:
            self._hidden.parent.mkdir(parents=True, exist_ok=True)
            # From 1.10 on, HDF5 puts checksums on its metadata too.
            self._file = h5py.File(self._hidden, "w", libver=("v110", "v110"))
            self._file.attrs["moclip"] = self._about
        return Hdf5Writer(self._file.require_group(array), column, dtype, row_shape, axes)

    def finish(self) -> None:
        if self._file is None:
            return
        self._file.close()
        with open(self._hidden, "rb") as file:
            os.fsync(file.fileno())
        os.replace(self._hidden, self._path)


class Hdf5Writer(RowWriter):
    """Every write but the last covers whole chunks, so that none is compressed twice."""

    def __init__(
        self, group: h5py.Group, column: str, dtype: str, row_shape: tuple[int, ...], axes: tuple[str, ...]
    ) -> None:
        chunk = chunk_rows(dtype, row_shape)
        super().__init__(dtype, row_shape, max(1, _BLOCK_BYTES // (chunk * row_bytes(dtype, row_shape))) * chunk)
        self._dataset = group.create_dataset(
            column,
            (0, *row_shape),
            self._dtype,
            maxshape=(None, *row_shape),
            chunks=(chunk, *row_shape),
            compression="gzip",
            compression_opts=1,
            shuffle=True,
            fletcher32=True,
            track_times=False,
        )
        for dimension, axis in zip(self._dataset.dims, ("row", *axes), strict=False):
            dimension.label = axis

    def _write(self, start: int, rows: npt.NDArray[Any]) -> None:
        self._dataset.resize(start + len(rows), axis=0)
        self._dataset[start:] = rows


class Hdf5Rows:
    """A dataset that was opened for reading. It is found anew at each read, since a dataset keeps its file open."""

    def __init__(self, find: Callable[[], h5py.Dataset], where: str) -> None:
        self._find = find
        self._where = where
        self.shape: tuple[int, ...] = find().shape

    def start(self, rows: Selection) -> Pending:
        def read() -> npt.NDArray[Any]:
            with _damage(f"the dataset {self._where} is damaged"):
                dataset = self._find()
                values: npt.NDArray[Any] = dataset[rows] if isinstance(rows, slice) else _read_each(dataset, rows)
                return values

        return read


@contextmanager
def _damage(what: str) -> Iterator[None]:
    """HDF5's errors are damage, unless the disk or the bucket did not give the bytes."""
    try:
        yield
    except (StoreFormatError, ConnectionError):
        raise
    except (OSError, KeyError, RuntimeError, ValueError, TypeError) as error:
        if isinstance(error, OSError) and error.errno in _TROUBLES:
            raise
        raise StoreFormatError(f"{what}: {first_line(error)}") from error


def _read_each(dataset: h5py.Dataset, rows: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    """Rows one by one, in the file's order: h5py's own lists of rows take several times as long."""
    out = np.empty((len(rows), *dataset.shape[1:]), dataset.dtype)
    one = (1, *dataset.shape[1:])
    zeros = (0,) * (len(one) - 1)
    memory, file = h5py.h5s.create_simple(one), dataset.id.get_space()
    for k in np.argsort(rows, kind="stable").tolist():
        file.select_hyperslab((int(rows[k]), *zeros), one)
        dataset.id.read(memory, file, out[k : k + 1])
    return out


class Hdf5Reader:
    """Opens the datasets of one store, and keeps the files that were used last open."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._open_file = lru_cache(_OPEN_FILES if folder.local else _REMOTE_FILES)(self._open_file_anew)

    def open(self, shard: str, array: str, column: str, dtype: str, needed: int) -> Hdf5Rows:
        where = f"{self._folder.at(shard + SUFFIX)}:/{array}/{column}"
        with _damage(f"cannot open the dataset {where}"):
            rows = Hdf5Rows(
                lambda: self._open_file(shard + SUFFIX).dataset(f"{array}/{column}", np.dtype(dtype), where), where
            )
        if rows.shape[0] < needed:
            raise StoreFormatError(
                f"the dataset {where} has {rows.shape[0]} rows; the entries name {needed} rows of it"
            )
        return rows

    def _open_file_anew(self, name: str) -> "_OpenFile":
        if self._folder.local is None:
            return _OpenFile(h5py.File.in_memory(self._folder.read(name)))
        self._folder.open(name).close()  # which looks for links that lead out of the store
        # Nobody writes into a finished file, so it needs no lock, which some network disks refuse.
        return _OpenFile(h5py.File(self._folder.local / name, "r", locking=False))


class _OpenFile:
    """A file and the datasets that were found in it; it closes when it is forgotten together with them."""

    def __init__(self, file: h5py.File) -> None:
        self._file = file
        self._datasets: dict[str, h5py.Dataset] = {}

    def dataset(self, name: str, dtype: np.dtype[Any], where: str) -> h5py.Dataset:
        """The dataset ``name``, checked when it is first asked for."""
        if name not in self._datasets:
            dataset = _dataset(self._file, name, where)
            _check(dataset, where, dtype)
            self._datasets[name] = dataset
        return self._datasets[name]


def _dataset(file: h5py.File, name: str, where: str) -> h5py.Dataset:
    """A dataset of this very file: no link, external or soft, is followed."""
    found = file
    for part in name.split("/"):
        if not isinstance(found.get(part, getlink=True), h5py.HardLink):
            raise StoreFormatError(f"{where} is a link; a store has none, since they can lead out of it")
        found = found[part]
    if not isinstance(found, h5py.Dataset) or found.is_virtual or found.external:
        raise StoreFormatError(f"{where} does not hold its own numbers")
    return found


def _check(dataset: h5py.Dataset, where: str, dtype: np.dtype[Any]) -> None:
    """A header may claim anything: memory is taken for it only where chunks of honest sizes are there."""
    if dataset.dtype != dtype or dataset.chunks is None or dataset.ndim < 1:
        raise StoreFormatError(f"the dataset {where} holds {dataset.dtype}, its specification says {dtype}")
    properties = dataset.id.get_create_plist()
    # Each once: what was compressed twice inflates a million times.
    if [properties.get_filter(i)[0] for i in range(properties.get_nfilters())] != _FILTERS:
        raise StoreFormatError(f"the dataset {where} has other filters than gzip, shuffle and fletcher32")
    chunk_bytes = prod(dataset.chunks) * dtype.itemsize
    sizes, masks = _stored_chunks(dataset)
    if chunk_bytes > MOST_CHUNK_BYTES or dataset.chunks[1:] != dataset.shape[1:]:
        raise StoreFormatError(f"the dataset {where} has chunks of {dataset.chunks}; they are never so")
    if len(sizes) != -(-len(dataset) // dataset.chunks[0]) or any(masks):
        raise StoreFormatError(f"the dataset {where} lacks some of its chunks")
    # gzip never makes much more of what it cannot compress; more than that inflates to no honest chunk.
    if max(sizes, default=0) > chunk_bytes + chunk_bytes // 8 + 1024:
        raise StoreFormatError(f"the dataset {where} has chunks that are larger than what they hold")


def _stored_chunks(dataset: h5py.Dataset) -> tuple[list[int], list[int]]:
    sizes: list[int] = []
    masks: list[int] = []

    def visit(chunk: Any) -> None:
        sizes.append(chunk.size)
        masks.append(chunk.filter_mask)

    dataset.id.chunk_iter(visit)
    return sizes, masks
