"""Videos whose container or coding is out of the ordinary: timing, orientation, fields, shape of pixels, edits."""

import os
import struct
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray
from videos import texture_frames

SIZE = (128, 96)
FRAMES = 24
_MILLISECOND = Fraction(1, 1000)
_ONE = 1 << 16
#: Transformation matrices of an MP4 track by the turn, counter-clockwise, that puts its pictures upright.
_MATRICES = {0: (1, 0, 0, 1), 90: (0, -1, 1, 0), 180: (-1, 0, 0, -1), 270: (0, 1, -1, 0)}


def mux(
    path: Path,
    *,
    codec: str = "libx264",
    pictures: Sequence[NDArray[np.uint8]] | None = None,
    times_ms: Sequence[int] | None = None,
    options: dict[str, str] | None = None,
    pixel_aspect: Fraction | None = None,
    muxer: dict[str, str] | None = None,
    bframes: int = 0,
) -> Path:
    """A moving texture, or ``pictures``, shown at ``times_ms``; 25 frames a second without."""
    pictures = list(texture_frames(FRAMES, *SIZE)) if pictures is None else pictures
    times_ms = [40 * number for number in range(len(pictures))] if times_ms is None else times_ms
    own = {"x264-params": "scenecut=0:log-level=none"} if codec == "libx264" else {}
    with av.open(os.fspath(path), "w", options=muxer or {}) as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.options = {"g": "12", "bf": str(bframes), **own, **(options or {})}
        stream.codec_context.time_base = _MILLISECOND if codec == "libx264" else Fraction(1, 25)
        if pixel_aspect:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        for time_ms, picture in zip(times_ms, pictures, strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.time_base, frame.pts = _MILLISECOND, time_ms
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def sideways(path: Path, rotation: int) -> Path:
    """Let an MP4 say that its pictures are to be turned by ``rotation`` degrees counter-clockwise."""
    content = bytearray(path.read_bytes())
    a, b, c, d = (value * _ONE for value in _MATRICES[rotation])
    at = content.index(struct.pack(">9i", _ONE, 0, 0, 0, _ONE, 0, 0, 0, 1 << 30), content.index(b"tkhd"))
    content[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    return path


def edited(path: Path, frames: int) -> Path:
    """Let an MP4's edit list leave out its first ``frames`` frames, which are decoded nevertheless."""
    content = bytearray(path.read_bytes())
    at = content.index(b"elst") + 12
    with av.open(os.fspath(path)) as container:
        stream = container.streams.video[0]
        ticks = round(frames / 25 / stream.time_base)
    duration, media_time = struct.unpack(">ii", content[at : at + 8])
    content[at : at + 8] = struct.pack(">ii", duration - 40 * frames, media_time + ticks)
    path.write_bytes(content)
    return path


def woven(step: tuple[int, int]) -> list[NDArray[np.uint8]]:
    """Interlaced pictures: each of two fields, between which the texture moves by ``step``."""
    pictures = list(texture_frames(2 * FRAMES, *SIZE, step=step))
    for top, bottom in pairwise(pictures):
        top[1::2] = bottom[1::2]
    return pictures[::2]
