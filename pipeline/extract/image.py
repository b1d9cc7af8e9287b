"""Sampled frames as JPEGs: small enough to keep, good enough for any later encoder's own preprocessing."""

import io

import numpy as np
import numpy.typing as npt
from PIL import Image

from moclip.errors import VideoError
from moclip.pipeline.extract.kinds import IMAGE
from moclip.store import FeatureSpec

#: Frames are made smaller, never larger, until the shorter side has so many pixels.
SHORT_SIDE = 256
QUALITY = 95
#: Colour at full resolution: encoders see RGB, and half the chroma would be lost to them.
SUBSAMPLING = "4:4:4"


def image_spec(frames_policy: str) -> FeatureSpec:
    """The specification of the images of the frames that ``frames_policy`` samples; a row is one JPEG's bytes."""
    return FeatureSpec(
        kind=IMAGE,
        dtype="uint8",
        unit="1",
        parameters={
            "version": 1,
            "frames": frames_policy,
            "encoder": "jpeg",
            "short_side": SHORT_SIDE,
            "resize": "bicubic",
            "quality": QUALITY,
            "subsampling": SUBSAMPLING,
        },
        columns={"frame_index": "int32", "pts_seconds": "float64"},
        axes=("byte",),
    )


def encode_jpeg(rgb: npt.NDArray[np.uint8]) -> bytes:
    """One frame, (H, W, 3) uint8, as a JPEG whose shorter side is at most ``SHORT_SIDE`` pixels."""
    image = Image.fromarray(rgb)
    size = fitted(*image.size)
    if size != image.size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    # Optimised tables make the file a twelfth smaller; the pixels are the same.
    image.save(buffer, "JPEG", quality=QUALITY, subsampling=SUBSAMPLING, optimize=True)
    return buffer.getvalue()


def fitted(width: int, height: int) -> tuple[int, int]:
    """The size, of the same shape, whose shorter side is ``SHORT_SIDE``; the size itself if that is smaller."""
    short = min(width, height)
    if short <= SHORT_SIDE:
        return width, height
    return max(SHORT_SIDE, round(width * SHORT_SIDE / short)), max(SHORT_SIDE, round(height * SHORT_SIDE / short))


def decode_jpeg(data: bytes) -> npt.NDArray[np.uint8]:
    """The pixels of a JPEG, (H, W, 3) uint8. :class:`VideoError` (``damaged``) if it is none, or not whole."""
    try:
        with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise VideoError("damaged", f"a stored image of {len(data)} bytes does not decode: {error}") from error
