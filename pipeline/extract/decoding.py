"""What decoding is asked for, and what it gives."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from moclip.errors import VideoError
from moclip.pipeline.extract.estimate import MotionOption, MotionSource
from moclip.pipeline.extract.motion_rows import MotionRows
from moclip.pipeline.extract.sampling import FramePolicy


@dataclass(frozen=True)
class DecodeConfig:
    """What one pass is to produce.

    Every ``stride``-th frame has a row of motion; ``window`` is explained at :class:`RowBuilder`. With
    ``clip_seconds`` the video is cut into clips of so many seconds at its average rate, whose ids follow from that of
    the first. ``exact`` decodes everything in the plain way.
    """

    motion: MotionOption = "auto"
    accumulate: bool = True
    cell: int = 8
    window: int = 12
    stride: int = 1
    clip_seconds: float | None = None
    frames: FramePolicy | None = None
    exact: bool = False


@dataclass(frozen=True)
class SampledFrame:
    """One frame of a clip for the encoder: ``index`` within the clip, ``rgb`` (height, width, 3) uint8."""

    clip: int
    index: int
    pts_seconds: float
    rgb: npt.NDArray[np.uint8]


class Sink(Protocol):
    """Who takes what a pass makes, as it comes: each kind in display order."""

    def rows(self, rows: MotionRows) -> None:
        """The next rows of motion."""

    def frame(self, frame: SampledFrame) -> None:
        """The next sampled frame; one that a policy asks for twice comes twice."""

    def restart(self) -> None:
        """What came of this video so far does not count: it is decoded again."""


@dataclass(frozen=True)
class DecodedVideo:
    """What a pass found out. Every clip but the last has ``clip_frames`` frames.

    ``corrupt_frames`` is None where only the GOPs of sampled frames were decoded.
    ``motion_error`` says why there are no motion rows although frames decoded.
    """

    codec: str
    width: int
    height: int
    fps: float
    frames: int
    clip_frames: int
    duration_s: float
    corrupt_frames: int | None
    motion_source: MotionSource
    motion_error: VideoError | None = None
