"""Training and testing a fusion of motion and image, and the image-only probe that controls it (MoCLIP-Lite, arXiv
2509.17084).

Both are one small network on frozen features: the motion side's come pooled from an MV-TSN's run, the image side's from
the store. No convolutional network runs here, but with ``strict_reference`` and where a test asks for other segments.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from moclip.errors import RunError
from moclip.pipeline.learn.clips import Clips, Split, read_labelled, read_split
from moclip.pipeline.learn.data import choose_device, shuffled
from moclip.pipeline.learn.fit import Batch, OnEpoch, OnStep, fit, one_thread, seeded
from moclip.pipeline.learn.fusion_model import (
    FusionConfig,
    card_of,
    evaluation_batches,
    features_of,
    model_of,
    pooled_of,
    predict,
    predict_at,
    sources_of,
)
from moclip.pipeline.learn.metrics import Evaluation, by_name, score
from moclip.pipeline.learn.pooled import POOLED, POOLED_SEGMENTS
from moclip.pipeline.learn.published import long_enough, without_short
from moclip.pipeline.learn.recipes import configured
from moclip.pipeline.learn.run_writer import RunWriter, TrainResult
from moclip.pipeline.learn.runs import Run, load_run, load_weights
from moclip.pipeline.learn.zeroshot import text_of
from moclip.store import Store, open_store


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


def evaluate_head(
    run: Run, store: Store, split: str, *, protocol: tuple[int, int] | None = None, device: str = "auto"
) -> Evaluation:
    """Test a fusion or a probe on the test side of a split, by what the motion run has pooled.

    With ``protocol``, segments and crops (:data:`CROPS`), the motion network looks at so many instead.
    """
    config = configured(FusionConfig, run.kind, None, **{**run.config, "feature": run.feature("embedding")})
    if config.motion_run is not None:
        config = replace(config, motion_run=str((run.path / config.motion_run).resolve()))
    strict = config.strict_reference
    run.check_features(store, *([] if strict else pooled_of(config)))
    sources = sources_of(store, config, network=strict or protocol is not None)
    found, names, missing = read_labelled(store, split, feature=None if strict else sources.image)
    if sources.pooled is not None:
        found, missing = _only(found, missing, sources.pooled.ids(POOLED), "not in the motion run")
    elif sources.network is not None and strict:
        found, short = long_enough(found, store, sources.motion, protocol[0] if protocol else POOLED_SEGMENTS)
        missing |= short
    elif sources.network is not None:
        found, missing = _only(found, missing, store.ids(sources.motion), f"without {sources.motion}")
    if not len(found):
        raise RunError(f"no test clip of split {split!r} has the features that {run.path} needs; extract them")
    clips, chosen = by_name(found, names, run.classes), choose_device(device)
    features = features_of(store, sources, clips.ids, (), config, chosen)
    text = torch.zeros((len(run.classes), features.sizes[1])) if config.zeroshot_run else None
    model = model_of(config, features.sizes, len(run.classes), sources, text)
    load_weights(model, run)
    model.to(chosen)
    if protocol is None:
        logits = predict(model, features, sources, np.arange(len(clips)))
    else:
        logits = predict_at(model, features, sources, *protocol)
    name = "pooled" if protocol is None else f"{protocol[0]}x{protocol[1]}"
    return score(logits, clips, run.classes, split=split, protocol=name, missing=missing)


def _train(
    kind: str, store: Store, out: str | Path, config: FusionConfig, on_epoch: OnEpoch, on_step: OnStep
) -> TrainResult:
    strict = config.strict_reference
    sources = sources_of(store, config, network=strict)
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
        split = without_short(split, store, sources.motion, config.segments, POOLED_SEGMENTS)
        specs[sources.motion] = store.features[sources.motion]
    device = choose_device(config.device)
    features = features_of(store, sources, split.every.ids, split.train.ids, config, device)
    text = None
    if config.zeroshot_run is not None:
        text = text_of(load_run(config.zeroshot_run, kind="zeroshot"), store, sources.image, split.classes)
    card = card_of(config, store, sources, features, len(split.classes))
    targets = torch.from_numpy(split.every.targets).to(device)
    _, held_out, tested = split.positions
    selection = tested if strict else held_out  # as published, the epoch is chosen on test

    def train(epoch: int) -> Iterator[Batch]:
        rng = np.random.default_rng([config.seed, epoch])
        for videos in shuffled(len(split.train), config.batch, rng):
            yield features.sample(videos, rng), targets[torch.from_numpy(videos).to(device)]

    def val() -> Iterator[Batch]:
        for some in evaluation_batches(selection, sources):
            yield features.whole(some, config.segments), targets[torch.from_numpy(some).to(device)]

    threads = one_thread() if sources.network is None else nullcontext()
    saved = as_saved(config, store, out)
    with (
        RunWriter(out, kind, saved, split, specs) as writer,
        seeded(config.seed, deterministic=config.deterministic),
        threads,
    ):
        model = model_of(config, features.sizes, len(split.classes), sources, text).to(device)
        learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
        fitted = fit(
            model,
            # Fused: on a CPU, the usual way takes more time than the rest of a step.
            torch.optim.AdamW(learning, lr=config.lr, weight_decay=config.weight_decay, fused=True),
            config,
            train=train,
            val=val if len(selection) else None,
            keeper=writer,
            on_epoch=on_epoch,
            on_step=on_step,
        )
        logits = predict(model, features, sources, tested)
        test = score(logits, split.test, split.classes, split=split.name, protocol="pooled", missing=split.missing)
        return writer.finish(fitted, test, card)


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


def _only(clips: Clips, missing: Mapping[str, int], there: Iterable[str], why: str) -> tuple[Clips, dict[str, int]]:
    """The clips that are ``there``; the others are counted as missing."""
    kept = clips.only(set(there))
    lost = len(clips) - len(kept)
    return kept, {**missing, **({why: lost} if lost else {})}


def _split_with_pooled(split: Split, motion: Store) -> Split:
    there = motion.ids(POOLED)
    train, _ = _only(split.train, {}, there, "")
    val, _ = _only(split.val, {}, there, "")
    test, missing = _only(split.test, split.missing, there, "not in the motion run")
    if not len(test) or len(set(train.targets.tolist())) < len(split.classes):
        raise RunError(
            f"the motion run {Path(motion.url).parent} has no features of this split's test clips, "
            "or of all training clips of a class; train it again"
        )
    return replace(split, train=train, val=val, test=test, missing=missing)
