"""Parts of stores as stores, several as one, and as a single file: what arrives is what was there, or an error."""

import json

import h5py
import numpy as np
import pytest
from corpora import IMAGE, LABELS, fill, images_of, label, write_images
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shards import SPEC, rewrite_table, rows_of, write_shard

from moclip.errors import FeatureError, SourceError, StoreFormatError
from moclip.store import (
    FeatureSpec,
    Selection,
    ShardWriter,
    SourceFacts,
    add_feature,
    create_store,
    export_hdf5_file,
    export_store,
    failed_entries,
    first_difference,
    merge_stores,
    open_folder,
    open_store,
    publish,
)
from moclip.store.copies import copying, filling, single_file
from moclip.store.receipts import list_receipts, read_receipt


@pytest.fixture
def source(tmp_path):
    root = tmp_path / "source.zarr"
    create_store(root)
    add_feature(root, "motion", SPEC)
    return str(fill(root))


@pytest.fixture
def out(tmp_path):
    return str(tmp_path / "out.zarr")


def rows_in(store):
    return {(row["id"], row["feature"], row["status"], row["reason"]) for row in store.entries.to_pylist()}


def copies_counted(monkeypatch, stop_at=None):
    """The shards that are copied from now on; the one with number ``stop_at`` is cut short before its receipt."""
    real, counted = ShardWriter.finish, []

    def finish(self, **given):
        if len(counted) == stop_at:
            raise KeyboardInterrupt
        counted.append(self._name)
        return real(self, **given)

    monkeypatch.setattr(ShardWriter, "finish", finish)
    return counted


class TestExport:
    def test_everything_arrives_on_every_backend(self, new_root, tmp_path, source, container):
        """From a disk to each backend and container, and back."""
        there, back = new_root() + "-copy", str(tmp_path / "back.zarr")
        copied = export_store(source, there, container=container)
        assert (copied.videos, copied.entries, copied.kept, copied.failed) == (5, 8, 0, 1)
        export_store(there, back)
        assert open_store(there).container == open_store(back).container == container
        for url in (there, back):
            copy = open_store(url)
            assert first_difference(open_store(source), copy) is None
            assert copy.videos.equals(open_store(source).videos)
            assert copy.labels.to_pylist() == open_store(source).labels.to_pylist()
            assert copy.classes == ["swim", "run", "jump"]
            assert failed_entries(copy) == failed_entries(open_store(source))
            assert copy.read_bytes("image", "e") == images_of(5)
            np.testing.assert_array_equal(copy.read("motion", "c"), rows_of(3, 40, (2, 2)))

    @pytest.mark.parametrize(
        ("selection", "motion", "classes"),
        [
            (Selection(features=("motion",)), "abcde", ["swim", "run", "jump"]),
            (Selection(split="1", parts=("train",)), "ac", ["run", "jump"]),
            (Selection(split="1", parts=("train", "val"), labels=("jump",)), "cd", ["jump"]),
            (Selection(split="1", labels=("jump", "swim"), ids=("e", "d", "a")), "de", ["swim", "jump"]),
        ],
    )
    def test_what_is_given_intersects(self, source, out, selection, motion, classes):
        export_store(source, out, selection)
        copy = open_store(out)
        there = {row for row in rows_in(open_store(source)) if row[0] in motion and row[1] in copy.features}
        assert rows_in(copy) == there
        assert copy.videos["id"].to_pylist() == copy.labels["id"].to_pylist() == list(motion)
        assert copy.classes == classes

    def test_an_abbreviated_feature_and_one_without_all_videos(self, source, out):
        export_store(source, out, Selection(features=("image",)))
        assert list(open_store(out).features) == ["image"]
        assert open_store(out).labels["id"].to_pylist() == ["a", "b", "e"]

    @pytest.mark.parametrize(
        ("selection", "message"),
        [
            (Selection(ids=("a", "nobody")), "1 of the videos .* 'nobody'"),
            (Selection(split="9"), "no split '9'; it has: 1"),
            (Selection(split="1", parts=("trian",)), "'trian'; it has 'test', 'train', 'val'"),
            (Selection(labels=("fly",)), "'fly'"),
            (Selection(ids=("a",), labels=("swim",)), "nothing of .* fits"),
            (Selection(ids=()), "nothing of .* fits"),
        ],
    )
    def test_what_is_not_there_is_said_and_nothing_is_made(self, source, tmp_path, selection, message):
        with pytest.raises(SourceError, match=message):
            export_store(source, tmp_path / "out", selection)
        with pytest.raises(FeatureError, match="is not there"):
            export_store(source, tmp_path / "out", Selection(features=("sound",)))
        assert not (tmp_path / "out").exists()

    def test_parts_are_of_a_split(self):
        with pytest.raises(SourceError, match="which split"):
            Selection(parts=("train",))

    def test_the_versions_that_made_the_rows_stay(self, source, out):
        writer = ShardWriter(source, feature="motion", spec=SPEC, shard="old")
        writer.append(rows_of(9, 2), pts_seconds=[0, 1], picture_type=[1, 2])
        writer.ok(SourceFacts("z"))
        old = writer.finish(versions={"av": "0.1"}, written_at=5)
        publish(source)
        export_store(source, out)
        folder = open_folder(out)
        receipts = [read_receipt(folder, name) for name in list_receipts(folder)]
        (copy,) = [receipt for receipt in receipts if "z" in receipt.rows["id"].to_pylist()]
        assert copy.versions == old.versions
        assert copy.rows["id"].to_pylist() == ["z"]
        assert all(receipt.written_at > 5 for receipt in receipts)

    @pytest.mark.parametrize("stop_at", [0, 1, 7])
    def test_an_interrupted_export_goes_on(self, source, out, monkeypatch, container, stop_at):
        self.check_going_on(source, out, monkeypatch, container, stop_at)

    def test_an_interrupted_export_to_a_bucket_goes_on(self, source, bucket, monkeypatch):
        self.check_going_on(source, f"{bucket}/copy", monkeypatch, "zarr", 2)

    def check_going_on(self, source, out, monkeypatch, container, stop_at):
        monkeypatch.setattr(filling, "SHARD_BYTES", 1)
        with monkeypatch.context() as patch:
            copies_counted(patch, stop_at)
            with pytest.raises(KeyboardInterrupt):
                export_store(source, out, container=container)
        assert len(open_store(out).entries) == 0
        reported = []
        counted = copies_counted(monkeypatch)
        copied = export_store(source, out, report=lambda done, total: reported.append((done, total)))
        assert copied.kept == stop_at
        assert len(counted) == copied.entries == 8 - stop_at
        assert reported == [(k, 8) for k in range(stop_at, 9)]
        assert first_difference(open_store(source), open_store(out)) is None
        assert export_store(source, out).entries == 0

    def test_a_larger_export_completes_a_smaller_one(self, source, out):
        export_store(source, out, Selection(labels=("run",)))
        assert export_store(source, out).kept == 4
        assert first_difference(open_store(source), open_store(out)) is None

    def test_a_store_with_other_things_is_left_alone(self, source, tmp_path, out):
        export_store(source, out)
        before = open_folder(out).files()
        other = FeatureSpec("motion", "int16", "quarter pixel", {"version": 2})
        for k, spoil in enumerate(
            (
                lambda root: write_shard(root, "x", {"new": rows_of(8, 2)}),
                lambda root: write_shard(root, "x", {"a": rows_of(8, 2)}),
                lambda root: add_feature(root, "accumulated", SPEC),
                lambda root: label(root, {"new": ("fly", "test")}, ["fly"]),
            )
        ):
            root = tmp_path / f"spoilt{k}"
            export_store(source, root)
            spoil(root)
            files = open_folder(root).files()
            with pytest.raises(StoreFormatError, match="not the beginning of this copy"):
                export_store(source, root)
            assert open_folder(root).files() == files
        with pytest.raises(StoreFormatError, match="not the beginning"):
            export_store(source, out, Selection(ids=("a",)))
        changed = tmp_path / "changed"
        create_store(changed)
        add_feature(changed, "motion", other)
        with pytest.raises(StoreFormatError, match="the feature 'motion'"):
            export_store(source, changed)
        assert open_folder(out).files() == before

    def test_labels_that_were_changed_in_the_copy_are_not_lost(self, source, out):
        export_store(source, out)
        label(out, {**LABELS, "a": ("walk", "train")}, ["walk"])
        with pytest.raises(SourceError, match=r"label of 'a' is 'walk' in .*moclip label"):
            export_store(source, out)

    def test_a_store_is_not_copied_into_itself(self, source):
        for out in (source, f"{source}/features/x", f"{source}/"):
            with pytest.raises(StoreFormatError, match="name another path"):
                export_store(source, out)

    def test_rows_that_are_not_what_was_written_are_named(self, source, out, monkeypatch):
        real = copying.read_ahead

        def read_ahead(started):
            for block in real(started):
                value = block.columns["value"]
                yield copying.Block({**block.columns, "value": value + 1}, block.lengths, block.last)

        monkeypatch.setattr(copying, "read_ahead", read_ahead)
        with pytest.raises(StoreFormatError, match=r"'a' in shard .* is not what was written"):
            export_store(source, out)
        assert list_receipts(open_folder(out)) == []

    @pytest.mark.parametrize("block_bytes", [1, 100, 1000])
    def test_videos_larger_than_a_block_come_in_pieces(self, source, out, monkeypatch, block_bytes):
        monkeypatch.setattr(copying, "BLOCK_BYTES", block_bytes)
        monkeypatch.setattr(copying, "_AHEAD_BYTES", 3 * block_bytes)
        export_store(source, out)
        assert first_difference(open_store(source), open_store(out)) is None
        assert open_store(out).read_bytes("image", "b") == images_of(2)

    def test_rows_that_a_table_claims_and_nothing_holds_are_an_error(self, source, out):
        file = open_folder(source).local / "entries.parquet"
        rewrite_table(file, row_stop=10**12)
        with pytest.raises(StoreFormatError, match="names 1000000000000 rows"):
            export_store(source, out)


class TestMerge:
    @given(
        st.lists(
            st.dictionaries(st.sampled_from("abcdef"), st.booleans(), min_size=1, max_size=6), min_size=1, max_size=3
        )
    )
    @settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_merging_is_the_union_where_ok_beats_failed(self, tmp_path_factory, held):
        base = tmp_path_factory.mktemp("merge")
        roots = []
        for k, videos in enumerate(held):
            roots.append(str(base / f"in{k}"))
            create_store(roots[-1], ("zarr", "hdf5")[k % 2])
            add_feature(roots[-1], "motion", SPEC)
            ok = {video: rows_of(ord(video), 3) for video, fine in videos.items() if fine}
            write_shard(roots[-1], "s", ok, failed=[video for video, fine in videos.items() if not fine])
            publish(roots[-1])
        merge_stores(roots, base / "out")
        out = open_store(base / "out")
        known = {video for videos in held for video in videos}
        fine = {video for videos in held for video in videos if videos[video]}
        assert set(out.videos["id"].to_pylist()) == known
        assert out.ids("motion") == sorted(fine)
        for video in fine:
            np.testing.assert_array_equal(out.read("motion", video), rows_of(ord(video), 3))

    @pytest.fixture
    def pair(self, tmp_path):
        """Two stores: motion of a and b, and of b and c with images of a; facts and labels of a in both."""
        first, second = str(tmp_path / "first"), str(tmp_path / "second")
        for root, container in ((first, "zarr"), (second, "hdf5")):
            create_store(root, container)
            add_feature(root, "motion", SPEC)
        write_shard(first, "s", {"a": rows_of(1, 3), "b": rows_of(2, 3)}, extra={"year": 1999})
        write_shard(second, "s", {"b": rows_of(2, 3), "c": rows_of(3, 3)}, extra={"place": "Oslo"})
        add_feature(second, "image", IMAGE)
        write_images(second, "i", {"a": images_of(1)})
        label(first, {"a": ("run", None), "b": ("jump", "train")}, ["run", "jump"])
        label(second, {"a": (None, "test"), "c": ("swim", "test")}, ["swim", "jump"])
        for root in (first, second):
            publish(root)
        return first, second

    def test_features_facts_and_labels_of_both(self, pair, out):
        assert merge_stores(pair, out).entries == 4
        merged = open_store(out)
        assert rows_in(merged) == rows_in(open_store(pair[0])) | rows_in(open_store(pair[1]))
        assert merged.videos.select(["id", "year", "place"]).to_pylist() == [
            {"id": "a", "year": 1999, "place": None},
            {"id": "b", "year": 1999, "place": "Oslo"},
            {"id": "c", "year": None, "place": "Oslo"},
        ]
        assert [tuple(row.values()) for row in merged.labels.to_pylist()] == [
            ("a", "run", None, "test"),
            ("b", "jump", None, "train"),
            ("c", "swim", None, "test"),
        ]
        assert merged.classes == ["run", "jump", "swim"]
        assert merge_stores(pair, out).kept == 4

    def test_a_column_of_two_types_becomes_text(self, pair, out):
        write_shard(pair[1], "t", {"d": rows_of(4, 3)}, extra={"year": "about 1900"})
        publish(pair[1])
        merge_stores(pair, out)
        assert open_store(out).videos["year"].to_pylist() == ["1999", "1999", None, "about 1900"]

    def test_a_column_called_like_a_fixed_one_has_one_name_in_all_shards(self, pair, out):
        write_shard(pair[0], "t", {"d": rows_of(4, 3)}, extra={"bytes": "mine"})
        publish(pair[0])
        merge_stores(pair, out)
        write_shard(out, "t", {"e": rows_of(5, 3)}, extra={"bytes": "mine"})
        publish(out)
        videos = open_store(out).videos
        assert [name for name in videos.column_names if name.startswith("extra.")] == ["extra.bytes"]
        assert videos["extra.bytes"].to_pylist() == [None, None, None, "mine", "mine"]

    def test_an_interrupted_merge_goes_on(self, pair, out, monkeypatch):
        with monkeypatch.context() as patch:
            copies_counted(patch, stop_at=1)
            with pytest.raises(KeyboardInterrupt):
                merge_stores(pair, out)
        assert merge_stores(pair, out).kept == 1
        assert open_store(out).ids("motion") == ["a", "b", "c"]

    def test_nothing_is_chosen_silently(self, pair, tmp_path):
        first, second = pair
        out = tmp_path / "out"

        def refused(error, message):
            with pytest.raises(error, match=message):
                merge_stores([first, second], out)
            assert not out.exists()

        label(second, {"a": ("walk", "test")}, ["walk"])
        refused(SourceError, "label of 'a' is 'run' in .*, 'walk' in")
        label(second, {"c": ("swim", "test")}, ["swim"])
        write_shard(second, "t", {"b": rows_of(7, 3)}, extra={"year": 2000})
        publish(second)
        refused(SourceError, "year of 'b' is 1999 in .*, 2000 in")
        write_shard(second, "u", {"b": rows_of(7, 3)})
        publish(second)
        refused(StoreFormatError, "1 entries have other rows.*'motion of b'")
        writer = ShardWriter(second, feature="motion", spec=SPEC, shard="v")
        writer.append(rows_of(7, 3), pts_seconds=[0, 1, 2], picture_type=[1, 2, 2])
        writer.ok(SourceFacts("b", bytes=77))
        writer.finish()
        publish(second)
        refused(SourceError, "not the same files in all stores, by their bytes: 'b'")

    def test_empty_stores_make_an_empty_one(self, tmp_path):
        for name in ("first", "second"):
            create_store(tmp_path / name)
            add_feature(tmp_path / name, "motion", SPEC)
        assert merge_stores([tmp_path / "first", tmp_path / "second"], tmp_path / "out").entries == 0
        assert list(open_store(tmp_path / "out").features) == ["motion"]

    def test_one_name_of_two_features_is_refused(self, pair, tmp_path):
        other = tmp_path / "other"
        create_store(other)
        add_feature(other, "motion", FeatureSpec("motion", "int16", "quarter pixel", {"version": 1, "cell": 4}))
        with pytest.raises(FeatureError, match=r"cell: 8 there, 4 asked for.*--feature"):
            merge_stores([pair[0], other], tmp_path / "out")
        with pytest.raises(SourceError, match="no stores"):
            merge_stores([], tmp_path / "out")


class TestSingleFile:
    def test_h5py_alone_reads_it(self, source, tmp_path):
        out = tmp_path / "all.h5"
        export_hdf5_file(source, out)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["all.h5", "source.zarr"]
        store = open_store(source)
        with h5py.File(out) as file:
            assert "h5py.File" in file.attrs["read_me"]
            assert json.loads(file["motion"].attrs["specification"]) == SPEC.to_json()
            assert file["motion"].attrs["digest"] == SPEC.digest
            index = file["motion/index"]
            assert list(index["id"].asstr()) == store.ids("motion") == list("abcd")
            for k, video in enumerate(index["id"].asstr()):
                array = file["motion"][index["array"].asstr()[k]]
                rows = slice(index["row_start"][k], index["row_stop"][k])
                for column in ("value", "pts_seconds", "picture_type"):
                    np.testing.assert_array_equal(array[column][rows], store.read("motion", video, column))
            known = {(row["id"], row["feature"]): row["content"] for row in store.entries.to_pylist()}
            assert [bytes.fromhex(text.decode()) for text in index["content"]] == [known[v, "motion"] for v in "abcd"]
            assert array["value"].dims[0].label == "row"
            assert array["value"].fletcher32
            assert [file["motion/failed"][name].asstr()[0] for name in ("id", "reason")] == ["e", "truncated"]
            self.check_images(file["image"], store)
            assert list(file["classes"].asstr()) == store.classes
            assert list(file["labels/split_1"].asstr()) == ["train", "test", "train", "val", "test"]
            assert list(file["labels/group"].asstr()) == [""] * 5
            assert list(file["videos/id"].asstr()) == list("abcde")
            assert file["videos/year"][:4].tolist() == [1999, 2001, 1999, 2001]
            assert np.isnan(file["videos/year"][4])
            assert list(file["videos/extra.bytes"].asstr()) == ["", "mine", "", "mine", ""]

    def check_images(self, group, store):
        index, array = group["index"], group["bytes"]
        for k, video in enumerate(index["id"].asstr()):
            stops = array["value_stop"][index["row_start"][k] : index["row_stop"][k]]
            first = array["value_stop"][index["row_start"][k] - 1] if index["row_start"][k] else 0
            files = [array["value"][a:b].tobytes() for a, b in zip([first, *stops[:-1]], stops, strict=True)]
            assert files == store.read_bytes("image", video)

    @pytest.mark.parametrize("stop_at", [1, 6, None])
    def test_an_interrupted_file_goes_on_from_its_parts(self, source, tmp_path, monkeypatch, stop_at):
        monkeypatch.setattr(filling, "SHARD_BYTES", 1)
        out = tmp_path / "all.h5"
        with monkeypatch.context() as patch:
            copies_counted(patch, stop_at)
            if stop_at is None:
                patch.setattr(single_file, "_write_table", self.interrupted)
            with pytest.raises(KeyboardInterrupt):
                export_hdf5_file(source, out)
        assert not out.exists()
        reported = []
        counted = copies_counted(monkeypatch)
        export_hdf5_file(source, out, report=lambda done, total: reported.append((done, total)))
        assert len(counted) == 8 - (8 if stop_at is None else stop_at)
        assert reported[-1] == (16, 16)
        with h5py.File(out) as file:
            assert list(file["motion/index/id"].asstr()) == list("abcd")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["all.h5", "source.zarr"]

    @staticmethod
    def interrupted(*_):
        raise KeyboardInterrupt

    def test_it_is_new_and_on_a_disk(self, source, tmp_path):
        (tmp_path / "there.h5").write_bytes(b"mine")
        with pytest.raises(StoreFormatError, match="is there already"):
            export_hdf5_file(source, tmp_path / "there.h5")
        assert (tmp_path / "there.h5").read_bytes() == b"mine"
        add_feature(source, "labels", SPEC)
        with pytest.raises(FeatureError, match="export to a store instead"):
            export_hdf5_file(source, tmp_path / "new.h5")

    def test_a_bucket_takes_stores_only(self, source, bucket):
        with pytest.raises(StoreFormatError, match="export a store there"):
            export_hdf5_file(source, f"{bucket}/all.h5")

    def test_a_feature_without_rows_has_an_empty_index(self, tmp_path):
        create_store(tmp_path / "failed")
        add_feature(tmp_path / "failed", "motion", SPEC)
        write_shard(tmp_path / "failed", "s", {}, failed=["a"])
        publish(tmp_path / "failed")
        export_hdf5_file(tmp_path / "failed", tmp_path / "failed.h5")
        with h5py.File(tmp_path / "failed.h5") as file:
            assert [len(file["motion/index"][name]) for name in ("id", "array", "row_start", "content")] == [0] * 4
            assert list(file["motion/failed/detail"].asstr()) == ["nothing decodes"]
            assert len(file["classes"]) == len(file["labels/id"]) == 0
