"""Motion of streams whose decoder exports no vectors: estimated from the pictures, at the video's own size.

An MPEG-4 encoder is the estimator. ``docs/motion.md`` has what it was chosen over, with figures.
"""

from collections.abc import Mapping
from typing import Any, Literal

from moclip.pipeline.extract.reencode import Reencoder

MotionOption = Literal["auto", "native", "mpeg4", "estimate", "none"]
#: Where one video's vectors come from; ``auto`` has been decided then.
MotionSource = Literal["native", "mpeg4", "estimate", "none"]

#: Decoders of libavcodec that export vectors, by name. VC-1, RealVideo 3 and 4, VP8 and later ones do not.
NATIVE_CODECS = frozenset(
    {
        "flv", "h261", "h263", "h263i", "h264", "mpeg1video", "mpeg2video", "mpeg4", "mpegvideo",
        "msmpeg4", "msmpeg4v1", "msmpeg4v2", "rv10", "rv20", "snow", "wmv1", "wmv2",
    }
)  # fmt: skip

#: The quantiser, which sets how much a vector must gain to be chosen, and the longest time without an I-frame; the
#: encoder puts further ones where a scene is cut.
QUANTISER, GOP = 4, 600
#: What of it determines values, as a specification has it.
ESTIMATOR: Mapping[str, Any] = {"encoder": "mpeg4", "quantiser": QUANTISER, "gop": GOP}
_LAMBDA = str(118 * QUANTISER)
_OPTIONS = {
    # The quantiser and the Lagrangian that belongs to it are pinned from both sides, so that no rate plays a part.
    "qmin": str(QUANTISER),
    "qmax": str(QUANTISER),
    "lmin": _LAMBDA,
    "lmax": _LAMBDA,
    "i_qfactor": "1",
    "g": str(GOP),
}


class Estimator(Reencoder):
    """Turns decoded frames into frames of the same size that carry estimated vectors, one for one and in order."""

    def __init__(self) -> None:
        super().__init__(size=None, options=_OPTIONS)


def motion_source(option: MotionOption, codec: str) -> MotionSource:
    """Where the vectors of a stream of ``codec`` (a decoder's name) come from.

    With ``auto``, a stream that turns out to have no vectors although its codec could is decoded again to estimate.
    """
    if option != "auto":
        return option
    return "native" if codec in NATIVE_CODECS else "estimate"
