"""One pass over one video: packets decoded once, vectors to grids as they come, only sampled frames to RGB."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import av
import numpy as np
import numpy.typing as npt

from moclip.errors import VideoError
from moclip.pipeline.extract.motion import Accumulator, Grid, paint_motion
from moclip.pipeline.extract.reencode import Reencoder
from moclip.pipeline.extract.sampling import FramePolicy
from moclip.pipeline.extract.video_file import VideoFile, frame_seconds

#: Rows leave in blocks of at most so many rows and bytes, so that a film's motion never sits in memory whole.
BLOCK_ROWS = 256
BLOCK_BYTES = 32 * 2**20


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
    reader = VideoFile(path)
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
        again = VideoFile(path)
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


def _sample(frame: av.VideoFrame, reader: "VideoFile", wanted: set[int], into: dict[int, SampledFrame]) -> None:
    index = reader.count - 1
    if index in wanted:
        rgb = frame.to_ndarray(format="rgb24").astype(np.uint8, copy=False)
        into[index] = SampledFrame(index, frame_seconds(frame, index, reader.fps), rgb)


def _motion_error(config: DecodeConfig, reader: "VideoFile", motion: "_MotionPass") -> VideoError | None:
    if config.motion == "none" or motion.carried or reader.count == 1:
        return None
    return VideoError(
        "no_vectors",
        f"the {reader.codec} decoder gave no motion vectors in {reader.count} frames; "
        "use --motion mpeg4 (a re-encode in memory), or --motion none for the embedding alone",
    )


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
        self._times.append(frame_seconds(frame, index, fps))
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
