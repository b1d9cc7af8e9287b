"""Writing a run directory (:mod:`.runs`): one process at a time, whole files, and what an unfinished training goes on
from.
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
import torch
from safetensors.torch import save

from moclip.errors import RunError
from moclip.pipeline.learn.card import ModelCard
from moclip.pipeline.learn.clips import Split
from moclip.pipeline.learn.fit import EpochRow, Fitted, Snapshot, State
from moclip.pipeline.learn.metrics import Evaluation, Metrics
from moclip.pipeline.learn.runs import FORMAT, WEIGHTS, Run, load_run
from moclip.store import FeatureSpec, parquet_bytes, write_atomic

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
        if (self.path / _LOCK).exists():  # who trains there is told first: what else is wrong may not be by then
            _unlock(_lock(self.path))
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
        _unlock(self._lock)

    def keep(self, state: State, history: Sequence[EpochRow]) -> None:
        text = io.StringIO(newline="")
        table = csv.DictWriter(text, fieldnames=[field.name for field in fields(EpochRow)])
        table.writeheader()
        table.writerows(asdict(epoch) for epoch in history)
        write_atomic(self.path / "history.csv", text.getvalue().encode())
        self.write_weights(state)

    def write_weights(self, state: State) -> None:
        write_atomic(self.path / WEIGHTS, save({k: v.contiguous() for k, v in state.items()}))

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
            finished = load_run(out).finished
        except RunError as error:
            raise RunError(f"{out} exists and is no run; give another --out, or remove it") from error
        differing = _differing(json.loads((out / "config.json").read_bytes()), json.loads(about))
        if finished:
            what = f"is a finished run of something else: {differing}" if differing else "is finished, as asked for"
            raise RunError(f"{out} {what}; give another --out, or remove it")
        if differing:
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


def _unlock(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


def _differing(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """What differs between two ``config.json``, in words; empty if nothing does."""
    old, new = ({**about, **about["config"]} for about in (there, here))
    if old.get("kind") != new.get("kind"):
        return f"it is a {old['kind']}, a {new['kind']} was asked for"
    names = [name for name in sorted({*old, *new} - _ANY) if old.get(name) != new.get(name)]
    return ", ".join(_change(name, json.dumps(old.get(name)), json.dumps(new.get(name))) for name in names)


def _change(name: str, old: str, new: str) -> str:
    return f"{name} differ" if max(len(old), len(new)) > 60 else f"{name} is {old}, {new} was asked for"


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()
