"""The fusion head and its control, on invented features of which either half explains half of the classes."""

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from synthetic import CLASSES, Clip, corpus, embedding_spec, write_store

from moclip.errors import FeatureError, RunError
from moclip.pipeline.learn.evaluate import evaluate_run
from moclip.pipeline.learn.frozen import FRAMES, Features, ImageEmbeddings, PooledMotion
from moclip.pipeline.learn.fusion import train_fusion, train_probe
from moclip.pipeline.learn.fusion_model import FusionConfig
from moclip.pipeline.learn.heads import HEADS
from moclip.pipeline.learn.runs import load_run
from moclip.pipeline.learn.tsn import TSNConfig, train_tsn
from moclip.store import ShardWriter, SourceFacts, add_feature, open_store, publish

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
    with pytest.raises(RunError, match="is a probe: it sees images alone and has no protocol 25x1"):
        evaluate_run(probe.run, store, protocol="25x1")


@pytest.mark.parametrize("head", ["mlp", "cross-attention"])
def test_a_fusion_is_tested_at_any_protocol(head: str, store: Path, motion_run: Path, tmp_path: Path) -> None:
    """With the segments that were pooled it says what it says without; others come from the network."""
    fusion = train_fusion(store, tmp_path / "fusion", replace(HEAD, epochs=5, head=head, motion_run=str(motion_run)))
    pooled, same, other = (evaluate_run(fusion.run, store, protocol=protocol) for protocol in (None, "25x1", "2x10"))
    assert (same.metrics.protocol, other.metrics.protocol) == ("25x1", "2x10")
    assert same.predictions["id"] == pooled.predictions["id"]
    mine, theirs, another = (np.array(x.predictions["scores"].to_pylist()) for x in (same, pooled, other))
    np.testing.assert_allclose(mine, theirs, atol=2e-3)
    assert np.abs(another - mine).max() > 1e-4
    assert same.metrics.missing == {"without motion-accumulated": 1}


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
    with pytest.raises(RunError, match="segments is 10, but the motion run pooled 9 of a clip"):
        train_fusion(store, tmp_path / "a", replace(config, segments=10))
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
    with pytest.raises(RunError, match="another specification under that name; train the MV-TSN that it comes from"):
        evaluate_run(tmp_path / "there" / "fusion", store)
    other = write_store(tmp_path / "other.zarr", corpus(3), embedding=embedding_spec(weights_sha256="e" * 64))
    with pytest.raises(RunError, match=r"other.zarr holds another .*; extract it into a store of its own"):
        evaluate_run(tmp_path / "there" / "fusion", other)


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


@pytest.mark.parametrize(("head", "frames"), [(head, frames) for head in HEADS for frames in FRAMES])
def test_every_head_sees_what_neither_half_does(
    head: str, frames: str, store: Path, motion_run: Path, tmp_path: Path
) -> None:
    lr = 0.02 if head == "linear" else 0.001
    config = replace(HEAD, head=head, frames=frames, lr=lr, epochs=30, motion_run=str(motion_run))
    result = train_fusion(store, tmp_path / "fusion", config)
    assert result.test.top1 > 0.85
    assert evaluate_run(result.run, store).metrics == result.test


def test_weights_of_another_head_are_refused(store: Path, tmp_path: Path) -> None:
    probe = train_probe(store, tmp_path / "probe", replace(HEAD, epochs=1))
    other = train_probe(store, tmp_path / "other", replace(HEAD, epochs=1, head="attention"))
    shutil.copy(other.run / "model.safetensors", probe.run / "model.safetensors")
    with pytest.raises(RunError, match=r"another network than its config\.json says"):
        evaluate_run(probe.run, store)
    for wrong in ({"head": "big"}, {"frames": "some"}):
        with pytest.raises(RunError, match="there are"):
            replace(HEAD, **wrong)  # type: ignore[arg-type]


def test_the_published_fusion_lets_a_frozen_network_drift(store: Path, tmp_path: Path) -> None:
    """Batch statistics move, weights do not; clips without an embedding or motion take part, as zeros."""
    gone = [
        Clip("broken", "RedUp", "broken", {"1": "test"}, frames=26, fails=True),
        Clip("unseen", "RedUp", "unseen", {"1": "test"}, frames=26, images=0),
        Clip("short", "RedUp", "short", {"1": "test"}, frames=20),
    ]
    store = write_store(tmp_path / "s.zarr", [*corpus(6, frames=26), *gone])
    strict = replace(TSN, epochs=1, strict_reference=True, val_fraction=0.0)
    motion = train_tsn(store, tmp_path / "tsn", strict).run
    assert "mv-tsn-views" not in open_store(motion / "features.zarr").features
    before = files_of(motion)
    config = replace(HEAD, epochs=2, motion_run=str(motion), strict_reference=True, val_fraction=0.0)
    result = train_fusion(store, tmp_path / "run", config)
    assert files_of(motion) == before
    assert result.chosen_on == "test"
    assert (result.test.clips, result.test.missing) == (10, {"no more frames than segments": 1})
    was, now = load_file(motion / "model.safetensors"), load_file(result.run / "model.safetensors")
    moved = {name for name in was if not torch.equal(was[name], now[f"motion.{name}"])}
    statistics = {name for name in was if "running_" in name or "num_batches" in name}
    assert moved == statistics != set()
    found = evaluate_run(result.run, store)
    assert found.metrics == result.test
    again = evaluate_run(result.run, store, protocol="25x1").predictions
    scores = [np.array(table["scores"].to_pylist()) for table in (found.predictions, again)]
    np.testing.assert_allclose(*scores, atol=1e-4)
    assert evaluate_run(result.run, store, protocol="26x1").metrics.missing == {"no more frames than segments": 10}

    probe = replace(config, motion_run=None)
    assert train_probe(store, tmp_path / "probe", probe).test.clips == 11
    plain = train_probe(store, tmp_path / "plain", replace(probe, strict_reference=False))
    assert (plain.test.clips, plain.test.missing) == (10, {"truncated": 1})
    with pytest.raises(RunError, match="was trained with strict_reference; train both the same way"):
        train_fusion(store, tmp_path / "mixed", replace(config, strict_reference=False))


def test_a_store_that_got_another_embedding(store: Path, motion_run: Path, tmp_path: Path) -> None:
    shutil.copytree(store, tmp_path / "s.zarr")
    probe = train_probe(tmp_path / "s.zarr", tmp_path / "probe", replace(HEAD, epochs=2))
    assert load_run(probe.run).config["feature"] == "embedding-invented"
    spec = embedding_spec(weights_sha256="e" * 64)
    add_feature(tmp_path / "s.zarr", "embedding-other", spec)
    writer = ShardWriter(tmp_path / "s.zarr", feature="embedding-other", spec=spec, shard="one")
    writer.append(np.zeros((1, 16), np.float16), frame_index=np.zeros(1), pts_seconds=np.zeros(1))
    writer.ok(SourceFacts(id="RedUp/v00"))
    writer.finish()
    publish(tmp_path / "s.zarr")
    assert evaluate_run(probe.run, tmp_path / "s.zarr").metrics == probe.test
    with pytest.raises(FeatureError, match="ambiguous"):
        train_probe(tmp_path / "s.zarr", tmp_path / "more", replace(HEAD, epochs=2))


def test_a_run_behind_a_link(store: Path, motion_run: Path, tmp_path: Path) -> None:
    (tmp_path / "disk" / "far" / "away").mkdir(parents=True)
    (tmp_path / "runs").symlink_to(tmp_path / "disk" / "far" / "away")
    config = replace(HEAD, epochs=1, motion_run=str(motion_run))
    found = train_fusion(store, tmp_path / "runs" / "fusion", config)
    assert evaluate_run(found.run, store).metrics == found.test


class TestFeatures:
    ids = ("RedUp/v03", "BlueDown/v04", "RedUp/v00")

    def features(
        self,
        store: Path,
        motion_run: Path | None,
        *,
        trained: tuple[str, ...] = (),
        every_row: bool = False,
        frames: str = "all",
        seed: int = 0,
    ) -> Features:
        images = ImageEmbeddings(open_store(store), "embedding-invented", self.ids, CPU, frames=frames, seed=seed)
        if motion_run is None:
            return Features(images, None)
        pooled = open_store(motion_run / "features.zarr")
        return Features(images, PooledMotion(pooled, self.ids, trained, CPU, segments=3, every_row=every_row))

    def test_evaluation_sees_every_row_or_their_mean(self, store: Path, motion_run: Path) -> None:
        opened, pooled = open_store(store), open_store(motion_run / "features.zarr")
        rows = np.stack([pooled.read("mv-tsn", video) for video in self.ids]).astype(np.float32)
        images = np.stack([opened.read("embedding", video) for video in self.ids]).astype(np.float32)
        videos = np.array([2, 0])
        means = self.features(store, motion_run).whole(videos)
        np.testing.assert_allclose(means.motion, rows[videos].mean(1, keepdims=True), rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(means.images, images[videos])
        np.testing.assert_allclose(means.position, [[1 / 6, 0.5, 5 / 6]] * 2, rtol=1e-6)
        assert means.there.all()
        every = self.features(store, motion_run, every_row=True).whole(videos)
        np.testing.assert_array_equal(every.motion, rows[videos])
        middle = self.features(store, None, frames="middle").whole(videos)
        assert middle.motion is None
        np.testing.assert_array_equal(middle.images[:, 0], images[videos, 1])
        own = [self.features(store, None, frames="random", seed=seed).whole(videos).images for seed in (0, 0, 1, 2, 3)]
        assert torch.equal(own[0], own[1])
        assert not all(torch.equal(own[0], other) for other in own[2:])

    def test_training_draws_rows_of_one_augmented_view(self, store: Path, motion_run: Path) -> None:
        pooled = open_store(motion_run / "features.zarr")
        assert set(self.ids) <= set(pooled.ids("mv-tsn-views")) < set(pooled.ids("mv-tsn"))
        views = pooled.read("mv-tsn-views", self.ids[2]).astype(np.float32).reshape(TSN.views, 9, -1)
        features, rng = (
            self.features(store, motion_run, trained=self.ids[::2], frames="random"),
            np.random.default_rng(0),
        )
        draws = [features.sample(np.array([2, 0]), rng) for _ in range(40)]  # the trained ones
        seen = set()
        for draw in draws:
            assert draw.motion is not None
            first = draw.motion[0].numpy()
            (view,) = [v for v, rows in enumerate(views) if all((rows == row).all(1).any() for row in first)]
            parts = [int(np.flatnonzero((views[view] == row).all(1))[0]) // 3 for row in first]
            assert parts == [0, 1, 2]
            seen.add(view)
        assert seen == set(range(TSN.views))
        assert len({tuple(draw.images[0, 0].tolist()) for draw in draws}) == 3

    def test_without_views_it_draws_from_the_plain_rows(self, store: Path, motion_run: Path) -> None:
        trained = (*self.ids[:1], "BlueDown/v17")  # one of the test side: the run has no views of it
        features = self.features(store, motion_run, trained=trained)
        drawn = features.sample(np.array([0]), np.random.default_rng(0))
        assert drawn.motion is not None
        rows = open_store(motion_run / "features.zarr").read("mv-tsn", self.ids[0]).astype(np.float32)
        found = [int(np.flatnonzero((rows == row).all(1))[0]) for row in drawn.motion[0].numpy()]
        assert [number // 9 for number in found] == [0, 1, 2]
