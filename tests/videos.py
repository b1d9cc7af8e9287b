"""Small videos for the tests: good ones of every codec and size, and every kind of bad one."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from moclip.pipeline.extract.encode import write_video

# Names that a file system allows and that break careless code. Bytes, because one of them is not UTF-8.
ODD_NAMES = (
    b"new\nline.mp4",
    b"not-utf-8-\xff\xfe.mp4",
    b"n" * 246 + b".mp4",
    b" a b ' \" $HOME %s.mp4",
    b"\xc3\xa9\\x.mp4",
)


def texture_frames(
    frames: int, width: int, height: int, *, step: tuple[int, int] = (2, 0), seed: int = 0
) -> Iterator[NDArray[np.uint8]]:
    """A coloured texture that moves by ``step`` = (right, down) pixels a frame and wraps around."""
    coarse = np.random.default_rng(seed).integers(40, 216, ((height + 7) // 8, (width + 7) // 8, 3), np.uint8)
    image = coarse.repeat(8, 0).repeat(8, 1)[:height, :width]
    image = (image // 2 + np.roll(image, (3, 3), (0, 1)) // 2).astype(np.uint8)
    for number in range(frames):
        yield np.roll(image, (number * step[1], number * step[0]), (0, 1))


def make_clip(
    path: Path,
    *,
    codec: str = "mpeg4",
    frames: int = 24,
    width: int = 128,
    height: int = 96,
    gop: int = 12,
    bframes: int = 0,
    step: tuple[int, int] = (2, 0),
    seed: int = 0,
    fps: int = 25,
) -> Path:
    """A moving texture. 171x143 works with mpeg4, mpeg2video and libvpx-vp9, not with libx264 and libx265."""
    options = {"g": str(gop)}
    if codec in ("mpeg4", "mpeg2video", "libx264", "libx265"):
        options["bf"] = str(bframes)
    if codec == "libx264":
        options |= {"x264-params": "scenecut=0:log-level=none"}
    if codec == "libx265":
        options |= {"x265-params": "log-level=none", "preset": "ultrafast"}
    if codec == "libvpx-vp9":
        options |= {"cpu-used": "8", "deadline": "realtime"}
    write_video(
        path,
        texture_frames(frames, width, height, step=step, seed=seed),
        codec=codec,
        fps=fps,
        options=options,
    )
    return path


def has_encoder(codec: str) -> bool:
    """Whether this build of PyAV can encode with ``codec`` (libx265 and libvpx-vp9 are optional)."""
    try:
        av.Codec(codec, "w")
    except av.codec.codec.UnknownCodecError:
        return False
    return True


def one_frame(path: Path) -> Path:
    return make_clip(path, frames=1)


def odd_size(path: Path) -> Path:
    return make_clip(path, width=171, height=143)


def truncated_avi(path: Path) -> Path:
    """The first half of a file: its first frames still decode."""
    return _cut(make_clip(path), 0.5)


def truncated_mp4(path: Path) -> Path:
    """An MP4 cut before its index ("moov"), which stands at the end: nothing decodes."""
    _cut(make_clip(path, codec="libx264"), 0.5)
    assert b"moov" not in path.read_bytes()
    return path


def damaged_avi(path: Path) -> Path:
    """Bytes in the middle are overwritten: the decoder conceals the errors and goes on."""
    make_clip(path, frames=36, gop=36)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 600] = np.random.default_rng(0).integers(0, 256, 600, np.uint8).tobytes()
    path.write_bytes(content)
    return path


def zero_bytes(path: Path) -> Path:
    path.write_bytes(b"")
    return path


def text_file(path: Path) -> Path:
    path.write_text("This is not a video.\n" * 50)
    return path


def audio_only(path: Path) -> Path:
    """Half a second of a 440 Hz tone, and no picture."""
    rate, size = 16_000, 1_024
    with av.open(os.fspath(path), "w") as container:
        stream = container.add_stream("aac", rate=rate)
        for start in range(0, rate // 2, size):
            tone = np.sin(2 * np.pi * 440 * np.arange(start, start + size) / rate).astype(np.float32)
            frame = av.AudioFrame.from_ndarray(tone[None], format="fltp", layout="mono")
            frame.rate, frame.pts = rate, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def resolution_change(path: Path) -> Path:
    """An elementary H.264 stream (suffix .h264) of 12 frames of 128x96 and then 12 of 96x64."""
    assert path.suffix == ".h264"
    big = make_clip(path.with_name("big-" + path.name), codec="libx264", frames=12)
    small = make_clip(path.with_name("small-" + path.name), codec="libx264", frames=12, width=96, height=64)
    path.write_bytes(big.read_bytes() + small.read_bytes())
    big.unlink()
    small.unlink()
    return path


def unreadable(path: Path) -> bool:
    """Take every right from a good clip; False where that does not hinder this user (root)."""
    make_clip(path).chmod(0)
    return not os.access(path, os.R_OK)


def odd_names(folder: Path) -> list[bytes]:
    """One good clip under each of ``ODD_NAMES``; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    clip = make_clip(folder.parent / "plain-name.mp4", frames=6)
    paths = [os.path.join(os.fsencode(folder), name) for name in ODD_NAMES]
    for path in paths:
        shutil.copyfile(os.fsencode(clip), path)
    clip.unlink()
    return paths


def _cut(path: Path, part: float) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    return path
