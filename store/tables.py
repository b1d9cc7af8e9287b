"""A store's metadata files: made, added to, and published from the receipts.

Only a coordinator calls these; shard tasks write arrays and receipts alone.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from moclip.errors import FeatureError, StoreFormatError
from moclip.store.files import check_name, write_atomic
from moclip.store.fold import fold
from moclip.store.groups import GROUP, check_format, group_json, read_feature
from moclip.store.receipts import list_receipts, parquet_bytes
from moclip.store.schema import FORMAT, SPLIT_PREFIX, FeatureSpec, empty_entries, empty_labels, empty_videos

_TABLES = {"videos.parquet": empty_videos, "entries.parquet": empty_entries, "labels.parquet": empty_labels}


def create_store(root: str | Path) -> None:
    """Make an empty store that opens, or leave the one that is there as it is.

    :class:`StoreFormatError` if the folder holds something else.
    """
    root = Path(root)
    if (root / "zarr.json").exists():
        check_format(root)
    elif is_foreign(root):
        raise StoreFormatError(f"{root} exists and is not a moclip store; name another path")
    else:
        # First: whoever comes now, or after a kill here, completes the rest.
        write_atomic(root / "zarr.json", group_json({"moclip": {"format": FORMAT}}))
    for name, empty in _TABLES.items():
        if not (root / name).exists():
            write_atomic(root / name, parquet_bytes(empty()))
    if not (root / "classes.json").exists():
        write_atomic(root / "classes.json", b"[]")
    if not (root / "features" / "zarr.json").exists():
        write_atomic(root / "features" / "zarr.json", GROUP)
    if not (root / "catalogue.json").exists():
        _write_catalogue(root, [])


def is_foreign(root: Path) -> bool:
    """Whether something else than a store, or the beginning of one, is at ``root``."""
    if not root.exists() or (root / "zarr.json").exists():
        return False
    if not root.is_dir():
        return True
    # Hidden names are unfinished writes, of a run that began at the same time or was killed.
    visible = [path.name for path in root.iterdir() if not path.name.startswith(".")]
    return bool(visible) and not (root / "zarr.json").exists()


def add_feature(root: str | Path, name: str, spec: FeatureSpec) -> None:
    """Give ``name`` to a specification. :class:`FeatureError` if it belongs to another one."""
    folder = Path(root) / "features" / check_name(name, "a feature")
    if is_added(root, name, spec):
        return
    attributes = {"moclip": {"specification": spec.to_json(), "digest": spec.digest}}
    write_atomic(folder / "zarr.json", group_json(attributes))
    is_added(root, name, spec)  # a run that began at the same time may have given the name away meanwhile


def is_added(root: str | Path, name: str, spec: FeatureSpec) -> bool:
    """Whether the store has the feature. :class:`FeatureError` if the name belongs to another specification."""
    folder = Path(root) / "features" / check_name(name, "a feature")
    if not (folder / "zarr.json").exists():
        return False
    there = read_feature(folder)
    if there.digest != spec.digest:
        raise FeatureError(
            f"the feature {name!r} is taken in {root} by another specification ({_difference(there, spec)}); "
            "give this one a name of its own with --as NAME"
        )
    return True


def _difference(there: FeatureSpec, here: FeatureSpec) -> str:
    old, new = _flat(there.to_json()), _flat(here.to_json())
    changed = [key for key in sorted(old | new) if old.get(key) != new.get(key)]
    return "; ".join(f"{key}: {old.get(key)} there, {new.get(key)} asked for" for key in changed[:4])


def _flat(spec: dict[str, Any]) -> dict[str, Any]:
    return {**{key: value for key, value in spec.items() if key != "parameters"}, **spec["parameters"]}


def publish(root: str | Path) -> None:
    """Write the tables that the receipts amount to, and repeat until no receipt came in between.

    So of two runs into one store, whichever publishes last has seen the other's receipts.
    """
    root = Path(root)
    while True:
        names = list_receipts(root)
        videos, entries = fold(root, names)
        write_atomic(root / "videos.parquet", parquet_bytes(videos))
        write_atomic(root / "entries.parquet", parquet_bytes(entries))
        _write_catalogue(root, names)
        if list_receipts(root) == names:
            return


def write_labels(root: str | Path, table: pa.Table, classes: list[str]) -> None:
    """Replace labels, groups and splits: ``id, label, group, split_<name>``, all text, one row an id."""
    root = Path(root)
    write_atomic(root / "labels.parquet", parquet_bytes(table.sort_by("id")))
    write_atomic(root / "classes.json", json.dumps(classes, ensure_ascii=False, indent=0).encode())
    _write_catalogue(root, sorted(published_receipts(root)))


def _write_catalogue(root: Path, receipts: list[str]) -> None:
    """List every metadata file and receipt with its size and checksum, and the list's own checksum."""
    features = sorted(path.relative_to(root).as_posix() for path in root.glob("features/*/zarr.json"))
    names = [*_TABLES, "classes.json", "features/zarr.json", *features, *receipts]
    files = {name: _fingerprint(root / name) for name in ["zarr.json", *names] if (root / name).exists()}
    body = {"format": FORMAT, "files": files}
    checksum = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    catalogue = {**body, "sha256": checksum}
    write_atomic(root / "catalogue.json", json.dumps(catalogue, indent=0, sort_keys=True).encode())


def published_receipts(root: Path) -> set[str]:
    """The receipts that the tables hold; none where the catalogue cannot be read, which says the same."""
    try:
        files = json.loads((root / "catalogue.json").read_bytes())["files"]
        return {name for name in files if name.startswith("receipts/")}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return set()


def _fingerprint(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def read_table(root: Path, name: str) -> pa.Table:
    """One of the store's tables, with the columns that format 1 promises, sorted by id."""
    expected = _TABLES[name]().schema
    try:
        table = pq.read_table(pa.BufferReader((root / name).read_bytes()))
        for field in expected:
            if table.schema.field(field.name).type != field.type:
                raise StoreFormatError(
                    f"{root / name}: column {field.name} is {table.schema.field(field.name).type}, "
                    f"{field.type} expected"
                )
            if not field.nullable and table[field.name].null_count:
                raise StoreFormatError(f"{root / name}: column {field.name} has empty cells")
        for column in table.schema:
            if column.name.startswith(SPLIT_PREFIX) and name == "labels.parquet" and column.type != pa.string():
                raise StoreFormatError(f"{root / name}: column {column.name} is {column.type}, text expected")
    except (OSError, pa.ArrowException, KeyError) as error:
        raise StoreFormatError(f"{root / name} cannot be read: {error}") from error
    return table.replace_schema_metadata(None)
