"""Long videos: cut into clips, thinned, and never in memory whole."""

from dataclasses import replace

import numpy as np
import pytest
import sink
import videos

from moclip.errors import SourceError
from moclip.pipeline.extract import jobs
from moclip.pipeline.extract.decoding import DecodeConfig
from moclip.pipeline.extract.features import FeatureRequest
from moclip.pipeline.extract.sampling import FramePolicy
from moclip.store import open_store

REQUEST = FeatureRequest(kinds=("motion", "image"), encoder=None, clip_seconds=1.0)


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films")
    for name, frames in (("walk/long", 60), ("run/short", 10)):
        (folder / name).parent.mkdir()
        videos.make_clip(folder / f"{name}.mp4", codec="libx264", frames=frames)
    (folder / "run/broken.mp4").write_bytes(b"")
    return folder


def extract(source, store, request=REQUEST, **options):
    return jobs.run(jobs.prepare(jobs.Job(source, store, request, workers=1, **options)))


@pytest.mark.usefixtures("without_dask")
def test_clips_are_videos_of_their_own(tmp_path, films):
    extract(films, tmp_path / "whole.zarr", replace(REQUEST, clip_seconds=None, kinds=("motion",)))
    summary = extract(films, tmp_path / "s.zarr")
    whole, cut = open_store(tmp_path / "whole.zarr"), open_store(tmp_path / "s.zarr")
    clips = ["run/short#00000", "walk/long#00000", "walk/long#00001", "walk/long#00002"]
    assert cut.ids("motion") == cut.ids("image") == clips
    assert (summary.ok, summary.failed_videos) == (8, 1)
    facts = {row["id"]: row for row in cut.videos.to_pylist()}
    assert [facts[clip]["frames"] for clip in clips] == [10, 25, 25, 10]
    assert facts["walk/long#00001"]["duration_s"] == 1.0
    assert [row["id"] for row in cut.entries.to_pylist() if row["status"] == "failed"] == ["run/broken#00000"] * 2
    joined = np.concatenate([cut.read("motion", clip) for clip in clips[1:]])
    np.testing.assert_array_equal(joined, whole.read("motion", "walk/long"))
    assert [cut.read("image", clip, "frame_index").tolist() for clip in clips] == [[5], [12], [12], [5]]
    labels = dict(zip(cut.labels["id"].to_pylist(), cut.labels["label"].to_pylist(), strict=True))
    assert labels == {**dict.fromkeys(clips[1:], "walk"), clips[0]: "run", "run/broken#00000": "run"}


@pytest.mark.usefixtures("without_dask")
def test_a_second_run_knows_what_was_cut(tmp_path, films):
    extract(films, tmp_path / "s.zarr")
    again = jobs.prepare(jobs.Job(films, tmp_path / "s.zarr", REQUEST))
    assert (len(again.plan.tasks), again.plan.done, again.plan.failed_before) == (0, 2, ("run/broken#00000",))
    with pytest.raises(Exception, match="clip_seconds"):
        jobs.prepare(jobs.Job(films, tmp_path / "s.zarr", replace(REQUEST, clip_seconds=2.0)))


def test_a_stride_keeps_every_nth_frame_of_each_clip(tmp_path):
    path = videos.make_clip(tmp_path / "clip.avi", frames=40)
    _, every = sink.decode(path, DecodeConfig())
    _, thin = sink.decode(path, DecodeConfig(stride=4, clip_seconds=0.6))
    kept = [clip * 15 + frame for clip in range(3) for frame in range(0, 15, 4) if clip * 15 + frame < 40]
    for name in ("motion", "accumulated", "pts_seconds", "picture_type"):
        np.testing.assert_array_equal(thin.all(name), every.all(name)[kept])
    assert [(block.clip, len(block.motion)) for block in thin.blocks] == [(0, 4), (1, 4), (2, 3)]


def test_rows_and_frames_leave_as_they_come(tmp_path):
    """What waits is bounded by blocks, and a sampled frame is given away when it is found."""
    path = videos.make_clip(tmp_path / "clip.mp4", codec="libx264", frames=1200, width=64, height=48)
    order = []

    class Order(sink.Sink):
        def rows(self, rows):
            order.append("rows")

        def frame(self, frame):
            order.append("frame")

    sink.decode_video(str(path), "x", DecodeConfig(frames=FramePolicy("fps:1")), Order())
    assert order.count("rows") == 5
    assert "frame" in order[: order.index("rows")]
    assert order[-10:].count("rows") < 3


@pytest.mark.parametrize("wrong", [{"stride": 0}, {"clip_seconds": 0.0}, {"clip_seconds": float("nan")}])
def test_numbers_that_cut_nothing_are_refused(wrong):
    with pytest.raises(SourceError, match="expected"):
        replace(REQUEST, **wrong)
