"""Receipts: the file that makes a shard count.

A receipt is one parquet file, ``receipts/<feature>/<shard>.parquet``, written after the shard's arrays. It holds
one row a video (the entry and the video's facts) and, in its schema's metadata, the shard's files with sizes and
checksums, the time, and the library versions. The tables of a store can be rebuilt from its receipts alone.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from moclip.errors import StoreFormatError
from moclip.store.files import NO_FILE, Folder, check_name
from moclip.store.parquet import parquet_bytes, read_parquet
from moclip.store.schema import (
    ENTRY_FIELDS,
    EXTRA_PREFIX,
    FACT_FIELDS,
    FORMAT,
    FeatureSpec,
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
    content: bytes | None = None
    motion_source: str | None = None

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
    specification: FeatureSpec
    written_at: int
    versions: dict[str, str]
    files: dict[str, dict[str, Any]]
    videos: tuple[tuple[SourceFacts, Entry], ...]

    @property
    def path(self) -> str:
        return f"receipts/{self.feature}/{self.shard}.parquet"


def write_receipt(folder: Folder, receipt: Receipt) -> None:
    metadata = {
        "format": FORMAT,
        "feature": receipt.feature,
        "shard": receipt.shard,
        "digest": receipt.specification.digest,
        "specification": receipt.specification.to_json(),
        "written_at": receipt.written_at,
        "versions": receipt.versions,
        "files": receipt.files,
    }
    table = _rows(receipt).replace_schema_metadata({_METADATA_KEY: json.dumps(metadata)})
    folder.write(receipt.path, parquet_bytes(table))


def _rows(receipt: Receipt) -> pa.Table:
    constant = {"feature": receipt.feature, "shard": receipt.shard}
    rows = [{**asdict(entry), **vars(facts), **constant} for facts, entry in receipt.videos]
    fixed = [pa.array([row[f.name] for row in rows], f.type) for f in (*ENTRY_FIELDS, *FACT_FIELDS)]
    extra_names = sorted({name for facts, _ in receipt.videos for name in facts.extra})
    extra = [pa.array([facts.extra.get(name) for facts, _ in receipt.videos]) for name in extra_names]
    names = [*_ENTRY_NAMES, *_FACT_NAMES, *(EXTRA_PREFIX + name for name in extra_names)]
    return pa.table([*fixed, *extra], names=names)


def list_receipts(folder: Folder) -> list[str]:
    """The receipts of a store, as names inside it, in order."""
    return [
        f"receipts/{feature}/{name}"
        for feature in folder.children("receipts")
        for name in folder.children(f"receipts/{feature}")
        if name.endswith(".parquet")
    ]


@dataclass(frozen=True)
class ReadReceipt:
    """A receipt as it lies in a store: its rows, and of its file the size and the checksum that it carries."""

    name: str
    rows: pa.Table
    feature: str
    shard: str
    digest: str
    specification: FeatureSpec
    written_at: int
    versions: dict[str, str]
    files: dict[str, dict[str, Any]]
    bytes: int
    sha256: str

    @property
    def stored(self) -> int:
        """What the shard's files take, in bytes."""
        return sum(file["bytes"] for file in self.files.values())


def read_receipt(folder: Folder, name: str, columns: Sequence[str] | None = None) -> ReadReceipt:
    """One receipt, with all of its columns or some. :class:`StoreFormatError` where it is not what it claims to be."""
    try:
        data = folder.read(name)
        table, sha256 = read_parquet(data, columns)
        metadata = json.loads((table.schema.metadata or {})[_METADATA_KEY])
        if metadata["format"] > FORMAT:
            raise StoreFormatError(f"its format is {metadata['format']}; upgrade moclip")
        if name != f"receipts/{metadata['feature']}/{metadata['shard']}.parquet":
            raise StoreFormatError(f"it says it is the receipt of {metadata['feature']}/{metadata['shard']}")
        table = table.replace_schema_metadata(None)
        _check_rows(table, metadata, columns)
        files = _checked_files(metadata)
        specification = FeatureSpec.from_json(metadata["specification"])
        written_at = int(metadata["written_at"])
        versions = {str(name): str(version) for name, version in dict(metadata["versions"]).items()}
        pa.scalar(written_at, pa.int64())  # an OverflowError where no time is so far away
    except (pa.ArrowException, *NO_FILE, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise StoreFormatError(
            f"the receipt {folder.at(name)} cannot be read: {error}; put a good copy back, or delete it "
            "and extract again: its videos are then missing"
        ) from error
    return ReadReceipt(
        name=name,
        rows=table,
        feature=metadata["feature"],
        shard=metadata["shard"],
        digest=metadata["digest"],
        specification=specification,
        written_at=written_at,
        versions=versions,
        files=files,
        bytes=len(data),
        sha256=sha256,
    )


def _check_rows(table: pa.Table, metadata: dict[str, Any], columns: Sequence[str] | None) -> None:
    for field in (*ENTRY_FIELDS, *FACT_FIELDS):
        if columns is not None and field.name not in columns:
            continue
        if table.schema.field(field.name).type != field.type:
            raise StoreFormatError(f"its column {field.name} is {table.schema.field(field.name).type}")
        if not field.nullable and table[field.name].null_count:
            raise StoreFormatError(f"its column {field.name} has empty cells")
    for column, allowed in (("feature", [metadata["feature"]]), ("shard", [metadata["shard"]]), ("status", STATUS)):
        if column in table.column_names and set(table[column].unique().to_pylist()) - set(allowed):
            raise StoreFormatError(f"its column {column} holds something else than {' or '.join(allowed)}")
    check_name(metadata["feature"], "a receipt's feature")
    check_name(metadata["shard"], "a receipt's shard")


def _checked_files(metadata: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The shard's files by name: all of them its own, since `verify` and `remove` act on what is named here."""
    shard = f"features/{metadata['feature']}/{metadata['shard']}"
    files: dict[str, dict[str, Any]] = {}
    for name, about in dict(metadata["files"]).items():
        parts = name.removeprefix(f"{shard}/").split("/")
        if name != shard + ".h5" and (not name.startswith(f"{shard}/") or {"", ".", ".."} & set(parts)):
            raise StoreFormatError(f"it names a file that is not its own: {name!r}")
        files[name] = {"bytes": int(about["bytes"]), "sha256": str(about["sha256"])}
        if files[name]["bytes"] < 0 or not name.isprintable():
            raise StoreFormatError(f"it names a file that cannot be: {name!r} of {about['bytes']} bytes")
    return files
