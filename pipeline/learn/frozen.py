"""The features of clips that heads are trained on, resident in memory: image embeddings, and motion pooled by a run."""

from collections.abc import Sequence
from typing import Protocol
from zlib import crc32

import numpy as np
import torch

from moclip.errors import RunError
from moclip.pipeline.learn.clips import has_rows
from moclip.pipeline.learn.data import RESIDENT_SHARE, Ints, free_bytes
from moclip.pipeline.learn.heads import ClipFeatures
from moclip.pipeline.learn.pooled import POOLED, POOLED_SEGMENTS, POOLED_VIEWS, VIEW_SEGMENTS
from moclip.store import Store

#: Which of a clip's stored frames a head sees: one at random (another in each epoch, one by the clip's id in tests),
#: the middle one, or all (their mean, in heads that see one image).
FRAMES = ("all", "random", "middle")
_READ_VIDEOS = 1024


class MotionSource(Protocol):
    """Where a clip's motion comes from. ``size`` is the length of its features."""

    size: int

    def sample(self, videos: Ints, rng: np.random.Generator) -> torch.Tensor:
        """What training sees of videos (positions)."""

    def whole(self, videos: Ints, segments: int) -> torch.Tensor:
        """What evaluation sees of them; ``segments``, where they are not fixed."""


class Features:
    """What heads see of some clips: their images, and their motion if there is any."""

    def __init__(self, images: "ImageEmbeddings", motion: MotionSource | None) -> None:
        self.images, self.motion = images, motion
        self.device = images.device
        #: D, 0 without motion, and E.
        self.sizes = (motion.size if motion else 0, images.size)

    def sample(self, videos: Ints, rng: np.random.Generator) -> ClipFeatures:
        """What training sees of videos (positions)."""
        images = self.images.of(videos, rng)
        return ClipFeatures(self.motion.sample(videos, rng) if self.motion else None, *images)

    def whole(self, videos: Ints, segments: int = POOLED_SEGMENTS) -> ClipFeatures:
        """What evaluation sees of videos."""
        images = self.images.of(videos)
        return ClipFeatures(self.motion.whole(videos, segments) if self.motion else None, *images)


class ImageEmbeddings:
    """The rows of an embedding for some videos; ``frames`` is one of :data:`FRAMES`. ``size`` is E.

    ``as_published``, a video without rows has one of zeros, and a random frame is the same in every epoch.
    """

    def __init__(
        self,
        store: Store,
        feature: str,
        ids: Sequence[str],
        device: torch.device,
        *,
        frames: str = "all",
        seed: int = 0,
        as_published: bool = False,
    ) -> None:
        self.device, self._frames, self._fixed = device, frames, as_published
        there = has_rows(store, feature, ids) if as_published else np.ones(len(ids), bool)
        present = np.asarray(ids, object)[there].tolist()
        if not present:
            raise RunError(f"no clip of this split has rows of {feature}")
        self._count = np.ones(len(ids), np.int64)
        self._count[there] = store.row_counts(feature, present)
        self._start = np.cumsum(self._count) - self._count
        rows = read_rows(store, feature, present, device)
        if not there.all():
            whole = rows.new_zeros((int(self._count.sum()), rows.shape[1]))
            whole[torch.from_numpy(np.repeat(there, self._count)).to(rows.device)] = rows
            rows = whole
        self.rows, self.size = rows, rows.shape[1]
        self.most_frames = int(self._count.max()) if frames == "all" else 1
        #: The frame that a clip is tested by where it is one at random.
        self._own = np.array([crc32(f"{seed} {video}".encode()) for video in ids], np.int64) % self._count

    def of(
        self, videos: Ints, rng: np.random.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Images (n, frames, E), which of them are there, and their positions; a random frame is ``rng``'s."""
        count = self._count[videos]
        if self._frames == "all":
            order = np.arange(count.max())
            there = order < count[:, None]
            which = np.where(there, order, 0)
        else:
            if self._frames == "middle":
                which = count // 2
            else:
                which = self._own[videos] if rng is None or self._fixed else rng.integers(count)
            which = which[:, None]
            there = np.ones_like(which, bool)
        images = _picked(self.rows, self._start[videos][:, None] + which).to(self.device).float()
        position = ((which + 0.5) / count[:, None]).astype(np.float32)
        return images, torch.from_numpy(there).to(self.device), torch.from_numpy(position).to(self.device)


class PooledMotion:
    """The pooled motion of some videos, of which ``trained`` are trained on.

    Training sees ``segments`` rows of one augmented view, where the run has views of ``trained``, else of the plain
    one; evaluation sees every plain row (``every_row``), or their mean.
    """

    def __init__(
        self,
        pooled: Store,
        ids: Sequence[str],
        trained: Sequence[str],
        device: torch.device,
        *,
        segments: int,
        every_row: bool,
    ) -> None:
        self.device, self._segments = device, segments
        viewed = set(pooled.ids(POOLED_VIEWS)) if POOLED_VIEWS in pooled.features else set()
        self.views: torch.Tensor | None = None
        if trained and viewed.issuperset(trained):
            place = {video: i for i, video in enumerate(trained)}
            self._place = np.array([place.get(video, -1) for video in ids], np.int64)
            rows = read_rows(pooled, POOLED_VIEWS, trained, device)
            self.views = rows.view(len(trained), -1, VIEW_SEGMENTS, rows.shape[1])
        self._rows: torch.Tensor | None = None
        if every_row or (trained and self.views is None):
            rows = read_rows(pooled, POOLED, ids, device)
            self._rows = rows.view(len(ids), POOLED_SEGMENTS, rows.shape[1])
        self._whole = self._rows
        if not every_row:
            parts = [
                _read(pooled, POOLED, some)
                .view(len(some), POOLED_SEGMENTS, -1)
                .to(device)
                .float()
                .mean(1, keepdim=True)
                for some in _pieces(ids)
            ]
            self._whole = torch.cat(parts)
        assert self._whole is not None
        self.size = self._whole.shape[-1]
        most = POOLED_SEGMENTS if self.views is None else VIEW_SEGMENTS
        if trained and segments > most:
            raise RunError(f"segments is {segments}, but the motion run pooled {most} of a clip; give {most} at most")

    def sample(self, videos: Ints, rng: np.random.Generator) -> torch.Tensor:
        """Rows (n, segments, D): a random one from each equal part."""
        if self.views is not None:
            view = rng.integers(self.views.shape[1], size=len(videos))
            drawn = self._drawn(self.views.shape[2], len(videos), rng)
            rows = _picked(self.views, self._place[videos][:, None], view[:, None], drawn)
        else:
            assert self._rows is not None
            rows = _picked(self._rows, videos[:, None], self._drawn(self._rows.shape[1], len(videos), rng))
        return rows.to(self.device).float()

    def whole(self, videos: Ints, segments: int) -> torch.Tensor:
        """Every row, or the mean row: (n, 25 or 1, D)."""
        assert self._whole is not None
        return _picked(self._whole, videos).to(self.device).float()

    def _drawn(self, rows: int, n: int, rng: np.random.Generator) -> Ints:
        parts = np.array_split(np.arange(rows), self._segments)
        return np.stack([rng.choice(part, n) for part in parts], 1)


def read_rows(store: Store, feature: str, ids: Sequence[str], device: torch.device) -> torch.Tensor:
    """Every row of some videos, one video's after the other's: on ``device`` where they fit, else on the CPU."""
    total = int(store.row_counts(feature, ids).sum())
    first = _read(store, feature, ids[:1])
    needed = total * first[0].numel() * first.element_size()
    home = device if needed < RESIDENT_SHARE * free_bytes(device) else torch.device("cpu")
    rows = torch.empty((total, *first.shape[1:]), dtype=first.dtype, device=home)
    start = 0
    for some in _pieces(ids):
        read = _read(store, feature, some)
        rows[start : start + len(read)] = read
        start += len(read)
    return rows


def _read(store: Store, feature: str, ids: Sequence[str]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(store.read_all(feature, ids)))


def _pieces(ids: Sequence[str]) -> list[Sequence[str]]:
    return [ids[start : start + _READ_VIDEOS] for start in range(0, len(ids), _READ_VIDEOS)]


def _picked(rows: torch.Tensor, *at: Ints) -> torch.Tensor:
    return rows[tuple(torch.from_numpy(positions).to(rows.device) for positions in at)]
