"""Videos that are stored on their side, as phones do: pictures and vectors turned upright, as players show them.

A ``rotation`` is how far a picture is to be turned counter-clockwise, in degrees: 0, 90, 180 or 270.
"""

import re
from typing import Any

import av
import av.logging
import numpy as np
import numpy.typing as npt

_STREAM = re.compile(r"^\s*Stream #\d+:(\d+)", re.MULTILINE)
_ROTATION = re.compile(r"rotation of (-?\d+(?:\.\d+)?) degrees")


def stated_rotation(container: Any, stream: Any) -> int:
    """What the container says of a stream; 0 for an angle that is no quarter turn."""
    # PyAV gives a stream's display matrix with decoded frames only, and not with those of a decoder of one's own.
    av.logging.set_level(av.logging.INFO)
    try:
        text = container.dumps_format()
    finally:
        av.logging.set_level(None)
    parts = _STREAM.split(text)
    of_stream = dict(zip(parts[1::2], parts[2::2], strict=True)).get(str(stream.index), "")
    found = _ROTATION.search(of_stream)
    degrees = float(found[1]) if found else 0.0
    return int(degrees) % 360 if degrees % 90 == 0 else 0


def upright(picture: npt.NDArray[np.uint8], rotation: int) -> npt.NDArray[np.uint8]:
    """A (height, width, channels) picture, turned."""
    return np.ascontiguousarray(np.rot90(picture, rotation // 90))


def upright_frame(frame: av.VideoFrame, rotation: int) -> av.VideoFrame:
    """A frame for an encoder, turned; the same one where there is nothing to turn."""
    if rotation == 0:
        return frame
    picture = frame.to_ndarray(format="rgb24").astype(np.uint8, copy=False)
    return av.VideoFrame.from_ndarray(upright(picture, rotation), format="rgb24")


def upright_size(size: tuple[int, int], rotation: int) -> tuple[int, int]:
    """(width, height) after the turn."""
    return (size[1], size[0]) if rotation % 180 else size


def upright_vectors(vectors: npt.NDArray[Any], rotation: int, size: tuple[int, int]) -> npt.NDArray[Any]:
    """Exported vectors of a frame of ``size`` (width, height), turned with it: a copy, in the same order."""
    for _ in range(rotation // 90):
        vectors = _quarter_turn(vectors, size[0])
        size = size[1], size[0]
    return vectors


def _quarter_turn(vectors: npt.NDArray[Any], width: int) -> npt.NDArray[Any]:
    """Counter-clockwise: pixel (x, y) goes to (y, width - 1 - x)."""
    turned = vectors.copy()
    turned["w"], turned["h"] = vectors["h"], vectors["w"]
    # A block begins half its size before its centre, rounded down; turned, it begins where its end was.
    end = vectors["dst_x"] - vectors["w"] // 2 + vectors["w"]
    turned["dst_x"] = vectors["dst_y"]
    turned["dst_y"] = width - end + turned["h"] // 2
    turned["src_x"] = turned["dst_x"] - (vectors["dst_y"] - vectors["src_y"])
    turned["src_y"] = turned["dst_y"] + (vectors["dst_x"] - vectors["src_x"])
    turned["motion_x"], turned["motion_y"] = vectors["motion_y"], -vectors["motion_x"]
    return turned
