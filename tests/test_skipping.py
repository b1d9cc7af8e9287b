"""Decoding that leaves out what nobody looks at, against decoding everything: equal, whatever the stream."""

import os
import tempfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import sink
import videos
from hypothesis import given, settings
from hypothesis import strategies as st

from moclip.errors import VideoError
from moclip.pipeline.extract import decode, gop
from moclip.pipeline.extract.decoding import DecodeConfig
from moclip.pipeline.extract.encode import write_video
from moclip.pipeline.extract.sampling import FramePolicy
from moclip.pipeline.extract.video_file import index_packets, open_video

X264 = "x264-params"


def outcome(path, config):
    """Everything that a pass gives, as something that compares; the reason where it fails."""
    try:
        found, taken = sink.decode(path, config)
    except VideoError as error:
        return error.reason, [], [], 0
    rows = []
    if taken.blocks and config.motion != "none":
        names = ("motion", "pts_seconds", "picture_type", *(["accumulated"] if config.accumulate else []))
        rows = [taken.all(name).tobytes() for name in names]
    frames = [(frame.index, frame.pts_seconds, frame.rgb.tobytes()) for frame in taken.sampled]
    hidden = {"corrupt_frames": None} if config.motion == "none" else {}
    return replace(found, motion_error=None, **hidden), rows, frames, taken.restarts


def assert_equal_to_plain(path, config):
    *skipped, restarts = outcome(path, config)
    *plain, _ = outcome(path, replace(config, exact=True))
    assert skipped == plain
    return restarts


def write(path, codec, options, *, frames=40, size=(96, 64), seed=0):
    """A texture that moves, and flashes: x264 begins a new GOP there, and every macroblock has something to code."""
    rng = np.random.default_rng(seed)
    images = videos.texture_frames(frames, *size, step=(3, 1), seed=seed)
    cuts = set(rng.integers(1, frames + 1, 2).tolist())
    moving = (np.roll(255 - image if n in cuts else image, n % 5, 0) for n, image in enumerate(images))
    write_video(path, moving, codec=codec, options=options)
    return path


#: What the second decoder of sampled frames and the first of vectors have to get right.
STREAMS = {
    "mpeg4 IP": ("mpeg4", ".avi", {"g": "12", "bf": "0"}),
    "mpeg4 B-frames": ("mpeg4", ".mp4", {"g": "12", "bf": "2"}),
    "mpeg4 B-frames in avi": ("mpeg4", ".avi", {"g": "10", "bf": "2"}),
    "mpeg4 closed GOPs": ("mpeg4", ".mkv", {"g": "12", "bf": "2", "flags": "+cgop", "sc_threshold": "1000000000"}),
    "mpeg4 quarter pixels": ("mpeg4", ".mp4", {"g": "12", "bf": "1", "flags": "+qpel+mv4"}),
    "mpeg4 one GOP": ("mpeg4", ".avi", {"g": "600", "bf": "0"}),
    "mpeg4 elementary": ("mpeg4", ".m4v", {"g": "12", "bf": "0"}),
    "h264": ("libx264", ".mp4", {"g": "12", X264: "log-level=none"}),
    "h264 no B-frames": ("libx264", ".mp4", {"g": "12", "bf": "0", X264: "log-level=none"}),
    "h264 pyramid": ("libx264", ".mkv", {"g": "15", "bf": "4", X264: "b-pyramid=normal:log-level=none"}),
    "h264 open GOPs": ("libx264", ".mp4", {"g": "12", "bf": "3", X264: "open-gop=1:scenecut=0:log-level=none"}),
    "h264 recovery points": ("libx264", ".mp4", {"g": "12", X264: "intra-refresh=1:scenecut=0:log-level=none"}),
    "h264 weighted, 4 references": ("libx264", ".ts", {"g": "20", X264: "ref=4:weightp=2:log-level=none"}),
    "h264 elementary": ("libx264", ".h264", {"g": "12", "bf": "2", X264: "log-level=none"}),
    "h264 interlaced": ("libx264", ".mp4", {"g": "12", X264: "tff=1:log-level=none"}),
    "mpeg2": ("mpeg2video", ".mpg", {"g": "12", "bf": "2"}),
    "vp9": ("libvpx-vp9", ".webm", {"g": "12", "deadline": "realtime", "cpu-used": "8"}),
    "hevc": ("libx265", ".mp4", {"g": "12", "preset": "ultrafast", "x265-params": "log-level=none"}),
}
CONFIGS = {
    "motion": DecodeConfig(),
    "middle": DecodeConfig(accumulate=False, frames=FramePolicy("middle")),
    "three": DecodeConfig(accumulate=False, frames=FramePolicy("random:3")),
    "few frames, no motion": DecodeConfig(motion="none", frames=FramePolicy("uniform:3")),
    "clips": DecodeConfig(stride=3, clip_seconds=0.6, frames=FramePolicy("middle")),
}


@pytest.mark.parametrize("name", STREAMS)
def test_skipping_changes_nothing(tmp_path, name, monkeypatch):
    codec, suffix, options = STREAMS[name]
    if not videos.has_encoder(codec):
        pytest.skip(f"this PyAV has no {codec}")
    # However much the second decoder costs: it must be right.
    monkeypatch.setattr(decode, "WORTH", 1.0)
    path = write(tmp_path / f"clip{suffix}", codec, options)
    for config in CONFIGS.values():
        assert_equal_to_plain(path, config)


@pytest.mark.parametrize("name", ["mpeg4 IP", "mpeg4 B-frames", "h264", "h264 pyramid", "h264 open GOPs"])
def test_common_streams_are_not_decoded_again(tmp_path, name, monkeypatch):
    monkeypatch.setattr(decode, "WORTH", 1.0)
    codec, suffix, options = STREAMS[name]
    path = write(tmp_path / f"clip{suffix}", codec, options)
    assert all(assert_equal_to_plain(path, config) == 0 for config in CONFIGS.values())


@settings(max_examples=25, deadline=None)
@given(
    codec=st.sampled_from(["mpeg4", "libx264"]),
    suffix=st.sampled_from([".mp4", ".mkv", ".avi"]),
    gop_frames=st.integers(1, 30),
    b_frames=st.integers(0, 4),
    frames=st.integers(1, 45),
    size=st.sampled_from([(64, 48), (96, 64), (52, 36)]),
    preset=st.sampled_from(["ultrafast", "veryfast", "medium"]),
    more=st.sampled_from(["open-gop=1", "intra-refresh=1", "scenecut=40", "tff=1", "slices=3", "b-pyramid=strict"]),
    flags=st.sampled_from(["+mv4", "+qpel", "+cgop", "+aic", "+qpel+mv4"]),
    policy=st.sampled_from(["middle", "uniform:4", "random:2", "fps:5"]),
    seed=st.integers(0, 1000),
)
def test_skipping_changes_nothing_whatever_the_encoder_s_settings(
    codec, suffix, gop_frames, b_frames, frames, size, preset, more, flags, policy, seed
):
    options = {"g": str(gop_frames), "bf": str(b_frames)}
    if codec == "mpeg4":
        options |= {"flags": flags, "bf": str(min(b_frames, 2))}
        if "+cgop" in flags:
            options["sc_threshold"] = "1000000000"
    else:
        options |= {"preset": preset, X264: f"{more}:log-level=none"}
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "WORTH", 1.0)
        path = write(Path(folder) / f"clip{suffix}", codec, options, frames=frames, size=size, seed=seed)
        for motion in ("native", "none"):
            assert_equal_to_plain(path, DecodeConfig(motion=motion, frames=FramePolicy(policy)))


@pytest.mark.parametrize(
    ("name", "unseen"), [("mpeg4 IP", 1), ("mpeg4 B-frames", 1), ("h264", 0), ("h264 open GOPs", 0)]
)
def test_damage_is_seen_and_such_a_video_decoded_plainly(tmp_path, name, unseen):
    """Concealing an error looks at pixels, and a lost frame moves all numbers.

    The MPEG-4 decoder says nothing of a frame that ends early but well-formed, when it decodes a fraction of the
    picture: a rare video keeps its unconcealed vectors then (docs/motion.md).
    """
    codec, suffix, options = STREAMS[name]
    good = write(tmp_path / f"clip{suffix}", codec, options).read_bytes()
    rng = np.random.default_rng(0)
    restarts = differ = 0
    for number in range(15):
        content = bytearray(good)
        for at in rng.integers(len(good) // 10, len(good) * 9 // 10, 3):
            content[at : at + 4] = rng.integers(0, 256, 4, np.uint8).tobytes()
        path = tmp_path / f"damaged-{number}{suffix}"
        path.write_bytes(content)
        for config in (CONFIGS["motion"], CONFIGS["middle"]):
            *skipped, again = outcome(path, config)
            *plain, _ = outcome(path, replace(config, exact=True))
            restarts += again
            if skipped != plain:
                assert plain[0].corrupt_frames > 0
                assert skipped[2] == plain[2]
                differ += config is CONFIGS["motion"]
    assert restarts > 0
    assert differ <= unseen


def test_only_the_gops_of_sampled_frames_are_decoded(tmp_path, monkeypatch):
    seen = []

    class Counting:
        def __init__(self, context):
            self._context = context

        def decode(self, packet):
            seen.append(packet)
            return self._context.decode(packet)

        def flush_buffers(self):
            self._context.flush_buffers()

    from moclip.pipeline.extract.video_file import VideoFile

    real = VideoFile.another_decoder
    monkeypatch.setattr(VideoFile, "another_decoder", lambda self: Counting(real(self)))
    path = write(
        tmp_path / "clip.mp4", "libx264", {"g": "10", "bf": "0", X264: "scenecut=0:log-level=none"}, frames=100
    )
    _, taken = sink.decode(path, DecodeConfig(motion="none", frames=FramePolicy("uniform:2")))
    assert [frame.index for frame in taken.sampled] == [25, 75]
    assert len(seen) < 20


def test_a_header_s_index_and_the_packets_agree(tmp_path):
    path = write(tmp_path / "clip.mp4", "libx264", {"g": "10", X264: "scenecut=0:log-level=none"})
    with open_video(os.fspath(path)) as video:
        assert video.index() == index_packets(os.fspath(path))
        assert video.index().keyframes == (0, 10, 20, 30)


def test_open_and_closed_gops_are_told_apart(tmp_path):
    """The container marks them alike."""

    def begins(name):
        codec, suffix, options = STREAMS[name]
        path = write(tmp_path / f"{name}{suffix}", codec, options)
        with open_video(os.fspath(path)) as video:
            packets = list(video.packets())
            return [
                gop.begins_gop(video.codec, bytes(packet), bytes(following), video.extradata)
                for packet, following in pairwise(packets)
                if packet.is_keyframe
            ]

    assert begins("h264 open GOPs") == [True, False, False, False]
    assert begins("mpeg4 B-frames")[0]
    assert not all(begins("mpeg4 B-frames"))
    assert all(begins("mpeg4 closed GOPs"))


def test_uncoded_pictures_are_not_counted():
    assert gop.is_uncoded("mpeg4", 7)
    assert not gop.is_uncoded("h264", 7)
    assert not gop.numbers_frames("mpeg4", b"\0\0\1\xb2DivX503b1393p")
    assert gop.numbers_frames("mpeg4", b"\0\0\1\xb2XviD0050")
