import os
from pathlib import Path

import av
import numpy as np
import pytest
import videos
from av.video.frame import PictureType

from moclip.pipeline.extract.encode import write_video


def decoded(path: Path | bytes) -> list[av.VideoFrame]:
    with open(path, "rb") as file, av.open(file) as container:
        return list(container.decode(video=0))


@pytest.mark.parametrize(
    ("codec", "suffix", "size"),
    [
        ("mpeg4", ".avi", (171, 143)),
        ("mpeg2video", ".mpg", (171, 143)),
        ("libx264", ".mp4", (160, 120)),
        ("libx265", ".mp4", (160, 120)),
        ("libvpx-vp9", ".webm", (171, 143)),
    ],
)
def test_every_codec_keeps_size_and_number_of_frames(
    tmp_path: Path, codec: str, suffix: str, size: tuple[int, int]
) -> None:
    if not videos.has_encoder(codec):
        pytest.skip(f"this build of PyAV has no {codec}")
    path = videos.make_clip(tmp_path / f"clip{suffix}", codec=codec, width=size[0], height=size[1], frames=10)
    frames = decoded(path)
    assert len(frames) == 10
    assert {(frame.width, frame.height) for frame in frames} == {size}


def test_pixels_survive(tmp_path: Path) -> None:
    frames = list(videos.texture_frames(3, 96, 64))
    write_video(tmp_path / "clip.mkv", frames, codec="ffv1", pix_fmt="yuv444p")
    back = [frame.to_ndarray(format="rgb24") for frame in decoded(tmp_path / "clip.mkv")]
    assert np.abs(np.stack(back).astype(int) - np.stack(frames)).max() <= 4  # RGB -> YUV -> RGB rounds


def test_options_reach_the_encoder(tmp_path: Path) -> None:
    path = videos.make_clip(tmp_path / "clip.mp4", codec="libx264", frames=24, gop=8, bframes=2)
    types = [PictureType(frame.pict_type).name for frame in decoded(path)]
    assert types.count("I") == 3
    assert "B" in types
    with pytest.raises(TypeError):
        write_video(path, [], "mpeg4")  # type: ignore[misc]


def test_the_same_frames_give_the_same_bytes(tmp_path: Path) -> None:
    one, two = (videos.make_clip(tmp_path / f"{n}.mp4", codec="libx264").read_bytes() for n in "ab")
    assert one == two


def test_what_cannot_be_encoded_is_said(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    with pytest.raises(ValueError, match=r"171x143.*both sides must be even"):
        videos.make_clip(path, codec="libx264", width=171, height=143)
    with pytest.raises(ValueError, match="no frames"):
        write_video(path, [])
    with pytest.raises(ValueError, match="one size is needed"):
        write_video(path, [np.zeros((64, 64, 3), np.uint8), np.zeros((32, 64, 3), np.uint8)])
    with pytest.raises(ValueError, match="expected uint8"):
        write_video(path, [np.zeros((64, 64), np.uint8)])


class TestBadVideos:
    """The makers of bad input make what their names say."""

    @pytest.mark.parametrize("maker", [videos.zero_bytes, videos.text_file, videos.truncated_mp4])
    def test_nothing_opens(self, tmp_path: Path, maker: object) -> None:
        with pytest.raises((av.FFmpegError, OSError)):  # OSError: seeking in zero bytes
            decoded(maker(tmp_path / "bad.mp4"))  # type: ignore[operator]

    def test_audio_only_has_no_picture(self, tmp_path: Path) -> None:
        with av.open(os.fspath(videos.audio_only(tmp_path / "tone.mp4"))) as container:
            assert len(container.streams.audio) == 1
            assert len(container.streams.video) == 0

    def test_half_an_avi_decodes_in_part(self, tmp_path: Path) -> None:
        assert 0 < len(decoded(videos.truncated_avi(tmp_path / "half.avi"))) < 24

    def test_the_resolution_changes(self, tmp_path: Path) -> None:
        sizes = [(f.width, f.height) for f in decoded(videos.resolution_change(tmp_path / "two.h264"))]
        assert sizes == [(128, 96)] * 12 + [(96, 64)] * 12

    def test_one_frame_and_odd_names(self, tmp_path: Path) -> None:
        assert len(decoded(videos.one_frame(tmp_path / "one.avi"))) == 1
        assert [len(decoded(path)) for path in videos.odd_names(tmp_path / "odd")] == [6] * len(videos.ODD_NAMES)

    def test_damage_is_concealed(self, tmp_path: Path) -> None:
        frames = decoded(videos.damaged_avi(tmp_path / "bad.avi"))
        assert len(frames) > 20
        assert any(frame.is_corrupt for frame in frames) or len(frames) < 36
