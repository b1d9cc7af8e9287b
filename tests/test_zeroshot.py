"""Zero-shot: prompts, their ensemble, and refusals where text and image would not meet."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic import CLASSES, corpus, embedding_spec, tiny_clip, write_store

from moclip.errors import RunError
from moclip.pipeline.backbones import Encoder, EncoderConfig, load_encoder
from moclip.pipeline.learn.zeroshot import TEMPLATES, class_embeddings, phrase, zeroshot

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Encoder, Path]:
    name, file = tiny_clip(tmp_path_factory.mktemp("clip"))
    return load_encoder(EncoderConfig(f"open_clip:{name}", str(file))), file


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("HandstandPushups", "handstand pushups"),
        ("YoYo", "yo yo"),
        ("brush_hair", "brush hair"),
        ("Playing Guitar", "playing guitar"),
        ("wave2", "wave2"),
        ("TVShowHost", "tv show host"),
        ("walk-the_DogFast", "walk the dog fast"),
    ],
)
def test_phrases(label: str, words: str) -> None:
    assert phrase(label) == words


def test_twelve_templates_each_with_one_place() -> None:
    assert len(set(TEMPLATES)) == 12
    assert all(template.count("{}") == 1 for template in TEMPLATES)


def test_text_embeddings_are_averaged_and_then_normalised(clip: tuple[Encoder, Path]) -> None:
    encoder = clip[0]
    made = class_embeddings(encoder, ["TaiChi", "YoYo"])
    for row, words in zip(made, ("tai chi", "yo yo"), strict=True):
        mean = encoder.encode_text([template.format(words) for template in TEMPLATES]).mean(0)
        np.testing.assert_allclose(row, mean / np.linalg.norm(mean), atol=1e-5)


def test_clips_get_the_class_they_are_closest_to(clip: tuple[Encoder, Path], tmp_path: Path) -> None:
    encoder, file = clip
    texts = dict(zip(CLASSES, class_embeddings(encoder, CLASSES), strict=True))
    clips = [replace(one, images=2) for one in corpus(6)]
    rows = {one.id: np.stack([3 * texts[str(one.label)]] * 2).astype(np.float16) for one in clips}
    path = write_store(tmp_path / "s.zarr", clips, embedding=encoder.spec("middle"), rows=rows)
    every = zeroshot(path, weights=str(file))
    assert (every.metrics.top1, every.metrics.clips, every.metrics.split) == (1.0, 24, "all")
    tested = zeroshot(path, split="1", weights=str(file))
    assert (tested.metrics.top1, tested.metrics.clips) == (1.0, 8)
    cosines = 100 * class_embeddings(encoder, CLASSES) @ texts["RedUp"]
    wanted = np.exp(cosines - cosines.max()) / np.exp(cosines - cosines.max()).sum()
    row = next(r for r in tested.predictions.to_pylist() if r["label"] == "RedUp")
    np.testing.assert_allclose(row["scores"], wanted, atol=5e-3)


def test_embeddings_of_other_weights_or_without_text_are_refused(clip: tuple[Encoder, Path], tmp_path: Path) -> None:
    encoder, file = clip
    other = embedding_spec(encoder=encoder.name, weights_sha256="f" * 64)
    path = write_store(tmp_path / "other.zarr", corpus(3), embedding=other)
    with pytest.raises(RunError, match="made with other weights"):
        zeroshot(path, weights=str(file))
    path = write_store(tmp_path / "timm.zarr", corpus(3))
    with pytest.raises(RunError, match="no text side"):
        zeroshot(path)
