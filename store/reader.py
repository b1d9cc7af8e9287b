"""Reading a store: tables by id, rows by (video, frame)."""

import json
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import tensorstore as ts

from moclip.errors import FeatureError, StoreFormatError
from moclip.store.arrays import open_array, read_rows, result, rows_on_disk
from moclip.store.files import check_name
from moclip.store.groups import check_format, read_feature
from moclip.store.schema import FeatureSpec
from moclip.store.tables import read_table
from moclip.store.writer import VALUE

Ids = Sequence[str] | npt.NDArray[np.int64]


def open_store(path: str | Path) -> "Store":
    """Open a store for reading. Raises :class:`StoreNotFoundError` or :class:`StoreFormatError`."""
    return Store(path)


class Store:
    """A feature store, read-only. Opening reads the tables; arrays are opened when their rows are asked for.

    It can be pickled and reopens itself where it lands. It sees the state that was published when it was opened.
    """

    def __init__(self, path: str | Path) -> None:
        # Absolute at once: a pickled store must open in a process with another working directory.
        self.path = Path(os.path.abspath(path))
        check_format(self.path)
        self._features: dict[str, _Feature] = {}
        self._pid = os.getpid()

    def __reduce__(self) -> tuple[Any, ...]:
        return Store, (self.path,)

    def __repr__(self) -> str:
        return f"Store({str(self.path)!r}, {len(self.videos)} videos, features: {', '.join(self.features)})"

    @cached_property
    def videos(self) -> pa.Table:
        """One row a video: ``id`` and what was found in its file. Sorted by id."""
        return read_table(self.path, "videos.parquet")

    @cached_property
    def entries(self) -> pa.Table:
        """One row a (video, feature): status, reason and where the rows lie. Sorted by id, then feature."""
        return read_table(self.path, "entries.parquet")

    @cached_property
    def labels(self) -> pa.Table:
        """One row a labelled video: ``id, label, group, split_<name>``. Sorted by id."""
        return read_table(self.path, "labels.parquet")

    @cached_property
    def classes(self) -> list[str]:
        """The class names, in the order that a classifier's outputs follow."""
        try:
            classes = json.loads((self.path / "classes.json").read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise StoreFormatError(f"{self.path}/classes.json cannot be read: {error}") from error
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise StoreFormatError(f"{self.path}/classes.json is not a list of names")
        return classes

    @cached_property
    def features(self) -> dict[str, FeatureSpec]:
        """The specification (:class:`FeatureSpec`) of each feature, by name."""
        folders = sorted(path.parent for path in self.path.glob("features/*/zarr.json"))
        return {check_name(folder.name, "a feature"): read_feature(folder) for folder in folders}

    def resolve(self, name: str) -> str:
        """The full name of a feature: ``embedding`` stands for the only feature of that kind there is."""
        if name in self.features:
            return name
        close = [full for full, spec in self.features.items() if spec.kind == name]
        if len(close) == 1:
            return close[0]
        there = ", ".join(close or self.features) or "none yet"
        problem = "is ambiguous" if close else "is not there"
        advice = "name one" if close else f"`moclip extract SOURCE STORE --feature {name}` adds it"
        raise FeatureError(f"the feature {name!r} {problem} in {self.path}, which has: {there}; {advice}")

    def ids(self, feature: str) -> list[str]:
        """The ids that have rows of ``feature``, in id order."""
        ids: list[str] = self._feature(feature).ids.tolist()
        return ids

    def row_counts(self, feature: str, videos: Ids) -> npt.NDArray[np.int64]:
        """How many rows of ``feature`` each video has."""
        table = self._feature(feature)
        at = table.positions(self._ids(videos))
        counts: npt.NDArray[np.int64] = table.stop[at] - table.start[at]
        return counts

    def read(self, feature: str, video: str, column: str = VALUE) -> npt.NDArray[Any]:
        """Every row of one video, in display order: ``motion`` gives (frames, 2, gh, gw) int16.

        ``column`` may be one of the specification's columns instead (``pts_seconds``, ``picture_type``, …): (frames,).
        """
        return self.read_all(feature, [video], column)[0]

    def read_all(self, feature: str, videos: Ids, column: str = VALUE) -> list[npt.NDArray[Any]]:
        """Every row of each of ``videos``, one array a video, in the caller's order; all reads run at once."""
        table = self._feature(feature)
        at = table.positions(self._ids(videos))
        arrays = {int(code): self._array(table, int(code), column) for code in np.unique(table.code[at])}
        slices = [slice(int(table.start[i]), int(table.stop[i])) for i in at]
        futures = [read_rows(arrays[int(table.code[i])], rows) for i, rows in zip(at, slices, strict=True)]
        paths = [table.path(int(table.code[i]), column) for i in at]
        return [result(future, path) for future, path in zip(futures, paths, strict=True)]

    def gather(self, feature: str, videos: Ids, frames: npt.ArrayLike, column: str = VALUE) -> npt.NDArray[Any]:
        """Row ``frames[k]`` of video ``videos[k]``, for every k, in the caller's order: (n, *row_shape).

        ``videos`` are ids, or positions in :attr:`videos`; ``frames`` are ordinals within each video's rows.
        :class:`FeatureError` if a video has no rows, a frame is out of range, or the rows differ in shape.
        """
        groups = self.gather_groups(feature, videos, frames, column)
        if len(groups) == 1:
            return groups[0][1]
        if not groups:
            return np.empty(0, self._dtype(self.resolve(feature), column))
        shapes = ", ".join(str(rows.shape[1:]) for _, rows in groups)
        raise FeatureError(f"rows of {feature} have {len(groups)} shapes ({shapes}); use gather_groups")

    def gather_groups(
        self, feature: str, videos: Ids, frames: npt.ArrayLike, column: str = VALUE
    ) -> list[tuple[npt.NDArray[np.int64], npt.NDArray[Any]]]:
        """Like :meth:`gather`, for videos of several frame sizes: a list of (positions, rows), one a row shape.

        ``positions`` say which of the asked-for rows these are.
        """
        table = self._feature(feature)
        at = table.positions(self._ids(videos))
        rows = table.rows(at, np.asarray(frames, np.int64))
        reads = [
            (chosen, code, read_rows(self._array(table, code, column), rows[chosen]))
            for code, chosen in _runs(table.code[at])
        ]
        parts: dict[tuple[int, ...], list[tuple[npt.NDArray[np.int64], npt.NDArray[Any]]]] = {}
        for chosen, code, future in reads:
            values = result(future, table.path(code, column))
            parts.setdefault(values.shape[1:], []).append((chosen, values))
        return [_in_order(group) for group in parts.values()]

    def _ids(self, videos: Ids) -> npt.NDArray[Any]:
        """Ids as text. Positions are looked up in the table of videos."""
        given = np.asarray(videos)
        if given.dtype.kind in "iu":
            return np.asarray(self.videos["id"].take(pa.array(given)).to_pylist(), object)
        return np.asarray(videos, object)

    def _feature(self, name: str) -> "_Feature":
        name = self.resolve(name)
        if name not in self._features:
            self._features[name] = _Feature(self.path, name, self.entries)
        return self._features[name]

    def _dtype(self, feature: str, column: str) -> str:
        spec = self.features[feature]
        if column != VALUE and column not in spec.columns:
            raise FeatureError(f"{feature} has no column {column!r}; it has: {', '.join(spec.columns)}")
        return spec.dtype if column == VALUE else spec.columns[column]

    def _array(self, table: "_Feature", code: int, column: str) -> ts.TensorStore:
        if os.getpid() != self._pid:
            # tensorstore's threads do not survive a fork: a read would hang or abort the process.
            raise FeatureError(
                "this store was opened before a fork; start the process with 'spawn' or 'forkserver', "
                "or open the store in it"
            )
        if (code, column) not in table.arrays:
            array = open_array(table.path(code, column), self._dtype(table.name, column))
            needed = table.last_row(code)
            if array.ndim < 1 or min(array.shape[0], rows_on_disk(array, table.path(code, column))) < needed:
                raise StoreFormatError(
                    f"the array {table.path(code, column)} has shape {array.shape}; "
                    f"the entries name {needed} rows of it"
                )
            table.arrays[code, column] = array
        return table.arrays[code, column]


class _Feature:
    """Where a feature's rows lie: for each video its array (a code) and row range; arrays opened so far."""

    def __init__(self, root: Path, name: str, entries: pa.Table) -> None:
        self.name = name
        self._folder = root / "features" / name
        mine = pc.and_(pc.equal(entries["feature"], name), pc.equal(entries["status"], "ok"))
        rows = entries.filter(mine)
        self.ids = np.asarray(rows["id"].to_pylist(), object)
        if any(rows[name].null_count for name in ("array", "row_start", "row_stop")):
            raise StoreFormatError(f"{root}/entries.parquet: an ok entry of {name} does not say where its rows lie")
        names = pc.binary_join_element_wise(rows["shard"], rows["array"], "/").combine_chunks()
        self.start = rows["row_start"].to_numpy().astype(np.int64)
        self.stop = rows["row_stop"].to_numpy().astype(np.int64)
        encoded = names.dictionary_encode()
        self.code = encoded.indices.to_numpy(zero_copy_only=False)
        self._names: list[str] = encoded.dictionary.to_pylist()
        for full in self._names:
            for part in full.split("/"):
                check_name(part, "an entry's shard or array")
        if (self.start < 0).any() or (self.stop <= self.start).any():
            raise StoreFormatError(f"{root}/entries.parquet: {name} has row ranges that are not ranges")
        self._position = {video: i for i, video in enumerate(self.ids)}
        self.arrays: dict[tuple[int, str], ts.TensorStore] = {}

    def path(self, code: int, column: str) -> Path:
        return self._folder / self._names[code] / column

    def last_row(self, code: int) -> int:
        return int(self.stop[self.code == code].max())

    def positions(self, videos: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        try:
            return np.fromiter((self._position[video] for video in videos), np.int64, len(videos))
        except KeyError as error:
            raise FeatureError(
                f"no rows of {self.name} for the video {error.args[0]!r}: it is not in the store, or its entry failed"
            ) from None

    def rows(self, at: npt.NDArray[np.int64], frames: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Row numbers in the arrays; ``frames`` are checked against each video's own range."""
        if frames.shape != at.shape:
            raise ValueError(f"{len(at)} videos but frames of shape {frames.shape}")
        outside = (frames < 0) | (frames >= self.stop[at] - self.start[at])
        if outside.any():
            k = int(np.argmax(outside))
            count = int(self.stop[at[k]] - self.start[at[k]])
            raise FeatureError(f"frame {frames[k]} of {self.ids[at[k]]!r}: {self.name} has {count} rows of it, from 0")
        rows: npt.NDArray[np.int64] = self.start[at] + frames
        return rows


def _runs(codes: npt.NDArray[Any]) -> list[tuple[int, npt.NDArray[np.int64]]]:
    """For each distinct code, where it stands."""
    order = np.argsort(codes, kind="stable")
    bounds = np.flatnonzero(np.diff(codes[order])) + 1
    return [(int(codes[part[0]]), part) for part in np.split(order, bounds) if len(part)]


def _in_order(
    parts: list[tuple[npt.NDArray[np.int64], npt.NDArray[Any]]],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[Any]]:
    """Parts of one row shape, as one pair whose positions ascend."""
    positions = np.sort(np.concatenate([chosen for chosen, _ in parts]))
    rows = np.empty((len(positions), *parts[0][1].shape[1:]), parts[0][1].dtype)
    for chosen, values in parts:
        rows[np.searchsorted(positions, chosen)] = values
    return positions, rows
