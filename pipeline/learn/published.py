"""Defects of the published MoCLIP-Lite code that can move a result, for ``strict_reference`` alone (docs/training.md).

The others act where what they spoil is computed: mirroring in :mod:`.views` and :mod:`.pooled`, decay and the choice
of the epoch in :mod:`.tsn` and :mod:`.fit`, missing embeddings in :mod:`.frozen`.
"""

from dataclasses import replace

import numpy as np
import torch
from torch import nn

from moclip.errors import RunError
from moclip.pipeline.learn.clips import Clips, Split, has_rows
from moclip.pipeline.learn.data import Ints, Motion, middle_indices, random_indices
from moclip.pipeline.learn.heads import ClipFeatures
from moclip.pipeline.learn.network import MotionTSN
from moclip.pipeline.learn.views import Augmentation, Views, fixed_views, random_views
from moclip.store import Store

SHORT = "no more frames than segments"


def long_enough(clips: Clips, store: Store, feature: str, segments: int) -> tuple[Clips, dict[str, int]]:
    """The clips of more frames than segments, and a count of the others: the published code drops them, and nothing
    says so. A clip without motion counts as long enough: there, its length comes from a list.
    """
    there = has_rows(store, feature, clips.ids)
    kept = ~there
    kept[there] = store.row_counts(feature, clips.take(there).ids) > segments
    short = int((~kept).sum())
    return clips.take(kept), {SHORT: short} if short else {}


def without_short(split: Split, store: Store, feature: str, train: int, test: int) -> Split:
    """A split without the training clips of at most ``train`` frames, and the test clips of at most ``test``."""
    trained, _ = long_enough(split.train, store, feature, train)
    tested, short = long_enough(split.test, store, feature, test)
    untrained = np.setdiff1d(split.train.targets, trained.targets)
    if len(untrained) or not len(tested):
        lost = f"no training clip of {split.classes[untrained[0]]}" if len(untrained) else "no test clip"
        raise RunError(
            f"the published code drops clips with no more frames than segments, and leaves {lost}; "
            "train without strict_reference"
        )
    return replace(split, train=trained, test=tested, missing={**split.missing, **short})


def segment_views(videos: Ints, segments: int, how: Augmentation, rng: np.random.Generator) -> tuple[Ints, Views]:
    """Each segment as a clip of its own: the videos repeated, and views of one side and one mirroring a clip, but a box
    for every segment.
    """
    clip = np.repeat(np.arange(len(videos)), segments)
    views = random_views(len(videos), how, rng).take(clip)
    left, top = (torch.from_numpy(rng.integers(0, views.resize.numpy() - how.size + 1)) for _ in range(2))
    return videos[clip], replace(views, left=left, top=top)


class Pictures:
    """What a motion network sees of clips while a fusion is trained: pictures (n, segments, 2, S, S).

    ``size`` is the length of the features that it makes of one.
    """

    def __init__(self, motion: Motion, how: Augmentation, segments: int, size: int) -> None:
        self.motion, self._how, self._segments, self.size = motion, how, segments, size

    def sample(self, videos: Ints, rng: np.random.Generator) -> torch.Tensor:
        """A random frame of each segment, each in a box of its own."""
        motion, how = self.motion, self._how
        frames = motion.before_i_frames(videos, random_indices(motion.frames[videos], self._segments, rng))
        each, views = segment_views(videos, self._segments, how, rng)
        images = motion.prepared(motion.fetch(each, frames.reshape(-1, 1)), views, how.size, mirror_bytes=True)
        return images.view(len(videos), self._segments, *images.shape[2:])

    def whole(self, videos: Ints, segments: int) -> torch.Tensor:
        """The middle frames, centre crop."""
        motion, how = self.motion, self._how
        frames = motion.before_i_frames(videos, middle_indices(motion.frames[videos], segments))
        return motion.prepared(motion.fetch(videos, frames), fixed_views(len(videos), how.size), how.size)


class DriftingFusion(nn.Module):
    """A fusion whose motion network is frozen in its weights alone.

    It follows the head into train mode, so that BatchNorm normalises by each batch and its running statistics drift.
    ``motion`` of the clips that it is shown are :class:`Pictures`.
    """

    def __init__(self, motion: MotionTSN, head: nn.Module) -> None:
        super().__init__()
        self.motion, self.head = motion, head
        motion.requires_grad_(False)

    def forward(self, clips: ClipFeatures) -> torch.Tensor:
        pictures = clips.motion
        assert pictures is not None
        with torch.no_grad():
            rows = self.motion.features(pictures.flatten(0, 1))
        scores: torch.Tensor = self.head(replace(clips, motion=rows.view(*pictures.shape[:2], -1)))
        return scores
