"""Receipts: the file that makes a shard count.

A receipt is one parquet file, ``receipts/<feature>/<shard>.parquet``, written after the shard's arrays. It holds
one row a video (the entry and the video's facts) and, in its schema's metadata, the shard's files with sizes and
checksums, the time, and the library versions. The tables of a store can be rebuilt from its receipts alone.
"""

import json
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from moclip.errors import StoreFormatError
from moclip.store.files import check_name, write_atomic
from moclip.store.schema import (
    ENTRY_FIELDS,
    EXTRA_PREFIX,
    FACT_FIELDS,
    FORMAT,
    SourceFacts,
)

STATUS = ("ok", "failed")
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
        if self.status not in STATUS or (self.status == "failed") != bool(self.reason):
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
        if not (root / name).is_file():
            raise StoreFormatError("it is not a file")
        table = pq.read_table(pa.BufferReader((root / name).read_bytes()))
        metadata = json.loads(table.schema.metadata[_METADATA_KEY])
        table = table.replace_schema_metadata(None)
        for field in (*ENTRY_FIELDS, *FACT_FIELDS):
            if table.schema.field(field.name).type != field.type:
                raise StoreFormatError(f"its column {field.name} is {table.schema.field(field.name).type}")
            if not field.nullable and table[field.name].null_count:
                raise StoreFormatError(f"its column {field.name} has empty cells")
        if name != f"receipts/{metadata['feature']}/{metadata['shard']}.parquet":
            raise StoreFormatError(f"it says it is the receipt of {metadata['feature']}/{metadata['shard']}")
        if metadata["format"] > FORMAT:
            raise StoreFormatError(f"its format is {metadata['format']}; upgrade moclip")
        for column, allowed in (("feature", [metadata["feature"]]), ("shard", [metadata["shard"]]), ("status", STATUS)):
            if set(table[column].to_pylist()) - set(allowed):
                raise StoreFormatError(f"its column {column} holds something else than {' or '.join(allowed)}")
        check_name(metadata["feature"], "a receipt's feature")
        check_name(metadata["shard"], "a receipt's shard")
        written_at = pa.array([int(metadata["written_at"])] * len(table), pa.int64())
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise StoreFormatError(
            f"the receipt {root / name} cannot be read: {error}; put a good copy back, or delete it "
            "and extract again: its videos are then missing"
        ) from error
    return table.append_column("written_at", written_at), metadata
