"""The table of controls: every row for every split and seed, interrupted and gone on with, and refusals."""

import csv
import json
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from synthetic import corpus, write_store

from moclip.cli import main
from moclip.errors import RunError
from moclip.pipeline.learn.ablate import Ablation, ablate, markdown
from moclip.pipeline.learn.evaluate import evaluate_run
from moclip.pipeline.learn.fit import EpochRow

torch.set_num_threads(1)
SETTINGS = (
    "tsn.backbone=timm:test_efficientnet", "tsn.weights=none", "tsn.input_size=32", "tsn.epochs=6", "tsn.batch=8",
    "tsn.lr=0.003", "tsn.views=1", "fusion.epochs=20", "fusion.lr=0.003", "probe.epochs=10", "probe.lr=0.003",
)  # fmt: skip
ABLATION = Ablation(("1", "2"), (0,), settings=SETTINGS)


class Interrupted(Exception):
    pass


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    clips = [replace(clip, images=3) for clip in corpus(9, splits=("1", "2"))]
    return write_store(tmp_path_factory.mktemp("ablate") / "s.zarr", clips)


def test_a_table_that_was_interrupted_is_gone_on_with(store: Path, tmp_path: Path) -> None:
    begun: list[str] = []
    trained: list[str] = []

    def on_run(name: str, row: EpochRow | None) -> None:
        (begun if row is None else trained).append(name)
        if len(begun) == 4 and row is not None:
            raise Interrupted

    with pytest.raises(Interrupted):
        ablate(store, tmp_path / "out", ABLATION, on_run)
    before = set(trained[:-1])
    trained.clear()
    rows = ablate(store, tmp_path / "out", ABLATION, on_run)
    finished = before - {begun[3]}
    assert len(finished) == 3
    assert not finished & set(trained)

    names = [row.model for row in rows]
    assert names == [
        "motion", "image-random-linear", "image-random-mlp", "image-middle-linear", "image-middle-mlp",
        "image-all-linear", "image-all-mlp", "image-all-attention", "score-average", "fused-middle-mlp", "fused-mlp",
        "fused-linear", "fused-gated", "fused-attention", "fused-cross-attention",
    ]  # fmt: skip
    by_name = {row.model: row for row in rows}
    assert all(set(row.tests) == {("1", 0), ("2", 0)} for row in rows)
    run = tmp_path / "out" / "split-2" / "seed-0" / "fused-gated"
    assert by_name["fused-gated"].tests["2", 0].top1 == evaluate_run(run, store).metrics.top1
    gated = [test.top1 for test in by_name["fused-gated"].tests.values()]
    assert (by_name["fused-gated"].mean, by_name["fused-gated"].sd) == (statistics.mean(gated), statistics.stdev(gated))
    assert by_name["fused-mlp"].mean > max(by_name["motion"].mean, by_name["image-all-mlp"].mean)
    motion, image = (pq.read_table(run.parent / name / "predictions.parquet") for name in ("motion", "image-all-mlp"))
    assert motion["id"].to_pylist() == image["id"].to_pylist()
    scores = [np.array(table["scores"].to_pylist()) for table in (motion, image)]
    classes = json.loads((run / "config.json").read_text())["classes"]
    called = [classes[i] for i in np.mean(scores, 0).argmax(1)]
    share = np.mean([a == b for a, b in zip(called, motion["label"].to_pylist(), strict=True)])
    assert by_name["score-average"].tests["2", 0].top1 == pytest.approx(share)

    written = list(csv.DictReader((tmp_path / "out" / "table.csv").read_text().splitlines()))
    assert len(written) == 2 * len(rows)
    assert (tmp_path / "out" / "table.md").read_text().splitlines() == list(markdown(rows))
    other = write_store(tmp_path / "other.zarr", corpus(8, splits=("1", "2")))
    with pytest.raises(RunError, match="is of another store"):
        ablate(other, tmp_path / "out", ABLATION, on_run)
    with pytest.raises(RunError, match=r"motion was trained otherwise: epochs is 6, 7 was asked for"):
        ablate(store, tmp_path / "out", replace(ABLATION, settings=(*SETTINGS, "tsn.epochs=7")), lambda *_: None)


def test_the_command(store: Path, tmp_path: Path) -> None:
    settings = [word for setting in (*SETTINGS, "tsn.epochs=1", "fusion.epochs=1", "probe.epochs=1")
                for word in ("--set", setting)]  # fmt: skip
    command = ["ablate", str(store), "--splits", "1", "--seeds", "3", "--out", str(tmp_path / "a"), *settings]
    found = CliRunner().invoke(main, command)
    assert found.exit_code == 0, found.output
    assert "| model | top-1, mean ± sd | 1/3 |" in found.output
    assert CliRunner().invoke(main, [*command[:5], "x", *command[6:]]).exit_code == 2
    with pytest.raises(RunError, match=r"expected kind\.name=value \(tsn"):
        replace(ABLATION, settings=("epochs=3",))
    with pytest.raises(RunError, match="lrr"):
        ablate(store, tmp_path / "b", replace(ABLATION, settings=("fusion.lrr=1",)), lambda *_: pytest.fail("trained"))
    with pytest.raises(RunError, match="exists and is no ablation"):
        ablate(store, store, replace(ABLATION, splits=("1",)), lambda *_: None)
    with pytest.raises(RunError, match=r"image-random-mlp: .*no number"):
        ablate(store, tmp_path / "c", replace(ABLATION, settings=(*settings[1::2], "probe.lr=1e30")), lambda *_: None)
    for own in ("fusion.head=gated", "probe.frames=all", "tsn.seed=3", "probe.feature=x"):
        with pytest.raises(RunError, match="is what the table varies"):
            replace(ABLATION, settings=(own,))
