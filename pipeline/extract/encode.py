"""Frames in, a compressed video file out: the demo's corpus and the tests' clips are made here."""

import os
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import cast

import av
import numpy as np
from av.video.stream import VideoStream
from numpy.typing import NDArray

Frame = NDArray[np.uint8]

# These two refuse odd sizes with subsampled chroma; mpeg4, mpeg2video and libvpx-vp9 take any size.
EVEN_ONLY = ("libx264", "libx265")


def write_video(
    path: str | Path,
    frames: Iterable[Frame],
    *,
    codec: str = "libx264",
    fps: int = 25,
    pix_fmt: str = "yuv420p",
    options: Mapping[str, str] | None = None,
) -> None:
    """Encode uint8 RGB frames (H, W, 3), all of one size, as a video without sound.

    The container follows from the suffix. ``options`` are the encoder's own ("g", "bf", "crf", …). One thread
    encodes, so that the file's bytes do not depend on the machine's number of cores.
    A ValueError says that there are no frames, or what the codec cannot take.
    """
    frames = iter(frames)
    first = next(frames, None)
    if first is None:
        raise ValueError(f"no frames to write to {os.fspath(path)!r}: a video needs at least one")
    height, width = _size(first, codec, pix_fmt)
    with av.open(os.fspath(path), "w") as container:
        stream = cast(VideoStream, container.add_stream(codec, rate=fps, options=dict(options or {})))
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        stream.thread_count = 1
        for number, frame in enumerate(chain([first], frames)):
            if frame.shape != first.shape:
                raise ValueError(f"frame {number} is {frame.shape}, the first is {first.shape}: one size is needed")
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())


def _size(frame: Frame, codec: str, pix_fmt: str) -> tuple[int, int]:
    """Height and width, or a ValueError that says what the encoder wants instead."""
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        raise ValueError(f"a frame is {frame.dtype} {frame.shape}; expected uint8 (height, width, 3)")
    height, width = frame.shape[:2]
    if codec in EVEN_ONLY and pix_fmt == "yuv420p" and (width % 2 or height % 2):
        raise ValueError(
            f"{codec} cannot encode {width}x{height} as yuv420p: both sides must be even; "
            f'use pix_fmt="yuv444p" or another codec (mpeg4, mpeg2video, libvpx-vp9)'
        )
    return height, width
