"""A few frames of a video, exactly, for the price of their GOPs: every other packet is passed over."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import av

from moclip.pipeline.extract.gop import begins_gop, is_uncoded
from moclip.pipeline.extract.video_file import PacketIndex, VideoFile

#: The packets of one GOP are kept until its frames have been found; longer GOPs are decoded in the plain way.
MOST_GOP_BYTES = 64 * 2**20


class UnclearError(Exception):
    """What was found is not sure to be what plain decoding gives; never leaves the decoding of a video."""


class FrameSeeker:
    """Takes a stream's packets in order and gives the frames ``wanted``, ascending numbers in display order.

    A decoder of its own sees the GOPs that hold one, from their beginning to that frame. That frame n lies n packets
    after the beginning of the stream is true of streams in which every packet is a frame; where anything contradicts
    it, :class:`UnclearError` is raised. (Packets too small for a picture count for none.)
    """

    def __init__(self, video: VideoFile, wanted: Sequence[int], index: PacketIndex) -> None:
        self._video = video
        self._wanted = list(wanted)
        self._keyframes = index.keyframes
        self._decoder = video.another_decoder()
        self._number = -1
        self._gop: list[Any] = []
        self._gop_bytes = 0
        self._first = 0
        self._decoding = False
        self._given = 0

    def feed(self, packet: Any, following: Any | None) -> Iterator[tuple[int, av.VideoFrame]]:
        """Take the next packet, and the one after it; give the frames that are found, with their numbers."""
        if is_uncoded(self._video.codec, packet.size):
            self._keep(packet)
            yield from self._decode([packet]) if self._decoding else ()
            return
        self._number += 1
        if packet.is_keyframe and self._begins(packet, following):
            yield from self._end_gop()
            self._gop, self._gop_bytes, self._first = [], 0, self._number
        elif self._number == 0:
            raise UnclearError
        if not self._wanted:
            return
        self._keep(packet)
        if self._decoding:
            yield from self._decode([packet])
        elif self._number >= self._wanted[0]:
            self._decoding, self._given = True, 0
            yield from self._decode(self._gop)
        if self._decoding and not self._needed_on():
            self._stop()

    def finish(self) -> Iterator[tuple[int, av.VideoFrame]]:
        """Give what is left, after the last packet."""
        yield from self._end_gop()
        if self._wanted:
            raise UnclearError

    def _keep(self, packet: Any) -> None:
        self._gop.append(packet)
        self._gop_bytes += packet.size
        if self._gop_bytes > MOST_GOP_BYTES:
            raise UnclearError

    def _begins(self, packet: Any, following: Any | None) -> bool:
        after = None if following is None else bytes(following)
        return begins_gop(self._video.codec, bytes(packet), after, self._video.extradata)

    def _needed_on(self) -> bool:
        """Whether a wanted frame lies before the next key frame."""
        following = next((key for key in self._keyframes if key > self._number), None)
        return bool(self._wanted) and (following is None or self._wanted[0] < following)

    def _end_gop(self) -> Iterator[tuple[int, av.VideoFrame]]:
        if self._decoding:
            yield from self._decode([None])
            self._stop()

    def _stop(self) -> None:
        self._decoder.flush_buffers()
        self._decoding = False

    def _decode(self, packets: Sequence[Any]) -> Iterator[tuple[int, av.VideoFrame]]:
        try:
            frames = itertools.chain.from_iterable(self._decoder.decode(packet) for packet in packets)
            for frame in frames:
                number = self._first + self._given
                self._given += 1
                if frame.is_corrupt:
                    raise UnclearError
                if self._wanted and number == self._wanted[0]:
                    self._wanted.pop(0)
                    yield number, frame
        except av.error.FFmpegError as error:
            raise UnclearError from error
