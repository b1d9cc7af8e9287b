"""Whether every file of a store is there with the bytes that were written, and what a repair would do if not."""

import hashlib
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from moclip.errors import MoclipError, StoreFormatError
from moclip.store.checks.leftovers import leftovers
from moclip.store.containers import CONTAINERS
from moclip.store.containers.hdf5 import SUFFIX
from moclip.store.files import Folder, open_folder
from moclip.store.fold import fold_receipts
from moclip.store.groups import GROUP, feature_json, read_feature, read_mark, store_json
from moclip.store.parquet import parquet_bytes
from moclip.store.receipts import ReadReceipt, list_receipts, read_receipt
from moclip.store.schema import VALUE
from moclip.store.tables import CATALOGUE, ENTRIES, LABELS, VIDEOS, read_catalogue, read_classes, read_table

_THREADS = 8
_BLOCK_BYTES = 2**20
_SPECIFICATION = re.compile(r"features/([A-Za-z0-9][A-Za-z0-9._-]*)/zarr\.json")

#: ``damaged``: other bytes than those written; ``missing``: not there; ``unreadable``: the disk or the bucket did not
#: give it; ``stale``: a table that is not what the receipts amount to; ``no_data``: entries whose rows are not there;
#: ``orphan``: of a task that was killed, or that is running; ``extra``: what nothing of moclip's wrote.
Kind = Literal["damaged", "missing", "unreadable", "stale", "no_data", "orphan", "extra"]
#: What a repair does: ``restore`` the file from what the receipts say, ``publish`` the tables again, make an ``empty``
#: one, ``drop`` the shard's receipt so that its videos are extracted again, ``delete`` it when it is old, or nothing.
Remedy = Literal["restore", "publish", "empty", "drop", "delete", "none"]


@dataclass(frozen=True)
class Problem:
    """One file that is not as it should be. ``receipt`` names the shard's receipt where the remedy is ``drop``."""

    path: str
    kind: Kind
    detail: str
    remedy: Remedy
    receipt: str | None = None


@dataclass(frozen=True)
class Verified:
    """How far a verification is: files and bytes that were read, of about so many."""

    files: int
    bytes: int
    all_files: int
    all_bytes: int


Report = Callable[[Verified], None]


def verify(url: str | Path, report: Report | None = None) -> list[Problem]:
    """Read every byte of a store; what is wrong with it, by path. An empty list means that all is well.

    Receipts that came since the tables were published are no problem: a run is going on, or was stopped, and the
    next one publishes them. :class:`StoreNotFoundError` where there is no store, :class:`StoreFormatError` where it
    is of a newer format.
    """
    return Examination(open_folder(url), report).run()


class Examination:
    """One pass over a store. ``receipts`` are those that could be read, by name; ``entries`` the table, if it could."""

    def __init__(self, folder: Folder, report: Report | None = None) -> None:
        self.folder = folder
        self.receipts: dict[str, ReadReceipt] = {}
        self.entries: pa.Table | None = None
        self.fingerprints: Mapping[str, Any] = {}
        self._report = report or (lambda _: None)
        self._reader = lru_cache(lambda container: CONTAINERS[container].reader(folder))
        self._lock = threading.Lock()
        self._done = Verified(0, 0, 0, 0)
        self._problems: dict[str, Problem] = {}

    def run(self) -> list[Problem]:
        """All problems, by path; one a path."""
        self._check_format()
        sizes = self.folder.files()
        self._done = Verified(0, 0, len(sizes), sum(sizes.values()))
        with ThreadPoolExecutor(_THREADS) as pool:
            self._check_tables(pool)
            self._check_plain_files()
            self._check_shards(pool)
        for path, found, detail in leftovers(sizes, self._known(), self.receipts.values(), list_receipts(self.folder)):
            self._found(path, found, detail, "delete" if found == "orphan" else "none")
        return sorted(self._problems.values(), key=lambda problem: problem.path)

    def _check_format(self) -> None:
        """Stop where there is no store, or one that only a newer version understands."""
        try:
            read_mark(self.folder)
        except StoreFormatError as error:
            # A flipped bit can claim a newer format; then the catalogue, if it is whole, has another checksum.
            if "upgrade moclip" in str(error) and not self._contradicted("zarr.json"):
                raise
        except MoclipError:
            if not self.folder.exists(CATALOGUE) and not list_receipts(self.folder):
                raise

    def _contradicted(self, name: str) -> bool:
        try:
            stated = read_catalogue(self.folder)["files"][name]["sha256"]
        except (StoreFormatError, KeyError, TypeError):
            return False
        return bool(stated != hashlib.sha256(self.folder.read(name)).hexdigest())

    def _check_tables(self, pool: Executor) -> None:
        """Catalogue, receipts and tables against each other; once more where a run published meanwhile."""
        while True:
            before, stamp = dict(self._problems), self._try_read(CATALOGUE)
            self._compare_tables(pool)
            if self._problems == before or self._try_read(CATALOGUE) == stamp:
                return
            self._problems = before

    def _compare_tables(self, pool: Executor) -> None:
        catalogue = self._attempt(CATALOGUE, lambda: read_catalogue(self.folder), "publish")
        names = list_receipts(self.folder)
        list(pool.map(self._read_receipt, (name for name in names if name not in self.receipts)))
        videos = self._attempt(VIDEOS, lambda: read_table(self.folder, VIDEOS), "publish")
        self.entries = self._attempt(ENTRIES, lambda: read_table(self.folder, ENTRIES), "publish")
        self.fingerprints = catalogue["files"] if catalogue else {}
        self._check_specifications()
        if catalogue is None:
            return
        self._find_lost_shards(catalogue["receipts"], set(names))
        for name, about in catalogue["receipts"].items():
            if name in self.receipts and self.receipts[name].sha256 != about["sha256"]:
                self._found(name, "stale", "it is another receipt than the one that was published", "publish")
        if videos is not None and self.entries is not None and not self._problems:
            self._check_fold(sorted(catalogue["receipts"]), {VIDEOS: videos, ENTRIES: self.entries})
        for name in (VIDEOS, ENTRIES):
            self._check_fingerprint(name)

    def _read_receipt(self, name: str) -> None:
        receipt = self._attempt(name, lambda: read_receipt(self.folder, name), "drop", receipt=name)
        if receipt is None:
            return
        self.receipts[name] = receipt
        self._count(receipt.bytes)
        if receipt.specification.digest != receipt.digest:
            self._found(name, "damaged", "its specification does not match its digest", "drop", name)

    def _check_specifications(self) -> None:
        """Those of the features that the catalogue or a receipt names, or that lie in the folder."""
        there = (f"features/{name}/zarr.json" for name in self.folder.children("features"))
        named = [f"features/{receipt.feature}/zarr.json" for receipt in self.receipts.values()]
        for name in sorted({*filter(self.folder.exists, there), *named, *self.fingerprints}):
            if match := _SPECIFICATION.fullmatch(name):
                self._check_bytes(name, partial(self._specification, match[1]))

    def _specification(self, feature: str) -> list[bytes]:
        return [feature_json(read_feature(self.folder, feature))]

    def _find_lost_shards(self, published: Iterable[str], names: set[str]) -> None:
        for name in sorted(set(published) - names):
            self._found(name, "missing", "this receipt was published and is gone: its videos have no rows", "publish")
        if self.entries is not None:
            for feature, shard, count in _shards_of(self.entries):
                name = f"receipts/{feature}/{shard}.parquet"
                if name not in names:
                    self._found(name, "no_data", f"{count} entries name this shard, which has no receipt", "publish")

    def _check_fold(self, names: list[str], tables: Mapping[str, pa.Table]) -> None:
        folded = fold_receipts(self.folder, tuple(self.receipts[name] for name in names))
        for name, expected in ((VIDEOS, folded.videos), (ENTRIES, folded.entries)):
            if parquet_bytes(expected) != self.folder.read(name) and not tables[name].equals(expected):
                self._found(name, "stale", "it is not what the receipts amount to", "publish")

    def _check_fingerprint(self, name: str) -> None:
        data = self._try_read(name)
        stated = self.fingerprints.get(name, {}).get("sha256")
        if data is not None and stated != hashlib.sha256(data).hexdigest():
            self._found(name, "stale", "it is another one than the catalogue lists", "publish")

    def _check_plain_files(self) -> None:
        """The files that are the same in every store, and the labels."""
        self._check_bytes("zarr.json", lambda: [store_json(name) for name in CONTAINERS])
        self._check_bytes("features/zarr.json", lambda: [GROUP])
        remedy: Remedy = "none" if self.folder.exists(LABELS) else "empty"
        if self._attempt(LABELS, lambda: read_table(self.folder, LABELS), remedy) is not None:
            self._attempt(LABELS, lambda: read_classes(self.folder), "none")

    def _check_bytes(self, name: str, expected: Callable[[], list[bytes]]) -> None:
        """``name`` must be one of the ``expected`` files, byte by byte, and the one that the catalogue lists."""
        data = self._attempt(name, lambda: self.folder.read(name), "restore")
        if data is None or name in self._problems:
            return
        stated = self.fingerprints.get(name, {}).get("sha256", "")
        if stated and stated != hashlib.sha256(data).hexdigest():
            self._found(name, "damaged", "its bytes are not those that the catalogue lists", "restore")
        elif data not in (self._attempt(name, expected, "restore") or [data]):
            self._found(name, "damaged", "its bytes are not those that moclip writes", "restore")

    def _check_shards(self, pool: Executor) -> None:
        """Every file that a receipt names, then whether the arrays are as long as the entries say."""
        files = [(receipt, name) for receipt in self.receipts.values() for name in receipt.files]
        bad = {receipt.name for receipt in pool.map(lambda item: self._check_file(*item), files) if receipt}
        for receipt in self.receipts.values():
            if receipt.name not in bad:
                self._check_ranges(receipt)

    def _check_file(self, receipt: ReadReceipt, name: str) -> ReadReceipt | None:
        """The receipt again if its file ``name`` is not as it says."""
        about = receipt.files[name]
        found = self._attempt(name, lambda: _fingerprint(self.folder, name), "drop", receipt=receipt.name)
        if found is None:
            return receipt
        self._count(found[0])
        if found == (about["bytes"], about["sha256"]):
            return None
        what = f"it has {found[0]} bytes, {about['bytes']} were written"
        if found[0] == about["bytes"]:
            what = "its bytes are not those that were written"
        self._found(name, "damaged", what, "drop", receipt.name)
        return receipt

    def _check_ranges(self, receipt: ReadReceipt) -> None:
        reader = self._reader(container_of(receipt))
        spec, shard = receipt.specification, f"features/{receipt.feature}/{receipt.shard}"
        # The bytes of ragged rows are counted by value_stop, not by entries.
        columns = {name: dtype for name, dtype in spec.arrays.items() if name != VALUE or not spec.ragged}
        try:
            for array, rows in _last_rows(receipt):
                for column, dtype in columns.items():
                    reader.open(shard, array, column, dtype, rows)
        except StoreFormatError as error:
            self._found(receipt.name, "no_data", str(error), "drop", receipt.name)
        except OSError as error:  # of the disk or the bucket, and no reason to drop anything
            self._found(receipt.name, "unreadable", str(error), "none")

    def _known(self) -> set[str]:
        specifications = {name for name in self.fingerprints if _SPECIFICATION.fullmatch(name)}
        features = {f"features/{name}/zarr.json" for name in self.folder.children("features")}
        plain = {"zarr.json", "features/zarr.json", VIDEOS, ENTRIES, LABELS, CATALOGUE}
        return plain | specifications | {name for name in features if _SPECIFICATION.fullmatch(name)}

    def _attempt(self, name: str, read: Callable[[], Any], remedy: Remedy, receipt: str | None = None) -> Any:
        """What ``read`` gives, or None and a problem. Only what was read and is wrong counts as damage."""
        try:
            return read()
        except (MoclipError, OSError) as error:
            cause = error if isinstance(error, OSError) else error.__cause__
            if isinstance(cause, FileNotFoundError):
                self._found(name, "missing", "it is not there", remedy, receipt)
            elif isinstance(cause, OSError):
                self._found(name, "unreadable", str(cause), "none")
            else:
                plain = isinstance(cause, (MoclipError, ValueError))
                self._found(name, "damaged", str(cause if plain else error), remedy, receipt)
            return None

    def _try_read(self, name: str) -> bytes | None:
        try:
            return self.folder.read(name)
        except (MoclipError, OSError):
            return None

    def _found(self, path: str, kind: Kind, detail: str, remedy: Remedy, receipt: str | None = None) -> None:
        self._problems.setdefault(path, Problem(path, kind, detail, remedy, receipt))

    def _count(self, size: int) -> None:
        with self._lock:
            done = self._done
            self._done = Verified(done.files + 1, done.bytes + size, done.all_files, done.all_bytes)
            self._report(self._done)


def _fingerprint(folder: Folder, name: str) -> tuple[int, str]:
    """Size and SHA-256 of a file that may be larger than memory."""
    digest, size = hashlib.sha256(), 0
    with folder.open(name) as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
            size += len(block)
    return size, digest.hexdigest()


def container_of(receipt: ReadReceipt) -> str:
    """The container that a receipt's shard was written in, by its files."""
    return "hdf5" if any(name.endswith(SUFFIX) for name in receipt.files) else "zarr"


def _last_rows(receipt: ReadReceipt) -> list[tuple[str, int]]:
    """Each array of a shard, and how many rows its entries say it has."""
    ok = receipt.rows.filter(pc.equal(receipt.rows["status"], "ok"))
    rows = ok.group_by("array").aggregate([("row_stop", "max")]).to_pylist()
    return [(str(row["array"]), int(row["row_stop_max"] or 0)) for row in rows]


def _shards_of(entries: pa.Table) -> list[tuple[str, str, int]]:
    """Each shard that entries name: feature, shard, how many of them."""
    groups = entries.group_by(["feature", "shard"]).aggregate([("id", "count")]).to_pylist()
    return [(row["feature"], row["shard"], row["id_count"]) for row in groups]
