"""Model cards: the paper's figures, and a count by hand."""

import pytest
import torch
from torch import nn

from moclip.errors import EncoderError
from moclip.pipeline.backbones import image_tower, timm_backbone
from moclip.pipeline.learn.card import count_macs, head_card, tsn_card
from moclip.pipeline.learn.network import MotionTSN

CLIP = "open_clip:ViT-B-32-quickgelu/openai"


def test_the_papers_model_at_32_segments() -> None:
    card = head_card("mlp", (1280, 512), 101, encoder=CLIP, frames=1, motion=("efficientnet_b0", 224, 32))
    assert card.trainable == 969_829
    assert round(card.gmac, 1) == 16.6
    assert [round(part.macs / 1e9, 2) for part in card.parts] == [0.38, 4.41, 0.0]
    assert card.lines()[0].startswith("parameters: 969,829 trainable of 92,")
    assert card.lines()[1].startswith("GMAC a clip: 16.6 = 32 × MV-TSN 0.381 + 1 × open_clip:ViT-B-32-quickgelu/openai")


def test_a_motion_network_trains_whole() -> None:
    model = MotionTSN(timm_backbone("test_efficientnet", pretrained=False), 5)
    card = tsn_card(model.eval(), 64, 25)
    (part,) = card.parts
    assert part.parameters == part.trainable == sum(p.numel() for p in model.parameters())
    assert part.times == 25
    assert card.gmac == pytest.approx(25 * part.macs / 1e9)


def test_attention_is_counted_by_hand() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    tokens = torch.zeros(1, 5, 8)
    projections, scores = 4 * 5 * 8 * 8, 2 * 5 * 5 * 8
    assert count_macs(lambda: attention(tokens, tokens, tokens, need_weights=False)) == projections + scores


def test_an_encoder_that_is_not_known_is_named() -> None:
    card = head_card("linear", (0, 16), 4, encoder="timm:invented", frames=2, motion=None)
    assert (card.parameters, card.trainable, card.unknown) == (68, 68, ("timm:invented",))
    assert card.lines()[1].endswith("without timm:invented, which is not known here")
    with pytest.raises(EncoderError):
        image_tower("open_clip:nothing/openai")
