"""The store's promises: rows come back, only receipts count, what is there stays, damage is an error."""

import json
import multiprocessing
import pickle
import re
import shutil
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from operator import methodcaller

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from moclip.errors import FeatureError, StoreFormatError, StoreNotFoundError
from moclip.store import (
    FeatureSpec,
    ShardWriter,
    SourceFacts,
    add_feature,
    arrays,
    create_store,
    describe,
    failed_entries,
    first_difference,
    open_store,
    publish,
    tables,
    write_atomic,
    write_labels,
)

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


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "store.zarr"
    create_store(root)
    add_feature(root, "motion", SPEC)
    return root


@given(st.lists(st.tuples(st.integers(1, 40), st.sampled_from([(3, 4), (2, 2), (30, 40)])), min_size=1, max_size=8))
@settings(max_examples=25, deadline=None)
def test_gather_gives_the_rows_that_were_written(tmp_path_factory, lengths):
    root = tmp_path_factory.mktemp("stores") / "store.zarr"
    create_store(root)
    add_feature(root, "motion", SPEC)
    written = {f"v{i}": rows_of(i, frames, grid) for i, (frames, grid) in enumerate(lengths)}
    for i, (video_id, rows) in enumerate(written.items()):
        write_shard(root, f"shard{i // 3}-{i}", {video_id: rows})
    publish(root)
    store = open_store(root)
    rng = np.random.default_rng(len(lengths))
    videos = rng.choice(list(written), 50)
    frames = np.array([rng.integers(len(written[video])) for video in videos])
    seen = np.zeros(50, bool)
    for positions, rows in store.gather_groups("motion", videos, frames):
        seen[positions] = True
        for position, row in zip(positions, rows, strict=True):
            np.testing.assert_array_equal(row, written[videos[position]][frames[position]])
    assert seen.all()
    for video_id, rows in zip(written, store.read_all("motion", list(written)), strict=True):
        np.testing.assert_array_equal(rows, written[video_id])


def test_rows_larger_than_a_block_go_out_as_they_come(root, monkeypatch):
    monkeypatch.setattr(arrays, "SHARD_BYTES", 40_000)
    rows = rows_of(0, 4000)
    write_shard(root, "big", {"a": rows[:1700], "b": rows[1700:]})
    publish(root)
    assert len(list((root / "features/motion/big/3x4/value/c").iterdir())) > 3
    np.testing.assert_array_equal(open_store(root).read("motion", "b"), rows[1700:])


def test_zarr_python_reads_the_same(root):
    rows = rows_of(1, 20)
    write_shard(root, "s", {"a": rows})
    publish(root)
    group = zarr.open_group(root, mode="r")["features/motion/s/3x4"]
    np.testing.assert_array_equal(group["value"][:], rows)
    assert group["value"].metadata.dimension_names == ("row", "displacement", "y", "x")
    assert group["picture_type"][:].tolist() == [2] * 20


def test_only_a_receipt_makes_rows_count(root):
    write_shard(root, "s", {"a": rows_of(0, 3)})
    unfinished = ShardWriter(root, feature="motion", spec=SPEC, shard="killed")
    unfinished.append(rows_of(1, 3), pts_seconds=[0, 1, 2], picture_type=[1, 2, 2])
    unfinished.ok(SourceFacts("b"))
    publish(root)
    assert open_store(root).ids("motion") == ["a"]


def test_ok_beats_failed_and_newer_beats_older(root):
    first, second = rows_of(0, 3), rows_of(1, 4)
    write_shard(root, "s1", {"a": first}, failed=["b"])
    write_shard(root, "s2", {"b": second}, failed=["a"])
    publish(root)
    store = open_store(root)
    np.testing.assert_array_equal(store.read("motion", "a"), first)
    np.testing.assert_array_equal(store.read("motion", "b"), second)
    assert failed_entries(store) == []
    write_shard(root, "s3", {"a": second})
    publish(root)
    np.testing.assert_array_equal(open_store(root).read("motion", "a"), second)
    np.testing.assert_array_equal(store.read("motion", "a"), first)


def test_a_failed_entry_is_a_row_and_never_zeros(root):
    write_shard(root, "s", {"a": rows_of(0, 3)}, failed=["b"])
    publish(root)
    store = open_store(root)
    assert failed_entries(store) == [
        {"id": "b", "feature": "motion", "reason": "truncated", "detail": "nothing decodes"}
    ]
    with pytest.raises(FeatureError, match="its entry failed"):
        store.gather("motion", ["a", "b"], [0, 0])


def test_frames_and_columns_are_checked(root):
    write_shard(root, "s", {"a": rows_of(0, 3), "b": rows_of(1, 3, (2, 2))})
    publish(root)
    store = open_store(root)
    for frame in (3, -1):
        with pytest.raises(FeatureError, match="3 rows"):
            store.gather("motion", ["a"], [frame])
    with pytest.raises(FeatureError, match="no column 'nonsense'"):
        store.read("motion", "a", "nonsense")
    with pytest.raises(FeatureError, match="use gather_groups"):
        store.gather("motion", ["a", "b"], [0, 0])
    assert store.gather("motion", [1, 1], [2, 0], "pts_seconds").tolist() == [1.0, 0.0]
    assert store.gather("motion", [], []).shape[0] == 0


def test_a_name_belongs_to_one_specification(root):
    add_feature(root, "motion", SPEC)
    other = FeatureSpec("motion", "int16", "quarter pixel", {"version": 1, "cell": 16})
    with pytest.raises(FeatureError, match=r"cell: 8 there, 16 asked for.*--as NAME"):
        add_feature(root, "motion", other)


def test_embedding_stands_for_the_only_one(root):
    spec = FeatureSpec("embedding", "float16", "1", {})
    with pytest.raises(FeatureError, match="'embedding' is not there"):
        open_store(root).resolve("embedding")
    add_feature(root, "embedding-a", spec)
    assert open_store(root).resolve("embedding") == "embedding-a"
    add_feature(root, "embedding-b", spec)
    with pytest.raises(FeatureError, match="ambiguous"):
        open_store(root).resolve("embedding")


def test_source_columns_keep_their_types_and_clash_as_text(root):
    write_shard(root, "s1", {"a": rows_of(0, 2)}, extra={"year": 1999, "bytes": "mine"})
    write_shard(root, "s2", {"b": rows_of(0, 2)}, extra={"year": 2001, "note": None})
    publish(root)
    videos = open_store(root).videos
    assert videos["year"].to_pylist() == [1999, 2001]
    assert videos["bytes"].to_pylist() == [1000, 1000]
    assert videos["extra.bytes"].to_pylist() == ["mine", None]
    write_shard(root, "s3", {"c": rows_of(0, 2)}, extra={"year": "MMI"})
    publish(root)
    assert open_store(root).videos["year"].to_pylist() == ["1999", "2001", "MMI"]


def test_a_receipt_that_comes_while_the_tables_are_written_is_in_them(root, monkeypatch):
    write_shard(root, "s1", {"a": rows_of(0, 2)})
    real = tables.fold

    def fold(*arguments):
        monkeypatch.setattr(tables, "fold", real)
        folded = real(*arguments)
        write_shard(root, "s2", {"b": rows_of(1, 2)})
        return folded

    monkeypatch.setattr(tables, "fold", fold)
    publish(root)
    assert open_store(root).ids("motion") == ["a", "b"]


def test_first_difference(root, tmp_path):
    other = tmp_path / "other.zarr"
    shutil.copytree(root, other)

    def difference():
        for store in (root, other):
            publish(store)
        return first_difference(open_store(root), open_store(other))

    write_shard(root, "s", {"a": rows_of(0, 3), "b": rows_of(1, 3)})
    write_shard(other, "t1", {"b": rows_of(1, 3)})
    assert "motion of 'a' is only in" in difference()
    write_shard(other, "t2", {"a": rows_of(0, 3)})
    assert difference() is None
    write_shard(other, "t3", {"a": rows_of(2, 3)})
    assert "motion of 'a' has other rows" in difference()


def test_two_publishers_lose_nothing(root):
    def extract(name):
        for i in range(4):
            write_shard(root, f"{name}{i}", {f"{name}{i}": rows_of(i, 2)})
            publish(root)

    threads = [threading.Thread(target=extract, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert open_store(root).ids("motion") == [f"{name}{i}" for name in "ab" for i in range(4)]


def test_any_flipped_byte_of_a_chunk_is_an_error(root):
    rows = rows_of(0, 500, (8, 8))
    receipt = write_shard(root, "s", {"a": rows})
    publish(root)
    (chunk,) = (root / name for name in receipt.files if "/value/c/" in name)
    good = chunk.read_bytes()
    rng = np.random.default_rng(0)
    for position in rng.integers(len(good), size=40):
        bad = bytearray(good)
        bad[position] ^= 1 << int(rng.integers(8))
        chunk.write_bytes(bytes(bad))
        with pytest.raises(StoreFormatError, match="damaged"):
            open_store(root).read("motion", "a")
    chunk.unlink()
    with pytest.raises(StoreFormatError, match="damaged"):
        open_store(root).read("motion", "a")


def test_receipts_name_every_file_of_their_shard(root):
    receipt = write_shard(root, "s", {"a": rows_of(0, 3)})
    on_disk = {p.relative_to(root).as_posix() for p in (root / "features/motion/s").rglob("*") if p.is_file()}
    assert set(receipt.files) == on_disk
    assert receipt.versions["tensorstore"]


def test_content_does_not_depend_on_blocks_or_shards(root):
    rows = rows_of(0, 6)
    write_shard(root, "s1", {"a": rows})
    whole = ShardWriter(root, feature="motion", spec=SPEC, shard="s2")
    whole.append(rows_of(5, 2), pts_seconds=[0, 1], picture_type=[2, 2])
    whole.ok(SourceFacts("other"))
    times = np.concatenate([np.arange(1), np.arange(5)])
    whole.append(rows, pts_seconds=times, picture_type=np.full(6, 2))
    whole.ok(SourceFacts("b"))
    whole.finish()
    publish(root)
    entries = {row["id"]: row["content"] for row in open_store(root).entries.to_pylist()}
    assert entries["a"] == entries["b"] != entries["other"]


def test_a_store_pickles_and_reopens(root):
    write_shard(root, "s", {"a": rows_of(0, 3)})
    publish(root)
    store = open_store(root)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(store)).read("motion", "a"), rows_of(0, 3))


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_store_is_read_in_other_processes(root, method):
    write_shard(root, "s", {"a": rows_of(0, 3)})
    publish(root)
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        np.testing.assert_array_equal(
            pool.submit(methodcaller("read", "motion", "a"), open_store(root)).result(60), rows_of(0, 3)
        )


def test_reading_after_a_fork_is_an_error_and_not_a_hang(root, monkeypatch):
    write_shard(root, "s", {"a": rows_of(0, 3)})
    publish(root)
    store = open_store(root)
    monkeypatch.setattr("os.getpid", lambda: -1)
    with pytest.raises(FeatureError, match="spawn"):
        store.read("motion", "a")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    write_atomic(tmp_path / "f", b"old")

    def fail(*_):
        raise OSError("no space")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="no space"):
        write_atomic(tmp_path / "f", b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("f", b"old")]


def test_what_is_no_store_is_said_so(tmp_path, root):
    with pytest.raises(StoreNotFoundError, match="no such folder"):
        open_store(tmp_path / "nowhere")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/a.txt").write_text("x")
    with pytest.raises(StoreNotFoundError, match=r"no zarr\.json"):
        open_store(tmp_path / "notes")
    with pytest.raises(StoreFormatError, match="not a moclip store"):
        create_store(tmp_path / "notes")
    zarr.open_group(tmp_path / "other.zarr", mode="w")
    with pytest.raises(StoreFormatError, match="no moclip store"):
        open_store(tmp_path / "other.zarr")
    (root / "zarr.json").write_text('{"attributes": {"moclip": {"format": 99}}}')
    with pytest.raises(StoreFormatError, match="upgrade moclip"):
        open_store(root)


def test_a_stranger_s_table_cannot_lead_outside(root):
    write_shard(root, "s", {"a": rows_of(0, 3)})
    publish(root)
    table = pq.read_table(root / "entries.parquet")
    for shard in ("../../..", "/etc", "s/../../x", ".hidden"):
        changed = table.set_column(table.column_names.index("shard"), "shard", pa.array([shard]))
        pq.write_table(changed, root / "entries.parquet")
        with pytest.raises(StoreFormatError, match="cannot be a name"):
            open_store(root).read("motion", "a")


def test_a_table_that_claims_more_rows_than_there_are_is_refused(root):
    write_shard(root, "s", {"a": rows_of(0, 3)})
    publish(root)
    table = pq.read_table(root / "entries.parquet")
    at = table.column_names.index("row_stop")
    pq.write_table(table.set_column(at, "row_stop", pa.array([10**12])), root / "entries.parquet")
    with pytest.raises(StoreFormatError, match="name 1000000000000 rows"):
        open_store(root).read("motion", "a")


def test_a_header_that_claims_as_much_as_the_table_is_refused(root):
    write_shard(root, "s", {"a": rows_of(0, 3)})
    publish(root)
    table = pq.read_table(root / "entries.parquet")
    at = table.column_names.index("row_stop")
    pq.write_table(table.set_column(at, "row_stop", pa.array([2**40])), root / "entries.parquet")
    header = root / "features/motion/s/3x4/value/zarr.json"
    header.write_text(re.sub(r'"shape":\s*\[\s*3', f'"shape":[{2**40}', header.read_text()))
    assert str(2**40) in header.read_text()
    with pytest.raises(StoreFormatError, match="the entries name"):
        open_store(root).read("motion", "a")


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.write_bytes(b""),
        lambda path: shutil.copy(path, path.with_name("copy (1).parquet")),
        lambda path: (path.unlink(), path.mkdir()),
        lambda path: edit_receipt(path, status="great"),
        lambda path: edit_receipt(path, feature="other"),
        lambda path: edit_receipt(path, metadata={"format": 99}),
        lambda path: edit_receipt(path, metadata={"written_at": 1e30}),
    ],
)
def test_a_bad_receipt_is_named_with_what_to_do(root, change):
    write_shard(root, "s", {"a": rows_of(0, 3)})
    change(root / "receipts/motion/s.parquet")
    with pytest.raises(StoreFormatError, match=r"receipts/motion/.*extract again"):
        publish(root)


def edit_receipt(path, metadata=None, **columns):
    table = pq.read_table(path)
    about = {**json.loads(table.schema.metadata[b"moclip"]), **(metadata or {})}
    for name, value in columns.items():
        at = table.column_names.index(name)
        table = table.set_column(at, name, pa.array([value] * len(table), table.schema.field(name).type))
    pq.write_table(table.replace_schema_metadata({b"moclip": json.dumps(about)}), path)


def test_rows_of_another_specification_do_not_count(root):
    write_shard(root, "s", {"a": rows_of(0, 3)})
    write_shard(root, "t", {"b": rows_of(0, 3)})
    edit_receipt(root / "receipts/motion/t.parquet", metadata={"digest": "0" * 16})
    publish(root)
    assert open_store(root).ids("motion") == ["a"]


def test_entries_of_a_replaced_file_are_dead(root):
    write_shard(root, "s1", {"a": rows_of(0, 3), "b": rows_of(1, 3)})
    writer = ShardWriter(root, feature="motion", spec=SPEC, shard="s2")
    writer.fail(SourceFacts("a", "a.avi", 2000), "truncated", "the new file is broken")
    writer.finish()
    publish(root)
    store = open_store(root)
    assert store.ids("motion") == ["b"]
    assert failed_entries(store)[0]["id"] == "a"


@pytest.mark.parametrize("files", range(7))
def test_a_store_whose_making_was_cut_short_is_completed(tmp_path, monkeypatch, files):
    real, written = tables.write_atomic, []

    def write(path, data):
        if len(written) == files:
            (root / ".half.tmp").write_bytes(b"")
            raise KeyboardInterrupt
        written.append(path)
        real(path, data)

    root = tmp_path / "store.zarr"
    root.mkdir()
    monkeypatch.setattr(tables, "write_atomic", write)
    with pytest.raises(KeyboardInterrupt):
        create_store(root)
    monkeypatch.setattr(tables, "write_atomic", real)
    create_store(root)
    assert len(open_store(root).entries) == 0


def test_odd_metadata_of_a_stranger_is_an_error_of_ours(root):
    write_shard(root, "s", {"a": rows_of(0, 3)})
    publish(root)
    (root / "catalogue.json").write_text("{")
    assert describe(open_store(root)).unpublished == 1
    spec = root / "features/motion/zarr.json"
    good = spec.read_text()
    for bad in ('{"attributes":' + "[" * 200_000, good.replace('"int16"', '"i4,("'), good.replace('"int16"', '"O"')):
        spec.write_text(bad)
        with pytest.raises(StoreFormatError):
            _ = open_store(root).features


def test_a_specification_changed_by_hand_is_noticed(root):
    file = root / "features/motion/zarr.json"
    file.write_text(file.read_text().replace('"cell": 8', '"cell": 4'))
    with pytest.raises(StoreFormatError, match="digest"):
        _ = open_store(root).features


def test_describe_adds_up(root):
    write_shard(root, "s", {"a": rows_of(0, 3), "b": rows_of(1, 5)}, failed=["c"])
    publish(root)
    labels = pa.table(
        {
            "id": ["a", "b"],
            "label": ["x", "y"],
            "group": pa.nulls(2, pa.string()),
            "split_1": ["train", "test"],
        }
    )
    write_labels(root, labels, ["y", "x"])
    store = open_store(root)
    assert store.classes == ["y", "x"]
    info = describe(store)
    assert (info.videos, info.frames, info.unpublished) == (3, 8, 0)
    assert info.features[0].rows == 8
    assert info.features[0].failures == {"truncated": 1}
    assert info.splits == {"1": {"test": 1, "train": 1}}
    write_shard(root, "better", {"c": rows_of(2, 4)})
    publish(root)
    assert describe(open_store(root)).unpublished == 0
    write_shard(root, "later", {"d": rows_of(0, 2)})
    assert describe(open_store(root)).unpublished == 1


def test_the_store_knows_no_heavy_library():
    code = "import sys, moclip.store; print(sorted({'torch', 'av', 'dask', 'distributed'} & set(sys.modules)))"
    import subprocess

    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"
