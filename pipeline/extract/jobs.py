"""An extraction as a job: list, plan what is missing, run it on Dask, publish. The only place that knows Dask."""

import itertools
import logging
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from moclip.errors import MoclipError, SourceError, StoreFormatError, TooManyFailuresError
from moclip.pipeline.extract.features import ExtractConfig, FeatureRequest, resolve
from moclip.pipeline.extract.labelling import label_new
from moclip.pipeline.extract.plan import Plan, make_plan
from moclip.pipeline.extract.shard import Progress, ShardTask, extract_shard, record_failure
from moclip.pipeline.extract.sources import SourceList, list_sources
from moclip.pipeline.extract.splits import read_splits
from moclip.store import add_feature, create_store, is_added, is_foreign, open_store, publish

logger = logging.getLogger(__name__)

_TOPIC = "moclip-progress"
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")


@dataclass(frozen=True)
class Job:
    """Where and how an extraction runs. ``workers`` None means one a core; ``scheduler`` is a Dask address."""

    source: Path
    store: Path
    request: FeatureRequest
    splits: Path | None = None
    workers: int | None = None
    scheduler: str | None = None
    retry_failed: bool = False
    replace_changed: bool = False
    max_failures: int | None = None

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise SourceError(f"{self.workers} workers cannot work; expected 1 or more")


@dataclass(frozen=True)
class Prepared:
    """A job that is ready to run: nothing decoded yet, and nothing written."""

    job: Job
    sources: SourceList
    config: ExtractConfig
    plan: Plan
    workers: int
    unmatched: int


@dataclass(frozen=True)
class Summary:
    """How an extraction ended: what this run decoded, and all entries of the job's videos, whenever they were made.

    ``ok_by_feature`` counts the ok entries, ``failures`` the failed ones by (feature, reason).
    """

    videos: int
    frames: int
    ok_by_feature: Counter[str]
    failures: Counter[tuple[str, str]]
    failed_videos: int

    @property
    def ok(self) -> int:
        return self.ok_by_feature.total()


def prepare(job: Job) -> Prepared:
    """List the sources, load the encoder, and plan; raises before any video is decoded."""
    sources = list_sources(job.source)
    unmatched = 0
    if job.splits is not None:
        lists = read_splits(job.splits)
        videos, labelling = lists.apply(sources.videos)
        sources = replace(sources, videos=videos, classes=labelling.classes)
        unmatched = len(labelling.absent)
        if len(labelling.unlisted) == len(videos):
            raise SourceError(
                f"none of the {len(videos)} videos of {job.source} is in the lists of {job.splits}; "
                "they name videos by their path under the source, Class/name.avi"
            )
    cores = _cores()
    workers = job.workers or cores
    threads = 1 if job.scheduler else max(1, cores // workers)
    config = resolve(job.request, threads)
    if is_foreign(job.store):
        raise StoreFormatError(f"{job.store} exists and is not a moclip store; name another path")
    if job.store.exists():
        for name, spec in config.features.items():
            is_added(job.store, name, spec)
    plan = make_plan(
        job.store,
        sources.videos,
        tuple(config.features),
        workers=workers,
        retry_failed=job.retry_failed,
        replace_changed=job.replace_changed,
    )
    return Prepared(job, sources, config, plan, workers, unmatched)


def run(prepared: Prepared, on_progress: Callable[[Progress], None] = lambda _: None) -> Summary:
    """Run a prepared job. Whatever ends it, what was finished is published and the next run goes on from there.

    ``on_progress`` is called from another thread, with totals over all shards (``number`` is -1).
    :class:`TooManyFailuresError` if more than ``max_failures`` of the job's videos have a failed entry.
    """
    job = prepared.job
    create_store(job.store)
    for name, spec in prepared.config.features.items():
        add_feature(job.store, name, spec)
    label_new(job.store, prepared.sources.videos, prepared.sources.classes, explicit=job.splits is not None)
    totals = _Totals(on_progress)
    try:
        if prepared.plan.tasks:
            _run_tasks(prepared, totals)
    finally:
        publish(job.store)
    summary = _summary(prepared, totals)
    failed = summary.failed_videos
    if job.max_failures is not None and failed > job.max_failures:
        reasons = ", ".join(f"{feature} {reason}: {n}" for (feature, reason), n in summary.failures.most_common())
        raise TooManyFailuresError(
            f"videos with a failed entry: {failed}, allowed: {job.max_failures} ({reasons}); "
            f"the store is good and `moclip info {job.store}` lists them"
        )
    return summary


def _cores() -> int:
    """The cores this process may use, which in a container can be fewer than the machine has."""
    from dask.system import CPU_COUNT

    return int(CPU_COUNT)


class _Totals:
    """Adds up the tasks' progress, of which a retried task's starts anew."""

    def __init__(self, on_progress: Callable[[Progress], None]) -> None:
        self._on_progress = on_progress
        self._tasks: dict[int, Progress] = {}
        self._lock = threading.Lock()
        self.sum = Progress(-1)

    def update(self, now: Progress) -> None:
        """Called from Dask's thread while tasks run, and from the coordinator's when they end."""
        with self._lock:
            before = self._tasks.get(now.number, Progress(now.number))
            self._tasks[now.number] = now
            self.sum = Progress(
                -1,
                self.sum.videos + now.videos - before.videos,
                self.sum.frames + now.frames - before.frames,
                self.sum.failed + now.failed - before.failed,
            )
            self._on_progress(self.sum)


def _run_tasks(prepared: Prepared, totals: _Totals) -> None:
    """Keep a bounded number of shards in flight, whatever the corpus's size."""
    from distributed import as_completed

    tasks = iter(prepared.plan.tasks)
    with _client(prepared) as client, _saying_that_it_stops():
        client.subscribe_topic(_TOPIC, lambda event: totals.update(Progress(**event[1])))
        running: dict[Any, ShardTask] = {}
        queue = as_completed()

        def submit(task: ShardTask) -> None:
            future = client.submit(
                _extract_on_worker, str(prepared.job.store.absolute()), task, prepared.config, pure=False
            )
            running[future] = task
            queue.add(future)

        for task in itertools.islice(tasks, 2 * sum(client.nthreads().values()) + 2):
            submit(task)
        stopped: Exception | None = None
        for future in queue:
            task = running.pop(future)
            try:
                for again in _finish(future, task, prepared, totals):
                    submit(again)
            except Exception as error:
                # What runs is waited for, so that it is not done again; nothing new is begun.
                stopped = stopped or error
            if stopped is None:
                for following in itertools.islice(tasks, 1):
                    submit(following)
        if stopped is not None:
            raise _stop(stopped) from stopped


@contextmanager
def _saying_that_it_stops() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        logger.warning("interrupted: stopping the workers, then publishing what is finished; a few seconds")
        raise


def _stop(error: Exception) -> MoclipError:
    if isinstance(error, MoclipError):
        return error
    return MoclipError(
        f"the extraction stopped: {type(error).__name__}: {error}; what was finished is kept, "
        "and the same command goes on from there"
    )


def _finish(future: Any, task: ShardTask, prepared: Prepared, totals: _Totals) -> list[ShardTask]:
    """Take a task's result. One that keeps killing its workers is split, down to the video that does it."""
    from distributed import KilledWorker

    try:
        totals.update(future.result())
    except KilledWorker:
        if len(task.videos) > 1:
            logger.warning("shard %d killed its worker; its videos are tried one by one", task.number)
            totals.update(Progress(task.number))
            # Numbers below zero are free: those of the plan start at 0, and -1 stands for the total.
            first = -1000 * (task.number + 1)
            return [replace(task, number=first - i, videos=(v,)) for i, v in enumerate(task.videos)]
        detail = "the worker process died with it every time it was tried"
        totals.update(record_failure(str(prepared.job.store), task, prepared.config, "crashed", detail))
    return []


def _extract_on_worker(store: str, task: ShardTask, config: ExtractConfig) -> Progress:
    from distributed import get_worker

    worker = get_worker()
    return extract_shard(store, task, config, lambda now: worker.log_event(_TOPIC, vars(now)))


@contextmanager
def _client(prepared: Prepared) -> Iterator[Any]:
    """A client of the given scheduler, or of a cluster of spawned processes on this machine."""
    import dask
    from distributed import Client, LocalCluster

    _quieten("distributed")
    if prepared.job.scheduler:
        try:
            client = Client(prepared.job.scheduler, timeout="20s")
        except (OSError, ValueError) as error:
            raise SourceError(f"no Dask scheduler at {prepared.job.scheduler}: {error}") from error
        with client:
            yield client
        return
    settings = {
        # A retry costs a shard, not a video: one that kills its worker twice is split.
        "distributed.scheduler.allowed-failures": 2,
        "distributed.comm.timeouts.connect": "30s",
    }
    environment = dict.fromkeys(_THREAD_VARIABLES, str(prepared.config.threads))
    with dask.config.set(settings):
        with _holding_interrupts():
            cluster = LocalCluster(
                n_workers=min(prepared.workers, len(prepared.plan.tasks)),
                threads_per_worker=1,
                host="127.0.0.1",
                dashboard_address="127.0.0.1:0",
                silence_logs=logging.CRITICAL,
                env=environment,
            )
        with cluster, Client(cluster) as client:
            yield client


@contextmanager
def _holding_interrupts() -> Iterator[None]:
    """Ctrl-C waits until the block ends. Threads and processes begun in it keep it blocked: a terminal sends Ctrl-C
    to all, and only the coordinator acts on it.
    """
    # Python's tracker of shared resources, if it first starts in here, unblocks Ctrl-C for good.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _quieten(library: str) -> None:
    """What goes wrong with a worker shows as a failed entry or as our own error, not as the library's tracebacks."""
    for name in [library, *logging.root.manager.loggerDict]:
        if name.split(".")[0] == library:
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)


def _summary(prepared: Prepared, totals: _Totals) -> Summary:
    entries = open_store(prepared.job.store).entries
    ids = {source.id for source in prepared.sources.videos}
    failures: Counter[tuple[str, str]] = Counter()
    failed: set[str] = set()
    ok = Counter({name: 0 for name in prepared.config.features})
    for row in entries.select(["id", "feature", "status", "reason"]).to_pylist():
        if row["id"] in ids and row["feature"] in prepared.config.features:
            if row["status"] == "ok":
                ok[row["feature"]] += 1
            else:
                failures[row["feature"], row["reason"]] += 1
                failed.add(row["id"])
    return Summary(totals.sum.videos, totals.sum.frames, ok, failures, len(failed))
