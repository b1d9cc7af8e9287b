"""What a fusion, or a probe, is made of: its configuration, what it reads, and its model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from moclip.errors import RunError
from moclip.pipeline.learn.card import ModelCard, head_card
from moclip.pipeline.learn.data import Ints, Motion, batched
from moclip.pipeline.learn.frozen import FRAMES, Features, ImageEmbeddings, MotionSource, PooledMotion
from moclip.pipeline.learn.heads import HEADS, READS_SEGMENTS, ClipFeatures, WithZeroShot, make_head
from moclip.pipeline.learn.network import MotionTSN
from moclip.pipeline.learn.pooled import POOLED_SEGMENTS, pool
from moclip.pipeline.learn.published import DriftingFusion, Pictures
from moclip.pipeline.learn.recipes import configured
from moclip.pipeline.learn.runs import FEATURES, MOTION_KINDS, Run, load_run
from moclip.pipeline.learn.training import Training
from moclip.pipeline.learn.tsn import TSNConfig, load_motion
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


@dataclass(frozen=True)
class Sources:
    """What a fusion reads: the full name of the embedding and, but for a probe, an MV-TSN's run with its
    configuration, and what is pooled there or the network itself.
    """

    image: str
    run: Run | None = None
    tsn: TSNConfig | None = None
    pooled: Store | None = None
    network: MotionTSN | None = None

    @property
    def motion(self) -> str:
        """The feature of the store that the network sees."""
        assert self.run is not None
        return self.run.feature(*MOTION_KINDS)


def sources_of(store: Store, config: FusionConfig, *, network: bool) -> Sources:
    """The sources that ``config`` names; with ``network``, MV-TSN's network in place of what it pooled."""
    image = store.resolve(config.feature)
    if store.features[image].kind != "embedding":
        raise RunError(f"{image} is not an image embedding; name one with its full name, embedding-…")
    if config.motion_run is None:
        return Sources(image)
    run = load_run(config.motion_run, kind="tsn")
    if not run.finished:
        raise RunError(f"the motion run {run.path} is unfinished; give its command again, and then this one")
    tsn = configured(TSNConfig, "tsn", None, **run.config)
    if network:
        run.check_features(store)
        return Sources(image, run, tsn, network=load_motion(run))
    (pooled,) = pooled_of(config)
    return Sources(image, run, tsn, pooled)


def pooled_of(config: FusionConfig) -> list[Store]:
    """What the motion run has pooled; nothing without one."""
    if config.motion_run is None:
        return []
    path = Path(config.motion_run) / FEATURES
    if not path.exists():
        raise RunError(
            f"the motion run {config.motion_run} is gone, or has no {FEATURES}; put it back, or train it again"
        )
    return [open_store(path)]


def features_of(
    store: Store,
    sources: Sources,
    ids: Sequence[str],
    trained: Sequence[str],
    config: FusionConfig,
    device: torch.device,
) -> Features:
    """What the model sees of clips, of which ``trained`` are trained on."""
    strict = config.strict_reference
    images = ImageEmbeddings(
        store, sources.image, ids, device, frames=config.frames, seed=config.seed, as_published=strict
    )
    motion: MotionSource | None = None
    if sources.network is not None and sources.tsn is not None:
        rows = Motion(store, sources.motion, ids, device, missing_as_zeros=strict)
        motion = Pictures(rows, sources.tsn.augmentation, config.segments, sources.network.width)
    elif sources.pooled is not None:
        every_row = config.head in READS_SEGMENTS
        motion = PooledMotion(sources.pooled, ids, trained, device, segments=config.segments, every_row=every_row)
    return Features(images, motion)


def model_of(
    config: FusionConfig, sizes: tuple[int, int], classes: int, sources: Sources, text: torch.Tensor | None
) -> nn.Module:
    """The head for motion and images of ``sizes``, with the scores of ``text`` added; as published, with the motion
    network in front, for it is no constant there.
    """
    model = make_head(config.head, *sizes, classes)
    if text is not None:
        model = WithZeroShot(model, text)
    if config.strict_reference and sources.network is not None:
        return DriftingFusion(sources.network, model)
    return model


def card_of(config: FusionConfig, store: Store, sources: Sources, features: Features, classes: int) -> ModelCard:
    motion = None
    if sources.tsn is not None:
        motion = (sources.tsn.model, sources.tsn.input_size, POOLED_SEGMENTS)
    encoder, frames = str(store.features[sources.image].parameters.get("encoder")), features.images.most_frames
    return head_card(config.head, features.sizes, classes, encoder=encoder, frames=frames, motion=motion)


def predict(model: nn.Module, features: Features, sources: Sources, videos: Ints) -> torch.Tensor:
    """Logits (n, classes) of videos (positions)."""
    model.eval()
    with torch.inference_mode():
        return torch.cat([model(features.whole(some)) for some in evaluation_batches(videos, sources)])


def predict_at(model: nn.Module, features: Features, sources: Sources, segments: int, crops: int) -> torch.Tensor:
    """Logits (n, classes) of all clips, of which the motion network sees ``segments`` in ``crops`` each.

    Its features are averaged over crops. As published, the network is the model's own.
    """
    pictures, config = features.motion, sources.tsn
    assert isinstance(pictures, Pictures)
    assert config is not None
    assert sources.network is not None
    head, network, strict = model, sources.network, False
    if isinstance(model, DriftingFusion):
        head, network, strict = model.head, model.motion, True
    head.eval()
    network.eval().to(features.device)
    parts = pool(network.features, pictures.motion, config.input_size, segments, crops, strict_reference=strict)
    with torch.inference_mode():
        seen = (ClipFeatures(rows.to(features.device), *features.images.of(videos)) for videos, _, rows in parts)
        return torch.cat([head(clips) for clips in seen])


def evaluation_batches(videos: Ints, sources: Sources) -> list[Ints]:
    """Videos in parts that go through a model at once."""
    return batched(videos, _TOGETHER if sources.network is None else _PICTURES_TOGETHER)
