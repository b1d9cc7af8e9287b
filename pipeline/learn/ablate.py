"""The controls that tell what each part is worth: every model with the same splits, seeds and protocol, in one table.

``OUT/split-1/seed-0/motion`` and the like are runs as ``moclip train`` makes them. What is finished is not trained
again, what broke off goes on.
"""

import csv
import hashlib
import io
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from moclip.errors import EncoderError, RunError
from moclip.pipeline.learn.clips import Clips, split_table
from moclip.pipeline.learn.fit import EpochRow
from moclip.pipeline.learn.fusion import as_saved, train_fusion, train_probe
from moclip.pipeline.learn.fusion_model import FusionConfig
from moclip.pipeline.learn.metrics import score
from moclip.pipeline.learn.recipes import configured
from moclip.pipeline.learn.run_writer import finished_as
from moclip.pipeline.learn.runs import load_run
from moclip.pipeline.learn.tsn import TSNConfig, train_tsn
from moclip.pipeline.learn.tsn import as_saved as tsn_as_saved
from moclip.store import Store, open_store, write_atomic

MOTION, AVERAGE = "motion", "score-average"
#: Image-only controls: head and frames. Where every clip has one stored frame, there are only those of the middle one.
_PROBES = (
    ("linear", "random"), ("mlp", "random"), ("linear", "middle"), ("mlp", "middle"),
    ("linear", "all"), ("mlp", "all"), ("attention", "all"),
)  # fmt: skip
#: Fusions: the same. That of one frame is the published one.
_FUSIONS = (
    ("mlp", "middle"), ("mlp", "all"), ("linear", "all"), ("gated", "all"), ("attention", "all"),
    ("cross-attention", "all"),
)  # fmt: skip

#: What a setting cannot say: the rows, or the command's own options, say it.
_OWN = ("split", "seed", "device", "head", "frames", "motion_run", "zeroshot_run")


@dataclass(frozen=True)
class Variant:
    """One row of the table: ``kind`` of training, and the values that make it this row."""

    name: str
    kind: str
    values: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Tested:
    """How one run did on its test clips; accuracies in [0, 1]."""

    clips: int
    top1: float
    mean_class_accuracy: float


@dataclass(frozen=True)
class Row:
    """One model's tests, by (split, seed)."""

    model: str
    tests: Mapping[tuple[str, int], Tested]

    @property
    def mean(self) -> float:
        """Of top-1."""
        return statistics.mean(test.top1 for test in self.tests.values())

    @property
    def sd(self) -> float | None:
        """The standard deviation of a sample; None of a single run."""
        return statistics.stdev(test.top1 for test in self.tests.values()) if len(self.tests) > 1 else None


@dataclass(frozen=True)
class Ablation:
    """Which trainings to make: ``recipe`` and ``settings`` (``tsn.epochs=5``) are those of ``moclip train``."""

    splits: Sequence[str]
    seeds: Sequence[int] = (0, 1, 2)
    recipe: str = "fast"
    settings: Sequence[str] = ()
    feature: str = "embedding"
    device: str = "auto"

    def config(self, config: type[Any], kind: str, split: str, seed: int, **given: Any) -> Any:
        mine = [text.partition(".")[2] for text in self.settings if text.partition(".")[0] == kind]
        return configured(config, kind, self.recipe, mine, split=split, seed=seed, device=self.device, **given)

    def __post_init__(self) -> None:
        for text in self.settings:
            kind, _, setting = text.partition(".")
            if kind not in ("tsn", "fusion", "probe"):
                raise RunError(
                    f"no setting {text!r}; expected kind.name=value (tsn, fusion, probe), such as tsn.epochs=10"
                )
            if (name := setting.partition("=")[0].strip()) in _OWN or (name == "feature" and kind != "tsn"):
                raise RunError(f"{kind}.{name} is what the table varies, or has an option of its own; leave it out")


def variants(store: Store, feature: str) -> list[Variant]:
    """The rows of a store's table."""
    name = store.resolve(feature)
    several = bool((store.row_counts(name, store.ids(name)) > 1).any())
    probes = [
        Variant(f"image-{frames}-{head}", "probe", {"head": head, "frames": frames})
        for head, frames in _PROBES
        if several or frames == "middle"
    ]
    fusions = [
        Variant(f"fused-{'' if frames == 'all' else frames + '-'}{head}", "fusion", {"head": head, "frames": frames})
        for head, frames in _FUSIONS
        if several or frames == "all"
    ]
    return [Variant(MOTION, "tsn"), *probes, Variant(AVERAGE, "average"), *fusions]


def ablate(
    store_path: str | Path, out: str | Path, ablation: Ablation, on_run: Callable[[str, EpochRow | None], None]
) -> list[Row]:
    """Train every cell for every split and seed, and write ``table.csv`` and ``table.md`` into ``out``.

    ``on_run`` is told of every run when it begins, and of its epochs.
    """
    store, out = open_store(store_path), Path(out)
    table = variants(store, ablation.feature)
    for variant in table:  # a value that there is not shows before anything is trained
        if variant.kind != "average":
            _Run(store_path, store, out, variant, ablation, ablation.splits[0], 0, lambda _: None).config()
    _claim(out, store, ablation)
    found: dict[str, dict[tuple[str, int], Tested]] = {variant.name: {} for variant in table}
    for split in ablation.splits:
        for seed in ablation.seeds:
            folder = out / f"split-{split}" / f"seed-{seed}"
            for variant in table:
                name = f"split {split}, seed {seed}, {variant.name}"
                on_run(name, None)
                run = _Run(store_path, store, folder, variant, ablation, split, seed, partial(on_run, name))
                found[variant.name][split, seed] = run.result()
    rows = [Row(name, tests) for name, tests in found.items()]
    write_atomic(out / "table.csv", _csv(rows).encode())
    write_atomic(out / "table.md", "\n".join(markdown(rows)).encode() + b"\n")
    return rows


def _claim(out: Path, store: Store, ablation: Ablation) -> None:
    """Refuse a folder whose runs saw other clips, labels or features: a table compares what is alike."""
    motion = ablation.config(TSNConfig, "tsn", ablation.splits[0], 0).feature
    features = [store.resolve(name) for name in (motion, ablation.feature)]
    about: dict[str, str] = {name: _digest([store.features[name].digest, store.ids(name)]) for name in features}
    about |= {f"split {name}": _digest(split_table(store, name).to_pylist()) for name in ablation.splits}
    path = out / "ablation.json"
    if out.exists() and not path.exists() and any(out.iterdir()):
        raise RunError(f"{out} exists and is no ablation; give another --out")
    there: dict[str, str] = json.loads(path.read_bytes()) if path.exists() else {}
    if changed := [name for name, digest in about.items() if there.get(name, digest) != digest]:
        raise RunError(
            f"{out} is of another store, or of this one before it changed ({', '.join(changed)}); "
            "give another --out, or remove it"
        )
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps({**there, **about}, indent=1).encode())


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


@dataclass(frozen=True)
class _Run:
    store_path: str | Path
    store: Store
    folder: Path
    variant: Variant
    ablation: Ablation
    split: str
    seed: int
    on_epoch: Callable[[EpochRow], None]

    def result(self) -> Tested:
        """The test metrics, of a training that is made now or was made before."""
        if self.variant.kind == "average":
            return self._average()
        kind, config, path = self.variant.kind, self.config(), self.folder / self.variant.name
        saved: Any = tsn_as_saved(config, self.store) if kind == "tsn" else as_saved(config, self.store, path)
        if not finished_as(path, saved):
            train: Any = {"tsn": train_tsn, "probe": train_probe, "fusion": train_fusion}[kind]
            try:
                train(self.store_path, path, config, on_epoch=self.on_epoch)
            except EncoderError as error:
                raise EncoderError(str(error).replace("--weights ", "--set tsn.weights=")) from error
            except RunError as error:
                raise RunError(f"{path}: {error}") from error
        test = json.loads((path / "metrics.json").read_bytes())["test"]
        return Tested(test["clips"], test["top1"], test["mean_class_accuracy"])

    def config(self) -> Any:
        """The configuration of its training; :class:`RunError` if a value is none."""
        ablation, kind = self.ablation, self.variant.kind
        if kind == "tsn":
            return ablation.config(TSNConfig, kind, self.split, self.seed)
        motion = {"motion_run": str(self.folder / MOTION)} if kind == "fusion" else {}
        given = {**self.variant.values, **motion, "feature": ablation.feature}
        return ablation.config(FusionConfig, kind, self.split, self.seed, **given)

    def _average(self) -> Tested:
        """The mean of the probabilities that the motion-only and the image-only model give."""
        image = "image-all-mlp" if (self.folder / "image-all-mlp").exists() else "image-middle-mlp"
        motion, probe = (pq.read_table(self.folder / name / "predictions.parquet") for name in (MOTION, image))
        return _averaged(motion, probe, load_run(self.folder / MOTION).classes, self.split)


def _averaged(motion: Any, image: Any, classes: Sequence[str], split: str) -> Tested:
    of_image = dict(zip(image["id"].to_pylist(), image["scores"].to_pylist(), strict=True))
    both = [row for row in motion.to_pylist() if row["id"] in of_image]
    position = {name: i for i, name in enumerate(classes)}
    clips = Clips(tuple(row["id"] for row in both), np.array([position[row["label"]] for row in both], np.int64))
    mean = (torch.tensor([row["scores"] for row in both]) + torch.tensor([of_image[row["id"]] for row in both])) / 2
    found = score(mean.clamp(min=1e-12).log(), clips, classes, split=split, protocol="average", missing={}).metrics
    return Tested(found.clips, found.top1, found.mean_class_accuracy)


def markdown(rows: Sequence[Row]) -> Iterator[str]:
    """The table as Markdown: mean ± standard deviation of top-1 in percent, and every run.

    A clip without one of the features is in some rows and not in others; then the table says so.
    """
    keys = list(rows[0].tests)
    yield "| model | top-1, mean ± sd | " + " | ".join(f"{split}/{seed}" for split, seed in keys) + " |"
    yield "|---" * (len(keys) + 2) + "|"
    for row in rows:
        spread = "" if row.sd is None else f" ± {100 * row.sd:.1f}"
        yield (
            f"| {row.model} | {100 * row.mean:.1f}{spread} | "
            + " | ".join(f"{100 * row.tests[key].top1:.1f}" for key in keys)
            + " |"
        )
    if any(row.tests[key].clips != rows[0].tests[key].clips for row in rows for key in keys):
        yield ""
        yield "Not every clip has every feature: rows differ in how many test clips they are of (table.csv)."


def _csv(rows: Sequence[Row]) -> str:
    text = io.StringIO(newline="")
    table = csv.writer(text)
    table.writerow(["model", "split", "seed", "clips", "top1", "mean_class_accuracy"])
    for row in rows:
        table.writerows([row.model, *key, *astuple(test)] for key, test in row.tests.items())
    return text.getvalue()
