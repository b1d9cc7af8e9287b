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
    try:
        data = folder.read("zarr.json")
    except NO_FILE as error:
        hint = "it has no zarr.json" if folder.children() else "nothing is there"
        raise StoreNotFoundError(
            f"no moclip store at {folder} ({hint}); `moclip extract SOURCE STORE` makes one"
        ) from error
    mark = _attributes(folder.at("zarr.json"), data).get("moclip")
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


def feature_files(folder: Folder) -> dict[str, bytes]:
    """The ``zarr.json`` of each feature of a store, by the feature's name, in order."""
    found: dict[str, bytes] = {}
    for name in folder.children("features"):
        if name == "zarr.json":  # the group of all features
            continue
        try:
            data = folder.read(f"features/{name}/zarr.json")
        except NO_FILE:
            continue
        found[check_name(name, "a feature")] = data
    return found


def feature_names(folder: Folder) -> list[str]:
    """The features of a store, in order."""
    return list(feature_files(folder))


def read_features(folder: Folder) -> dict[str, FeatureSpec]:
    """The specification of each feature of a store, by name, in order."""
    return {name: _specification(folder.at(f"features/{name}"), data) for name, data in feature_files(folder).items()}


def read_feature(folder: Folder, name: str) -> FeatureSpec:
    """A feature's specification, checked against the digest beside it."""
    where = f"features/{name}"
    try:
        return _specification(folder.at(where), folder.read(f"{where}/zarr.json"))
    except NO_FILE as error:
        raise StoreFormatError(f"{folder.at(where)} is not a Zarr group: {error}") from error


def _specification(where: str, data: bytes) -> FeatureSpec:
    attributes = _attributes(f"{where}/zarr.json", data).get("moclip")
    if not isinstance(attributes, dict):
        raise StoreFormatError(f"{where} carries no feature specification")
    spec = FeatureSpec.from_json(attributes.get("specification"))
    if spec.digest != attributes.get("digest"):
        raise StoreFormatError(f"the specification of {where} does not match its digest: it was changed by hand")
    return spec


def _attributes(where: str, data: bytes) -> dict[str, Any]:
    """The attributes in a Zarr group's ``zarr.json``, which lies at ``where``."""
    try:
        attributes = json.loads(data)["attributes"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise StoreFormatError(f"{where} is not a Zarr group: {error}") from error
    if not isinstance(attributes, dict):
        raise StoreFormatError(f"{where} is not a Zarr group: its attributes are no mapping")
    return attributes
