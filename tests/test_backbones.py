"""Encoders: their library's own numbers, weights from files, and one clear line where weights are out of
reach.
"""

import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import synthetic
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from moclip.errors import EncoderError
from moclip.pipeline.backbones import EncoderConfig, load_encoder, timm_backbone
from moclip.pipeline.weights import hash_weights, read_weights

torch.set_num_threads(1)
FRAME = np.random.default_rng(0).integers(0, 256, (143, 171, 3), np.uint8)


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    torch.manual_seed(0)
    model = timm.create_model("test_vit", pretrained=False).eval()
    file = tmp_path_factory.mktemp("vit") / "vit.pth"
    torch.save(model.state_dict(), file)
    return model, file


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return synthetic.tiny_clip(tmp_path_factory.mktemp("clip"))


def test_timm_numbers_are_timms_own(vit: tuple[Any, Path]) -> None:
    model, file = vit
    encoder = load_encoder(EncoderConfig("timm:test_vit", str(file)))
    data = timm.data.resolve_model_data_config(model)
    theirs = timm.data.create_transform(**data, is_training=False)(Image.fromarray(FRAME))
    assert torch.equal(encoder.normalised(encoder.prepare(FRAME)[None])[0], theirs)
    with torch.inference_mode():
        pooled = model.forward_head(model.forward_features(theirs[None]), pre_logits=True)
    np.testing.assert_array_equal(encoder.encode(encoder.prepare(FRAME)[None]), pooled.numpy())
    assert encoder.dim == model.num_features
    assert encoder.preprocessing["crop_pct"] == data["crop_pct"]


def test_open_clip_numbers_are_open_clips_own(clip: tuple[str, Path]) -> None:
    name, file = clip
    encoder = load_encoder(EncoderConfig(f"open_clip:{name}", str(file)))
    model, _, transform = open_clip.create_model_and_transforms(name, pretrained=str(file))
    model.eval()
    theirs = transform(Image.fromarray(FRAME))
    assert torch.equal(encoder.normalised(encoder.prepare(FRAME)[None])[0], theirs)
    texts = ["a dog", "a person who is diving"]
    with torch.inference_mode():
        image = model.encode_image(theirs[None]).numpy()
        text = model.encode_text(open_clip.get_tokenizer(name)(texts)).numpy()
    np.testing.assert_array_equal(encoder.encode(encoder.prepare(FRAME)[None]), image)
    np.testing.assert_array_equal(encoder.encode_text(texts), text)
    assert encoder.dim == synthetic.EMBEDDING_DIM
    assert encoder.preprocessing["interpolation"] == "bicubic"


def test_quick_gelu_follows_the_models_name(clip: tuple[str, Path], tmp_path: Path) -> None:
    plain = synthetic.tiny_clip(tmp_path, quick_gelu=False)[0]
    file = str(clip[1])
    quick = load_encoder(EncoderConfig(f"open_clip:{clip[0]}", file))
    other = load_encoder(EncoderConfig(f"open_clip:{plain}", file))
    assert quick.weights_sha256 == other.weights_sha256
    frame = quick.prepare(FRAME)[None]
    assert not np.allclose(quick.encode(frame), other.encode(frame), atol=1e-4)


def test_openai_weights_on_gelu_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for quick_gelu, warnings in ((True, 0), (False, 1)):
        name, file = synthetic.tiny_clip(tmp_path, quick_gelu=quick_gelu)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            load_encoder(EncoderConfig(f"open_clip:{name}/openai", str(file)))
        assert sum("QuickGELU" in record.message for record in caplog.records) == warnings


def test_every_wrapping_of_the_same_weights_loads(vit: tuple[Any, Path], tmp_path: Path) -> None:
    state = vit[0].state_dict()
    headless = {name: value for name, value in state.items() if not name.startswith("head.")}
    parallel = {f"module.{name}": value for name, value in state.items()}
    variants = {"a.pth": headless, "b.pt": {"state_dict": parallel, "epoch": 3}, "c.bin": {"model": state}}
    for name, content in variants.items():
        torch.save(content, tmp_path / name)
    save_file(state, tmp_path / "d.safetensors")
    for file in (*(tmp_path / name for name in variants), tmp_path / "d.safetensors"):
        encoder = load_encoder(EncoderConfig("timm:test_vit", str(file)))
        assert encoder.weights_sha256 == hash_weights(timm_backbone("test_vit", str(vit[1])).state_dict())
        assert encoder.slug == f"test-vit-{encoder.weights_sha256[:8]}"


def test_a_spec_says_what_determines_the_values(vit: tuple[Any, Path]) -> None:
    encoder = load_encoder(EncoderConfig("timm:test_vit", str(vit[1])))
    spec = encoder.spec("middle")
    assert (spec.kind, spec.dtype) == ("embedding", "float16")
    assert {"encoder", "weights_sha256", "preprocessing", "frames"} <= set(spec.parameters)
    assert spec.digest == load_encoder(EncoderConfig("timm:test_vit", str(vit[1]))).spec("middle").digest
    assert spec.digest != encoder.spec("uniform:8").digest


def test_the_hash_sees_names_shapes_types_and_values() -> None:
    base = {"a": torch.zeros(2, 3), "n": torch.tensor(1)}
    others = [
        {"b": base["a"], "n": base["n"]},
        {"a": torch.zeros(3, 2), "n": base["n"]},
        {"a": torch.zeros(2, 3, dtype=torch.int32), "n": base["n"]},
        {"a": torch.full((2, 3), 1e-9), "n": base["n"]},
    ]
    assert len({hash_weights(state) for state in (base, *others)}) == 5
    assert hash_weights(dict(reversed(base.items()))) == hash_weights(base)
    assert hash_weights({"h": torch.zeros(2, dtype=torch.bfloat16)})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet50", "no encoder 'resnet50'"),
        ("timm:", "no encoder"),
        ("timm:no_such_net", "timm has no model"),
        ("timm:test_vit4", "no weights"),
        ("open_clip:ViT-Q-1/openai", "open_clip has no model"),
        ("open_clip:ViT-B-32/nobody", "it has: openai"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(EncoderError, match=message):
        load_encoder(EncoderConfig(name))


@pytest.mark.parametrize("name", ["timm:test_efficientnet", "open_clip:ViT-B-32-quickgelu/openai"])
def test_weights_out_of_reach_are_one_clear_line_at_once(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    handlers = list(logging.getLogger().handlers)
    started = time.perf_counter()
    with pytest.raises(EncoderError, match="--weights FILE") as caught:
        load_encoder(EncoderConfig(name))
    assert "\n" not in str(caught.value)
    assert "--encoder none" in str(caught.value)
    assert time.perf_counter() - started < 10
    assert logging.getLogger().handlers == handlers


def test_files_that_are_no_weights(vit: tuple[Any, Path], tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match="no weights file"):
        read_weights(tmp_path / "nowhere.pth")
    for name in ("text.pth", "text.safetensors"):
        (tmp_path / name).write_text("these are not weights, but they are long enough to have a header")
        with pytest.raises(EncoderError, match=name):
            read_weights(tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(EncoderError, match="no state dict"):
        read_weights(tmp_path / "list.pth")
    torch.save({"other": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(EncoderError, match="of another model"):
        load_encoder(EncoderConfig("timm:test_vit", str(tmp_path / "other.pth")))


def test_an_image_backbone_has_no_text_side(vit: tuple[Any, Path]) -> None:
    encoder = load_encoder(EncoderConfig("timm:test_vit", str(vit[1])))
    with pytest.raises(EncoderError, match="no text side"):
        encoder.encode_text(["a dog"])


def test_loading_leaves_the_global_random_numbers_to_the_caller(vit: tuple[Any, Path]) -> None:
    encoder = load_encoder(EncoderConfig("timm:test_vit", str(vit[1])))
    frame = encoder.prepare(FRAME)[None]
    np.testing.assert_array_equal(encoder.encode(frame), encoder.encode(frame))


@pytest.mark.data
def test_real_weights_give_timms_own_embedding(data: Path) -> None:
    file = data / "weights" / "tf_efficientnet_lite0.pth"
    encoder = load_encoder(EncoderConfig("timm:tf_efficientnet_lite0", str(file)))
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    model.load_state_dict(torch.load(file, weights_only=True))
    settings = timm.data.resolve_model_data_config(model)
    theirs = timm.data.create_transform(**settings, is_training=False)(Image.fromarray(FRAME))
    with torch.inference_mode():
        pooled = model.forward_head(model.forward_features(theirs[None]), pre_logits=True)
    np.testing.assert_array_equal(encoder.encode(encoder.prepare(FRAME)[None]), pooled.numpy())
    assert encoder.dim == 1280
