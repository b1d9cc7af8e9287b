"""Motion vectors, as libavcodec exports them, painted onto a grid of cells; and accumulated since the I-frame.

The rules are CoViAR's (Wu et al., "Compressed Video Action Recognition", CVPR 2018): a vector paints the pixels p of
its block for which both p and its origin lie inside the frame. ``docs/motion.md`` gives them with our own choices.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

Int16 = npt.NDArray[np.int16]

#: libavutil's AVPictureType.
I_FRAME, P_FRAME, B_FRAME = 1, 2, 3
_NO_VECTORS: npt.NDArray[Any] = np.zeros(
    0,
    np.dtype(
        {
            "names": [
                "source", "w", "h", "src_x", "src_y", "dst_x", "dst_y",
                "flags", "motion_x", "motion_y", "motion_scale",
            ],
            "formats": ["<i4", "u1", "u1", "<i2", "<i2", "<i2", "<i2", "<u8", "<i4", "<i4", "<u2"],
            "offsets": [0, 4, 5, 6, 8, 10, 12, 16, 24, 28, 32],
            "itemsize": 40,
            "aligned": True,
        }
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Grid:
    """Square cells of ``cell`` pixels over a frame. Cell i samples pixel min(i·cell + cell//2, width − 1)."""

    width: int
    height: int
    cell: int

    def __post_init__(self) -> None:
        if min(self.width, self.height, self.cell) < 1:
            raise ValueError(f"a grid needs a positive width, height and cell, not {self}")

    @property
    def shape(self) -> tuple[int, int]:
        """(gh, gw)."""
        return -(-self.height // self.cell), -(-self.width // self.cell)

    @cached_property
    def xs(self) -> npt.NDArray[np.int64]:
        """The sampled pixel of each column, (gw,)."""
        return sampled_pixels(self.width, self.cell)

    @cached_property
    def ys(self) -> npt.NDArray[np.int64]:
        """The sampled pixel of each row, (gh,)."""
        return sampled_pixels(self.height, self.cell)

    @cached_property
    def first_column(self) -> npt.NDArray[np.int64]:
        """For each pixel x, 0 … width: the first column whose sampled pixel is x or beyond it."""
        return np.searchsorted(self.xs, np.arange(self.width + 1))

    @cached_property
    def first_row(self) -> npt.NDArray[np.int64]:
        return np.searchsorted(self.ys, np.arange(self.height + 1))


def sampled_pixels(size: int, cell: int) -> npt.NDArray[np.int64]:
    """The pixels that cells of ``cell`` pixels sample along an edge of ``size`` pixels."""
    return np.minimum(np.arange(-(-size // cell)) * cell + cell // 2, size - 1)


def paint_motion(vectors: npt.NDArray[Any] | None, grid: Grid, out: Int16) -> None:
    """Write one frame's displacement into ``out``, (2, gh, gw), in quarter pixels, positive = right / down.

    A cell takes the last vector that paints its sampled pixel, 0 where none does. References to the future
    (``source > 0``) do not paint.
    """
    out[:] = 0
    if vectors is not None:
        _paint_motion(vectors, grid.width, grid.height, grid.first_column, grid.first_row, out)


@numba.njit(cache=True, nogil=True)
def _paint_motion(vectors, width, height, first_column, first_row, out):  # type: ignore[no-untyped-def]
    for i in range(len(vectors)):
        v = vectors[i]
        if v.source >= 0:
            continue
        x0, x1 = _painted(v.dst_x, int(v.dst_x) - int(v.src_x), v.w, width)
        y0, y1 = _painted(v.dst_y, int(v.dst_y) - int(v.src_y), v.h, height)
        if x0 >= x1 or y0 >= y1:
            continue
        scale = max(1, int(v.motion_scale))
        dx = -int(v.motion_x) * 4 // scale
        dy = -int(v.motion_y) * 4 // scale
        for row in range(first_row[y0], first_row[y1]):
            for column in range(first_column[x0], first_column[x1]):
                out[0, row, column] = dx
                out[1, row, column] = dy


@numba.njit(cache=True, nogil=True)
def _painted(centre, displacement, size, edge):  # type: ignore[no-untyped-def]
    """The pixels [start, stop) of a block that lie inside the frame together with where they came from."""
    start = int(centre) - int(size) // 2
    stop = start + int(size)
    return max(start, 0, int(displacement)), min(stop, edge, edge + int(displacement))


class Accumulator:
    """Displacement since the I-frame, on the pixel grid of the frame, read out at the sampled pixels.

    ``trace[y, x]`` is where the content of pixel (x, y) was at the I-frame. Frames are given in display order;
    B-frames read the trace and do not update it. On GOPs longer than ``window`` frames the trace is the identity
    again before every ``window``-th frame, so that one I-frame in 250 means the same as one in 12.
    """

    def __init__(self, grid: Grid, window: int) -> None:
        self._grid = grid
        self._window = window
        y, x = np.mgrid[: grid.height, : grid.width].astype(np.int16)
        self._identity: Int16 = np.stack([x, y], axis=-1)
        self._trace = self._identity.copy()
        self._painted = np.empty_like(self._trace)
        self._age = 0
        self._sampled = np.ix_(grid.ys, grid.xs)

    def add(self, vectors: npt.NDArray[Any] | None, picture_type: int, out: Int16) -> None:
        """Take the next frame and write its accumulated displacement into ``out``, (2, gh, gw), in pixels."""
        self._age = 0 if picture_type == I_FRAME else self._age + 1
        if self._age % self._window == 0:
            self._trace[:] = self._identity
        if picture_type == I_FRAME:
            out[:] = 0
            return
        if vectors is None:
            vectors = _NO_VECTORS
        _paint_trace(vectors, _as_pairs(self._trace), _as_pairs(self._painted))
        moved = self._identity[self._sampled] - self._painted[self._sampled]
        out[:] = moved.transpose(2, 0, 1)
        if picture_type != B_FRAME:
            self._trace, self._painted = self._painted, self._trace


def _as_pairs(trace: Int16) -> npt.NDArray[np.int32]:
    return trace.view(np.int32)[..., 0]


@numba.njit(cache=True, nogil=True)
def _paint_trace(vectors, old, new):  # type: ignore[no-untyped-def]
    """Both traces as (height, width) int32: a pixel's two int16 coordinates move as one number."""
    height, width = old.shape
    new[:] = old
    for i in range(len(vectors)):
        v = vectors[i]
        dx = int(v.dst_x) - int(v.src_x)
        dy = int(v.dst_y) - int(v.src_y)
        if v.source >= 0 or (dx == 0 and dy == 0):
            continue
        x0, x1 = _painted(v.dst_x, dx, v.w, width)
        y0, y1 = _painted(v.dst_y, dy, v.h, height)
        if x0 >= x1:
            continue
        for y in range(y0, y1):
            new[y, x0:x1] = old[y - dy, x0 - dx : x1 - dx]
