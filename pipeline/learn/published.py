"""Defects of the published MoCLIP-Lite code that can move a result, for ``strict_reference`` alone (docs/training.md).

Others of them are where what they spoil is: the crops in :mod:`.views` and :mod:`.pooled`, decay and batches in
:mod:`.tsn`.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from moclip.errors import RunError
from moclip.pipeline.learn.clips import Clips, Split
from moclip.pipeline.learn.data import Ints, Motion, middle_indices, random_indices
from moclip.pipeline.learn.heads import ClipFeatures
from moclip.pipeline.learn.views import Augmentation, fixed_views, random_views
from moclip.store import Store

SHORT = "fewer frames than segments"


def long_enough(clips: Clips, store: Store, feature: str, segments: int) -> tuple[Clips, int]:
    """The clips of as many frames as segments, and how many others there are: the published code drops them, and
    nothing says so. A clip without motion counts as long enough: there, its length comes from a list.
    """
    there = np.isin(np.array(clips.ids, object), store.ids(feature))
    kept = ~there
    kept[there] = store.row_counts(feature, clips.take(there).ids) >= segments
    return clips.take(kept), int((~kept).sum())


def without_short(split: Split, store: Store, feature: str, train: int, test: int) -> Split:
    """A split without the training clips of fewer than ``train`` frames, and the test clips of fewer than ``test``."""
    trained, _ = long_enough(split.train, store, feature, train)
    tested, short = long_enough(split.test, store, feature, test)
    untrained = np.setdiff1d(split.train.targets, trained.targets)
    if len(untrained) or not len(tested):
        lost = f"no training clip of {split.classes[untrained[0]]}" if len(untrained) else "no test clip"
        raise RunError(f"the published code drops clips of fewer frames than segments, and leaves {lost}")
    missing = {**split.missing, **({SHORT: short} if short else {})}
    return replace(split, train=trained, test=tested, missing=missing)


class Pictures:
    """What a motion network sees of clips while a fusion is trained: pictures (n, segments, 2, size, size)."""

    def __init__(self, store: Store, feature: str, ids: Sequence[str], how: Augmentation, device: torch.device) -> None:
        self.motion = Motion(store, feature, ids, device, missing_as_zeros=True)
        self.how = how

    def random(self, clips: Ints, segments: int, rng: np.random.Generator) -> torch.Tensor:
        """Training's: a random frame of each segment, each in a box of its own."""
        frames = self.motion.before_i_frames(clips, random_indices(self.motion.frames[clips], segments, rng))
        each = np.repeat(clips, segments)
        parts = self.motion.fetch(each, frames.reshape(-1, 1))
        views = random_views(len(each), self.how, rng)
        images = self.motion.prepared(parts, views, self.how.size, mirror_bytes=True)
        return images.view(len(clips), segments, *images.shape[2:])

    def middle(self, clips: Ints, segments: int) -> torch.Tensor:
        """Tests': the middle frames, centre crop."""
        frames = self.motion.before_i_frames(clips, middle_indices(self.motion.frames[clips], segments))
        return self.motion.prepared(
            self.motion.fetch(clips, frames), fixed_views(len(clips), self.how.size), self.how.size
        )


class DriftingFusion(nn.Module):
    """A fusion whose motion network is frozen in its weights alone.

    It follows the head into train mode, so that BatchNorm normalises by each batch and its running statistics drift.
    ``motion`` of the clips that it is shown are :class:`Pictures`.
    """

    def __init__(self, motion: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.motion, self.head = motion.requires_grad_(False), head

    def forward(self, clips: ClipFeatures) -> torch.Tensor:
        pictures = clips.motion
        assert pictures is not None
        with torch.no_grad():
            rows = self.motion.features(pictures.flatten(0, 1))  # type: ignore[operator]
        scores: torch.Tensor = self.head(replace(clips, motion=rows.view(*pictures.shape[:2], -1)))
        return scores
