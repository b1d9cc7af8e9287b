"""The store's promises: rows come back, only receipts count, what is there stays, damage is an error."""

import errno
import re
import shutil
import subprocess
import sys

import h5py
import numpy as np
import pyarrow as pa
import pytest
import zarr
from shards import SPEC, rewrite_table, rows_of, write_shard

from moclip.errors import StoreFormatError, StoreNotFoundError
from moclip.store import (
    FeatureSpec,
    ShardWriter,
    SourceFacts,
    add_feature,
    compare,
    create_store,
    describe,
    first_difference,
    open_store,
    parquet_bytes,
    publish,
    write_atomic,
)
from moclip.store.containers import hdf5, zarr_arrays
from moclip.store.files import LocalFolder
from moclip.store.parquet import read_parquet


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "store.zarr"
    create_store(root)
    add_feature(root, "motion", SPEC)
    return root


def test_rows_larger_than_a_block_go_out_as_they_come(root, monkeypatch):
    monkeypatch.setattr(zarr_arrays, "SHARD_BYTES", 40_000)
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


def test_first_difference(root, tmp_path):
    other = tmp_path / "other.zarr"
    shutil.copytree(root, other)

    def difference():
        for store in (root, other):
            publish(store)
        return first_difference(open_store(root), open_store(other))

    write_shard(root, "s", {"a": rows_of(0, 3), "b": rows_of(1, 3)})
    write_shard(other, "t1", {"b": rows_of(1, 3)})
    assert "motion: entries only in" in difference()
    write_shard(other, "t2", {"a": rows_of(0, 3)})
    assert difference() is None
    write_shard(other, "t3", {"a": rows_of(2, 3)})
    assert "motion: videos with other values: 1 of 2" in difference()
    write_shard(other, "t4", {"a": rows_of(2, 4)})
    assert "rows of another number, shape or length: 1" in difference()


def test_a_comparison_says_how_far_rows_are_apart(root, tmp_path):
    other = tmp_path / "other.zarr"
    shutil.copytree(root, other)
    rows = rows_of(0, 40)
    apart = rows.copy()
    apart[7] += 3
    write_shard(root, "s", {"a": rows, "b": rows})
    write_shard(other, "t", {"a": apart, "b": rows}, failed=["c"])
    publish(root)
    publish(other)
    found = compare(open_store(root), open_store(other))
    (motion,) = found.features
    x, y = rows.astype(float), apart.astype(float)
    cosine = (x[7] * y[7]).sum() / np.linalg.norm(x[7]) / np.linalg.norm(y[7])
    assert (motion.common, motion.equal, motion.only_a, motion.only_b) == (2, 1, 0, 1)
    assert motion.rows.max_abs == 3
    assert motion.rows.mean_abs == pytest.approx(3 / 40)
    assert motion.rows.min_cosine == pytest.approx(cosine)
    assert motion.rows.mean_cosine == pytest.approx((39 + cosine) / 40)
    assert motion.rows.worst == "a"
    assert not motion.values_match
    assert not found.matches


def test_embeddings_match_within_rounding(tmp_path):
    spec = FeatureSpec("embedding", "float16", "1", {}, {}, ("channel",))
    rows = np.random.default_rng(0).normal(0, 1, (3, 512)).astype(np.float16)
    for name, factor in (("a", 1.0), ("b", 1.001), ("c", np.linspace(0.8, 1.2, 512))):
        create_store(tmp_path / name)
        add_feature(tmp_path / name, "embedding-x", spec)
        writer = ShardWriter(tmp_path / name, feature="embedding-x", spec=spec, shard="s")
        writer.append((rows * factor).astype(np.float16))
        writer.ok(SourceFacts("v"))
        writer.finish()
        publish(tmp_path / name)
    a, b, c = (open_store(tmp_path / name) for name in "abc")
    assert compare(a, b).matches
    assert first_difference(a, b) is None
    assert not compare(a, c).matches


def test_values_that_are_no_numbers_match_nothing(tmp_path):
    stores = []
    spec = FeatureSpec("embedding", "float16", "1", {})
    for name, value in (("a", 1.0), ("b", np.nan)):
        create_store(tmp_path / name)
        add_feature(tmp_path / name, "embedding", spec)
        writer = ShardWriter(tmp_path / name, feature="embedding", spec=spec, shard="s")
        writer.append(np.array([[1, 1], [1, value]]))
        writer.ok(SourceFacts("v"))
        writer.finish()
        publish(tmp_path / name)
        stores.append(open_store(tmp_path / name))
    found = compare(*stores).features[0]
    assert not found.values_match
    assert found.rows.min_cosine == 0
    assert np.isnan(found.rows.max_abs)


@pytest.fixture
def many_files(tmp_path, monkeypatch):
    """A store of six HDF5 shards, of which two may be open."""
    monkeypatch.setattr(hdf5, "_OPEN_FILES", 2)
    create_store(tmp_path / "many", "hdf5")
    add_feature(tmp_path / "many", "motion", SPEC)
    for k in range(6):
        write_shard(tmp_path / "many", f"s{k}", {f"v{k}": rows_of(k, 3)})
    publish(tmp_path / "many")
    return open_store(tmp_path / "many")


def test_files_that_were_not_used_lately_are_closed(many_files):
    def opened():
        return h5py.h5f.get_obj_count(h5py.h5f.OBJ_ALL, h5py.h5f.OBJ_FILE)

    before = opened()
    for _ in range(2):
        np.testing.assert_array_equal(
            many_files.gather("motion", [f"v{k}" for k in range(6)], [1] * 6), [rows_of(k, 3)[1] for k in range(6)]
        )
        assert opened() <= before + 2


def test_a_process_that_can_open_no_more_files_sees_no_damage(many_files, monkeypatch):
    def refuse(self, name):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(LocalFolder, "open", refuse)
    with pytest.raises(OSError, match="Too many") as raised:
        many_files._reader.open("features/motion/s0", "3x4", "value", "int16", 1)
    assert not isinstance(raised.value, StoreFormatError)


def test_a_table_that_holds_the_checksum_s_own_words_is_read_back():
    table = pa.table({"moclip.sha256": ["0" * 64, "moclip.sha256" + "0" * 64]})
    data = parquet_bytes(table)
    assert read_parquet(data)[0].equals(table)
    for position in range(len(data)):
        bad = bytearray(data)
        bad[position] ^= 0x10
        with pytest.raises(StoreFormatError):
            read_parquet(bytes(bad))


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


FORKED = """
import os, sys
from moclip.errors import FeatureError
from moclip.store import open_store

store = open_store(sys.argv[1])
store.read("motion", "a")
child = os.fork()
if not child:
    refused = 0
    for opened in (lambda: store, lambda: open_store(sys.argv[1])):
        try:
            opened().read("motion", "a")
        except FeatureError:
            refused += 1
    os._exit(40 + refused)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), len(store.read("motion", "a")))
"""


def test_a_forked_child_gets_an_error_whatever_it_opens(root):
    write_shard(root, "s", {"a": rows_of(0, 3)})
    publish(root)
    command = [sys.executable, "-c", FORKED, str(root)]
    assert subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.split() == ["42", "3"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    write_atomic(tmp_path / "f", b"old")

    def fail(*_):
        raise OSError("no space")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="no space"):
        write_atomic(tmp_path / "f", b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("f", b"old")]


def test_what_is_no_store_is_said_so(tmp_path, root):
    with pytest.raises(StoreNotFoundError, match="nothing is there"):
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
    for shard in ("../../..", "/etc", "s/../../x", ".hidden"):
        rewrite_table(root / "entries.parquet", shard=shard)
        with pytest.raises(StoreFormatError, match="cannot be a name"):
            open_store(root).read("motion", "a")


def test_a_table_that_claims_more_rows_than_there_are_is_refused(root):
    write_shard(root, "s", {"a": rows_of(0, 3)})
    publish(root)
    rewrite_table(root / "entries.parquet", row_stop=10**12)
    with pytest.raises(StoreFormatError, match="name 1000000000000 rows"):
        open_store(root).read("motion", "a")


def test_a_header_that_claims_as_much_as_the_table_is_refused(root):
    write_shard(root, "s", {"a": rows_of(0, 3)})
    publish(root)
    rewrite_table(root / "entries.parquet", row_stop=2**40)
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
        lambda path: rewrite_table(path, status="great"),
        lambda path: rewrite_table(path, feature="other"),
        lambda path: rewrite_table(path, metadata={"format": 99}),
        lambda path: rewrite_table(path, metadata={"written_at": 1e30}),
    ],
)
def test_a_bad_receipt_is_named_with_what_to_do(root, change):
    write_shard(root, "s", {"a": rows_of(0, 3)})
    change(root / "receipts/motion/s.parquet")
    with pytest.raises(StoreFormatError, match=r"receipts/motion/.*extract again"):
        publish(root)


def test_rows_of_another_specification_do_not_count(root):
    write_shard(root, "s", {"a": rows_of(0, 3)})
    write_shard(root, "t", {"b": rows_of(0, 3)})
    rewrite_table(root / "receipts/motion/t.parquet", metadata={"digest": "0" * 16})
    publish(root)
    assert open_store(root).ids("motion") == ["a"]


@pytest.mark.parametrize("files", range(6))
def test_a_store_whose_making_was_cut_short_is_completed(tmp_path, monkeypatch, files):
    real, written = LocalFolder.create, []

    def create(self, name, data):
        if len(written) == files:
            (root / ".half.tmp").write_bytes(b"")
            raise KeyboardInterrupt
        written.append(name)
        real(self, name, data)

    root = tmp_path / "store.zarr"
    root.mkdir()
    monkeypatch.setattr(LocalFolder, "create", create)
    with pytest.raises(KeyboardInterrupt):
        create_store(root)
    monkeypatch.setattr(LocalFolder, "create", real)
    create_store(root)
    assert len(open_store(root).entries) == 0


def test_odd_metadata_of_a_stranger_is_an_error_of_ours(root):
    write_shard(root, "s", {"a": rows_of(0, 3)})
    publish(root)
    (root / "catalogue.json").write_text("{")
    with pytest.raises(StoreFormatError, match="verify --repair"):
        describe(open_store(root))
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


def test_the_store_knows_no_heavy_library():
    code = "import sys, moclip.store; print(sorted({'torch', 'av', 'dask', 'distributed'} & set(sys.modules)))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"
