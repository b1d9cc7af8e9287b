"""Motion vectors, as libavcodec exports them, painted onto a grid of cells.

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
#: libavutil's AVMotionVector.
VECTOR = np.dtype(
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


def paint_motion(
    vectors: npt.NDArray[Any], stops: npt.NDArray[np.int64], rows: npt.NDArray[np.int64], grid: Grid, out: Int16
) -> None:
    """Write frames' displacements, in quarter pixels, positive = right / down, into ``out``, (n, 2, gh, gw).

    ``vectors`` (:data:`VECTOR`) are those of all frames, one frame's after the other's, the i-th ending at
    ``stops[i]``; its row of ``out`` is ``rows[i]``, or none where that is negative. A cell takes the last vector
    that paints its sampled pixel, 0 where none does. References to the future (``source > 0``) do not paint.
    """
    _paint_motion(vectors, stops, rows, grid.width, grid.height, grid.first_column, grid.first_row, out)


@numba.njit(cache=True, nogil=True)
def _paint_motion(vectors, stops, rows, width, height, first_column, first_row, out):  # type: ignore[no-untyped-def]
    start = 0
    for frame in range(len(stops)):
        if rows[frame] >= 0:
            _paint_frame(vectors[start : stops[frame]], width, height, first_column, first_row, out[rows[frame]])
        start = stops[frame]


@numba.njit(cache=True, nogil=True)
def _paint_frame(vectors, width, height, first_column, first_row, out):  # type: ignore[no-untyped-def]
    out[:] = 0
    for i in range(len(vectors)):
        v = vectors[i]
        if v.source >= 0:
            continue
        x0, x1 = painted(v.dst_x, int(v.dst_x) - int(v.src_x), v.w, width)
        y0, y1 = painted(v.dst_y, int(v.dst_y) - int(v.src_y), v.h, height)
        if x0 >= x1 or y0 >= y1:
            continue
        dx, dy = _quarters(v.motion_x, v.motion_scale), _quarters(v.motion_y, v.motion_scale)
        for row in range(first_row[y0], first_row[y1]):
            for column in range(first_column[x0], first_column[x1]):
                out[0, row, column] = dx
                out[1, row, column] = dy


@numba.njit(cache=True, nogil=True)
def _quarters(motion, scale):  # type: ignore[no-untyped-def]
    """Minus a vector's part, in quarter pixels. Most are in quarters or halves, and divisions are slow."""
    if scale == 4:
        return -int(motion)
    if scale == 2:
        return -int(motion) * 2
    return -int(motion) * 4 // max(1, int(scale))


@numba.njit(cache=True, nogil=True)
def painted(centre, displacement, size, edge):  # type: ignore[no-untyped-def]
    """The pixels [start, stop) of a block that lie inside the frame together with where they came from."""
    start = int(centre) - int(size) // 2
    stop = start + int(size)
    return max(start, 0, int(displacement)), min(stop, edge, edge + int(displacement))
