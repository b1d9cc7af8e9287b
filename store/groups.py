"""Zarr v3 groups as this store uses them: the format's mark at the root, a specification on each feature."""

import json
from collections.abc import Mapping
from typing import Any

from moclip.errors import StoreFormatError, StoreNotFoundError
from moclip.store.files import NO_FILE, Folder, check_name
from moclip.store.schema import FORMAT, FeatureSpec


def group_json(attributes: Mapping[str, Any]) -> bytes:
    """The ``zarr.json`` of a Zarr v3 group."""
    group = {"zarr_format": 3, "node_type": "group", "attributes": dict(attributes)}
    return json.dumps(group, indent=1, sort_keys=True).encode()


GROUP = group_json({})


def store_json(container: str) -> bytes:
    """The ``zarr.json`` at a store's root: what marks the folder as a store."""
    return group_json({"moclip": {"format": FORMAT, "container": container}})


def read_mark(folder: Folder) -> str:
    """The name of the store's container; raises unless ``folder`` is a store of a format that this version reads."""
    if not folder.exists("zarr.json"):
        hint = "it has no zarr.json" if folder.children() else "nothing is there"
        raise StoreNotFoundError(f"no moclip store at {folder} ({hint}); `moclip extract SOURCE STORE` makes one")
    mark = _attributes(folder, "").get("moclip")
    mark = mark if isinstance(mark, dict) else {}
    found = mark.get("format")
    if not isinstance(found, int) or found < 1:
        raise StoreFormatError(f"{folder} is a Zarr group but no moclip store: its attributes name no format")
    if found > FORMAT:
        raise StoreFormatError(f"{folder} has format {found}, this moclip reads up to {FORMAT}; upgrade moclip")
    container = mark.get("container")
    if container not in ("zarr", "hdf5"):
        raise StoreFormatError(f"{folder} keeps its rows in {container!r}; this moclip reads zarr and hdf5")
    return str(container)


def feature_json(spec: FeatureSpec) -> bytes:
    """The ``zarr.json`` of a feature."""
    return group_json({"moclip": {"specification": spec.to_json(), "digest": spec.digest}})


def feature_names(folder: Folder) -> list[str]:
    """The features of a store, in order."""
    names = [name for name in folder.children("features") if folder.exists(f"features/{name}/zarr.json")]
    return [check_name(name, "a feature") for name in names]


def read_feature(folder: Folder, name: str) -> FeatureSpec:
    """A feature's specification, checked against the digest beside it."""
    where = f"features/{name}"
    attributes = _attributes(folder, f"{where}/").get("moclip")
    if not isinstance(attributes, dict):
        raise StoreFormatError(f"{folder.at(where)} carries no feature specification")
    spec = FeatureSpec.from_json(attributes.get("specification"))
    if spec.digest != attributes.get("digest"):
        raise StoreFormatError(
            f"the specification of {folder.at(where)} does not match its digest: it was changed by hand"
        )
    return spec


def _attributes(folder: Folder, under: str) -> dict[str, Any]:
    """The attributes of the Zarr group in ``under``, which ends in ``/`` or is empty."""
    name = f"{under}zarr.json"
    try:
        attributes = json.loads(folder.read(name))["attributes"]
    except (*NO_FILE, ValueError, KeyError, TypeError, RecursionError) as error:
        raise StoreFormatError(f"{folder.at(name)} is not a Zarr group: {error}") from error
    if not isinstance(attributes, dict):
        raise StoreFormatError(f"{folder.at(name)} is not a Zarr group: its attributes are no mapping")
    return attributes
