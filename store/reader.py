"""Reading a store: tables by id, rows by (video, frame)."""

import itertools
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from moclip.errors import FeatureError, StoreFormatError
from moclip.store.containers import CONTAINERS
from moclip.store.containers.rows import RowReader, Rows
from moclip.store.files import check_same_process, open_folder
from moclip.store.groups import read_features, read_mark
from moclip.store.places import Places
from moclip.store.schema import EXTRACTED, VALUE, VALUE_STOP, FeatureSpec
from moclip.store.tables import ENTRIES, LABELS, VIDEOS, read_classes, read_table

#: Videos by id, or by position in :attr:`Store.videos`.
Ids = Sequence[str] | npt.NDArray[np.int64]

#: What is needed of the entries to find rows; text that repeats is read as a dictionary.
_PLACE_COLUMNS = ("id", "feature", "status", "shard", "array", "row_start", "row_stop")
_PLACE_DICTIONARIES = ("feature", "status", "shard", "array")


def open_store(url: str | Path) -> "Store":
    """Open a store for reading: a path, ``s3://bucket/prefix`` or ``gs://bucket/prefix``.

    Raises :class:`StoreNotFoundError` or :class:`StoreFormatError`.
    """
    return Store(url)


class Store:
    """A feature store, read-only. Tables are read, and arrays opened, when they are first asked for.

    It can be pickled and reopens itself where it lands. It sees each table as it was published when first read.
    """

    def __init__(self, url: str | Path) -> None:
        self._folder = open_folder(url)
        self._pid = os.getpid()
        #: Where the store is: an absolute path, or the address it was opened by.
        self.url = self._folder.url
        #: ``zarr`` or ``hdf5``.
        self.container = read_mark(self._folder)
        self._reader: RowReader = CONTAINERS[self.container].reader(self._folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return Store, (self.url,)

    def __repr__(self) -> str:
        return f"Store({self.url!r}, {len(self.videos)} videos, features: {', '.join(self.features)})"

    @cached_property
    def videos(self) -> pa.Table:
        """One row a video: ``id`` and what was found in its file. Sorted by id."""
        return read_table(self._folder, VIDEOS)

    @cached_property
    def entries(self) -> pa.Table:
        """One row a (video, feature): status, reason and where the rows lie. Sorted by id, then feature."""
        return read_table(self._folder, ENTRIES)

    @cached_property
    def labels(self) -> pa.Table:
        """One row a labelled video: ``id, label, group, split_<name>``. Sorted by id."""
        return read_table(self._folder, LABELS)

    @cached_property
    def classes(self) -> list[str]:
        """The class names, in the order that a classifier's outputs follow."""
        return read_classes(self._folder)

    @cached_property
    def features(self) -> dict[str, FeatureSpec]:
        """The specification (:class:`FeatureSpec`) of each feature, by name."""
        return read_features(self._folder)

    def resolve(self, name: str) -> str:
        """The full name of a feature: ``embedding`` stands for the only feature of that kind there is."""
        if name in self.features:
            return name
        close = [full for full, spec in self.features.items() if spec.kind == name]
        if len(close) == 1:
            return close[0]
        there = ", ".join(close or self.features) or "none yet"
        problem = "is ambiguous" if close else "is not there"
        advice = "name one"
        if not close and name in EXTRACTED:
            advice = f"`moclip extract SOURCE {self.url} --feature {name}` adds it"
        raise FeatureError(f"the feature {name!r} {problem} in {self.url}, which has: {there}; {advice}")

    def ids(self, feature: str) -> list[str]:
        """The ids that have rows of ``feature``, in id order."""
        there = np.flatnonzero(self._feature(feature).there)
        ids: list[str] = self._ids.take(pa.array(there)).to_pylist()
        return ids

    def row_counts(self, feature: str, videos: Ids) -> npt.NDArray[np.int64]:
        """How many rows of ``feature`` each video has."""
        places = self._feature(feature)
        at = self._at(places, videos)
        counts: npt.NDArray[np.int64] = places.stop[at] - places.start[at]
        return counts

    def read(self, feature: str, video: str, column: str = VALUE) -> npt.NDArray[Any]:
        """Every row of one video, in display order: ``motion`` gives (frames, 2, gh, gw) int16.

        ``column`` may be one of the specification's columns instead (``pts_seconds``, ``picture_type``, …): (frames,).
        """
        return self.read_all(feature, [video], column)[0]

    def read_all(self, feature: str, videos: Ids, column: str = VALUE) -> list[npt.NDArray[Any]]:
        """Every row of each of ``videos``, one array a video, in the caller's order; all reads run at once."""
        places = self._feature(feature)
        at = self._at(places, videos)
        waiting = [
            self._rows(places, int(places.code[i]), column).start(slice(int(places.start[i]), int(places.stop[i])))
            for i in at
        ]
        return [wait() for wait in waiting]

    def read_bytes(self, feature: str, video: str) -> list[bytes]:
        """Every row of one video of a ragged feature, such as the JPEG files of ``image``."""
        places = self._feature(feature)
        if not self.features[places.feature].ragged:
            raise FeatureError(f"rows of {places.feature} are arrays of one shape; use read")
        at = int(self._at(places, [video])[0])
        start, stop, code = int(places.start[at]), int(places.stop[at]), int(places.code[at])
        stops = self._rows(places, code, VALUE_STOP).start(slice(max(0, start - 1), stop))()
        bounds = stops if start else np.concatenate([[0], stops])
        values = self._rows(places, code, VALUE)
        if bounds[0] < 0 or (np.diff(bounds) < 0).any() or bounds[-1] > values.shape[0]:
            raise StoreFormatError(f"{self.url}: rows of {places.feature} stop where there are no bytes")
        data = values.start(slice(int(bounds[0]), int(bounds[-1])))().tobytes()
        cuts = (bounds - bounds[0]).tolist()
        return [data[a:b] for a, b in itertools.pairwise(cuts)]

    def gather(self, feature: str, videos: Ids, frames: npt.ArrayLike, column: str = VALUE) -> npt.NDArray[Any]:
        """Row ``frames[k]`` of video ``videos[k]``, for every k, in the caller's order: (n, *row_shape).

        ``videos`` are ids, or positions in :attr:`videos`; ``frames`` are ordinals within each video's rows.
        :class:`FeatureError` if a video has no rows, a frame is out of range, or the rows differ in shape.
        """
        groups = self.gather_groups(feature, videos, frames, column)
        if len(groups) == 1:
            return groups[0][1]
        if not groups:
            return np.empty((0,), self._dtype(self.resolve(feature), column))
        shapes = ", ".join(str(rows.shape[1:]) for _, rows in groups)
        raise FeatureError(f"rows of {feature} have {len(groups)} shapes ({shapes}); use gather_groups")

    def gather_groups(
        self, feature: str, videos: Ids, frames: npt.ArrayLike, column: str = VALUE
    ) -> list[tuple[npt.NDArray[np.int64], npt.NDArray[Any]]]:
        """Like :meth:`gather`, for videos of several frame sizes: a list of (positions, rows), one a row shape.

        ``positions`` say which of the asked-for rows these are.
        """
        places = self._feature(feature)
        at = self._at(places, videos)
        numbers = places.row_numbers(at, np.asarray(frames, np.int64))
        reads = [
            (chosen, self._rows(places, code, column).start(numbers[chosen])) for code, chosen in _runs(places.code[at])
        ]
        parts: dict[tuple[int, ...], list[tuple[npt.NDArray[np.int64], npt.NDArray[Any]]]] = {}
        for chosen, wait in reads:
            values = wait()
            parts.setdefault(values.shape[1:], []).append((chosen, values))
        return [_in_order(group) for group in parts.values()]

    @cached_property
    def _ids(self) -> pa.Array:
        # The whole table is large: it is not read for its ids, nor twice.
        table = self.videos if "videos" in self.__dict__ else read_table(self._folder, VIDEOS, ["id"])
        return table["id"].combine_chunks()

    @cached_property
    def _position(self) -> dict[str, int]:
        return dict(zip(self._ids.to_pylist(), range(len(self._ids)), strict=True))

    @cached_property
    def _places(self) -> dict[str, Places]:
        """All features' at once, so that the table, which is larger than they are, need not stay."""
        entries = read_table(self._folder, ENTRIES, _PLACE_COLUMNS, dictionaries=_PLACE_DICTIONARIES)
        places = {name: Places.of(name, entries, self._ids) for name in self.features}
        del entries
        pa.default_memory_pool().release_unused()
        return places

    def _feature(self, name: str) -> Places:
        check_same_process(self._pid)
        return self._places[self.resolve(name)]

    def _at(self, places: Places, videos: Ids) -> npt.NDArray[np.int64]:
        """Positions of videos in :attr:`videos`, all of which have rows of the feature."""
        given = np.asarray(videos)
        if given.dtype.kind in "iu":
            at = given.astype(np.int64)
            if len(at) and not 0 <= at.min() <= at.max() < len(self._ids):
                raise FeatureError(f"position {at.max()} of {len(self._ids)} videos; positions count from 0")
        else:
            at = np.fromiter((self._position.get(video, -1) for video in videos), np.int64, len(videos))
        absent = (at < 0) | ~places.there[at] if len(places.there) else np.ones(len(at), bool)
        if absent.any():
            video = videos[int(np.argmax(absent))]
            raise FeatureError(
                f"no rows of {places.feature} for the video {video!r}: it is not in the store, or its entry failed"
            )
        return at

    def _dtype(self, feature: str, column: str) -> str:
        arrays = self.features[feature].arrays
        if column not in arrays:
            raise FeatureError(f"{feature} has no column {column!r}; it has: {', '.join(arrays)}")
        return arrays[column]

    def _rows(self, places: Places, code: int, column: str) -> Rows:
        if (code, column) not in places.opened:
            dtype = self._dtype(places.feature, column)
            shard, array = places.name(code)
            # The bytes of ragged rows are counted in value_stop, not in entries.
            ragged = column == VALUE and self.features[places.feature].ragged
            needed = 0 if ragged else int(places.last_row[code])
            rows = self._reader.open(f"features/{places.feature}/{shard}", array, column, dtype, needed)
            places.opened[code, column] = rows
        return places.opened[code, column]


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
