"""Part of a store as one HDF5 file that h5py alone reads: for those who want the numbers and no store."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from moclip import __version__
from moclip.errors import FeatureError, StoreFormatError
from moclip.store.containers.hdf5 import Hdf5Writer
from moclip.store.copies.copying import Block, RowSource, read_ahead
from moclip.store.copies.filling import Copied, Report, entry_of, silent
from moclip.store.copies.selection import EVERYTHING, Selection, select
from moclip.store.copies.sharing import export_store
from moclip.store.files import open_folder
from moclip.store.reader import Store, open_store
from moclip.store.schema import FORMAT, VALUE, VALUE_STOP, FeatureSpec

_TEXT = h5py.string_dtype()
#: Names at the top of the file that are no features.
_TAKEN = {"videos", "labels", "classes"}
_READ_ME = """Features of videos, exported by moclip. Everything is plain HDF5.

Each feature is a group; its attribute `specification` (JSON) says how it was made. FEATURE/index has one row a video
in each of its datasets: the video's `id`, and that its rows are FEATURE/ARRAY/value[row_start:row_stop], where ARRAY
is what `array` says (rows of one shape share an array). Beside `value` lie numbers that go with each row, such as
`pts_seconds`. `content` is a checksum of the video's rows, in hex.

    import h5py
    with h5py.File("this.h5") as f:
        index = f["motion/index"]
        k = list(index["id"].asstr()).index("some/video")
        array = f["motion"][index["array"].asstr()[k]]
        rows = array["value"][index["row_start"][k] : index["row_stop"][k]]

Where a feature's axes are ["byte"], row r is the file value[value_stop[r - 1] : value_stop[r]] (from 0 where r is 0).
FEATURE/failed lists the videos without rows, and why. `videos` has what was found in the files, `labels` the labels,
groups and splits, `classes` the class names in order. Unknown text is empty, unknown numbers are NaN.
"""


def export_hdf5_file(
    source_url: str | Path, out_path: str | Path, selection: Selection = EVERYTHING, report: Report = silent
) -> Copied:
    """Copy some features of some videos into one new file ``out_path``, whose attribute ``read_me`` explains it.

    The rows are first collected in a hidden folder beside the file, ``.NAME.parts``, which takes as much room again;
    interrupted, the same call goes on from there. ``report`` is told (steps done, of how many), two for each entry.

    :class:`StoreFormatError` if ``out_path`` is there already, or not on a disk; :class:`FeatureError` if a feature
    is called like something else in the file.
    """
    out = _new_file(out_path)
    parts = out.with_name(f".{out.name}.parts")
    source = open_store(source_url)
    chosen = select(source, selection)
    for name in _TAKEN & set(chosen.features):
        raise FeatureError(f"a feature cannot be called {name!r} in a single file; export to a store instead")
    whole = 2 * len(chosen.entries)
    copied = export_store(source_url, parts, selection, "hdf5", lambda done, _: report(done, whole))
    unfinished = out.with_name(f".{out.name}.tmp")
    with h5py.File(unfinished, "w", libver=("v110", "v110")) as file:
        _Assembly(file, open_store(parts)).write(lambda done: report(whole // 2 + done, whole))
    with open(unfinished, "rb") as written:
        os.fsync(written.fileno())
    os.replace(unfinished, out)
    shutil.rmtree(parts)
    return copied


def _new_file(out_path: str | Path) -> Path:
    folder = open_folder(out_path)
    if folder.local is None:
        raise StoreFormatError(f"{folder} is not on a disk, and a single file is written to one; export a store there")
    out = folder.local
    if out.exists():
        parts = out.with_name(f".{out.name}.parts")
        also = f", and {parts}, which is left of making it," if parts.exists() else ""
        raise StoreFormatError(f"{out} is there already; delete it{also} or name another file")
    out.parent.mkdir(parents=True, exist_ok=True)
    return out


class _Assembly:
    """The parts, whose shards hold one feature each, as groups of one file."""

    def __init__(self, file: h5py.File, parts: Store) -> None:
        self._file = file
        self._parts = parts
        self._done = 0

    def write(self, report: Any) -> None:
        self._file.attrs.update({"read_me": _READ_ME, "format": FORMAT, "moclip": __version__})
        entries = self._parts.entries
        for name, spec in self._parts.features.items():
            group = self._file.create_group(name)
            group.attrs.update(specification=json.dumps(spec.to_json()), digest=spec.digest, unit=spec.unit)
            mine = entries.filter(pc.equal(entries["feature"], name))
            self._write_rows(group, name, spec, mine.filter(pc.equal(mine["status"], "ok")), report)
            failed = mine.filter(pc.equal(mine["status"], "failed"))
            _write_table(group.create_group("failed"), failed.select(["id", "reason", "detail"]))
            self._done += len(failed)
            report(self._done)
        _write_table(self._file.create_group("videos"), self._parts.videos)
        _write_table(self._file.create_group("labels"), self._parts.labels)
        _write(self._file, "classes", self._parts.classes)

    def _write_rows(self, group: h5py.Group, name: str, spec: FeatureSpec, entries: pa.Table, report: Any) -> None:
        """All rows in id order; then, in ``index``, where each video's are."""
        source = RowSource(open_folder(self._parts.url), name, spec)
        rows = entries.to_pylist()
        blocks = read_ahead(block for row in rows for block in source.start(row["shard"], entry_of(row)))
        arrays: dict[str, _Array] = {}
        bounds = []
        for row in rows:
            array = arrays.setdefault(row["array"], _Array(group, row["array"], spec))
            start = array.rows
            for block in blocks:
                array.append(block)
                if block.last:
                    break
            bounds.append((start, array.rows))
            self._done += 1
            report(self._done)
        for array in arrays.values():
            array.finish()
        index = group.create_group("index")
        _write(index, "id", [row["id"] for row in rows])
        _write(index, "array", [row["array"] for row in rows])
        _write(index, "row_start", np.array([start for start, _ in bounds], np.int64))
        _write(index, "row_stop", np.array([stop for _, stop in bounds], np.int64))
        _write(index, "content", np.array([row["content"].hex() for row in rows], "S32"))


class _Array:
    """``FEATURE/ARRAY``: the rows of one shape, and their columns."""

    def __init__(self, group: h5py.Group, array: str, spec: FeatureSpec) -> None:
        self.rows = 0
        self._group = group
        self._name = array
        self._spec = spec
        self._columns: dict[str, Hdf5Writer] = {}

    def append(self, block: Block) -> None:
        rows = len(block.columns[VALUE]) if block.lengths is None else len(block.lengths)
        if block.lengths is not None:
            before = self._columns[VALUE].rows if self._columns else 0
            self._column(VALUE_STOP, before + np.cumsum(block.lengths))
        for name, values in block.columns.items():
            self._column(name, values)
        self.rows += rows

    def _column(self, name: str, values: npt.NDArray[Any]) -> None:
        if name not in self._columns:
            group = self._group.require_group(self._name)
            shape = values.shape[1:]
            axes = self._spec.axes if name == VALUE and len(self._spec.axes) == len(shape) else ()
            self._columns[name] = Hdf5Writer(group, name, values.dtype.name, shape, axes)
        self._columns[name].append(values)

    def finish(self) -> None:
        for column in self._columns.values():
            column.finish()


def _write_table(group: h5py.Group, table: pa.Table) -> None:
    """A dataset a column. HDF5 has no empty cells: unknown text becomes "", unknown numbers NaN."""
    for name in table.column_names:
        values = table[name]
        # A slash would make groups of the source list's own names.
        dataset = name.replace("/", "_").strip(".") or "_"
        while dataset in group:
            dataset += "_"
        if pa.types.is_integer(values.type) or pa.types.is_floating(values.type) or pa.types.is_boolean(values.type):
            _write(group, dataset, _numbers(values))
        else:
            _write(group, dataset, ["" if value is None else str(value) for value in values.to_pylist()])


def _numbers(values: pa.ChunkedArray) -> npt.NDArray[Any]:
    if values.null_count:
        values = pc.fill_null(values.cast(pa.float64(), safe=False), np.nan)
    return np.asarray(values.combine_chunks().to_numpy(zero_copy_only=False))


def _write(group: h5py.Group, name: str, values: Sequence[str] | npt.NDArray[Any]) -> None:
    if isinstance(values, np.ndarray):
        checks = {"compression": "gzip", "shuffle": True, "fletcher32": True} if len(values) else {}
        group.create_dataset(name, data=values, track_times=False, **checks)
    else:
        # HDF5's texts end at the first zero byte.
        data = np.array([text.replace("\0", "�") for text in values], object)
        group.create_dataset(name, data=data, dtype=_TEXT, track_times=False)
