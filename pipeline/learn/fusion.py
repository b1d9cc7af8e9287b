"""Fusion of motion and image, and the image-only probe that controls it (MoCLIP-Lite, arXiv 2509.17084).

Both are one small network on frozen features: the motion side's come pooled from an MV-TSN's run, the image
side's from the store. No convolutional network runs here, but to repeat a defect of the published code.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from moclip.errors import RunError
from moclip.pipeline.learn.card import ModelCard, head_card
from moclip.pipeline.learn.clips import Clips, Split, read_labelled, read_split
from moclip.pipeline.learn.data import Ints, Motion, batched, choose_device, shuffled
from moclip.pipeline.learn.fit import Batch, OnEpoch, OnStep, fit, one_thread, seeded
from moclip.pipeline.learn.frozen import FRAMES, Features, Images, MotionSource, PooledMotion
from moclip.pipeline.learn.heads import HEADS, READS_SEGMENTS, WithZeroShot, make_head
from moclip.pipeline.learn.metrics import Evaluation, by_name, score
from moclip.pipeline.learn.pooled import POOLED, POOLED_SEGMENTS
from moclip.pipeline.learn.published import DriftingFusion, Pictures, long_enough, without_short
from moclip.pipeline.learn.recipes import configured
from moclip.pipeline.learn.runs import FEATURES, MOTION_KINDS, Run, RunWriter, TrainResult, load_run, load_weights
from moclip.pipeline.learn.training import Training
from moclip.pipeline.learn.tsn import MotionTSN, TSNConfig, load_motion
from moclip.pipeline.learn.zeroshot import text_of
from moclip.store import Store, open_store

#: Clips in one forward pass without gradients.
_TOGETHER = 1024
#: The same where each clip is 25 pictures.
_PICTURES_TOGETHER = 8


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
    config = configured(FusionConfig, run.kind, None, **{**run.config, "feature": run.feature("embedding")})
    if config.motion_run is not None:
        config = replace(config, motion_run=str((run.path / config.motion_run).resolve()))
    run.check_features(store, *_pooled_of(config))
    sources = _sources(store, config)
    strict = config.strict_reference
    found, names, missing = read_labelled(store, split, feature=None if strict else sources.image)
    if sources.pooled is not None:
        found, missing = _with_pooled(found, missing, sources.pooled)
    if sources.network is not None:
        found, short = long_enough(found, store, sources.motion_feature, POOLED_SEGMENTS)
        missing |= short
    if not len(found):
        raise RunError(f"no test clip of split {split!r} has the features that {run.path} needs; extract them")
    clips = by_name(found, names, run.classes)
    features = _features(store, sources, clips.ids, (), config, choose_device(device))
    text = torch.zeros((len(run.classes), features.sizes[1])) if config.zeroshot_run else None
    model = _model(config, features, len(run.classes), sources.network, text)
    load_weights(model, run)
    logits = _predict(model.to(features.device), features, np.arange(len(clips)))
    return score(logits, clips, run.classes, split=split, protocol="pooled", missing=missing)


def _train(
    kind: str, store: Store, out: str | Path, config: FusionConfig, on_epoch: OnEpoch, on_step: OnStep
) -> TrainResult:
    sources = _sources(store, config)
    strict = config.strict_reference
    split = read_split(
        store, config.split, features=[] if strict else [sources.image], val_fraction=config.val_fraction
    )
    specs = {sources.image: store.features[sources.image]}
    if sources.run is not None:
        _check_motion_run(sources.run, split, config)
    if sources.pooled is not None:
        split = _split_with_pooled(split, sources.pooled)
        specs[POOLED] = sources.pooled.features[POOLED]
    if sources.network is not None:
        split = without_short(split, store, sources.motion_feature, config.segments, POOLED_SEGMENTS)
        specs[sources.motion_feature] = store.features[sources.motion_feature]
    device = choose_device(config.device)
    features = _features(store, sources, split.every.ids, split.train.ids, config, device)
    text = None
    if config.zeroshot_run is not None:
        text = text_of(load_run(config.zeroshot_run, kind="zeroshot"), store, sources.image, split.classes)
    card = _card(config, store, sources, features, len(split.classes))
    targets = torch.from_numpy(split.every.targets).to(device)
    _, held_out, tested = split.positions
    judges = tested if strict else held_out  # as published, the epoch is chosen on test

    def train(epoch: int) -> Iterator[Batch]:
        rng = np.random.default_rng([config.seed, epoch])
        for videos in shuffled(len(split.train), config.batch, rng):
            yield features.sample(videos, rng), targets[torch.from_numpy(videos).to(device)]

    def val() -> Iterator[Batch]:
        for some in _together(judges, sources.network is not None):
            yield features.whole(some, config.segments), targets[torch.from_numpy(some).to(device)]

    threads = one_thread() if sources.network is None else nullcontext()
    saved = as_saved(config, store, out)
    with (
        RunWriter(out, kind, saved, split, specs) as writer,
        seeded(config.seed, deterministic=config.deterministic),
        threads,
    ):
        model = _model(config, features, len(split.classes), sources.network, text).to(device)
        learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
        fitted = fit(
            model,
            # Fused: on a CPU, the usual way takes more time than the rest of a step.
            torch.optim.AdamW(learning, lr=config.lr, weight_decay=config.weight_decay, fused=True),
            config,
            train=train,
            val=val if len(judges) else None,
            keeper=writer,
            on_epoch=on_epoch,
            on_step=on_step,
        )
        logits = _predict(model, features, tested)
        test = score(logits, split.test, split.classes, split=split.name, protocol="pooled", missing=split.missing)
        return writer.finish(fitted, test, card)


@dataclass(frozen=True)
class _Sources:
    """What a training reads: the full name of the embedding and, for a fusion, an MV-TSN's run with its configuration,
    and its pooled features or (as published) its network.
    """

    image: str
    run: Run | None = None
    tsn: TSNConfig | None = None
    pooled: Store | None = None
    network: MotionTSN | None = None

    @property
    def motion_feature(self) -> str:
        """The feature of the store that the network sees."""
        assert self.run is not None
        return self.run.feature(*MOTION_KINDS)


def _sources(store: Store, config: FusionConfig) -> _Sources:
    image = store.resolve(config.feature)
    if store.features[image].kind != "embedding":
        raise RunError(f"{image} is not an image embedding; name one with its full name, embedding-…")
    if config.motion_run is None:
        return _Sources(image)
    run = load_run(config.motion_run, kind="tsn")
    if not run.finished:
        raise RunError(f"the motion run {run.path} is unfinished; train it again")
    tsn = configured(TSNConfig, "tsn", None, **run.config)
    if not config.strict_reference:
        (pooled,) = _pooled_of(config)
        return _Sources(image, run, tsn, pooled)
    run.check_features(store)
    return _Sources(image, run, tsn, network=load_motion(run))


def _pooled_of(config: FusionConfig) -> list[Store]:
    """The pooled features that a fusion reads: none, or those of one run."""
    if config.motion_run is None or config.strict_reference:
        return []
    path = Path(config.motion_run) / FEATURES
    if not path.exists():
        raise RunError(f"the motion run {config.motion_run} is gone, or has no {FEATURES}; train it again")
    return [open_store(path)]


def _features(
    store: Store,
    sources: _Sources,
    ids: Sequence[str],
    trained: Sequence[str],
    config: FusionConfig,
    device: torch.device,
) -> Features:
    strict, segments = config.strict_reference, config.segments
    images = Images(store, sources.image, ids, device, frames=config.frames, seed=config.seed, missing_as_zeros=strict)
    motion: MotionSource | None = None
    if sources.network is not None and sources.tsn is not None:
        rows = Motion(store, sources.motion_feature, ids, device, missing_as_zeros=True)
        motion = Pictures(rows, sources.tsn.augmentation, segments, sources.network.classifier.in_features)
    elif sources.pooled is not None:
        every_row = config.head in READS_SEGMENTS
        motion = PooledMotion(sources.pooled, ids, trained, device, segments=segments, every_row=every_row)
    return Features(images, motion)


def _model(
    config: FusionConfig, features: Features, classes: int, network: nn.Module | None, text: torch.Tensor | None
) -> nn.Module:
    """The head, with the scores of ``text`` added, and with the motion network in front where that is no constant."""
    model = make_head(config.head, *features.sizes, classes)
    if text is not None:
        model = WithZeroShot(model, text)
    return model if network is None else DriftingFusion(network, model)


def _card(config: FusionConfig, store: Store, sources: _Sources, features: Features, classes: int) -> ModelCard:
    motion = None
    if sources.tsn is not None:
        motion = (sources.tsn.model, sources.tsn.input_size, POOLED_SEGMENTS)
    encoder, frames = str(store.features[sources.image].parameters.get("encoder")), features.images.most_frames
    return head_card(config.head, features.sizes, classes, encoder=encoder, frames=frames, motion=motion)


def as_saved(config: FusionConfig, store: Store, out: str | Path) -> FusionConfig:
    """As a run at ``out`` keeps it: runs relative to it, as all can move together, and the feature by its full name, as
    a store may get another embedding.
    """
    here = os.path.realpath(out)
    motion, text = (
        None if run is None else os.path.relpath(os.path.realpath(run), here)
        for run in (config.motion_run, config.zeroshot_run)
    )
    return replace(config, feature=store.resolve(config.feature), motion_run=motion, zeroshot_run=text)


def _check_motion_run(run: Run, split: Split, config: FusionConfig) -> None:
    """A motion network trained on test clips, or on those held out here, would flatter the fusion."""
    if run.config.get("strict_reference") != config.strict_reference:
        theirs = "with" if run.config.get("strict_reference") else "without"
        raise RunError(f"{run.path} was trained {theirs} strict_reference; train both the same way")
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
    return replace(split, train=train, val=val, test=test, missing=missing)


def _predict(model: nn.Module, features: Features, videos: Ints) -> torch.Tensor:
    model.eval()
    with torch.inference_mode():
        parts = _together(videos, isinstance(model, DriftingFusion))
        return torch.cat([model(features.whole(some)) for some in parts])


def _together(videos: Ints, as_pictures: bool) -> list[Ints]:
    """Videos in parts that go through a model at once."""
    most = _PICTURES_TOGETHER if as_pictures else _TOGETHER
    return batched(videos, most)
