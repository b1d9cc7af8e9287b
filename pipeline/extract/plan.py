"""What is missing from a store, packed into shards."""

import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import pyarrow.compute as pc

from moclip.pipeline.extract.sources import VideoSource, file_size
from moclip.pipeline.extract.tasks import ShardTask, Video
from moclip.store import fold_store, is_store

#: A shard holds at most so many videos, and stops growing at so many bytes of them: a bound on what a killed
#: task costs. Bytes stand for frames, which only decoding tells.
SHARD_VIDEOS = 64
SHARD_BYTES = 512 * 2**20
#: Small corpora are cut finer, so that every worker has several shards and progress is seen.
SHARDS_A_WORKER = 4


@dataclass(frozen=True)
class Plan:
    """The tasks to run, and what was left out of them: ids that are done, failed before, or changed on disk."""

    tasks: tuple[ShardTask[VideoSource], ...]
    done: int
    failed_before: tuple[str, ...]
    changed: tuple[str, ...]

    @property
    def videos(self) -> int:
        return sum(len(task.videos) for task in self.tasks)


def make_plan(
    store: str | Path,
    sources: Sequence[VideoSource],
    features: Sequence[str],
    *,
    workers: int,
    retry_failed: bool = False,
    replace_changed: bool = False,
) -> Plan:
    """Plan the sources that lack an ok entry of one of ``features``.

    Read from the receipts, not from the tables: a run that was killed before it published still counts.
    """
    status, sizes = _known(store)
    held: dict[str, set[str]] = defaultdict(set)
    for (video_id, feature), state in status.items():
        if state == "ok":
            held[video_id].add(feature)
    missing: dict[str, tuple[str, ...]] = {}
    done, failed_before, changed = 0, [], []
    for source in sources:
        found = {name: status.get((source.id, name)) for name in features}
        if _differs(source, sizes):
            # Rows of two files must not mix under one id: all features of it are made again, or none.
            if replace_changed and held[source.id] <= set(features):
                missing[source.id] = tuple(features)
            else:
                changed.append(source.id)
            continue
        lacking = [name for name, state in found.items() if state is None or (state == "failed" and retry_failed)]
        if "failed" in found.values() and not retry_failed:
            failed_before.append(source.id)
        if lacking:
            missing[source.id] = tuple(lacking)
        elif "failed" not in found.values():
            done += 1
    tasks = _pack([source for source in sources if source.id in missing], missing, workers)
    return Plan(tuple(tasks), done, tuple(failed_before), tuple(changed))


def _known(store: str | Path) -> tuple[dict[tuple[str, str], str], dict[str, int | None]]:
    """The status of every (id, feature), and the size of each video that was extracted."""
    if not is_store(store):
        return {}, {}
    folded = fold_store(store)
    videos, entries = folded.videos, folded.entries
    keys = zip(entries["id"].to_pylist(), entries["feature"].to_pylist(), strict=True)
    status = dict(zip(keys, entries["status"].to_pylist(), strict=True))
    hashed = videos.filter(pc.is_valid(videos["content_hash"]))
    return status, dict(zip(hashed["id"].to_pylist(), hashed["bytes"].to_pylist(), strict=True))


def _differs(source: VideoSource, sizes: Mapping[str, int | None]) -> bool:
    now = file_size(source.path)
    return now is not None and source.id in sizes and sizes[source.id] != now


def _pack(
    sources: Sequence[VideoSource], missing: Mapping[str, tuple[str, ...]], workers: int
) -> Iterator[ShardTask[VideoSource]]:
    """Runs of sources, in id order, that lack the same features; no more than a shard's bounds each."""
    most = videos_a_shard(len(sources), workers)
    number = itertools.count()
    by_features = sorted(sources, key=lambda source: (missing[source.id], source.id))
    for features, group in groupby(by_features, key=lambda source: missing[source.id]):
        members = list(group)
        sizes = [file_size(source.path) or 0 for source in members]
        for videos in cut(members, sizes, most=most, most_size=SHARD_BYTES):
            yield ShardTask(next(number), videos, features)


def videos_a_shard(videos: int, workers: int) -> int:
    """How many videos a shard may hold, where there are so many to do."""
    return min(SHARD_VIDEOS, max(1, -(-videos // (workers * SHARDS_A_WORKER))))


def cut(videos: Sequence[Video], sizes: Sequence[int], *, most: int, most_size: int) -> Iterator[tuple[Video, ...]]:
    """Runs of videos, in order: at most ``most`` each, and none grows on once its sizes add up to ``most_size``."""
    run: list[Video] = []
    total = 0
    for video, size in zip(videos, sizes, strict=True):
        if run and (len(run) == most or total >= most_size):
            yield tuple(run)
            run, total = [], 0
        run.append(video)
        total += size
    if run:
        yield tuple(run)
