"""Motion from an MPEG-4 part 2 encode in memory: frames in, frames with the encode's own vectors out.

CoViAR's re-encode for every codec alike is ``-vf scale=340:256 -q:v 1 -c:v mpeg4``, GOP 12 (the encoder's default),
no B-frames. The stream's own vectors are never used then.
"""

from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any

import av
from av.video.frame import PictureType

from moclip.errors import VideoError

SIZE = (340, 256)
#: libavcodec counts quality in units of 1/118 (FF_QP2LAMBDA); ``-q:v 1`` is one whole unit.
_COVIAR = {"flags": "+qscale", "global_quality": "118"}
#: A fixed rate: with a fixed quality the frame rate changes no vector, and some files' rates are out of range.
_TIME_BASE = Fraction(1, 25)
#: What the picture size's 13 bits in an MPEG-4 header hold.
_LONGEST_SIDE = 8191


class Reencoder:
    """Turns decoded frames into re-encoded frames that carry vectors, one for one and in order.

    ``size`` is (width, height), or None for the frames' own; ``options`` are the encoder's. A frame that has the
    size already is used in place: its time and picture type are overwritten.
    """

    def __init__(self, size: tuple[int, int] | None = SIZE, options: Mapping[str, str] = _COVIAR) -> None:
        self._size = size
        self._options = dict(options)
        self._encoder: Any = None
        self._decoder = av.CodecContext.create("mpeg4", "r")
        self._decoder.options = {"flags2": "+export_mvs"}
        self._decoder.thread_count = 1
        self._count = 0

    def feed(self, frame: av.VideoFrame | None) -> Iterator[av.VideoFrame]:
        """Take the next frame, or None at the end; give the re-encoded frames that are ready.

        :class:`VideoError` where a side is longer than MPEG-4 can say.
        """
        if frame is None and self._encoder is None:
            return
        if frame is not None:
            frame = self._prepared(frame)
        for packet in self._encoder.encode(frame):
            yield from self._decoder.decode(packet)
        if frame is None:
            yield from self._decoder.decode(None)

    def _prepared(self, frame: av.VideoFrame) -> av.VideoFrame:
        size = self._size or (frame.width, frame.height)
        if self._encoder is None:
            self._encoder = _encoder(size, self._options)
        frame = frame.reformat(*size, format="yuv420p", interpolation="BICUBIC")
        frame.pts, frame.time_base = self._count, _TIME_BASE
        # Otherwise the encoder would copy the source's picture types.
        frame.pict_type = PictureType.NONE
        self._count += 1
        return frame


def _encoder(size: tuple[int, int], options: Mapping[str, str]) -> Any:
    if max(size) > _LONGEST_SIDE:
        raise VideoError(
            "too_large",
            f"it is {size[0]}x{size[1]}; motion is estimated up to {_LONGEST_SIDE} pixels a side: scale it down, "
            "or use --motion none",
        )
    encoder = av.CodecContext.create("mpeg4", "w")
    encoder.width, encoder.height = size
    encoder.pix_fmt = "yuv420p"
    encoder.time_base = _TIME_BASE
    encoder.options = dict(options)
    encoder.thread_count = 1
    return encoder
