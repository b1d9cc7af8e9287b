"""A small store with everything in it, for tests of what copies stores."""

import numpy as np
import pyarrow as pa
from shards import rows_of, write_shard

from moclip.store import FeatureSpec, ShardWriter, SourceFacts, add_feature, publish, write_labels

IMAGE = FeatureSpec("image", "uint8", "1", {"quality": 90}, {"frame_index": "int64"}, ("byte",))
LABELS = {
    "a": ("run", "train"),
    "b": ("run", "test"),
    "c": ("jump", "train"),
    "d": ("jump", "val"),
    "e": ("swim", "test"),
}


def noise(seed, length):
    return np.random.default_rng(seed).integers(0, 256, length, dtype=np.uint8).tobytes()


def images_of(seed, count=3):
    """Ragged rows that no compression shortens; the last one is short."""
    return [*(noise(100 * seed + k, 300 + 7 * k) for k in range(count - 1)), noise(seed, 1)]


def write_images(root, shard, videos):
    writer = ShardWriter(root, feature="image", spec=IMAGE, shard=shard)
    for video, files in videos.items():
        writer.append_bytes(files, frame_index=np.arange(len(files)))
        writer.ok(SourceFacts(video, f"{video}.avi", 1000))
    return writer.finish()


def label(root, labels, classes):
    columns = zip(*labels.values(), strict=True)
    names = ("label", "split_1")
    table = {"id": list(labels), **dict(zip(names, map(list, columns), strict=True))}
    table["group"] = pa.nulls(len(labels), pa.string())
    write_labels(root, pa.table(table).select(["id", "label", "group", "split_1"]), classes)


def fill(root):
    """Motion of a to d in two shapes and two shards, e failed; images of a, b and e; labels of all."""
    add_feature(root, "image", IMAGE)
    write_images(root, "i1", {"b": images_of(2), "e": images_of(5), "a": images_of(1)})
    write_shard(root, "m1", {"a": rows_of(1, 5), "c": rows_of(3, 40, (2, 2))}, failed=["e"], extra={"year": 1999})
    write_shard(root, "m2", {"b": rows_of(2, 7), "d": rows_of(4, 9)}, extra={"year": 2001, "bytes": "mine"})
    label(root, LABELS, ["swim", "run", "jump"])
    publish(root)
    return root
