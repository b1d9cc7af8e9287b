"""Pooled motion features: what a trained MV-TSN says about each video, computed once and kept in its run."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moclip.pipeline.learn.data import Ints, Motion, ahead, middle_indices
from moclip.pipeline.learn.views import fixed_views
from moclip.store import FeatureSpec, ShardWriter, SourceFacts, add_feature, create_store, publish

#: Images (n, 2, S, S) to pooled features (n, D), in eval mode.
Features = Callable[[torch.Tensor], torch.Tensor]

#: The pooled features that a fusion is trained on: this many test segments a clip, centre crop.
POOLED_SEGMENTS = 25
POOLED = "mv-tsn"
_SHARD_VIDEOS = 2000
#: Images in one forward pass without gradients.
_IMAGES = 64


def pool(
    features: Features, motion: Motion, size: int, segments: int, crops: int = 1
) -> Iterator[tuple[Ints, Ints, torch.Tensor]]:
    """The pooled features of every video of ``motion``, in order, some videos at a time.

    Yields the videos' positions (n), the frames seen (n, segments) and the features, averaged over crops,
    (n, segments, D) float32 on the CPU. Logits are linear in them, so averaging here averages logits.
    """
    together = max(1, 2 * _IMAGES // (segments * crops))
    everyone = np.arange(len(motion.ids))
    chunks = np.split(everyone, range(together, len(everyone), together))

    def fetch(videos: Ints) -> Any:
        frames = motion.before_i_frames(videos, middle_indices(motion.frames[videos], segments))
        return videos, frames, motion.fetch(np.repeat(videos, crops), np.repeat(frames, crops, 0))

    with torch.inference_mode():
        for videos, frames, parts in ahead(chunks, fetch):
            images = motion.prepared(parts, fixed_views(len(videos), size, crops), size).flatten(0, 1)
            rows = torch.cat([features(some) for some in torch.split(images, _IMAGES)])
            yield videos, frames, rows.view(len(videos), crops, segments, -1).mean(1).cpu()


def write_pooled(path: Path, features: Features, motion: Motion, *, size: int, weights_sha256: str) -> torch.Tensor:
    """Write every video's pooled features as a store of its own; returns their means over segments (videos, D)."""
    spec = FeatureSpec(
        kind=POOLED,
        dtype="float16",
        unit="1",
        parameters={
            "version": 1,
            "motion": motion.store.features[motion.feature].digest,
            "weights_sha256": weights_sha256,
            "input_size": size,
            "segments": POOLED_SEGMENTS,
        },
        columns={"frame_index": "int32", "pts_seconds": "float64"},
        axes=("channel",),
    )
    create_store(path)
    add_feature(path, POOLED, spec)
    means, shard, count = [], None, 0
    for videos, frames, rows in pool(features, motion, size, POOLED_SEGMENTS):
        ids = motion.ids[videos].tolist()
        seconds = motion.seconds(videos, frames)
        for i, video in enumerate(ids):
            if shard is None or count % _SHARD_VIDEOS == 0:
                if shard is not None:
                    shard.finish()
                shard = ShardWriter(path, feature=POOLED, spec=spec, shard=f"{count // _SHARD_VIDEOS:06d}")
            shard.append(rows[i].numpy(), frame_index=frames[i], pts_seconds=seconds[i])
            shard.ok(SourceFacts(id=video))
            count += 1
        means.append(rows.mean(1))
    if shard is not None:
        shard.finish()
    publish(path)
    return torch.cat(means)
