"""A store made of entries of other stores: shard by shard, so that it can be interrupted and gone on with."""

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from moclip.errors import StoreFormatError
from moclip.store.copies.copying import Copy, RowSource, copy_shard
from moclip.store.copies.labels import union_classes, union_labels
from moclip.store.files import Folder, check_name, open_folder
from moclip.store.reader import Store, open_store
from moclip.store.receipts import Entry, read_receipt
from moclip.store.schema import EXTRA_PREFIX, FACT_FIELDS, FeatureSpec, SourceFacts
from moclip.store.tables import add_feature, create_store, fold_store, is_store, publish, write_labels

#: A shard of a copy takes about this much, as stored. It is what an interruption costs at most.
SHARD_BYTES = 256 * 2**20
_SAID = ("id", "feature", "status", "reason", "content")
_FACT_NAMES = {field.name for field in FACT_FIELDS}

#: Told how many entries there are already, and of how many.
Report = Callable[[int, int], None]


def silent(done: int, total: int) -> None:
    """Reports to nobody."""


@dataclass(frozen=True)
class Wanted:
    """What a store is to hold. ``entries`` are those of ``stores``, their column ``source`` says of which one."""

    stores: tuple[Store, ...]
    features: dict[str, FeatureSpec]
    entries: pa.Table
    labels: pa.Table
    classes: list[str]


@dataclass(frozen=True)
class Copied:
    """What a copy came to: ``entries`` were written now, ``kept`` were there from an earlier attempt."""

    url: str
    videos: int
    features: tuple[str, ...]
    entries: int
    kept: int
    failed: int


def fill(url: str | Path, container: str | None, wanted: Wanted, report: Report) -> Copied:
    """Make the store ``url`` hold what is ``wanted`` and nothing else, or complete it.

    Shards have names that follow from what they hold, and what a receipt of ``url`` names already is not copied
    again. Labels and tables come last. :class:`StoreFormatError` if the store holds anything else, or if rows of
    the sources are not what was written.
    """
    folder = open_folder(url)
    for store in wanted.stores:
        _check_apart(folder, open_folder(store.url))
    create_store(url, container or (None if is_store(url) else wanted.stores[0].container))
    with folder.exclusive():
        there = _there(url, wanted)
        labels = union_labels([(folder.url, open_store(url).labels), ("what is copied", wanted.labels)])
        for name, spec in wanted.features.items():
            add_feature(url, name, spec)
        todo = wanted.entries.filter(pa.array([said not in there for said in _said(wanted.entries)], pa.bool_()))
        _copy_all(url, wanted, todo, report)
        write_labels(url, labels, union_classes([wanted.classes, open_store(url).classes]))
        publish(url)
    return Copied(
        url=folder.url,
        videos=len(pc.unique(wanted.entries["id"])),
        features=tuple(wanted.features),
        entries=len(todo),
        kept=len(wanted.entries) - len(todo),
        failed=int(pc.sum(pc.equal(wanted.entries["status"], "failed")).as_py() or 0),
    )


def _check_apart(target: Folder, source: Folder) -> None:
    """A store that is filled from itself, or lies in the other's folder, would end as neither."""
    a, b = (folder.url if folder.local is None else os.path.realpath(folder.local) for folder in (target, source))
    if a == b or a.startswith(f"{b}/") or b.startswith(f"{a}/"):
        raise StoreFormatError(f"{target} is, or lies in, the folder of {source}, which is copied; name another path")


def _there(url: str | Path, wanted: Wanted) -> set[tuple[Any, ...]]:
    """What the receipts of ``url`` say already; all of it must be wanted."""
    store = open_store(url)
    for name, spec in store.features.items():
        if name not in wanted.features or wanted.features[name].digest != spec.digest:
            raise _other(store, f"the feature {name!r}")
    there, all_wanted = set(_said(fold_store(url).entries)), set(_said(wanted.entries))
    for video, feature, *_ in sorted(there - all_wanted, key=lambda said: said[:2]):
        raise _other(store, f"{feature} of {video!r}")
    if set(store.labels["id"].to_pylist()) - set(wanted.labels["id"].to_pylist()):
        raise _other(store, "labels of other videos")
    return there


def _other(store: Store, what: str) -> StoreFormatError:
    return StoreFormatError(
        f"{store.url} is not the beginning of this copy: it holds {what}, not as the copy would; "
        "name another path, or delete it"
    )


def _said(entries: pa.Table) -> Iterator[tuple[Any, ...]]:
    return zip(*(entries[name].to_pylist() for name in _SAID), strict=True)


def _copy_all(url: str | Path, wanted: Wanted, todo: pa.Table, report: Report) -> None:
    facts = _Facts(wanted.stores)
    sources = {
        (k, name): RowSource(open_folder(store.url), name, spec)
        for k, store in enumerate(wanted.stores)
        for name, spec in wanted.features.items()
    }
    total, before = len(wanted.entries), len(wanted.entries) - len(todo)
    report(before, total)
    for shard in _cut(_with_provenance(wanted.stores, todo)):
        rows = shard.to_pylist()
        feature = rows[0]["feature"]
        copies = [
            Copy(about, entry_of(row), sources[row["source"], feature], row["shard"])
            for row, about in zip(rows, facts.of([row["id"] for row in rows]), strict=True)
        ]

        def advance(done: int, before: int = before) -> None:
            report(before + done, total)

        copy_shard(
            url,
            feature=feature,
            spec=wanted.features[feature],
            shard=_shard_name(wanted.features[feature], copies),
            copies=copies,
            versions=json.loads(rows[0]["versions"]),
            report=advance,
        )
        before += len(rows)


def entry_of(row: dict[str, Any]) -> Entry:
    """The entry in a row of the table of entries, or of a receipt."""
    names = ("status", "reason", "detail", "array", "row_start", "row_stop", "content", "motion_source")
    return Entry(**{name: row[name] for name in names})


def _shard_name(spec: FeatureSpec, copies: Sequence[Copy]) -> str:
    """Follows from what the shard holds: whoever finds a receipt of this name finds the same content."""
    held = [[copy.facts.id, copy.entry.reason, (copy.entry.content or b"").hex()] for copy in copies]
    return hashlib.sha256(json.dumps([spec.digest, held]).encode()).hexdigest()[:16]


def _with_provenance(stores: Sequence[Store], entries: pa.Table) -> pa.Table:
    """Entries with what their shards' receipts say: the versions (JSON), and about how many bytes an entry takes."""
    keys = ["source", "feature", "shard"]
    shards = entries.group_by(keys).aggregate([]).to_pylist()
    with ThreadPoolExecutor(8) as pool:
        told = list(pool.map(lambda row: _provenance(stores[row["source"]], row["feature"], row["shard"]), shards))
    about = pa.table(
        {
            "source": pa.array([row["source"] for row in shards], entries["source"].type),
            **{name: pa.array([row[name] for row in shards], pa.string()) for name in keys[1:]},
            "versions": pa.array([versions for versions, _ in told], pa.string()),
            "row_bytes": pa.array([row_bytes for _, row_bytes in told], pa.float64()),
        }
    )
    return entries.join(about, keys)


def _provenance(store: Store, feature: str, shard: str) -> tuple[str, float]:
    name = f"receipts/{check_name(feature, 'a feature')}/{check_name(shard, 'a shard')}.parquet"
    receipt = read_receipt(open_folder(store.url), name)
    rows = pc.sum(pc.subtract(receipt.rows["row_stop"], receipt.rows["row_start"])).as_py() or 1
    return json.dumps(receipt.versions, sort_keys=True), receipt.stored / rows


def _cut(entries: pa.Table) -> Iterator[pa.Table]:
    """Shards: of one feature and one set of versions, in id order, and not too large."""
    entries = entries.sort_by([(name, "ascending") for name in ("feature", "versions", "id")])
    rows = pc.fill_null(pc.subtract(entries["row_stop"], entries["row_start"]), 0)
    costs = pc.multiply(rows.cast(pa.float64()), entries["row_bytes"]).to_pylist()
    start, size, last = 0, 0.0, None
    keys = zip(entries["feature"].to_pylist(), entries["versions"].to_pylist(), strict=True)
    for k, (key, cost) in enumerate(zip(keys, costs, strict=True)):
        if k > start and (key != last or size + cost > SHARD_BYTES):
            yield entries.slice(start, k - start)
            start, size = k, 0.0
        size, last = size + cost, key
    if start < len(entries):
        yield entries.slice(start)


class _Facts:
    """What several stores know of a video, as one: the first one's word, and the others' where it knows nothing."""

    def __init__(self, stores: Sequence[Store]) -> None:
        self._tables = [store.videos for store in stores]
        self._rows = [{video: k for k, video in enumerate(table["id"].to_pylist())} for table in self._tables]
        kinds: dict[str, set[pa.DataType]] = {}
        for field in (field for table in self._tables for field in table.schema):
            kinds.setdefault(field.name, set()).add(field.type)
        self._extra = [name for name in kinds if name not in {"id", *_FACT_NAMES}]
        self._as_text = {name for name in self._extra if _clash(kinds[name])}

    def of(self, ids: Sequence[str]) -> list[SourceFacts]:
        known: dict[str, dict[str, Any]] = {video: {} for video in ids}
        for table, rows in zip(self._tables, self._rows, strict=True):
            for row in table.take([rows[video] for video in ids if video in rows]).to_pylist():
                for name, value in row.items():
                    if value is not None:
                        known[row["id"]].setdefault(name, value)
        return [self._facts(video, known[video]) for video in ids]

    def _facts(self, video: str, known: dict[str, Any]) -> SourceFacts:
        fixed = {name: known.get(name) for name in _FACT_NAMES}
        extra = {_own_name(name): self._value(name, known.get(name)) for name in self._extra}
        return SourceFacts(id=video, **fixed, extra=extra)

    def _value(self, name: str, value: Any) -> Any:
        return str(value) if name in self._as_text and value is not None else value


def _clash(kinds: Collection[pa.DataType]) -> bool:
    """Whether values of these types make no one column, as when folding receipts: numbers widen, others become text."""
    some = {kind for kind in kinds if not pa.types.is_null(kind)}
    return len(some) > 1 and not all(pa.types.is_integer(kind) or pa.types.is_floating(kind) for kind in some)


def _own_name(column: str) -> str:
    """What the source list called a column; the table of videos prefixes those that are called like a fixed one."""
    bare = column.removeprefix(EXTRA_PREFIX)
    return bare if bare in {"id", *_FACT_NAMES} else column
