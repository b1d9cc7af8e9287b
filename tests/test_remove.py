"""Taking videos out of a store: nothing of them stays, nothing else changes, and a kill at any moment is made good."""

import io
import shutil

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
from corpora import IMAGE, label, noise
from shards import SPEC, write_shard

from moclip.errors import SourceError, StoreFormatError
from moclip.store import (
    FeatureSpec,
    ShardWriter,
    SourceFacts,
    add_feature,
    create_store,
    fold_store,
    list_receipts,
    open_folder,
    open_store,
    plan_removal,
    publish,
    remove_videos,
)
from moclip.store.files import LocalFolder
from moclip.store.receipts import read_receipt

#: One byte a number, and noise: what is stored of it is the noise itself, or noise of the same length.
BYTES = FeatureSpec("noise", "uint8", "1", {"version": 1})
ROW = 64


def rows_of(seed, count):
    return np.frombuffer(noise(seed, count * ROW), np.uint8).reshape(count, ROW)


def write(root, shard, videos, *, failed=(), size=1000, written_at=None):
    """``videos``: id -> seed. A failed one leaves rows too, as one does whose decoding stops half-way."""
    writer = ShardWriter(root, feature="noise", spec=BYTES, shard=shard)
    for video, seed in videos.items():
        writer.append(rows_of(seed, 40))
        facts = SourceFacts(f"video-{video}", f"{video}.avi", size, extra={"title": f"title of {video}"})
        if video in failed:
            writer.fail(facts, "truncated", f"video-{video} ends")
        else:
            writer.ok(facts)
    return writer.finish(versions={"made": shard}, written_at=written_at)


def write_files(root, videos):
    writer = ShardWriter(root, feature="image", spec=IMAGE, shard="files")
    for video, seed in videos.items():
        writer.append_bytes([noise(seed, 504), noise(seed + 1, 304)], frame_index=[0, 5])
        writer.ok(SourceFacts(f"video-{video}", f"{video}.avi", 1000))
    writer.finish()


def everything(root):
    """Every byte of a store's files, by name; tables, receipts and HDF5's datasets decompressed too."""
    folder = open_folder(root)
    for name in folder.files():
        data = folder.read(name)
        yield name, data
        if name.endswith(".parquet"):
            table = pq.read_table(io.BytesIO(data))
            yield f"{name} as text", str(table.to_pylist()).encode() + str(table.schema.metadata).encode()
        if name.endswith(".h5"):
            yield f"{name} as numbers", b"".join(datasets(data))


def datasets(data):
    with h5py.File(io.BytesIO(data)) as file:
        found = []
        file.visititems(lambda _, item: found.append(item[()].tobytes()) if isinstance(item, h5py.Dataset) else None)
    return found


def mentions(root, *needles):
    return {name for name, data in everything(root) for needle in needles if needle in data}


def state(root, without=()):
    """What the receipts amount to, but for the shards' names: facts, entries' contents, labels, rows."""
    folded = fold_store(root)
    gone = {f"video-{video}" for video in without}
    columns = ["id", "feature", "status", "reason", "detail", "content"]
    tables = (folded.entries.select(columns), folded.videos, open_store(root).labels)
    return [[row for row in table.to_pylist() if row["id"] not in gone] for table in tables]


@pytest.fixture
def corpus(new_root):
    """a to e in four shards: live, failed, replaced, and dead entries; one shard is only of a."""
    root = new_root()
    add_feature(root, "noise", BYTES)
    add_feature(root, "image", IMAGE)
    write(root, "s1", {"a": 1, "b": 2, "c": 3}, written_at=10)
    write(root, "s2", {"d": 4, "a": 5, "e": 6}, failed="ae", written_at=20)
    write(root, "s3", {"c": 7}, size=2000, written_at=30)
    write(root, "s4", {"a": 8}, written_at=5)
    write_shard(root, "m", {"video-b": np.zeros((3, 2, 3, 4), np.int16)})
    write_files(root, {"b": 20, "a": 30, "d": 40})
    labels = {f"video-{video}": ("run", "train") for video in "abcd"}
    label(root, labels, ["run", "jump"])
    publish(root)
    return root


def traces(data):
    """What a file holds where noise lies in it: the bytes themselves, or after a bit shuffle each bit of them."""
    numbers = np.frombuffer(data, np.uint8)
    planes = (np.packbits(numbers >> bit & 1, bitorder="little").tobytes() for bit in range(8))
    return [data[:64], *(plane[:32] for plane in planes)]


#: All noise of the video a: in a live entry, in a failed one, in a replaced one, and in its images.
NOISE_OF_A = [noise(seed, 40 * ROW) for seed in (1, 5, 8)] + [noise(30, 504), noise(31, 304)]
TRACES_OF_A = [trace for data in NOISE_OF_A for trace in traces(data)]


class TestRemove:
    def test_nothing_of_the_videos_stays_and_all_else_does(self, corpus):
        write_orphans(corpus)
        before = state(corpus, without="a")
        gone = remove_videos(corpus, ["video-a", "video-x"])
        assert (gone.ids, gone.absent, gone.entries) == (("video-a",), ("video-x",), 4)
        assert mentions(corpus, b"video-a", b"title of a", b"a.avi", *TRACES_OF_A) == set()
        assert state(corpus) == before
        store = open_store(corpus)
        assert store.ids("noise") == ["video-b", "video-c", "video-d"]
        np.testing.assert_array_equal(store.read("noise", "video-d"), rows_of(4, 40))
        np.testing.assert_array_equal(store.read("noise", "video-c"), rows_of(7, 40))
        assert store.read_bytes("image", "video-d") == [noise(40, 504), noise(41, 304)]
        assert store.classes == ["run", "jump"]
        folder = open_folder(corpus)
        receipts = [read_receipt(folder, name) for name in list_receipts(folder)]
        named = {name for receipt in receipts for name in receipt.files}
        groups = {name for name in folder.files("features") if name.count("/") < 3 and "zarr.json" in name}
        assert set(folder.files("features")) - groups == named
        assert {receipt.versions.get("made") for receipt in receipts} >= {"s1", "s2", "s3"}
        assert {receipt.written_at for receipt in receipts} >= {10, 20, 30}

    def test_the_noise_is_found_where_it_is(self, corpus):
        """What the test above does not find, it would find if it were there."""
        assert all(mentions(corpus, needle) for needle in (b"video-a", b"title of a"))
        assert all(mentions(corpus, *traces(data)) for data in NOISE_OF_A)

    def test_all_videos_can_go(self, corpus):
        remove_videos(corpus, [f"video-{video}" for video in "abcde"])
        store = open_store(corpus)
        assert len(store.videos) == len(store.entries) == len(store.labels) == 0
        assert list(store.features) == ["image", "motion", "noise"]
        assert all(name.endswith("zarr.json") for name in open_folder(corpus).files("features"))
        assert mentions(corpus, b"video-") == set()

    def test_a_plan_changes_nothing_and_unknown_ids_are_an_error(self, corpus):
        files = open_folder(corpus).files()
        plan = plan_removal(corpus, ["video-a", "video-e"])
        assert [name.split("/", 1)[1] for name in plan.receipts] == [
            "image/files.parquet",
            "noise/s1.parquet",
            "noise/s2.parquet",
            "noise/s4.parquet",
        ]
        assert (plan.entries, plan.unfinished) == (5, ())
        for act in (plan_removal, remove_videos):
            with pytest.raises(SourceError, match="none of the 1 videos named: 'video-x'"):
                act(corpus, ["video-x"])
        assert open_folder(corpus).files() == files


class TestKilled:
    """On a disk, where each change of a file can be counted."""

    @pytest.fixture(params=["disk"])
    def new_root(self, request, container, tmp_path):
        def new():
            create_store(tmp_path / "store", container)
            add_feature(tmp_path / "store", "motion", SPEC)
            return str(tmp_path / "store")

        return new

    def changes(self, monkeypatch, stop_at=None):
        """Counts changes of the store's files; the one with number ``stop_at`` does not happen any more."""
        made = []
        for method in ("write", "delete"):
            monkeypatch.setattr(LocalFolder, method, self.counting(getattr(LocalFolder, method), made, stop_at))
        return made

    @staticmethod
    def counting(real, made, stop_at):
        def change(folder, name, *data):
            if len(made) == stop_at:
                raise KeyboardInterrupt
            made.append(name)
            return real(folder, name, *data)

        return change

    def test_a_kill_at_any_moment(self, corpus, monkeypatch, tmp_path, container):
        before = state(corpus, without="a")
        fresh = tmp_path / "fresh"
        shutil.copytree(corpus, fresh)
        with monkeypatch.context() as patch:
            made = self.changes(patch)
            remove_videos(fresh, ["video-a"])
        assert len(made) > 20
        # A Zarr store has several times the files, and the same order of things.
        for stop_at in range(0, len(made), 1 if container == "hdf5" else 5):
            root = tmp_path / f"killed{stop_at}"
            shutil.copytree(corpus, root)
            with monkeypatch.context() as patch:
                self.changes(patch, stop_at)
                with pytest.raises(KeyboardInterrupt):
                    remove_videos(root, ["video-a"])
            store = open_store(root)
            for video, seed in (("b", 2), ("c", 7), ("d", 4)):
                np.testing.assert_array_equal(store.read("noise", f"video-{video}"), rows_of(seed, 40))
            assert state(root, without="a") == before
            self.finish(root)
            assert mentions(root, b"video-a", b"title of a", *TRACES_OF_A) == set()
            assert state(root) == before
            shutil.rmtree(root)

    @staticmethod
    def finish(root):
        try:
            remove_videos(root, ["video-a"])
        except SourceError:  # everything was done already
            assert not plan_is_due(root)

    def test_damaged_rows_of_another_video_stop_it(self, corpus):
        folder = open_folder(corpus)
        (name,) = [name for name in folder.files("features/noise") if "s1" in name and ("/c/" in name or ".h5" in name)]
        data = bytearray(folder.read(name))
        at = data.find(noise(2, 32))
        at = at if at >= 0 else len(data) // 2
        data[at : at + 8] = b"\0" * 8
        folder.write(name, bytes(data))
        names = set(folder.files())
        with pytest.raises(StoreFormatError):
            remove_videos(corpus, ["video-a"])
        assert names <= set(folder.files())


def plan_is_due(root):
    try:
        return bool(plan_removal(root, ["video-a"]).ids)
    except SourceError:
        return False


def write_orphans(root):
    """What a killed run leaves: a shard without its receipt, and half-written files."""
    folder = open_folder(root)
    write(root, "killed", {"a": 1, "b": 2})
    folder.delete("receipts/noise/killed.parquet")
    folder.write("features/noise/.half.h5.tmp", noise(1, 40 * ROW))
    folder.write(".videos.parquet.12345678.tmp", b"video-a")
