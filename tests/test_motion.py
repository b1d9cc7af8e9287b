"""The compiled painting against a slow, obvious version, on wild vectors."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moclip.pipeline.extract.accumulation import Accumulator
from moclip.pipeline.extract.motion import B_FRAME, I_FRAME, P_FRAME, VECTOR, Grid, paint_motion


def covered(vector, width, height):
    """Pixels p of a block for which p and p - displacement both lie inside the frame, by the definition."""
    dx, dy = int(vector["dst_x"]) - int(vector["src_x"]), int(vector["dst_y"]) - int(vector["src_y"])
    left, top = int(vector["dst_x"]) - int(vector["w"]) // 2, int(vector["dst_y"]) - int(vector["h"]) // 2
    for y in range(top, top + int(vector["h"])):
        for x in range(left, left + int(vector["w"])):
            if 0 <= x < width and 0 <= y < height and 0 <= x - dx < width and 0 <= y - dy < height:
                yield x, y, dx, dy


def slow_motion(vectors, width, height):
    field = np.zeros((2, height, width), np.int64)
    for vector in vectors:
        if vector["source"] < 0:
            for x, y, _, _ in covered(vector, width, height):
                scale = int(vector["motion_scale"])
                field[:, y, x] = -int(vector["motion_x"]) * 4 // scale, -int(vector["motion_y"]) * 4 // scale
    return field


def slow_trace(vectors, old, width, height):
    new = old.copy()
    for vector in vectors:
        for x, y, dx, dy in covered(vector, width, height):
            if vector["source"] < 0 and (dx, dy) != (0, 0):
                new[y, x] = old[y - dy, x - dx]
    return new


@st.composite
def frames_of_vectors(draw):
    width, height = draw(st.integers(1, 50)), draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    frames = []
    # Blocks of real streams lie on multiples of 4 and seldom overlap; anything may come from a damaged one.
    aligned = draw(st.sampled_from([1, 16]))
    for _ in range(draw(st.integers(1, 8))):
        count = int(rng.integers(0, 12))
        vectors = np.zeros(count, VECTOR)
        vectors["source"] = rng.choice([-2, -1, -1, -1, 1], count)
        for side in ("w", "h"):
            vectors[side] = rng.choice([4, 8, 16], count)
        vectors["motion_scale"] = rng.choice([1, 2, 4], count)
        for axis, size in (("x", width), ("y", height)):
            vectors[f"dst_{axis}"] = rng.integers(-9, size + 9, count) // aligned * aligned + (8 if aligned > 1 else 0)
            vectors[f"motion_{axis}"] = rng.integers(-60, 60, count)
            moved = np.trunc(vectors[f"motion_{axis}"] / vectors["motion_scale"]).astype(np.int16)
            vectors[f"src_{axis}"] = vectors[f"dst_{axis}"] + moved
        frames.append((vectors, int(rng.choice([I_FRAME, P_FRAME, P_FRAME, B_FRAME]))))
    return width, height, draw(st.sampled_from([1, 2, 3, 8, 16, 64])), frames


def batch(frames):
    """Frames' vectors one after the other, where each ends, and their types."""
    stops = np.cumsum([len(vectors) for vectors, _ in frames])
    return np.concatenate([vectors for vectors, _ in frames]), stops, np.array([t for _, t in frames], np.uint8)


def rows_of(frames, stride=1):
    """Every stride-th frame has a row; and an output that is wrong where nothing is written."""
    rows = np.array([i // stride if i % stride == 0 else -1 for i in range(len(frames))])
    return rows, lambda grid: np.full((rows.max() + 1, 2, *grid.shape), 9999, np.int16)


@given(frames_of_vectors(), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_motion_is_that_of_the_last_vector_on_the_sampled_pixel(case, stride):
    width, height, cell, frames = case
    grid = Grid(width, height, cell)
    rows, empty = rows_of(frames, stride)
    out = empty(grid)
    vectors, stops, _ = batch(frames)
    paint_motion(vectors, stops, rows, grid, out)
    expected = [slow_motion(own, width, height)[:, grid.ys][:, :, grid.xs] for own, _ in frames[::stride]]
    np.testing.assert_array_equal(out, expected)


@given(frames_of_vectors(), st.integers(1, 4), st.integers(1, 3), st.integers(1, 6))
@settings(max_examples=150, deadline=None)
def test_accumulation_equals_the_definition_on_every_pixel(case, window, stride, batch_frames):
    width, height, cell, frames = case
    grid = Grid(width, height, cell)
    y, x = np.mgrid[:height, :width]
    identity = np.stack([x, y], -1)
    trace, age, expected = identity, 0, []
    for vectors, picture_type in frames:
        age = 0 if picture_type == I_FRAME else age + 1
        trace = identity if age % window == 0 else trace
        shown = trace if picture_type == I_FRAME else slow_trace(vectors, trace, width, height)
        expected.append((identity - shown).transpose(2, 0, 1)[:, grid.ys][:, :, grid.xs])
        trace = trace if picture_type == B_FRAME else shown
    accumulator = Accumulator(grid, window)
    rows, empty = rows_of(frames, stride)
    out = empty(grid)
    for start in range(0, len(frames), batch_frames):
        some = slice(start, start + batch_frames)
        vectors, stops, types = batch(frames[some])
        accumulator.add(vectors, stops, types, rows[some], out)
    np.testing.assert_array_equal(out, expected[::stride])


def test_a_frame_without_vectors_keeps_the_trace():
    grid = Grid(16, 16, 8)
    accumulator = Accumulator(grid, 12)
    vectors = np.zeros(1, VECTOR)
    vectors["source"], vectors["w"], vectors["h"], vectors["motion_scale"] = -1, 16, 16, 4
    vectors["dst_x"] = vectors["dst_y"] = 8
    vectors["src_x"], vectors["src_y"] = 6, 8
    nothing = vectors[:0]
    frames = [(nothing, I_FRAME), (vectors, P_FRAME), (nothing, P_FRAME)]
    rows, empty = rows_of(frames)
    out = empty(grid)
    joined, stops, types = batch(frames)
    accumulator.add(joined, stops, types, rows, out)
    assert out[1, 0].tolist() == [[2, 2], [2, 2]]
    np.testing.assert_array_equal(out[1], out[2])


@pytest.mark.parametrize(("size", "cell", "expected"), [(340, 8, 43), (320, 8, 40), (1, 8, 1), (171, 16, 11)])
def test_grid_covers_the_frame(size, cell, expected):
    grid = Grid(size, size, cell)
    assert grid.shape == (expected, expected)
    assert grid.xs[-1] <= size - 1


def test_a_grid_without_cells_is_refused():
    with pytest.raises(ValueError, match="positive"):
        Grid(340, 256, 0)
