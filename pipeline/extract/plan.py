"""What is missing from a store, packed into shards."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from moclip.pipeline.extract.sources import Sources, VideoSource, file_size
from moclip.pipeline.extract.tasks import ShardTask, Video
from moclip.store import FoldReport, is_store, settled
from moclip.store.schema import empty_entries, empty_videos

#: A shard holds at most so many videos, and stops growing at so many bytes of them: a bound on what a killed
#: task costs. Bytes stand for frames, which only decoding tells.
SHARD_VIDEOS = 64
SHARD_BYTES = 512 * 2**20
#: Small corpora are cut finer, so that every worker has several shards and progress is seen.
SHARDS_A_WORKER = 4
#: The sizes of files on a network are asked for side by side, so many files a turn.
_ASKERS = 16
_FILES_A_TURN = 4096

_Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Tasks(Sequence[ShardTask[Video]]):
    """Tasks, each made when it is asked for: the runs of ``videos``, and the features that each run lacks."""

    videos: Sequence[Video]
    runs: tuple[tuple[slice, tuple[str, ...]], ...]

    def __repr__(self) -> str:
        return f"Tasks({len(self.runs)} of {len(self.videos)} videos)"

    def __len__(self) -> int:
        return len(self.runs)

    def __getitem__(self, number: Any) -> Any:
        run: slice
        run, features = self.runs[number]
        return ShardTask(number, tuple(self.videos[run]), features)


@dataclass(frozen=True)
class Plan:
    """The tasks to run, and what was left out of them: ids that are done, failed before, or changed on disk."""

    tasks: Tasks[VideoSource]
    done: int
    failed_before: tuple[str, ...]
    changed: tuple[str, ...]

    @property
    def videos(self) -> int:
        return len(self.tasks.videos)


def make_plan(
    store: str | Path,
    sources: Sources,
    features: Sequence[str],
    *,
    workers: int,
    retry_failed: bool = False,
    replace_changed: bool = False,
    report: FoldReport = lambda *_: None,
) -> Plan:
    """Plan the sources that lack an ok entry of one of ``features``.

    Read from the receipts, not from the tables: a run that was killed before it published still counts.
    """
    extracted, entries = _known(store, report)
    ids, sizes = sources.ids.combine_chunks(), _file_sizes(sources.table["path"])
    missing, failed = zip(*(_missing_and_failed(entries, name, ids) for name in features), strict=True)
    any_failed = np.any(failed, axis=0)
    changed = _of_other_size(extracted, ids, sizes)
    # Rows of two files must not mix under one id: all features of it are made again, or none.
    anew = changed & ~_with_others(entries, features, ids) & replace_changed
    lacking = [anew | (~changed & (none | (bad & retry_failed))) for none, bad in zip(missing, failed, strict=True)]
    todo = np.any(lacking, axis=0)
    return Plan(
        tasks=_pack(sources, sizes, dict(zip(features, lacking, strict=True)), workers),
        done=int(np.sum(~changed & ~todo & ~any_failed)),
        failed_before=() if retry_failed else _chosen(ids, ~changed & any_failed),
        changed=_chosen(ids, changed & ~anew),
    )


def _known(store: str | Path, report: FoldReport) -> tuple[pa.Table, pa.Table]:
    """The videos that were extracted, with their sizes, and the status of every (id, feature)."""
    if not is_store(store):
        return empty_videos(), empty_entries()
    videos, entries = settled(store, ("id", "feature", "status", "bytes", "content_hash"), report)
    sizes = videos.filter(pc.is_valid(videos["content_hash"])).select(["id", "bytes"])
    pa.default_memory_pool().release_unused()  # several times what is kept
    return sizes, entries


def _file_sizes(paths: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    """The size of each file in bytes, -1 where it cannot be told. Each file is asked for once."""
    turns = [paths.slice(start, _FILES_A_TURN) for start in range(0, len(paths), _FILES_A_TURN)]
    with ThreadPoolExecutor(_ASKERS) as pool:
        return np.concatenate([np.zeros(0, np.int64), *pool.map(_sizes_of, turns)])


def _sizes_of(paths: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    sizes = (file_size(path) for path in paths.to_pylist())
    return np.array([-1 if size is None else size for size in sizes], np.int64)


def _missing_and_failed(entries: pa.Table, feature: str, ids: pa.Array) -> tuple[_Mask, _Mask]:
    """Which of ``ids`` have no entry of the feature, and which have a failed one."""
    mine = entries.filter(pc.equal(entries["feature"], feature))
    bad = mine.filter(pc.equal(mine["status"], "failed"))
    return ~_among(ids, mine), _among(ids, bad)


def _with_others(entries: pa.Table, features: Sequence[str], ids: pa.Array) -> _Mask:
    """Which of ``ids`` have an ok entry of another feature than these."""
    others = entries.filter(pc.invert(pc.is_in(entries["feature"], value_set=pa.array(features, pa.string()))))
    return _among(ids, others.filter(pc.equal(others["status"], "ok")))


def _of_other_size(videos: pa.Table, ids: pa.Array, sizes: npt.NDArray[np.int64]) -> _Mask:
    """Which of ``ids`` were extracted from a file of another size than it has now, as far as that can be told."""
    at = pc.index_in(ids, value_set=videos["id"].combine_chunks())
    before = pc.fill_null(videos["bytes"].combine_chunks(), -1).take(at)
    differs: _Mask = (sizes >= 0) & pc.fill_null(pc.not_equal(before, pa.array(sizes)), False).to_numpy(False)
    return differs


def _among(ids: pa.Array, rows: pa.Table) -> _Mask:
    found: _Mask = pc.is_in(ids, value_set=rows["id"].combine_chunks()).to_numpy(False)
    return found


def _chosen(ids: pa.Array, mask: _Mask) -> tuple[str, ...]:
    return tuple(ids.filter(pa.array(mask)).to_pylist())


def _pack(
    sources: Sources, sizes: npt.NDArray[np.int64], lacking: Mapping[str, _Mask], workers: int
) -> Tasks[VideoSource]:
    """Runs of sources, in id order, that lack the same features; no more than a shard's bounds each."""
    code = sum(mask.astype(np.int64) << bit for bit, mask in enumerate(lacking.values()))
    names = {c: tuple(n for bit, n in enumerate(lacking) if c >> bit & 1) for c in np.unique(code).tolist() if c}
    groups = {features: np.flatnonzero(code == c) for c, features in sorted(names.items(), key=itemgetter(1))}
    rows = np.concatenate([np.zeros(0, np.int64), *groups.values()])
    most = videos_a_shard(len(rows), workers)
    runs, start = [], 0
    for features, members in groups.items():
        for run in cut(np.maximum(sizes[members], 0).tolist(), most=most, most_size=SHARD_BYTES):
            runs.append((slice(start + run.start, start + run.stop), features))
        start += len(members)
    todo = sources if len(rows) == len(sources) and len(groups) == 1 else Sources(sources.table.take(pa.array(rows)))
    return Tasks(todo, tuple(runs))


def videos_a_shard(videos: int, workers: int) -> int:
    """How many videos a shard may hold, where there are so many to do."""
    return min(SHARD_VIDEOS, max(1, -(-videos // (workers * SHARDS_A_WORKER))))


def cut(sizes: Sequence[int], *, most: int, most_size: int) -> Iterator[slice]:
    """Runs of videos, in order: at most ``most`` each, and none grows on once its sizes add up to ``most_size``."""
    start = total = 0
    for at, size in enumerate(sizes):
        if at > start and (at - start == most or total >= most_size):
            yield slice(start, at)
            start, total = at, 0
        total += size
    if sizes:
        yield slice(start, len(sizes))
