"""Heads: their sizes, and that what is not there does not count."""

import pytest
import torch

from moclip.errors import RunError
from moclip.pipeline.learn.heads import HEADS, ClipFeatures, make_head, positional_encoding

BOTH = list(HEADS)
IMAGES_ALONE = ["mlp", "linear", "attention"]


def features(frames: int = 3, motion: int = 12) -> ClipFeatures:
    torch.manual_seed(0)
    return ClipFeatures(
        torch.randn(2, 5, motion) if motion else None,
        torch.randn(2, frames, 6),
        torch.ones(2, frames, dtype=torch.bool),
        torch.linspace(0, 1, frames).expand(2, frames),
    )


@pytest.mark.parametrize("name", BOTH)
def test_every_head_has_fewer_than_two_million_parameters(name: str) -> None:
    assert sum(p.numel() for p in make_head(name, 1280, 512, 101).parameters()) < 2_000_000


def test_the_papers_head_has_969829_parameters() -> None:
    assert sum(p.numel() for p in make_head("mlp", 1280, 512, 101).parameters()) == 969_829


@pytest.mark.parametrize(("name", "motion"), [*((n, 12) for n in BOTH), *((n, 0) for n in IMAGES_ALONE)])
def test_frames_that_are_not_there_do_not_count(name: str, motion: int) -> None:
    head = make_head(name, motion, 6, 4).eval()
    clips = features(motion=motion)
    filler = torch.full((2, 2, 6), 1e3)
    nowhere = torch.zeros(2, 2, dtype=torch.bool)
    filled = ClipFeatures(
        clips.motion,
        torch.cat([clips.images, filler], 1),
        torch.cat([clips.there, nowhere], 1),
        torch.cat([clips.position, torch.zeros(2, 2)], 1),
    )
    assert head(clips).shape == (2, 4)
    torch.testing.assert_close(head(filled), head(clips), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["attention", "cross-attention"])
def test_the_order_of_frames_counts_where_there_is_attention(name: str) -> None:
    head, clips = make_head(name, 12, 6, 4).eval(), features()
    backwards = ClipFeatures(clips.motion, clips.images.flip(1), clips.there, clips.position)
    assert (head(backwards) - head(clips)).abs().max() > 1e-4
    whole = ClipFeatures(clips.motion, clips.images.flip(1), clips.there, clips.position.flip(1))
    torch.testing.assert_close(head(whole), head(clips), atol=1e-5, rtol=1e-4)


def test_positions_have_codes_of_their_own() -> None:
    codes = positional_encoding(torch.linspace(0, 1, 32))
    distance = torch.cdist(codes, codes) + 100 * torch.eye(32)
    assert distance.min() > 1


def test_heads_that_cannot_be() -> None:
    with pytest.raises(RunError, match="no head 'big'; there are: mlp"):
        make_head("big", 1, 1, 2)
    with pytest.raises(RunError, match="mixes motion into images, and a probe has no motion; choose mlp"):
        make_head("gated", 0, 6, 2)
