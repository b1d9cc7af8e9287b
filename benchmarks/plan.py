"""What comes before and after the work, at the size of a million videos: listing, planning, publishing, scheduling.

    python benchmarks/plan.py [--only lists,store,tree,shards] [--videos 1000000] [--folder DIR]

    lists    a .txt, .csv and .parquet list into a store that is not there yet (target 60 s, 1 GB)
    store    the same .csv list into a generated store that has all but 1 % of it: published, and not (target 60 s,
             1 GB); publishing it; the labels of a list
    tree     a folder of class folders with a tenth as many empty files
    shards   10,000 tasks that do nothing, on two workers (target 50 ms a shard)

The listed files do not exist: each costs one failed stat, as a missing video does. Every measurement is a process of
its own, which this module is as well.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from catalogue import SHARD_VIDEOS, Clock, Corpus, shard_name

from moclip.pipeline.extract import schedule
from moclip.pipeline.extract.cluster import Cluster
from moclip.pipeline.extract.labelling import label_new
from moclip.pipeline.extract.plan import make_plan
from moclip.pipeline.extract.sources import list_sources
from moclip.pipeline.extract.tasks import Progress, Report, ShardTask
from moclip.store import Entry, FeatureSpec, Receipt, add_feature, create_store, open_folder, publish, write_receipt

FEATURES = ("embedding", "motion", "motion-accumulated")
SPEC = FeatureSpec("motion", "int16", "quarter pixels", {"version": 1, "cell": 8}, {"pts_seconds": "float64"}, ("d",))
SHARDS = 10_000


def lists(videos: int, folder: Path) -> None:
    write_lists(folder, Corpus(videos))
    for kind in ("txt", "csv", "parquet"):
        tell(f"list and plan a .{kind}", measure("plan", folder / f"list.{kind}", folder / "none.zarr"), "60 s, 1 GB")


def store(videos: int, folder: Path) -> None:
    url = folder / "store.zarr"
    write_lists(folder, Corpus(videos))
    if not url.exists():
        write_store(url, Corpus(videos), videos - videos // 100)
    tell("plan the last 1 %, not published", measure("plan", folder / "list.csv", url), "60 s, 1 GB")
    tell("publish", measure("publish", url))
    tell("plan the last 1 %, published", measure("plan", folder / "list.csv", url), "60 s, 1 GB")
    tell("label", measure("label", folder / "list.csv", url))


def tree(videos: int, folder: Path) -> None:
    root, corpus = folder / "tree", Corpus(videos)
    for number in range(0 if root.exists() else videos // 10):
        path = root / f"{corpus.id(number * 10)}.avi"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    tell(f"list and plan a tree of {videos // 10:,}", measure("plan", root, folder / "none.zarr"))


def shards(_: int, folder: Path) -> None:
    found = measure("shards", folder)
    tell(f"{SHARDS:,} tasks that do nothing", found)
    print(f"  {1e3 * found['seconds']['all'] / SHARDS:.2f} ms a shard (target 50)")


def write_lists(folder: Path, corpus: Corpus) -> None:
    """The same sources as each kind of list."""
    if (folder / "list.parquet").exists():
        return
    ids = [corpus.id(number) for number in range(corpus.count)]
    labels = [corpus.label(number) for number in range(corpus.count)]
    with open(folder / "list.txt", "w") as text, open(folder / "list.csv", "w") as table:
        table.write("path,label,split_1,rating\n")
        for number, (name, label) in enumerate(zip(ids, labels, strict=True)):
            text.write(f"videos/{name}.avi\t{label}\n")
            table.write(f"videos/{name}.avi,{label},{('train', 'test')[number % 10 == 0]},{number % 7}\n")
    paths = [f"videos/{name}.avi" for name in ids]
    pq.write_table(pa.table({"path": paths, "label": labels}), folder / "list.parquet")


def write_store(url: Path, corpus: Corpus, count: int) -> None:
    """A store of the receipts of ``count`` of the listed videos, and no arrays; nothing is published."""
    create_store(url)
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        for feature in FEATURES:
            add_feature(url, feature, SPEC)
            numbers = range(-(-count // SHARD_VIDEOS))
            list(pool.map(partial(write_one, url, feature, Corpus(corpus.count), count), numbers, chunksize=200))


def write_one(url: Path, feature: str, corpus: Corpus, count: int, shard: int) -> None:
    name = shard_name(shard)
    place = f"features/{feature}/{name}/30x40"
    files = {f"{place}/{part}": {"bytes": 4321, "sha256": "0123456789abcdef" * 4} for part in PARTS}
    numbers = range(shard * SHARD_VIDEOS, min((shard + 1) * SHARD_VIDEOS, count))
    videos = tuple(_videos(corpus, numbers))
    write_receipt(open_folder(url), Receipt(feature, name, SPEC, 10**18 + shard, {"av": "14.0.1"}, files, videos))


PARTS = ("zarr.json", *(f"{a}/{part}" for a in ("value", "pts_seconds") for part in ("zarr.json", "c/0/0/0/0")))


def _videos(corpus: Corpus, numbers: range) -> Iterator[Any]:
    for k, number in enumerate(numbers):
        facts = corpus.facts(number, 100 + number * 31 % 200)
        facts = type(facts)(**{**vars(facts), "id": f"videos/{facts.id}", "extra": {"rating": number % 7}})
        if number % 1000 == 7:
            yield facts, Entry("failed", "truncated", "the file ends within a frame")
        else:
            yield facts, Entry("ok", None, None, "30x40", k * 100, k * 100 + 100, number.to_bytes(16, "little"))


def measure(*command: Any) -> dict[str, Any]:
    """What one of this module's commands prints, run in a process of its own."""
    words = [sys.executable, __file__, "--measure", *map(str, command)]
    before = os.times()
    found: dict[str, Any] = json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE).stdout)
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {**found, "cpu": cpu}


def tell(what: str, found: dict[str, Any], target: str = "") -> None:
    steps = ", ".join(f"{name} {seconds:.2f}" for name, seconds in found["seconds"].items())
    total, target = sum(found["seconds"].values()), f" (target {target})" if target else ""
    peak, cpu = found["peak_gb"], found["cpu"]
    print(f"  {what:36} {total:7.2f} s ({cpu:.1f} s of CPU), {peak:.2f} GB at most{target}   {steps}", flush=True)


def measure_plan(source: str, store: str) -> dict[str, Any]:
    clock = Clock()
    sources = list_sources(source)
    clock.lap("list")
    plan = make_plan(store, sources.videos, FEATURES, workers=2)
    clock.lap("plan")
    assert sum(len(task.videos) for task in plan.tasks) == plan.videos
    return clock.report(f"{len(plan.tasks)} tasks of {plan.videos} videos")


def measure_publish(store: str) -> dict[str, Any]:
    clock = Clock()
    publish(store)
    return clock.report("publish")


def measure_label(source: str, store: str) -> dict[str, Any]:
    clock = Clock()
    sources = list_sources(source)
    clock.lap("list")
    label_new(store, sources.videos, sources.classes, explicit=False)
    return clock.report("label")


class Nothing:
    """Work that is done at once."""

    def run(self, task: ShardTask[Any], report: Report) -> Progress:
        done = Progress(task.number, len(task.videos))
        report(done)
        return done

    def give_up(self, task: ShardTask[Any], reason: str, detail: str) -> Progress:
        raise AssertionError((task, reason, detail))


def measure_shards(folder: str) -> dict[str, Any]:
    corpus = Corpus(SHARDS * SHARD_VIDEOS)
    Path(folder, "shards.txt").write_text("".join(f"{corpus.id(k)}.avi\n" for k in range(corpus.count)))
    sources = list_sources(Path(folder, "shards.txt"))
    plan = make_plan(Path(folder, "none.zarr"), sources.videos, FEATURES, workers=2)
    assert len(plan.tasks) == SHARDS
    clock = Clock()
    schedule.run_tasks(Cluster(2, 1), plan.tasks, Nothing(), lambda _: None)
    return clock.report("all")


SECTIONS: dict[str, Callable[[int, Path], None]] = {"lists": lists, "store": store, "tree": tree, "shards": shards}
MEASURES = {"plan": measure_plan, "publish": measure_publish, "label": measure_label, "shards": measure_shards}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, with commas between them")
    parser.add_argument("--videos", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="where lists and store are kept for the next run, if anywhere")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        json.dump(MEASURES[given.measure[0]](*given.measure[1:]), sys.stdout)
        return
    with tempfile.TemporaryDirectory() as temporary:
        for name in given.only.split(","):
            print(f"{name}:")
            SECTIONS[name](given.videos, given.folder or Path(temporary))


if __name__ == "__main__":
    main()
