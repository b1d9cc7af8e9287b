"""A video file as frames: opened with care, decoded by one thread, and what is wrong with it said plainly."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import av
from av.stream import Disposition

from moclip.errors import VideoError

#: What a container of a known kind begins with, to tell a damaged video from a file that never was one.
_SIGNATURES = {
    0: (b"RIFF", b"\x1aE\xdf\xa3", b"\x00\x00\x01", b"OggS", b"FLV", b"0&\xb2u"),
    4: (b"ftyp", b"moov", b"mdat"),
}
#: Formats that only name other files. A video's features must come from the video itself.
_SCRIPTS = {"concat", "dash", "hls", "imf", "sdp"}


class VideoFile:
    """A file's first video stream, decoded frame by frame by one thread; what does not decode is counted."""

    def __init__(self, path: str) -> None:
        _check_file(path)
        self._path = path
        self.count = 0
        self.corrupt = 0
        with self._stream() as (_, stream):
            self.codec: str = stream.codec_context.name
            self.size = (stream.codec_context.width, stream.codec_context.height)
            rate = stream.average_rate or stream.guessed_rate
            # A damaged header may claim anything, and memory is planned by it.
            self.fps = float(rate) if rate and 0.1 <= rate <= 1000 else 25.0
            self._promised: int = stream.frames

    @contextmanager
    def _stream(self) -> Iterator[tuple[Any, Any]]:
        try:
            # Only local files: a script that calls itself a video must not reach the network.
            container = av.open(self._path, options={"protocol_whitelist": "file"}, metadata_errors="replace")
        except av.error.FFmpegError as error:
            raise _open_error(self._path, error) from error
        with container:
            if _SCRIPTS & set(container.format.name.split(",")):
                raise VideoError("not_video", f"it is a script of other files ({container.format.name})")
            stream = _best_stream(container)
            stream.thread_type = "NONE"
            stream.codec_context.thread_count = 1
            yield container, stream

    def promised_frames(self) -> int:
        """How many frames the container's header claims, or the number of packets where it claims nothing."""
        if 0 < self._promised <= os.path.getsize(self._path):
            return self._promised
        with self._stream() as (container, stream):
            return sum(packet.size > 0 for packet in _packets(container, stream))

    def frames(self, vectors: bool) -> Iterator[av.VideoFrame]:
        """The frames in display order, with vectors as side data if asked for."""
        with self._stream() as (container, stream):
            context = stream.codec_context
            if vectors:
                context.options = {"flags2": "+export_mvs"}
            for packet in _packets(container, stream):
                try:
                    decoded = context.decode(packet)
                except av.error.FFmpegError:
                    self.corrupt += 1
                    continue
                for frame in decoded:
                    self._check_size(frame)
                    self.corrupt += bool(frame.is_corrupt)
                    self.count += 1
                    yield frame

    def _check_size(self, frame: av.VideoFrame) -> None:
        size = (frame.width, frame.height)
        if self.count == 0:
            self.size = size
        elif size != self.size:
            raise VideoError(
                "resolution_changed",
                f"frame {self.count} is {size[0]}x{size[1]}, those before it {self.size[0]}x{self.size[1]}",
            )


def _packets(container: Any, stream: Any) -> Iterator[Any]:
    """Packets up to the end, or up to where the container cannot be read on; the last one flushes the decoder."""
    try:
        yield from container.demux(stream)
    except av.error.FFmpegError:
        yield None


def frame_seconds(frame: av.VideoFrame, index: int, fps: float) -> float:
    """The frame's time in its stream; by the frame rate where the stream does not say."""
    return index / fps if frame.time is None else float(frame.time)


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
