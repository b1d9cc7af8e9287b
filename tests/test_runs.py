"""Run directories: whole files, refusals that say what to do, unfinished runs that are gone on with;
metrics.
"""

import json
import pickle
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic import embedding_spec

from moclip.errors import RunError
from moclip.pipeline.learn.card import ModelCard
from moclip.pipeline.learn.clips import Clips, Split
from moclip.pipeline.learn.fit import EpochRow, Fitted, Snapshot
from moclip.pipeline.learn.metrics import Evaluation, score
from moclip.pipeline.learn.run_writer import RunWriter, write_evaluation
from moclip.pipeline.learn.runs import load_run

ROW = EpochRow(1, 0.5, 0.25, 1.0, 2.0, 0.01)


@dataclass(frozen=True)
class Config:
    split: str = "1"
    seed: int = 0


def clips(*targets: int) -> Clips:
    return Clips(tuple(f"v{i}" for i in range(len(targets))), np.array(targets, np.int64))


SPLIT = Split("1", ("a", "b", "c"), clips(0, 1, 2), clips(0), clips(1, 1), {}, "digest")


def evaluation() -> Evaluation:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 1.0]])
    return score(logits, SPLIT.test, SPLIT.classes, split="1", protocol="25x1", missing={"truncated": 2})


def finished(out: Path, kind: str = "tsn") -> RunWriter:
    with RunWriter(out, kind, Config(), SPLIT, {"embedding-x": embedding_spec()}) as writer:
        writer.keep({"w": torch.arange(6.0).reshape(2, 3).T}, [ROW])
        writer.finish(Fitted((ROW,), ROW), evaluation(), ModelCard(()))
    return writer


def test_a_run_reads_back(tmp_path: Path) -> None:
    finished(tmp_path / "run")
    run = load_run(tmp_path / "run", kind="tsn")
    assert (run.kind, run.classes, run.split, run.split_digest) == ("tsn", ("a", "b", "c"), "1", "digest")
    assert run.config == {"split": "1", "seed": 0}
    assert run.features == {"embedding-x": embedding_spec()}
    assert run.finished
    assert torch.equal(run.weights()["w"], torch.arange(6.0).reshape(2, 3).T)
    write_evaluation(run, evaluation())
    assert json.loads((run.path / "evaluations" / "1-25x1.json").read_text())["clips"] == 2
    assert not [path for path in run.path.rglob("*") if path.name.endswith(".tmp")]


def test_a_finished_run_or_anything_else_is_never_overwritten(tmp_path: Path) -> None:
    finished(tmp_path / "run")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("three years of work")
    (tmp_path / "file").write_text("")
    for name in ("run", "other", "file"):
        with pytest.raises(RunError, match="give another --out"):
            RunWriter(tmp_path / name, "tsn", Config(), SPLIT, {})
    with pytest.raises(RunError, match=r"is a finished run of something else: .*seed is 0, 7 was asked for"):
        RunWriter(tmp_path / "run", "tsn", Config(seed=7), SPLIT, {})
    with pytest.raises(RunError, match="it is a tsn, a probe was asked for"):
        RunWriter(tmp_path / "run", "probe", Config(seed=7), SPLIT, {})
    assert (tmp_path / "other" / "thesis.txt").exists()


def test_an_unfinished_run_is_gone_on_with_if_it_is_the_same(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run", "tsn", Config(), SPLIT, {})
    assert writer.saved() is None
    state = {"w": torch.zeros(1)}
    snapshot = Snapshot(
        {"w": torch.ones(1)}, {"state": {}, "param_groups": []}, [torch.get_rng_state()], [ROW], 0, state
    )
    writer.save(snapshot)
    (writer.new_folder("features.zarr")).mkdir()
    assert not load_run(tmp_path / "run").finished

    again = RunWriter(tmp_path / "run", "tsn", Config(), SPLIT, {})
    saved = again.saved()
    assert saved is not None
    assert (saved.history, saved.best, saved.model, saved.best_state) == ([ROW], 0, snapshot.model, state)
    assert torch.equal(saved.random[0], snapshot.random[0])
    assert not again.new_folder("features.zarr").exists()
    with pytest.raises(RunError, match="it is a tsn, a probe was asked for"):
        RunWriter(tmp_path / "run", "probe", Config(seed=4), SPLIT, {})

    (tmp_path / "run" / "checkpoint.pt").write_bytes(pickle.dumps(print, protocol=2))
    with pytest.raises(RunError, match=r"checkpoint\.pt cannot be read \(UnpicklingError\); remove it"):
        again.saved()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run", "tsn", Config(), SPLIT, {})
    RunWriter(tmp_path / "run", "tsn", Config(), SPLIT, {})  # this process may begin again
    code = f"import fcntl; fcntl.lockf(open({str(tmp_path / 'run' / '.lock')!r}, 'wb'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    theirs = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "BlockingIOError" in theirs.stderr
    writer.write_test(evaluation())
    assert not (tmp_path / "run" / ".lock").exists()

    holder = f"{code.split(';')[0]}; file = open({str(tmp_path / 'other' / '.lock')!r}, 'wb'); "
    holder += "fcntl.lockf(file, fcntl.LOCK_EX); print('held', flush=True); input()"
    (tmp_path / "other").mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(RunError, match="another process is training"):
            RunWriter(tmp_path / "other", "tsn", Config(seed=7), SPLIT, {})
        process.communicate("\n")
    RunWriter(tmp_path / "other", "tsn", Config(), SPLIT, {})


def test_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run at"):
        load_run(tmp_path / "none")
    with pytest.raises(RunError, match="is not a moclip run"):
        load_run(tmp_path)
    finished(tmp_path / "run", "fusion")
    with pytest.raises(RunError, match="kind 'fusion'; expected tsn"):
        load_run(tmp_path / "run", kind="tsn")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    for broken, message in (
        (json.dumps({**config, "format": 99}), "upgrade moclip"),
        (json.dumps({**config, "classes": [1, 2]}), "classes are no names"),
        (json.dumps({**config, "classes": ["a", "a"]}), "a class is there twice"),
        (json.dumps({**config, "config": {}}), "incomplete .*split"),
        (json.dumps({**config, "config": {"split": ["1"]}}), "split is no name"),
        ("[" * 100_000, "is not JSON"),
        (json.dumps({**config, "kind": "evl9"}), "kind 'evl9'"),
        ("[]", "is not a moclip run"),
        ("{", "is not JSON"),
    ):
        (tmp_path / "run" / "config.json").write_text(broken)
        with pytest.raises(RunError, match=message):
            load_run(tmp_path / "run")


def test_metrics_are_counted_by_hand() -> None:
    classes = ("a", "b", "c", "d", "e", "f", "never")
    targets = np.array([0, 0, 1, 2, 3, 4, 5], np.int64)
    logits = torch.full((7, 7), -5.0)
    called = [0, 1, 1, 2, 0, 4, 0]
    for row, (target, call) in enumerate(zip(targets, called, strict=True)):
        logits[row] += torch.linspace(0, 0.1, 7)
        logits[row, int(target)] += 3
        logits[row, call] += 5
    logits[6, 5] -= 9  # the last clip's class comes last
    found = score(logits, clips(*targets), classes, split="1", protocol="x", missing={})
    metrics = found.metrics
    assert metrics.top1 == pytest.approx(4 / 7)
    assert metrics.top5 == pytest.approx(6 / 7)
    assert metrics.mean_class_accuracy == pytest.approx((0.5 + 1 + 1 + 0 + 1 + 0) / 6)
    assert metrics.per_class["a"].n == 2
    assert metrics.per_class["a"].accuracy == pytest.approx(0.5)
    assert metrics.per_class["never"].accuracy is None
    assert metrics.confusion[0][:2] == (1, 1)
    assert metrics.confusion[3][0] == 1
    assert sum(map(sum, metrics.confusion)) == 7
    assert metrics.most_confused(2) == [("a", "b", 1), ("d", "a", 1)]
    sure = logits.softmax(1).amax(1)
    right = torch.tensor(called) == torch.from_numpy(targets)
    bins = torch.bucketize(sure, torch.linspace(0, 1, 16), right=True)
    gaps = [(sure[bins == b].sum() - right[bins == b].sum()).abs() for b in bins.unique()]
    assert metrics.calibration_error == pytest.approx(float(sum(gaps)) / 7, abs=1e-6)
    table = found.predictions
    assert table["predicted"].to_pylist() == [classes[call] for call in called]
    np.testing.assert_allclose([sum(row) for row in table["scores"].to_pylist()], 1, atol=1e-5)


def test_few_classes() -> None:
    one = score(torch.zeros(2, 1), clips(0, 0), ("only",), split="1", protocol="x", missing={})
    assert (one.metrics.top1, one.metrics.top5, one.metrics.confusion) == (1.0, 1.0, ((2,),))
    two = score(torch.eye(2), clips(1, 0), ("a", "b"), split="1", protocol="x", missing={})
    assert (two.metrics.top1, two.metrics.top5) == (0.0, 1.0)
