"""The fold: what all receipts of a store amount to, as the tables that readers see."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from moclip.store.files import Folder
from moclip.store.groups import read_feature
from moclip.store.receipts import ReadReceipt, read_receipt
from moclip.store.schema import ENTRY_FIELDS, EXTRA_PREFIX, FACT_FIELDS, empty_entries, empty_videos

_ENTRY_NAMES = [field.name for field in ENTRY_FIELDS]
_FACT_NAMES = [field.name for field in FACT_FIELDS]
#: What is the same in all rows of a receipt is kept once a receipt, and rows carry its number.
_OF_RECEIPTS = ("feature", "shard")
_NUMBER = "receipt"
#: So many receipts' rows become one table: thousands of small ones take many times the memory of what they hold.
_TOGETHER = 512

#: Told how many receipts have been read, of how many.
FoldReport = Callable[[int, int], None]


@dataclass(frozen=True)
class Fold:
    """The tables of videos and entries, sorted by id, and what the catalogue says of the receipts behind them.

    ``receipts`` gives the size of each, its checksum, and what its shard's files take, by name. ``versions`` gives,
    feature to library, the versions of it that made the feature's rows.
    """

    videos: pa.Table
    entries: pa.Table
    receipts: Mapping[str, Mapping[str, Any]]
    versions: Mapping[str, Mapping[str, Sequence[str]]]


def fold(
    folder: Folder, names: Sequence[str], columns: Sequence[str] | None = None, report: FoldReport = lambda *_: None
) -> Fold:
    """What the receipts ``names`` amount to (:func:`fold_receipts`), in full or in some ``columns``.

    What tells which entry wins is read in any case.
    """
    needed = None if columns is None else sorted({"id", "status", "bytes", *columns}.difference(_OF_RECEIPTS))
    return fold_receipts(folder, _read_all(folder, names, needed, report), columns)


def _read_all(
    folder: Folder, names: Sequence[str], columns: Sequence[str] | None, report: FoldReport
) -> Iterator[ReadReceipt]:
    with ThreadPoolExecutor(8) as pool:
        for start in range(0, len(names), _TOGETHER):
            report(start, len(names))
            yield from pool.map(lambda name: read_receipt(folder, name, columns), names[start : start + _TOGETHER])


def fold_receipts(folder: Folder, receipts: Iterable[ReadReceipt], columns: Sequence[str] | None = None) -> Fold:
    """The tables that receipts amount to.

    For one (id, feature) an ok entry beats a failed one, then the newest receipt wins. A video's facts come from
    its winning entry by the same rule. Entries made from a file of another size than the newest one of that id are
    dead: the file was replaced. So are those of another specification than the feature's.
    """
    gathered, about = _Gathered(), {}
    digests: dict[str, str] = {}
    versions: dict[str, dict[str, set[str]]] = {}
    for receipt in receipts:
        about[receipt.name] = {"bytes": receipt.bytes, "sha256": receipt.sha256, "stored": receipt.stored}
        for library, version in receipt.versions.items():
            versions.setdefault(receipt.feature, {}).setdefault(library, set()).add(version)
        if receipt.feature not in digests:
            digests[receipt.feature] = read_feature(folder, receipt.feature).digest
        if receipt.digest == digests[receipt.feature]:
            gathered.add(receipt)
    videos, entries = gathered.fold([*_ENTRY_NAMES, *_FACT_NAMES] if columns is None else columns)
    sorted_versions = {
        feature: {name: sorted(them) for name, them in some.items()} for feature, some in versions.items()
    }
    return Fold(videos, entries, about, sorted_versions)


class _Gathered:
    """The rows of many receipts, in little more memory than they need."""

    def __init__(self) -> None:
        self._receipts: list[tuple[str, str, int]] = []
        self._alike: dict[pa.Schema, list[pa.Table]] = {}
        self._tables: list[pa.Table] = []

    def add(self, receipt: ReadReceipt) -> None:
        number = pa.array(np.full(len(receipt.rows), len(self._receipts), np.int32))
        self._receipts.append((receipt.feature, receipt.shard, receipt.written_at))
        own = [name for name in receipt.rows.column_names if name not in _OF_RECEIPTS]
        rows = receipt.rows.select(own).append_column(_NUMBER, number)
        alike = self._alike.setdefault(rows.schema, [])
        alike.append(rows)
        if len(alike) == _TOGETHER:
            self._put_together(rows.schema)

    def _put_together(self, schema: pa.Schema) -> None:
        self._tables.append(pa.concat_tables(self._alike.pop(schema)).combine_chunks())

    def fold(self, columns: Sequence[str]) -> tuple[pa.Table, pa.Table]:
        """The tables of videos and entries. What was gathered is used up."""
        for schema in list(self._alike):
            self._put_together(schema)
        if not self._tables:
            return empty_videos(), empty_entries()
        rows = _concatenate(self._tables)
        self._tables.clear()
        features, shards, times = map(pa.array, zip(*self._receipts, strict=True))
        ids, video = _ranks(rows["id"])
        rows = rows.drop_columns("id")
        pa.default_memory_pool().release_unused()  # as much as is needed next, in pieces of other sizes
        of_videos, of_entries = _winners(rows, video, features, shards, times.to_numpy())
        videos = _as_videos(rows).take(pa.array(of_videos))
        videos = videos.add_column(0, "id", ids.take(pa.array(video[of_videos])))
        fields = [field for field in ENTRY_FIELDS if field.name in columns]
        rows = rows.select([_NUMBER, *(field.name for field in fields if field.name in rows.column_names)])
        entries = rows.take(pa.array(of_entries))
        entries = entries.append_column("id", ids.take(pa.array(video[of_entries])))
        for name, column in zip(_OF_RECEIPTS, (features, shards), strict=True):
            if name in columns:
                entries = entries.append_column(name, column.take(entries[_NUMBER].combine_chunks()))
        return videos, entries.select([field.name for field in fields]).cast(pa.schema(fields))


def _winners(
    rows: pa.Table,
    video: npt.NDArray[np.int64],
    features: pa.Array,
    shards: pa.Array,
    times: npt.NDArray[np.int64],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The rows whose facts are their videos', in order of ids, and those that are entries, by id and feature.

    ``video`` is each row's id, by its place in their order; rows name their receipt's feature, shard and time.
    """
    number = rows[_NUMBER].to_numpy()
    alive = _of_newest_file(rows["bytes"], video, _turns(-times)[number])
    video, number = video[alive], number[alive]
    kinds, feature = _ranks(features)
    turn = _turns(feature, _ranks(shards)[1], -times)
    failed = pc.equal(rows["status"], "failed").to_numpy()[alive]
    rank = failed * len(turn) + turn[number]  # less than twice the receipts: the lesser wins
    of_video, of_entry = video, video * len(kinds) + feature[number]
    of_videos, of_entries = (alive[_least_of_each(key, rank, 2 * len(turn))] for key in (of_video, of_entry))
    return of_videos, of_entries


def _of_newest_file(
    sizes: pa.ChunkedArray, video: npt.NDArray[np.int64], turn: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """The rows but those of files that were replaced: their size is not that of the newest row of their id."""
    known, size = pc.is_valid(sizes).to_numpy(), pc.fill_null(sizes, 0).to_numpy()
    sized = np.flatnonzero(known)
    newest = sized[_least_of_each(video[sized], turn[sized], len(turn) and turn.max() + 1)]
    now = np.zeros(len(video) and video.max() + 1, np.int64)
    now[video[newest]] = size[newest]
    return np.flatnonzero(~known | (size == now[video]))


def _least_of_each(keys: npt.NDArray[np.int64], ranks: npt.NDArray[np.int64], most: int) -> npt.NDArray[np.int64]:
    """Where each key has its least rank, in order of keys. Ranks are less than ``most``."""
    order = np.argsort(keys * most + ranks, kind="stable")
    first = np.ones(len(order), bool)
    first[1:] = np.diff(keys[order]) != 0
    return order[first]


def _turns(*keys: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """The place of each receipt in the order of ``keys``, the last of which counts first."""
    turns = np.empty(len(keys[0]), np.int64)
    turns[np.lexsort(keys)] = np.arange(len(turns))
    return turns


def _ranks(column: pa.Array | pa.ChunkedArray) -> tuple[pa.Array, npt.NDArray[np.int64]]:
    """The distinct cells, in order, and the place of each cell among them."""
    distinct = column.unique()
    distinct = distinct.take(pc.sort_indices(distinct))
    return distinct, pc.index_in(column, value_set=distinct).to_numpy().astype(np.int64)


def _as_videos(rows: pa.Table) -> pa.Table:
    extra = sorted(name for name in rows.column_names if name.startswith(EXTRA_PREFIX))
    taken = {"id", *_FACT_NAMES}
    names = []
    for name in (full.removeprefix(EXTRA_PREFIX) for full in extra):
        while name in taken:
            name = EXTRA_PREFIX + name
        names.append(name)
        taken.add(name)
    facts = [name for name in _FACT_NAMES if name in rows.column_names]
    return rows.select([*facts, *extra]).rename_columns([*facts, *names])


def _concatenate(tables: list[pa.Table]) -> pa.Table:
    """Receipts under one schema: numbers widen; a column that two source lists type differently becomes text."""
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except (pa.ArrowTypeError, pa.ArrowInvalid):
        clashing = set(_clashing_columns(tables))
        return pa.concat_tables([_with_text(table, clashing) for table in tables], promote_options="permissive")


def _clashing_columns(tables: list[pa.Table]) -> Iterable[str]:
    for name in sorted({name for table in tables for name in table.column_names}):
        fields = {table.schema.field(name).type for table in tables if name in table.column_names}
        try:
            pa.unify_schemas([pa.schema([(name, kind)]) for kind in fields], promote_options="permissive")
        except (pa.ArrowTypeError, pa.ArrowInvalid):
            yield name


def _with_text(table: pa.Table, names: set[str]) -> pa.Table:
    for name in names & set(table.column_names):
        values = [None if value is None else str(value) for value in table[name].to_pylist()]
        table = table.set_column(table.column_names.index(name), name, pa.array(values, pa.string()))
    return table
