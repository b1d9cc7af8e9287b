"""CoViAR's re-encode, in memory: every frame to 340×256 MPEG-4 part 2 at quality 1, and its vectors back.

The frames' own stream is never used for motion then, so every codec gives vectors of the same kind. Settings:
``-vf scale=340:256 -q:v 1 -c:v mpeg4``, GOP 12 (the encoder's default), no B-frames.
"""

from collections.abc import Iterator
from fractions import Fraction

import av
from av.video.frame import PictureType

SIZE = (340, 256)
#: libavcodec counts quality in units of 1/118 (FF_QP2LAMBDA); ``-q:v 1`` is one whole unit.
_QUALITY_1 = 118
#: A fixed rate: with a fixed quality the frame rate changes no vector, and some files' rates are out of range.
_TIME_BASE = Fraction(1, 25)


class Reencoder:
    """Turns decoded frames into re-encoded frames that carry vectors, one for one and in order."""

    def __init__(self) -> None:
        encoder = av.CodecContext.create("mpeg4", "w")
        encoder.width, encoder.height = SIZE
        encoder.pix_fmt = "yuv420p"
        encoder.time_base = _TIME_BASE
        encoder.options = {"flags": "+qscale", "global_quality": str(_QUALITY_1)}
        encoder.thread_count = 1
        decoder = av.CodecContext.create("mpeg4", "r")
        decoder.options = {"flags2": "+export_mvs"}
        decoder.thread_count = 1
        self._encoder, self._decoder = encoder, decoder
        self._count = 0

    def feed(self, frame: av.VideoFrame | None) -> Iterator[av.VideoFrame]:
        """Take the next frame, or None at the end; give the re-encoded frames that are ready."""
        if frame is not None:
            frame = frame.reformat(*SIZE, format="yuv420p", interpolation="BICUBIC")
            frame.pts, frame.time_base = self._count, _TIME_BASE
            # Otherwise the encoder would copy the source's picture types.
            frame.pict_type = PictureType.NONE
            self._count += 1
        for packet in self._encoder.encode(frame):
            yield from self._decoder.decode(packet)
        if frame is None:
            yield from self._decoder.decode(None)
