"""How a run ended: what it did, and what the store now says of its videos."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

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


def summarise(store: Store, features: Sequence[str], ids: pa.ChunkedArray, done: Progress) -> Summary:
    """The summary of a run that did ``done``, over the entries of ``features`` and ``ids``."""
    entries = store.entries.select(["id", "feature", "status", "reason"])
    for name, values in (("feature", pa.array(features, pa.string())), ("id", ids.combine_chunks())):
        entries = entries.filter(pc.is_in(entries[name], value_set=values))
    ok, failures = Counter(dict.fromkeys(features, 0)), Counter[tuple[str, str]]()
    for row in entries.group_by(["feature", "status", "reason"]).aggregate([([], "count_all")]).to_pylist():
        if row["status"] == "ok":
            ok[row["feature"]] += row["count_all"]
        else:
            failures[row["feature"], row["reason"]] += row["count_all"]
    failed = entries.filter(pc.equal(entries["status"], "failed"))["id"].unique()
    return Summary(done.videos, done.frames, ok, failures, len(failed))
