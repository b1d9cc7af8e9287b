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
from moclip.pipeline.learn.fit import Batch, OnEpoch, OnStep, fit, one_thread, seeded
from moclip.pipeline.learn.heads import HEADS, READS_SEGMENTS, ClipFeatures, WithZeroShot, make_head
from moclip.pipeline.learn.metrics import Evaluation, by_name, score
from moclip.pipeline.learn.pooled import POOLED, POOLED_SEGMENTS, POOLED_VIEWS, VIEW_SEGMENTS
from moclip.pipeline.learn.published import DriftingFusion, Pictures
from moclip.pipeline.learn.recipes import configured
from moclip.pipeline.learn.runs import FEATURES, Run, RunWriter, TrainResult, load_run, load_weights
from moclip.pipeline.learn.training import Training
from moclip.pipeline.learn.tsn import MotionTSN, TSNConfig, load_motion
from moclip.pipeline.learn.views import Augmentation
from moclip.pipeline.learn.zeroshot import text_of
from moclip.store import Store, open_store

#: Clips in one forward pass without gradients.
_TOGETHER = 1024
#: The same where each clip is 25 pictures.
_PICTURES_TOGETHER = 8
#: Which of a clip's stored frames a head sees: one at random (another in each epoch, one by the clip's id in tests),
#: the middle one, or all (their mean, in heads that see one image).
FRAMES = ("all", "random", "middle")


@dataclass(frozen=True)
class FusionConfig(Training):
    """How to train a fusion head or, without ``motion_run``, the image-only probe.

    In training, ``segments`` rows of a clip's pooled motion are drawn for each epoch, from its augmented views where
    the run has them; evaluation sees all rows of the plain view. ``head`` is one of :data:`HEADS`, ``frames`` of
    :data:`FRAMES`. The paper's learning rate suits its corpora of thousands of clips: 100 epochs of a few hundred are
    some hundred steps. With ``zeroshot_run`` the scores by the classes' names are added to the head's.
    """

    motion_run: str | None = None
    zeroshot_run: str | None = None
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
    store_path: str | Path,
    out: str | Path,
    config: FusionConfig,
    *,
    on_epoch: OnEpoch = lambda _: None,
    on_step: OnStep = lambda *_: None,
) -> TrainResult:
    """Train the fusion head on ``config.motion_run``'s pooled features and the store's embedding, and test
    it.

    :class:`RunError` if the motion run was trained on another split, or the split has changed since.
    """
    if config.motion_run is None:
        raise RunError("fusion needs the run of an MV-TSN: train one with `moclip train tsn`, give it as motion run")
    return _train("fusion", open_store(store_path), out, config, on_epoch, on_step)


def train_probe(
    store_path: str | Path,
    out: str | Path,
    config: FusionConfig,
    *,
    on_epoch: OnEpoch = lambda _: None,
    on_step: OnStep = lambda *_: None,
) -> TrainResult:
    """Train the same head on the image embedding alone, and test it: what motion has to add to."""
    if config.motion_run is not None:
        raise RunError("the probe sees the image embedding alone; it takes no motion run")
    return _train("probe", open_store(store_path), out, config, on_epoch, on_step)


def evaluate_head(run: Run, store: Store, split: str, *, device: str) -> Evaluation:
    """Test a fusion or a probe on the test side of a split."""
    config = configured(FusionConfig, run.kind, None, **run.config)
    if config.motion_run is not None:
        config = replace(config, motion_run=str(run.path / config.motion_run))
    sources = _sources(store, config)
    run.check_features(*filter(None, (store, sources.pooled)))
    found, names, missing = read_labelled(store, split, feature=None if config.strict_reference else sources.image)
    if sources.pooled is not None:
        found, missing = _with_pooled(found, missing, sources.pooled)
    if not len(found):
        raise RunError(f"no test clip of split {split!r} has the features that {run.path} needs")
    clips = by_name(found, names, run.classes)
    features = Features(store, sources, clips.ids, config, choose_device(device))
    text = torch.zeros((len(run.classes), features.sizes[1])) if config.zeroshot_run else None
    model = _model(config, features, len(run.classes), sources.motion, text)
    load_weights(model, run)
    logits = _predict(model.to(features.device), features, np.arange(len(clips)))
    return score(logits, clips, run.classes, split=split, protocol="pooled", missing=missing)


@dataclass(frozen=True)
class Sources:
    """The full name of the embedding, and what a fusion reads motion from: the pooled features of an MV-TSN's run, or
    (as published) its network, with the feature that it sees.
    """

    image: str
    pooled: Store | None = None
    motion: MotionTSN | None = None
    feature: str = ""
    augmentation: Augmentation | None = None


def _model(
    config: FusionConfig, features: "Features", classes: int, motion: nn.Module | None, text: torch.Tensor | None
) -> nn.Module:
    """The head, with the scores of ``text`` added, and with the motion network in front where that is no constant."""
    model = make_head(config.head, *features.sizes, classes)
    if text is not None:
        model = WithZeroShot(model, text)
    return model if motion is None else DriftingFusion(motion, model)


def _train(
    kind: str, store: Store, out: str | Path, config: FusionConfig, on_epoch: OnEpoch, on_step: OnStep
) -> TrainResult:
    sources = _sources(store, config)
    image, pooled = sources.image, sources.pooled
    needed = [] if config.strict_reference else [image]
    split = read_split(store, config.split, features=needed, val_fraction=config.val_fraction)
    if config.motion_run is not None:
        _check_motion_run(load_run(config.motion_run, kind="tsn"), split)
    if pooled is not None:
        split = _split_with_pooled(split, pooled)
    features = Features(store, sources, split.every.ids, config, choose_device(config.device))
    specs = {image: store.features[image]}
    if pooled is not None:
        specs[POOLED] = pooled.features[POOLED]
    if sources.motion is not None:
        specs[sources.feature] = store.features[sources.feature]
    text = None
    if config.zeroshot_run is not None:
        text = text_of(load_run(config.zeroshot_run, kind="zeroshot"), store, image, split.classes)
    saved = relative(config, out)
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
        for some in features.together(judges):
            yield features.whole(some, config.segments), targets[torch.from_numpy(some).to(targets.device)]

    with seeded(config.seed, deterministic=config.deterministic), one_thread():
        model = _model(config, features, len(split.classes), sources.motion, text).to(features.device)
        fitted = fit(
            model,
            torch.optim.AdamW(
                [p for p in model.parameters() if p.requires_grad], lr=config.lr, weight_decay=config.weight_decay
            ),
            config,
            train=train,
            val=val if len(judges) else None,
            keeper=writer,
            on_epoch=on_epoch,
            on_step=on_step,
        )
        logits = _predict(model, features, np.arange(n_train + n_val, len(split.every)))
    test = score(logits, split.test, split.classes, split=split.name, protocol="pooled", missing=split.missing)
    return writer.finish(fitted, test, _card(config, store, image, features, len(split.classes)))


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
    As published, motion is ``pictures`` instead, and a video without images has one of zeros.
    """

    def __init__(
        self, store: Store, sources: Sources, ids: Sequence[str], config: FusionConfig, device: torch.device
    ) -> None:
        self.device, self.config, motion = device, config, sources.pooled
        there = set(store.ids(sources.image)) if config.strict_reference else set(ids)
        known = store.read_all(sources.image, [video for video in ids if video in there])
        if not known:
            raise RunError(f"no clip of this split has rows of {sources.image}")
        rows, zeros = iter(known), np.zeros_like(known[0][:1])
        images = [next(rows) if video in there else zeros for video in ids]
        self.images = torch.from_numpy(np.concatenate(images)).to(device)
        self._count = np.array([len(some) for some in images], np.int64)
        self._start = np.cumsum(self._count) - self._count
        #: The frame that a clip is tested by where it is one at random.
        self._own = np.array([crc32(f"{config.seed} {video}".encode()) for video in ids], np.int64) % self._count
        self.motion: torch.Tensor | None = None
        self._whole: torch.Tensor | None = None
        self.views: torch.Tensor | None = None
        self.pictures: Pictures | None = None
        motion_size = 0
        if sources.motion is not None and sources.augmentation is not None:
            motion_size = sources.motion.classifier.in_features
            self.pictures = Pictures(store, sources.feature, ids, sources.augmentation, device)
        if motion is not None:
            self.motion = self._whole = self._pooled(motion, POOLED, ids, POOLED_SEGMENTS)
            if config.head not in READS_SEGMENTS:
                parts = torch.split(self.motion, _TOGETHER)
                self._whole = torch.cat([part.float().mean(1, keepdim=True) for part in parts])
            motion_size = self.motion.shape[-1]
            there = set(motion.ids(POOLED_VIEWS)) if POOLED_VIEWS in motion.features else set()
            augmented = [video for video in ids if video in there]
            place = {video: i for i, video in enumerate(augmented)}
            self._augmented = np.array([place.get(video, -1) for video in ids], np.int64)
            if augmented:
                self.views = self._pooled(motion, POOLED_VIEWS, augmented, VIEW_SEGMENTS)
                self._views_each = len(self.views) // len(augmented)
        self.most_frames = int(self._count.max()) if config.frames == "all" else 1
        self.sizes = (motion_size, self.images.shape[-1])

    def sample(self, videos: Ints, rng: np.random.Generator) -> ClipFeatures:
        """What training sees of videos (positions): one random motion row from each of ``segments`` parts."""
        chosen = rng.integers(self._count[videos]) if self.config.frames == "random" else None
        images = self._images(videos, chosen)
        if self.pictures is not None:
            return ClipFeatures(self.pictures.random(videos, self.config.segments, rng), *images)
        if self.motion is None:
            return ClipFeatures(None, *images)
        rows, at = self.motion, videos
        if self.views is not None and (self._augmented[videos] >= 0).all():
            rows = self.views
            at = self._augmented[videos] * self._views_each + rng.integers(self._views_each, size=len(videos))
        parts = np.array_split(np.arange(rows.shape[1]), min(self.config.segments, rows.shape[1]))
        drawn = np.stack([rng.choice(part, len(videos)) for part in parts], 1)
        return ClipFeatures(rows[self._to(at)[:, None], self._to(drawn)].float(), *images)

    def whole(self, videos: Ints, pictures: int = POOLED_SEGMENTS) -> ClipFeatures:
        """What evaluation sees of videos: every row of the plain view, or their mean where that is the same; or so many
        pictures.
        """
        images = self._images(videos, self._own[videos])
        if self.pictures is not None:
            return ClipFeatures(self.pictures.middle(videos, pictures), *images)
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

    def together(self, videos: Ints) -> list[Ints]:
        """Videos in parts that go through a model at once."""
        most = _TOGETHER if self.pictures is None else _PICTURES_TOGETHER
        return np.split(videos, range(most, len(videos), most))

    def _to(self, values: Ints) -> torch.Tensor:
        return torch.from_numpy(values).to(self.device)


def relative(config: FusionConfig, out: str | Path) -> FusionConfig:
    """As a run at ``out`` keeps it: both can move together, and evaluation may start in another directory."""
    motion, text = (
        None if run is None else os.path.relpath(run, out) for run in (config.motion_run, config.zeroshot_run)
    )
    return replace(config, motion_run=motion, zeroshot_run=text)


def _sources(store: Store, config: FusionConfig) -> Sources:
    image = store.resolve(config.feature)
    if store.features[image].kind != "embedding":
        raise RunError(f"{image} is not an image embedding; name one with its full name, embedding-…")
    if config.motion_run is None:
        return Sources(image)
    run = load_run(config.motion_run, kind="tsn")
    if not run.finished:
        raise RunError(f"the motion run {run.path} is unfinished; train it again")
    if not config.strict_reference:
        return Sources(image, open_store(run.path / FEATURES))
    tsn = configured(TSNConfig, "tsn", None, **run.config)
    (feature,) = run.features
    run.check_features(store)
    return Sources(image, None, load_motion(run), feature, tsn.augmentation)


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


def _predict(model: nn.Module, features: Features, videos: Ints) -> torch.Tensor:
    model.eval()
    with torch.inference_mode():
        return torch.cat([model(features.whole(some)) for some in features.together(videos)])
