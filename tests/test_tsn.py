"""MV-TSN: its network, its recipe, and a training on an invented store that motion alone half explains."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import torch
from safetensors.torch import load_file
from synthetic import CLASSES, Clip, corpus, label, write_store

from moclip.errors import EncoderError, RunError
from moclip.pipeline.backbones import timm_backbone
from moclip.pipeline.learn import fit as fitting
from moclip.pipeline.learn.evaluate import Protocol, evaluate_run
from moclip.pipeline.learn.fit import EpochRow, seeded
from moclip.pipeline.learn.network import MotionTSN, stem_of
from moclip.pipeline.learn.run_writer import TrainResult
from moclip.pipeline.learn.tsn import TSNConfig, _parameter_groups, train_tsn
from moclip.pipeline.learn.views import Geometry, fixed_views, prepare
from moclip.store import open_store

torch.set_num_threads(1)
CONFIG = TSNConfig("1", backbone="timm:test_efficientnet", weights="none", input_size=64, epochs=10, batch=8, lr=0.003)
FAST = replace(CONFIG, epochs=1, input_size=32)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    clips = corpus(18)
    extra = [
        Clip("odd", "RedUp", "odd", {"1": "train"}, frames=1, width=171, height=143),
        Clip("hevc", "RedUp", "odd", {"1": "test"}, fails=True),
    ]
    return write_store(tmp_path_factory.mktemp("tsn") / "s.zarr", [*clips, *extra])


@pytest.fixture(scope="module")
def rows() -> list[EpochRow]:
    return []


@pytest.fixture(scope="module")
def trained(store: Path, rows: list[EpochRow]) -> TrainResult:
    return train_tsn(store, store.parent / "run", CONFIG, on_epoch=rows.append)


def test_the_stem_is_the_mean_of_the_colours() -> None:
    for name in ("test_efficientnet", "test_resnet", "tf_efficientnet_lite0"):
        colour = timm.create_model(name, pretrained=False, num_classes=0)
        wanted = stem_of(colour).weight.mean(1)
        model = MotionTSN(colour, 5)
        stem = stem_of(model.backbone)
        assert stem.weight.shape[1] == stem.in_channels == 2
        assert torch.equal(stem.weight[:, 0], wanted)
        assert torch.equal(stem.weight[:, 1], wanted)
        assert model(torch.zeros(2, 3, 2, 64, 64)).shape == (2, 5)


def test_logits_are_averaged_over_segments() -> None:
    model = MotionTSN(timm_backbone("test_efficientnet", pretrained=False), 5).eval()
    clips = torch.randn(2, 3, 2, 64, 64)
    with torch.inference_mode():
        apart = torch.stack([model(clips[:, [i]]) for i in range(3)]).mean(0)
        torch.testing.assert_close(model(clips), apart)


def test_the_recipes_learning_rates() -> None:
    model = MotionTSN(timm_backbone("test_efficientnet", pretrained=False), 5)
    for config, wanted in (
        (TSNConfig("1", weights="file"), [0.01, 0.001, 0.0001]),
        (TSNConfig("1", weights="none"), [0.01, 0.01, 0.01]),
    ):
        rate, decay = _rates_and_decays(model, config)
        assert [rate["classifier.weight"], rate["data_bn.bias"], rate["backbone.bn1.weight"]] == pytest.approx(wanted)
        near = {name for name, parameter in model.named_parameters() if parameter is stem_of(model.backbone).weight}
        assert {name for name in rate if rate[name] == pytest.approx(0.001)} in (
            set(), {"data_bn.weight", "data_bn.bias", *near},
        )  # fmt: skip
        spared = {name for name in decay if not decay[name]}
        assert spared == {name for name, parameter in model.named_parameters() if parameter.ndim == 1}
        assert {"data_bn.weight", "backbone.bn1.weight", "classifier.bias"} < spared
        _, reference = _rates_and_decays(model, replace(config, strict_reference=True, val_fraction=0.0))
        assert set(reference.values()) == {1e-4}


def _rates_and_decays(model: MotionTSN, config: TSNConfig) -> tuple[dict[str, float], dict[str, float]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = _parameter_groups(model, config)
    found = [(names[id(p)], group["lr"], group["weight_decay"]) for group in groups for p in group["params"]]
    assert sorted(name for name, _, _ in found) == sorted(names.values())
    assert groups[0]["lr"] == config.lr
    return {name: lr for name, lr, _ in found}, {name: decay for name, _, decay in found}


def test_training_learns_directions_and_writes_a_run(trained: TrainResult, rows: list[EpochRow], store: Path) -> None:
    up_or_down = [[0, 2], [1, 3], [0, 2], [1, 3]]
    confusion = np.array(trained.test.confusion)
    right = sum(confusion[i, called].sum() for i, called in enumerate(up_or_down))
    assert right >= 0.9 * trained.test.clips
    assert trained.test.missing == {"no_vectors": 1}
    assert [row.epoch for row in rows] == list(range(1, 11))
    assert [row.lr for row in rows] == pytest.approx([0.003] * 8 + [0.0003] * 2)
    best = max(rows, key=lambda row: (row.val_top1 or 0, -(row.val_loss or 0)))
    assert trained.best == best

    names = {path.name for path in trained.run.iterdir()}
    assert names == {
        "config.json", "features.zarr", "history.csv", "metrics.json", "model.safetensors", "predictions.parquet",
        "trained_on.parquet",
    }  # fmt: skip
    metrics = json.loads((trained.run / "metrics.json").read_text())
    assert metrics["test"]["top1"] == trained.test.top1
    assert metrics["best"]["epoch"] == best.epoch
    assert len((trained.run / "history.csv").read_text().splitlines()) == 11
    table = pq.read_table(trained.run / "predictions.parquet")
    assert table.num_rows == 24
    assert [len(scores) for scores in table["scores"].to_pylist()] == [4] * 24
    hits = [a == b for a, b in zip(table["label"].to_pylist(), table["predicted"].to_pylist(), strict=True)]
    assert np.mean(hits) == pytest.approx(trained.test.top1)


def test_pooled_features_are_those_of_the_kept_model(trained: TrainResult, store: Path) -> None:
    pooled, corpus_store = open_store(trained.run / "features.zarr"), open_store(store)
    assert pooled.ids("mv-tsn") == corpus_store.ids("motion-accumulated")
    video = "BlueUp/v17"
    frames = pooled.read("mv-tsn", video, "frame_index")
    seconds = pooled.read("mv-tsn", video, "pts_seconds")
    features = pooled.read("mv-tsn", video)
    assert features.shape == (25, 256)
    assert features.dtype == np.float16
    np.testing.assert_allclose(seconds, frames / 25)
    weights = load_file(trained.run / "model.safetensors")
    logits = features.astype(np.float32).mean(0) @ weights["classifier.weight"].numpy().T
    logits = torch.from_numpy(logits) + weights["classifier.bias"]
    table = pq.read_table(trained.run / "predictions.parquet").to_pylist()
    scores = next(row["scores"] for row in table if row["id"] == video)
    np.testing.assert_allclose(logits.softmax(0), scores, atol=2e-3)


def test_evaluation_finds_what_training_found(trained: TrainResult, store: Path) -> None:
    found = evaluate_run(trained.run, store)
    assert found.metrics == trained.test
    scores = found.predictions["scores"].to_pylist()
    theirs = pq.read_table(trained.run / "predictions.parquet")["scores"].to_pylist()
    np.testing.assert_allclose(scores, theirs, atol=1e-5)
    assert (trained.run / "evaluations" / "1-25x1.json").exists()


def test_protocols(trained: TrainResult, store: Path) -> None:
    assert evaluate_run(trained.run, store, protocol="3x10").metrics.protocol == "3x10"
    assert str(Protocol.parse("32x1")) == "32x1"
    assert [len(fixed_views(2, 224, crops)) for crops in (1, 2, 5, 10)] == [2, 4, 10, 20]
    two = fixed_views(1, 224, 2)
    assert (two.left.tolist(), two.mirror.tolist()) == ([16, 16], [False, True])
    for wrong in ("25", "25x3", "0x1", "axb"):
        with pytest.raises(RunError, match="no protocol"):
            evaluate_run(trained.run, store, protocol=wrong)


def test_ten_crops_cannot_tell_a_clip_from_its_mirror_image(trained: TrainResult) -> None:
    """With 1 px cells samples are symmetric, and every crop of a picture has its mirror image in the ten."""
    model = MotionTSN(timm_backbone("test_efficientnet", pretrained=False), len(CLASSES)).eval()
    model.load_state_dict(load_file(trained.run / "model.safetensors"))
    grids = torch.from_numpy(np.random.default_rng(0).integers(-20, 21, (1, 1, 2, 40, 50)).astype(np.int16))
    mirrored = grids.flip(-1).clone()
    mirrored[:, :, 0] *= -1
    geometry = Geometry(50, 40, 1, 50, 40)

    def logits(clip: torch.Tensor, crops: int) -> torch.Tensor:
        images = prepare(clip.repeat(crops, 1, 1, 1, 1), geometry, fixed_views(1, 56, crops), 56)
        with torch.inference_mode():
            scores: torch.Tensor = model(images).mean(0)
        return scores

    torch.testing.assert_close(logits(grids, 10), logits(mirrored, 10), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits(grids, 1), logits(mirrored, 1), atol=1e-4)


def test_classes_are_matched_by_name(trained: TrainResult, tmp_path: Path) -> None:
    clips = corpus(6)
    other = write_store(tmp_path / "s.zarr", clips, classes=tuple(reversed(CLASSES)), seed=5)
    found = evaluate_run(trained.run, other)
    table = found.predictions.to_pylist()
    assert all(row["predicted"] in CLASSES for row in table)
    down = [row["predicted"].endswith(row["label"][-2:]) for row in table]
    assert np.mean(down) >= 0.9
    label(other, [replace(clip, label="Swimming") for clip in clips], classes=["Swimming"])
    with pytest.raises(RunError, match="knows no class Swimming"):
        evaluate_run(trained.run, other)


def test_the_same_seed_gives_the_same_run(store: Path, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    first, again, other = (
        train_tsn(store, tmp_path / name, replace(FAST, seed=seed)) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    weights = [load_file(result.run / "model.safetensors") for result in (first, again, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not torch.equal(weights[0]["classifier.weight"], weights[2]["classifier.weight"])
    assert replace(first.best, seconds=0) == replace(again.best, seconds=0)
    assert torch.equal(torch.get_rng_state(), before)


class Killed(Exception):
    pass


def test_a_network_that_was_killed_ends_as_if_it_never_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With what a run writes: BatchNorm, Adam and dropout come back from its checkpoint."""
    monkeypatch.setattr(fitting, "CHECKPOINT_SECONDS", 0.0)
    store = write_store(tmp_path / "s.zarr", corpus(4))
    config = replace(FAST, epochs=3, views=0)
    whole = train_tsn(store, tmp_path / "whole", config)

    def killed(row: EpochRow) -> None:
        if row.epoch == 2:
            raise Killed

    with pytest.raises(Killed):
        train_tsn(store, tmp_path / "killed", config, on_epoch=killed)
    so_far = evaluate_run(tmp_path / "killed", store)
    assert so_far.metrics.clips == whole.test.clips
    assert "killed is unfinished: this tests the best of its epochs so far" in caplog.text
    assert not (tmp_path / "killed" / "evaluations").exists()
    rows: list[EpochRow] = []
    again = train_tsn(store, tmp_path / "killed", replace(config, device="cpu"), on_epoch=rows.append)
    assert [row.epoch for row in rows] == [3]
    a, b = (load_file(result.run / "model.safetensors") for result in (whole, again))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert again.test == whole.test


def test_selection_never_reads_the_test_side(tmp_path: Path) -> None:
    """Wrong labels on every test clip change nothing but the test's figures."""
    clips = corpus(6)
    swapped = [replace(clip, label="RedUp") if clip.splits == {"1": "test"} else clip for clip in clips]
    path = write_store(tmp_path / "s.zarr", clips)
    honest = train_tsn(path, tmp_path / "a", replace(FAST, epochs=3))
    label(path, swapped)
    lied_to = train_tsn(path, tmp_path / "b", replace(FAST, epochs=3))
    assert replace(honest.best, seconds=0) == replace(lied_to.best, seconds=0)
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert honest.test.confusion != lied_to.test.confusion


def test_without_a_held_out_part_the_last_epoch_is_kept(store: Path, tmp_path: Path) -> None:
    result = train_tsn(store, tmp_path / "run", replace(FAST, epochs=2, val_fraction=0))
    assert result.best.epoch == 2
    assert result.best.val_top1 is None


def test_seeds_do_not_leak() -> None:
    torch.manual_seed(0)
    first = torch.rand(1)
    torch.manual_seed(0)
    with seeded(7):
        torch.rand(3)
    assert torch.equal(torch.rand(1), first)


def test_weights_from_a_file_start_the_backbone(store: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet", pretrained=False)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "w.pth")
    backbone = timm_backbone("test_efficientnet", str(tmp_path / "w.pth"))
    assert torch.equal(backbone.blocks[0][0].conv.weight, model.blocks[0][0].conv.weight)
    result = train_tsn(store, tmp_path / "run", replace(FAST, weights=str(tmp_path / "w.pth")))
    start, end = model.state_dict(), load_file(result.run / "model.safetensors")
    moved = (end["backbone.blocks.0.0.conv.weight"] - start["blocks.0.0.conv.weight"]).abs().max()
    assert 0 < moved < 0.01


@pytest.mark.parametrize(
    "wrong", [{"epochs": 0}, {"batch": -1}, {"val_fraction": 1.0}, {"backbone": "open_clip:x"}, {"lr": 0.0}]
)
def test_configurations_that_make_no_sense(wrong: dict[str, float]) -> None:
    with pytest.raises(RunError):
        replace(CONFIG, **wrong)  # type: ignore[arg-type]


def test_a_backbone_without_one_stem_is_refused(store: Path, tmp_path: Path) -> None:
    model = timm.create_model("test_efficientnet", pretrained=False, num_classes=0)
    model.pretrained_cfg = {**model.pretrained_cfg, "first_conv": None}
    with pytest.raises(EncoderError, match="no single first convolution"):
        MotionTSN(model, 3)
    with pytest.raises(EncoderError, match="timm has no model"):
        train_tsn(store, tmp_path / "run", replace(FAST, backbone="timm:nothing_like_it"))
    with pytest.raises(RunError, match=r"vit_tiny_patch16_224 takes no pictures of 32 px .*give another --input-size"):
        train_tsn(store, tmp_path / "run", replace(FAST, backbone="timm:vit_tiny_patch16_224"))
    assert not (tmp_path / "run").exists()


def test_a_model_that_diverged_at_its_last_step_is_no_result(store: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"scores of 24 of 24 test clips are no numbers"):
        train_tsn(store, tmp_path / "run", replace(FAST, lr=1e30, batch=200, val_fraction=0.0, views=0))
    assert not (tmp_path / "run" / "metrics.json").exists()


def test_the_references_defects(tmp_path: Path) -> None:
    clips = corpus(6, frames=26)
    short = [
        Clip("short", "RedUp", "short", {"1": "test"}, frames=24),
        Clip("just", "RedUp", "just", {"1": "test"}, frames=25),
        Clip("one", "RedUp", "o", {"1": "train"}, frames=1),
    ]
    broken = [Clip(f"broken/{part}", "RedUp", part, {"1": part}, fails=True) for part in ("train", "test")]
    path = write_store(tmp_path / "s.zarr", [*clips, *short, *broken])
    strict = replace(FAST, epochs=2, strict_reference=True, val_fraction=0.0)
    rows: list[EpochRow] = []
    result = train_tsn(path, tmp_path / "run", strict, on_epoch=rows.append)
    # Short clips are dropped; broken ones are not, their pictures are zeros.
    assert result.test.clips == 9
    assert result.test.missing == {"no more frames than segments": 2}
    trained_on = pq.read_table(tmp_path / "run" / "trained_on.parquet")["id"].to_pylist()
    assert "one" not in trained_on
    assert "broken/train" in trained_on
    assert evaluate_run(result.run, path).metrics == result.test
    # Chosen on the test clips: three of the segments of a test make the accuracy that the history has.
    found = evaluate_run(result.run, path, protocol="3x1").predictions.to_pylist()
    judged = [row for row in found if row["id"] not in ("short", "just")]
    assert result.best.val_top1 == pytest.approx(np.mean([row["label"] == row["predicted"] for row in judged]))
    honest = train_tsn(path, tmp_path / "honest", replace(strict, strict_reference=False))
    assert honest.test.clips == 10
    assert honest.test.missing == {"no_vectors": 1}
    with pytest.raises(RunError, match="strict_reference needs a val_fraction of 0"):
        replace(strict, val_fraction=0.2)
    assert evaluate_run(result.run, path, protocol="99x1").metrics.clips == 1
    label(path, [replace(clip, splits={"1": "test"}) if clip.id.startswith("broken") else clip for clip in clips])
    with pytest.raises(RunError, match="no test clip of split '1' has motion-accumulated to test"):
        evaluate_run(result.run, path, protocol="99x1")
    label(path, [replace(clip, label="One" if clip.id == "one" else clip.label) for clip in [*clips, *short]],
          classes=[*CLASSES, "One"])  # fmt: skip
    with pytest.raises(RunError, match="no more frames than segments, and leaves no training clip of One"):
        train_tsn(path, tmp_path / "none", strict)


def test_mirrored_bytes_make_motion_of_none() -> None:
    still, geometry = torch.zeros(1, 1, 2, 6, 8, dtype=torch.int16), Geometry(64, 48, 8, 8, 6)
    views = replace(fixed_views(1, 64), mirror=torch.tensor([True]))
    assert prepare(still, geometry, views, 64).unique().item() == pytest.approx(128 / 255 - 0.5, abs=1e-6)
    x, y = prepare(still, geometry, views, 64, mirror_bytes=True)[0, 0]
    assert x.unique().item() == pytest.approx(127 / 255 - 0.5, abs=1e-6)
    assert y.unique().item() == pytest.approx(128 / 255 - 0.5, abs=1e-6)
