"""Training and testing MV-TSN, an image backbone that reads motion vectors (MoCLIP-Lite, arXiv 2509.17084, after CoViAR
and TSN).

Accumulated motion vectors of a few segments of a clip go through one network; the segments' logits are
averaged.
"""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from moclip.errors import EncoderError, RunError
from moclip.pipeline.backbones import timm_backbone
from moclip.pipeline.learn.card import tsn_card
from moclip.pipeline.learn.clips import Split, read_labelled, read_split
from moclip.pipeline.learn.data import (
    Ints,
    Motion,
    batched,
    choose_device,
    middle_indices,
    prefetch,
    random_indices,
    shuffled,
)
from moclip.pipeline.learn.fit import Batch, OnEpoch, OnStep, fit, seeded
from moclip.pipeline.learn.metrics import Evaluation, by_name, score
from moclip.pipeline.learn.network import MotionTSN, stem_of
from moclip.pipeline.learn.pooled import POOLED_SEGMENTS, Augmented, pool, write_pooled
from moclip.pipeline.learn.published import long_enough, segment_views, without_short
from moclip.pipeline.learn.recipes import configured
from moclip.pipeline.learn.run_writer import RunWriter, TrainResult
from moclip.pipeline.learn.runs import FEATURES, MOTION_KINDS, Run, load_weights
from moclip.pipeline.learn.training import Training
from moclip.pipeline.learn.views import BASE, Augmentation, fixed_views, random_views
from moclip.pipeline.weights import hash_weights
from moclip.store import Store, open_store

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TSNConfig(Training):
    """How to train an MV-TSN.

    ``weights`` initialise the backbone: None fetches ImageNet's by name, a path reads a file, ``none`` starts from
    random numbers, and then every layer learns at the full rate; else the stem and the BatchNorm of the data learn at
    ``stem_rate`` of it, and the rest of the backbone at ``backbone_rate``. ``resize`` are the sides that frames
    are squashed to before a random crop is taken, in pixels for an input of 224; they scale with ``input_size``.
    ``mirror`` shows half of the training
    clips mirrored; turn it off where left and right tell classes apart. ``views`` augmented views of each training
    clip are pooled into the run, for fusion to train on.
    """

    feature: str = "motion-accumulated"
    backbone: str = "timm:efficientnet_b0"
    weights: str | None = None
    input_size: int = 160
    resize: tuple[int, ...] = (224, 256, 299)
    mirror: bool = True
    segments: int = 3
    stem_rate: float = 0.1
    backbone_rate: float = 0.01
    views: int = 4
    batch: int = 24
    epochs: int = 30
    lr: float = 0.01
    lr_drops: tuple[float, ...] = (0.8,)

    def __post_init__(self) -> None:
        super().__post_init__()
        library, _, model = self.backbone.partition(":")
        if library != "timm" or not model:
            raise RunError(f"no backbone {self.backbone!r}; expected timm:<model>, such as timm:efficientnet_b0")
        if model.startswith("hf-hub:"):
            raise RunError(
                f"{self.backbone} is fetched from a hub whenever the run is read; name a model of timm's own"
            )
        for name in ("input_size", "segments", "stem_rate", "backbone_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise RunError(f"{name} is {getattr(self, name)}; it must be positive")
        if not self.resize or min(self.resize) < BASE:
            raise RunError(f"resize is {self.resize}; crops need sides of {BASE} at least")
        if self.views < 0:
            raise RunError(f"views is {self.views}; it must not be negative")

    @property
    def augmentation(self) -> Augmentation:
        return Augmentation(self.input_size, self.resize, self.mirror)

    def augmented(self, clips: int) -> Augmented | None:
        """The views to pool of so many training clips; the published fusion looks at clips itself."""
        if not self.views or self.strict_reference:
            return None
        return Augmented(clips, self.views, self.seed, self.augmentation)

    @property
    def model(self) -> str:
        """The backbone, by timm's name."""
        return self.backbone.partition(":")[2]

    @property
    def from_scratch(self) -> bool:
        return self.weights == "none"


def train_tsn(
    store_path: str | Path,
    out: str | Path,
    config: TSNConfig,
    *,
    on_epoch: OnEpoch = lambda _: None,
    on_step: OnStep = lambda *_: None,
) -> TrainResult:
    """Train an MV-TSN on a store's motion, pool its features into the run, and test it (25 segments, centre).

    ``out`` becomes the run; an unfinished one of the same configuration is gone on with. Raises :class:`RunError`,
    :class:`FeatureError` or :class:`EncoderError`.
    """
    device = choose_device(config.device)
    store = open_store(store_path)
    feature = store.resolve(config.feature)
    strict = config.strict_reference
    split = read_split(store, config.split, features=[] if strict else [feature], val_fraction=config.val_fraction)
    if strict:
        split = without_short(split, store, feature, config.segments, POOLED_SEGMENTS)
    specs = {feature: store.features[feature]}
    with seeded(config.seed, deterministic=config.deterministic):
        model = MotionTSN(_backbone(config), len(split.classes)).to(device)
        try:
            card = tsn_card(model.eval(), config.input_size, POOLED_SEGMENTS)
        except (AssertionError, RuntimeError, ValueError) as error:
            raise RunError(
                f"{config.backbone} takes no pictures of {config.input_size} px ({error}); give another --input-size"
            ) from error
        with RunWriter(out, "tsn", as_saved(config, store), split, specs) as writer:
            motion = Motion(store, feature, split.every.ids, device, missing_as_zeros=strict)
            batches = _Batches(motion, split, config)
            fitted = fit(
                model,
                torch.optim.Adam(_parameter_groups(model, config), eps=1e-3),
                config,
                train=batches.train,
                val=batches.val if len(batches.selection) else None,
                keeper=writer,
                on_epoch=on_epoch,
                on_step=on_step,
            )
            pooled = write_pooled(
                writer.new_folder(FEATURES),
                model.features,
                motion,
                size=config.input_size,
                augmented=config.augmented(len(split.train)),
                weights_sha256=hash_weights(model.state_dict()),
                on_clips=lambda n: on_step(config.epochs, f"pooling, {n} clips"),
            )
            logits = _classify(model, pooled[-len(split.test) :])
            test = score(
                logits,
                split.test,
                split.classes,
                split=split.name,
                protocol=f"{POOLED_SEGMENTS}x1",
                missing=split.missing,
            )
            return writer.finish(fitted, test, card)


def as_saved(config: TSNConfig, store: Store) -> TSNConfig:
    """As a run keeps it: the feature by its full name."""
    return replace(config, feature=store.resolve(config.feature))


def evaluate_tsn(run: Run, store: Store, split: str, *, segments: int, crops: int, device: str) -> Evaluation:
    """Test a run on the test side of a split with ``segments`` segments and ``crops`` (:data:`CROPS`) crops of each."""
    feature = run.feature(*MOTION_KINDS)
    run.check_features(store)
    config = configured(TSNConfig, "tsn", None, **run.config)
    strict = config.strict_reference
    found, names, missing = read_labelled(store, split, feature=None if strict else feature)
    if strict:
        found, short = long_enough(found, store, feature, segments)
        missing |= short
    if not len(found):
        why = ", ".join(f"{reason} {n}" for reason, n in missing.items())
        raise RunError(
            f"no test clip of split {split!r} has {feature} to test ({why}); extract it, or take another split"
        )
    clips = by_name(found, names, run.classes)
    model = load_motion(run).eval().to(choose_device(device))
    motion = Motion(store, feature, clips.ids, choose_device(device), missing_as_zeros=strict)
    views = pool(model.features, motion, config.input_size, segments, crops, strict_reference=strict)
    pooled = [rows.mean(1) for _, _, rows in views]
    logits = _classify(model, torch.cat(pooled))
    protocol = f"{segments}x{crops}"
    return score(logits, clips, run.classes, split=split, protocol=protocol, missing=missing)


class _Batches:
    """Training and validation batches; a batch is a function of seed, epoch and place alone."""

    def __init__(self, motion: Motion, split: Split, config: TSNConfig) -> None:
        self.motion, self.config = motion, config
        self.targets = torch.from_numpy(split.every.targets).to(motion.device)
        self.n_train = len(split.train)
        _, val, test = split.positions
        #: The clips that the epoch is chosen by; as published, those of test.
        self.selection = test if config.strict_reference else val

    def train(self, epoch: int) -> Iterator[Batch]:
        config, motion = self.config, self.motion
        rng = np.random.default_rng([config.seed, epoch])

        def fetch(videos: Ints) -> Any:
            frames = random_indices(motion.frames[videos], config.segments, rng)
            frames = motion.before_i_frames(videos, frames)
            if not config.strict_reference:
                return videos, motion.fetch(videos, frames), random_views(len(videos), config.augmentation, rng)
            each, views = segment_views(videos, config.segments, config.augmentation, rng)
            return videos, motion.fetch(each, frames.reshape(-1, 1)), views

        for videos, parts, views in prefetch(shuffled(self.n_train, config.batch, rng), fetch):
            images = motion.prepared(parts, views, config.input_size, mirror_bytes=config.strict_reference)
            yield images.view(len(videos), config.segments, *images.shape[2:]), self._targets(videos)

    def val(self) -> Iterator[Batch]:
        """The clips that judge, as many test segments as in training, centre crop."""
        config, motion = self.config, self.motion

        def fetch(videos: Ints) -> Any:
            frames = middle_indices(motion.frames[videos], config.segments)
            return videos, motion.fetch(videos, motion.before_i_frames(videos, frames))

        for videos, parts in prefetch(batched(self.selection, config.batch), fetch):
            views = fixed_views(len(videos), config.input_size)
            yield motion.prepared(parts, views, config.input_size), self._targets(videos)

    def _targets(self, videos: Ints) -> torch.Tensor:
        return self.targets[torch.from_numpy(videos).to(self.targets.device)]


def load_motion(run: Run) -> MotionTSN:
    """The network of a run of kind tsn, with its weights, on the CPU."""
    config = configured(TSNConfig, "tsn", None, **run.config)
    model = MotionTSN(timm_backbone(config.model, pretrained=False), len(run.classes))
    load_weights(model, run)
    return model


def _backbone(config: TSNConfig) -> nn.Module:
    model = config.model
    file = None if config.from_scratch else config.weights
    try:
        backbone: nn.Module = timm_backbone(model, file, pretrained=not config.from_scratch)
    except EncoderError as error:
        raise EncoderError(str(error).replace("--encoder none", "--weights none to train from scratch")) from error
    return backbone


def _parameter_groups(model: MotionTSN, config: TSNConfig) -> list[dict[str, Any]]:
    """The recipe's learning rates: the classifier at ``lr``, stem and data BatchNorm and the rest at shares of it.

    Biases and the weights of normalisation do not decay. The published code computes as much and then lets everything
    decay.
    """
    near = {id(p) for p in (*stem_of(model.backbone).parameters(), *model.data_bn.parameters())}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        share = config.stem_rate if id(parameter) in near else config.backbone_rate
        if name.startswith("classifier.") or config.from_scratch:
            share = 1.0
        decays = config.strict_reference or parameter.ndim > 1
        groups.setdefault((config.lr * share, config.weight_decay * decays), []).append(parameter)
    # The classifier's comes first: its rate is the one that is reported.
    return [
        {"params": parameters, "lr": lr, "weight_decay": decay}
        for (lr, decay), parameters in sorted(groups.items(), key=lambda group: group[0], reverse=True)
    ]


def _classify(model: MotionTSN, pooled: torch.Tensor) -> torch.Tensor:
    device = model.classifier.weight.device
    with torch.inference_mode():
        logits: torch.Tensor = model.classifier(pooled.to(device))
    return logits
