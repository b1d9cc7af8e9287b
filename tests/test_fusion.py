"""The fusion head and its control, on invented features of which either half explains half of the classes."""

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from synthetic import CLASSES, EMBEDDING_DIM, Clip, corpus, embedding_spec, write_store

from moclip.errors import RunError
from moclip.pipeline.learn.evaluate import evaluate_run
from moclip.pipeline.learn.fusion import Features, FusionConfig, FusionHead, train_fusion, train_probe
from moclip.pipeline.learn.tsn import TSNConfig, train_tsn
from moclip.store import open_store

torch.set_num_threads(1)
CPU = torch.device("cpu")
TSN = TSNConfig("1", backbone="timm:test_efficientnet", weights="none", input_size=64, epochs=10, batch=8, lr=0.003)
HEAD = FusionConfig("1", lr=1e-3, epochs=60)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    clips = [replace(clip, images=3) for clip in corpus(18, splits=("1", "2"))]
    lost = Clip("hevc", "RedUp", "lost", {"1": "test", "2": "test"}, fails=True)
    return write_store(tmp_path_factory.mktemp("fusion") / "s.zarr", [*clips, lost])


@pytest.fixture(scope="module")
def motion_run(store: Path) -> Path:
    return train_tsn(store, store.parent / "tsn", TSN).run


def files_of(folder: Path) -> dict[str, str]:
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def test_the_papers_head_has_969829_parameters() -> None:
    assert sum(p.numel() for p in FusionHead(1280 + 512, 101).parameters()) == 969_829


def test_fusion_sees_what_neither_half_does_and_touches_no_motion_net(
    store: Path, motion_run: Path, tmp_path: Path
) -> None:
    before = files_of(motion_run)
    fusion = train_fusion(store, tmp_path / "fusion", replace(HEAD, motion_run=str(motion_run)))
    probe = train_probe(store, tmp_path / "probe", HEAD)
    assert fusion.test.top1 > 0.9
    assert 0.3 < probe.test.top1 < 0.8
    assert fusion.test.missing == {"not in the motion run": 1}
    assert probe.test.missing == {}
    # Weights and BatchNorm statistics included: the frozen network's run is byte for byte what it was.
    assert files_of(motion_run) == before


def test_evaluation_finds_what_training_found(store: Path, motion_run: Path, tmp_path: Path) -> None:
    config = replace(HEAD, epochs=5)
    fusion = train_fusion(store, tmp_path / "fusion", replace(config, motion_run=str(motion_run)))
    probe = train_probe(store, tmp_path / "probe", config)
    for result in (fusion, probe):
        assert evaluate_run(result.run, store).metrics == result.test
    with pytest.raises(RunError, match="has no protocol"):
        evaluate_run(fusion.run, store, protocol="25x1")


def test_another_splits_training_clips_are_warned_of(
    store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clips = corpus(6)
    both = [replace(clip, splits={"1": str((clip.splits or {})["1"]), "2": "test"}) for clip in clips]
    both += [Clip(f"more/{name}", name, None, {"1": "train", "2": "train"}) for name in CLASSES]
    path = write_store(tmp_path / "s.zarr", both)
    probe = train_probe(path, tmp_path / "probe", replace(HEAD, epochs=2))
    caplog.clear()
    evaluate_run(probe.run, path, split="1")
    assert "training clips" not in caplog.text
    evaluate_run(probe.run, path, split="2")
    assert "16 of the 24 test clips of split '2' were training clips" in caplog.text


def test_motion_runs_that_do_not_fit(store: Path, motion_run: Path, tmp_path: Path) -> None:
    config = replace(HEAD, motion_run=str(motion_run))
    with pytest.raises(RunError, match="trained on split '1', this is split '2'"):
        train_fusion(store, tmp_path / "a", replace(config, split="2"))
    with pytest.raises(RunError, match="another division"):
        train_fusion(store, tmp_path / "a", replace(config, val_fraction=0.3))
    with pytest.raises(RunError, match="no run at"):
        train_fusion(store, tmp_path / "a", replace(config, motion_run=str(tmp_path / "none")))
    with pytest.raises(RunError, match="needs the run"):
        train_fusion(store, tmp_path / "a", HEAD)
    with pytest.raises(RunError, match="takes no motion run"):
        train_probe(store, tmp_path / "a", config)
    with pytest.raises(RunError, match="not an image embedding"):
        train_probe(store, tmp_path / "a", replace(HEAD, feature="motion-accumulated"))
    assert not (tmp_path / "a").exists()


def test_runs_move_together_and_a_motion_run_that_was_trained_again_is_noticed(
    store: Path, motion_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(motion_run, tmp_path / "here" / "tsn")
    monkeypatch.chdir(tmp_path / "here")
    config = replace(HEAD, epochs=2, motion_run="tsn")
    found = train_fusion(store, "fusion", config).test
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").rename(tmp_path / "there")
    again = evaluate_run(tmp_path / "there" / "fusion", store)
    assert again.metrics.confusion == found.confusion
    shutil.rmtree(tmp_path / "there" / "tsn")
    train_tsn(store, tmp_path / "there" / "tsn", replace(TSN, epochs=1, seed=5))
    with pytest.raises(RunError, match="another specification"):
        evaluate_run(tmp_path / "there" / "fusion", store)


def test_another_embedding_under_the_same_name_is_refused(store: Path, tmp_path: Path) -> None:
    probe = train_probe(store, tmp_path / "probe", replace(HEAD, epochs=2))
    other = write_store(tmp_path / "s.zarr", corpus(6), embedding=embedding_spec(weights_sha256="f" * 64))
    with pytest.raises(RunError, match="another specification"):
        evaluate_run(probe.run, other)


def test_the_same_seed_gives_the_same_head(store: Path, tmp_path: Path) -> None:
    runs = [
        train_probe(store, tmp_path / name, replace(HEAD, epochs=3, seed=s)).run
        for name, s in (("a", 1), ("b", 1), ("c", 2))
    ]
    a, b, c = (load_file(run / "model.safetensors") for run in runs)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["0.weight"], c["0.weight"])


class TestFeatures:
    def test_training_draws_rows_and_evaluation_averages_them(self, store: Path, motion_run: Path) -> None:
        pooled = open_store(motion_run / "features.zarr")
        opened = open_store(store)
        ids = ["RedUp/v03", "BlueDown/v00", "RedUp/v00"]
        features = Features(opened, "embedding-invented", pooled, ids, CPU)
        width = features.dim - EMBEDDING_DIM
        rng = np.random.default_rng(0)
        images = [opened.read("embedding", video).astype(np.float32) for video in ids]
        rows = [pooled.read("mv-tsn", video).astype(np.float32) for video in ids]
        for i in range(3):
            wanted = np.concatenate([rows[i].mean(0), images[i].mean(0)])
            np.testing.assert_allclose(features.means[i], wanted, rtol=1e-4, atol=1e-5)
        draws = [features.sample(np.array([2, 0]), 3, rng).numpy() for _ in range(40)]
        seen = {tuple(draw[0, width:]) for draw in draws}
        assert seen == {tuple(image) for image in images[2]}
        assert len({tuple(draw[1, :width]) for draw in draws}) > 20

    def test_all_rows_drawn_are_the_mean(self, store: Path, motion_run: Path) -> None:
        features = Features(
            open_store(store), "embedding-invented", open_store(motion_run / "features.zarr"), ["RedUp/v03"], CPU
        )
        width = features.dim - EMBEDDING_DIM
        drawn = features.sample(np.array([0]), 99, np.random.default_rng(0))
        torch.testing.assert_close(drawn[0, :width], features.means[0, :width])
