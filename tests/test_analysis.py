"""A store as Dask, pandas and xarray see it, and as a notebook shows it."""

import io
import pickle
import sys

import dask
import numpy as np
import pytest
from PIL import Image
from synthetic import Clip, embedding_spec, label, write_store

from moclip.errors import FeatureError
from moclip.pipeline import analysis
from moclip.store import FeatureSpec, ShardWriter, SourceFacts, Store, add_feature, create_store, open_store, publish

NASTY = "<script>alert('é')</script>"
CLIPS = [
    Clip("a", "RedUp", "g", {"1": "train"}, frames=5),
    Clip("b", "BlueUp", "g", {"1": "test"}, frames=7, images=3),
    Clip(NASTY, NASTY, "g", {"1": "train", NASTY: "test"}, frames=4),
    Clip("failed", "RedUp", "g", {"1": "train"}, fails=True),
    Clip("wide", None, None, frames=6, width=90),
]
NARROW = [NASTY, "a", "b"]
MOTION = FeatureSpec(
    kind="motion",
    dtype="int16",
    unit="quarter pixel",
    parameters={"version": 1, "motion": "native", "cell": 16, "size": None},
    columns={"pts_seconds": "float64", "picture_type": "uint8"},
    axes=("displacement", "y", "x"),
)


def grow(path, name, spec, videos):
    """Add a feature to a store: ``videos`` are (facts, rows, columns)."""
    add_feature(path, name, spec)
    writer = ShardWriter(path, feature=name, spec=spec, shard="more")
    for facts, rows, columns in videos:
        writer.append(rows, **columns)
        writer.ok(facts)
    writer.finish()
    publish(path)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """motion-accumulated on 8 px cells, an embedding, motion of one video on 16 px cells, and tokens of it."""
    path = write_store(tmp_path_factory.mktemp("stores") / "corpus.zarr", CLIPS)
    facts = SourceFacts(id="b", width=70, height=48, frames=7, codec="h264", fps=25.0)
    columns = {"pts_seconds": np.arange(7) / 25, "picture_type": np.array([1] + [2] * 6)}
    rows = np.random.default_rng(0).integers(-9, 9, (7, 2, 3, 5))
    grow(path, "motion", MOTION, [(facts, rows, columns)])
    tokens = FeatureSpec("tokens", "float16", "1", {}, {"frame_index": "int32"}, ("token", "channel"))
    grow(path, "tokens", tokens, [(facts, np.ones((2, 3, 8)), {"frame_index": [1, 4]})])
    label(path, CLIPS, [NASTY, "RedUp"])
    return path


@pytest.fixture
def store(path):
    return open_store(path)


class TestFeatureArray:
    @pytest.mark.parametrize("scheduler", ["synchronous", "threads"])
    @pytest.mark.parametrize("chunk_rows", [1, 3, 5, 9, 1000])
    def test_its_values_are_the_stores(self, store, monkeypatch, scheduler, chunk_rows):
        monkeypatch.setattr(analysis, "CHUNK_BYTES", chunk_rows * 2 * 2 * 6 * 8)
        array = analysis.feature_array(store, "motion-accumulated", NARROW)
        expected = np.concatenate(store.read_all("motion-accumulated", NARROW))
        assert array.dtype == expected.dtype
        assert max(array.chunks[0]) <= chunk_rows
        np.testing.assert_array_equal(array.compute(scheduler=scheduler), expected)
        np.testing.assert_array_equal(array[3:11, 1].compute(scheduler=scheduler), expected[3:11, 1])

    def test_it_reads_in_other_processes(self, store):
        array = analysis.feature_array(store, "embedding")
        expected = np.concatenate(store.read_all("embedding", store.ids("embedding")))
        found = array.compute(scheduler="processes", num_workers=1)
        np.testing.assert_array_equal(found, expected)

    def test_a_cluster_is_sent_the_store_once_and_not_with_each_chunk(self, store, monkeypatch):
        monkeypatch.setattr(analysis, "CHUNK_BYTES", 1)
        array = analysis.feature_array(store, "motion-accumulated", NARROW)
        (array,) = dask.optimize(array)
        pickled = []
        monkeypatch.setattr(Store, "__reduce__", counted(Store.__reduce__, pickled))
        for task in dict(array.__dask_graph__()).values():
            pickle.dumps(task)
        assert array.numblocks[0] == 16
        assert len(pickled) == 1

    def test_it_reads_one_row_of_each_shape_until_it_is_computed(self, store, monkeypatch):
        gathered = []
        monkeypatch.setattr(Store, "gather_groups", counted(Store.gather_groups, gathered))
        monkeypatch.setattr(Store, "read_all", None)
        array = analysis.feature_array(store, "motion-accumulated", NARROW)
        ((_, _, ids, frames),) = gathered
        assert (len(ids), frames.tolist()) == (1, [0])
        array.sum().compute()
        assert len(gathered) == 2

    def test_chunks_end_with_videos_and_only_a_longer_video_is_cut(self):
        assert list(analysis._cut([2, 2, 2, 9, 1, 4], 4)) == [
            (0, 2, 0, 4),
            (2, 3, 0, 2),
            (3, 4, 0, 4),
            (3, 4, 4, 8),
            (3, 4, 8, 9),
            (4, 5, 0, 1),
            (5, 6, 0, 4),
        ]

    def test_several_shapes_are_refused_with_a_way_on(self, store):
        with pytest.raises(FeatureError, match=r"2 shapes .*\(2, 6, 8\): 3.*geometries\(store, feature\)"):
            analysis.feature_array(store, "motion-accumulated")
        found = analysis.geometries(store, "motion-accumulated")
        assert found == {(2, 6, 8): NARROW, (2, 6, 12): ["wide"]}
        assert analysis.feature_array(store, "motion-accumulated", found[2, 6, 12]).shape == (6, 2, 6, 12)

    def test_a_store_that_changed_meanwhile_is_an_error(self, store, monkeypatch):
        array = analysis.feature_array(store, "motion")
        monkeypatch.setattr(Store, "gather", lambda *_: np.zeros((3, 2, 3, 5)))
        with pytest.raises(FeatureError, match="has changed since"):
            array.compute(scheduler="synchronous")

    def test_videos_without_rows_are_refused(self, store):
        with pytest.raises(FeatureError, match="'failed'"):
            analysis.feature_array(store, "motion-accumulated", ["a", "failed"])
        with pytest.raises(FeatureError, match="no videos to take motion of"):
            analysis.feature_array(store, "motion", [])

    def test_hdf5_stores_are_read_from_several_threads(self, tmp_path, monkeypatch):
        create_store(tmp_path / "corpus", "hdf5")
        store = open_store(write_store(tmp_path / "corpus", CLIPS))
        monkeypatch.setattr(analysis, "CHUNK_BYTES", 1)
        array = analysis.feature_array(store, "motion-accumulated", NARROW)
        expected = np.concatenate(store.read_all("motion-accumulated", NARROW))
        np.testing.assert_array_equal(array.compute(scheduler="threads", num_workers=4), expected)

    def test_ragged_rows_make_no_array_but_have_an_index(self, tmp_path):
        path = write_store(tmp_path / "corpus.zarr", CLIPS[:2])
        spec = FeatureSpec("image", "uint8", "1", {}, {"frame_index": "int32"}, ("byte",))
        add_feature(path, "image", spec)
        writer = ShardWriter(path, feature="image", spec=spec, shard="more")
        writer.append_bytes([b"abc", b""], frame_index=[2, 5])
        writer.ok(SourceFacts(id="a"))
        writer.finish()
        publish(path)
        store = open_store(path)
        with pytest.raises(FeatureError, match="read_bytes"):
            analysis.feature_array(store, "image")
        assert analysis.row_index(store, "image")["frame_index"].tolist() == [2, 5]
        assert "image" not in analysis.video_dataset(store, "a")


def counted(function, calls):
    def call(*args, **kwargs):
        calls.append(args)
        return function(*args, **kwargs)

    return call


class TestRowIndex:
    def test_its_lines_are_the_arrays_rows(self, store):
        rows = analysis.row_index(store, "embedding", ["b", "wide", "a"])
        assert rows.columns.tolist() == ["id", "ordinal", "frame_index", "pts_seconds", "label"]
        assert rows["id"].tolist() == ["b", "b", "b", "wide", "a"]
        assert rows["ordinal"].tolist() == [0, 1, 2, 0, 0]
        np.testing.assert_allclose(rows["pts_seconds"], [0, 0.04, 0.08, 0, 0])
        assert rows["label"].tolist()[:3] == ["BlueUp"] * 3
        assert rows["label"].isna().tolist() == [False] * 3 + [True, False]
        vectors = analysis.feature_array(store, "embedding", ["b", "wide", "a"])
        mean = vectors[(rows["label"] == "BlueUp").to_numpy()].mean(axis=0).compute()
        np.testing.assert_allclose(mean, store.read("embedding", "b").mean(axis=0), rtol=1e-2)

    def test_it_holds_videos_of_every_shape(self, store):
        rows = analysis.row_index(store, "motion-accumulated")
        assert rows.groupby("id", observed=True).size().to_dict() == {NASTY: 4, "a": 5, "b": 7, "wide": 6}

    def test_without_pandas_it_says_what_to_install(self, store, monkeypatch):
        monkeypatch.setitem(sys.modules, "pandas", None)
        with pytest.raises(ImportError, match="pip install xarray pandas"):
            analysis.row_index(store, "motion")


class TestVideoDataset:
    def test_features_of_equal_frames_share_them(self, store):
        dataset = analysis.video_dataset(store, "b")
        assert dataset["motion"].dims == ("frame", "displacement", "y", "x")
        assert dataset["motion-accumulated"].dims[0] == "frame"
        np.testing.assert_allclose(dataset["pts_seconds"], np.arange(7) / 25)
        assert dataset["embedding-invented"].dims[0] == "sample"
        assert dataset["sample_frame_index"].values.tolist() == [0, 1, 2]
        assert dataset["tokens"].dims == ("sample_tokens", "token", "channel")
        assert dataset["sample_tokens_frame_index"].values.tolist() == [1, 4]

    def test_its_values_are_the_stores_and_wait(self, store):
        dataset = analysis.video_dataset(store, "b")
        assert dask.is_dask_collection(dataset["motion"])
        for name in dataset:
            np.testing.assert_array_equal(dataset[name].values, store.read(name, "b"))

    def test_a_cell_lies_where_its_pixel_is(self, store):
        motion = analysis.video_dataset(store, "b")["motion"]
        assert motion["x"].values.tolist() == [8, 24, 40, 56, 69]
        assert motion["y"].values.tolist() == [8, 24, 40]
        right = motion.sel(displacement="x", x=69)
        np.testing.assert_array_equal(right, store.read("motion", "b")[:, 0, :, 4])

    def test_a_grid_of_another_frame_size_has_no_pixels(self, store):
        spec = FeatureSpec("motion", "int16", "pixel", {"cell": 8, "size": None}, {}, ("displacement", "y", "x"))
        assert analysis._sampled(spec, {"width": 64, "height": None}, "x", 7) is None
        assert analysis._sampled(spec, {"width": 64, "height": None}, "y", 7) is None
        resized = FeatureSpec("motion", "int16", "pixel", {"cell": 8, "size": [340, 256]}, {}, spec.axes)
        assert analysis._sampled(resized, {"width": 64, "height": 64}, "x", 43)[-1] == 339

    def test_attributes_say_what_it_is(self, store):
        dataset = analysis.video_dataset(store, "b")
        assert dataset["motion"].attrs["units"] == "quarter pixel"
        assert dataset["motion"].attrs["digest"] == MOTION.digest
        assert dataset.attrs["id"] == "b"
        assert (dataset.attrs["label"], dataset.attrs["codec"]) == ("BlueUp", "h264")
        assert None not in dataset.attrs.values()

    def test_failed_and_unknown_videos(self, store):
        assert list(analysis.video_dataset(store, "failed")) == ["embedding-invented"]
        with pytest.raises(FeatureError, match="'nobody' is not in"):
            analysis.video_dataset(store, "nobody")

    def test_a_dimension_never_meets_a_variable(self, tmp_path):
        path = write_store(tmp_path / "corpus.zarr", CLIPS[:1])
        facts = SourceFacts(id="a", width=64, height=48, frames=5)
        spec = embedding_spec()
        grow(path, "sample", spec, [(facts, np.ones((1, 4)), {"frame_index": [0], "pts_seconds": [np.nan]})])
        dataset = analysis.video_dataset(open_store(path), "a")
        assert dataset["sample"].dims[0] == "sample_sample"


class TestOverview:
    def test_its_html_escapes_what_a_store_says(self, store):
        shown = analysis.overview(store)._repr_html_()
        assert "<script" not in shown
        assert "&lt;script&gt;" in shown
        assert "1 no_vectors" in shown

    def test_as_text(self, store):
        view = analysis.overview(store)
        text = repr(view)
        assert "5 videos" in text
        assert "motion-accumulated" in text
        assert "1 no_vectors" in text
        assert "\x1b" not in repr(type(view)("\x1b[31m", view.info))


class TestMotionView:
    def test_the_picture_has_the_direction_as_hue(self, tmp_path):
        path = write_store(tmp_path / "corpus.zarr", CLIPS[:1])
        rows = np.zeros((1, 2, 1, 3))
        rows[0, 0] = [[8, 0, -4]]
        columns = {"pts_seconds": [0.0], "picture_type": [2]}
        grow(path, "motion", MOTION, [(SourceFacts(id="a", width=48, height=16, frames=1), rows, columns)])
        view = analysis.motion_view(open_store(path), "a", 0)
        picture = Image.open(io.BytesIO(view._repr_png_()))
        assert picture.size == (480, 160)
        right, still, left = (picture.getpixel((x, 80)) for x in (80, 240, 400))
        assert right == (255, 0, 0)
        assert still == (0, 0, 0)
        assert left[0] < 3
        assert abs(left[1] - 127) < 3
        assert "longest 8.0 x quarter pixel" in repr(view)

    def test_a_still_frame_is_black(self, store):
        view = analysis.motion_view(store, "b", 0)
        still = type(view)("b", 0, np.zeros((2, 3, 5), np.float32), "px")
        assert still.image().getextrema() == ((0, 0),) * 3

    def test_embeddings_are_no_motion(self, store):
        with pytest.raises(FeatureError, match="no motion"):
            analysis.motion_view(store, "b", 0, "tokens")
