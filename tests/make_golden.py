"""Makes the golden stores of format 1, one a container: python tests/make_golden.py

They are committed and never made again: later versions must read what this one wrote. Values follow formulas, so
that a reader in any language can be checked against them.
"""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from moclip.store import (
    FeatureSpec,
    ShardWriter,
    SourceFacts,
    add_feature,
    create_store,
    publish,
    write_labels,
)

GOLDEN = Path(__file__).parent / "golden"
CONTAINERS = ("zarr", "hdf5")
SPECS = {
    "motion": FeatureSpec(
        "motion",
        "int16",
        "quarter pixel",
        {"version": 1, "motion": "native", "cell": 8, "size": None},
        {"pts_seconds": "float64", "picture_type": "uint8"},
        ("displacement", "y", "x"),
    ),
    "embedding-golden": FeatureSpec(
        "embedding",
        "float16",
        "1",
        {"version": 1, "encoder": "golden", "weights_sha256": "0" * 64, "preprocessing": {}, "frames": "middle"},
        {"frame_index": "int32", "pts_seconds": "float64"},
        ("channel",),
    ),
    "image": FeatureSpec(
        "image",
        "uint8",
        "file",
        {"version": 1, "frames": "uniform:2"},
        {"frame_index": "int32", "pts_seconds": "float64"},
        ("byte",),
    ),
}
#: id: frames, grid. The second video of `motion` failed; ids may hold anything; the last one spans several chunks.
VIDEOS = {
    "a/one": (5, (2, 3)),
    "b/zwei é": (0, None),
    "c/../three\n": (7, (2, 3)),
    "d/four": (4, (3, 3)),
    "e": (1500, (2, 3)),
}
#: Beside the shard that counts (golden-1) are two whose entries do not: golden-0 has rows of an earlier file of the
#: third video, which had another size; golden-2 is newer, and the first video failed there.
LOSING = "golden-0"


def motion(video: int, frames: int, grid: tuple[int, int]) -> np.ndarray:
    """Row f, axis a, cell (y, x) is (1000 video + 100 f + 10 a + 3 y - x) modulo 30000."""
    f, a, y, x = np.indices((frames, 2, *grid))
    return ((1000 * video + 100 * f + 10 * a + 3 * y - x) % 30000).astype(np.int16)


def embedding(video: int) -> np.ndarray:
    """Channel c of the one row is video + c / 8."""
    return (video + np.arange(8)[None] / 8).astype(np.float16)


def images(video: int) -> list[bytes]:
    """Two files of 3 + video and of 5 bytes that count up from the video's number."""
    return [bytes(range(video, video + 3 + video)), bytes(range(video, video + 5))]


def seconds(rows: int) -> np.ndarray:
    return np.arange(rows) / 25


def picture_types(rows: int) -> np.ndarray:
    return np.where(np.arange(rows) % 4 == 0, 1, 2).astype(np.uint8)


def facts_of(number: int, frames: int) -> SourceFacts:
    return SourceFacts(
        id=list(VIDEOS)[number],
        path=f"{number}.avi",
        bytes=1000 + number,
        content_hash=f"{number:064x}",
        codec="mpeg4",
        width=24,
        height=16,
        fps=25.0,
        frames=frames,
        duration_s=frames / 25,
        corrupt_frames=0,
        extra={"year": 2000 + number},
    )


def make(container: str) -> None:
    root = GOLDEN / f"format1-{container}"
    shutil.rmtree(root, ignore_errors=True)
    create_store(root, container)
    writers = {}
    for name, spec in SPECS.items():
        add_feature(root, name, spec)
        writers[name] = ShardWriter(root, feature=name, spec=spec, shard="golden-1")
    losing = ShardWriter(root, feature="motion", spec=SPECS["motion"], shard=LOSING)
    losing.append(motion(9, 3, (2, 3)), pts_seconds=seconds(3), picture_type=picture_types(3))
    losing.ok(replace(facts_of(2, 3), id="c/../three\n", bytes=999))
    losing.finish()
    for number, (frames, grid) in enumerate(VIDEOS.values()):
        facts = facts_of(number, frames)
        if grid is None:
            writers["motion"].fail(facts, "no_vectors", "the stream has none")
        else:
            rows = motion(number, frames, grid)
            writers["motion"].append(rows, pts_seconds=seconds(frames), picture_type=picture_types(frames))
            writers["motion"].ok(facts, motion_source="native")
        writers["embedding-golden"].append(embedding(number), frame_index=[2], pts_seconds=[2 / 25])
        writers["embedding-golden"].ok(facts)
        writers["image"].append_bytes(images(number), frame_index=[1, 3], pts_seconds=[1 / 25, 3 / 25])
        writers["image"].ok(facts)
    for writer in writers.values():
        writer.finish()
    newer = ShardWriter(root, feature="motion", spec=SPECS["motion"], shard="golden-2")
    newer.fail(facts_of(0, 5), "truncated", "a second try that found less")
    newer.finish()
    publish(root)
    labels = {
        "id": list(VIDEOS),
        "label": ["up", "down", None, "up", "down"],
        "group": ["g1", "g1", "g2", None, None],
        "split_1": ["train", "train", None, "test", "test"],
    }
    write_labels(
        root, pa.table({name: pa.array(values, pa.string()) for name, values in labels.items()}), ["up", "down"]
    )


if __name__ == "__main__":
    for each in CONTAINERS:
        make(each)
