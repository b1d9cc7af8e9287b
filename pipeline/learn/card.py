"""A model's card: parameters, and multiply-accumulates a clip, by part.

They are counted by torch's flop counter on tensors without data. Fused attention is turned off for it, because the
counter does not see into that.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moclip.pipeline.backbones import image_tower, timm_backbone
from moclip.pipeline.learn.heads import ClipFeatures, make_head

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """One network of a model, which runs ``times`` for each clip, with ``macs`` multiply-accumulates each time."""

    name: str
    parameters: int
    trainable: int
    times: int
    macs: int


@dataclass(frozen=True)
class ModelCard:
    """``unknown`` names what could not be counted: an encoder that this machine's libraries do not have."""

    parts: tuple[Part, ...]
    unknown: tuple[str, ...] = ()

    @property
    def trainable(self) -> int:
        return sum(part.trainable for part in self.parts)

    @property
    def parameters(self) -> int:
        return sum(part.parameters for part in self.parts)

    @property
    def gmac(self) -> float:
        """Giga multiply-accumulates (10⁹) a clip."""
        return sum(part.times * part.macs for part in self.parts) / 1e9

    def lines(self) -> list[str]:
        """The card as lines of text."""
        shares = [f"{part.times} × {part.name} {part.macs / 1e9:.3g}" for part in self.parts]
        unknown = "".join(f"; without {name}, which is not known here" for name in self.unknown)
        return [
            f"parameters: {self.trainable:,} trainable of {self.parameters:,}",
            f"GMAC a clip: {self.gmac:.3g} = {' + '.join(shares)}{unknown}",
        ]


def tsn_card(model: nn.Module, size: int, segments: int) -> ModelCard:
    """An MV-TSN's card, for a test of ``segments`` segments with one crop each."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    images = torch.zeros((1, 1, 2, size, size), device=next(model.parameters()).device)
    macs = count_macs(lambda: model(images))
    return ModelCard((Part("MV-TSN", _parameters(model), trainable, segments, macs),))


def head_card(
    head: str,
    sizes: tuple[int, int],
    classes: int,
    *,
    encoder: str,
    frames: int,
    motion: tuple[str, int, int] | None,
) -> ModelCard:
    """The card of a fusion, or a probe, with the frozen networks that its features came from.

    ``sizes`` are those of the features, ``encoder`` made the images, of which a clip has ``frames``; ``motion`` is the
    MV-TSN's timm model, its input size and its segments a clip.
    """
    parts: list[Part] = []
    unknown: list[str] = []

    def frozen(name: str, network: Callable[[], tuple[nn.Module, int]], channels: int, times: int) -> None:
        try:
            tower, size = network()
            image = torch.zeros((1, channels, size, size), device="meta")
            macs = count_macs(lambda: tower.eval()(image))
        except Exception:  # some networks need what is not installed; a training must not fail by its card
            log.info("%s is not counted", name, exc_info=True)
            unknown.append(name)
        else:
            parts.append(Part(name, _parameters(tower), 0, times, macs))

    if motion:
        frozen("MV-TSN", lambda: (_on_meta(motion[0]), motion[1]), 2, motion[2])
    frozen(encoder, lambda: image_tower(encoder), 3, frames)
    with torch.device("meta"):
        made = make_head(head, *sizes, classes)
        seen = ClipFeatures(
            torch.zeros((1, motion[2], sizes[0])) if motion else None,
            torch.zeros((1, frames, sizes[1])),
            torch.ones((1, frames), dtype=torch.bool),
            torch.zeros((1, frames)),
        )
    trained = _parameters(made)
    parts.append(Part(head, trained, trained, 1, count_macs(lambda: made(seen))))
    return ModelCard(tuple(parts), tuple(unknown))


def count_macs(call: Callable[[], Any]) -> int:
    """Multiply-accumulates of convolutions and matrix products in ``call``."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            call()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return int(counter.get_total_flops()) // 2


def _on_meta(model: str) -> nn.Module:
    """The backbone on torch's ``meta`` device; the BatchNorm of its data and its classifier are not counted."""
    with torch.device("meta"):
        network: nn.Module = timm_backbone(model, pretrained=False, in_chans=2)
    return network


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
