"""MV-TSN: an image backbone that reads motion vectors (MoCLIP-Lite, arXiv 2509.17084, after CoViAR and TSN).

Accumulated motion vectors of a few segments of a clip go through one network; the segments' logits are averaged.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from moclip.errors import EncoderError, RunError
from moclip.pipeline.backbones import timm_backbone
from moclip.pipeline.learn.data import Ints, Motion, ahead, choose_device, middle_indices, random_indices, shuffled
from moclip.pipeline.learn.fit import Batch, OnEpoch, fit, seeded
from moclip.pipeline.learn.metrics import Evaluation, by_name, score
from moclip.pipeline.learn.runs import FEATURES, Run, RunWriter, TrainResult
from moclip.pipeline.learn.splits import Split, read_split
from moclip.pipeline.learn.views import fixed_views, random_views
from moclip.store import (
    FeatureSpec,
    ShardWriter,
    SourceFacts,
    Store,
    add_feature,
    create_store,
    open_store,
    publish,
)

log = logging.getLogger(__name__)

#: The pooled features that a fusion is trained on: this many test segments a clip, centre crop.
POOLED_SEGMENTS = 25
POOLED = "mv-tsn"
_SHARD_VIDEOS = 2000
#: Images in one forward pass without gradients.
_IMAGES = 64


@dataclass(frozen=True)
class TSNConfig:
    """How to train an MV-TSN.

    ``weights`` initialise the backbone: None fetches ImageNet's by name, a path reads a file, ``none`` starts from
    random numbers, and then nothing is held back by the recipe's small learning rates for pretrained layers.
    ``val_fraction`` of train is held out to choose the epoch; with 0 the last one is taken.
    """

    split: str
    feature: str = "motion-accumulated"
    backbone: str = "timm:efficientnet_b0"
    weights: str | None = None
    input_size: int = 224
    segments: int = 3
    batch: int = 24
    epochs: int = 30
    lr: float = 0.01
    val_fraction: float = 0.15
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        library, _, model = self.backbone.partition(":")
        if library != "timm" or not model:
            raise RunError(f"no backbone {self.backbone!r}; expected timm:<model>, such as timm:efficientnet_b0")
        for name in ("input_size", "segments", "batch", "epochs", "lr"):
            if getattr(self, name) <= 0:
                raise RunError(f"{name} is {getattr(self, name)}; it must be positive")
        if not 0 <= self.val_fraction < 1:
            raise RunError(f"val_fraction is {self.val_fraction}; it must be at least 0 and below 1")

    @property
    def from_scratch(self) -> bool:
        return self.weights == "none"

    @property
    def milestones(self) -> tuple[int, int]:
        """The recipe's epochs 80 and 160 of 200."""
        return round(0.4 * self.epochs), round(0.8 * self.epochs)


class MotionTSN(nn.Module):
    """BatchNorm of the two motion channels, a 2-channel timm backbone, a linear classifier."""

    def __init__(self, backbone: nn.Module, classes: int) -> None:
        super().__init__()
        self.data_bn = nn.BatchNorm2d(2)
        self.backbone = backbone
        self.stem = _two_channel_stem(backbone)
        self.classifier = nn.Linear(int(getattr(backbone, "num_features", 0)), classes)
        nn.init.normal_(self.classifier.weight, std=0.001)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        """(n, segments, 2, S, S) to logits (n, classes), averaged over segments."""
        features = self.features(clips.flatten(0, 1)).unflatten(0, clips.shape[:2])
        logits: torch.Tensor = self.classifier(features.mean(1))
        return logits

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """(n, 2, S, S) to the backbone's pooled features (n, D)."""
        pooled: torch.Tensor = self.backbone(self.data_bn(images))
        return pooled
