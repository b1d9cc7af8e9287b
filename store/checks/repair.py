"""Mending a store: what receipts say is written again, and what cannot be trusted is made to be extracted again."""

import hashlib
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from moclip.errors import StoreFormatError
from moclip.store.checks.leftovers import leftovers, shard_of
from moclip.store.checks.verify import Examination, Problem, Report, container_of
from moclip.store.files import Folder, open_folder
from moclip.store.groups import GROUP, feature_json, store_json
from moclip.store.receipts import list_receipts, read_receipt
from moclip.store.schema import ENTRY_FIELDS, FeatureSpec
from moclip.store.tables import ENTRIES, create_store, publish, read_table

#: Younger leftovers may be of an extraction that is running.
ORPHAN_AGE_S = 24 * 3600.0
_KEYS = ["id", "feature"]


@dataclass(frozen=True)
class Repaired:
    """What a repair did. All paths are inside the store.

    ``again`` are the (id, feature) whose entries are gone: extracting the same sources again brings them back.
    ``written`` files were made again, ``deleted`` ones are gone, ``remaining`` problems are left to the user.
    """

    problems: tuple[Problem, ...]
    again: tuple[tuple[str, str], ...]
    written: tuple[str, ...]
    deleted: tuple[str, ...]
    remaining: tuple[Problem, ...]


def repair(url: str | Path, *, orphan_age_s: float = ORPHAN_AGE_S, report: Report | None = None) -> Repaired:
    """Verify a store and mend what can be mended; nothing that is whole is touched.

    A shard with a damaged or missing file loses its receipt and its files; so go leftovers that were last written
    ``orphan_age_s`` seconds ago. Tables and the catalogue are made again from the receipts.
    :class:`StoreFormatError`, and nothing is done, where the disk or the bucket does not give a file: that is
    first to be put right.
    """
    folder = open_folder(url)
    examination = Examination(folder, report)
    problems = examination.run()
    if unreadable := [problem for problem in problems if problem.kind == "unreadable"]:
        raise StoreFormatError(
            f"{folder.at(unreadable[0].path)} cannot be read ({unreadable[0].detail}), nor can "
            f"{len(unreadable) - 1} others; make them readable, or delete them, and repair then. Nothing was changed"
        )
    dropped = sorted({problem.receipt for problem in problems if problem.receipt})
    before = _known_entries(examination, dropped)
    for name in dropped:
        folder.delete(name)
    written, deleted = _restore(examination, problems)
    create_store(url)  # labels that are missing
    publish(url)
    orphans, young = _delete_orphans(folder, orphan_age_s, {shard_of(name) for name in dropped})
    again = _lost(before, read_table(folder, ENTRIES))
    return Repaired(
        problems=tuple(problems),
        again=tuple(zip(*(again[key].to_pylist() for key in _KEYS), strict=True)),
        written=(*written, *(problem.path for problem in problems if problem.remedy in ("publish", "empty"))),
        deleted=(*deleted, *dropped, *orphans),
        remaining=(*(problem for problem in problems if problem.remedy == "none"), *young),
    )


def _known_entries(examination: Examination, dropped: Collection[str]) -> pa.Table:
    """The entries before the repair: id, feature, status. Where their table is damaged, all that receipts tell of."""
    columns = [*_KEYS, "status"]
    told = [r for r in examination.receipts.values() if examination.entries is None or r.name in dropped]
    tables = [receipt.rows.select(columns) for receipt in told]
    if examination.entries is not None:
        tables.append(examination.entries.select(columns))
    empty = pa.schema(field for field in ENTRY_FIELDS if field.name in columns).empty_table()
    return pa.concat_tables([empty, *tables], promote_options="permissive")


def _lost(before: pa.Table, now: pa.Table) -> pa.Table:
    """(id, feature) that had an ok entry and have none now, or that had any and have none now; in order."""
    ok_before, ok_now = (table.filter(pc.equal(table["status"], "ok")) for table in (before, now))
    pairs = ((ok_before, ok_now), (before, now))
    gone = [old.select(_KEYS).join(new.select(_KEYS), _KEYS, join_type="left anti") for old, new in pairs]
    lost = pa.concat_tables(gone).group_by(_KEYS).aggregate([])
    return lost.sort_by([(key, "ascending") for key in _KEYS])


def _restore(examination: Examination, problems: Iterable[Problem]) -> tuple[list[str], list[str]]:
    """Write the groups' zarr.json that are damaged or missing; what was written, what was deleted.

    A feature that no receipt tells of holds nothing: its file is deleted.
    """
    written, deleted = [], []
    for name in (problem.path for problem in problems if problem.remedy == "restore"):
        data = _group_file(examination, name)
        if data is None:
            examination.folder.delete(name)
            deleted.append(name)
        else:
            examination.folder.write(name, data)
            written.append(name)
    return written, deleted


def _group_file(examination: Examination, name: str) -> bytes | None:
    """The bytes that the file had: those that the catalogue lists, or else the likeliest."""
    if name == "features/zarr.json":
        return GROUP
    if name == "zarr.json":
        hdf5_first = any(container_of(receipt) == "hdf5" for receipt in examination.receipts.values())
        candidates = [store_json(container) for container in (("hdf5", "zarr") if hdf5_first else ("zarr", "hdf5"))]
    else:
        candidates = [feature_json(spec) for spec in _specifications(examination, name.split("/")[1])]
    stated = examination.fingerprints.get(name, {}).get("sha256")
    as_listed = (data for data in candidates if hashlib.sha256(data).hexdigest() == stated)
    return next(as_listed, candidates[0] if candidates else None)


def _specifications(examination: Examination, feature: str) -> list[FeatureSpec]:
    """Those that the feature's receipts carry, the newest first."""
    receipts = [receipt for receipt in examination.receipts.values() if receipt.feature == feature]
    receipts.sort(key=lambda receipt: receipt.written_at, reverse=True)
    return [receipt.specification for receipt in receipts]


def _delete_orphans(folder: Folder, age_s: float, dropped: Collection[str]) -> tuple[list[str], list[Problem]]:
    """Delete what nothing names, if it is of a ``dropped`` shard or was last written ``age_s`` ago.

    Gives the places that went, and those that stay.
    """
    sizes, names = folder.files(), list_receipts(folder)
    receipts = [read_receipt(folder, name) for name in names]
    gone, young = [], []
    old = time.time() - age_s
    for place, kind, detail in leftovers(sizes, set(), receipts, names):
        if kind != "orphan":
            continue
        files = [name for name in sizes if name == place or name.startswith(f"{place}/")]
        if place.removesuffix(".h5") not in dropped and _last_written(folder, files) > old:
            young.append(Problem(place, "orphan", f"{detail}; it is too young to be deleted", "delete"))
            continue
        for name in files:
            folder.delete(name)
        gone.append(place)
    return gone, young


def _last_written(folder: Folder, files: Iterable[str]) -> float:
    """When the newest of ``files`` was written; now, if one of them has gone meanwhile: a task is at work there."""
    try:
        return max(folder.modified(name) for name in files)
    except FileNotFoundError:
        return time.time()
