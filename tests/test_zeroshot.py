"""Zero-shot: prompts, their ensemble, and refusals where text and image would not meet."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from synthetic import CLASSES, Clip, corpus, embedding_spec, motion_spec, tiny_clip, write_store

from moclip.errors import RunError
from moclip.pipeline.backbones import Encoder, EncoderConfig, load_encoder
from moclip.pipeline.learn.evaluate import evaluate_run
from moclip.pipeline.learn.fusion import train_fusion
from moclip.pipeline.learn.fusion_model import FusionConfig
from moclip.pipeline.learn.runs import load_run
from moclip.pipeline.learn.tsn import TSNConfig, train_tsn
from moclip.pipeline.learn.zeroshot import (
    TEMPLATES,
    ZeroShotConfig,
    class_embeddings,
    phrase,
    read_phrases,
    text_of,
    zeroshot,
)
from moclip.store import add_feature, create_store, open_store, publish

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
        ("petting animal (not cat)", "petting animal (not cat)"),
        ("massaging person's head", "massaging person's head"),
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


def store_of_texts(encoder: Encoder, path: Path) -> Path:
    """A store whose images are what their classes are called."""
    texts = dict(zip(CLASSES, class_embeddings(encoder, CLASSES), strict=True))
    clips = [replace(one, images=2) for one in corpus(6)]
    rows = {one.id: np.stack([3 * texts[str(one.label)]] * 2).astype(np.float16) for one in clips}
    return write_store(path, clips, embedding=encoder.spec("middle"), rows=rows)


def test_clips_get_the_class_they_are_closest_to(clip: tuple[Encoder, Path], tmp_path: Path) -> None:
    encoder, file = clip
    path = store_of_texts(encoder, tmp_path / "s.zarr")
    texts = dict(zip(CLASSES, class_embeddings(encoder, CLASSES), strict=True))
    every = zeroshot(path, ZeroShotConfig(weights=str(file)))
    assert (every.metrics.top1, every.metrics.clips, every.metrics.split) == (1.0, 24, "all")
    tested = zeroshot(path, ZeroShotConfig("1", weights=str(file)))
    assert (tested.metrics.top1, tested.metrics.clips) == (1.0, 8)
    cosines = (100 * class_embeddings(encoder, CLASSES) @ texts["RedUp"]).numpy()
    wanted = np.exp(cosines - cosines.max()) / np.exp(cosines - cosines.max()).sum()
    row = next(r for r in tested.predictions.to_pylist() if r["label"] == "RedUp")
    np.testing.assert_allclose(row["scores"], wanted, atol=5e-3)


def test_embeddings_of_other_weights_or_without_text_are_refused(clip: tuple[Encoder, Path], tmp_path: Path) -> None:
    encoder, file = clip
    other = embedding_spec(encoder=encoder.name, weights_sha256="f" * 64)
    path = write_store(tmp_path / "other.zarr", corpus(3), embedding=other)
    with pytest.raises(RunError, match="made with other weights"):
        zeroshot(path, ZeroShotConfig(weights=str(file)))
    path = write_store(tmp_path / "timm.zarr", corpus(3))
    with pytest.raises(RunError, match="no text side"):
        zeroshot(path, ZeroShotConfig())


def test_words_of_ones_own(clip: tuple[Encoder, Path], tmp_path: Path) -> None:
    encoder, file = clip
    told = tmp_path / "words.toml"
    told.write_text('RedUp = ["going up, in red", "a red thing that rises"]\nBlueUp = "blue and up"\n')
    words = read_phrases(told)
    red, blue, plain = class_embeddings(encoder, ["RedUp", "BlueUp", "BlueDown"], words)
    texts = [template.format(some) for some in words["RedUp"] for template in TEMPLATES]
    mean = encoder.encode_text(texts).mean(0)
    np.testing.assert_allclose(red, mean / np.linalg.norm(mean), atol=1e-5)
    np.testing.assert_array_equal(blue, class_embeddings(encoder, ["blue and up"])[0])
    np.testing.assert_allclose(plain, class_embeddings(encoder, ["BlueDown"])[0], atol=1e-6)

    path = store_of_texts(encoder, tmp_path / "s.zarr")
    with pytest.raises(
        RunError,
        match="there are words for Sideways, which the store does not have; write its classes as they are: RedUp",
    ):
        zeroshot(path, ZeroShotConfig(weights=str(file), phrases={"Sideways": ["x"]}))
    for broken in ("RedUp = 3", "RedUp = []", "RedUp = [1]", "RedUp ="):
        told.write_text(broken)
        with pytest.raises(RunError, match=r'expected "words"|cannot be read'):
            read_phrases(told)
    with pytest.raises(RunError, match="cannot be read"):
        read_phrases(tmp_path / "none.toml")


def test_a_run_keeps_the_texts_and_fusion_adds_its_scores(clip: tuple[Encoder, Path], tmp_path: Path) -> None:
    encoder, file = clip
    path = store_of_texts(encoder, tmp_path / "s.zarr")
    made = zeroshot(path, ZeroShotConfig("1", weights=str(file)), out=tmp_path / "text")
    run = load_run(tmp_path / "text", kind="zeroshot")
    file.rename(file.with_suffix(".away"))  # neither evaluation nor fusion needs the encoder
    try:
        assert evaluate_run(run.path, path).metrics == made.metrics
        text = text_of(run, open_store(path), open_store(path).resolve("embedding"), CLASSES[::-1])
        np.testing.assert_allclose(text, class_embeddings(encoder, CLASSES[::-1]), atol=1e-6)
        tsn = TSNConfig("1", backbone="timm:test_efficientnet", weights="none", input_size=32, epochs=1, views=0)
        motion = train_tsn(path, tmp_path / "tsn", replace(tsn, val_fraction=0.0)).run
        config = FusionConfig("1", motion_run=str(motion), epochs=1, lr=1e-9, val_fraction=0.0)
        alone = train_fusion(path, tmp_path / "alone", config)
        added = train_fusion(path, tmp_path / "added", replace(config, zeroshot_run=str(run.path)))
        # A head that learned nothing: what it says is noise, beside it stands what CLIP knows.
        assert alone.test.top1 < 0.9 < added.test.top1
        assert added.card.trainable == alone.card.trainable
        assert evaluate_run(added.run, path).metrics == added.test
        other = tmp_path / "other.zarr"
        create_store(other)
        add_feature(other, "motion-accumulated", motion_spec())
        publish(other)
        with pytest.raises(RunError, match=r"`moclip extract SOURCE .* --feature embedding --encoder open_clip:moclip"):
            evaluate_run(run.path, other)
        with pytest.raises(RunError, match="has no text of Sideways; make it again"):
            text_of(run, open_store(path), "embedding-invented", ["RedUp", "Sideways"])
    finally:
        file.with_suffix(".away").rename(file)


def test_clips_without_the_embedding(clip: tuple[Encoder, Path], tmp_path: Path) -> None:
    encoder, file = clip
    clips = [replace(one, images=0) if (one.splits or {})["1"] == "test" else one for one in corpus(3)]
    path = write_store(tmp_path / "s.zarr", [*clips, Clip("a", "RedUp", None, {})], embedding=encoder.spec("middle"))
    with pytest.raises(RunError, match="no clip of split '1' has rows of embedding-invented; extract them"):
        zeroshot(path, ZeroShotConfig("1", weights=str(file)), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_quick_gelu_is_what_openai_trained_with(tmp_path: Path) -> None:
    """transformers' CLIP is OpenAI's: the same weights say the same, and without QuickGELU they do not."""
    sides = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={**sides, "hidden_act": "quick_gelu", "vocab_size": 49408, "eos_token_id": 49407},
        vision_config={**sides, "hidden_act": "quick_gelu", "image_size": 32, "patch_size": 16},
        projection_dim=16,
    )
    with torch.random.fork_rng():
        torch.manual_seed(5)
        theirs = transformers.CLIPModel(config).eval()
        for parameter in theirs.parameters():  # as initialised, activations are too small to tell the two apart
            torch.nn.init.normal_(parameter, std=0.2)
    images = torch.rand(4, 3, 32, 32)
    texts = ["a frame from a clip that shows tai chi.", "yo yo", "home footage of yo yo."]
    with torch.no_grad():
        wanted_images = theirs.visual_projection(theirs.vision_model(images).pooler_output)
    for quick in (True, False):
        name, file = tiny_clip(tmp_path, quick_gelu=quick)
        torch.save(as_open_clip(theirs.state_dict()), file)
        ours = load_encoder(EncoderConfig(f"open_clip:{name}", str(file)))
        assert ours._tokenizer is not None
        tokens = ours._tokenizer(texts)
        with torch.no_grad():
            wanted_texts = theirs.text_projection(theirs.text_model(tokens).pooler_output)
            found_images = ours._model.encode_image(images)
        same = [
            bool(torch.allclose(torch.as_tensor(found), wanted, atol=1e-4, rtol=1e-4))
            for found, wanted in ((ours.encode_text(texts), wanted_texts), (found_images, wanted_images))
        ]
        assert same == [quick, quick]


def as_open_clip(theirs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers' names of CLIP's weights as OpenAI's, which open_clip reads."""
    renamed = {
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "vision_model.embeddings.class_embedding": "visual.class_embedding",
        "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
        "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
        "logit_scale": "logit_scale",
    }
    found = {new: theirs[old] for old, new in renamed.items()}
    for side, prefix in (("text_model", ""), ("vision_model", "visual.")):
        block = f"{prefix}transformer.resblocks.0"
        layer = f"{side}.encoder.layers.0"
        for end in ("weight", "bias"):
            parts = [theirs[f"{layer}.self_attn.{part}_proj.{end}"] for part in "qkv"]
            found[f"{block}.attn.in_proj_{end}"] = torch.cat(parts)
            for old, new in (
                ("self_attn.out_proj", "attn.out_proj"), ("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"),
                ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"),
            ):  # fmt: skip
                found[f"{block}.{new}.{end}"] = theirs[f"{layer}.{old}.{end}"]
            found[f"{prefix}{'ln_post' if prefix else 'ln_final'}.{end}"] = theirs[
                f"{side}.{'post_layernorm' if prefix else 'final_layer_norm'}.{end}"
            ]
            if prefix:
                found[f"visual.ln_pre.{end}"] = theirs[f"{side}.pre_layrnorm.{end}"]
    found["text_projection"] = theirs["text_projection.weight"].T.contiguous()
    found["visual.proj"] = theirs["visual_projection.weight"].T.contiguous()
    return found
