"""Who trains, who selects and who tests: the clips of one split of a labelled store."""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from moclip.errors import RunError
from moclip.store import SPLIT_PREFIX, Store

log = logging.getLogger(__name__)

#: The hold-out depends on the split alone, never on a training's seed: every run on a split selects on the
#: same clips.
_HOLD_OUT_SEED = 2024


@dataclass(frozen=True)
class Clips:
    """Videos by id, each with its class as a position in the split's class names."""

    ids: tuple[str, ...]
    targets: npt.NDArray[np.int64]

    def __post_init__(self) -> None:
        if self.targets.shape != (len(self.ids),):
            raise ValueError(f"{len(self.ids)} ids but targets of shape {self.targets.shape}")

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"Clips({len(self.ids)} of {len(np.unique(self.targets))} classes)"

    def only(self, ids: set[str]) -> "Clips":
        return self.take(np.array([video in ids for video in self.ids], bool))

    def take(self, chosen: npt.NDArray[Any]) -> "Clips":
        picked = np.arange(len(self.ids))[chosen]
        return Clips(tuple(self.ids[i] for i in picked), self.targets[picked])


@dataclass(frozen=True)
class Split:
    """One split with the clips that have the needed features; ``missing`` counts the others by reason.

    ``digest`` covers every labelled clip's part, whether its features are there or not.
    """

    name: str
    classes: tuple[str, ...]
    train: Clips
    val: Clips
    test: Clips
    missing: Mapping[str, int]
    digest: str

    @property
    def clips_digest(self) -> str:
        """Of the clips that take part: those that have the features, each in its part."""
        ids = [part.ids for part in (self.train, self.val, self.test)]
        return hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16]

    @property
    def positions(self) -> list[npt.NDArray[np.int64]]:
        """Where the clips of train, val and test lie in :attr:`every`."""
        return np.split(np.arange(len(self.every)), np.cumsum([len(self.train), len(self.val)]))

    @property
    def every(self) -> Clips:
        parts = (self.train, self.val, self.test)
        return Clips(
            tuple(video for part in parts for video in part.ids),
            np.concatenate([part.targets for part in parts]),
        )


def read_split(store: Store, name: str, *, features: Sequence[str], val_fraction: float = 0.15) -> Split:
    """The clips of ``split_<name>`` that have rows of all ``features``.

    ``val`` is what the table names val; else ``val_fraction`` of train, in whole groups (a clip without a group is
    one of its own). With 0 nothing is held out, and what the table names val is left out. Empty ``features``: no
    feature is required. :class:`RunError`
    if the split, its train or test side, or a class's training clips are not there.
    """
    table = split_table(store, name)
    labels, classes = _classes(store, table)
    parts = np.asarray(table["part"].to_pylist(), object)
    for part in ("train", "test"):
        if not (parts == part).any():
            raise RunError(f"split {name!r} has no {part} clip among the labelled videos of {store.url}")
    if not val_fraction:
        parts[parts == "val"] = "unused"
    elif not (parts == "val").any():
        parts[_hold_out(table, labels, parts == "train", val_fraction)] = "val"
    ids = table["id"].to_pylist()
    digest = hashlib.sha256(json.dumps([ids, labels.tolist(), parts.tolist()]).encode()).hexdigest()[:16]

    there = set(ids).intersection(*(store.ids(feature) for feature in features))
    absent = [video for video in ids if video not in there]
    _warn_of_missing(_count_missing(store, features, absent), features)
    tested = set(table["id"].to_numpy(zero_copy_only=False)[parts == "test"])
    missing = _count_missing(store, features, [video for video in absent if video in tested])
    clips = Clips(tuple(ids), labels)
    sides = {part: clips.take(parts == part).only(there) for part in ("train", "val", "test")}
    for part in ("train", "test"):
        if not len(sides[part]):
            raise RunError(
                f"split {name!r} has no {part} clip with rows of {' and '.join(features)}; {_extract(store)}"
            )
    untrained = np.setdiff1d(np.arange(len(classes)), sides["train"].targets)
    if len(untrained):
        names = ", ".join(classes[i] for i in untrained)
        raise RunError(f"split {name!r} has no training clip of: {names}; label some as train, or {_extract(store)}")
    return Split(name, tuple(classes), sides["train"], sides["val"], sides["test"], missing, digest)


def read_labelled(
    store: Store, split: str | None, *, feature: str | None
) -> tuple[Clips, tuple[str, ...], dict[str, int]]:
    """The test clips of a split, or every labelled clip, with rows of ``feature`` (None needs none); the classes; how
    many are missing.
    """
    table = store.labels if split is None else split_table(store, split)
    table = table.filter(table["label"].is_valid())
    targets, classes = _classes(store, table)
    clips = Clips(tuple(table["id"].to_pylist()), targets)
    if split is not None:
        clips = clips.take(np.asarray(table["part"].to_pylist(), object) == "test")
    if not len(clips):
        where = f" in split {split!r}" if split is not None else ""
        raise RunError(
            f"{store.url} has no labelled clip to test{where}; label it with `moclip label {store.url} --csv FILE`"
        )
    if feature is None:
        return clips, tuple(classes), {}
    there = set(store.ids(feature))
    missing = _count_missing(store, [feature], [video for video in clips.ids if video not in there])
    _warn_of_missing(missing, [feature])
    return clips.only(there), tuple(classes), missing


def has_rows(store: Store, feature: str, ids: Sequence[str]) -> npt.NDArray[np.bool_]:
    """Which of ``ids`` have rows of a feature."""
    there = set(store.ids(feature))
    return np.array([video in there for video in ids], bool)


def split_table(store: Store, name: str) -> pa.Table:
    """The labelled rows of a split: id, label, group, part. :class:`RunError` lists the splits there are."""
    columns = [column for column in store.labels.column_names if column.startswith(SPLIT_PREFIX)]
    if not len(store.labels) or not columns:
        what = "labels" if not len(store.labels) else "splits"
        raise RunError(f"{store.url} has no {what}; add them with `moclip label STORE --splits DIR | --csv FILE`")
    if SPLIT_PREFIX + name not in columns:
        there = ", ".join(column.removeprefix(SPLIT_PREFIX) for column in columns)
        raise RunError(f"{store.url} has no split {name!r}; it has: {there}")
    table = store.labels.select(["id", "label", "group", SPLIT_PREFIX + name])
    table = table.rename_columns(["id", "label", "group", "part"])
    return table.filter(pc.and_(table["label"].is_valid(), table["part"].is_valid()))


def _classes(store: Store, table: pa.Table) -> tuple[npt.NDArray[np.int64], list[str]]:
    """Each clip's target, and the classes with any clip in this split, in the store's order."""
    labels = table["label"].to_pylist()
    used = set(labels)
    unknown = sorted(used - set(store.classes))
    if unknown:
        raise RunError(f"{store.url}: labels that are none of its classes: {', '.join(unknown)}")
    classes = [name for name in store.classes if name in used]
    position = {name: i for i, name in enumerate(classes)}
    return np.array([position[label] for label in labels], np.int64), classes


def _hold_out(
    table: pa.Table, labels: npt.NDArray[np.int64], train: npt.NDArray[np.bool_], fraction: float
) -> npt.NDArray[np.bool_]:
    """Which training clips to select on: whole groups, about ``fraction`` of each class, never all of a class."""
    own = [group if group is not None else f"\0{video}" for group, video in
           zip(table["group"].to_pylist(), table["id"].to_pylist(), strict=True)]  # fmt: skip
    names, group = np.unique(np.asarray(own, str)[train], return_inverse=True)
    counts = np.zeros((len(names), int(labels.max()) + 1), np.int64)
    np.add.at(counts, (group, labels[train]), 1)
    total = counts.sum(0)
    quota = np.where(total > 1, np.maximum(1, np.rint(fraction * total)), 0)
    held = np.zeros_like(total)
    chosen = np.zeros(len(names), bool)
    for g in np.random.default_rng(_HOLD_OUT_SEED).permutation(len(names)):
        mine = counts[g] > 0
        chosen[g] = (quota - held)[mine].sum() > 0 and (held + counts[g] < total)[mine].all()
        held += counts[g] * chosen[g]
    if not chosen.any():
        raise RunError(
            "no part of train can be held out: every group is all that some class has; "
            "name val rows in the split, or train on all of it with a val fraction of 0"
        )
    held_out = np.zeros(len(labels), bool)
    held_out[np.flatnonzero(train)[chosen[group]]] = True
    return held_out


def _count_missing(store: Store, features: Sequence[str], ids: list[str]) -> dict[str, int]:
    """How many of ``ids``, which have no rows of a feature, failed for which reason."""
    wanted = {store.resolve(feature) for feature in features}
    failed = store.entries.filter(
        pc.and_(
            pc.is_in(store.entries["feature"], pa.array(sorted(wanted), pa.string())),
            pc.not_equal(store.entries["status"], "ok"),
        )
    )
    reasons = dict(zip(failed["id"].to_pylist(), failed["reason"].to_pylist(), strict=True))
    return dict(Counter(reasons.get(video) or "not extracted" for video in ids))


def _warn_of_missing(counted: Mapping[str, int], features: Sequence[str]) -> None:
    if counted:
        why = ", ".join(f"{reason} {n}" for reason, n in sorted(counted.items()))
        names = " and ".join(features)
        log.warning("%d labelled clips have no rows of %s and are left out: %s", sum(counted.values()), names, why)


def _extract(store: Store) -> str:
    """How to come by rows that are missing: a second run of an extraction makes what is not there."""
    return f"extract what is missing: `moclip extract SOURCE {store.url}` with the features as before"
