"""Fusion of motion and image, and the image-only probe that controls it (MoCLIP-Lite, arXiv 2509.17084).

Both are one small network on frozen features: the motion side's come pooled from an MV-TSN's run, the image
side's from the store. No convolutional network runs here.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from moclip.errors import RunError
from moclip.pipeline.learn.clips import Clips, Split, read_labelled, read_split
from moclip.pipeline.learn.data import Ints, choose_device, shuffled
from moclip.pipeline.learn.fit import Batch, OnEpoch, fit, one_thread, seeded
from moclip.pipeline.learn.metrics import Evaluation, by_name, score
from moclip.pipeline.learn.pooled import POOLED
from moclip.pipeline.learn.runs import FEATURES, Run, RunWriter, TrainResult, load_run
from moclip.store import Store, open_store

_HIDDEN = 512
_READ_VIDEOS = 1024


@dataclass(frozen=True)
class FusionConfig:
    """How to train a fusion head or, without ``motion_run``, the image-only probe.

    ``segments`` of a clip's pooled motion rows are drawn for each epoch; evaluation averages all. The paper's
    learning rate suits its corpora of thousands of clips: 100 epochs of a few hundred are some hundred steps.
    """

    split: str
    motion_run: str | None = None
    feature: str = "embedding"
    segments: int = 3
    batch: int = 64
    epochs: int = 100
    lr: float = 1e-4
    val_fraction: float = 0.15
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in ("segments", "batch", "epochs", "lr"):
            if getattr(self, name) <= 0:
                raise RunError(f"{name} is {getattr(self, name)}; it must be positive")
        if not 0 <= self.val_fraction < 1:
            raise RunError(f"val_fraction is {self.val_fraction}; it must be at least 0 and below 1")


class FusionHead(nn.Sequential):
    """Features to logits: Linear 512, ReLU, Dropout 0.5, Linear."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__(nn.Linear(inputs, _HIDDEN), nn.ReLU(), nn.Dropout(0.5), nn.Linear(_HIDDEN, classes))


def train_fusion(
    store_path: str | Path, out: str | Path, config: FusionConfig, *, on_epoch: OnEpoch | None = None
) -> TrainResult:
    """Train the fusion head on ``config.motion_run``'s pooled features and the store's embedding, and test
    it.

    :class:`RunError` if the motion run was trained on another split, or the split has changed since.
    """
    if config.motion_run is None:
        raise RunError("fusion needs the run of an MV-TSN: train one with `moclip train tsn`, give it as motion run")
    return _train("fusion", open_store(store_path), out, config, on_epoch)


def train_probe(
    store_path: str | Path, out: str | Path, config: FusionConfig, *, on_epoch: OnEpoch | None = None
) -> TrainResult:
    """Train the same head on the image embedding alone, and test it: what motion has to add to."""
    if config.motion_run is not None:
        raise RunError("the probe sees the image embedding alone; it takes no motion run")
    return _train("probe", open_store(store_path), out, config, on_epoch)


def evaluate_head(run: Run, store: Store, split: str, *, device: str) -> Evaluation:
    """Test a fusion or a probe on the test side of a split."""
    config = FusionConfig(**run.config)
    if config.motion_run is not None:
        config = replace(config, motion_run=str(run.path / config.motion_run))
    motion, image = _sources(store, config)
    run.check_features(*filter(None, (store, motion)))
    found, names, missing = read_labelled(store, split, feature=image)
    if motion is not None:
        found, missing = _with_pooled(found, missing, motion)
    if not len(found):
        raise RunError(f"no test clip of split {split!r} has the features that {run.path} needs")
    clips = by_name(found, names, run.classes)
    features = Features(store, image, motion, clips.ids, choose_device(device))
    head = FusionHead(features.dim, len(run.classes))
    head.load_state_dict(run.weights())
    logits = _predict(head.to(features.device), features)
    return score(logits, clips, run.classes, split=split, protocol="pooled", missing=missing)


def _train(kind: str, store: Store, out: str | Path, config: FusionConfig, on_epoch: OnEpoch | None) -> TrainResult:
    motion, image = _sources(store, config)
    split = read_split(store, config.split, features=[image], val_fraction=config.val_fraction)
    if motion is not None:
        _check_motion_run(load_run(str(config.motion_run), kind="tsn"), split)
        split = _split_with_pooled(split, motion)
    features = Features(store, image, motion, split.every.ids, choose_device(config.device))
    specs = {image: store.features[image]}
    saved = config
    if motion is not None:
        specs[POOLED] = motion.features[POOLED]
        # Relative to this run: both can move together, and evaluation may start in another directory.
        saved = replace(config, motion_run=os.path.relpath(str(config.motion_run), out))
    writer = RunWriter(out, kind, saved, split, specs)
    targets = torch.from_numpy(split.every.targets).to(features.device)
    n_train, n_val = len(split.train), len(split.val)

    def train(epoch: int) -> Iterator[Batch]:
        rng = np.random.default_rng([config.seed, epoch])
        for videos in shuffled(n_train, config.batch, rng):
            yield (
                features.sample(videos, config.segments, rng),
                targets[torch.from_numpy(videos).to(targets.device)],
            )

    def val() -> Iterator[Batch]:
        held_out = slice(n_train, n_train + n_val)
        yield features.means[held_out], targets[held_out]

    def record(row: Any) -> None:
        writer.record(row)
        if on_epoch:
            on_epoch(row)

    with seeded(config.seed), one_thread():
        head = FusionHead(features.dim, len(split.classes)).to(features.device)
        fitted = fit(
            head,
            torch.optim.AdamW(head.parameters(), lr=config.lr),
            epochs=config.epochs,
            train=train,
            val=val if n_val else None,
            keep=writer.keep,
            on_epoch=record,
        )
    logits = _predict(head, features)[-len(split.test) :]
    test = score(logits, split.test, split.classes, split=split.name, protocol="pooled", missing=split.missing)
    return writer.finish(kind, fitted, test)


class Features:
    """The frozen features of some videos, resident on the device: pooled motion rows and image embeddings.

    ``motion`` is (videos, 25, D) float16, or None for the probe; a video's images are a range of ``images``.
    ``means`` is what evaluation sees, (videos, dim): motion and image, each averaged over the video's rows.
    """

    def __init__(
        self, store: Store, image: str, motion: Store | None, ids: Sequence[str], device: torch.device
    ) -> None:
        self.device = device
        self.count = store.row_counts(image, ids)
        self.start = np.cumsum(self.count) - self.count
        self.images = torch.from_numpy(_read(store, image, ids)).to(device)
        self.motion: torch.Tensor | None = None
        if motion is not None:
            rows = _read(motion, POOLED, ids)
            self.motion = torch.from_numpy(rows.reshape(len(ids), -1, rows.shape[1])).to(device)
        self.means = self._means()
        self.dim = self.means.shape[1]

    def sample(self, videos: Ints, segments: int, rng: np.random.Generator) -> torch.Tensor:
        """Training input (n, dim): the mean of one random motion row from each of ``segments`` parts, and one
        random image.
        """
        rows = self.start[videos] + rng.integers(self.count[videos])
        image = self.images[self._to(rows)].float()
        if self.motion is None:
            return image
        there = self.motion.shape[1]
        parts = np.array_split(np.arange(there), min(segments, there))
        drawn = np.stack([rng.choice(part, len(videos)) for part in parts], 1)
        motion = self.motion[self._to(videos)[:, None], self._to(drawn)].float().mean(1)
        return torch.cat([motion, image], 1)

    def _means(self) -> torch.Tensor:
        owner = torch.from_numpy(np.repeat(np.arange(len(self.count)), self.count)).to(self.device)
        image = torch.zeros((len(self.count), self.images.shape[1]), device=self.device)
        image.index_add_(0, owner, self.images.float())
        image /= self._to(self.count)[:, None]
        if self.motion is None:
            return image
        return torch.cat(
            [torch.cat([some.float().mean(1) for some in torch.split(self.motion, _READ_VIDEOS)]), image], 1
        )

    def _to(self, values: Ints) -> torch.Tensor:
        return torch.from_numpy(values).to(self.device)


def _read(store: Store, feature: str, ids: Sequence[str]) -> Any:
    return np.concatenate(store.read_all(feature, ids))


def _sources(store: Store, config: FusionConfig) -> tuple[Store | None, str]:
    """The motion run's pooled features, if there is one, and the full name of the embedding."""
    image = store.resolve(config.feature)
    if store.features[image].kind != "embedding":
        raise RunError(f"{image} is not an image embedding; name one with its full name, embedding-…")
    if config.motion_run is None:
        return None, image
    run = load_run(config.motion_run, kind="tsn")
    if not run.finished:
        raise RunError(f"the motion run {run.path} is unfinished; train it again")
    return open_store(run.path / FEATURES), image


def _check_motion_run(run: Run, split: Split) -> None:
    """A motion network trained on test clips, or on those held out here, would flatter the fusion."""
    if run.split != split.name:
        raise RunError(
            f"{run.path} was trained on split {run.split!r}, this is split {split.name!r}; "
            f"train an MV-TSN on {split.name!r}"
        )
    if run.split_digest != split.digest:
        raise RunError(
            f"{run.path} was trained on another division of split {run.split!r}: labels or val fraction "
            f"(its was {run.config.get('val_fraction')}) differ; use the same, or train the MV-TSN again"
        )


def _with_pooled(clips: Clips, missing: Mapping[str, int], motion: Store) -> tuple[Clips, dict[str, int]]:
    """The clips that the motion run has pooled features of; the others are counted."""
    kept = clips.only(set(motion.ids(POOLED)))
    lost = len(clips) - len(kept)
    return kept, {**missing, **({"not in the motion run": lost} if lost else {})}


def _split_with_pooled(split: Split, motion: Store) -> Split:
    train, _ = _with_pooled(split.train, {}, motion)
    val, _ = _with_pooled(split.val, {}, motion)
    test, missing = _with_pooled(split.test, split.missing, motion)
    if not len(test) or len(set(train.targets.tolist())) < len(split.classes):
        raise RunError(
            f"the motion run {Path(motion.url).parent} has no features of this split's test clips, "
            "or of all training clips of a class; train it again"
        )
    return Split(split.name, split.classes, train, val, test, missing, split.digest)


def _predict(head: FusionHead, features: Features) -> torch.Tensor:
    head.eval()
    with torch.inference_mode():
        logits: torch.Tensor = head(features.means)
    return logits
