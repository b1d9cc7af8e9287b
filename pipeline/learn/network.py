"""MV-TSN's network: a convolutional network on motion vectors (MoCLIP-Lite, arXiv 2509.17084; TSN, 1608.00859)."""

from typing import Any

import torch
from torch import nn

from moclip.errors import EncoderError


class MotionTSN(nn.Module):
    """BatchNorm of the two motion channels, a 2-channel timm backbone, a linear classifier."""

    def __init__(self, backbone: nn.Module, classes: int) -> None:
        super().__init__()
        self.data_bn = nn.BatchNorm2d(2)
        self.backbone = backbone
        _make_two_channel(stem_of(backbone))
        # Depthwise convolutions are about twice as fast in this layout, on CPUs and GPUs alike.
        self.to(memory_format=torch.channels_last)
        #: D, the size of the pooled features: some of timm's families widen them in the head.
        self.width = int(getattr(backbone, "head_hidden_size", None) or backbone.num_features)  # type: ignore[arg-type]
        self.classifier = nn.Linear(self.width, classes)
        nn.init.normal_(self.classifier.weight, std=0.001)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        """(n, segments, 2, S, S) to logits (n, classes), averaged over segments."""
        features = self.features(clips.flatten(0, 1)).view(*clips.shape[:2], -1)
        logits: torch.Tensor = self.classifier(features.mean(1))
        return logits

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """(n, 2, S, S) to the backbone's pooled features (n, D)."""
        laid_out = images.contiguous(memory_format=torch.channels_last)
        pooled: torch.Tensor = self.backbone(self.data_bn(laid_out))
        return pooled


def stem_of(backbone: Any) -> nn.Conv2d:
    """A timm backbone's first convolution."""
    first = backbone.pretrained_cfg.get("first_conv")
    stem = backbone.get_submodule(first) if isinstance(first, str) else None
    if not isinstance(stem, nn.Conv2d):
        raise EncoderError("this backbone has no single first convolution to feed motion into; choose another")
    return stem


def _make_two_channel(stem: nn.Conv2d) -> None:
    """Both motion channels start from the mean of the three colour filters."""
    with torch.no_grad():
        mean = stem.weight.mean(1, keepdim=True).repeat(1, 2, 1, 1)
    stem.weight = nn.Parameter(mean)
    stem.in_channels = 2
