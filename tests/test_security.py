"""A stranger's store: nothing in it runs, leads elsewhere, or takes memory that its files do not warrant."""

import hashlib
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import zlib
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorstore as ts
import timm
import torch
import videos
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shards import SPEC, rewrite_table, rows_of, write_shard

from moclip.errors import MoclipError, StoreFormatError
from moclip.pipeline.backbones import EncoderConfig
from moclip.pipeline.extract import jobs
from moclip.pipeline.extract.features import FeatureRequest
from moclip.store import (
    ShardWriter,
    SourceFacts,
    add_feature,
    create_store,
    failed_entries,
    open_store,
    parquet_bytes,
    publish,
    verify,
    write_labels,
)
from moclip.store.files import open_folder

VALUE = "3x4/value"


def new_store(root, container, frames=5):
    create_store(root, container)
    add_feature(root, "motion", SPEC)
    write_shard(root, "s", {"a": rows_of(0, frames)})
    publish(root)
    return root


@pytest.fixture
def root(tmp_path, container):
    return new_store(tmp_path / "store", container)


@pytest.fixture
def zarr_root(tmp_path):
    return new_store(tmp_path / "store", "zarr")


@pytest.fixture
def hdf5_root(tmp_path):
    return new_store(tmp_path / "store", "hdf5")


def refused(root, message="."):
    with pytest.raises(StoreFormatError, match=message):
        open_store(root).read("motion", "a")


def read_everything(root):
    store = open_store(root)
    return store.videos, store.labels, store.classes, store.read("motion", "a")


def with_little_memory(code, *arguments):
    """Run ``code`` in a process that may take 4 GiB beyond what the libraries take, threads and all; what it prints."""
    start = (
        "import resource, sys; from pathlib import Path; import moclip.store, h5py, tensorstore, pyarrow.parquet\n"
        "used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 4 * 2**30,) * 2)\n"
        "from moclip.store import open_store; from moclip.errors import MoclipError\n"
        "try:\n    " + code + "\nexcept MoclipError as error:\n    print('refused:', error)\n"
    )
    done = subprocess.run([sys.executable, "-c", start, *arguments], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


READ = "open_store(sys.argv[1]).read('motion', 'a')"


class TestLinks:
    @pytest.mark.parametrize(
        "name",
        ["videos.parquet", "entries.parquet", "labels.parquet", "zarr.json", "features/motion/zarr.json", "features"],
    )
    def test_a_link_in_place_of_a_file_or_folder_is_refused(self, root, name, tmp_path):
        os.replace(root / name, tmp_path / "elsewhere")
        (root / name).symlink_to(tmp_path / "elsewhere")
        with pytest.raises(StoreFormatError, match="link"):
            read_everything(root)

    def test_a_link_in_place_of_a_shard_is_refused_and_found(self, root, tmp_path):
        shard = next(path for path in (root / "features/motion").iterdir() if path.name.startswith("s"))
        os.replace(shard, tmp_path / "elsewhere")
        shard.symlink_to(tmp_path / "elsewhere")
        refused(root, "link")
        assert verify(root)

    def test_a_link_in_place_of_a_chunk_is_refused(self, zarr_root, tmp_path):
        (chunk,) = (path for path in (zarr_root / "features/motion/s" / VALUE / "c").rglob("*") if path.is_file())
        os.replace(chunk, tmp_path / "elsewhere")
        chunk.symlink_to(tmp_path / "elsewhere")
        refused(zarr_root, "link")

    def test_a_link_in_place_of_a_receipt_is_refused(self, root, tmp_path):
        receipt = root / "receipts/motion/s.parquet"
        os.replace(receipt, tmp_path / "elsewhere")
        receipt.symlink_to(tmp_path / "elsewhere")
        with pytest.raises(StoreFormatError, match="link"):
            publish(root)

    def test_nothing_is_deleted_behind_a_link(self, root, tmp_path):
        outside = tmp_path / "outside"
        outside.mkdir()
        (outside / "mine").write_text("keep")
        (root / "features/other").symlink_to(outside)
        with pytest.raises(StoreFormatError, match="link"):
            open_folder(root).delete("features/other/mine")
        assert (outside / "mine").exists()

    def test_a_pipe_is_refused_and_not_waited_for(self, root):
        (root / "labels.parquet").unlink()
        os.mkfifo(root / "labels.parquet")
        with pytest.raises(StoreFormatError, match="pipe"):
            _ = open_store(root).labels
        assert any(problem.path == "labels.parquet" for problem in verify(root))

    def test_a_receipt_names_files_of_its_own_only(self, root):
        for name in ("../../outside", "/etc/passwd", "features/motion/t/x", "zarr.json", "features/motion/s/../t"):
            rewrite_table(root / "receipts/motion/s.parquet", {"files": {name: {"bytes": 1, "sha256": ""}}})
            with pytest.raises(StoreFormatError, match="not its own"):
                publish(root)

    def test_the_catalogue_leads_nowhere(self, root):
        catalogue = root / "catalogue.json"
        for text in (
            "[]",
            "{}",
            '{"files": [], "receipts": {}, "sha256": ""}',
            "[" * 100_000,
            '{"a": NaN}',
            "1" * 5000,
        ):
            catalogue.write_text(text)
            assert [problem.path for problem in verify(root)] == ["catalogue.json"]


class TestHdf5:
    @pytest.fixture
    def change(self, hdf5_root):
        def change(make, drop=True):
            with h5py.File(hdf5_root / "features/motion/s.h5", "r+", libver=("v110", "v110")) as file:
                if drop:
                    del file[VALUE]
                make(file)

        return change

    @pytest.mark.parametrize(
        "link",
        [h5py.SoftLink("/3x4/copy"), h5py.ExternalLink("other.h5", f"/{VALUE}"), h5py.ExternalLink("/etc/passwd", "/")],
    )
    def test_links_are_refused(self, hdf5_root, change, link):
        shutil.copy(hdf5_root / "features/motion/s.h5", hdf5_root / "features/motion/other.h5")

        def make(file):
            file.move(VALUE, "3x4/copy")
            file[VALUE] = link

        change(make, drop=False)
        refused(hdf5_root, "link")

    def test_rows_in_other_files_are_refused(self, hdf5_root, change, tmp_path):
        (tmp_path / "secret").write_bytes(bytes(240))
        outside = [(str(tmp_path / "secret"), 0, h5py.h5f.UNLIMITED)]
        change(lambda file: file.create_dataset(VALUE, (5, 2, 3, 4), "<i2", external=outside))
        refused(hdf5_root, "own numbers")

    def test_virtual_datasets_are_refused(self, hdf5_root, change):
        layout = h5py.VirtualLayout((5, 2, 3, 4), "<i2")
        layout[:] = h5py.VirtualSource("/etc/other.h5", "x", (5, 2, 3, 4))
        change(lambda file: file.create_virtual_dataset(VALUE, layout))
        refused(hdf5_root, "own numbers")

    @pytest.mark.parametrize(
        "dtype", [h5py.vlen_dtype("i2"), h5py.string_dtype(), h5py.ref_dtype, h5py.regionref_dtype]
    )
    def test_objects_are_refused(self, hdf5_root, change, dtype):
        change(lambda file: file.create_dataset(VALUE, (5,), dtype, chunks=(5,)))
        refused(hdf5_root, "its specification says int16")

    @pytest.mark.parametrize("compression", ["lzf", None])
    def test_other_filters_are_refused(self, hdf5_root, change, compression):
        about = {"chunks": (5, 2, 3, 4), "compression": compression, "fletcher32": True}
        change(lambda file: file.create_dataset(VALUE, (5, 2, 3, 4), "<i2", **about))
        refused(hdf5_root, "other filters")

    def test_a_header_that_claims_too_much_is_refused(self, hdf5_root, change):
        about = {"compression": "gzip", "fletcher32": True, "shuffle": True}
        change(lambda file: file.create_dataset(VALUE, (2**40, 2, 3, 4), "<i2", chunks=(341, 2, 3, 4), **about))
        rewrite_table(hdf5_root / "entries.parquet", row_stop=2**40)
        refused(hdf5_root, "lacks some of its chunks")

    def test_chunks_that_claim_too_much_are_refused(self, hdf5_root, change):
        about = {"compression": "gzip", "fletcher32": True, "shuffle": True, "maxshape": (None, 2, 3, 4)}
        change(lambda file: file.create_dataset(VALUE, (5, 2, 3, 4), "<i2", chunks=(2**24, 2, 3, 4), **about))
        refused(hdf5_root, "never so")

    def test_a_chunk_that_inflates_without_end_takes_little_memory(self, hdf5_root, change):
        def make(file):
            about = {"compression": "gzip", "fletcher32": True, "shuffle": True}
            data = file.create_dataset(
                VALUE, (5, 2, 3, 4), "<i2", chunks=(341, 2, 3, 4), maxshape=(None, 2, 3, 4), **about
            )
            bomb = zlib.compress(bytes(14 * 2**20), 9)
            data.id.write_direct_chunk((0, 0, 0, 0), bomb + fletcher32(bomb))

        change(make)
        with_little_memory(READ, str(hdf5_root))


def fletcher32(data):
    """HDF5's checksum of ``data``, as it lies behind a chunk."""
    low = high = 0
    for at in range(0, len(data) - 1, 2):
        low = (low + (data[at] << 8 | data[at + 1])) % 65535
        high = (high + low) % 65535
    if len(data) % 2:
        low = (low + (data[-1] << 8)) % 65535
        high = (high + low) % 65535
    return (high << 16 | low).to_bytes(4, "little")


class TestZarr:
    def change(self, root, edit):
        header = root / "features/motion/s" / VALUE / "zarr.json"
        about = json.loads(header.read_text())
        edit(about)
        header.write_text(json.dumps(about))

    @pytest.mark.parametrize("codec", ["gzip", "zstd"])
    def test_other_codecs_are_refused(self, zarr_root, codec):
        """They can make gigabytes of a few bytes, and have no checksum."""

        def edit(about):
            inner = about["codecs"][0]["configuration"]
            inner["codecs"] = [inner["codecs"][0], {"name": codec, "configuration": {"level": 1}}]

        self.change(zarr_root, edit)
        refused(zarr_root, "other codecs")

    @pytest.mark.parametrize("codecs", [[{"name": "bytes", "configuration": {"endian": "little"}}], [], "x", [{}]])
    def test_arrays_without_checksums_are_refused(self, zarr_root, codecs):
        self.change(zarr_root, lambda about: about.update(codecs=codecs))
        refused(zarr_root)

    @pytest.mark.parametrize(
        "changed",
        [
            {"shape": [5, 2, 3, 3]},
            {"shape": [5, 2, 3, 5]},
            {"shape": [5, 2, 3]},
            {"shape": [-5, 2, 3, 4]},
            {"shape": [5, 2, 3, 2**61]},
            {"shape": [float("nan")]},
            {"shape": [1e400]},
            {"shape": [10**40, 2, 3, 4]},
            {"data_type": "string"},
            {"data_type": "float16"},
            {"data_type": {"name": "python_object"}},
            {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [10**9, 2, 3, 4]}}},
            {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [0, 0, 0, 0]}}},
            {"storage_transformers": [{"name": "x"}]},
            {"chunk_key_encoding": {"name": "../../../.."}},
        ],
        ids=str,
    )
    def test_odd_headers_are_refused(self, zarr_root, changed):
        self.change(zarr_root, lambda about: about.update(changed))
        refused(zarr_root)

    def test_a_deep_header_is_refused(self, zarr_root):
        header = zarr_root / "features/motion/s" / VALUE / "zarr.json"
        header.write_text('{"attributes":' + "[" * 100_000 + "]" * 100_000 + "}")
        assert "refused:" in with_little_memory(READ, str(zarr_root))

    def test_a_chunk_that_inflates_without_end_is_refused(self, zarr_root, tmp_path):
        """A hundred megabytes of zeros, all checksums right; a chunk of blosc holds two gigabytes at most."""
        spec = json.loads((zarr_root / "features/motion/s" / VALUE / "zarr.json").read_text())
        array = zarr_root / "features/motion/s" / VALUE
        shutil.rmtree(array)
        big = {**spec, "shape": [341 * 2**13, 2, 3, 4], "fill_value": 1}
        grid = [341 * 2**13, 2, 3, 4]
        big["chunk_grid"]["configuration"]["chunk_shape"] = grid
        big["codecs"][0]["configuration"]["chunk_shape"] = grid
        store = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{array}/"}, "metadata": big, "create": True}
        ts.open(store).result().write(0).result()
        small = json.loads((array / "zarr.json").read_text())
        small["shape"][0] = 5
        small["chunk_grid"]["configuration"]["chunk_shape"][0] = 341
        small["codecs"][0]["configuration"]["chunk_shape"][0] = 341
        (array / "zarr.json").write_text(json.dumps(small))
        assert sum(path.stat().st_size for path in array.rglob("*") if path.is_file()) < 10**6
        assert "refused: the array" in with_little_memory(READ, str(zarr_root))


class TestTables:
    def write(self, path, table):
        path.write_bytes(parquet_bytes(table))

    def test_nothing_in_a_table_is_unpickled(self, root):
        """Arrow's old extension types were pickles; pandas' metadata names types."""
        labels = pa.table({"id": ["a"], "label": ["x"], "group": ["g"], "split_1": ["test"]})
        evil = pickle.dumps(Evil(root / "ran"))
        extension = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": evil}
        schema = pa.schema([*labels.schema, pa.field("odd", pa.int64(), metadata=extension)])
        table = labels.append_column("odd", pa.array([1])).cast(schema)
        table = table.replace_schema_metadata(
            {"pandas": '{"columns": [{"numpy_type": "object"}]}', "moclip": '{"classes": []}'}
        )
        self.write(root / "labels.parquet", table)
        assert open_store(root).labels["id"].to_pylist() == ["a"]
        assert not (root / "ran").exists()

    def test_text_that_is_no_text_is_refused(self, root):
        table = pa.table({"id": pa.array([b"\xff\xfe"], pa.binary()), "label": ["x"], "group": ["g"]})
        data = pa.Array.from_buffers(pa.string(), 1, table["id"].chunk(0).buffers())
        self.write(root / "labels.parquet", table.set_column(0, "id", data))
        with pytest.raises(StoreFormatError, match="UTF"):
            _ = open_store(root).labels

    @pytest.mark.parametrize("column", ["../../x", "", "/etc/passwd", "a\0b", "..", "\ud800", "x y"])
    def test_columns_of_a_specification_are_plain_names(self, root, column):
        about = json.loads((root / "features/motion/zarr.json").read_text())
        about["attributes"]["moclip"]["specification"]["columns"][column] = "float64"
        (root / "features/motion/zarr.json").write_text(json.dumps(about))
        with pytest.raises(StoreFormatError, match="plain name"):
            _ = open_store(root).features

    @pytest.mark.parametrize("name", ["id", "label", "split_1"])
    @pytest.mark.parametrize("column", [[1], [[1]], [{"a": 1}], [b"a"]])
    def test_columns_of_other_types_are_refused(self, root, name, column):
        table = pa.table({"id": ["a"], "label": ["x"], "group": ["g"], "split_1": ["test"]})
        self.write(root / "labels.parquet", table.set_column(table.column_names.index(name), name, pa.array(column)))
        with pytest.raises(StoreFormatError, match="column"):
            _ = open_store(root).labels

    def test_a_few_bytes_that_claim_many_rows_are_refused(self, root):
        n = 300_000_000
        sink = pa.BufferOutputStream()
        column = pa.DictionaryArray.from_arrays(pa.array(np.zeros(10**6, np.int8)), pa.array(["x" * 1000]))
        block = pa.table({"id": column})
        with pq.ParquetWriter(sink, block.schema, compression="zstd", write_statistics=False) as writer:
            for _ in range(n // 10**6):
                writer.write_table(block)
            writer.add_key_value_metadata({"moclip.sha256": "0" * 64})
        data = signed(sink.getvalue().to_pybytes())
        assert len(data) < 10**6
        (root / "videos.parquet").write_bytes(data)
        assert "refused:" in with_little_memory("open_store(sys.argv[1]).videos", str(root))

    def test_a_page_that_claims_more_than_memory_is_refused(self, root):
        """Each byte of a table's pages is changed in turn, its checksum made right."""
        whole = parquet_bytes(
            pa.table({"id": ["a"], "label": ["x"], "group": ["g"]}).replace_schema_metadata(
                {"moclip": '{"classes": []}'}
            )
        )
        for k in range(0, 120, 8):
            bad = bytearray(whole)
            bad[4 + k : 4 + k + 4] = b"\xff\xff\xff\x7f"
            (root / f"{k}.bad").write_bytes(signed(bytes(bad)))
        code = (
            "import shutil\n"
            "    for path in sorted(Path(sys.argv[1]).glob('*.bad')):\n"
            "        shutil.copy(path, Path(sys.argv[1], 'labels.parquet'))\n"
            "        try:\n            open_store(sys.argv[1]).labels\n"
            "        except MoclipError:\n            print('no')"
        )
        assert "no" in with_little_memory(code, str(root))

    @pytest.mark.parametrize(
        "about",
        [
            {"written_at": float("nan")},
            {"written_at": float("inf")},
            {"written_at": -(10**30)},
            {"written_at": "x"},
            {"files": {"features/motion/s/x": {"bytes": float("nan"), "sha256": ""}}},
            {"files": {"features/motion/s/x": {"bytes": -1, "sha256": ""}}},
            {"files": {"features/motion/s/x\0y": {"bytes": 1, "sha256": ""}}},
            {"files": {"features/motion/s/x": []}},
            {"files": [1]},
            {"specification": None},
            {"format": "x"},
            {"feature": "../.."},
        ],
        ids=str,
    )
    def test_odd_metadata_of_a_receipt_is_an_error_of_ours(self, root, about):
        rewrite_table(root / "receipts/motion/s.parquet", about)
        with pytest.raises(MoclipError):
            publish(root)
        assert [problem.path for problem in verify(root)][-1] == "receipts/motion/s.parquet"

    @pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 3), (4, 2), (0, 2**62), (2**62, 2**62 + 1), (None, 3)])
    def test_row_ranges_that_are_none_are_refused(self, root, start, stop):
        rewrite_table(root / "entries.parquet", row_start=start, row_stop=stop)
        refused(root)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def signed(data):
    """The Parquet file ``data`` with a checksum that is right, as a stranger would make who knows the format."""
    at = data.rindex(b"moclip.sha256") + 15
    blank = data[:at] + b"0" * 64 + data[at + 64 :]
    return blank[:at] + hashlib.sha256(blank).hexdigest().encode() + blank[at + 64 :]


IDS = st.one_of(
    st.text(min_size=1, max_size=30),
    st.sampled_from(
        [
            "../../etc/passwd",
            "/etc/passwd",
            "a\nb",
            "a\0b",
            "..",
            ".",
            "<script>alert(1)</script>",
            "\x1b[2J",
            "é" * 10_000,
        ]
    ),
    st.sampled_from(["CON", "a/b\\c", "%2e%2e/", "s3://bucket/key", "'; DROP TABLE videos; --", "\u202egpj.exe", " "]),
)


@given(st.lists(IDS, unique=True, min_size=1, max_size=6))
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_ids_may_be_anything_and_are_no_paths(new_root, ids):
    root = new_root()
    write_shard(root, "s", {video: rows_of(i, 2) for i, video in enumerate(ids)}, failed=[video + "!" for video in ids])
    publish(root)
    table = pa.table({"id": ids, "label": ids, "group": ids, "split_1": ["test"] * len(ids)})
    write_labels(root, table, ids)
    store = open_store(root)
    assert store.ids("motion") == sorted(set(ids), key=lambda text: text.encode())
    for i, video in enumerate(ids):
        np.testing.assert_array_equal(store.read("motion", video), rows_of(i, 2))
    assert {row["id"] for row in failed_entries(store)} == {video + "!" for video in ids} - set(ids)
    assert store.classes == ids
    assert {name.split("/")[0] for name in open_folder(root).files()} <= {
        "zarr.json",
        "features",
        "receipts",
        "videos.parquet",
        "entries.parquet",
        "labels.parquet",
        "catalogue.json",
    }
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789./_-x5") for name in open_folder(root).files())


def all_bytes(root):
    """Every file of a store, and its name; what is compressed, as it is read."""
    for path in sorted(Path(root).rglob("*")):
        yield str(path.relative_to(root)).encode()
        if path.is_file():
            yield path.read_bytes()
        if path.suffix == ".parquet":
            table = pq.read_table(path)
            yield repr((table.to_pylist(), table.schema.metadata)).encode()
        if path.suffix == ".h5":
            with h5py.File(path) as file:
                yield repr(dict(file.attrs)).encode()


def test_a_store_does_not_tell_of_the_machine_that_made_it(tmp_path, container, without_dask):
    folder = tmp_path / "secret home"
    clips = folder / "clips"
    (clips / "left").mkdir(parents=True)
    videos.make_clip(clips / "left/good.mp4")
    videos.text_file(clips / "left/text.mp4")
    videos.truncated_mp4(clips / "left/cut.mp4")
    videos.audio_only(clips / "left/sound.mp4")
    (clips / "left/folder.mp4").mkdir()
    (clips / "left/gone.mp4").symlink_to(folder / "nowhere.mp4")
    weights = folder / "weights.pth"
    torch.save(timm.create_model("test_vit", pretrained=False).state_dict(), weights)
    root = folder / "store"
    create_store(root, container)
    request = FeatureRequest(encoder=EncoderConfig("timm:test_vit", str(weights)))
    listed = folder / "list.txt"
    listed.write_text("".join(f"{path}\n" for path in sorted((clips / "left").iterdir())))
    for source in (clips, listed):
        jobs.run(jobs.prepare(jobs.Job(source, root, request)))
    assert {"not_video", "truncated"} <= {row["reason"] for row in failed_entries(open_store(root))}
    secrets = [b"secret home", str(tmp_path).encode(), str(Path.home()).encode() + b"/"]
    if len(socket.gethostname()) > 5:
        secrets.append(socket.gethostname().encode())
    for data in all_bytes(root):
        for secret in secrets:
            assert secret not in data, data[max(0, data.index(secret) - 200) :][:400]


def test_details_of_failures_carry_no_folders(new_root):
    root = new_root()
    writer = ShardWriter(root, feature="motion", spec=SPEC, shard="s")
    for i, detail in enumerate(
        ("[Errno 5] no: '/home/me and/you/a.avi'", "error in /home/me/b.avi: bad, 3/4, s3://x/y")
    ):
        writer.fail(SourceFacts(str(i)), "error", detail)
    writer.finish()
    publish(root)
    assert [row["detail"] for row in failed_entries(open_store(root))] == [
        "[Errno 5] no: 'a.avi'",
        "error in b.avi: bad, 3/4, s3://x/y",
    ]
