"""Timing, orientation, fields, shape of pixels and edits: what docs/motion.md says of each."""

from fractions import Fraction

import av
import numpy as np
import pytest
from odd_videos import FRAMES, SIZE, edited, mux, sideways, woven
from sink import decode
from videos import texture_frames

from moclip.pipeline.extract.decoding import DecodeConfig
from moclip.pipeline.extract.motion import VECTOR, Grid, paint_motion
from moclip.pipeline.extract.orientation import upright_size, upright_vectors
from moclip.pipeline.extract.sampling import FramePolicy

TURNS = (0, 90, 180, 270)


def config(**settings):
    return DecodeConfig(**{"motion": "native", "frames": FramePolicy("uniform:4"), **settings})


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv"])
@pytest.mark.parametrize("bframes", [0, 2])
def test_frames_of_uneven_lengths_have_rows_and_times_of_their_own(tmp_path, name, bframes):
    times = [20 * number**2 for number in range(FRAMES)]
    decoded, sink = decode(mux(tmp_path / name, times_ms=times, bframes=bframes), config())
    assert decoded.frames == FRAMES
    assert decoded.duration_s == pytest.approx(times[-1] / 1000, rel=0.1)
    np.testing.assert_allclose(sink.all("pts_seconds"), np.array(times) / 1000, atol=1e-3)
    assert [frame.index for frame in sink.sampled] == [3, 9, 15, 21]
    assert [frame.pts_seconds for frame in sink.sampled] == [pytest.approx(times[i] / 1000) for i in (3, 9, 15, 21)]


@pytest.mark.parametrize("bframes", [0, 2])
def test_what_an_edit_list_leaves_out_has_no_rows(tmp_path, bframes):
    _, whole = decode(mux(tmp_path / "whole.mp4", bframes=bframes), config())
    decoded, sink = decode(edited(mux(tmp_path / "clip.mp4", bframes=bframes), 5), config())
    assert decoded.frames == FRAMES - 5
    assert sink.all("pts_seconds")[0] == 0
    assert [frame.index for frame in sink.sampled] == [2, 7, 11, 16]
    np.testing.assert_array_equal(sink.all("motion"), whole.all("motion")[5:])


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.ts"])
def test_a_stream_that_begins_late_keeps_its_times(tmp_path, name):
    times = [5000 + 40 * number for number in range(FRAMES)]
    decoded, sink = decode(mux(tmp_path / name, times_ms=times, bframes=2), config())
    np.testing.assert_allclose(sink.all("pts_seconds"), np.array(times) / 1000, atol=1e-3)
    assert decoded.duration_s == pytest.approx(FRAMES / 25)


@pytest.mark.parametrize(("name", "codec"), [("clip.h264", "libx264"), ("clip.m4v", "mpeg4")])
def test_a_bare_stream_has_times_by_its_frame_rate(tmp_path, name, codec):
    decoded, sink = decode(mux(tmp_path / name, codec=codec), config())
    assert decoded.frames == FRAMES
    np.testing.assert_allclose(sink.all("pts_seconds"), np.arange(FRAMES) / 25)


def test_an_mp4_shows_nothing_from_before_time_zero(tmp_path):
    times = [40 * number - 400 for number in range(FRAMES)]
    decoded, sink = decode(mux(tmp_path / "clip.mp4", times_ms=times), config())
    assert decoded.frames == FRAMES - 10 == len(sink.all("motion"))
    assert sink.all("pts_seconds")[0] == 0


def test_pixels_that_are_not_square_are_taken_as_coded(tmp_path):
    plain, square = decode(mux(tmp_path / "plain.mp4"), config())
    decoded, sink = decode(mux(tmp_path / "clip.mp4", pixel_aspect=Fraction(4, 3)), config())
    assert (decoded.width, decoded.height) == (plain.width, plain.height) == SIZE
    np.testing.assert_array_equal(sink.all("motion"), square.all("motion"))


FIELDS = [
    ("clip.mpg", "mpeg2video", {"flags": "+ildct+ilme"}),
    ("clip.avi", "mpeg4", {"flags": "+ildct+ilme"}),
    ("clip.mp4", "libx264", {"x264-params": "tff=1:scenecut=0:log-level=none"}),
]


@pytest.mark.parametrize(("name", "codec", "options"), FIELDS)
@pytest.mark.parametrize("step", [(2, 0), (0, 2)])
def test_fields_have_the_motion_of_their_frame(tmp_path, name, codec, options, step):
    clip = mux(tmp_path / name, codec=codec, options=options, pictures=woven(step))
    with av.open(str(clip)) as container:
        assert next(container.decode(video=0)).interlaced_frame
    moved = {
        motion: np.median(decode(clip, config(motion=motion))[1].all("motion")[5:], axis=(0, 2, 3)).tolist()
        for motion in ("native", "estimate")
    }
    # Two fields a frame, four quarters a pixel. H.264 counts the lines of a field: half of those of the frame.
    vertical = 8 * step[1] // (2 if codec == "libx264" else 1)
    assert moved["native"] == [8 * step[0], vertical]
    assert moved["estimate"] == [8 * step[0], 8 * step[1]]


def turned(pictures, rotation):
    """Stored so that ``rotation`` puts them upright."""
    return [np.ascontiguousarray(np.rot90(picture, -rotation // 90)) for picture in pictures]


@pytest.mark.parametrize("rotation", TURNS)
@pytest.mark.parametrize("settings", [{}, {"exact": True}, {"motion": "estimate"}, {"motion": "mpeg4"}], ids=str)
def test_what_a_phone_stored_on_its_side_is_turned_upright(tmp_path, rotation, settings):
    pictures = list(texture_frames(FRAMES, *SIZE, step=(3, 1)))
    clip = sideways(mux(tmp_path / "clip.mp4", pictures=turned(pictures, rotation)), rotation)
    decoded, sink = decode(clip, config(**settings))
    assert (decoded.width, decoded.height) == SIZE
    for frame in sink.sampled:
        assert np.abs(frame.rgb.astype(int) - pictures[frame.index]).mean() < 12
    _, upright = decode(mux(tmp_path / "upright.mp4", pictures=pictures), config(**settings))
    motion = sink.all("motion")
    assert motion.shape == upright.all("motion").shape
    expected = np.median(upright.all("motion")[3:], axis=(0, 2, 3))
    assert np.abs(np.median(motion[3:], axis=(0, 2, 3)) - expected).max() <= 1
    assert np.median(motion[3:, 0]) > 0
    assert np.median(sink.all("accumulated")[5, 0]) > 0


@pytest.mark.parametrize("frames", ["middle", "uniform:30"])
def test_sampled_frames_alone_are_turned_too(tmp_path, frames):
    pictures = list(texture_frames(FRAMES, *SIZE))
    clip = sideways(mux(tmp_path / "clip.mp4", pictures=turned(pictures, 90)), 90)
    _, sink = decode(clip, config(motion="none", frames=FramePolicy(frames)))
    assert {frame.rgb.shape for frame in sink.sampled} == {(SIZE[1], SIZE[0], 3)}


@pytest.mark.parametrize("rotation", TURNS)
def test_turned_vectors_paint_the_turned_picture(rotation):
    """Against the painting of the frame as it is stored, on a grid of single pixels, turned pixel by pixel."""
    random = np.random.default_rng(rotation)
    size = (37, 22)
    vectors = np.zeros(60, VECTOR)
    vectors["source"] = random.choice([-1, -1, 1], 60)
    vectors["w"], vectors["h"] = random.choice([8, 16, 5], (2, 60))
    vectors["dst_x"], vectors["dst_y"] = random.integers(-4, 40, (2, 60))
    for axis in "xy":
        vectors[f"motion_{axis}"] = random.integers(-30, 30, 60)
        vectors[f"src_{axis}"] = vectors[f"dst_{axis}"] + vectors[f"motion_{axis}"] // 4
    vectors["motion_scale"] = 4
    x, y = painted(vectors, size)
    # Counter-clockwise: what went right goes up, what went down goes right.
    for _ in range(rotation // 90):
        x, y = np.rot90(y), -np.rot90(x)
    np.testing.assert_array_equal(
        painted(upright_vectors(vectors, rotation, size), upright_size(size, rotation)), np.stack([x, y])
    )


def painted(vectors, size):
    out = np.empty((1, 2, size[1], size[0]), np.int16)
    paint_motion(vectors, np.array([len(vectors)]), np.array([0]), Grid(*size, 1), out)
    return out[0]
