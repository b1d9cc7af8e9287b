"""A store's metadata files: made, added to, and published from the receipts.

Only a coordinator calls these; shard tasks write arrays and receipts alone.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from moclip.errors import FeatureError, StoreFormatError
from moclip.store.containers import CONTAINERS
from moclip.store.files import NO_FILE, Folder, check_name, open_folder
from moclip.store.fold import Fold, FoldReport, fold
from moclip.store.groups import GROUP, feature_files, feature_json, read_feature, read_mark, store_json
from moclip.store.parquet import parquet_bytes, read_parquet
from moclip.store.receipts import list_receipts
from moclip.store.schema import FORMAT, SPLIT_PREFIX, FeatureSpec, empty_entries, empty_labels, empty_videos

VIDEOS, ENTRIES, LABELS, CATALOGUE = "videos.parquet", "entries.parquet", "labels.parquet", "catalogue.json"
_EMPTY = {VIDEOS: empty_videos, ENTRIES: empty_entries, LABELS: empty_labels}
_CLASSES_KEY = b"moclip"


def create_store(url: str | Path, container: str | None = None) -> None:
    """Make an empty store that opens, or leave the one that is there as it is.

    ``container`` is zarr, the default, or hdf5. :class:`StoreFormatError` if the folder holds something else, or a
    store with the other container.
    """
    folder = open_folder(url)
    if container not in (None, *CONTAINERS):
        raise StoreFormatError(f"no store keeps its rows as {container!r}; expected {' or '.join(CONTAINERS)}")
    if not check_place(url, container):
        # First: whoever comes now, or after a kill here, completes the rest.
        folder.create("zarr.json", store_json(container or "zarr"))
        check_place(url, container)  # a run that began at the same time may have made it the other way
    names = folder.children()
    for name, empty in _EMPTY.items():
        if name not in names:
            folder.create(name, parquet_bytes(_with_classes(empty(), []) if name == LABELS else empty()))
    if not folder.exists("features/zarr.json"):
        folder.create("features/zarr.json", GROUP)
    if CATALOGUE not in names:
        tables = {name: folder.read(name) for name in (VIDEOS, ENTRIES)}
        folder.create(CATALOGUE, _catalogue(folder, tables, {}, {}))


def is_store(url: str | Path) -> bool:
    """Whether a store, or the beginning of one, is at ``url``."""
    return open_folder(url).exists("zarr.json")


def check_place(url: str | Path, container: str | None = None) -> bool:
    """Whether a store is at ``url``; where there is none, one can be made there.

    :class:`StoreFormatError` if something else is there, or a store with the other container than ``container``.
    """
    folder = open_folder(url)
    # One look: whoever makes a store at this moment writes zarr.json first. Hidden names are unfinished writes.
    names = folder.children()
    if "zarr.json" in names:
        there = read_mark(folder)
        if container not in (None, there):
            raise StoreFormatError(f"{folder} keeps its rows as {there}, not as {container}; name another path")
        return True
    if names or (folder.local is not None and folder.local.is_file()):
        raise StoreFormatError(f"{folder} exists and is not a moclip store; name another path")
    return False


def add_feature(url: str | Path, name: str, spec: FeatureSpec) -> None:
    """Give ``name`` to a specification. :class:`FeatureError` if it belongs to another one."""
    if is_added(url, name, spec):
        return
    open_folder(url).write(f"features/{name}/zarr.json", feature_json(spec))
    is_added(url, name, spec)  # a run that began at the same time may have given the name away meanwhile


def is_added(url: str | Path, name: str, spec: FeatureSpec) -> bool:
    """Whether the store has the feature. :class:`FeatureError` if the name belongs to another specification."""
    folder = open_folder(url)
    if not folder.exists(f"features/{check_name(name, 'a feature')}/zarr.json"):
        return False
    there = read_feature(folder, name)
    if there.digest != spec.digest:
        raise FeatureError(
            f"the feature {name!r} is taken in {folder} by another specification ({spec_difference(there, spec)}); "
            "give this one a name of its own with --as NAME"
        )
    return True


def spec_difference(there: FeatureSpec, here: FeatureSpec, places: tuple[str, str] = ("there", "asked for")) -> str:
    """In words, what differs between two specifications; ``places`` is what to call where they are from."""
    old, new = _flat(there.to_json()), _flat(here.to_json())
    changed = [key for key in sorted(old | new) if old.get(key) != new.get(key)]
    return "; ".join(f"{key}: {old.get(key)} {places[0]}, {new.get(key)} {places[1]}" for key in changed[:4])


def _flat(spec: dict[str, Any]) -> dict[str, Any]:
    return {**{key: value for key, value in spec.items() if key != "parameters"}, **spec["parameters"]}


def fold_store(url: str | Path) -> Fold:
    """What the receipts of a store amount to now, whether they were published or not."""
    folder = open_folder(url)
    return fold(folder, list_receipts(folder))


def settled(url: str | Path, columns: Sequence[str], report: FoldReport = lambda *_: None) -> tuple[pa.Table, pa.Table]:
    """Some columns of the videos and entries that the receipts of a store amount to now, published or not.

    Where just these receipts were published, the tables say the same: two files are read instead of thousands.
    """
    folder = open_folder(url)
    names = list_receipts(folder)
    if _are_published(folder, names):
        wanted = [[name for name in columns if name in _EMPTY[table]().column_names] for table in (VIDEOS, ENTRIES)]
        dictionaries = [name for name in wanted[1] if name != "id"]
        return read_table(folder, VIDEOS, wanted[0]), read_table(folder, ENTRIES, wanted[1], dictionaries=dictionaries)
    folded = fold(folder, names, columns, report)
    return folded.videos, folded.entries


def _are_published(folder: Folder, names: Sequence[str]) -> bool:
    """Whether the tables are those of the catalogue, and made of just these receipts and today's specifications."""
    try:
        catalogue = read_catalogue(folder)
        now = {name: _fingerprint(folder.read(name)) for name in catalogue["files"]}
    except (StoreFormatError, *NO_FILE):
        return False
    return now == catalogue["files"] and sorted(catalogue["receipts"]) == sorted(names)


def publish(url: str | Path) -> None:
    """Write the tables that the receipts amount to, and repeat until no receipt came in between.

    So of two runs into one store, whichever publishes last has seen the other's receipts.
    """
    folder = open_folder(url)
    while True:
        names = list_receipts(folder)
        folded = fold(folder, names)
        tables = {VIDEOS: parquet_bytes(folded.videos), ENTRIES: parquet_bytes(folded.entries)}
        for name, data in tables.items():
            folder.write(name, data)
        folder.write(CATALOGUE, _catalogue(folder, tables, folded.receipts, folded.versions))
        if list_receipts(folder) == names:
            return


def write_labels(url: str | Path, table: pa.Table, classes: Sequence[str]) -> None:
    """Replace labels, groups and splits (``id, label, group, split_<name>``, all text, one row an id) and classes."""
    open_folder(url).write(LABELS, parquet_bytes(_with_classes(table.sort_by("id"), classes)))


def _with_classes(table: pa.Table, classes: Sequence[str]) -> pa.Table:
    """The classes' order travels with the labels, in one file: they can never be of two times."""
    about = json.dumps({"classes": list(classes)}, ensure_ascii=False)
    return table.replace_schema_metadata({_CLASSES_KEY: about})


def read_classes(folder: Folder) -> list[str]:
    """The class names that lie with the labels, in order."""
    try:
        table, _ = read_parquet(folder.read(LABELS), [])
        classes = json.loads(table.schema.metadata[_CLASSES_KEY])["classes"]
    except (*NO_FILE, KeyError, TypeError, ValueError, RecursionError) as error:
        raise StoreFormatError(f"{folder.at(LABELS)} cannot be read: {error}") from error
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise StoreFormatError(f"{folder.at(LABELS)}: its classes are not a list of names")
    return classes


def _catalogue(
    folder: Folder, tables: Mapping[str, bytes], receipts: Mapping[str, Any], versions: Mapping[str, Any]
) -> bytes:
    """Lists the tables, the specifications and the receipts that they hold, each with its size and checksum.

    Labels are not among them: they change without the rest, and their file carries its own checksum.
    """
    groups = {name: folder.read(name) for name in ("zarr.json", "features/zarr.json")}
    features = {f"features/{name}/zarr.json": data for name, data in feature_files(folder).items()}
    body = {
        "format": FORMAT,
        "files": {name: _fingerprint(data) for name, data in {**groups, **features, **tables}.items()},
        "receipts": receipts,
        "versions": versions,
    }
    return _catalogue_bytes(body)


def _catalogue_bytes(body: dict[str, Any]) -> bytes:
    checksum = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({**body, "sha256": checksum}, indent=0, sort_keys=True).encode()


def read_catalogue(folder: Folder) -> dict[str, Any]:
    """The catalogue, every byte of which is the one that was written; :class:`StoreFormatError` otherwise."""
    try:
        data = folder.read(CATALOGUE)
        body = dict(json.loads(data))
        body.pop("sha256")
        if _catalogue_bytes(body) != data:
            raise StoreFormatError("its checksum differs")
        for about in (*body["files"].values(), *body["receipts"].values()):
            if not (isinstance(about["bytes"], int) and isinstance(about["sha256"], str)):
                raise StoreFormatError("it lists a file without its size or its checksum")
        if not all(isinstance(about["stored"], int) for about in body["receipts"].values()):
            raise StoreFormatError("it lists a receipt without the size of its shard")
        if not all(isinstance(some, dict) for some in (body["versions"], *body["versions"].values())):
            raise StoreFormatError("it lists no versions")
        return body
    except (*NO_FILE, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StoreFormatError(
            f"{folder.at(CATALOGUE)} cannot be read: {error}; `moclip verify --repair` makes it again"
        ) from error


def _fingerprint(data: bytes) -> dict[str, Any]:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def read_table(
    folder: Folder, name: str, columns: Sequence[str] | None = None, *, dictionaries: Sequence[str] = ()
) -> pa.Table:
    """One of the store's tables, sorted by id, with the columns that format 1 promises, or some of them."""
    expected = _EMPTY[name]().schema
    try:
        table, _ = read_parquet(folder.read(name), columns, dictionaries=dictionaries)
        for field in expected:
            if columns is None or field.name in columns:
                _check_column(table, field)
        for column in table.schema:
            if column.name.startswith(SPLIT_PREFIX) and name == LABELS and column.type != pa.string():
                raise StoreFormatError(f"column {column.name} is {column.type}, text expected")
    except (*NO_FILE, KeyError, ValueError) as error:
        advice = "`moclip verify --repair` makes it again from the receipts"
        if name == LABELS:
            advice = "put a good copy back, or delete it and use `moclip label`"
        raise StoreFormatError(f"{folder.at(name)} cannot be read: {error}; {advice}") from error
    return table.replace_schema_metadata(None)


def _check_column(table: pa.Table, field: pa.Field) -> None:
    found = table.schema.field(field.name).type
    if pa.types.is_dictionary(found):
        found = found.value_type
    if found != field.type:
        raise StoreFormatError(f"column {field.name} is {found}, {field.type} expected")
    if not field.nullable and table[field.name].null_count:
        raise StoreFormatError(f"column {field.name} has empty cells")
