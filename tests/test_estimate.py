"""Motion of codecs whose decoder exports no vectors."""

import av
import numpy as np
import pytest
from sink import decode
from videos import has_encoder, make_clip, one_frame, texture_frames

from moclip.errors import VideoError
from moclip.pipeline.extract.decoding import DecodeConfig
from moclip.pipeline.extract.estimate import Estimator, motion_source
from moclip.pipeline.extract.features import FeatureRequest, motion_spec

WITHOUT_VECTORS = [codec for codec in ("libx265", "libvpx-vp9") if has_encoder(codec)]


def estimate(pictures, pixel_format="yuv420p"):
    estimator = Estimator()
    frames = (av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pixel_format) for picture in pictures)
    return [again for frame in (*frames, None) for again in estimator.feed(frame)]


def displacements(frame):
    vectors = frame.side_data.get("MOTION_VECTORS").to_ndarray()
    assert (vectors["source"] == -1).all()
    x, y = (-vectors[name] * 4 // vectors["motion_scale"] for name in ("motion_x", "motion_y"))
    return int(np.median(x)), int(np.median(y))


@pytest.mark.parametrize("step", [(2, 0), (-3, 1), (0, 5)])
@pytest.mark.parametrize("size", [(128, 96), (171, 143)])
def test_content_that_moves_right_and_down_has_positive_vectors(size, step):
    frames = estimate(texture_frames(8, *size, step=step))
    assert [int(frame.pict_type) for frame in frames] == [1] + [2] * 7
    assert {(frame.width, frame.height) for frame in frames} == {size}
    assert frames[0].side_data.get("MOTION_VECTORS") is None
    assert {displacements(frame) for frame in frames[2:]} == {(4 * step[0], 4 * step[1])}


@pytest.mark.parametrize("pixel_format", ["yuv420p10le", "yuv444p", "yuvj422p", "gray", "rgb24"])
def test_every_pixel_format_can_be_estimated(pixel_format):
    assert displacements(estimate(texture_frames(4, 64, 64), pixel_format)[3]) == (8, 0)


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (15, 40), (17, 16)])
def test_pictures_of_few_pixels_give_a_frame_each(size):
    assert len(estimate(texture_frames(4, *size))) == 4


def test_a_side_that_mpeg4_cannot_say_is_refused():
    with pytest.raises(VideoError, match="too_large: it is 8208x16"):
        estimate(texture_frames(1, 8208, 16))


def test_nothing_in_nothing_out():
    assert estimate([]) == []


@pytest.mark.parametrize(
    ("option", "codec", "source"),
    [
        ("auto", "h264", "native"),
        ("auto", "mpeg4", "native"),
        ("auto", "hevc", "estimate"),
        ("auto", "libdav1d", "estimate"),
        ("auto", "mjpeg", "estimate"),
        ("estimate", "h264", "estimate"),
        ("native", "hevc", "native"),
        ("mpeg4", "hevc", "mpeg4"),
        ("none", "hevc", "none"),
    ],
)
def test_the_codec_says_where_vectors_come_from(option, codec, source):
    assert motion_source(option, codec) == source


@pytest.mark.parametrize("codec", WITHOUT_VECTORS)
def test_auto_estimates_where_the_codec_has_no_vectors(tmp_path, codec):
    clip = make_clip(tmp_path / "clip.mkv", codec=codec)
    decoded, sink = decode(clip, DecodeConfig(motion="auto"))
    again, same = decode(clip, DecodeConfig(motion="estimate"))
    assert decoded.motion_source == again.motion_source == "estimate"
    assert decoded.motion_error is None
    np.testing.assert_array_equal(sink.all("motion"), same.all("motion"))
    motion = sink.all("motion")
    assert motion.shape == (24, 2, 12, 16)
    assert (np.median(motion[1:], axis=(0, 2, 3)) == (8, 0)).all()
    assert np.median(sink.all("accumulated")[11, 0]) == 22
    assert sink.all("pts_seconds")[-1] == pytest.approx(23 / 25)


def test_auto_takes_the_stream_s_own_vectors_where_it_has_some(tmp_path):
    clip = make_clip(tmp_path / "clip.avi")
    decoded, sink = decode(clip, DecodeConfig(motion="auto"))
    _, native = decode(clip, DecodeConfig(motion="native"))
    assert decoded.motion_source == "native"
    np.testing.assert_array_equal(sink.all("motion"), native.all("motion"))


@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
def test_auto_estimates_a_stream_of_i_frames(tmp_path, codec):
    clip = make_clip(tmp_path / "clip.mp4", codec=codec, gop=1)
    assert decode(clip, DecodeConfig(motion="native"))[0].motion_error.reason == "no_vectors"
    decoded, sink = decode(clip, DecodeConfig(motion="auto"))
    assert (decoded.motion_source, decoded.motion_error, sink.restarts) == ("estimate", None, 1)
    assert np.median(sink.all("motion")[1:, 0]) == 8


def test_one_frame_is_no_motion_and_no_error(tmp_path):
    for option in ("auto", "estimate"):
        decoded, sink = decode(one_frame(tmp_path / "clip.mp4"), DecodeConfig(motion=option))
        assert decoded.motion_error is None
        assert not sink.all("motion").any()


def test_a_picture_that_stands_still_has_rows_of_zeros(tmp_path):
    clip = make_clip(tmp_path / "clip.mkv", codec=WITHOUT_VECTORS[0], step=(0, 0)) if WITHOUT_VECTORS else None
    if clip is None:
        pytest.skip("this build of PyAV encodes neither HEVC nor VP9")
    decoded, sink = decode(clip, DecodeConfig(motion="auto"))
    assert decoded.motion_error is None
    assert sink.all("motion").shape[0] == 24


def test_specifications_name_the_estimator_where_it_takes_part():
    said = {option: motion_spec("motion", option, 8).parameters for option in ("auto", "estimate", "native", "mpeg4")}
    assert (
        said["auto"]["estimator"] == said["estimate"]["estimator"] == {"encoder": "mpeg4", "quantiser": 4, "gop": 600}
    )
    assert "estimator" not in said["native"]
    assert "estimator" not in said["mpeg4"]
    assert len({motion_spec("motion", option, 8).digest for option in said}) == 4


def test_auto_is_the_default():
    assert FeatureRequest().motion == "auto"
