"""How a run ended: what it did, and what the store now says of its videos."""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from moclip.pipeline.extract.tasks import Progress
from moclip.store import Store


@dataclass(frozen=True)
class Summary:
    """What this run did (``videos``, ``frames``), and all entries of its videos, whenever they were made.

    ``ok_by_feature`` counts the ok entries, ``failures`` the failed ones by (feature, reason).
    """

    videos: int
    frames: int
    ok_by_feature: Counter[str]
    failures: Counter[tuple[str, str]]
    failed_videos: int

    @property
    def ok(self) -> int:
        return self.ok_by_feature.total()


def summarise(store: Store, features: Collection[str], ids: Collection[str], done: Progress) -> Summary:
    """The summary of a run that did ``done``, over the entries of ``features`` and ``ids``."""
    failures: Counter[tuple[str, str]] = Counter()
    failed: set[str] = set()
    ok = Counter(dict.fromkeys(features, 0))
    for row in store.entries.select(["id", "feature", "status", "reason"]).to_pylist():
        if row["id"] in ids and row["feature"] in features:
            if row["status"] == "ok":
                ok[row["feature"]] += 1
            else:
                failures[row["feature"], row["reason"]] += 1
                failed.add(row["id"])
    return Summary(done.videos, done.frames, ok, failures, len(failed))
