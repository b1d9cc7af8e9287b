"""What a store holds, in numbers: what `moclip info` prints."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from operator import itemgetter
from typing import Any

import pyarrow.compute as pc

from moclip.store.files import open_folder
from moclip.store.reader import Store
from moclip.store.receipts import list_receipts
from moclip.store.schema import SPLIT_PREFIX, FeatureSpec
from moclip.store.tables import read_catalogue


@dataclass(frozen=True)
class FeatureInfo:
    """One feature: ``rows`` is the number of rows of its ok entries, ``bytes`` what its shards' files take.

    ``motion_sources`` counts where the ok entries' vectors came from; it is empty for what is not motion. ``versions``
    are those of the libraries that made the rows.
    """

    name: str
    digest: str
    specification: FeatureSpec
    ok: int
    rows: int
    bytes: int
    failures: dict[str, int]
    motion_sources: dict[str, int]
    versions: dict[str, list[str]]


@dataclass(frozen=True)
class StoreInfo:
    """A whole store. ``unpublished`` counts receipts that the tables do not hold yet (of a run that was killed)."""

    url: str
    container: str
    videos: int
    hours: float
    frames: int
    corrupt_frames: int
    video_bytes: int
    features: tuple[FeatureInfo, ...]
    labels: dict[str, int]
    splits: dict[str, dict[str, int]]
    unpublished: int

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; a feature's specification as the store writes it."""
        features = [{**asdict(f), "specification": f.specification.to_json()} for f in self.features]
        return {**asdict(self), "features": features}


def describe(store: Store) -> StoreInfo:
    """Add up a store's tables; no array is opened."""
    videos = store.videos
    folder = open_folder(store.url)
    catalogue = read_catalogue(folder)
    unpublished = set(list_receipts(folder)) - catalogue["receipts"].keys()
    return StoreInfo(
        url=store.url,
        container=store.container,
        videos=len(videos),
        hours=_sum(videos["duration_s"]) / 3600,
        frames=int(_sum(videos["frames"])),
        corrupt_frames=int(_sum(videos["corrupt_frames"])),
        video_bytes=int(_sum(videos["bytes"])),
        features=tuple(_feature(store, name, spec, catalogue) for name, spec in store.features.items()),
        labels=_counts(store.labels["label"]),
        splits={
            name.removeprefix(SPLIT_PREFIX): _counts(store.labels[name])
            for name in store.labels.column_names
            if name.startswith(SPLIT_PREFIX)
        },
        unpublished=len(unpublished),
    )


def failed_entries(store: Store) -> list[dict[str, Any]]:
    """Every failed entry: id, feature, reason, detail."""
    failed = store.entries.filter(pc.equal(store.entries["status"], "failed"))
    rows: list[dict[str, Any]] = failed.select(["id", "feature", "reason", "detail"]).to_pylist()
    return rows


def _feature(store: Store, name: str, spec: FeatureSpec, catalogue: Mapping[str, Any]) -> FeatureInfo:
    entries = store.entries.filter(pc.equal(store.entries["feature"], name))
    ok = entries.filter(pc.equal(entries["status"], "ok"))
    failed = entries.filter(pc.equal(entries["status"], "failed"))
    size = sum(about["stored"] for path, about in catalogue["receipts"].items() if path.startswith(f"receipts/{name}/"))
    versions = dict(catalogue["versions"].get(name, {}))
    rows = int(_sum(ok["row_stop"]) - _sum(ok["row_start"]))
    return FeatureInfo(
        name=name,
        digest=spec.digest,
        specification=spec,
        ok=len(ok),
        rows=rows,
        bytes=size,
        failures=_counts(failed["reason"]),
        motion_sources=_counts(ok["motion_source"]),
        versions=versions,
    )


def _sum(column: Any) -> float:
    return float(pc.sum(column).as_py() or 0)


def _counts(column: Any) -> dict[str, int]:
    counted = pc.value_counts(column.drop_null()).to_pylist()
    return {item["values"]: item["counts"] for item in sorted(counted, key=itemgetter("values"))}
