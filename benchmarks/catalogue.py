"""A generated store of a million videos: what opening, describing and filtering it costs.

Each of its shards of 64 videos has a real receipt and files of the usual names; the arrays of the first 1,024 videos,
all of one label, are real too, and are also a store of their own to compare with. Every measurement is a process of
its own, which this module is as well:

    python benchmarks/catalogue.py publish|open|gather STORE …
"""

import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from moclip.store import (
    Entry,
    Receipt,
    ShardWriter,
    SourceFacts,
    Store,
    add_feature,
    create_store,
    open_folder,
    open_store,
    publish,
    write_labels,
    write_receipt,
)

SHARD_VIDEOS = 64
REAL_VIDEOS = 16 * SHARD_VIDEOS
REAL_ROWS = 48
CLASSES = [f"class_{number:03d}" for number in range(400)]
ROWS_A_GATHER = 1_500


@dataclass(frozen=True)
class Corpus:
    """``count`` videos. Those with arrays come first and are all of the first class; the others share the rest."""

    count: int

    def label(self, number: int) -> str:
        if number < REAL_VIDEOS:
            return CLASSES[0]
        return CLASSES[1 + (number - REAL_VIDEOS) * (len(CLASSES) - 1) // (self.count - REAL_VIDEOS)]

    def id(self, number: int) -> str:
        label = self.label(number)
        return f"{label}/v_{label}_g{number // 4 % 25:02d}_c{number:07d}"

    def facts(self, number: int, frames: int) -> SourceFacts:
        name = self.id(number)
        return SourceFacts(
            id=name,
            path=f"{name}.avi",
            bytes=100_000 + number * 7919 % 900_000,
            content_hash=hashlib.sha256(name.encode()).hexdigest(),
            codec="mpeg4",
            width=320,
            height=240,
            fps=30_000 / 1001,
            frames=frames,
            duration_s=frames * 1001 / 30_000,
            corrupt_frames=0,
        )

    def labels(self) -> pa.Table:
        numbers = range(self.count)
        columns = {
            "id": [self.id(number) for number in numbers],
            "label": [self.label(number) for number in numbers],
            "group": [f"g{number // 4 % 25:02d}" for number in numbers],
            "split_1": ["test" if number % 100 < 30 else "train" for number in numbers],
        }
        return pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})


def run(source: Store, folder: Path, count: int, rounds: int) -> None:
    """Make the two stores and print what each step costs."""
    names = [source.resolve(name) for name in ("motion", "embedding")]
    big, small = folder / "big.zarr", folder / "small.zarr"
    print(f"making a store of {count:,} videos; a million take some minutes", flush=True)
    started = time.perf_counter()
    write_real(source, small, names, Corpus(REAL_VIDEOS))
    publish(small)
    write_labels(small, Corpus(REAL_VIDEOS).labels(), CLASSES)
    templates = write_real(source, big, names, Corpus(count))
    write_catalogue_shards(big, templates, Corpus(count))
    receipts = 2 * -(-count // SHARD_VIDEOS)
    print(f"{count:,} videos, {' and '.join(names)}, {receipts:,} receipts in {time.perf_counter() - started:.0f} s:")
    tell("publish", measure("publish", big))
    started = time.perf_counter()
    write_labels(big, Corpus(count).labels(), CLASSES)
    print(f"  write labels{'':20} {time.perf_counter() - started:7.2f} s")
    tell("open, videos, ids, labels", measure("open", big, names[0]), "(target 3 s, 1 GB)")
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "moclip.cli", "info", str(big)], check=True, stdout=subprocess.DEVNULL)
    print(f"  moclip info{'':21} {time.perf_counter() - started:7.2f} s (target 5 s)")
    found = measure("gather", big, small, names[0], rounds)
    print(
        f"  {ROWS_A_GATHER:,} rows of the {REAL_VIDEOS:,} videos of one label: {found['gather']['big']:.3f} s, "
        f"in a store of those alone {found['gather']['small']:.3f} s: {found['ratio']:.2f} x (target about 1)"
    )
    print(f"  finding them by label: {found['filter']['big']:.3f} s and {found['filter']['small']:.3f} s")
    print(f"  the first time, with the tables: {found['first']['big']:.2f} s and {found['first']['small']:.2f} s")


def write_real(source: Store, url: Path, names: Sequence[str], corpus: Corpus) -> dict[str, Receipt]:
    """The real shards of each feature, with rows of the source's videos in turn; a receipt of each, as a pattern."""
    create_store(url, container=source.container)
    ids = sorted(set.intersection(*(set(source.ids(name)) for name in names)))
    receipts = {}
    for name in names:
        spec = source.features[name]
        add_feature(url, name, spec)
        columns = {column: source.read_all(name, ids, column) for column in ("value", *spec.columns)}
        for shard in range(REAL_VIDEOS // SHARD_VIDEOS):
            writer = ShardWriter(url, feature=name, spec=spec, shard=shard_name(shard))
            for number in range(shard * SHARD_VIDEOS, (shard + 1) * SHARD_VIDEOS):
                rows = {column: parts[number % len(ids)][:REAL_ROWS] for column, parts in columns.items()}
                writer.append(rows.pop("value"), **rows)
                writer.ok(corpus.facts(number, REAL_ROWS))
            receipts[name] = writer.finish()
    return receipts


def shard_name(shard: int) -> str:
    return f"{hashlib.sha256(str(shard).encode()).hexdigest()[:12]}-{shard:08x}"


def write_catalogue_shards(url: Path, templates: dict[str, Receipt], corpus: Corpus) -> None:
    """Every further shard's receipt and empty files, by a few processes."""
    shards = range(REAL_VIDEOS // SHARD_VIDEOS, -(-corpus.count // SHARD_VIDEOS))
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        for receipt in templates.values():
            list(pool.map(partial(write_catalogue_shard, url, receipt, corpus), shards, chunksize=200))


def write_catalogue_shard(url: Path, template: Receipt, corpus: Corpus, shard: int) -> None:
    name = shard_name(shard)
    files = {path.replace(template.shard, name): about for path, about in template.files.items()}
    for path in files:
        (url / path).parent.mkdir(parents=True, exist_ok=True)
        (url / path).touch()
    numbers = range(shard * SHARD_VIDEOS, min((shard + 1) * SHARD_VIDEOS, corpus.count))
    videos = tuple(_videos(template, corpus, numbers))
    write_receipt(open_folder(url), replace(template, shard=name, files=files, videos=videos))


def _videos(template: Receipt, corpus: Corpus, numbers: Sequence[int]) -> Any:
    rng = np.random.default_rng(numbers[0])
    one_row = template.videos[0][1].row_stop == 1
    start = 0
    for number in numbers:
        frames = 100 + number * 31 % 200
        stop = start + (1 if one_row else frames)
        entry = Entry("ok", None, None, template.videos[0][1].array, start, stop, rng.bytes(16))
        yield corpus.facts(number, frames), entry
        start = stop


def measure(*command: Any) -> dict[str, Any]:
    """What one of this module's commands prints, run in a process of its own."""
    words = [sys.executable, __file__, *map(str, command)]
    found: dict[str, Any] = json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE).stdout)
    return found


def tell(what: str, found: dict[str, Any], target: str = "") -> None:
    steps = ", ".join(f"{name} {seconds:.2f}" for name, seconds in found["seconds"].items())
    total = sum(found["seconds"].values())
    print(f"  {what:32} {total:7.2f} s, {found['peak_gb']:.2f} GB at most {target}   {steps}")


def measure_publish(url: str) -> dict[str, Any]:
    clock = Clock()
    publish(url)
    return clock.report("publish")


def measure_open(url: str, feature: str) -> dict[str, Any]:
    clock = Clock()
    store = open_store(url)
    clock.lap("open_store")
    assert len(store.videos)
    clock.lap("videos")
    assert len(store.ids(feature))
    clock.lap("ids")
    assert len(store.labels)
    return clock.report("labels")


def measure_gather(big: str, small: str, feature: str, rounds: str) -> dict[str, Any]:
    """Seconds of finding a label's videos and of gathering from them, in both stores in turn, after a warm-up."""
    stores = {"big": open_store(big), "small": open_store(small)}
    rng = np.random.default_rng(0)
    found = []
    for number in range(int(rounds) + 1):
        chosen, frames = rng.integers(REAL_VIDEOS, size=ROWS_A_GATHER), rng.integers(REAL_ROWS, size=ROWS_A_GATHER)
        order = ("big", "small") if number % 2 else ("small", "big")
        got = {name: filtered_gather(stores[name], feature, chosen, frames) for name in order}
        assert np.array_equal(got["big"][0], got["small"][0])
        found.append({name: seconds for name, (_, seconds) in got.items()})
    first, *rest = found
    return {
        "first": {name: sum(first[name].values()) for name in stores},
        "ratio": statistics.median(seconds["big"]["gather"] / seconds["small"]["gather"] for seconds in rest),
        **{
            step: {name: statistics.median(seconds[name][step] for seconds in rest) for name in stores}
            for step in ("filter", "gather")
        },
    }


def filtered_gather(store: Store, feature: str, chosen: Any, frames: Any) -> tuple[Any, dict[str, float]]:
    clock = Clock()
    ids = np.array(store.labels.filter(pc.equal(store.labels["label"], CLASSES[0]))["id"].to_pylist(), object)
    assert len(ids) == REAL_VIDEOS
    clock.lap("filter")
    rows = store.gather(feature, ids[chosen].tolist(), frames)
    clock.lap("gather")
    return rows, clock.seconds


class Clock:
    """Seconds of consecutive steps, and the most memory this process has held."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, step: str) -> None:
        now = time.perf_counter()
        self.seconds[step] = now - self._last
        self._last = now

    def report(self, step: str) -> dict[str, Any]:
        self.lap(step)
        # Not ru_maxrss: a child begins with its parent's.
        status = Path("/proc/self/status").read_text()
        peak_kb = int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
        return {"seconds": self.seconds, "peak_gb": peak_kb * 1024 / 1e9}


COMMANDS = {"publish": measure_publish, "open": measure_open, "gather": measure_gather}

if __name__ == "__main__":
    json.dump(COMMANDS[sys.argv[1]](*sys.argv[2:]), sys.stdout)
