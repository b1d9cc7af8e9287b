"""One pass over one video: packets decoded once, vectors to grids as they come, only sampled frames to RGB."""

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import av
import numpy as np
import numpy.typing as npt
from av.stream import Disposition

from moclip.errors import VideoError
from moclip.pipeline.extract.motion import Accumulator, Grid, paint_motion
from moclip.pipeline.extract.reencode import Reencoder
from moclip.pipeline.extract.sampling import FramePolicy

#: Rows leave in blocks of at most so many rows and bytes, so that a film's motion never sits in memory whole.
BLOCK_ROWS = 256
BLOCK_BYTES = 32 * 2**20
#: What a container of a known kind begins with, to tell a damaged video from a file that never was one.
_SIGNATURES = {
    0: (b"RIFF", b"\x1aE\xdf\xa3", b"\x00\x00\x01", b"OggS", b"FLV", b"0&\xb2u"),
    4: (b"ftyp", b"moov", b"mdat"),
}
#: Formats that only name other files. A video's features must come from the video itself.
_SCRIPTS = {"concat", "dash", "hls", "imf", "sdp"}


@dataclass(frozen=True)
class DecodeConfig:
    """What one pass is to produce. ``window`` is explained at :class:`Accumulator`."""

    motion: Literal["native", "mpeg4", "none"] = "native"
    accumulate: bool = True
    cell: int = 8
    window: int = 12
    frames: FramePolicy | None = None


@dataclass(frozen=True)
class MotionRows:
    """Consecutive frames' grids, (n, 2, gh, gw) int16, with their times and libavutil picture types."""

    motion: npt.NDArray[np.int16]
    accumulated: npt.NDArray[np.int16] | None
    pts_seconds: npt.NDArray[np.float64]
    picture_type: npt.NDArray[np.uint8]


@dataclass(frozen=True)
class SampledFrame:
    """One frame for the encoder: ``rgb`` is (height, width, 3) uint8."""

    index: int
    pts_seconds: float
    rgb: npt.NDArray[np.uint8]


@dataclass(frozen=True)
class DecodedVideo:
    """What a pass found out. ``motion_error`` says why there are no motion rows although frames decoded."""

    codec: str
    width: int
    height: int
    fps: float
    frames: int
    duration_s: float
    corrupt_frames: int
    sampled: tuple[SampledFrame, ...] = field(repr=False)
    motion_error: VideoError | None = None


def decode_video(path: str, video_id: str, config: DecodeConfig, emit: Callable[[MotionRows], None]) -> DecodedVideo:
    """Decode ``path`` once. Motion rows go to ``emit`` in display order, in blocks.

    Raises :class:`VideoError` where nothing can be said of the video. Sampled frames are chosen by the number of
    frames the container promises; if another number decodes and the choice changes, they alone are decoded again.
    """
    _check_file(path)
    reader = _Reader(path)
    promised = reader.promised_frames() if config.frames else 0
    wanted = _indices(config, promised, reader.fps, video_id)
    sampled: dict[int, SampledFrame] = {}
    motion = _MotionPass(config, emit)
    for frame in reader.frames(vectors=config.motion == "native"):
        # Before the re-encoder, which sets the frame's time to its own.
        _sample(frame, reader, wanted, sampled)
        motion.add(frame, reader.count - 1, reader.fps)
    if reader.count == 0:
        raise VideoError("truncated", f"no frame of the {reader.codec} stream decodes")
    actual = _indices(config, reader.count, reader.fps, video_id)
    if not actual <= sampled.keys():
        sampled.clear()
        again = _Reader(path)
        for frame in again.frames(vectors=False):
            _sample(frame, again, actual, sampled)
    span = motion.finish()
    ordered = () if config.frames is None else config.frames.indices(reader.count, reader.fps, video_id)
    return DecodedVideo(
        codec=reader.codec,
        width=reader.size[0],
        height=reader.size[1],
        fps=reader.fps,
        frames=reader.count,
        duration_s=max(reader.count / reader.fps, span),
        corrupt_frames=reader.corrupt,
        sampled=tuple(sampled[index] for index in ordered),
        motion_error=_motion_error(config, reader, motion),
    )


def _indices(config: DecodeConfig, frames: int, fps: float, video_id: str) -> set[int]:
    if config.frames is None or frames < 1:
        return set()
    return set(config.frames.indices(frames, fps, video_id).tolist())


def _sample(frame: av.VideoFrame, reader: "_Reader", wanted: set[int], into: dict[int, SampledFrame]) -> None:
    index = reader.count - 1
    if index in wanted:
        rgb = frame.to_ndarray(format="rgb24").astype(np.uint8, copy=False)
        into[index] = SampledFrame(index, _seconds(frame, index, reader.fps), rgb)


def _seconds(frame: av.VideoFrame, index: int, fps: float) -> float:
    """The frame's time in its stream; by the frame rate where the stream does not say."""
    return index / fps if frame.time is None else float(frame.time)


def _motion_error(config: DecodeConfig, reader: "_Reader", motion: "_MotionPass") -> VideoError | None:
    if config.motion == "none" or motion.carried or reader.count == 1:
        return None
    return VideoError(
        "no_vectors",
        f"the {reader.codec} decoder gave no motion vectors in {reader.count} frames; "
        "use --motion mpeg4 (a re-encode in memory), or --motion none for the embedding alone",
    )


class _Reader:
    """A file's first video stream, decoded frame by frame by one thread; what does not decode is counted."""

    def __init__(self, path: str) -> None:
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


class _MotionPass:
    """Takes decoded frames, gives blocks of grids; re-encodes on the way where the config says so."""

    def __init__(self, config: DecodeConfig, emit: Callable[[MotionRows], None]) -> None:
        self._config = config
        self._emit = emit
        self._reencoder = Reencoder() if config.motion == "mpeg4" else None
        self._times: list[float] = []
        self._filled = 0
        self._done = 0
        self.carried = False

    def add(self, frame: av.VideoFrame, index: int, fps: float) -> None:
        self._times.append(_seconds(frame, index, fps))
        if self._config.motion == "none":
            return
        if self._reencoder is None:
            self._paint(frame)
        else:
            for again in self._reencoder.feed(frame):
                self._paint(again)

    def finish(self) -> float:
        """Emit what is left; the seconds from the first frame to the last."""
        if self._reencoder is not None:
            for again in self._reencoder.feed(None):
                self._paint(again)
        self._flush()
        return self._times[-1] - self._times[0]

    def _start(self, width: int, height: int) -> None:
        config = self._config
        self._grid = Grid(width, height, config.cell)
        self._accumulator = Accumulator(self._grid, config.window) if config.accumulate else None
        row_bytes = 4 * self._grid.shape[0] * self._grid.shape[1]
        self._block = max(1, min(BLOCK_ROWS, BLOCK_BYTES // row_bytes))
        self._motion = np.empty((self._block, 2, *self._grid.shape), np.int16)
        self._accumulated = np.empty_like(self._motion) if config.accumulate else None
        self._types = np.empty(self._block, np.uint8)

    def _paint(self, frame: av.VideoFrame) -> None:
        if self._done == self._filled == 0:
            self._start(frame.width, frame.height)
        side_data = frame.side_data.get("MOTION_VECTORS")
        vectors = None if side_data is None else side_data.to_ndarray()
        self.carried |= vectors is not None
        at = self._filled
        picture_type = int(frame.pict_type)
        paint_motion(vectors, self._grid, self._motion[at])
        if self._accumulator is not None and self._accumulated is not None:
            self._accumulator.add(vectors, picture_type, self._accumulated[at])
        self._types[at] = picture_type
        self._filled += 1
        if self._filled == self._block:
            self._flush()

    def _flush(self) -> None:
        if self._filled == 0:
            return
        count, self._filled = self._filled, 0
        times = np.array(self._times[self._done : self._done + count])
        self._done += count
        accumulated = None if self._accumulated is None else self._accumulated[:count].copy()
        self._emit(MotionRows(self._motion[:count].copy(), accumulated, times, self._types[:count].copy()))


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
