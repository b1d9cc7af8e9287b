"""The fold: what all receipts of a store amount to, as the tables that readers see."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from moclip.store.files import Folder
from moclip.store.groups import read_feature
from moclip.store.receipts import ReadReceipt, read_receipt
from moclip.store.schema import ENTRY_FIELDS, EXTRA_PREFIX, FACT_FIELDS, empty_entries, empty_videos

_ENTRY_NAMES = [field.name for field in ENTRY_FIELDS]
_FACT_NAMES = [field.name for field in FACT_FIELDS]


@dataclass(frozen=True)
class Fold:
    """The tables of videos and entries, sorted by id, and the receipts that they were made of."""

    videos: pa.Table
    entries: pa.Table
    receipts: tuple[ReadReceipt, ...]


def fold(folder: Folder, names: Sequence[str]) -> Fold:
    """What the receipts ``names`` amount to (:func:`fold_receipts`)."""
    with ThreadPoolExecutor(8) as pool:
        return fold_receipts(folder, tuple(pool.map(lambda name: read_receipt(folder, name), names)))


def fold_receipts(folder: Folder, receipts: tuple[ReadReceipt, ...]) -> Fold:
    """The tables that receipts amount to.

    For one (id, feature) an ok entry beats a failed one, then the newest receipt wins. A video's facts come from
    its winning entry by the same rule. Entries made from a file of another size than the newest one of that id are
    dead: the file was replaced. So are those of another specification than the feature's.
    """
    digests = {name: read_feature(folder, name).digest for name in sorted({receipt.feature for receipt in receipts})}
    tables = [receipt.rows for receipt in receipts if receipt.digest == digests[receipt.feature]]
    if not tables:
        return Fold(empty_videos(), empty_entries(), receipts)
    rows = _of_newest_file(_concatenate(tables))
    failed = pc.equal(rows["status"], "failed")
    newest = pc.negate(rows["written_at"])
    rows = rows.append_column("failed", failed.cast(pa.int8())).append_column("age", newest)
    order = [("failed", "ascending"), ("age", "ascending"), ("shard", "ascending"), ("feature", "ascending")]
    entries = _first_of_each(rows, ["id", "feature"], order).select(_ENTRY_NAMES)
    videos = _first_of_each(rows, ["id"], order)
    return Fold(_as_videos(videos), entries.cast(pa.schema(ENTRY_FIELDS)), receipts)


def _of_newest_file(rows: pa.Table) -> pa.Table:
    """Without the rows of files that were replaced: their size is not that of the newest row of their id."""
    sized = rows.filter(pc.is_valid(rows["bytes"]))
    newest = _first_of_each(sized.append_column("age", pc.negate(sized["written_at"])), ["id"], [("age", "ascending")])
    current = newest["bytes"].combine_chunks().take(pc.index_in(rows["id"], newest["id"].combine_chunks()))
    keep = pc.or_kleene(pc.is_null(rows["bytes"]), pc.equal(rows["bytes"], current))
    return rows.filter(pc.fill_null(keep, True))


def _first_of_each(rows: pa.Table, keys: list[str], order: list[tuple[str, str]]) -> pa.Table:
    """Sort by ``keys`` and then ``order``; keep the first row of each run of equal keys."""
    by_keys = [(key, "ascending") for key in keys]
    rows = rows.take(pc.sort_indices(rows, sort_keys=[*by_keys, *(o for o in order if o[0] not in keys)]))
    new = np.zeros(len(rows), bool)
    for key in keys:
        codes = pc.rank(rows[key].combine_chunks(), tiebreaker="dense").to_numpy()
        new[1:] |= np.diff(codes.astype(np.int64)) != 0
    new[:1] = True
    return rows.filter(pa.array(new))


def _as_videos(rows: pa.Table) -> pa.Table:
    extra = sorted(name for name in rows.column_names if name.startswith(EXTRA_PREFIX))
    taken = {"id", *_FACT_NAMES}
    names = []
    for name in (full.removeprefix(EXTRA_PREFIX) for full in extra):
        while name in taken:
            name = EXTRA_PREFIX + name
        names.append(name)
        taken.add(name)
    return rows.select(["id", *_FACT_NAMES, *extra]).rename_columns(["id", *_FACT_NAMES, *names])


def _concatenate(tables: list[pa.Table]) -> pa.Table:
    """Receipts under one schema: numbers widen; a column that two source lists type differently becomes text."""
    try:
        return pa.concat_tables(tables, promote_options="permissive").combine_chunks()
    except (pa.ArrowTypeError, pa.ArrowInvalid):
        clashing = set(_clashing_columns(tables))
        return pa.concat_tables(
            [_with_text(table, clashing) for table in tables], promote_options="permissive"
        ).combine_chunks()


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
