"""What a store makes of damage, and of two writers."""

import importlib.util
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import peers

from moclip.errors import MoclipError
from moclip.store import (
    ShardWriter,
    Store,
    add_feature,
    create_store,
    first_difference,
    open_store,
    publish,
    verify,
    write_labels,
)

VIDEOS = 6
FRAMES = 40
CLIPS = 12


@dataclass
class Tally:
    """What became of the flips."""

    reported: int = 0
    named: int = 0
    raised: int = 0
    wrong: list[str] = field(default_factory=list)
    missed: Counter[str] = field(default_factory=Counter)


def flips(source: Store, folder: Path, count: int, seed: int) -> None:
    """Flip bytes one at a time in a small store of each container: by byte, then file by file."""
    small = cut_store(source, folder / "small.zarr")
    for container in ("zarr", "hdf5"):
        url = peers.copy_store(small, folder / f"flipped.{container}", container)
        files = sorted(path for path in url.rglob("*") if path.is_file())
        size = sum(path.stat().st_size for path in files)
        print(f"{container}: {len(files)} files, {size / 1e3:.0f} kB, {count} flips of one byte each:")
        for how, pick in (("any byte", pick_byte), ("any file", pick_file)):
            tally = flip_all(url, files, count, pick, np.random.default_rng(seed))
            print(
                f"  {how}: verify reports {tally.reported}/{count} ({tally.named} by the file's name); "
                f"reading refuses {tally.raised}, reads {len(tally.wrong)} silently wrong (or fails otherwise)"
            )
            for line in tally.wrong[:10]:
                print(f"    {line}")
            for name, times in tally.missed.most_common(10):
                print(f"    not reported: {name} ({times} x)")


def cut_store(source: Store, target: Path) -> Store:
    """The first rows of a few of a store's videos: every feature and table, in kilobytes."""
    create_store(target, container="zarr")
    facts = peers.facts_of(source)
    ids = sorted(set.intersection(*(set(source.ids(name)) for name in source.features)))[:VIDEOS]
    for name, spec in source.features.items():
        add_feature(target, name, spec)
        writer = ShardWriter(target, feature=name, spec=spec, shard="one")
        for video in ids:
            peers.copy_rows(source, writer, name, video, FRAMES)
            writer.ok(facts[video])
        writer.finish()
    publish(target)
    mine = [label in ids for label in source.labels["id"].to_pylist()]
    write_labels(target, source.labels.filter(mine), source.classes)
    return open_store(target)


def pick_byte(files: list[Path], rng: np.random.Generator) -> tuple[Path, int]:
    """A byte of the store, each as likely as any other."""
    ends = np.cumsum([path.stat().st_size for path in files])
    at = int(rng.integers(ends[-1]))
    k = int(np.searchsorted(ends, at, side="right"))
    return files[k], at - int(ends[k - 1] if k else 0)


def pick_file(files: list[Path], rng: np.random.Generator) -> tuple[Path, int]:
    """A file of the store, each as likely as any other, and a byte of it."""
    full = [path for path in files if path.stat().st_size]
    path = full[int(rng.integers(len(full)))]
    return path, int(rng.integers(path.stat().st_size))


def flip_all(
    url: Path,
    files: list[Path],
    count: int,
    pick: Callable[[list[Path], np.random.Generator], tuple[Path, int]],
    rng: np.random.Generator,
) -> Tally:
    original = contents(url)
    tally = Tally()
    for _ in range(count):
        path, at = pick(files, rng)
        good = path.read_bytes()
        bad = bytearray(good)
        bad[at] ^= int(rng.integers(1, 256))
        put(path, bytes(bad))
        judge(url, path, at, original, tally)
        put(path, good)
    return tally


def put(path: Path, data: bytes) -> None:
    """As a new file: of one that is still open somewhere, HDF5 would go on to show what it remembers."""
    new = path.with_name("new")
    new.write_bytes(data)
    new.replace(path)


def judge(url: Path, path: Path, at: int, original: dict[str, Any], tally: Tally) -> None:
    """Ask ``verify``, and read everything, with one byte of ``path`` flipped."""
    name = path.relative_to(url).as_posix()
    found = problems_of(url)
    tally.reported += bool(found)
    tally.named += any(name in problem for problem in found)
    if not found:
        tally.missed[name] += 1
    try:
        different = [key for key, value in contents(url).items() if not same(value, original.get(key))]
    except MoclipError:
        tally.raised += 1
        return
    except Exception as error:  # no value was read, yet whoever catches moclip's errors does not catch this
        tally.wrong.append(f"{name} at byte {at}: {type(error).__name__}: {str(error)[:100]}")
        return
    if different:
        tally.wrong.append(f"{name} at byte {at}: {', '.join(map(str, different[:3]))} differ")


def problems_of(url: Path) -> list[str]:
    """Where ``verify`` finds something wrong; what it says where it cannot go on."""
    try:
        return [problem.path for problem in verify(url)]
    except MoclipError as error:
        return [str(error)]


def contents(url: Path) -> dict[str, Any]:
    """Everything a reader can see: the tables, the classes, the specifications, every row and column."""
    store = open_store(url)
    found: dict[str, Any] = {"videos": store.videos, "entries": store.entries, "labels": store.labels}
    found["classes"] = store.classes
    for name, spec in store.features.items():
        ids = store.ids(name)
        found[f"{name}: specification, ids"] = (spec.to_json(), ids)
        for column in (*spec.columns, *(() if spec.ragged else ("value",))):
            for video, rows in zip(ids, store.read_all(name, ids, column), strict=True):
                found[f"{name} {column} of {video}"] = rows
        if spec.ragged:
            found[f"{name} bytes"] = [store.read_bytes(name, video) for video in ids]
    found["features"] = list(store.features)
    return found


def same(found: Any, expected: Any) -> bool:
    if isinstance(found, np.ndarray):
        return expected is not None and found.dtype == expected.dtype and np.array_equal(found, expected, True)
    return bool(found == expected)


def two_at_once(folder: Path) -> None:
    """Two commands at the same time, of the two halves of a folder and then both of the whole, against one alone."""
    halves = make_clips(folder)
    whole = [folder / "whole"]
    wait(extract(whole[0], folder / "alone.zarr"))
    for what, sources in (("the two halves of a folder", halves), ("the same folder twice", whole * 2)):
        together = folder / f"{sources[0].name}-{sources[1].name}.zarr"
        for process in [extract(source, together) for source in sources]:
            wait(process)
        found, alone = open_store(together), open_store(folder / "alone.zarr")
        difference = first_difference(alone, found)
        problems = ", ".join(problems_of(together)) or "no problems"
        print(f"two extractions of {what} at once, {CLIPS} videos: {difference or 'EQUAL'}; verify: {problems}")


def make_clips(folder: Path) -> list[Path]:
    """A folder of small clips, and its two halves."""
    spec = importlib.util.spec_from_file_location("videos", Path(__file__).parent.parent / "tests" / "videos.py")
    videos = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(videos)
    halves = [folder / "first", folder / "second"]
    for place in (folder / "whole", *halves):
        place.mkdir()
    for number in range(CLIPS):
        clip = videos.make_clip(folder / "whole" / f"clip{number:02d}.mp4", seed=number)
        (halves[number % 2] / clip.name).hardlink_to(clip)
    return halves


def extract(source: Path, store: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "moclip.cli", "extract", str(source), str(store), "--encoder", "none"]
    return subprocess.Popen([*command, "--workers", "1"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def wait(process: subprocess.Popen[bytes]) -> None:
    _, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"an extraction failed:\n{errors.decode()[-2000:]}")
