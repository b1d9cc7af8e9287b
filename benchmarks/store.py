"""A store against the other ways to keep the same rows, in one run on one machine; nothing is asserted about speed.

    python benchmarks/store.py STORE [--only rows,load,bytes,catalogue,flips,two] [--rounds 5]

    rows        random rows, three a video: rows a second
    load        every row of a feature into memory, files in the page cache and not: GB of rows a second
    bytes       what a frame of each feature takes on disk, and all of them beside the videos
    catalogue   opening, describing and filtering a generated store of a million videos (see catalogue.py)
    flips       single bytes flipped anywhere in a store: is each found, is any read as a value (see damage.py)
    two         two extractions into one store at the same time (see damage.py)

Every peer is made from the same rows in a temporary folder, takes its turn in every round, and has each of its values
compared. A ratio is the median over the rounds of that round's ratios.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import catalogue
import damage
import h5py
import numpy as np
import peers

from moclip.store import Store, open_store

ZARR, HDF5 = "moclip Zarr", "moclip HDF5"


def race(contenders: Sequence[Any], work: Callable[[Any], Any], same: Callable[[Any], bool]) -> dict[str, float]:
    """One round: the seconds that ``work`` takes each contender. The order is random."""
    seconds = {}
    for k in np.random.default_rng().permutation(len(contenders)):
        peer = contenders[k]
        start = time.perf_counter()
        found = work(peer)
        seconds[peer.name] = time.perf_counter() - start
        if not same(found):
            raise SystemExit(f"{peer.name} gave other values")
    return seconds


def ratio(rounds: Sequence[dict[str, float]], of: str, against: str) -> float:
    """How many times as fast ``of`` is as the fastest of the peers whose name starts with ``against``."""
    return statistics.median(
        min(seconds for name, seconds in found.items() if name.startswith(against)) / found[of] for found in rounds
    )


def table(rounds: Sequence[dict[str, float]], amount: float, unit: str, against: str) -> None:
    """A line a peer: its median speed and how it stands to ``against``."""
    for name in sorted(rounds[0], key=lambda name: statistics.median(found[name] for found in rounds)):
        speed = amount / statistics.median(found[name] for found in rounds)
        print(f"  {name:30} {speed:12,.2f} {unit}  {ratio(rounds, name, against):8.2f} x {against}")


def both_containers(store: Store, folder: Path) -> dict[str, Path]:
    """The store itself, and its copy in the other container."""
    other = "hdf5" if store.container == "zarr" else "zarr"
    found = {store.container: Path(store.url), other: folder / f"copy.{other}"}
    if not found[other].exists():
        peers.copy_store(store, found[other], other)
    return found


def random_rows(store: Store, given: argparse.Namespace, folder: Path) -> None:
    rows = peers.read_rows(store, given.feature)
    urls = both_containers(store, folder)
    on_store = peers.ZarrOnStore(urls["zarr"], rows)
    zarr_chunk = next(iter(on_store.arrays.values())).chunks[0]
    contenders = [
        peers.Moclip(ZARR, urls["zarr"], rows),
        peers.Moclip(HDF5, urls["hdf5"], rows),
        on_store,
        peers.ZarrOneArray(folder, rows, zarr_chunk),
        peers.ZarrOneArray(folder, rows, 8 * zarr_chunk),
        *(kind(folder, rows, h5_chunk_rows(urls["hdf5"], rows)) for kind in (peers.H5One, peers.H5Lists)),
        peers.NpyPerVideo(folder, rows),
        peers.NpyPerVideoMapped(folder, rows),
        peers.PtPerVideo(folder, rows),
        *peers.make_tars(folder, rows),
    ]
    rng = np.random.default_rng(given.seed)
    rounds = []
    for _ in range(given.rounds + 1):
        draw = rows.draw(given.videos_a_batch, rng)
        expected = rows.values[rows.numbers(draw)]
        rounds.append(race(contenders, partial(gather, draw=draw), partial(equal, expected=expected)))
    asked = given.videos_a_batch * peers.SEGMENTS
    print(f"{asked:,} random rows {rows.values.shape[1:]} {rows.values.dtype} of {rows.feature}, three a video:")
    table(rounds[1:], asked, "rows/s", "zarr-python")
    print(
        f"  {ZARR} is {ratio(rounds[1:], ZARR, on_store.name):.1f} x zarr-python on the same arrays, "
        f"{ratio(rounds[1:], ZARR, 'zarr-python'):.1f} x the best of zarr-python's (target 30)"
    )
    print(f"  {HDF5} is {ratio(rounds[1:], HDF5, 'h5py'):.2f} x the better of h5py's (target 0.8)")


def gather(peer: Any, draw: peers.Draw) -> Any:
    return peer.gather(draw)


def h5_chunk_rows(url: Path, rows: peers.Rows) -> int:
    """How many rows a chunk of the store's HDF5 files holds."""
    entries = open_store(url).entries.to_pylist()
    entry = next(e for e in entries if (e["id"], e["feature"]) == (rows.ids[0], rows.feature))
    with h5py.File(url / "features" / rows.feature / f"{entry['shard']}.h5") as file:
        return int(file[f"{entry['array']}/value"].chunks[0])


def equal(found: Any, expected: np.ndarray) -> bool:
    return found.dtype == expected.dtype and np.array_equal(found, expected)


def whole_feature(store: Store, given: argparse.Namespace, folder: Path) -> None:
    rows = peers.read_rows(store, given.feature)
    urls = both_containers(store, folder)
    contenders = [
        peers.Moclip(ZARR, urls["zarr"], rows),
        peers.Moclip(HDF5, urls["hdf5"], rows),
        peers.H5Whole(folder, rows, h5_chunk_rows(urls["hdf5"], rows)),
        peers.OneNpy(folder, rows),
        peers.NpyPerVideo(folder, rows),
        peers.PtPerVideo(folder, rows),
        *peers.make_tars(folder, rows),
    ]
    sizes = {peer.name: sum(path.stat().st_size for path in peer.files) for peer in contenders}
    for state, prepare in (("in the page cache", warm), ("dropped from the page cache", cold)):
        rounds = []
        for _ in range(given.rounds):
            for peer in contenders:
                prepare(peer.files)
            rounds.append(race(contenders, lambda peer: peer.load(), lambda got: equal_parts(got, rows)))
        print(f"all {len(rows.values):,} rows of {rows.feature} ({rows.values.nbytes / 1e6:.0f} MB), files {state}:")
        table(rounds, rows.values.nbytes / 1e9, "GB/s  ", peers.OneNpy.name)
    print(f"  {ZARR} and {HDF5}: target 0.7 x {peers.OneNpy.name}")
    print("  on disk, bytes a row:")
    for name, size in sizes.items():
        print(f"    {name:28} {size / len(rows.values):10,.1f}")


def equal_parts(found: Any, rows: peers.Rows) -> bool:
    if isinstance(found, np.ndarray):
        return equal(found, rows.values)
    return len(found) == len(rows.ids) and all(equal(part, rows.of(k)) for k, part in enumerate(found))


def warm(files: Sequence[Path]) -> None:
    for path in files:
        path.read_bytes()


def cold(files: Sequence[Path]) -> None:
    """Ask the system to forget the files' pages; it only can where they are on the disk."""
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bytes_a_frame(store: Store, given: argparse.Namespace, folder: Path) -> None:
    root = Path(store.url)
    frames = sum(store.videos["frames"].to_pylist())
    videos = video_bytes(store, given.videos)
    print(f"{len(store.videos)} videos, {frames:,} frames, {videos / 1e6:.1f} MB:")
    sizes = dict.fromkeys(store.features, 0)
    for name in sizes:
        for part in ("features", "receipts"):
            sizes[name] += sum(path.stat().st_size for path in (root / part / name).rglob("*") if path.is_file())
        rows = int(store.row_counts(name, store.ids(name)).sum())
        size = sizes[name]
        print(
            f"  {name:44} {size / 1e6:8.2f} MB  {size / frames:7.1f} bytes a frame  "
            f"{size / rows:7.1f} bytes a row  {100 * size / videos:5.1f} % of the videos"
        )
    share = {kind: sum(sizes[n] for n, spec in store.features.items() if spec.kind == kind) for kind in KINDS}
    for motion in KINDS[:2]:
        percent = 100 * (share[motion] + share["embedding"]) / videos
        print(f"  {motion} + embedding: {percent:.1f} % of the videos (target 20)")
    tables = sum(path.stat().st_size for path in root.iterdir() if path.is_file())
    print(f"  tables and catalogue: {100 * tables / videos:.2f} %")


KINDS = ("motion", "motion-accumulated", "embedding")


def video_bytes(store: Store, folder: Path | None) -> int:
    """The size of the videos as the store has it, checked against the files where they are there."""
    recorded = sum(store.videos["bytes"].to_pylist())
    if folder is not None:
        found = sum((folder / path).stat().st_size for path in store.videos["path"].to_pylist())
        if found != recorded:
            print(f"the videos in {folder} have {found:,} bytes, those of the store had {recorded:,}")
    return recorded


SECTIONS: dict[str, Callable[[Store, argparse.Namespace, Path], None]] = {
    "rows": random_rows,
    "load": whole_feature,
    "bytes": bytes_a_frame,
    "catalogue": lambda store, given, folder: catalogue.run(store, folder, given.catalogue_videos, given.rounds),
    "flips": lambda store, given, folder: damage.flips(store, folder, given.flips, given.seed),
    "two": lambda store, given, folder: damage.two_at_once(folder),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, with commas between them")
    parser.add_argument("--feature", default="motion")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--videos", type=Path, help="the videos the store was made from: their bytes are checked")
    parser.add_argument("--videos-a-batch", type=int, default=500)
    parser.add_argument("--catalogue-videos", type=int, default=1_000_000)
    parser.add_argument("--flips", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made, if not in the system's")
    given = parser.parse_args()
    store = open_store(given.store)
    for name in given.only.split(","):
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            SECTIONS[name](store, given, Path(folder))
        print(flush=True)


if __name__ == "__main__":
    main()
