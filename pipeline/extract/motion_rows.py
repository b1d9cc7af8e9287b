"""Decoded frames in, blocks of motion rows out: vectors are gathered and then converted many frames at a time."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import av
import numpy as np
import numpy.typing as npt
from av.sidedata.sidedata import SideDataContainer

from moclip.pipeline.extract.accumulation import Accumulator
from moclip.pipeline.extract.motion import VECTOR, Grid, Int16, paint_motion
from moclip.pipeline.extract.orientation import upright_size, upright_vectors

#: Not ``frame.side_data``, which the frame would keep: a cycle, and its picture would wait for the garbage collector.
_side_data_of: Any = SideDataContainer
#: Rows leave in blocks of at most so many rows and bytes, so that a film's motion never sits in memory whole.
BLOCK_ROWS = 256
BLOCK_BYTES = 32 * 2**20
#: Vectors are converted when there are so many bytes of them: few calls, and still in the processor's cache.
BATCH_BYTES = 512 * 2**10


@dataclass(frozen=True)
class MotionRows:
    """Consecutive rows of one clip: grids, (n, 2, gh, gw) int16, with their frames' times and picture types."""

    clip: int
    motion: Int16
    accumulated: Int16 | None
    pts_seconds: npt.NDArray[np.float64]
    picture_type: npt.NDArray[np.uint8]


class RowBuilder:
    """Collects the vectors of frames, in display order, and gives blocks of :class:`MotionRows` to ``emit``.

    Every ``stride``-th frame of a clip has a row, and a clip is ``clip_frames`` long; ``window`` is
    :class:`Accumulator`'s, None without accumulation. ``carried`` says whether any frame had vectors.
    """

    def __init__(
        self,
        grid: Grid,
        *,
        rotation: int = 0,
        window: int | None,
        stride: int,
        clip_frames: int,
        emit: Callable[[MotionRows], None],
    ) -> None:
        self._grid = grid
        self._rotation = rotation
        self._stride = stride
        self._clip_frames = clip_frames
        self._emit = emit
        self._accumulator = None if window is None else Accumulator(grid, window)
        row_bytes = 4 * grid.shape[0] * grid.shape[1]
        self._block = max(1, min(BLOCK_ROWS, BLOCK_BYTES // row_bytes))
        self._vectors = np.empty(2 * BATCH_BYTES, np.uint8)
        self._clip = self._number = 0
        self._begin_batch()
        self._begin_block()
        self.carried = False

    def add(self, frame: av.VideoFrame, picture_type: int, pts_seconds: float) -> None:
        """Take the next frame's vectors."""
        if self._number == self._clip_frames:
            self.finish()
            self._clip, self._number = self._clip + 1, 0
        self._take_vectors(frame)
        self._types.append(picture_type)
        if self._number % self._stride == 0:
            self._rows.append(len(self._seconds))
            self._seconds.append(pts_seconds)
        else:
            self._rows.append(-1)
        self._number += 1
        if self._stops[-1] >= BATCH_BYTES or len(self._seconds) == self._block:
            self._convert()

    def finish(self) -> None:
        """Convert and emit what is left."""
        self._convert()
        self._flush()

    def _take_vectors(self, frame: av.VideoFrame) -> None:
        side_data: Any = _side_data_of(frame).get("MOTION_VECTORS")
        stop = start = self._stops[-1] if self._stops else 0
        if side_data is not None:
            # As bytes: numpy copies structures field by field.
            found = np.frombuffer(side_data, np.uint8)
            stop = start + len(found)
            if stop > len(self._vectors):
                self._vectors = np.concatenate([self._vectors[:start], np.empty(2 * stop, np.uint8)])
            self._vectors[start:stop] = found
            self.carried = True
        self._stops.append(stop)

    def _begin_batch(self) -> None:
        self._stops: list[int] = []
        self._types: list[int] = []
        self._rows: list[int] = []

    def _begin_block(self) -> None:
        self._seconds: list[float] = []
        self._row_types: list[int] = []
        self._motion = np.empty((self._block, 2, *self._grid.shape), np.int16)
        self._accumulated = np.empty_like(self._motion) if self._accumulator else None

    def _convert(self) -> None:
        """The batch's vectors to rows; a full block leaves."""
        if not self._stops:
            return
        vectors = self._vectors[: self._stops[-1]].view(VECTOR)
        stops, rows = np.array(self._stops) // VECTOR.itemsize, np.array(self._rows)
        types = np.array(self._types, np.uint8)
        if self._rotation:
            coded_size = upright_size((self._grid.width, self._grid.height), self._rotation)
            vectors = upright_vectors(vectors, self._rotation, coded_size)
        paint_motion(vectors, stops, rows, self._grid, self._motion)
        if self._accumulator is not None and self._accumulated is not None:
            self._accumulator.add(vectors, stops, types, rows, self._accumulated)
        self._row_types.extend(types[rows >= 0].tolist())
        self._begin_batch()
        if len(self._seconds) == self._block:
            self._flush()

    def _flush(self) -> None:
        count = len(self._seconds)
        if count == 0:
            return
        block = MotionRows(
            clip=self._clip,
            motion=self._motion[:count],
            accumulated=None if self._accumulated is None else self._accumulated[:count],
            pts_seconds=np.array(self._seconds),
            picture_type=np.array(self._row_types, np.uint8),
        )
        self._begin_block()
        self._emit(block)
