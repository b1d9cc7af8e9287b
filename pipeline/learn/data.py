"""Segments of motion: which rows of a clip a network sees, fetched from the store and kept where they fit."""

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from moclip.errors import RunError
from moclip.pipeline.learn.clips import has_rows
from moclip.pipeline.learn.views import Geometry, Views, prepare
from moclip.store import Store

log = logging.getLogger(__name__)

Ints = npt.NDArray[np.int64]
Item = TypeVar("Item")

_I_FRAME = 1
#: Pixels of displacement that quantise to a picture's lowest byte.
_FULL = 21
#: The share of the memory that is free which a resident feature may take.
RESIDENT_SHARE = 0.5
_READ_VIDEOS = 128


def random_indices(frames: npt.ArrayLike, segments: int, rng: np.random.Generator) -> Ints:
    """One random row in each of ``segments`` equal parts of each clip, the first frame left out: (n,
    segments).

    TSN's sampling as CoViAR and MoCLIP-Lite do it for motion. Clips shorter than the segments repeat rows.
    """
    count = np.asarray(frames, np.int64)[:, None]
    bounds = np.rint(np.maximum(count - 2, 0) / segments * np.arange(segments + 1)).astype(np.int64)
    low, high = bounds[:, :-1], np.maximum(bounds[:, 1:], bounds[:, :-1] + 1)
    return np.clip(rng.integers(low, high) + 1, 0, count - 1)


def middle_indices(frames: npt.ArrayLike, segments: int) -> Ints:
    """The middle row of each of ``segments`` equal parts of each clip: (n, segments).

    ``round((frames - 1) / segments * (segment + 0.5)) + 1``, kept inside the clip.
    """
    count = np.asarray(frames, np.int64)[:, None]
    middle = np.rint((count - 1) / segments * (np.arange(segments) + 0.5)).astype(np.int64)
    return np.clip(middle + 1, 0, count - 1)


@dataclass(frozen=True)
class _Block:
    """All rows of the videos of one geometry, (rows, 2, gh, gw) int16, or None where they stay in the store."""

    geometry: Geometry
    rows: torch.Tensor | None


class Motion:
    """The rows of a motion feature for some videos, ready to be sampled.

    Rows lie on ``device`` when they fit into half of its free memory; otherwise each batch is gathered. With
    ``missing_as_zeros`` a video without rows has one frame, whose picture is all zeros: full motion to the left and up,
    as the published code has it. Without, such a video is an error.
    """

    def __init__(
        self, store: Store, feature: str, ids: Sequence[str], device: torch.device, *, missing_as_zeros: bool = False
    ) -> None:
        self.store, self.feature, self.device = store, store.resolve(feature), device
        self.ids = np.asarray(ids, object)
        spec = store.features[self.feature]
        if "cell" not in spec.parameters or "picture_type" not in spec.columns:
            raise RunError(f"{self.feature} is not a motion feature; motion-accumulated or motion is needed")
        #: Pixels a stored unit: `motion` is in quarter pixels.
        self.scale = 0.25 if spec.kind == "motion" else 1.0
        self._there = np.ones(len(self.ids), bool)
        if missing_as_zeros:
            self._there = has_rows(store, self.feature, ids)
        there = self.ids[self._there].tolist()
        self.frames = np.ones(len(self.ids), np.int64)
        self.frames[self._there] = store.row_counts(self.feature, there)
        self._start = np.cumsum(self.frames) - self.frames
        self._is_i = np.zeros(self.frames.sum(), bool)
        types = [np.zeros(0, np.uint8), *store.read_all(self.feature, there, "picture_type")]
        self._is_i[np.repeat(self._there, self.frames)] = np.concatenate(types) == _I_FRAME
        self._block_of, geometries = self._geometries(there)
        needed = sum(int(self.frames[self._block_of == b].sum()) * g.row_bytes for b, g in enumerate(geometries))
        self.resident = needed < RESIDENT_SHARE * free_bytes(device)
        self._offset = np.zeros(len(self.ids), np.int64)
        self._blocks = [self._block(b, geometry) for b, geometry in enumerate(geometries)]
        if not self._there.all():
            zeros = torch.full((1, 2, 1, 1), round(-_FULL / self.scale), dtype=torch.int16, device=device)
            self._blocks.append(_Block(Geometry(1, 1, 1, 1, 1), zeros))
        log.info("%s: %.2f GB, %s", self.feature, needed / 1e9, device if self.resident else "read as needed")

    def before_i_frames(self, videos: Ints, frames: Ints) -> Ints:
        """Frame numbers (n, segments) with every I-frame, which has no motion, replaced by the frame before it."""
        is_i = self._is_i[self._start[videos][:, None] + frames]
        return np.where(is_i & (frames > 0), frames - 1, frames)

    def seconds(self, videos: Ints, frames: Ints) -> npt.NDArray[np.float64]:
        """When the frames (n, segments) are shown, in seconds."""
        shown = np.zeros(frames.shape)
        there = self._there[videos]
        names = np.repeat(self.ids[videos[there]], frames.shape[1])
        shown[there] = self.store.gather(self.feature, names, frames[there].ravel(), "pts_seconds").reshape(
            -1, frames.shape[1]
        )
        return shown

    def fetch(self, videos: Ints, frames: Ints) -> list[tuple[Ints, torch.Tensor, Geometry]]:
        """Rows of ``frames`` (n, segments) of ``videos`` (positions, n), a list with one item a geometry.

        An item says which of the n videos it holds and their grids, (k, segments, 2, gh, gw) int16.
        """
        parts = []
        for b in np.unique(self._block_of[videos]):
            mine = np.flatnonzero(self._block_of[videos] == b)
            block = self._blocks[b]
            if block.rows is None:
                names = np.repeat(self.ids[videos[mine]], frames.shape[1])
                rows = torch.from_numpy(self.store.gather(self.feature, names, frames[mine].ravel()))
            else:
                at = (self._offset[videos[mine]][:, None] + frames[mine]).ravel()
                rows = block.rows[torch.from_numpy(at).to(self.device)]
            parts.append((mine, rows.view(len(mine), frames.shape[1], *rows.shape[1:]), block.geometry))
        return parts

    def prepared(
        self, parts: list[tuple[Ints, torch.Tensor, Geometry]], views: Views, size: int, *, mirror_bytes: bool = False
    ) -> torch.Tensor:
        """Fetched grids as network input: (n, segments, 2, size, size) float32, clip i under view i."""
        made = [
            prepare(grids.to(self.device), geometry, views.take(mine), size, self.scale, mirror_bytes=mirror_bytes)
            for mine, grids, geometry in parts
        ]
        if len(made) == 1:
            return made[0]
        order = np.argsort(np.concatenate([mine for mine, _, _ in parts]))
        return torch.cat(made)[torch.from_numpy(order).to(self.device)]

    def _geometries(self, there: list[str]) -> tuple[Ints, list[Geometry]]:
        """Each video's geometry as a position in a list: its grid's shape and its frame's size in pixels.

        Those that are not ``there`` have the position after the last.
        """
        parameters = self.store.features[self.feature].parameters
        cell, size = int(parameters["cell"]), parameters.get("size")
        grids = np.zeros((len(there), 2), np.int64)
        first = self.store.gather_groups(self.feature, there, np.zeros(len(there), np.int64))
        for positions, rows in first:
            grids[positions] = rows.shape[2:]
        if size is not None:
            pixels = np.broadcast_to(np.array(size, np.int64), grids.shape)
        else:
            facts = self.store.videos.select(["id", "width", "height"]).to_pydict()
            known = dict(zip(facts["id"], zip(facts["width"], facts["height"], strict=True), strict=True))
            sizes = [known[video] for video in there]
            pixels = np.array([[width or 0, height or 0] for width, height in sizes], np.int64).reshape(-1, 2)
        pixels = np.where(pixels > 0, pixels, grids[:, ::-1] * cell)
        unique, block_of = np.unique(np.concatenate([grids, pixels], 1), axis=0, return_inverse=True)
        geometries = [Geometry(int(w), int(h), cell, int(gw), int(gh)) for gh, gw, w, h in unique]
        every = np.full(len(self.ids), len(geometries))
        every[self._there] = block_of.reshape(-1)
        return every, geometries

    def _block(self, b: int, geometry: Geometry) -> _Block:
        mine = np.flatnonzero(self._block_of == b)
        self._offset[mine] = np.cumsum(self.frames[mine]) - self.frames[mine]
        if not self.resident:
            return _Block(geometry, None)
        shape = (int(self.frames[mine].sum()), 2, geometry.gh, geometry.gw)
        rows = torch.empty(shape, dtype=torch.int16, device=self.device)
        for some in batched(mine, _READ_VIDEOS):
            read = np.concatenate(self.store.read_all(self.feature, self.ids[some].tolist()))
            start = int(self._offset[some[0]])
            rows[start : start + len(read)] = torch.from_numpy(read)
        return _Block(geometry, rows)


def prefetch(makers: Iterable[Any], make: Any) -> Iterator[Any]:
    """``make(item)`` for each item, the next one made in a thread while the caller works on this one."""
    with ThreadPoolExecutor(1) as pool:
        pending = None
        for item in makers:
            following = pool.submit(make, item)
            if pending is not None:
                yield pending.result()
            pending = following
        if pending is not None:
            yield pending.result()


def batched(positions: Ints, size: int) -> list[Ints]:
    """Positions in their order, in batches of at most ``size``."""
    return np.split(positions, range(size, len(positions), size))


def shuffled(n: int, batch: int, rng: np.random.Generator) -> list[Ints]:
    """Positions 0…n-1 in random order, in batches; a single clip left over joins the last batch."""
    order = rng.permutation(n)
    cuts = list(range(batch, n, batch))
    if cuts and n - cuts[-1] == 1:
        cuts.pop()
    return np.split(order, cuts)


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device, in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):  # not on every system
        return 4 << 30


def choose_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one. :class:`RunError` for a device that torch does not know."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RunError(f"no device {name!r}; auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RunError(f"device {name!r} was asked for, but torch sees no CUDA device; use auto or cpu")
    return device
