"""Receipts: the file that makes a shard count, and the fold of all receipts into a store's tables.

A receipt is one parquet file, ``receipts/<feature>/<shard>.parquet``, written after the shard's arrays. It holds
one row a video (the entry and the video's facts) and, in its schema's metadata, the shard's files with sizes and
checksums, the time, and the library versions. The tables of a store can be rebuilt from its receipts alone.
"""

import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from moclip.errors import StoreFormatError
from moclip.store.files import check_name, write_atomic
from moclip.store.schema import (
    ENTRY_FIELDS,
    EXTRA_PREFIX,
    FACT_FIELDS,
    FORMAT,
    SourceFacts,
    empty_entries,
    empty_videos,
)

_METADATA_KEY = b"moclip"
_ENTRY_NAMES = [field.name for field in ENTRY_FIELDS]
_FACT_NAMES = [field.name for field in FACT_FIELDS]


@dataclass(frozen=True)
class Entry:
    """One video's row range in one shard of one feature, or the reason why there is none."""

    status: str
    reason: str | None = None
    detail: str | None = None
    array: str | None = None
    row_start: int | None = None
    row_stop: int | None = None
    content: str | None = None

    def __post_init__(self) -> None:
        if self.status not in ("ok", "failed") or (self.status == "failed") != bool(self.reason):
            raise ValueError(f"an entry is ok, or failed with a reason: {self}")


@dataclass(frozen=True)
class Receipt:
    """What a finished shard leaves: its entries with the facts of their videos, and its files.

    ``files`` maps each file's path inside the store to its size and SHA-256. ``written_at`` is in nanoseconds
    since 1970, UTC.
    """

    feature: str
    shard: str
    digest: str
    written_at: int
    versions: dict[str, str]
    files: dict[str, dict[str, Any]]
    videos: tuple[tuple[SourceFacts, Entry], ...]

    @property
    def path(self) -> str:
        return f"receipts/{self.feature}/{self.shard}.parquet"


def write_receipt(root: Path, receipt: Receipt) -> None:
    metadata = {
        "format": FORMAT,
        "feature": receipt.feature,
        "shard": receipt.shard,
        "digest": receipt.digest,
        "written_at": receipt.written_at,
        "versions": receipt.versions,
        "files": receipt.files,
    }
    table = _rows(receipt).replace_schema_metadata({_METADATA_KEY: json.dumps(metadata)})
    write_atomic(root / receipt.path, parquet_bytes(table))


def parquet_bytes(table: pa.Table) -> bytes:
    buffer = BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def _rows(receipt: Receipt) -> pa.Table:
    constant = {"feature": receipt.feature, "shard": receipt.shard}
    rows = [{**asdict(entry), **vars(facts), **constant} for facts, entry in receipt.videos]
    fixed = [pa.array([row[f.name] for row in rows], f.type) for f in (*ENTRY_FIELDS, *FACT_FIELDS)]
    extra_names = sorted({name for facts, _ in receipt.videos for name in facts.extra})
    extra = [pa.array([facts.extra.get(name) for facts, _ in receipt.videos]) for name in extra_names]
    names = [*_ENTRY_NAMES, *_FACT_NAMES, *(EXTRA_PREFIX + name for name in extra_names)]
    return pa.table([*fixed, *extra], names=names)


def list_receipts(root: Path) -> list[str]:
    """The receipts of a store, as paths inside it, in order."""
    found = root.glob("receipts/*/*.parquet")
    return sorted(path.relative_to(root).as_posix() for path in found if not path.name.startswith("."))


def read_receipt(root: Path, name: str) -> tuple[pa.Table, dict[str, Any]]:
    """One receipt's rows and metadata. :class:`StoreFormatError` where it is not what it claims to be."""
    try:
        table = pq.read_table(pa.BufferReader((root / name).read_bytes()))
        metadata = json.loads(table.schema.metadata[_METADATA_KEY])
        table = table.replace_schema_metadata(None)
        for field in (*ENTRY_FIELDS, *FACT_FIELDS):
            if table.schema.field(field.name).type != field.type:
                raise StoreFormatError(f"its column {field.name} is {table.schema.field(field.name).type}")
        if name != f"receipts/{metadata['feature']}/{metadata['shard']}.parquet":
            raise StoreFormatError(f"it says it is the receipt of {metadata['feature']}/{metadata['shard']}")
        check_name(metadata["feature"], "a receipt's feature")
        check_name(metadata["shard"], "a receipt's shard")
        written_at = pa.array([int(metadata["written_at"])] * len(table), pa.int64())
    except (pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise StoreFormatError(f"the receipt {name} cannot be read: {error}") from error
    return table.append_column("written_at", written_at), metadata


def fold(root: Path, names: Sequence[str]) -> tuple[pa.Table, pa.Table]:
    """The tables (videos, entries) that the receipts ``names`` amount to, sorted by id.

    For one (id, feature) an ok entry beats a failed one, then the newest receipt wins. A video's facts come from
    its winning entry by the same rule.
    """
    if not names:
        return empty_videos(), empty_entries()
    with ThreadPoolExecutor(8) as pool:
        tables = list(pool.map(lambda name: read_receipt(root, name)[0], names))
    rows = _concatenate(tables)
    failed = pc.equal(rows["status"], "failed")
    newest = pc.negate(rows["written_at"])
    rows = rows.append_column("failed", failed.cast(pa.int8())).append_column("age", newest)
    order = [("failed", "ascending"), ("age", "ascending"), ("shard", "ascending"), ("feature", "ascending")]
    entries = _first_of_each(rows, ["id", "feature"], order).select(_ENTRY_NAMES)
    videos = _first_of_each(rows, ["id"], order)
    return _as_videos(videos), entries.cast(pa.schema(ENTRY_FIELDS))


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
    plain = [name.removeprefix(EXTRA_PREFIX) for name in extra]
    names = [long if short in taken else short for long, short in zip(extra, plain, strict=True)]
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
