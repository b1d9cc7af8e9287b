"""What a store holds, in numbers: what `moclip info` prints."""

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow.compute as pc

from moclip.store.reader import Store
from moclip.store.receipts import list_receipts
from moclip.store.schema import SPLIT_PREFIX, FeatureSpec
from moclip.store.tables import published_receipts


@dataclass(frozen=True)
class FeatureInfo:
    """One feature: ``rows`` is the number of rows of its ok entries, ``bytes`` what its files take on disk."""

    name: str
    digest: str
    specification: FeatureSpec
    ok: int
    rows: int
    bytes: int
    failures: dict[str, int]


@dataclass(frozen=True)
class StoreInfo:
    """A whole store. ``unpublished`` counts receipts that the tables do not hold yet (of a run that was killed)."""

    path: str
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
    unpublished = set(list_receipts(store.path)) - published_receipts(store.path)
    return StoreInfo(
        path=str(store.path),
        videos=len(videos),
        hours=_sum(videos["duration_s"]) / 3600,
        frames=int(_sum(videos["frames"])),
        corrupt_frames=int(_sum(videos["corrupt_frames"])),
        video_bytes=int(_sum(videos["bytes"])),
        features=tuple(_feature(store, name, spec) for name, spec in store.features.items()),
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


def _feature(store: Store, name: str, spec: FeatureSpec) -> FeatureInfo:
    entries = store.entries.filter(pc.equal(store.entries["feature"], name))
    ok = entries.filter(pc.equal(entries["status"], "ok"))
    failed = entries.filter(pc.equal(entries["status"], "failed"))
    folder = store.path / "features" / name
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    rows = int(_sum(ok["row_stop"]) - _sum(ok["row_start"]))
    return FeatureInfo(name, spec.digest, spec, len(ok), rows, size, _counts(failed["reason"]))


def _sum(column: Any) -> float:
    return float(pc.sum(column).as_py() or 0)


def _counts(column: Any) -> dict[str, int]:
    counted = Counter(value for value in column.to_pylist() if value is not None)
    return dict(sorted(counted.items()))
