"""Which part of a store is meant: some features of some videos."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from moclip.errors import SourceError
from moclip.store.reader import Store
from moclip.store.schema import SPLIT_PREFIX


@dataclass(frozen=True)
class Selection:
    """Features, and the videos that fit all of what is given. Nothing given means everything.

    ``split`` is the name of a split and ``parts`` which of its parts, all by default. ``labels`` are class names,
    ``ids`` videos.
    """

    features: tuple[str, ...] = ()
    split: str | None = None
    parts: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    ids: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.parts and self.split is None:
            raise SourceError(f"parts ({', '.join(self.parts)}) of which split? Name the split too")


EVERYTHING = Selection()


@dataclass(frozen=True)
class Selected:
    """What a selection amounts to: features by their full names, and entries (sorted by id and feature)."""

    features: tuple[str, ...]
    entries: pa.Table


def select(store: Store, selection: Selection) -> Selected:
    """The entries of ``store`` that are meant, failed ones too.

    :class:`FeatureError` for a feature that is not there; :class:`SourceError` for a split, part, label or id that
    is not there, and where nothing is left.
    """
    features = tuple(sorted({store.resolve(name) for name in selection.features or store.features}))
    entries = store.entries
    entries = entries.filter(pc.is_in(entries["feature"], pa.array(features, pa.string())))
    for ids in _criteria(store, selection):
        entries = entries.filter(pc.is_in(entries["id"], pa.array(sorted(ids), pa.string())))
    if not len(entries):
        raise SourceError(f"nothing of {store.url} fits all of the selection ({_words(selection)}); widen it")
    return Selected(features, entries)


def _criteria(store: Store, selection: Selection) -> Iterator[set[str]]:
    """For each criterion that was given, the ids that meet it."""
    if selection.ids is not None:
        ids = set(selection.ids)
        _check_known(ids, set(store.videos["id"].to_pylist()), "videos", store)
        yield ids
    if selection.split is not None:
        yield _with_values(store, _split_column(store, selection.split), selection.parts, f"split {selection.split}")
    if selection.labels:
        yield _with_values(store, "label", selection.labels, "labels")


def _split_column(store: Store, split: str) -> str:
    there = [name.removeprefix(SPLIT_PREFIX) for name in store.labels.column_names if name.startswith(SPLIT_PREFIX)]
    if split not in there:
        raise SourceError(f"{store.url} has no split {split!r}; it has: {', '.join(there) or 'none'}")
    return SPLIT_PREFIX + split


def _with_values(store: Store, column: str, values: Collection[str], what: str) -> set[str]:
    """The ids whose labels say one of ``values``, or anything at all, in ``column``."""
    labels = store.labels.filter(pc.is_valid(store.labels[column]))
    _check_known(set(values), set(labels[column].to_pylist()), what, store)
    if values:
        labels = labels.filter(pc.is_in(labels[column], pa.array(sorted(values), pa.string())))
    return set(labels["id"].to_pylist())


def _check_known(asked: set[str], there: set[str], what: str, store: Store) -> None:
    unknown = sorted(asked - there)
    if unknown:
        raise SourceError(
            f"{len(unknown)} of the {what} asked for are not in {store.url}: {some(unknown)}; "
            f"it has {some(sorted(there))}"
        )


def _words(selection: Selection) -> str:
    given = {name: value for name, value in vars(selection).items() if value}
    return ", ".join(f"{name}: {some(value) if isinstance(value, tuple) else value}" for name, value in given.items())


def some(names: Collection[str], most: int = 3) -> str:
    """A few of ``names``, quoted, for a message."""
    shown = [repr(name) for _, name in zip(range(most), names, strict=False)]
    return ", ".join(shown) + (f" and {len(names) - most} more" if len(names) > most else "") or "none"
