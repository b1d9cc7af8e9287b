"""A run directory: what was trained, from what, how it went and how good it is.

RUN/config.json            kind, classes, split, features' specifications, the training's configuration
RUN/model.safetensors      the weights of the best epoch so far
RUN/checkpoint.pt          what an unfinished training needs to go on
RUN/trained_on.parquet     the ids of the clips of train and val
RUN/history.csv            one row an epoch
RUN/features.zarr          pooled motion features (kind tsn), a feature store
RUN/predictions.parquet    the test clips: id, label, predicted, scores
RUN/metrics.json           written last: a run without it is unfinished
RUN/evaluations/           what later evaluations found
"""

import csv
import errno
import fcntl
import io
import json
import os
import pickle
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from moclip.errors import RunError
from moclip.pipeline.learn.card import ModelCard
from moclip.pipeline.learn.clips import Split
from moclip.pipeline.learn.fit import EpochRow, Fitted, Snapshot, State
from moclip.pipeline.learn.metrics import Evaluation, Metrics
from moclip.store import EXTRACTED, FeatureSpec, Store, parquet_bytes, write_atomic

FORMAT = 1
KINDS = ("tsn", "fusion", "probe", "zeroshot")
FEATURES = "features.zarr"
MOTION_KINDS = ("motion", "motion-accumulated")
_WEIGHTS = "model.safetensors"
_CHECKPOINT = "checkpoint.pt"
_LOCK = ".lock"
#: Of ``config.json``: what may change while a training goes on. (A configuration is compared value by value.)
_ANY = {"config", "device"}


@dataclass(frozen=True)
class TrainResult:
    """A finished training: its directory, its test metrics, the chosen epoch, the model's card.

    The epoch was chosen on ``val``, on ``test`` (as published), or on ``none``: it is the last.
    """

    run: Path
    kind: str
    test: Metrics
    best: EpochRow
    chosen_on: str
    seconds: float
    card: ModelCard


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

    def feature(self, *kinds: str) -> str:
        """The full name of the feature of one of ``kinds`` that the run was trained on."""
        names = [name for name, spec in self.features.items() if spec.kind in kinds]
        if len(names) != 1:
            raise RunError(f"{self.path}/config.json names {len(names)} features of kind {' or '.join(kinds)}; "
                           "expected one; train the run again")  # fmt: skip
        return names[0]

    def weights(self) -> dict[str, torch.Tensor]:
        try:
            return dict(load_file(self.path / _WEIGHTS))
        except (OSError, SafetensorError) as error:
            raise RunError(f"{self.path / _WEIGHTS} cannot be read ({error}); train the run again") from error

    def trained_on(self) -> set[str]:
        """The ids of the clips that took part in training, those held out to choose the epoch included."""
        try:
            return set(pq.read_table(self.path / "trained_on.parquet")["id"].to_pylist())
        except (OSError, KeyError, pa.ArrowException) as error:
            raise RunError(f"{self.path}/trained_on.parquet cannot be read ({error}); train the run again") from error

    @property
    def finished(self) -> bool:
        return (self.path / "metrics.json").exists()

    @property
    def has_weights(self) -> bool:
        """Whether the weights of an epoch are there, be it that training has not ended."""
        return (self.path / _WEIGHTS).exists()

    def check_features(self, *stores: Store) -> None:
        """Raise :class:`RunError` unless the features in ``stores`` mean what this run was trained on."""
        there = {name: spec for store in stores for name, spec in store.features.items()}
        for name, trained in self.features.items():
            found = there.get(name)
            if found is None or found.digest != trained.digest:
                what = "has no such feature" if found is None else "holds another specification under that name"
                store = stores[0].url if trained.kind in EXTRACTED else stores[-1].url
                raise RunError(
                    f"{self.path} was trained on {name} ({trained.digest}), but {store} {what}; "
                    f"{_remedy(name, trained, store, another=found is not None)}, or train on this store"
                )


def _remedy(name: str, spec: FeatureSpec, store: str, *, another: bool) -> str:
    """How to come by a feature that is not there, or (``another``) whose name is taken."""
    if spec.kind not in EXTRACTED:
        return "train the MV-TSN that it comes from as it was"
    if another:
        return "extract it into a store of its own"
    options = {
        "feature": spec.kind,
        "as": name if name != spec.kind and not name.startswith("embedding-") else None,
        **spec.parameters,
    }
    named = ("feature", "motion", "cell", "stride", "encoder", "frames", "clip_seconds", "as")
    asked = [f"--{key.replace('_', '-')} {options[key]}" for key in named if options.get(key) is not None]
    return f"`moclip extract SOURCE {store} {' '.join(asked)}` adds it"


def load_run(path: str | Path, *, kind: str | None = None) -> Run:
    """Read a run's configuration. :class:`RunError` if it is no run, too new, or not of ``kind``."""
    path = Path(path)
    if not path.is_dir():
        raise RunError(
            f"no run at {path}; `moclip train tsn|fusion|probe STORE --out RUN` (or `moclip zeroshot`) makes one"
        )
    try:
        data = json.loads((path / "config.json").read_bytes())
        if data["format"] > FORMAT:
            raise RunError(f"{path} has format {data['format']}, this moclip reads {FORMAT}; upgrade moclip")
        classes = data["classes"]
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise TypeError("classes are no names")
        if len(set(classes)) < len(classes):
            raise TypeError("a class is there twice")
        run = Run(
            path=path,
            kind=str(data["kind"]),
            classes=tuple(classes),
            split=str(data["split"]),
            split_digest=str(data["split_digest"]),
            features={name: FeatureSpec.from_json(spec) for name, spec in data["features"].items()},
            config=dict(data["config"]),
        )
        if not isinstance(run.config["split"], str | None):
            raise TypeError("split is no name")
    except (OSError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path} is not a moclip run: its config.json is missing or incomplete ({error!r})") from error
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path}/config.json is not JSON ({error}); train the run again") from error
    if run.kind not in KINDS or (kind is not None and run.kind != kind):
        raise RunError(f"{path} is a run of kind {run.kind!r}; expected {kind or ' or '.join(KINDS)}")
    return run


def load_weights(model: nn.Module, run: Run) -> None:
    """Put a run's weights into ``model``. :class:`RunError` if they are of another network."""
    try:
        model.load_state_dict(run.weights())
    except RuntimeError as error:
        raise RunError(
            f"{run.path / _WEIGHTS} holds another network than its config.json says; train the run again"
        ) from error


def finished_as(path: Path, config: Any) -> bool:
    """Whether a finished run of just this configuration is there. :class:`RunError` if it is one of another."""
    if not (path / "metrics.json").exists():
        return False
    if differing := _differing({"config": load_run(path).config}, {"config": json.loads(_json(asdict(config)))}):
        raise RunError(f"{path} was trained otherwise: {differing}; give another --out, or remove it")
    return True


class RunWriter:
    """Writes a run while it is trained. Each file appears whole; ``metrics.json`` comes last.

    An unfinished run of the same configuration is resumed; one of another is left alone, by a :class:`RunError` that
    says what differs. Until the ``with`` block ends no other process may write there.
    """

    def __init__(
        self, out: str | Path, kind: str, config: Any, split: Split, features: Mapping[str, FeatureSpec]
    ) -> None:
        self.path, self.kind = Path(out), kind
        about = {
            "format": FORMAT,
            "kind": kind,
            "classes": split.classes,
            "split": split.name,
            "split_digest": split.digest,
            "clips_digest": split.clips_digest,
            "features": {name: spec.to_json() for name, spec in features.items()},
            "config": asdict(config),
        }
        _check_free(self.path, _json(about))
        self._lock = _lock(self.path)
        _check_free(self.path, _json(about))  # another process may have finished it in between
        self._chosen_on_test = bool(getattr(config, "strict_reference", False))
        trained = sorted({*split.train.ids, *split.val.ids})
        write_atomic(self.path / "config.json", _json(about))
        write_atomic(self.path / "trained_on.parquet", parquet_bytes(pa.table({"id": pa.array(trained, pa.string())})))

    def __enter__(self) -> "RunWriter":
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            os.close(self._lock)

    def keep(self, state: State, history: Sequence[EpochRow]) -> None:
        text = io.StringIO(newline="")
        table = csv.DictWriter(text, fieldnames=[field.name for field in fields(EpochRow)])
        table.writeheader()
        table.writerows(asdict(epoch) for epoch in history)
        write_atomic(self.path / "history.csv", text.getvalue().encode())
        self.write_weights(state)

    def write_weights(self, state: State) -> None:
        write_atomic(self.path / _WEIGHTS, save({k: v.contiguous() for k, v in state.items()}))

    def save(self, snapshot: Snapshot) -> None:
        self.keep(snapshot.best_state, snapshot.history)
        written = io.BytesIO()
        torch.save({**vars(snapshot), "history": [asdict(row) for row in snapshot.history]}, written)
        write_atomic(self.path / _CHECKPOINT, written.getvalue())

    def saved(self) -> Snapshot | None:
        path = self.path / _CHECKPOINT
        if not path.exists():
            return None
        try:
            # Numbers and text alone: a run from a stranger is data.
            data = torch.load(path, map_location="cpu", weights_only=True)
            return Snapshot(**{**data, "history": [EpochRow(**row) for row in data["history"]]})
        except (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
            raise RunError(
                f"{path} cannot be read ({type(error).__name__}); remove it to train from the start"
            ) from error

    def new_folder(self, name: str) -> Path:
        """The path of a folder of the run; what a training that broke off left there is removed."""
        shutil.rmtree(self.path / name, ignore_errors=True)
        return self.path / name

    def write_test(self, test: Evaluation, **about: Any) -> None:
        """Write predictions, then metrics: the run is finished."""
        write_atomic(self.path / "predictions.parquet", parquet_bytes(test.predictions))
        write_atomic(self.path / "metrics.json", _json({"kind": self.kind, **about, "test": asdict(test.metrics)}))
        (self.path / _CHECKPOINT).unlink(missing_ok=True)
        (self.path / _LOCK).unlink(missing_ok=True)

    def finish(self, fitted: Fitted, test: Evaluation, card: ModelCard) -> TrainResult:
        chosen_on = "test" if self._chosen_on_test else "val"
        if fitted.best.val_top1 is None:
            chosen_on = "none"
        self.write_test(test, best=asdict(fitted.best), chosen_on=chosen_on, card=asdict(card))
        seconds = sum(row.seconds for row in fitted.history)
        return TrainResult(self.path, self.kind, test.metrics, fitted.best, chosen_on, seconds, card)


def write_evaluation(run: Run, found: Evaluation) -> None:
    """Keep a later evaluation in the run, under its split and protocol."""
    name = re.sub(r"[^\w.-]", "_", f"{found.metrics.split}-{found.metrics.protocol}")
    folder = run.path / "evaluations"
    folder.mkdir(exist_ok=True)
    write_atomic(folder / f"{name}.parquet", parquet_bytes(found.predictions))
    write_atomic(folder / f"{name}.json", _json(asdict(found.metrics)))


def _check_free(out: Path, about: bytes) -> None:
    """Refuse a directory that holds anything but an unfinished run of just this."""
    if out.exists() and (not out.is_dir() or any(not file.name.startswith(".") for file in out.iterdir())):
        try:
            what = "is a finished run" if load_run(out).finished else ""
        except RunError:
            what = "exists and is no run"
        if what:
            raise RunError(f"{out} {what}; give another --out, or remove it")
        there = json.loads((out / "config.json").read_bytes())
        if differing := _differing(there, json.loads(about)):
            raise RunError(
                f"{out} holds an unfinished run of something else: {differing}; "
                "train as it was begun to go on with it, give another --out, or remove it"
            )


def _lock(out: Path) -> int | None:
    """Make the directory this process's own until the file is closed, or the process ends; :class:`RunError` while
    another process trains there. None on a file system without locks.
    """
    out.mkdir(parents=True, exist_ok=True)
    file = os.open(out / _LOCK, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(file)
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise RunError(f"another process is training {out}; wait for it, or give another --out") from error
        return None
    for torn in out.glob(".*.tmp"):
        torn.unlink()
    return file


def _differing(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """What differs between two ``config.json``, in words; empty if nothing does."""
    old, new = ({**about, **about["config"]} for about in (there, here))
    names = [name for name in sorted({*old, *new} - _ANY) if old.get(name) != new.get(name)]
    return ", ".join(f"{name} is {_short(old.get(name))}, {_short(new.get(name))} was asked for" for name in names)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else "other"


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()
