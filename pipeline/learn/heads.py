"""Heads on frozen features: a clip's pooled motion and its image embeddings in, a score for each class out.

Every head has fewer than two million parameters for 101 classes (``tests/test_heads.py``).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import normalize

from moclip.errors import RunError

_HIDDEN = 512
#: The width of the heads that first bring motion and images to one size.
_WIDTH = 256
_ATTENTION_HEADS = 4


@dataclass(frozen=True)
class ClipFeatures:
    """Features of n clips. ``motion`` is (n, segments, D), or None without motion; ``images`` is (n, frames, E).

    A clip with fewer frames than others is filled up; ``there`` (n, frames) tells. ``position`` (n, frames) is where
    in the clip's frames each one lies, in [0, 1].
    """

    motion: torch.Tensor | None
    images: torch.Tensor
    there: torch.Tensor
    position: torch.Tensor

    def mean_image(self) -> torch.Tensor:
        """(n, E)."""
        if self.images.shape[1] == 1:
            return self.images[:, 0]
        there = self.there[..., None]
        return (self.images * there).sum(1) / there.sum(1)

    def means(self) -> list[torch.Tensor]:
        """The mean motion, where there is motion, and the mean image."""
        return [*([] if self.motion is None else [self.motion.mean(1)]), self.mean_image()]


class Concatenation(nn.Sequential):
    """Mean motion and mean image side by side, then the layers."""

    def forward(self, clips: ClipFeatures) -> torch.Tensor:
        scores: torch.Tensor = super().forward(torch.cat(clips.means(), 1))  # type: ignore[no-untyped-call]
        return scores


def linear(motion: int, image: int, classes: int) -> Concatenation:
    return Concatenation(nn.Linear(motion + image, classes))


def mlp(motion: int, image: int, classes: int) -> Concatenation:
    """MoCLIP-Lite's (arXiv 2509.17084): Linear 512, ReLU, Dropout 0.5, Linear."""
    return Concatenation(nn.Linear(motion + image, _HIDDEN), nn.ReLU(), nn.Dropout(0.5), nn.Linear(_HIDDEN, classes))


class Gated(nn.Module):
    """A gated multimodal unit (arXiv 1702.01992): how much motion and image count, channel by channel."""

    def __init__(self, motion: int, image: int, classes: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(motion), nn.LayerNorm(image)])
        self.motion, self.image = nn.Linear(motion, _WIDTH), nn.Linear(image, _WIDTH)
        self.gate = nn.Linear(motion + image, _WIDTH)
        self.classifier = nn.Sequential(nn.Dropout(0.5), nn.Linear(_WIDTH, classes))

    def forward(self, clips: ClipFeatures) -> torch.Tensor:
        motion, image = (norm(mean) for norm, mean in zip(self.norms, clips.means(), strict=True))
        share = torch.sigmoid(self.gate(torch.cat([motion, image], 1)))
        mixed = share * torch.tanh(self.motion(motion)) + (1 - share) * torch.tanh(self.image(image))
        scores: torch.Tensor = self.classifier(mixed)
        return scores


class Attention(nn.Module):
    """One transformer layer over the frames, with codes of their positions, and the mean motion, where there is any."""

    def __init__(self, motion: int, image: int, classes: int) -> None:
        super().__init__()
        self.image = _to_width(image)
        self.motion = _to_width(motion) if motion else None
        self.start = nn.Parameter(torch.zeros(_WIDTH))
        self.layer = nn.TransformerEncoderLayer(
            _WIDTH, _ATTENTION_HEADS, 2 * _WIDTH, dropout=0.1, batch_first=True, norm_first=True
        )
        self.classifier = nn.Sequential(nn.LayerNorm(_WIDTH), nn.Dropout(0.5), nn.Linear(_WIDTH, classes))

    def forward(self, clips: ClipFeatures) -> torch.Tensor:
        images = self.image(clips.images) + positional_encoding(clips.position)
        always = torch.ones_like(clips.there[:, :1])
        tokens, there = [self.start.expand(len(images), 1, -1), images], [always, clips.there]
        if self.motion is not None and clips.motion is not None:
            tokens.append(self.motion(clips.motion.mean(1, keepdim=True)))
            there.append(always)
        mixed = self.layer(torch.cat(tokens, 1), src_key_padding_mask=~torch.cat(there, 1))
        scores: torch.Tensor = self.classifier(mixed[:, 0])
        return scores


class CrossAttention(nn.Module):
    """Motion segments look at the frames, frames at the motion segments; the means of both are classified."""

    def __init__(self, motion: int, image: int, classes: int) -> None:
        super().__init__()
        self.motion, self.image = _to_width(motion), _to_width(image)
        self.at_images, self.at_motion = (
            nn.MultiheadAttention(_WIDTH, _ATTENTION_HEADS, batch_first=True) for _ in range(2)
        )
        self.classifier = nn.Sequential(nn.LayerNorm(2 * _WIDTH), nn.Dropout(0.5), nn.Linear(2 * _WIDTH, classes))

    def forward(self, clips: ClipFeatures) -> torch.Tensor:
        motion, images = self.motion(clips.motion), self.image(clips.images) + positional_encoding(clips.position)
        seen_by_motion, _ = self.at_images(motion, images, images, key_padding_mask=~clips.there, need_weights=False)
        seen_by_images, _ = self.at_motion(images, motion, motion, need_weights=False)
        there = clips.there[..., None]
        of_images = ((images + seen_by_images) * there).sum(1) / there.sum(1)
        scores: torch.Tensor = self.classifier(torch.cat([(motion + seen_by_motion).mean(1), of_images], 1))
        return scores


class WithZeroShot(nn.Module):
    """A head whose scores are added to those of CLIP's zero-shot classification: 100 times the cosine of the mean image
    and each class's ``text`` (classes, E), unit vectors.
    """

    text: torch.Tensor

    def __init__(self, head: nn.Module, text: torch.Tensor) -> None:
        super().__init__()
        self.head = head
        self.register_buffer("text", text)

    def forward(self, clips: ClipFeatures) -> torch.Tensor:
        scores: torch.Tensor = self.head(clips)
        with torch.autocast(scores.device.type, enabled=False):  # bfloat16 has eighths at such a size
            return scores.float() + 100 * normalize(clips.mean_image().float(), dim=-1) @ self.text.T


HEADS: dict[str, Any] = {
    "mlp": mlp,
    "linear": linear,
    "gated": Gated,
    "attention": Attention,
    "cross-attention": CrossAttention,
}
#: Heads that mix the two, and so need both.
_MIXING = ("gated", "cross-attention")
#: Heads to which a clip's segments of motion are more than their mean.
READS_SEGMENTS = ("cross-attention",)


def make_head(name: str, motion: int, image: int, classes: int) -> nn.Module:
    """A head for features of these sizes; ``motion`` is 0 without motion. :class:`RunError` for one that cannot be."""
    if name not in HEADS:
        raise RunError(f"no head {name!r}; there are: {', '.join(HEADS)}")
    if not motion and name in _MIXING:
        left = ", ".join(other for other in HEADS if other not in _MIXING)
        raise RunError(f"the head {name} mixes motion into images, and a probe has no motion; choose {left}")
    head: nn.Module = HEADS[name](motion, image, classes)
    return head


def positional_encoding(position: torch.Tensor) -> torch.Tensor:
    """Sines and cosines of positions in [0, 1] (arXiv 1706.03762), (…, 256): from half a wave over the clip to 64."""
    waves = torch.pi * 2 ** torch.linspace(0, 7, _WIDTH // 2, device=position.device)
    angles = position[..., None] * waves
    return torch.cat([angles.sin(), angles.cos()], -1)


def _to_width(size: int) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(size), nn.Linear(size, _WIDTH))
