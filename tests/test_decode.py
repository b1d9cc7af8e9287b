"""One pass over real files of real codecs: what comes out, and what each broken file is called."""

import os
from dataclasses import replace
from itertools import pairwise

import av
import numpy as np
import pytest
import sink
import videos

from moclip.errors import SourceError, VideoError
from moclip.pipeline.extract.decoding import DecodeConfig
from moclip.pipeline.extract.encode import write_video
from moclip.pipeline.extract.sampling import FramePolicy

MIDDLE = DecodeConfig(frames=FramePolicy("middle"))


def decode(path, config=MIDDLE):
    return sink.decode(path, config)


@pytest.mark.parametrize("codec", ["mpeg4", "libx264", "mpeg2video"])
def test_motion_is_the_texture_s(tmp_path, codec):
    path = videos.make_clip(tmp_path / "clip.mkv", codec=codec, frames=24)
    found, taken = decode(path)
    assert found.frames == 24
    assert found.corrupt_frames == 0
    rows = taken.all("motion")
    types = taken.all("picture_type")
    moving = rows[types == 2][:, 0]
    # make_clip moves its texture 2 pixels to the right a frame: 8 quarter pixels, over one or two frames.
    assert np.median(moving) in (8, 16, 24)
    assert np.all(rows[types == 1] == 0)


def test_times_ascend_and_rows_match_frames(tmp_path):
    path = videos.make_clip(tmp_path / "clip.mp4", codec="libx264", frames=300)
    found, taken = decode(path)
    assert [len(block.motion) for block in taken.blocks] == [256, 44]
    times = taken.all("pts_seconds")
    assert len(times) == found.frames == 300
    assert all(a < b for a, b in pairwise(times))


def test_the_sampled_frame_is_the_middle_one_as_pyav_gives_it(tmp_path):
    path = videos.make_clip(tmp_path / "clip.avi", frames=25)
    _, taken = decode(path)
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    (sampled,) = taken.sampled
    assert sampled.index == 12
    np.testing.assert_array_equal(sampled.rgb, frames[12])


def test_a_header_that_promises_too_much_does_not_move_the_middle(tmp_path):
    path = videos.truncated_avi(tmp_path / "cut.avi")
    found, taken = decode(path)
    assert 0 < found.frames < 24
    assert taken.sampled[0].index == found.frames // 2


def test_mpeg4_motion_is_of_340x256_whatever_the_source(tmp_path):
    path = videos.make_clip(tmp_path / "clip.mp4", codec="libx264", frames=30)
    found, taken = decode(path, replace(MIDDLE, motion="mpeg4"))
    rows = taken.all("motion")
    types = taken.all("picture_type")
    assert rows.shape == (30, 2, 32, 43)
    assert types[:14].tolist() == [1] + [2] * 11 + [1, 2]
    assert found.motion_error is None


def test_one_frame_is_a_video(tmp_path):
    found, taken = decode(videos.one_frame(tmp_path / "one.avi"))
    assert found.frames == 1
    assert found.motion_error is None
    assert not taken.blocks[0].motion.any()
    assert [frame.index for frame in taken.sampled] == [0]


def test_odd_sizes(tmp_path):
    found, taken = decode(videos.odd_size(tmp_path / "odd.avi"))
    assert (found.width, found.height) == (171, 143)
    assert taken.blocks[0].motion.shape[1:] == (2, 18, 22)


@pytest.mark.parametrize("codec", ["libx265", "libvpx-vp9"])
def test_codecs_without_vectors_keep_their_frames(tmp_path, codec):
    if not videos.has_encoder(codec):
        pytest.skip(f"this build cannot make {codec}")
    path = videos.make_clip(tmp_path / "clip.mkv", codec=codec)
    found, taken = decode(path, replace(MIDDLE, motion="native"))
    assert found.motion_error is not None
    assert found.motion_error.reason == "no_vectors"
    assert "--motion auto" in found.motion_error.detail
    assert len(taken.sampled) == 1
    again, taken = decode(path, replace(MIDDLE, motion="mpeg4"))
    assert again.motion_error is None
    assert taken.blocks


@pytest.mark.parametrize(
    ("make", "name", "reason"),
    [
        (videos.truncated_mp4, "cut.mp4", "truncated"),
        (videos.zero_bytes, "zero.mp4", "empty"),
        (videos.text_file, "text.mp4", "not_video"),
        (videos.audio_only, "audio.mp4", "no_video_stream"),
        (videos.resolution_change, "change.h264", "resolution_changed"),
        (lambda path: path, "missing.mp4", "missing"),
        (lambda path: path.mkdir(), "folder.mp4", "unreadable"),
    ],
)
def test_a_video_that_cannot_be_used_says_why(tmp_path, make, name, reason):
    path = tmp_path / name
    make(path)
    with pytest.raises(VideoError) as caught:
        decode(path)
    assert caught.value.reason == reason


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(VideoError, match="unreadable"):
        decode(tmp_path / "pipe.mp4")


def test_a_codec_that_nobody_knows(tmp_path):
    path = videos.make_clip(tmp_path / "clip.avi")
    path.write_bytes(path.read_bytes().replace(b"FMP4", b"XQZ9"))
    with pytest.raises(VideoError, match="unknown_codec"):
        decode(path)


def test_a_header_that_promises_two_billion_frames_costs_nothing(tmp_path):
    path = videos.make_clip(tmp_path / "clip.avi", frames=12)
    content = bytearray(path.read_bytes())
    # AVI's dwTotalFrames, and dwLength of the stream's header.
    content[content.index(b"avih") + 24 : content.index(b"avih") + 28] = (2 * 10**9).to_bytes(4, "little")
    content[content.index(b"strh") + 40 : content.index(b"strh") + 44] = (2 * 10**9).to_bytes(4, "little")
    path.write_bytes(content)
    _, taken = decode(path, DecodeConfig(frames=FramePolicy("fps:25")))
    assert [frame.index for frame in taken.sampled] == list(range(12))


def test_the_time_of_a_sampled_frame_is_the_source_s(tmp_path):
    path = videos.make_clip(tmp_path / "clip.avi", frames=31, width=340, height=256)
    native, first = decode(path)
    again, second = decode(path, replace(MIDDLE, motion="mpeg4"))
    assert second.sampled[0].pts_seconds == first.sampled[0].pts_seconds
    assert again.duration_s == pytest.approx(31 / native.fps)


def test_a_cover_picture_is_not_a_video(tmp_path):
    song = videos.audio_only(tmp_path / "song.m4a")
    picture = tmp_path / "cover.mkv"
    write_video(picture, videos.texture_frames(1, 64, 64), codec="mjpeg", pix_fmt="yuvj420p")
    with av.open(str(song)) as audio, av.open(str(picture)) as image, av.open(str(tmp_path / "a.mp4"), "w") as out:
        streams = {
            audio: out.add_stream_from_template(audio.streams.audio[0]),
            image: out.add_stream_from_template(image.streams.video[0]),
        }
        streams[image].disposition = av.stream.Disposition.attached_pic
        for source, stream in streams.items():
            for packet in source.demux():
                if packet.size:
                    packet.stream = stream
                    out.mux(packet)
    with pytest.raises(VideoError, match=r"no_video_stream.*cover"):
        decode(tmp_path / "a.mp4")


def test_a_playlist_cannot_open_other_files(tmp_path):
    secret = videos.make_clip(tmp_path / "secret.ts", codec="mpeg2video")
    playlist = tmp_path / "list.mp4"
    playlist.write_text(f"ffconcat version 1.0\nfile {secret.name}\n")
    with pytest.raises(VideoError):
        decode(playlist)


def test_concealed_errors_are_counted(tmp_path):
    found, _ = decode(videos.damaged_avi(tmp_path / "damaged.avi"))
    assert found.corrupt_frames > 0
    assert found.frames > 0


@pytest.mark.parametrize(
    ("policy", "frames", "expected"),
    [
        ("middle", 25, [12]),
        ("middle", 1, [0]),
        ("uniform:4", 40, [5, 15, 25, 35]),
        ("uniform:4", 2, [0, 0, 1, 1]),
        ("fps:5", 100, [2, 7, 12, 17, 22, 27, 32, 37, 42, 47, 52, 57, 62, 67, 72, 77, 82, 87, 92, 97]),
    ],
)
def test_frame_policies(policy, frames, expected):
    assert FramePolicy(policy).indices(frames, 25.0, "id").tolist() == expected


def test_random_frames_depend_on_the_id_alone():
    policy = FramePolicy("random:3")
    first = policy.indices(100, 25.0, "a")
    assert first.tolist() == policy.indices(100, 25.0, "a").tolist()
    assert first.tolist() != policy.indices(100, 25.0, "b").tolist()
    assert policy.indices(2, 25.0, "a").tolist() == sorted(policy.indices(2, 25.0, "a").tolist())


@pytest.mark.parametrize("name", ["first", "uniform:0", "uniform:", "fps:0", "random:-1"])
def test_unknown_policies_are_refused(name):
    with pytest.raises(SourceError, match="expected middle"):
        FramePolicy(name)
