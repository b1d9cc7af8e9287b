"""Which frames of a video the encoder sees: ``middle``, ``uniform:N``, ``random:N`` or ``fps:X``."""

import hashlib
import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moclip.errors import SourceError

#: What a video's id ends in, where the video is cut and this is its first clip.
FIRST_CLIP = "#00000"
_PATTERN = re.compile(r"(middle)|(uniform|random):([1-9]\d{0,4})|(fps):(\d+(?:\.\d+)?)")


@dataclass(frozen=True)
class FramePolicy:
    """A rule from (number of frames, frame rate, id) to frame indices; equal inputs give equal indices."""

    name: str

    def __post_init__(self) -> None:
        match = _PATTERN.fullmatch(self.name)
        if match is None or (match[5] is not None and float(match[5]) == 0):
            raise SourceError(f"frames {self.name!r} is not a policy; expected middle, uniform:8, random:1 or fps:1")

    def indices(self, frames: int, fps: float, video_id: str) -> npt.NDArray[np.int64]:
        """Ascending indices into ``frames`` frames; a video shorter than N repeats some."""
        kind, _, value = self.name.partition(":")
        if kind == "fps":
            count = max(1, min(frames, round(frames / fps * float(value))))
            chosen = (np.arange(count) + 0.5) * frames / count
        elif kind == "random":
            chosen = np.sort(_seeded(video_id).choice(frames, int(value), replace=frames < int(value)))
        else:
            count = int(value or 1)
            chosen = (np.arange(count) + 0.5) * frames / count
        return np.minimum(chosen.astype(np.int64), frames - 1)


def clip_id(first: str, clip: int) -> str:
    """The id of a clip of a video that is cut, whose first one is ``first``: ``film#00002`` after ``film#00000``."""
    return f"{first.removesuffix(FIRST_CLIP)}#{clip:05d}"


def _seeded(video_id: str) -> np.random.Generator:
    return np.random.default_rng(list(hashlib.sha256(video_id.encode()).digest()))
