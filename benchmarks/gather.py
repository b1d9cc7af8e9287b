"""Random motion rows by ``gather`` against zarr-python's ``oindex`` on the same arrays, in one run.

python benchmarks/gather.py STORE [--rows 1500] [--rounds 5]
"""

import argparse
import statistics
import time

import numpy as np
import zarr

from moclip import open_store


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store")
    parser.add_argument("--feature", default="motion")
    parser.add_argument("--rows", type=int, default=1500)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    store = open_store(given.store)
    ids = store.ids(given.feature)
    counts = store.row_counts(given.feature, ids)
    where = {
        row["id"]: (f"features/{given.feature}/{row['shard']}/{row['array']}/value", row["row_start"])
        for row in store.entries.to_pylist()
        if row["feature"] == given.feature and row["status"] == "ok"
    }
    group = zarr.open_group(given.store, mode="r")
    arrays = {name: group[name] for name in {name for name, _ in where.values()}}
    rng = np.random.default_rng(0)
    ratios = []
    for number in range(given.rounds):
        chosen = rng.integers(len(ids), size=given.rows)
        frames = rng.integers(counts[chosen])
        videos = [ids[i] for i in chosen]
        start = time.perf_counter()
        ours = store.gather(given.feature, videos, frames)
        ours_s = time.perf_counter() - start
        start = time.perf_counter()
        theirs = oindex(arrays, where, videos, frames, ours.shape, ours.dtype)
        theirs_s = time.perf_counter() - start
        assert np.array_equal(ours, theirs)
        ratios.append(theirs_s / ours_s)
        print(
            f"round {number + 1}: gather {given.rows / ours_s:.0f} rows/s, "
            f"oindex {given.rows / theirs_s:.0f} rows/s, {ratios[-1]:.1f} x"
        )
    print(f"median {statistics.median(ratios):.1f} x")


def oindex(arrays, where, videos, frames, shape, dtype):
    """The same rows by zarr-python: one index list an array."""
    names = np.array([where[video][0] for video in videos])
    rows = np.array([where[video][1] for video in videos]) + frames
    out = np.empty(shape, dtype)
    for name, array in arrays.items():
        mine = np.flatnonzero(names == name)
        if len(mine):
            out[mine] = array.oindex[rows[mine]]
    return out


if __name__ == "__main__":
    main()
