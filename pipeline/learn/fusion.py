"""Fusion of motion and image, and the image-only probe that controls it (MoCLIP-Lite, arXiv 2509.17084).

Both are one small network on frozen features: the motion side's come pooled from an MV-TSN's run, the image
side's from the store. No convolutional network runs here.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from zlib import crc32

import numpy as np
import torch
from torch import nn

from moclip.errors import RunError
from moclip.pipeline.learn.card import ModelCard, head_card
from moclip.pipeline.learn.clips import Clips, Split, read_labelled, read_split
from moclip.pipeline.learn.data import Ints, choose_device, shuffled
from moclip.pipeline.learn.fit import Batch, OnEpoch, fit, one_thread, seeded
from moclip.pipeline.learn.heads import HEADS, READS_SEGMENTS, ClipFeatures, make_head
from moclip.pipeline.learn.metrics import Evaluation, by_name, score
from moclip.pipeline.learn.pooled import POOLED, POOLED_SEGMENTS, POOLED_VIEWS, VIEW_SEGMENTS
from moclip.pipeline.learn.recipes import configured
from moclip.pipeline.learn.runs import FEATURES, Run, RunWriter, TrainResult, load_run, load_weights
from moclip.pipeline.learn.training import Training
from moclip.pipeline.learn.tsn import TSNConfig
from moclip.store import Store, open_store

#: Clips in one forward pass without gradients.
_TOGETHER = 1024
#: Which of a clip's stored frames a head sees: one at random (another in each epoch, one by the clip's id in tests),
#: the middle one, or all (their mean, in heads that see one image).
FRAMES = ("all", "random", "middle")


@dataclass(frozen=True)
class FusionConfig(Training):
    """How to train a fusion head or, without ``motion_run``, the image-only probe.

    In training, ``segments`` rows of a clip's pooled motion are drawn for each epoch, from its augmented views where
    the run has them; evaluation sees all rows of the plain view. ``head`` is one of :data:`HEADS`, ``frames`` of
    :data:`FRAMES`. The paper's learning rate suits its corpora of thousands of clips: 100 epochs of a few hundred are
    some hundred steps.
    """

    motion_run: str | None = None
    feature: str = "embedding"
    head: str = "mlp"
    frames: str = "all"
    segments: int = 3
    lr: float = 1e-4
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.segments <= 0:
            raise RunError(f"segments is {self.segments}; it must be positive")
        for name, known in (("head", tuple(HEADS)), ("frames", FRAMES)):
            if getattr(self, name) not in known:
                raise RunError(f"no {name} {getattr(self, name)!r}; there are: {', '.join(known)}")


def train_fusion(
    store_path: str | Path, out: str | Path, config: FusionConfig, *, on_epoch: OnEpoch = lambda _: None
) -> TrainResult:
    """Train the fusion head on ``config.motion_run``'s pooled features and the store's embedding, and test
    it.

    :class:`RunError` if the motion run was trained on another split, or the split has changed since.
    """
    if config.motion_run is None:
        raise RunError("fusion needs the run of an MV-TSN: train one with `moclip train tsn`, give it as motion run")
    return _train("fusion", open_store(store_path), out, config, on_epoch)


def train_probe(
    store_path: str | Path, out: str | Path, config: FusionConfig, *, on_epoch: OnEpoch = lambda _: None
) -> TrainResult:
    """Train the same head on the image embedding alone, and test it: what motion has to add to."""
    if config.motion_run is not None:
        raise RunError("the probe sees the image embedding alone; it takes no motion run")
    return _train("probe", open_store(store_path), out, config, on_epoch)


def evaluate_head(run: Run, store: Store, split: str, *, device: str) -> Evaluation:
    """Test a fusion or a probe on the test side of a split."""
    config = configured(FusionConfig, run.kind, None, **run.config)
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
    features = Features(store, image, motion, clips.ids, config, choose_device(device))
    head = make_head(config.head, *features.sizes, len(run.classes))
    load_weights(head, run)
    logits = _predict(head.to(features.device), features, np.arange(len(clips)))
    return score(logits, clips, run.classes, split=split, protocol="pooled", missing=missing)


def _train(kind: str, store: Store, out: str | Path, config: FusionConfig, on_epoch: OnEpoch) -> TrainResult:
    motion, image = _sources(store, config)
    split = read_split(store, config.split, features=[image], val_fraction=config.val_fraction)
    if motion is not None:
        _check_motion_run(load_run(str(config.motion_run), kind="tsn"), split)
        split = _split_with_pooled(split, motion)
    features = Features(store, image, motion, split.every.ids, config, choose_device(config.device))
    specs = {image: store.features[image]}
    saved = config
    if motion is not None:
        specs[POOLED] = motion.features[POOLED]
        # Relative to this run: both can move together, and evaluation may start in another directory.
        saved = replace(config, motion_run=os.path.relpath(str(config.motion_run), out))
    writer = RunWriter(out, kind, saved, split, specs)
    targets = torch.from_numpy(split.every.targets).to(features.device)
    n_train, n_val = len(split.train), len(split.val)
    judges = np.arange(n_train, n_train + n_val)
    if config.strict_reference:  # the epoch is chosen on test
        judges = np.arange(n_train + n_val, len(split.every))

    def train(epoch: int) -> Iterator[Batch]:
        rng = np.random.default_rng([config.seed, epoch])
        for videos in shuffled(n_train, config.batch, rng):
            yield features.sample(videos, rng), targets[torch.from_numpy(videos).to(targets.device)]

    def val() -> Iterator[Batch]:
        for some in _together(judges):
            yield features.whole(some), targets[torch.from_numpy(some).to(targets.device)]

    with seeded(config.seed, deterministic=config.deterministic), one_thread():
        head = make_head(config.head, *features.sizes, len(split.classes)).to(features.device)
        fitted = fit(
            head,
            torch.optim.AdamW(head.parameters(), lr=config.lr, weight_decay=config.weight_decay),
            config,
            train=train,
            val=val if len(judges) else None,
            keeper=writer,
            on_epoch=on_epoch,
        )
    logits = _predict(head, features, np.arange(n_train + n_val, len(split.every)))
    test = score(logits, split.test, split.classes, split=split.name, protocol="pooled", missing=split.missing)
    return writer.finish(kind, fitted, test, _card(config, store, image, features, len(split.classes)))


def _card(config: FusionConfig, store: Store, image: str, features: "Features", classes: int) -> ModelCard:
    motion = None
    if config.motion_run is not None:
        tsn = configured(TSNConfig, "tsn", None, **load_run(config.motion_run).config)
        motion = (tsn.backbone.partition(":")[2], tsn.input_size, POOLED_SEGMENTS)
    encoder = str(store.features[image].parameters.get("encoder"))
    return head_card(config.head, features.sizes, classes, encoder=encoder, frames=features.most_frames, motion=motion)


class Features:
    """The frozen features of some videos, resident on the device: pooled motion rows and image embeddings.

    ``motion`` is (videos, 25, D) float16, or None for the probe, ``views`` (views of some of the videos, 9, D)
    its augmented views; a video's images are a range of ``images``. ``sizes`` are D (0 without motion) and E.
    """

    def __init__(
        self,
        store: Store,
        image: str,
        motion: Store | None,
        ids: Sequence[str],
        config: FusionConfig,
        device: torch.device,
    ) -> None:
        self.device, self.config = device, config
        self.images = torch.from_numpy(np.concatenate(store.read_all(image, ids))).to(device)
        self._count = store.row_counts(image, ids)
        self._start = np.cumsum(self._count) - self._count
        #: The frame that a clip is tested by where it is one at random.
        self._own = np.array([crc32(f"{config.seed} {video}".encode()) for video in ids], np.int64) % self._count
        self.motion: torch.Tensor | None = None
        self._whole: torch.Tensor | None = None
        self.views: torch.Tensor | None = None
        if motion is not None:
            self.motion = self._whole = self._pooled(motion, POOLED, ids, POOLED_SEGMENTS)
            if config.head not in READS_SEGMENTS:
                parts = torch.split(self.motion, _TOGETHER)
                self._whole = torch.cat([part.float().mean(1, keepdim=True) for part in parts])
            there = set(motion.ids(POOLED_VIEWS)) if POOLED_VIEWS in motion.features else set()
            augmented = [video for video in ids if video in there]
            place = {video: i for i, video in enumerate(augmented)}
            self._augmented = np.array([place.get(video, -1) for video in ids], np.int64)
            if augmented:
                self.views = self._pooled(motion, POOLED_VIEWS, augmented, VIEW_SEGMENTS)
                self._views_each = len(self.views) // len(augmented)
        self.most_frames = int(self._count.max()) if config.frames == "all" else 1
        self.sizes = (0 if self.motion is None else self.motion.shape[-1], self.images.shape[-1])

    def sample(self, videos: Ints, rng: np.random.Generator) -> ClipFeatures:
        """What training sees of videos (positions): one random motion row from each of ``segments`` parts."""
        chosen = rng.integers(self._count[videos]) if self.config.frames == "random" else None
        images = self._images(videos, chosen)
        if self.motion is None:
            return ClipFeatures(None, *images)
        rows, at = self.motion, videos
        if self.views is not None and (self._augmented[videos] >= 0).all():
            rows = self.views
            at = self._augmented[videos] * self._views_each + rng.integers(self._views_each, size=len(videos))
        parts = np.array_split(np.arange(rows.shape[1]), min(self.config.segments, rows.shape[1]))
        drawn = np.stack([rng.choice(part, len(videos)) for part in parts], 1)
        return ClipFeatures(rows[self._to(at)[:, None], self._to(drawn)].float(), *images)

    def whole(self, videos: Ints) -> ClipFeatures:
        """What evaluation sees of videos: every row of the plain view, or their mean where that is the same."""
        images = self._images(videos, self._own[videos])
        motion = None if self._whole is None else self._whole[self._to(videos)].float()
        return ClipFeatures(motion, *images)

    def _images(self, videos: Ints, random: Ints | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Images (n, frames, E), which of them are there, and their positions."""
        count = self._count[videos]
        if self.config.frames == "all":
            order = np.arange(count.max())
            there = order < count[:, None]
            which = np.where(there, order, 0)
        else:
            which = (count // 2 if self.config.frames == "middle" or random is None else random)[:, None]
            there = np.ones_like(which, bool)
        images = self.images[self._to(self._start[videos][:, None] + which)].float()
        position = ((which + 0.5) / count[:, None]).astype(np.float32)
        return images, torch.from_numpy(there).to(self.device), torch.from_numpy(position).to(self.device)

    def _pooled(self, motion: Store, feature: str, ids: Sequence[str], segments: int) -> torch.Tensor:
        rows = np.concatenate(motion.read_all(feature, ids))
        return torch.from_numpy(rows.reshape(-1, segments, rows.shape[1])).to(self.device)

    def _to(self, values: Ints) -> torch.Tensor:
        return torch.from_numpy(values).to(self.device)


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


def _predict(head: nn.Module, features: Features, videos: Ints) -> torch.Tensor:
    head.eval()
    with torch.inference_mode():
        return torch.cat([head(features.whole(some)) for some in _together(videos)])


def _together(videos: Ints) -> list[Ints]:
    """Videos in parts that go through a head at once."""
    return np.split(videos, range(_TOGETHER, len(videos), _TOGETHER))
