"""Extraction as a job, on real Dask processes: reruns, failures, kills."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import psutil
import pyarrow as pa
import pytest
import timm
import torch
import videos
from distributed import LocalCluster

from moclip.errors import EncoderError, FeatureError, MoclipError, SourceError, TooManyFailuresError
from moclip.pipeline.backbones import EncoderConfig
from moclip.pipeline.extract import jobs, schedule
from moclip.pipeline.extract.features import FeatureRequest
from moclip.pipeline.extract.plan import make_plan
from moclip.pipeline.extract.sources import Sources, list_sources
from moclip.store import failed_entries, first_difference, open_store, write_labels

EMBEDDING = "embedding-test-vit-"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "test_vit.pth"
    torch.save(timm.create_model("test_vit", pretrained=False).state_dict(), file)
    return file


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(12):
        clip = folder / ("left" if i % 2 else "right") / f"clip_g{i // 4:02d}_c{i:02d}.avi"
        clip.parent.mkdir(exist_ok=True)
        videos.make_clip(clip, frames=10 + i, seed=i)
    return folder


@pytest.fixture
def request_(weights):
    return FeatureRequest(encoder=EncoderConfig("timm:test_vit", str(weights)))


def hashes(store):
    """(feature, id) -> the hash of its rows."""
    return {(row["feature"], row["id"]): row["content"] for row in open_store(store).entries.to_pylist()}


def extract(source, store, request, **options):
    job = jobs.Job(source, store, request, workers=1, **options)
    return jobs.run(jobs.prepare(job))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, corpus, weights, run_tasks_here):
    """All features of the corpus, made without Dask."""
    store = tmp_path_factory.mktemp("undisturbed") / "store.zarr"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule, "run_tasks", run_tasks_here)
        extract(corpus, store, FeatureRequest(encoder=EncoderConfig("timm:test_vit", str(weights))))
    return store


def test_processes_of_dask_make_the_same_store_and_a_rerun_does_nothing(tmp_path, corpus, request_, undisturbed):
    job = jobs.Job(corpus, tmp_path / "store.zarr", request_, workers=2)
    seen = []
    summary = jobs.run(jobs.prepare(job), seen.append)
    assert (summary.videos, summary.ok, summary.failures) == (12, 36, {})
    assert seen[-1].frames == summary.frames == sum(range(10, 22))
    assert first_difference(open_store(job.store), open_store(undisturbed)) is None
    again = jobs.prepare(job)
    assert (len(again.plan.tasks), again.plan.done) == (0, 12)
    assert jobs.run(again).videos == 0
    labels = open_store(job.store).labels
    assert set(labels["label"].to_pylist()) == {"left", "right"}


def test_a_scheduler_elsewhere_is_used(tmp_path, corpus, undisturbed):
    request = FeatureRequest(kinds=("motion",))
    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as cluster:
        job = jobs.Job(corpus, tmp_path / "store.zarr", request, scheduler=cluster.scheduler_address)
        assert jobs.run(jobs.prepare(job)).ok == 12
    assert set(open_store(job.store).features) == {"motion"}
    assert hashes(job.store) == {key: value for key, value in hashes(undisturbed).items() if key[0] == "motion"}


def test_a_scheduler_that_is_not_there_is_one_line(tmp_path, corpus, monkeypatch):
    import distributed

    monkeypatch.setattr(distributed, "Client", lambda address, timeout: _refuse())
    job = jobs.Job(corpus, tmp_path / "s.zarr", FeatureRequest(kinds=("motion",)), scheduler="tcp://127.0.0.1:1")
    with pytest.raises(SourceError, match="no Dask scheduler at"):
        jobs.run(jobs.prepare(job))
    assert len(open_store(job.store).entries) == 0


def _refuse():
    raise OSError("Timed out trying to connect")


@pytest.mark.usefixtures("without_dask")
def test_broken_videos_are_failed_entries_and_lose_nothing(tmp_path, corpus, request_):
    source = tmp_path / "videos"
    source.mkdir()
    videos.make_clip(source / "good.avi")
    videos.truncated_mp4(source / "cut.mp4")
    videos.zero_bytes(source / "zero.mp4")
    videos.text_file(source / "text.mp4")
    videos.audio_only(source / "audio.mp4")
    videos.resolution_change(source / "change.h264")
    if videos.has_encoder("libx265"):
        videos.make_clip(source / "hevc.mkv", codec="libx265")
    store = tmp_path / "store.zarr"
    extract(source, store, replace(request_, motion="native"))
    opened = open_store(store)
    reasons = {(row["id"], row["feature"]): row["reason"] for row in failed_entries(opened)}
    embedding = opened.resolve("embedding")
    for video_id, reason in {
        "cut": "truncated",
        "zero": "empty",
        "text": "not_video",
        "audio": "no_video_stream",
        "change": "resolution_changed",
    }.items():
        for feature in ("motion", "motion-accumulated", embedding):
            assert reasons[video_id, feature] == reason
    expected_ok = {"good"}
    if videos.has_encoder("libx265"):
        assert reasons["hevc", "motion"] == reasons["hevc", "motion-accumulated"] == "no_vectors"
        assert ("hevc", embedding) not in reasons
        expected_ok |= {"hevc"}
    assert set(opened.ids(embedding)) == expected_ok
    assert opened.ids("motion") == ["good"]


@pytest.mark.usefixtures("without_dask")
def test_failed_videos_wait_for_retry_failed(tmp_path):
    source = tmp_path / "videos"
    source.mkdir()
    clip = source / "clip.avi"
    clip.write_bytes(b"")
    request = FeatureRequest(kinds=("motion",))
    store = tmp_path / "store.zarr"
    extract(source, store, request)
    videos.make_clip(clip)
    left = jobs.prepare(jobs.Job(source, store, request))
    assert (len(left.plan.tasks), left.plan.failed_before) == (0, ("clip",))
    summary = extract(source, store, request, retry_failed=True)
    assert (summary.ok, summary.failures) == (1, {})


@pytest.mark.usefixtures("without_dask")
def test_a_changed_file_is_listed_and_left_alone(tmp_path):
    source = tmp_path / "videos"
    source.mkdir()
    clip = videos.make_clip(source / "clip.avi", frames=12)
    request = FeatureRequest(kinds=("motion",))
    store = tmp_path / "store.zarr"
    extract(source, store, request)
    videos.make_clip(clip, frames=20)
    left = jobs.prepare(jobs.Job(source, store, request))
    assert (len(left.plan.tasks), left.plan.changed) == (0, ("clip",))
    other = FeatureRequest(kinds=("motion-accumulated",))
    for options in ({}, {"replace_changed": True}):
        assert jobs.prepare(jobs.Job(source, store, other, **options)).plan.changed == ("clip",)
    extract(source, store, request, replace_changed=True)
    assert len(open_store(store).read("motion", "clip")) == 20
    assert jobs.prepare(jobs.Job(source, store, other)).plan.videos == 1


@pytest.mark.usefixtures("without_dask")
def test_a_feature_is_added_beside_what_is_there(tmp_path, corpus, request_, undisturbed):
    store = tmp_path / "store.zarr"
    shutil.copytree(undisturbed, store)
    before = {p: p.read_bytes() for p in (store / "features").rglob("*") if p.is_file()}
    extract(corpus, store, FeatureRequest(kinds=("motion",), cell=16, rename="motion-16"))
    assert open_store(store).read("motion-16", "left/clip_g00_c01").shape[1:] == (2, 6, 8)
    assert all(path.read_bytes() == content for path, content in before.items())


def test_labels_that_another_run_wrote_over_come_back(tmp_path, corpus, monkeypatch, run_tasks_here):
    store = tmp_path / "store.zarr"

    def run(self, tasks, work, report):
        write_labels(store, open_store(store).labels[:0], [])
        run_tasks_here(self, tasks, work, report)

    monkeypatch.setattr(schedule, "run_tasks", run)
    extract(corpus, store, FeatureRequest(kinds=("motion",)))
    labels = open_store(store).labels["label"].to_pylist()
    assert len(labels) == len(list_sources(corpus).videos)
    assert sorted(set(labels)) == sorted(open_store(store).classes) != []


@pytest.mark.usefixtures("without_dask")
def test_an_unreadable_file_is_a_failed_entry(tmp_path):
    clip = tmp_path / "videos" / "locked.avi"
    clip.parent.mkdir()
    if not videos.unreadable(clip):
        pytest.skip("this user may read everything")
    summary = extract(clip.parent, tmp_path / "s.zarr", FeatureRequest(kinds=("motion",)))
    assert dict(summary.failures) == {("motion", "unreadable"): 1}


@pytest.mark.usefixtures("without_dask")
def test_a_taken_name_is_said_before_anything_is_planned(tmp_path, corpus):
    extract(corpus, tmp_path / "s.zarr", FeatureRequest(kinds=("motion",)))
    with pytest.raises(FeatureError, match="--as NAME"):
        jobs.prepare(jobs.Job(corpus, tmp_path / "s.zarr", FeatureRequest(kinds=("motion",), cell=16)))


@pytest.mark.usefixtures("without_dask")
def test_max_failures(tmp_path):
    source = tmp_path / "videos"
    source.mkdir()
    for i in range(3):
        videos.zero_bytes(source / f"{i}.avi")
    request = FeatureRequest(kinds=("motion",))
    with pytest.raises(TooManyFailuresError, match=r"videos with a failed entry: 3, allowed: 2 \(motion empty: 3\)"):
        extract(source, tmp_path / "s.zarr", request, max_failures=2)
    assert len(failed_entries(open_store(tmp_path / "s.zarr"))) == 3
    extract(source, tmp_path / "s.zarr", request, max_failures=3)


@pytest.mark.usefixtures("without_dask")
def test_names_that_are_hard_on_paths(tmp_path):
    source = tmp_path / "videos"
    names = videos.odd_names(source)
    extract(source, tmp_path / "s.zarr", FeatureRequest(kinds=("motion",)))
    store = open_store(tmp_path / "s.zarr")
    assert len(store.ids("motion")) == len(names)
    assert failed_entries(store) == []
    assert all(len(store.read("motion", video_id)) == 6 for video_id in store.ids("motion"))


@pytest.mark.usefixtures("without_dask")
def test_a_missing_path_of_a_list_is_a_failed_entry(tmp_path):
    videos.make_clip(tmp_path / "a.avi")
    table = tmp_path / "list.csv"
    table.write_text("path,label,rating\na.avi,x,5\nb.avi,y,3\n")
    summary = extract(table, tmp_path / "s.zarr", FeatureRequest(kinds=("motion",)))
    assert dict(summary.failures) == {("motion", "missing"): 1}
    assert open_store(tmp_path / "s.zarr").videos["rating"].to_pylist() == [5, 3]


def test_no_weights_is_said_before_any_video_is_opened(tmp_path, corpus):
    request = FeatureRequest(encoder=EncoderConfig("timm:test_vit", str(tmp_path / "none.pth")))
    with pytest.raises(EncoderError):
        jobs.prepare(jobs.Job(corpus, tmp_path / "s.zarr", request))
    assert not (tmp_path / "s.zarr").exists()


@pytest.mark.usefixtures("without_dask")
def test_an_error_of_one_video_is_its_own(tmp_path, corpus, monkeypatch, caplog):
    from moclip.pipeline.extract import shard

    real = shard.decode_video

    def decode(path, video_id, config, emit):
        if "c03" in path:
            raise RuntimeError("unheard of")
        return real(path, video_id, config, emit)

    monkeypatch.setattr(shard, "decode_video", decode)
    summary = extract(corpus, tmp_path / "s.zarr", FeatureRequest(kinds=("motion",)))
    assert (summary.ok, dict(summary.failures)) == (11, {("motion", "error"): 1})
    assert "unheard of" in failed_entries(open_store(tmp_path / "s.zarr"))[0]["detail"]


@pytest.mark.usefixtures("without_dask")
def test_a_store_that_cannot_be_written_is_no_video_s_fault(tmp_path, corpus, monkeypatch):
    from moclip.store import ShardWriter

    def append(self, rows, **columns):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ShardWriter, "append", append)
    with pytest.raises(MoclipError, match="the disk is full"):
        extract(corpus, tmp_path / "s.zarr", FeatureRequest(kinds=("motion",)))
    assert failed_entries(open_store(tmp_path / "s.zarr")) == []


def test_shards_are_bounded_and_in_id_order(tmp_path, corpus):
    sources = list_sources(corpus).videos
    plan = make_plan(tmp_path / "none", Sources(pa.concat_tables([sources.table] * 40)), ("motion",), workers=1)
    assert max(len(task.videos) for task in plan.tasks) <= 64
    plan = make_plan(tmp_path / "none", sources, ("motion",), workers=2)
    assert [video.id for task in plan.tasks for video in task.videos] == [video.id for video in sources]
    assert len(plan.tasks) == 6


def start_cli(*arguments):
    # Where the tests run in the background, a shell has told them to ignore Ctrl-C, and children inherit that.
    hear = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{hear}; from moclip.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def wait_for(found, seconds=90):
    end = time.time() + seconds
    while not found():
        assert time.time() < end, "it did not happen in time"
        time.sleep(0.02)


def worker_processes(process):
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if "spawn_main" in " ".join(child.cmdline())]


@pytest.fixture(scope="module")
def long_corpus(tmp_path_factory):
    """Enough work that a kill lands in the middle of it: eight names of one clip of 1,500 frames."""
    folder = tmp_path_factory.mktemp("long")
    clip = videos.make_clip(folder / "clip0.avi", frames=1500)
    for i in range(1, 8):
        os.link(clip, folder / f"clip{i}.avi")
    return folder


@pytest.fixture(scope="module")
def long_undisturbed(tmp_path_factory, long_corpus, run_tasks_here):
    store = tmp_path_factory.mktemp("long-undisturbed") / "store.zarr"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule, "run_tasks", run_tasks_here)
        extract(long_corpus, store, FeatureRequest(encoder=None))
    return store


def receipts(store):
    return list(store.glob("receipts/*/*.parquet"))


@pytest.mark.parametrize("kill", ["worker", "coordinator", "ctrl-c"])
def test_kill_anything_and_the_next_run_continues(tmp_path, long_corpus, long_undisturbed, kill):
    store = tmp_path / "store.zarr"
    arguments = ("extract", long_corpus, store, "--encoder", "none", "--workers", 1)
    process = start_cli(*arguments)
    try:
        wait_for(lambda: receipts(store))
        assert len(receipts(store)) < len(receipts(long_undisturbed)), "the kill came too late to mean anything"
        if kill == "worker":
            worker_processes(process)[0].kill()
            _, err = process.communicate(timeout=120)
            assert process.returncode == 0, err
        elif kill == "coordinator":
            process.kill()
            process.communicate()
        else:
            os.killpg(process.pid, signal.SIGINT)
            _, err = process.communicate(timeout=60)
            assert process.returncode == 130, err
            assert "Traceback" not in err
            assert 0 < len(open_store(store).entries) < len(open_store(long_undisturbed).entries)
    finally:
        if process.poll() is None:
            process.kill()
    again = start_cli(*arguments)
    out, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    assert re.search(r"motion +8 +0\n", out)
    assert first_difference(open_store(store), open_store(long_undisturbed)) is None


def test_ctrl_c_while_the_workers_start_is_not_lost(tmp_path, long_corpus):
    process = start_cli("extract", long_corpus, tmp_path / "store.zarr", "--encoder", "none", "--workers", 1)
    try:
        assert any("to do: 8 videos" in line for line in iter(process.stdout.readline, ""))
        time.sleep(0.5)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            process.kill()
    assert process.returncode == 130, err
    assert "Traceback" not in err
