"""Pooled motion features: what a trained MV-TSN says about each video, computed once and kept in its run."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moclip.pipeline.learn.data import Ints, Motion, batched, middle_indices, prefetch, random_indices
from moclip.pipeline.learn.views import Augmentation, fixed_views, random_views
from moclip.store import FeatureSpec, ShardWriter, SourceFacts, add_feature, create_store, publish

#: Positions of videos (n), the frames seen (n, segments), and features (n, segments, D) float32 on the CPU.
Pooled = tuple[Ints, Ints, torch.Tensor]
#: Images (n, 2, S, S) to pooled features (n, D), in eval mode.
Extractor = Callable[[torch.Tensor], torch.Tensor]

#: The pooled features that a fusion is trained on: this many test segments a clip, centre crop.
POOLED_SEGMENTS = 25
POOLED = "mv-tsn"
#: Augmented views of the training clips, of this many random segments each.
POOLED_VIEWS = "mv-tsn-views"
VIEW_SEGMENTS = 9
_SHARD_VIDEOS = 500
#: Images in one forward pass without gradients.
_IMAGES = 64


@dataclass(frozen=True)
class Augmented:
    """``views`` random views of each of the first ``clips`` videos."""

    clips: int
    views: int
    seed: int
    how: Augmentation


def pool(
    features: Extractor, motion: Motion, size: int, segments: int, crops: int = 1, *, strict_reference: bool = False
) -> Iterator[Pooled]:
    """The pooled features of every video of ``motion``, in order, some videos at a time.

    Features are averaged over crops; logits are linear in them, so averaging here averages logits.
    With ``strict_reference`` mirror images are mirrored half of the time, and their bytes are.
    """
    batches = batched(np.arange(len(motion.ids)), max(1, 2 * _IMAGES // (segments * crops)))

    def fetch(videos: Ints) -> Any:
        frames = motion.before_i_frames(videos, middle_indices(motion.frames[videos], segments))
        return videos, frames, motion.fetch(np.repeat(videos, crops), np.repeat(frames, crops, 0))

    rng = np.random.default_rng(0)
    with torch.inference_mode():
        for videos, frames, parts in prefetch(batches, fetch):
            views = fixed_views(len(videos), size, crops)
            if strict_reference:
                coins = np.repeat(rng.random(len(videos)) < 0.5, crops)  # one a clip
                views = replace(views, mirror=views.mirror & torch.from_numpy(coins))
            images = motion.prepared(parts, views, size, mirror_bytes=strict_reference).flatten(0, 1)
            rows = torch.cat([features(some) for some in torch.split(images, _IMAGES)])
            yield videos, frames, rows.view(len(videos), crops, segments, -1).mean(1).cpu()


def pool_views(features: Extractor, motion: Motion, augmented: Augmented) -> Iterator[Pooled]:
    """Views as training shows them: like :func:`pool`, but a clip's rows are ``views`` times
    :data:`VIEW_SEGMENTS`, one view after the other.
    """
    rng = np.random.default_rng([augmented.seed, augmented.views])
    views, clips, how = augmented.views, augmented.clips, augmented.how
    rows = views * VIEW_SEGMENTS
    batches = batched(np.arange(clips), max(1, 2 * _IMAGES // rows))

    def fetch(videos: Ints) -> Any:
        often = np.repeat(videos, views)
        frames = motion.before_i_frames(often, random_indices(motion.frames[often], VIEW_SEGMENTS, rng))
        return videos, frames, random_views(len(often), how, rng), motion.fetch(often, frames)

    with torch.inference_mode():
        for videos, frames, shown, parts in prefetch(batches, fetch):
            images = motion.prepared(parts, shown, how.size).flatten(0, 1)
            pooled = torch.cat([features(some) for some in torch.split(images, _IMAGES)])
            yield videos, frames.reshape(len(videos), rows), pooled.view(len(videos), rows, -1).cpu()


def write_pooled(
    path: Path,
    features: Extractor,
    motion: Motion,
    *,
    size: int,
    augmented: Augmented | None,
    weights_sha256: str,
    on_clips: Callable[[int], None] = lambda _: None,
) -> torch.Tensor:
    """Write every video's pooled features as a store of its own; returns their means over segments (videos, D).

    ``on_clips`` is told how many clips are written, of views again from the first.
    """
    create_store(path)
    means = []

    def of_all() -> Iterator[Pooled]:
        for videos, frames, rows in pool(features, motion, size, POOLED_SEGMENTS):
            means.append(rows.mean(1))
            yield videos, frames, rows

    about = {
        "version": 1,
        "motion": motion.store.features[motion.feature].digest,
        "weights_sha256": weights_sha256,
        "input_size": size,
    }
    _write(path, POOLED, {**about, "segments": POOLED_SEGMENTS}, motion, of_all(), on_clips)
    if augmented:
        about |= {"segments": VIEW_SEGMENTS, "augmented": asdict(augmented)}
        _write(path, POOLED_VIEWS, about, motion, pool_views(features, motion, augmented), on_clips)
    publish(path)
    return torch.cat(means)


def _write(
    path: Path,
    kind: str,
    parameters: Mapping[str, Any],
    motion: Motion,
    pooled: Iterator[Pooled],
    on_clips: Callable[[int], None],
) -> None:
    spec = FeatureSpec(
        kind=kind,
        dtype="float16",
        unit="1",
        parameters=parameters,
        columns={"frame_index": "int32", "pts_seconds": "float64"},
        axes=("channel",),
    )
    add_feature(path, kind, spec)
    shard, count = None, 0
    for videos, frames, rows in pooled:
        seconds = motion.seconds(videos, frames)
        for i, video in enumerate(motion.ids[videos].tolist()):
            if shard is None or count % _SHARD_VIDEOS == 0:
                if shard is not None:
                    shard.finish()
                shard = ShardWriter(path, feature=kind, spec=spec, shard=f"{count // _SHARD_VIDEOS:06d}")
            shard.append(rows[i].numpy(), frame_index=frames[i], pts_seconds=seconds[i])
            shard.ok(SourceFacts(id=video))
            count += 1
        on_clips(count)
    if shard is not None:
        shard.finish()
