"""A run directory: what was trained, from what, how it went and how good it is.

RUN/config.json            kind, classes, split, features' specifications, the training's configuration
RUN/model.safetensors      the weights of the best epoch so far
RUN/trained_on.parquet     the ids of the clips of train and val
RUN/history.csv            one row an epoch
RUN/features.zarr          pooled motion features (kind tsn), a feature store
RUN/predictions.parquet    the test clips: id, label, predicted, scores
RUN/metrics.json           written last: a run without it is unfinished
RUN/evaluations/           what later evaluations found
"""

import csv
import io
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from moclip.errors import RunError
from moclip.pipeline.learn.clips import Split
from moclip.pipeline.learn.fit import EpochRow, Fitted
from moclip.pipeline.learn.metrics import Evaluation, Metrics
from moclip.store import FeatureSpec, Store, parquet_bytes, write_atomic

FORMAT = 1
KINDS = ("tsn", "fusion", "probe")
FEATURES = "features.zarr"
_FILES = ("model.safetensors", "trained_on.parquet", "history.csv", "predictions.parquet", FEATURES, "evaluations")


@dataclass(frozen=True)
class TrainResult:
    """A finished training: its directory, its test metrics, and the epoch chosen on the held-out part."""

    run: Path
    kind: str
    test: Metrics
    best: EpochRow
    seconds: float


@dataclass(frozen=True)
class Run:
    """A run as its ``config.json`` tells it. ``config`` is the training's configuration, by field."""

    path: Path
    kind: str
    classes: tuple[str, ...]
    split: str
    split_digest: str
    features: Mapping[str, FeatureSpec]
    config: Mapping[str, Any]

    def weights(self) -> dict[str, torch.Tensor]:
        try:
            return dict(load_file(self.path / "model.safetensors"))
        except (OSError, SafetensorError) as error:
            raise RunError(f"{self.path}/model.safetensors cannot be read ({error}); train the run again") from error

    def trained_on(self) -> set[str]:
        """The ids of the clips that took part in training, those held out to choose the epoch included."""
        try:
            return set(pq.read_table(self.path / "trained_on.parquet")["id"].to_pylist())
        except (OSError, KeyError, pa.ArrowException) as error:
            raise RunError(f"{self.path}/trained_on.parquet cannot be read ({error}); train the run again") from error

    @property
    def finished(self) -> bool:
        return (self.path / "metrics.json").exists()

    def check_features(self, *stores: Store) -> None:
        """Raise :class:`RunError` unless the features in ``stores`` mean what this run was trained on."""
        there = {name: spec for store in stores for name, spec in store.features.items()}
        places = " and ".join(str(store.url) for store in stores)
        for name, trained in self.features.items():
            found = there.get(name)
            if found is None or found.digest != trained.digest:
                what = "has no such feature" if found is None else "holds another specification under that name"
                raise RunError(
                    f"{self.path} was trained on {name} ({trained.digest}), but {places} {what}; "
                    "extract it as it was, or train on this store"
                )


def load_run(path: str | Path, *, kind: str | None = None) -> Run:
    """Read a run's configuration. :class:`RunError` if it is no run, too new, or not of ``kind``."""
    path = Path(path)
    if not path.is_dir():
        raise RunError(f"no run at {path}; `moclip train tsn|fusion|probe STORE --out RUN` makes one")
    try:
        data = json.loads((path / "config.json").read_bytes())
        if data["format"] > FORMAT:
            raise RunError(f"{path} has format {data['format']}, this moclip reads {FORMAT}; upgrade moclip")
        run = Run(
            path=path,
            kind=str(data["kind"]),
            classes=tuple(data["classes"]),
            split=str(data["split"]),
            split_digest=str(data["split_digest"]),
            features={name: FeatureSpec.from_json(spec) for name, spec in data["features"].items()},
            config=dict(data["config"]),
        )
    except (OSError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path} is not a moclip run: its config.json is missing or incomplete ({error!r})") from error
    except json.JSONDecodeError as error:
        raise RunError(f"{path}/config.json is not JSON ({error}); train the run again") from error
    if run.kind not in KINDS or (kind is not None and run.kind != kind):
        raise RunError(f"{path} is a run of kind {run.kind!r}; expected {kind or ' or '.join(KINDS)}")
    return run


class RunWriter:
    """Writes a run while it is trained. Each file appears whole; ``metrics.json`` comes last."""

    def __init__(
        self, out: str | Path, kind: str, config: Any, split: Split, features: Mapping[str, FeatureSpec]
    ) -> None:
        self.path = _claim(Path(out))
        self._history: list[EpochRow] = []
        about = {
            "format": FORMAT,
            "kind": kind,
            "classes": split.classes,
            "split": split.name,
            "split_digest": split.digest,
            "features": {name: spec.to_json() for name, spec in features.items()},
            "config": asdict(config),
        }
        trained = sorted({*split.train.ids, *split.val.ids})
        write_atomic(self.path / "trained_on.parquet", parquet_bytes(pa.table({"id": pa.array(trained, pa.string())})))
        write_atomic(self.path / "config.json", _json(about))

    def keep(self, state: dict[str, torch.Tensor]) -> None:
        """Replace the run's weights."""
        write_atomic(self.path / "model.safetensors", save({k: v.contiguous() for k, v in state.items()}))

    def record(self, row: EpochRow) -> None:
        """Add an epoch to the history."""
        self._history.append(row)
        text = io.StringIO(newline="")
        table = csv.DictWriter(text, fieldnames=list(asdict(row)))
        table.writeheader()
        table.writerows(asdict(epoch) for epoch in self._history)
        write_atomic(self.path / "history.csv", text.getvalue().encode())

    def finish(self, kind: str, fitted: Fitted, test: Evaluation) -> TrainResult:
        """Write predictions, then metrics."""
        write_atomic(self.path / "predictions.parquet", parquet_bytes(test.predictions))
        about = {"kind": kind, "best": asdict(fitted.best), "test": asdict(test.metrics)}
        write_atomic(self.path / "metrics.json", _json(about))
        seconds = sum(row.seconds for row in fitted.history)
        return TrainResult(self.path, kind, test.metrics, fitted.best, seconds)


def write_evaluation(run: Run, found: Evaluation) -> None:
    """Keep a later evaluation in the run, under its split and protocol."""
    name = re.sub(r"[^\w.-]", "_", f"{found.metrics.split}-{found.metrics.protocol}")
    folder = run.path / "evaluations"
    folder.mkdir(exist_ok=True)
    write_atomic(folder / f"{name}.parquet", parquet_bytes(found.predictions))
    write_atomic(folder / f"{name}.json", _json(asdict(found.metrics)))


def _claim(out: Path) -> Path:
    """Make the directory, or empty the unfinished run that is in it; refuse anything else."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not out.is_dir() or not _is_unfinished(out):
            raise RunError(f"{out} exists and is not an unfinished run; give another --out, or remove it")
        for name in _FILES:
            there = out / name
            if there.is_dir():
                shutil.rmtree(there)
            else:
                there.unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    return out


def _is_unfinished(out: Path) -> bool:
    try:
        return not load_run(out).finished
    except RunError:
        return False


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()
