"""A run directory, as it is read: what was trained, from what, how it went and how good it is.

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

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from moclip.errors import RunError
from moclip.store import EXTRACTED, FeatureSpec, Store

FORMAT = 1
KINDS = ("tsn", "fusion", "probe", "zeroshot")
FEATURES = "features.zarr"
MOTION_KINDS = ("motion", "motion-accumulated")
WEIGHTS = "model.safetensors"


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
            return dict(load_file(self.path / WEIGHTS))
        except (OSError, SafetensorError) as error:
            raise RunError(f"{self.path / WEIGHTS} cannot be read ({error}); train the run again") from error

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
        return (self.path / WEIGHTS).exists()

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
    except FileNotFoundError as error:
        raise RunError(f"{path} is not a moclip run: it has no config.json") from error
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
            f"{run.path / WEIGHTS} holds another network than its config.json says; train the run again"
        ) from error
