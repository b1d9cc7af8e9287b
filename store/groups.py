"""Zarr v3 groups as this store uses them: the format's mark at the root, a specification on each feature."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moclip.errors import StoreFormatError, StoreNotFoundError
from moclip.store.schema import FORMAT, FeatureSpec


def group_json(attributes: Mapping[str, Any]) -> bytes:
    """The ``zarr.json`` of a Zarr v3 group."""
    group = {"zarr_format": 3, "node_type": "group", "attributes": dict(attributes)}
    return json.dumps(group, indent=1, sort_keys=True).encode()


GROUP = group_json({})


def check_format(root: Path) -> None:
    """Raise unless ``root`` is a store of a format that this version reads."""
    if not (root / "zarr.json").is_file():
        hint = "no such folder" if not root.exists() else "it has no zarr.json"
        raise StoreNotFoundError(f"no moclip store at {root} ({hint}); `moclip extract SOURCE STORE` makes one")
    attributes = read_group(root).get("moclip")
    found = attributes.get("format") if isinstance(attributes, dict) else None
    if not isinstance(found, int):
        raise StoreFormatError(f"{root} is a Zarr group but no moclip store: its attributes name no format")
    if found > FORMAT:
        raise StoreFormatError(f"{root} has format {found}, this moclip reads up to {FORMAT}; upgrade moclip")


def read_group(folder: Path) -> dict[str, Any]:
    """The attributes of a Zarr group."""
    try:
        attributes = json.loads((folder / "zarr.json").read_bytes())["attributes"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise StoreFormatError(f"{folder}/zarr.json is not a Zarr group: {error}") from error
    if not isinstance(attributes, dict):
        raise StoreFormatError(f"{folder}/zarr.json is not a Zarr group: its attributes are no mapping")
    return attributes


def read_feature(folder: Path) -> FeatureSpec:
    """A feature's specification, checked against the digest beside it."""
    attributes = read_group(folder).get("moclip")
    if not isinstance(attributes, dict):
        raise StoreFormatError(f"{folder} carries no feature specification")
    spec = FeatureSpec.from_json(attributes.get("specification"))
    if spec.digest != attributes.get("digest"):
        raise StoreFormatError(f"the specification of {folder} does not match its digest: it was changed by hand")
    return spec
