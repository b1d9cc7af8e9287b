"""Where a feature's rows lie: for each video its array and row range, as arrays that a million videos fit into."""

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from moclip.errors import FeatureError, StoreFormatError
from moclip.store.containers.rows import Rows
from moclip.store.files import check_name

_Number = TypeVar("_Number", np.bool_, np.int32, np.int64)

#: How many arrays one feature keeps open: enough for a batch over as many shards.
_MOST_OPENED = 4096


class _Opened(OrderedDict[tuple[int, str], Rows]):
    """Arrays that were opened, the one opened first forgotten first."""

    def __setitem__(self, key: tuple[int, str], rows: Rows) -> None:
        super().__setitem__(key, rows)
        if len(self) > _MOST_OPENED:
            self.popitem(last=False)


@dataclass(frozen=True, eq=False)
class Places:
    """Arrays over the positions in the table of videos; ``there`` says which videos have rows.

    ``code`` numbers the arrays, ``start`` and ``stop`` are row numbers in them, ``last_row`` is over the codes.
    """

    feature: str
    there: npt.NDArray[np.bool_]
    code: npt.NDArray[np.int32]
    start: npt.NDArray[np.int64]
    stop: npt.NDArray[np.int64]
    last_row: npt.NDArray[np.int64]
    codes: list[tuple[int, int]]
    shards: pa.Array
    arrays: pa.Array
    opened: _Opened = field(default_factory=_Opened, repr=False)

    @classmethod
    def of(cls, feature: str, entries: pa.Table, ids: pa.Array) -> "Places":
        """The places of the ok entries of ``feature``. :class:`StoreFormatError` where they cannot be."""
        rows = entries.filter(pc.and_(pc.equal(entries["feature"], feature), pc.equal(entries["status"], "ok")))
        if any(rows[name].null_count for name in ("array", "row_start", "row_stop")):
            raise StoreFormatError(f"an ok entry of {feature} does not say where its rows lie")
        video = _positions(rows["id"], ids)
        # A video that its table does not have: publishing was cut short between the two files.
        if (video < 0).any():
            rows, video = rows.filter(pa.array(video >= 0)), video[video >= 0]
        start, stop = (rows[name].to_numpy().astype(np.int64) for name in ("row_start", "row_stop"))
        if (start < 0).any() or (stop <= start).any():
            raise StoreFormatError(f"an entry of {feature} has a row range that is none")
        shards, arrays = (rows[name].unify_dictionaries().combine_chunks() for name in ("shard", "array"))
        both = shards.indices.to_numpy().astype(np.int64) * len(arrays.dictionary) + arrays.indices.to_numpy()
        kinds, code = np.unique(both, return_inverse=True)
        last_row = np.zeros(len(kinds), np.int64)
        np.maximum.at(last_row, code, stop)
        return cls(
            feature,
            _spread(video, np.ones(len(video), bool), len(ids)),
            _spread(video, code.astype(np.int32), len(ids)),
            _spread(video, start, len(ids)),
            _spread(video, stop, len(ids)),
            last_row,
            [(int(kind // len(arrays.dictionary)), int(kind % len(arrays.dictionary))) for kind in kinds],
            shards.dictionary,
            arrays.dictionary,
        )

    def name(self, code: int) -> tuple[str, str]:
        """The shard and the array that a code stands for; a stranger's names do not lead elsewhere."""
        shard, array = self.codes[code]
        return (
            check_name(self.shards[shard].as_py(), "an entry's shard"),
            check_name(self.arrays[array].as_py(), "an entry's array"),
        )

    def row_numbers(self, at: npt.NDArray[np.int64], frames: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Row numbers in the arrays; ``frames`` are checked against each video's own range."""
        if frames.shape != at.shape:
            raise ValueError(f"{len(at)} videos but frames of shape {frames.shape}")
        count = self.stop[at] - self.start[at]
        outside = (frames < 0) | (frames >= count)
        if outside.any():
            k = int(np.argmax(outside))
            raise FeatureError(f"frame {frames[k]} was asked of a video with {count[k]} rows of {self.feature}, from 0")
        numbers: npt.NDArray[np.int64] = self.start[at] + frames
        return numbers


def _positions(some: pa.ChunkedArray, ids: pa.Array) -> npt.NDArray[np.int64]:
    """Where each of ``some`` stands in ``ids``, -1 where it does not. The same ids need no search."""
    if some.combine_chunks().equals(ids):
        return np.arange(len(ids))
    at: npt.NDArray[np.int64] = pc.fill_null(pc.index_in(some, ids), -1).to_numpy().astype(np.int64)
    return at


def _spread(video: npt.NDArray[np.int64], values: npt.NDArray[_Number], videos: int) -> npt.NDArray[_Number]:
    spread = np.zeros(videos, values.dtype)
    spread[video] = values
    return spread
