"""Tasks whose processes die, hang or find the disk full, on real Dask processes."""

import os
import subprocess
import sys
import time

import pytest
import timm
import torch
import videos
from distributed import KilledWorker, Nanny, Scheduler, SpecCluster
from killers import Deadly, Noted

from moclip.errors import MoclipError
from moclip.pipeline.backbones import EncoderConfig
from moclip.pipeline.extract import full_disk, jobs, watch
from moclip.pipeline.extract.cluster import Cluster
from moclip.pipeline.extract.features import FeatureRequest
from moclip.pipeline.extract.guard import Death, run_guarded
from moclip.pipeline.extract.schedule import MOST_DEATHS, Attempt, run_tasks, take_result
from moclip.pipeline.extract.shard import Extraction
from moclip.pipeline.extract.tasks import Progress, ShardTask, Totals
from moclip.pipeline.extract.watch import Limited
from moclip.store import add_feature, create_store, failed_entries, first_difference, open_store, publish

HALVES = ("decode", "encode", "whole")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(8):
        videos.make_clip(folder / f"c{i}.avi", frames=6 + i, seed=i)
    return folder


@pytest.fixture
def extraction(tmp_path, corpus):
    """An extraction of motion into a new store, and its shards of four videos."""
    prepared = jobs.prepare(jobs.Job(corpus, tmp_path / "s.zarr", FeatureRequest(kinds=("motion",))))
    create_store(tmp_path / "s.zarr")
    add_feature(tmp_path / "s.zarr", "motion", prepared.config.features["motion"])
    sources = tuple(prepared.sources.videos)
    tasks = [ShardTask(number, sources[4 * number :][:4], ("motion",)) for number in range(2)]
    return Extraction(str(tmp_path / "s.zarr"), prepared.config), tasks


@pytest.fixture
def deadly(tmp_path, extraction):
    def make(times=1000, **harm):
        (tmp_path / "counts").mkdir(exist_ok=True)
        return Deadly(extraction[0], harm, tmp_path / "counts", times)

    return make


def run(extraction, work):
    """Run the shards on one worker; the failed entries, and the totals."""
    totals = Totals(lambda _: None)
    run_tasks(Cluster.of(1, None), extraction[1], work, totals.update)
    publish(extraction[0].store)
    store = open_store(extraction[0].store)
    assert len(store.entries) == 8
    return {row["id"]: (row["reason"], row["detail"]) for row in failed_entries(store)}, totals.sum


def test_a_crash_and_a_hang_are_recorded_and_the_others_arrive(extraction, deadly, tmp_path, corpus, run_tasks_here):
    begin = time.monotonic()
    failed, totals = run(extraction, Limited(deadly(c1="segfault", c6="hold_the_lock"), 3))
    assert time.monotonic() - begin < 60
    assert failed.keys() == {"c1", "c6"}
    assert failed["c1"][0] == "crashed"
    assert "SIGSEGV" in failed["c1"][1]
    assert failed["c6"] == ("timeout", "it was not done after 3 s; --timeout-per-video allows more")
    assert (totals.videos, totals.failed) == (8, 2)
    run_tasks_here(None, extraction[1], extraction[0], lambda _: None)
    assert open_store(extraction[0].store).ids("motion") == ["c0", "c2", "c3", "c4", "c5", "c7"]


@pytest.mark.slow
def test_who_dies_with_others_and_lives_alone_is_not_blamed(extraction, deadly):
    # It takes down its worker, then the process that its shard is tried in, and then does well.
    assert run(extraction, deadly(times=2, c2="segfault")) == ({}, Progress(-1, 8, sum(range(6, 14))))


class TestGuard:
    def test_does_what_the_work_does(self, extraction):
        work, (task, _) = extraction
        seen = []
        done = run_guarded(work, task, seen.append, None)
        assert done == Progress(0, 4, 6 + 7 + 8 + 9)
        assert [now.videos for now in seen] == [1, 2, 3, 4]

    def test_a_hang_that_lets_others_run_ends_too(self, extraction, deadly):
        death = run_guarded(Limited(deadly(c1="sleep"), 1), extraction[1][0], lambda _: None, None)
        assert (death.video, death.reason) == ("c1", "timeout")

    def test_too_much_memory_is_a_crash(self, extraction, deadly):
        death = run_guarded(deadly(c1="eat_memory"), extraction[1][0], lambda _: None, 2**30)
        assert death == Death("c1", "crashed", "its process took more memory than a worker may: 1.0 GiB")

    def test_to_be_told_to_end_is_no_crash(self, extraction, deadly):
        death = run_guarded(deadly(c1="told_to_end"), extraction[1][0], lambda _: None, None)
        assert death == Death("c1", "ended", "SIGTERM")

    def test_what_the_work_raises_is_raised(self, extraction):
        work, (task, _) = extraction
        with pytest.raises(MoclipError):
            run_guarded(Extraction(work.store + "-none", work.config), task, lambda _: None, None)


class Killed:
    """The future of a task whose worker died."""

    def result(self):
        raise KilledWorker("task", None, 0)


class Ended:
    def __init__(self, death):
        self.result = lambda: death


def test_a_worker_that_dies_is_no_verdict(extraction):
    work, (task, _) = extraction
    seen = []
    (again,) = take_result(Killed(), Attempt(task), work, seen.append)
    assert again == Attempt(task, guarded=True)
    for deaths in range(1, MOST_DEATHS):
        end = Killed() if deaths % 2 else Ended(Death("c1", "ended", "SIGTERM"))
        (again,) = take_result(end, again, work, seen.append)
        assert again == Attempt(task, guarded=True, deaths=deaths)
    alone = take_result(Killed(), again, work, seen.append)
    assert [attempt.task.videos for attempt in alone] == [(video,) for video in task.videos]
    assert len({attempt.task.number for attempt in alone}) == 4
    assert all(now == Progress(0) for now in seen)
    assert take_result(Killed(), Attempt(alone[0].task, True, MOST_DEATHS - 1), work, seen.append) == []
    publish(work.store)
    assert [row["reason"] for row in failed_entries(open_store(work.store))] == ["crashed"]


def test_a_process_that_dies_before_any_video_stops_the_run(extraction):
    work, (task, _) = extraction
    death = Death(None, "crashed", "SIGSEGV")
    with pytest.raises(MoclipError, match="before it opened a video"):
        take_result(Ended(death), Attempt(task, guarded=True), work, lambda _: None)


def test_the_watchdog_minds_the_next_deadline_of_all_threads(monkeypatch):
    armed = []
    monkeypatch.setattr(watch.faulthandler, "dump_traceback_later", lambda left, **_: armed.append(round(left)))
    monkeypatch.setattr(watch.faulthandler, "cancel_dump_traceback_later", lambda: armed.append(None))
    monkeypatch.setattr(watch, "_limit", 100)
    with watch.watching("a"):
        monkeypatch.setattr(watch, "_limit", 50)
        with watch.watching("b"):
            pass
    assert armed == [100, 50, 100, None]


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(28, "No space left on device"), "the disk is full"),
        (OSError(122, "x"), "the disk quota is used up"),
        (ValueError("UNKNOWN: Error writing: Disk quota exceeded [os_error_code='122']"), "the disk quota is used up"),
        (ValueError("something else"), None),
    ],
)
def test_a_full_disk_is_known_by_any_name(error, full):
    assert full_disk.what_is_full(error) == full
    outer = MoclipError("the run stopped")
    outer.__cause__ = error
    assert full_disk.what_is_full(outer) == full


@pytest.fixture
def small_disk(tmp_path):
    """An empty folder, and a function that gives it a disk of its own size, or changes that."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options):
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
            pytest.skip("this user may not mount a disk")

    yield folder, mount
    subprocess.run(["umount", "-l", str(folder)], capture_output=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize(("container", "size"), [("zarr", "200k"), ("hdf5", "120k")])
def test_a_full_disk_stops_the_run_with_one_line_and_the_next_one_continues(small_disk, tmp_path, container, size):
    folder, mount = small_disk
    mount(f"size={size}")
    source = tmp_path / "videos"
    source.mkdir()
    for i in range(6):
        videos.make_clip(source / f"c{i}.avi", frames=300, width=320, height=240, seed=i)
    extract = ["extract", source, folder / "s.zarr", "--feature", "motion", "--workers", 1, "--format", container]
    code, said = moclip(*extract)
    assert code == 1, said
    assert said.startswith(f"Error: the disk is full where {folder / 's.zarr'} is written; free some space")
    assert said.count("\n") == 1
    mount("remount,size=64m")
    assert failed_entries(open_store(folder / "s.zarr")) == []
    code, said = moclip(*extract)
    assert code == 0, said
    assert moclip("extract", source, tmp_path / "whole.zarr", *extract[3:])[0] == 0
    assert first_difference(open_store(folder / "s.zarr"), open_store(tmp_path / "whole.zarr")) is None


def moclip(*arguments):
    """Exit code, and what was said to stderr but log lines."""
    command = [sys.executable, "-m", "moclip.cli", *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    lines = ended.stderr.splitlines(keepends=True)
    return ended.returncode, "".join(
        line for line in lines if line.strip() and not line.startswith(("INFO:", "WARNING:"))
    )


@pytest.mark.parametrize(
    "offered",
    [({"decode": 1}, {"gpu": 1}), pytest.param(({}, {"gpu": 1}), marks=pytest.mark.slow)],
    ids=["decode and gpu", "gpu"],
)
def test_workers_with_a_gpu_encode_what_is_decoded(tmp_path, offered):
    """No GPU takes part: it is who does what that is looked at, and that the store is that of one process."""
    torch.manual_seed(0)
    torch.save(timm.create_model("test_vit", pretrained=False).state_dict(), tmp_path / "w.pth")
    source = tmp_path / "videos"
    source.mkdir()
    for number in range(6):
        videos.make_clip(source / f"c{number}.avi", frames=8, seed=number)
    videos.zero_bytes(source / "zero.avi")
    request = FeatureRequest(encoder=EncoderConfig("timm:test_vit", str(tmp_path / "w.pth")))
    prepared = jobs.prepare(jobs.Job(source, tmp_path / "pools.zarr", request, workers=1))
    notes = tmp_path / "notes"
    notes.mkdir()
    totals = Totals(lambda _: None)
    workers = {n: {"cls": Nanny, "options": {"nthreads": 1, "resources": each}} for n, each in enumerate(offered)}
    scheduler = {"cls": Scheduler, "options": {"dashboard_address": ":0"}}
    create_store(tmp_path / "pools.zarr")
    for name, spec in prepared.config.features.items():
        add_feature(tmp_path / "pools.zarr", name, spec)
    with SpecCluster(workers, scheduler) as cluster:
        work = Noted(Extraction(str(tmp_path / "pools.zarr"), prepared.config), notes)
        run_tasks(Cluster(2, 1, cluster.scheduler_address), prepared.plan.tasks, work, totals.update)
    publish(tmp_path / "pools.zarr")
    did = {what: {name.split("-")[1] for name in os.listdir(notes) if name.startswith(what)} for what in HALVES}
    assert len(did["encode"]) == 1
    assert did["decode"]
    assert not did["whole"]
    if "decode" in offered[0]:
        assert not did["encode"] & did["decode"]
    jobs.run(jobs.prepare(jobs.Job(source, tmp_path / "one.zarr", request, workers=1)))
    assert first_difference(open_store(tmp_path / "one.zarr"), open_store(tmp_path / "pools.zarr")) is None
    assert (totals.sum.videos, totals.sum.failed) == (7, 1)
