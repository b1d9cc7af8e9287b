"""Taking videos out of a store for good: their rows, their names, and what killed runs left of them."""

import hashlib
import json
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from moclip.errors import SourceError
from moclip.store.copies.copying import Copy, RowSource, copy_shard
from moclip.store.copies.filling import Report, entry_of, silent
from moclip.store.copies.selection import some
from moclip.store.files import Folder, open_folder
from moclip.store.groups import feature_names, read_mark
from moclip.store.parquet import parquet_bytes
from moclip.store.receipts import ReadReceipt, list_receipts, read_receipt
from moclip.store.schema import EXTRA_PREFIX, FACT_FIELDS, SourceFacts
from moclip.store.tables import ENTRIES, LABELS, VIDEOS, publish, read_classes, read_table, write_labels

_FACT_NAMES = [field.name for field in FACT_FIELDS]


@dataclass(frozen=True)
class Removal:
    """What removing videos from a store takes.

    ``ids`` are those that the store mentions, ``absent`` the others. ``receipts`` name the shards that have to be
    written anew without them, ``entries`` counts what they hold of the videos (replaced and failed attempts too).
    ``unfinished`` are files that no receipt names: left by killed runs, or being written by a run right now.
    """

    url: str
    ids: tuple[str, ...]
    absent: tuple[str, ...]
    receipts: tuple[str, ...]
    entries: int
    unfinished: tuple[str, ...]


def plan_removal(url: str | Path, ids: Collection[str]) -> Removal:
    """What :func:`remove_videos` would do; it changes nothing.

    :class:`SourceError` if the store mentions none of ``ids`` and has no unfinished files either.
    """
    folder = open_folder(url)
    read_mark(folder)
    asked = pa.array(sorted(set(ids)), pa.string())
    receipts = _read_all(folder, list_receipts(folder))
    held = {receipt.name: receipt.rows.filter(pc.is_in(receipt.rows["id"], asked))["id"] for receipt in receipts}
    mentions = [*held.values(), *(read_table(folder, name, ["id"])["id"] for name in (VIDEOS, LABELS))]
    found = set().union(*(set(names.filter(pc.is_in(names, asked)).to_pylist()) for names in mentions))
    unfinished = _unfinished(folder, {name for receipt in receipts for name in receipt.files})
    if not found and not unfinished:
        raise SourceError(f"{folder} has none of the {len(asked)} videos named: {some(asked.to_pylist())}")
    return Removal(
        url=folder.url,
        ids=tuple(sorted(found)),
        absent=tuple(sorted(set(ids) - found)),
        receipts=tuple(name for name, names in held.items() if len(names)),
        entries=sum(len(names) for names in held.values()),
        unfinished=unfinished,
    )


def remove_videos(url: str | Path, ids: Collection[str], report: Report = silent) -> Removal:
    """Take videos out of a store: afterwards no file of it holds their rows, their ids or their labels.

    The order, so that a kill at any moment loses no other video and the same call completes the rest:

    1. every shard that mentions one of the videos, in a live entry or a dead one, is written anew under another
       name without them, with the receipt of the old one (its time and versions too) but for their rows;
    2. the old receipts are deleted;
    3. labels and tables are published without the videos;
    4. the old shards' files are deleted, and with them all that no receipt names.

    Step 4 would take the files of an extraction, export or merge that is writing into the store from under it: let
    none run at the same time. Readers that opened the store before must open it again. Other copies of a bucket's
    objects (versions, unfinished uploads, backups) are the bucket's owner's to delete.

    Ids that the store does not mention are told in the result. :class:`StoreFormatError` if a receipt, or a row of
    another video in a shard that must be written anew, is damaged; nothing is deleted then. ``report`` is told
    (shards written anew, of how many).
    """
    folder = open_folder(url)
    read_mark(folder)
    with folder.exclusive():
        plan = plan_removal(url, ids)
        old = _read_all(folder, plan.receipts)
        report(0, len(old))
        for done, receipt in enumerate(old, 1):
            _write_without(folder, receipt, plan.ids)
            report(done, len(old))
        for receipt in old:
            folder.delete(receipt.name)
        _publish_without(folder, plan.ids)
        for name in _unfinished(folder, _named(folder)):
            folder.delete(name)
    return plan


def _read_all(folder: Folder, names: Sequence[str]) -> list[ReadReceipt]:
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda name: read_receipt(folder, name), names))


def _write_without(folder: Folder, receipt: ReadReceipt, ids: Collection[str]) -> None:
    """Write a shard again without ``ids``.

    Dead entries of other videos come too: what is dead or alive follows from all receipts, and must not change.
    """
    kept = _without(receipt.rows, ids)
    if not len(kept):
        return
    shard = hashlib.sha256(json.dumps([receipt.shard, kept["id"].to_pylist()]).encode()).hexdigest()[:16]
    if folder.exists(f"receipts/{receipt.feature}/{shard}.parquet"):
        return  # by an attempt that was killed later: the name follows from what is in it
    copy_shard(
        folder.url,
        feature=receipt.feature,
        spec=receipt.specification,
        shard=shard,
        copies=_copies(folder, receipt, kept),
        versions=receipt.versions,
        written_at=receipt.written_at,
    )


def _copies(folder: Folder, receipt: ReadReceipt, rows: pa.Table) -> list[Copy]:
    source = RowSource(folder, receipt.feature, receipt.specification)
    return [Copy(_facts_of(row), entry_of(row), source, receipt.shard) for row in rows.to_pylist()]


def _facts_of(row: dict[str, Any]) -> SourceFacts:
    """The facts in a row of a receipt."""
    extra = {name.removeprefix(EXTRA_PREFIX): value for name, value in row.items() if name.startswith(EXTRA_PREFIX)}
    return SourceFacts(id=row["id"], **{name: row[name] for name in _FACT_NAMES}, extra=extra)


def _publish_without(folder: Folder, ids: Collection[str]) -> None:
    labels, entries = (read_table(folder, name) for name in (LABELS, ENTRIES))
    kept = _without(labels, ids)
    if len(kept) < len(labels):
        write_labels(folder.url, kept, read_classes(folder))
    # Publishing writes the videos before the entries, and an entry of a video that is gone cannot be read.
    folder.write(ENTRIES, parquet_bytes(_without(entries, ids)))
    publish(folder.url)


def _without(rows: pa.Table, ids: Collection[str]) -> pa.Table:
    return rows.filter(pc.invert(pc.is_in(rows["id"], pa.array(ids, pa.string()))))


def _named(folder: Folder) -> set[str]:
    return {name for receipt in _read_all(folder, list_receipts(folder)) for name in receipt.files}


def _unfinished(folder: Folder, named: Collection[str]) -> tuple[str, ...]:
    """Files that no receipt names: of shards that were not finished, and half-written ones anywhere."""
    groups = {"features/zarr.json", *(f"features/{name}/zarr.json" for name in feature_names(folder))}
    shards = (name for name in folder.files("features") if name not in groups and name not in named)
    half_written = (name for name in folder.files() if _is_temporary(name))
    return tuple(sorted({*shards, *half_written}))


def _is_temporary(name: str) -> bool:
    last = name.rsplit("/", 1)[-1]
    return last.startswith(".") and last.endswith(".tmp")
