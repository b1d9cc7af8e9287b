"""A video file: opened with care, read as packets, and what is wrong with it said plainly."""

import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import av
from av.stream import Disposition

from moclip.errors import VideoError
from moclip.pipeline.extract.gop import is_uncoded, numbers_frames
from moclip.pipeline.extract.orientation import stated_rotation

#: What a container of a known kind begins with, to tell a damaged video from a file that never was one.
_SIGNATURES = {
    0: (b"RIFF", b"\x1aE\xdf\xa3", b"\x00\x00\x01", b"OggS", b"FLV", b"0&\xb2u"),
    4: (b"ftyp", b"moov", b"mdat"),
}
#: Formats that only name other files. A video's features must come from the video itself.
_SCRIPTS = {"concat", "dash", "hls", "imf", "sdp"}


class VideoFile:
    """An open file's first video stream: its packets, and decoders for them that use one thread each.

    ``size`` is (width, height) as the container says, ``fps`` the average rate.
    """

    def __init__(self, container: Any, stream: Any) -> None:
        self._container = container
        self._stream = stream
        self._numerator, self._denominator = stream.time_base.as_integer_ratio()
        self.codec: str = stream.codec_context.name
        self.extradata: bytes | None = stream.codec_context.extradata
        self.size = (stream.codec_context.width, stream.codec_context.height)
        self.rotation = stated_rotation(container, stream)
        rate = stream.average_rate or stream.guessed_rate
        # A damaged header may claim anything, and memory is planned by it.
        self.fps = float(rate) if rate and 0.1 <= rate <= 1000 else 25.0

    def packets(self) -> Iterator[Any]:
        """The packets up to the end, or up to where the container cannot be read on."""
        try:
            for packet in self._container.demux(self._stream):
                # An empty one would end the decoding; the last one is.
                if packet.size:
                    yield packet
        except av.error.FFmpegError:
            return

    def decoder(self, options: Mapping[str, str]) -> Any:
        """The stream's own decoder with libavcodec's ``options``."""
        context = self._stream.codec_context
        context.options = dict(options)
        return context

    def another_decoder(self) -> Any:
        """A decoder beside the stream's own, which knows what the container says as that one does."""
        own = self._stream.codec_context
        context: Any = av.CodecContext.create(self.codec, "r")
        context.extradata = own.extradata
        context.codec_tag = own.codec_tag
        context.width, context.height = self.size
        context.reorder_depth = own.reorder_depth
        context.thread_count = 1
        return context

    def seconds(self, frame: Any, index: int) -> float:
        """The time of a frame, or of a packet, in its stream; by the frame rate where the stream does not say."""
        return index / self.fps if frame.pts is None else frame.pts * self._numerator / self._denominator

    def index(self) -> "PacketIndex | None":
        """What the container's own index says; None where it is not of every frame that the header promises."""
        entries = self._stream.index_entries
        promised = self._stream.frames
        if not 0 < promised == len(entries) <= self._container.size:
            return None
        return PacketIndex.of(self, entries)


class _Indexed(Protocol):
    @property
    def size(self) -> int: ...

    @property
    def is_keyframe(self) -> bool: ...


@dataclass(frozen=True)
class PacketIndex:
    """How many frames a stream's packets promise, and the numbers of those that are marked as key frames."""

    frames: int
    keyframes: tuple[int, ...]

    @classmethod
    def of(cls, video: VideoFile, packets: Iterable[_Indexed]) -> "PacketIndex":
        """The index of packets, or of a container's entries of them. The first one counts as a key frame."""
        packed = not numbers_frames(video.codec, video.extradata)
        marks = [each.is_keyframe for each in packets if packed or not is_uncoded(video.codec, each.size)]
        return cls(len(marks), (0, *(number for number, key in enumerate(marks) if key and number)))


@contextmanager
def open_video(path: str) -> Iterator[VideoFile]:
    """Open a local video file. :class:`VideoError` says what is wrong with it."""
    _check_file(path)
    try:
        # Only local files: a script that calls itself a video must not reach the network.
        container = av.open(path, options={"protocol_whitelist": "file"}, metadata_errors="replace")
    except av.error.FFmpegError as error:
        raise _open_error(path, error) from error
    with container:
        if _SCRIPTS & set(container.format.name.split(",")):
            raise VideoError("not_video", f"it is a script of other files ({container.format.name})")
        stream = _best_stream(container)
        stream.thread_type = "NONE"
        stream.codec_context.thread_count = 1
        yield VideoFile(container, stream)


def index_packets(path: str) -> PacketIndex:
    """An index made by reading all packets, without decoding any."""
    with open_video(path) as video:
        return PacketIndex.of(video, video.packets())


def _check_file(path: str) -> None:
    """Say plainly what is wrong with a file before libavformat says it in its own way."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            # Opening a pipe would wait for a writer that never comes.
            raise VideoError("unreadable", "it is a folder, a pipe or a device; a file was expected")
        with open(path, "rb") as file:
            if not file.read(1):
                raise VideoError("empty", "the file has zero bytes")
    except FileNotFoundError:
        raise VideoError("missing", "there is no such file") from None
    except OSError as error:
        raise VideoError("unreadable", error.strerror or str(error)) from error


def _open_error(path: str, error: Exception) -> VideoError:
    with open(path, "rb") as file:
        head = file.read(16)
    known = any(head[at:].startswith(signature) for at, all_ in _SIGNATURES.items() for signature in all_)
    message = getattr(error, "strerror", None) or str(error)
    if known:
        return VideoError("truncated", f"it begins like a video, but cannot be opened: {message}")
    return VideoError("not_video", f"libavformat does not know this kind of file: {message}")


def _best_stream(container: Any) -> Any:
    """libavformat's choice among the video streams; the cover picture of a song is not one."""
    pictures = [stream for stream in container.streams.video if stream.disposition & Disposition.attached_pic]
    if len(pictures) == len(container.streams.video):
        found = "a cover picture" if pictures else _kinds(container)
        raise VideoError("no_video_stream", f"it has {found}, and no video")
    stream = container.streams.best("video")
    if stream is None or stream.codec_context is None:
        raise VideoError("unknown_codec", "this build of libavcodec has no decoder for its video")
    return stream


def _kinds(container: Any) -> str:
    kinds = sorted({stream.type for stream in container.streams})
    return f"streams of {', '.join(kinds)}" if kinds else "no streams"
