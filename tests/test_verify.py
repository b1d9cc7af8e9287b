"""What `verify` finds and `repair` mends; and that what is damaged is an error and never other numbers."""

import os
import random
import shutil

import numpy as np
import pyarrow as pa
import pytest
from shards import SPEC, rewrite_table, rows_of, write_shard

from moclip.errors import MoclipError, StoreFormatError, StoreNotFoundError
from moclip.store import (
    FeatureSpec,
    ShardWriter,
    SourceFacts,
    add_feature,
    create_store,
    open_folder,
    open_store,
    publish,
    repair,
    verify,
    write_labels,
)

IMAGES = FeatureSpec("image", "uint8", "1", {"version": 1}, {"pts_seconds": "float64"}, ("byte",))
LABELS = pa.table({"id": ["a", "b"], "label": ["x", "y"], "group": ["g", None], "split_1": ["train", "test"]})
CATALOGUE = "catalogue.json"


def fill(root):
    """Two shards of motion, one of images, labels."""
    write_shard(root, "s", {"a": rows_of(0, 5), "b": rows_of(1, 3)}, failed=["c"])
    write_shard(root, "t", {"d": rows_of(2, 4)}, extra={"note": "of d"})
    add_feature(root, "image", IMAGES)
    writer = ShardWriter(root, feature="image", spec=IMAGES, shard="i")
    for video, frames in (("a", 5), ("b", 3)):
        writer.append_bytes([video.encode() * 40, b"", b"end"], pts_seconds=[0, 1, 2])
        writer.ok(SourceFacts(video, f"{video}.avi", 1000, frames=frames))
    writer.finish()
    publish(root)
    write_labels(root, LABELS, ["x", "y"])


def contents(root):
    """All that a reader can see of a store."""
    store = open_store(root)
    found = {"classes": store.classes, "features": {name: spec.to_json() for name, spec in store.features.items()}}
    for name in ("videos", "entries", "labels"):
        found[name] = getattr(store, name).to_pylist()
    for video in store.ids("motion"):
        for column in ("value", *SPEC.columns):
            found[video, column] = store.read("motion", video, column).tolist()
    for video in store.ids("image"):
        found[video] = (store.read_bytes("image", video), store.read("image", video, "pts_seconds").tolist())
    return found


def found(root):
    return {problem.path: problem.kind for problem in verify(root)}


@pytest.fixture
def root(new_root):
    root = new_root()
    fill(root)
    return root


@pytest.fixture
def local(tmp_path, container):
    root = tmp_path / "store"
    create_store(root, container)
    add_feature(root, "motion", SPEC)
    fill(root)
    return root


def flip(folder, name, at=None):
    data = bytearray(folder.read(name))
    data[len(data) // 2 if at is None else at] ^= 4
    folder.write(name, bytes(data))


def test_a_whole_store_has_no_problems_and_is_read_whole(root):
    steps = []
    assert verify(root, steps.append) == []
    files = open_folder(root).files()
    assert steps[-1].all_files == len(files) > steps[-1].files > len(files) - 12
    assert steps[-1].all_bytes == sum(files.values()) > steps[-1].bytes > 0
    before = open_folder(root).files()
    repaired = repair(root)
    assert (repaired.problems, repaired.again, repaired.deleted, repaired.remaining) == ((), (), (), ())
    assert open_folder(root).files() == before


def test_every_file_is_missed_and_every_flip_is_found(local):
    root, folder = local, open_folder(local)
    for name in folder.files():
        good = folder.read(name)
        flip(folder, name)
        assert found(root)[name] in ("damaged", "stale"), name
        folder.write(name, good + b" ")
        assert name in found(root), name
        folder.delete(name)
        if name != "zarr.json" or folder.exists(CATALOGUE):
            assert found(root)[name] == "missing", name
        folder.write(name, good)
    assert found(root) == {}


def test_repair_mends_what_receipts_tell(local):
    root, folder = local, open_folder(local)
    whole = contents(root)
    for name in (
        "zarr.json",
        "features/zarr.json",
        "features/motion/zarr.json",
        "videos.parquet",
        "entries.parquet",
        CATALOGUE,
    ):
        for damage in (flip, lambda folder, name: folder.delete(name)):
            damage(folder, name)
            repaired = repair(root)
            assert name in repaired.written
            assert (repaired.again, repaired.remaining) == ((), ())
            assert verify(root) == []
            assert contents(root) == whole
    for name in ("zarr.json", "features/motion/zarr.json", "videos.parquet", CATALOGUE):
        folder.delete(name)
    repair(root)
    assert verify(root) == []
    assert contents(root) == whole


def test_lost_labels_become_empty_ones_and_damaged_ones_are_left(root):
    folder = open_folder(root)
    flip(folder, "labels.parquet")
    (left,) = repair(root).remaining
    assert (left.path, left.kind) == ("labels.parquet", "damaged")
    folder.delete("labels.parquet")
    assert repair(root).written == ("labels.parquet",)
    assert len(open_store(root).labels) == 0
    assert verify(root) == []


def test_a_damaged_shard_is_extracted_again(root):
    lose_and_extract_again(root, "file")


@pytest.mark.parametrize("what", ["receipt", "no receipt", "no file"])
def test_videos_of_a_shard_that_is_not_whole_are_extracted_again(local, what):
    lose_and_extract_again(local, what)


def lose_and_extract_again(root, what):
    folder = open_folder(root)
    whole = contents(root)
    shard = sorted(name for name in folder.files() if name.startswith("features/motion/s"))[-1]
    name = shard if "file" in what else "receipts/motion/s.parquet"
    if what.startswith("no "):
        folder.delete(name)
    else:
        flip(folder, name)
    repaired = repair(root, orphan_age_s=0) if what == "no receipt" else repair(root)
    assert repaired.again == (("a", "motion"), ("b", "motion"), ("c", "motion"))
    assert not any(name.startswith("features/motion/s") for name in folder.files())
    assert repaired.remaining == ()
    assert verify(root) == []
    assert open_store(root).ids("motion") == ["d"]
    write_shard(root, "again", {"a": rows_of(0, 5), "b": rows_of(1, 3)}, failed=["c"])
    publish(root)
    again = contents(root)
    for entry in (*whole["entries"], *again["entries"]):
        entry.pop("shard")
    assert again == whole


def test_what_came_since_the_tables_is_no_problem(root):
    write_shard(root, "new", {"e": rows_of(3, 2)})
    add_feature(root, "other", SPEC)
    assert verify(root) == []
    flip(open_folder(root), "receipts/motion/new.parquet")
    assert found(root) == {"receipts/motion/new.parquet": "damaged"}


def test_a_publishing_that_was_cut_short_is_found(root):
    folder = open_folder(root)
    old = folder.read(CATALOGUE)
    write_shard(root, "new", {"e": rows_of(3, 2)})
    publish(root)
    folder.write(CATALOGUE, old)
    assert found(root) == {"entries.parquet": "stale", "videos.parquet": "stale"}
    assert repair(root).again == ()
    assert verify(root) == []


def test_a_run_that_publishes_meanwhile_is_no_problem(local, monkeypatch):
    real = open_folder(local).__class__.read
    write_shard(local, "new", {"e": rows_of(3, 2)})

    def read(self, name):
        if name == "videos.parquet":
            monkeypatch.undo()
            publish(local)
        return real(self, name)

    monkeypatch.setattr(open_folder(local).__class__, "read", read)
    assert verify(local) == []


def test_leftovers_of_killed_tasks_go_when_they_are_old(local):
    folder = open_folder(local)
    unfinished = ShardWriter(local, feature="motion", spec=SPEC, shard="killed")
    unfinished.append(rows_of(1, 3), pts_seconds=[0, 1, 2], picture_type=[1, 2, 2])
    unfinished._files.finish()
    for array in unfinished._arrays["3x4"].values():
        array.finish() if open_store(local).container == "zarr" else None
    folder.write("features/motion/half/3x4/zarr.json", b"{")
    (local / ".videos.parquet.0123abcd.tmp").write_bytes(b"x")
    (local / "features/motion/.later.h5.tmp").write_bytes(b"x")
    (local / "notes.txt").write_text("mine")
    problems = found(local)
    killed = "features/motion/killed" + (".h5" if open_store(local).container == "hdf5" else "")
    orphans = {killed, "features/motion/half", ".videos.parquet.0123abcd.tmp", "features/motion/.later.h5.tmp"}
    assert problems == {**dict.fromkeys(orphans, "orphan"), "notes.txt": "extra"}
    assert {problem.path for problem in repair(local).remaining} == {*orphans, "notes.txt"}
    for name in folder.files("features"):
        if "killed" in name:
            os.utime(local / name, (0, 0))
    assert repair(local).deleted == (killed,)
    assert set(repair(local, orphan_age_s=0).deleted) == orphans - {killed}
    assert found(local) == {"notes.txt": "extra"}
    assert not (local / "features/motion/half").exists()


def test_an_extra_file_in_a_shard_is_found(root):
    folder = open_folder(root)
    for name in ("features/motion/s/3x4/value/c/7/0/0/0", "receipts/motion/s.txt", "features/motion/readme.txt"):
        folder.write(name, b"x")
    assert set(found(root).values()) == {"extra"}
    assert len(found(root)) == 3


def test_tables_that_are_not_what_receipts_say_are_stale(local):
    rewrite_table(local / "entries.parquet", reason="truncated")
    rewrite_table(local / "videos.parquet", codec="h264")
    assert found(local) == {"entries.parquet": "stale", "videos.parquet": "stale"}
    rewrite_table(local / "entries.parquet", shard="nowhere")
    problems = found(local)
    assert problems["receipts/motion/nowhere.parquet"] == problems["receipts/image/nowhere.parquet"] == "no_data"
    repair(local)
    assert verify(local) == []


def test_rows_beyond_the_arrays_are_found(local):
    rewrite_table(local / "receipts/motion/s.parquet", row_stop=10**9)
    publish(local)
    assert found(local) == {"receipts/motion/s.parquet": "no_data"}
    assert {video for video, _ in repair(local).again} == {"a", "b", "c"}


def test_what_the_disk_does_not_give_is_not_taken_for_damage(local, monkeypatch):
    real = open_folder(local).__class__.open

    def broken(self, name):
        if "motion/s" in name:
            raise OSError(5, "Input/output error")
        return real(self, name)

    monkeypatch.setattr(open_folder(local).__class__, "open", broken)
    assert set(found(local).values()) == {"unreadable"}
    before = open_folder(local).files()
    with pytest.raises(StoreFormatError, match="Nothing was changed"):
        repair(local)
    assert open_folder(local).files() == before


def test_what_is_no_store_or_a_newer_one_is_not_repaired(tmp_path, local):
    with pytest.raises(StoreNotFoundError):
        verify(tmp_path / "nowhere")
    mark = local / "zarr.json"
    mark.write_text(mark.read_text().replace('"format": 1', '"format": 2'))
    assert found(local) == {"zarr.json": "damaged"}  # the catalogue knows better
    (local / CATALOGUE).write_text("another one")
    for act in (verify, repair):
        with pytest.raises(StoreFormatError, match="upgrade"):
            act(local)


def test_a_flipped_byte_is_reported_and_never_read_as_other_numbers(local):
    """60 bytes of a store, file by file, each changed to another one: verify names it; reading raises or is right."""
    rng = random.Random(0)
    whole = contents(local)
    files = sorted(path for path in local.rglob("*") if path.is_file())
    for _ in range(60):
        path = rng.choice(files)
        good = path.read_bytes()
        at, bits = rng.randrange(len(good)), rng.randrange(1, 256)
        path.write_bytes(good[:at] + bytes([good[at] ^ bits]) + good[at + 1 :])
        where = f"{path.relative_to(local)} at {at}, {bits}"
        assert path.relative_to(local).as_posix() in found(local), where
        try:
            assert contents(local) == whole, where
        except MoclipError:
            pass
        path.write_bytes(good)


def test_old_times_do_not_matter(local):
    """What counts is whether a receipt names it: a copied store has new times, a restored one old ones."""
    for path in local.rglob("*"):
        os.utime(path, (0, 0))
    assert repair(local).deleted == ()
    other = local.with_name("copy")
    shutil.copytree(local, other)
    assert verify(other) == []
    np.testing.assert_array_equal(open_store(other).read("motion", "a"), rows_of(0, 5))
