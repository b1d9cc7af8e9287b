"""Stores in a bucket: an extraction straight into one, and what becomes of it when requests go wrong."""

import math
import tempfile
import threading
from typing import get_args

import numpy as np
import pyarrow as pa
import pytest
import videos
from s3 import Fault, forget_clients
from shards import SPEC, rows_of, write_shard

from moclip.errors import StoreFormatError, StoreNotFoundError
from moclip.pipeline.extract import jobs, schedule
from moclip.pipeline.extract.features import FeatureRequest
from moclip.pipeline.extract.labelling import label_store
from moclip.store import (
    ShardWriter,
    add_feature,
    create_store,
    first_difference,
    open_folder,
    open_store,
    publish,
    remote,
    verify,
    write_labels,
)

REQUEST = FeatureRequest(kinds=("motion", "image"))
SECOND = "features/motion/second"
FAULTS = [fault for fault in get_args(Fault) if fault != "403"]
#: One PUT of each kind with the two errors that a storage mostly gives, and every other fault where it matters.
ALWAYS = [
    *(
        (fault, match)
        for fault in ("403", "503")
        for match in (SECOND, "receipts/", "videos.parquet", "catalogue.json")
    ),
    *((fault, "receipts/") for fault in ("500", "hang", "cut_request", "cut_response", "stored_then_500")),
    *((fault, SECOND) for fault in ("hang", "cut_request")),
]
#: What a store with one shard is made of, as parts of the paths that are written.
WRITTEN = {
    "zarr": ["/value/c/", "/value/zarr.json", "receipts/", "videos.parquet", "entries.parquet", "catalogue.json"],
    "hdf5": [".h5", "receipts/", "videos.parquet", "entries.parquet", "catalogue.json"],
}
OLD, NEW = {"old": rows_of(0, 3)}, {"new": rows_of(1, 4), "other": rows_of(2, 2, (5, 6))}


@pytest.fixture
def impatient(monkeypatch):
    """Gives up after a second or two where users wait for minutes."""
    monkeypatch.setattr(remote, "READ_S", 1)
    monkeypatch.setattr(remote, "ATTEMPTS", 1)


@pytest.fixture
def asking_twice(impatient, monkeypatch):
    monkeypatch.setattr(remote, "ATTEMPTS", 2)


@pytest.fixture
def root(bucket, container):
    """A store with one shard, published."""
    return new_store(f"{bucket}/store", container)


@pytest.fixture
def on_disk(tmp_path, container):
    """The same store on a disk, and with the second shard."""
    root = new_store(tmp_path / "store", container)
    write(root)
    return open_store(root)


def new_store(root, container):
    create_store(root, container)
    add_feature(root, "motion", SPEC)
    write_shard(root, "first", OLD)
    publish(root)
    return root


def write(root, shard="second"):
    write_shard(root, shard, NEW)
    publish(root)


def label_and_write(root):
    write_labels(root, pa.table({"id": ["old"], "label": ["x"]}), ["x"])
    write(root)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(4):
        clip = folder / ("left" if i % 2 else "right") / f"clip{i}.avi"
        clip.parent.mkdir(exist_ok=True)
        videos.make_clip(clip, frames=6 + i, seed=i)
    videos.text_file(folder / "left" / "broken.avi")
    return folder


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, corpus, run_tasks_here):
    store = tmp_path_factory.mktemp("undisturbed") / "store"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule, "run_tasks", run_tasks_here)
        extract(corpus, store)
    return open_store(store)


class TestExtraction:
    @pytest.mark.usefixtures("without_dask")
    def test_a_bucket_holds_what_a_disk_holds(self, tmp_path, bucket, container, corpus, undisturbed):
        store = f"{bucket}/some/store"
        extract(corpus, store, container)
        opened = open_store(store)
        assert opened.container == container
        assert first_difference(opened, undisturbed) is None
        ids = opened.ids("motion")
        for video in ids:
            np.testing.assert_array_equal(opened.read("motion", video), undisturbed.read("motion", video))
            assert opened.read_bytes("image", video) == undisturbed.read_bytes("image", video)
        picked, frames = ids * 3, np.arange(3 * len(ids)) % 6
        np.testing.assert_array_equal(
            opened.gather("motion", picked, frames), undisturbed.gather("motion", picked, frames)
        )
        table = tmp_path / "labels.csv"
        table.write_text("id,label\n" + "".join(f"{video},new\n" for video in ids))
        label_store(store, csv=table)
        publish(store)
        assert set(open_store(store).labels["label"].to_pylist()) == {"new", "left"}
        assert verify(store) == []
        assert jobs.prepare(jobs.Job(corpus, store, REQUEST, workers=1)).plan.videos == 0

    def test_processes_of_dask_write_into_a_bucket(self, bucket, corpus, undisturbed):
        summary = extract(corpus, f"{bucket}/store", workers=2)
        assert summary.ok == 8
        assert first_difference(open_store(f"{bucket}/store"), undisturbed) is None

    @pytest.mark.slow
    @pytest.mark.usefixtures("without_dask", "impatient")
    @pytest.mark.parametrize(
        ("match", "skip"), [("/features/motion/", 9), ("/receipts/image/", 1), ("entries.parquet", 1)]
    )
    def test_a_run_that_the_storage_fails_is_completed_by_the_next(self, s3, bucket, corpus, undisturbed, match, skip):
        store = f"{bucket}/store"
        s3.fail("503", math.inf, method="PUT", match=match, skip=skip)
        with pytest.raises(ConnectionError, match="does not answer"):
            extract(corpus, store)
        s3.clear()
        extract(corpus, store)
        assert first_difference(open_store(store), undisturbed) is None


def extract(source, store, container=None, workers=1):
    return jobs.run(jobs.prepare(jobs.Job(source, store, REQUEST, workers=workers, container=container)))


def quick_if(fault, faults):
    """All ``faults``, of which only ``fault`` is tried in the quick part of the tests."""
    return [pytest.param(each, marks=[] if each == fault else pytest.mark.slow) for each in faults]


@pytest.mark.usefixtures("impatient")
class TestWriting:
    @pytest.mark.usefixtures("asking_twice")
    @pytest.mark.parametrize("fault", quick_if("500", FAULTS))
    def test_what_fails_once_is_sent_again(self, s3, root, container, on_disk, fault):
        for match in WRITTEN[container]:
            s3.fail(fault, method="PUT", match=match)
        write(root)
        assert [request.fault for request in s3.requests].count(fault) == len(WRITTEN[container])
        assert first_difference(open_store(root), on_disk) is None
        assert verify(root) == []

    @pytest.mark.slow
    @pytest.mark.parametrize(("fault", "match"), ALWAYS)
    def test_what_always_fails_is_one_clear_error(self, s3, root, container, on_disk, fault, match):
        s3.fail(fault, math.inf, method="PUT", match=match)
        with pytest.raises(ConnectionError, match=rf"{root} does not answer, or refuses access"):
            write(root)
        s3.clear()
        assert shown(root) in ({"old"}, {"old", "new", "other"})
        write(root, "again")
        assert first_difference(open_store(root), on_disk) is None
        assert {problem.kind for problem in verify(root)} <= {"orphan"}

    @pytest.mark.slow
    def test_from_any_request_on_the_storage_may_be_gone(self, s3, root, container, on_disk):
        s3.clear()
        label_and_write(root)
        requests = len(s3.requests)
        assert requests < {"zarr": 45, "hdf5": 30}[container]
        seen = []
        for k in range(0, requests, {"zarr": 3, "hdf5": 2}[container]):
            copy = new_store(f"{root}-{k}", container)
            s3.clear()
            s3.fail("503", math.inf, skip=k)
            with pytest.raises(ConnectionError):
                label_and_write(copy)
            s3.clear()
            seen.append(len(shown(copy)))
            write(copy, "again")
            assert first_difference(open_store(copy), on_disk) is None
        assert seen == sorted(seen)  # the old shard, and from some request on the new one too
        assert set(seen) == {1, 3}

    @pytest.mark.slow
    def test_a_store_whose_making_failed_is_completed(self, s3, bucket):
        s3.clear()
        new_store(f"{bucket}/whole", "hdf5")
        for k in range(0, len(s3.requests), 3):
            s3.clear()
            s3.fail("500", math.inf, skip=k)
            with pytest.raises(ConnectionError):
                new_store(f"{bucket}/{k}", "hdf5")
            s3.clear()
            new_store(f"{bucket}/{k}", "hdf5")
            assert shown(f"{bucket}/{k}") == {"old"}

    def test_nothing_is_left_on_the_disk(self, s3, root, tmp_path, monkeypatch):
        staging = tmp_path / "staging"
        staging.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(staging))
        written = ShardWriter(root, feature="motion", spec=SPEC, shard="written")
        written.append(rows_of(0, 3), pts_seconds=[0, 1, 2], picture_type=[1, 2, 2])
        assert len(list(staging.iterdir())) == 1
        written.finish()
        assert list(staging.iterdir()) == []
        s3.fail("403", math.inf, method="PUT")
        failed = ShardWriter(root, feature="motion", spec=SPEC, shard="failed")
        failed.append(rows_of(0, 3), pts_seconds=[0, 1, 2], picture_type=[1, 2, 2])
        with pytest.raises(ConnectionError):
            failed.finish()
        assert list(staging.iterdir()) == []
        given_up = ShardWriter(root, feature="motion", spec=SPEC, shard="given-up")
        given_up.append(rows_of(0, 3), pts_seconds=[0, 1, 2], picture_type=[1, 2, 2])
        del given_up
        assert list(staging.iterdir()) == []


def shown(root):
    """The ids that a reader sees, whose rows are those that were written."""
    store = open_store(root)
    ids = store.ids("motion")
    for video, rows in zip(ids, store.read_all("motion", ids), strict=True):
        np.testing.assert_array_equal(rows, {**OLD, **NEW}[video])
    assert set(store.videos["id"].to_pylist()) >= set(ids)
    return set(ids)


@pytest.mark.usefixtures("impatient")
class TestReading:
    #: (method, part of the path) of the requests that reading a store makes.
    READ = (
        ("GET", "/zarr.json"),
        ("GET", "list-type=2"),
        ("GET", "entries.parquet"),
        ("GET", "videos.parquet"),
        ("GET", "/first"),
    )

    @pytest.mark.usefixtures("asking_twice")
    @pytest.mark.parametrize("fault", quick_if("500", [fault for fault in FAULTS if "stored" not in fault]))
    def test_what_fails_once_is_asked_again(self, s3, root, fault):
        s3.clear()
        for method, match in self.READ:
            s3.fail(fault, method=method, match=match)
        assert shown(root) == {"old"}
        assert [request.fault for request in s3.requests].count(fault) == len(self.READ)

    @pytest.mark.slow
    @pytest.mark.parametrize(("method", "match"), READ)
    @pytest.mark.parametrize("fault", ["403", "cut_response"])
    def test_what_always_fails_is_no_damage(self, s3, root, fault, method, match):
        self.check_that_it_is_no_damage(s3, root, fault, method, match)

    @pytest.mark.slow
    @pytest.mark.parametrize("match", ["videos.parquet", "/first"])
    def test_no_answer_is_no_damage(self, s3, root, match):
        self.check_that_it_is_no_damage(s3, root, "hang", "GET", match)

    def check_that_it_is_no_damage(self, s3, root, fault, method, match):
        s3.fail(fault, math.inf, method=method, match=match)
        with pytest.raises(ConnectionError, match="does not answer, or refuses access"):
            shown(root)
        s3.clear()
        assert shown(root) == {"old"}

    @pytest.mark.parametrize("fault", ["403", "500", "cut_response"])
    def test_a_file_that_cannot_be_reached_is_not_taken_for_missing(self, s3, root, fault):
        s3.fail(fault, math.inf, method="HEAD")
        s3.fail(fault, math.inf, method="GET", match="list-type=2")
        for ask in (lambda folder: folder.exists("zarr.json"), lambda folder: folder.children()):
            with pytest.raises(ConnectionError):
                ask(open_folder(root))
        with pytest.raises(ConnectionError):
            create_store(root)

    @pytest.mark.usefixtures("asking_twice")
    @pytest.mark.parametrize("fault", [None, "500", "cut_response"])
    def test_a_file_is_read_bit_by_bit(self, s3, root, monkeypatch, fault):
        monkeypatch.setattr(remote, "_BLOCK_BYTES", 100)
        folder = open_folder(root)
        whole = folder.read("videos.parquet")
        if fault:
            s3.fail(fault, method="GET", match="videos.parquet", skip=1)
        with folder.open("videos.parquet") as file:
            assert file.read(10) + file.read() == whole
            assert file.seek(-4, 2) == len(whole) - 4
            assert (file.read(), file.read()) == (b"PAR1", b"")
        with pytest.raises(FileNotFoundError):
            folder.open("nothing")

    def test_verify_says_what_the_storage_does_not_give(self, s3, root):
        s3.fail("500", math.inf, method="GET", match="features/motion/first")
        assert {problem.kind for problem in verify(root)} == {"unreadable"}
        s3.clear()
        assert verify(root) == []


class TestPlaces:
    @pytest.mark.parametrize("prefix", ["", "/", "/a b/ü", "/a#b+c%20d", "/a?b=c&d[*]", "//a//b//"])
    def test_any_prefix_will_do(self, bucket, container, prefix):
        root = new_store(bucket + prefix, container)
        write(root)
        assert shown(root) == {"old", "new", "other"}
        assert open_store(root).url == bucket + "/".join(["", *filter(None, prefix.split("/"))])
        assert verify(root) == []
        folder = open_folder(root)
        assert folder.children() == [
            "catalogue.json",
            "entries.parquet",
            "features",
            "labels.parquet",
            "receipts",
            "videos.parquet",
            "zarr.json",
        ]
        assert abs(folder.modified("zarr.json") - folder.modified("catalogue.json")) < 60
        folder.delete("catalogue.json")
        folder.delete("catalogue.json")
        assert not folder.exists("catalogue.json")

    def test_few_requests_are_made(self, s3, root, container):
        s3.clear()
        store = open_store(root)
        assert len(s3.requests) == 1
        store.read("motion", "old")
        assert len(s3.requests) == {"zarr": 7, "hdf5": 6}[container]
        store.read("motion", "old")
        assert len(s3.requests) == {"zarr": 7, "hdf5": 6}[container]
        s3.clear()
        write_shard(root, "second", {"new": rows_of(1, 2)})
        assert [request.method for request in s3.requests] == ["GET"] + ["PUT"] * {"zarr": 9, "hdf5": 2}[container]

    def test_a_neighbour_with_a_longer_name_is_another_store(self, bucket, container):
        new_store(f"{bucket}/store-2", container)
        with pytest.raises(StoreNotFoundError, match="nothing is there"):
            open_store(f"{bucket}/store")
        new_store(f"{bucket}/store", container)
        assert all(name.startswith("features/") for name in open_folder(f"{bucket}/store").files("features"))

    def test_a_bucket_that_is_not_there(self, s3):
        with pytest.raises(StoreNotFoundError, match="no moclip store at s3://no-such-bucket/store"):
            open_store("s3://no-such-bucket/store")
        with pytest.raises(StoreNotFoundError, match="there is no bucket no-such-bucket; make it first"):
            create_store("s3://no-such-bucket/store")
        for url in ("s3://", "s3:///", "s3://bucket/../other", "ftp://bucket/store"):
            with pytest.raises(StoreFormatError, match="expected"):
                open_store(url)

    def test_a_folder_of_something_else_is_left_alone(self, bucket):
        open_folder(f"{bucket}/papers").write("draft.txt", b"mine")
        with pytest.raises(StoreFormatError, match="not a moclip store"):
            create_store(f"{bucket}/papers")
        with pytest.raises(StoreNotFoundError, match=r"it has no zarr\.json"):
            open_store(f"{bucket}/papers")

    def test_no_credentials(self, bucket, monkeypatch):
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        forget_clients()
        with pytest.raises(ConnectionError, match=r"Unable to locate credentials.*check the network and the cred"):
            open_store(f"{bucket}/store")
        forget_clients()


@pytest.mark.parametrize("backend", ["disk", "s3"])
class TestTwoAtOnce:
    """Two runs that make one store at the same time."""

    @pytest.fixture
    def place(self, backend, tmp_path, request):
        return f"{tmp_path if backend == 'disk' else request.getfixturevalue('bucket')}/store"

    def test_the_first_one_decides_on_the_container(self, place):
        ended = {}

        def make(container):
            try:
                create_store(place, container)
                ended[container] = "made"
            except StoreFormatError as error:
                ended[container] = str(error)

        threads = [threading.Thread(target=make, args=(container,)) for container in ("zarr", "hdf5")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        first = open_store(place).container
        assert ended.pop(first) == "made"
        assert f"keeps its rows as {first}" in next(iter(ended.values()))

    def test_what_is_there_is_never_made_empty(self, place):
        folder = open_folder(place)
        create_store(place)
        write_labels(place, pa.table({"id": ["a"], "label": ["x"]}), ["x"])
        folder.create("labels.parquet", b"empty")
        assert open_store(place).classes == ["x"]
        folder.create("new", b"whole")
        assert folder.read("new") == b"whole"
        assert not [name for name in folder.files() if name.endswith(".tmp")]

    def test_a_storage_that_knows_no_creating_is_written_to(self, place, backend, monkeypatch):
        if backend == "disk":
            monkeypatch.setattr("os.link", lambda *paths: refuse())
        else:
            monkeypatch.setattr(remote.RemoteFolder, "_create", lambda *arguments: refuse())
        create_store(place)
        open_folder(place).create("labels.parquet", b"other")
        assert open_store(place).classes == []


def refuse():
    raise ConnectionError("501: not implemented")
