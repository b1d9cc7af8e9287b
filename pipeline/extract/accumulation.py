"""Displacement since the I-frame, found by chasing the sampled pixels backwards through the frames of their GOP.

The definition (CoViAR's, Wu et al., CVPR 2018; ``docs/motion.md``) paints every pixel of every frame forwards: a
vector copies the trace of where its block came from. Only few pixels are ever looked at, so here each frame keeps a
map of what moved where, and each sampled pixel is followed from map to map. The results are equal, bit for bit.
"""

from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from moclip.pipeline.extract.motion import B_FRAME, I_FRAME, Grid, Int16, painted

#: Blocks begin and end at multiples of so many pixels, or their frame gets a map of pixels.
_BLOCK = 4
_SHIFT = 2


class Accumulator:
    """Displacement since the I-frame at the sampled pixels of a grid, in pixels.

    Frames are given in display order; B-frames are read and then forgotten. On GOPs longer than ``window`` frames
    the displacement starts anew before every ``window``-th frame, so that one I-frame in 250 means the same as one
    in 12.
    """

    def __init__(self, grid: Grid, window: int) -> None:
        self._grid = grid
        # Of each frame since the start: displacements by block, x in the low half and y in the high; 0 is none.
        self._blocks = np.zeros((window, *(-(-size // _BLOCK) for size in (grid.height, grid.width))), np.int32)
        # The same by pixel, for frames whose blocks overlap or lie askew; made when the first one comes.
        self._pixels = np.zeros((0, grid.height, grid.width), np.int32)
        self._by_pixel = np.zeros(window, np.bool_)
        #: The age of the last frame in its GOP, and how many maps are kept.
        self._state = np.zeros(2, np.int64)

    def add(
        self,
        vectors: npt.NDArray[Any],
        stops: npt.NDArray[np.int64],
        types: npt.NDArray[np.uint8],
        rows: npt.NDArray[np.int64],
        out: Int16,
    ) -> None:
        """Take the next frames and write their accumulated displacements into ``out``, (n, 2, gh, gw).

        ``vectors``, ``stops`` and ``rows`` are those of :func:`paint_motion`, ``types`` libavutil's picture types.
        """
        done = 0
        while True:
            done = _accumulate(
                vectors, stops, types, rows, done, self._state, self._blocks, self._pixels, self._by_pixel,
                self._grid.xs, self._grid.ys, out,
            )  # fmt: skip
            if done == len(stops):
                return
            self._pixels = np.zeros((len(self._blocks), *self._pixels.shape[1:]), np.int32)


@numba.njit(cache=True, nogil=True)
def _accumulate(vectors, stops, types, rows, done, state, blocks, pixels, by_pixel, xs, ys, out):  # type: ignore[no-untyped-def]
    """Frames from ``done`` on; returns where it stopped, which is before the end if ``pixels`` is needed and empty."""
    height, width = pixels.shape[1:]
    for frame in range(done, len(stops)):
        age = 0 if types[frame] == I_FRAME else state[0] + 1
        kept = 0 if age % len(blocks) == 0 else state[1]
        if types[frame] != I_FRAME:
            own = vectors[stops[frame - 1] if frame else 0 : stops[frame]]
            by_pixel[kept] = not _map_blocks(own, blocks[kept])
            if by_pixel[kept]:
                if len(pixels) == 0:
                    return frame
                _map_pixels(own, width, height, pixels[kept])
            if rows[frame] >= 0:
                _chase(kept, blocks, pixels, by_pixel, xs, ys, width, height, out[rows[frame]])
        elif rows[frame] >= 0:
            out[rows[frame]] = 0
        state[0] = age
        state[1] = kept + (types[frame] != I_FRAME and types[frame] != B_FRAME)
    return len(stops)


@numba.njit(cache=True, nogil=True)
def _map_blocks(vectors, out):  # type: ignore[no-untyped-def]
    """Write each block's displacement; False if the vectors cannot be told by blocks."""
    out[:] = 0
    for i in range(len(vectors)):
        v = vectors[i]
        packed = _packed(v)
        if packed == 0:
            continue
        x0, y0 = int(v.dst_x) - int(v.w) // 2, int(v.dst_y) - int(v.h) // 2
        if (x0 | y0 | int(v.w) | int(v.h)) & (_BLOCK - 1):
            return False
        for y in range(max(0, y0 >> _SHIFT), min(out.shape[0], (y0 + int(v.h)) >> _SHIFT)):
            for x in range(max(0, x0 >> _SHIFT), min(out.shape[1], (x0 + int(v.w)) >> _SHIFT)):
                if out[y, x] != 0:
                    # Where the later one came from outside the frame, the earlier one counts: a matter of pixels.
                    return False
                out[y, x] = packed
    return True


@numba.njit(cache=True, nogil=True)
def _map_pixels(vectors, width, height, out):  # type: ignore[no-untyped-def]
    out[:] = 0
    for i in range(len(vectors)):
        v = vectors[i]
        packed = _packed(v)
        if packed == 0:
            continue
        x0, x1 = painted(v.dst_x, int(v.dst_x) - int(v.src_x), v.w, width)
        y0, y1 = painted(v.dst_y, int(v.dst_y) - int(v.src_y), v.h, height)
        for y in range(y0, y1):
            for x in range(x0, x1):
                out[y, x] = packed


@numba.njit(cache=True, nogil=True)
def _packed(v):  # type: ignore[no-untyped-def]
    """A vector's displacement as one number; 0 if it moves nothing."""
    dx = int(v.dst_x) - int(v.src_x)
    dy = int(v.dst_y) - int(v.src_y)
    if v.source >= 0 or max(abs(dx), abs(dy)) > 32767:  # from beyond any frame
        return 0
    return dy * 65536 + dx


@numba.njit(cache=True, nogil=True)
def _chase(kept, blocks, pixels, by_pixel, xs, ys, width, height, out):  # type: ignore[no-untyped-def]
    """Follow every sampled pixel from map ``kept`` back to map 0; what it moved in all goes into ``out``."""
    out[:] = 0
    # All pixels through one map, then all through the next: no look-up waits for the one before it.
    for at in range(kept, -1, -1):
        in_pixels = by_pixel[at]
        for row in range(len(ys)):
            for column in range(len(xs)):
                x = xs[column] - out[0, row, column]
                y = ys[row] - out[1, row, column]
                packed = pixels[at, y, x] if in_pixels else blocks[at, y >> _SHIFT, x >> _SHIFT]
                if packed != 0:
                    dx = np.int16(packed)
                    dy = (packed - dx) >> 16
                    if 0 <= x - dx < width and 0 <= y - dy < height:
                        out[0, row, column] += dx
                        out[1, row, column] += dy
