"""What a store promises, on every backend: both containers, on a disk and in a bucket."""

import multiprocessing
import os
import pickle
import threading
from concurrent.futures import ProcessPoolExecutor
from operator import methodcaller

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from s3 import set_variables
from shards import SPEC, rows_of, write_shard

from moclip.errors import FeatureError
from moclip.store import (
    FeatureSpec,
    ShardWriter,
    SourceFacts,
    add_feature,
    describe,
    failed_entries,
    open_store,
    publish,
    tables,
    write_labels,
)

#: How many frames each video has, and its grid.
LENGTHS = st.lists(st.tuples(st.integers(1, 40), st.sampled_from([(3, 4), (2, 2), (30, 40)])), min_size=1, max_size=8)


class TestContract:
    """Each test runs on each backend; ``root`` is the address of an empty store with the feature `motion`."""

    @pytest.fixture
    def root(self, new_root):
        return new_root()

    def test_gather_gives_the_rows_that_were_written(self, new_root, backend):
        # A bucket takes 50 requests an example.
        examples = settings(max_examples=12 if backend == "disk" else 4, deadline=None)
        examples(given(LENGTHS)(lambda lengths: self.check_gather(new_root(), lengths)))()

    def check_gather(self, root, lengths):
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

    def test_only_a_receipt_makes_rows_count(self, root):
        write_shard(root, "s", {"a": rows_of(0, 3)})
        unfinished = ShardWriter(root, feature="motion", spec=SPEC, shard="killed")
        unfinished.append(rows_of(1, 3), pts_seconds=[0, 1, 2], picture_type=[1, 2, 2])
        unfinished.ok(SourceFacts("b"))
        publish(root)
        assert open_store(root).ids("motion") == ["a"]

    def test_ok_beats_failed_and_newer_beats_older(self, root):
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

    def test_a_failed_entry_is_a_row_and_never_zeros(self, root):
        write_shard(root, "s", {"a": rows_of(0, 3)}, failed=["b"])
        publish(root)
        store = open_store(root)
        assert failed_entries(store) == [
            {"id": "b", "feature": "motion", "reason": "truncated", "detail": "nothing decodes"}
        ]
        with pytest.raises(FeatureError, match="its entry failed"):
            store.gather("motion", ["a", "b"], [0, 0])

    def test_frames_and_columns_are_checked(self, root):
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

    def test_a_name_belongs_to_one_specification(self, root):
        add_feature(root, "motion", SPEC)
        other = FeatureSpec("motion", "int16", "quarter pixel", {"version": 1, "cell": 16})
        with pytest.raises(FeatureError, match=r"cell: 8 there, 16 asked for.*--as NAME"):
            add_feature(root, "motion", other)

    def test_embedding_stands_for_the_only_one(self, root):
        spec = FeatureSpec("embedding", "float16", "1", {})
        with pytest.raises(FeatureError, match="'embedding' is not there"):
            open_store(root).resolve("embedding")
        add_feature(root, "embedding-a", spec)
        assert open_store(root).resolve("embedding") == "embedding-a"
        add_feature(root, "embedding-b", spec)
        with pytest.raises(FeatureError, match="ambiguous"):
            open_store(root).resolve("embedding")

    def test_source_columns_keep_their_types_and_clash_as_text(self, root):
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

    def test_a_receipt_that_comes_while_the_tables_are_written_is_in_them(self, root, monkeypatch):
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

    def test_two_publishers_lose_nothing(self, root):
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

    def test_content_does_not_depend_on_blocks_or_shards(self, root):
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

    def test_a_store_pickles_and_reopens(self, root):
        write_shard(root, "s", {"a": rows_of(0, 3)})
        publish(root)
        store = open_store(root)
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(store)).read("motion", "a"), rows_of(0, 3))

    @pytest.mark.parametrize("method", ["spawn", "forkserver"])
    def test_a_store_is_read_in_other_processes(self, root, method):
        write_shard(root, "s", {"a": rows_of(0, 3)})
        publish(root)
        context = multiprocessing.get_context(method)
        with ProcessPoolExecutor(1, context, set_variables, (dict(os.environ),)) as pool:
            np.testing.assert_array_equal(
                pool.submit(methodcaller("read", "motion", "a"), open_store(root)).result(60), rows_of(0, 3)
            )

    def test_reading_after_a_fork_is_an_error_and_not_a_hang(self, root, monkeypatch):
        write_shard(root, "s", {"a": rows_of(0, 3)})
        publish(root)
        store = open_store(root)
        monkeypatch.setattr("os.getpid", lambda: -1)
        with pytest.raises(FeatureError, match="spawn"):
            store.read("motion", "a")

    def test_entries_of_a_replaced_file_are_dead(self, root):
        write_shard(root, "s1", {"a": rows_of(0, 3), "b": rows_of(1, 3)})
        writer = ShardWriter(root, feature="motion", spec=SPEC, shard="s2")
        writer.fail(SourceFacts("a", "a.avi", 2000), "truncated", "the new file is broken")
        writer.finish()
        publish(root)
        store = open_store(root)
        assert store.ids("motion") == ["b"]
        assert failed_entries(store)[0]["id"] == "a"

    def test_describe_adds_up(self, root):
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
        assert (info.videos, info.frames, info.unpublished, info.container) == (3, 8, 0, store.container)
        assert info.features[0].rows == 8
        assert info.features[0].failures == {"truncated": 1}
        assert info.splits == {"1": {"test": 1, "train": 1}}
        write_shard(root, "better", {"c": rows_of(2, 4)})
        publish(root)
        assert describe(open_store(root)).unpublished == 0
        write_shard(root, "later", {"d": rows_of(0, 2)})
        assert describe(open_store(root)).unpublished == 1
