"""Shards with known rows, written with the store's own writer, for tests of the store itself."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moclip.store import FeatureSpec, ShardWriter, SourceFacts, parquet_bytes

SPEC = FeatureSpec(
    kind="motion",
    dtype="int16",
    unit="quarter pixel",
    parameters={"version": 1, "cell": 8},
    columns={"pts_seconds": "float64", "picture_type": "uint8"},
    axes=("displacement", "y", "x"),
)


def rows_of(seed, frames, grid=(3, 4)):
    return np.random.default_rng(seed).integers(-99, 99, (frames, 2, *grid)).astype(np.int16)


def write_shard(root, shard, videos, *, failed=(), spec=SPEC, extra=None):
    """``videos``: id -> rows. Each is appended in two blocks."""
    writer = ShardWriter(root, feature="motion", spec=spec, shard=shard)
    for video_id, rows in videos.items():
        for part in (rows[:1], rows[1:]):
            writer.append(part, pts_seconds=np.arange(len(part)), picture_type=np.full(len(part), 2))
        writer.ok(SourceFacts(video_id, f"{video_id}.avi", 1000, frames=len(rows), extra=extra or {}))
    for video_id in failed:
        writer.fail(SourceFacts(video_id), "truncated", "nothing decodes")
    return writer.finish()


def rewrite_table(path, metadata=None, **columns):
    """Change a parquet file of a local store as a stranger would who knows the format: its checksum is right."""
    table = pq.read_table(path)
    for name, value in columns.items():
        at = table.column_names.index(name)
        table = table.set_column(at, name, pa.array([value] * len(table), table.schema.field(name).type))
    if metadata:
        about = {**json.loads(table.schema.metadata[b"moclip"]), **metadata}
        table = table.replace_schema_metadata({b"moclip": json.dumps(about)})
    path.write_bytes(parquet_bytes(table))
