"""Tasks on Dask: on processes of this machine, or on a scheduler elsewhere. The only place that knows Dask."""

import itertools
import logging
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from typing import Any

from moclip.errors import MoclipError, SourceError
from moclip.pipeline.extract.tasks import Progress, Report, ShardTask, Video, Work

logger = logging.getLogger(__name__)

_TOPIC = "moclip-progress"
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")


@dataclass(frozen=True)
class Cluster:
    """Who runs the tasks: ``workers`` processes of this machine with ``threads`` threads each.

    With ``scheduler``, a Dask address, the workers behind it do; ``workers`` then only guides the cutting of shards.
    """

    workers: int
    threads: int
    scheduler: str | None = None

    @classmethod
    def of(cls, workers: int | None, scheduler: str | None) -> "Cluster":
        """The cluster that was asked for: one worker a core where nothing is said."""
        # In a container this can be fewer than the machine has.
        from dask.system import CPU_COUNT

        if workers is not None and workers < 1:
            raise SourceError(f"{workers} workers cannot work; expected 1 or more")
        cores = int(CPU_COUNT)
        count = workers or cores
        return cls(count, 1 if scheduler else max(1, cores // count), scheduler)

    def run(self, tasks: Sequence[ShardTask[Video]], work: Work[Video], report: Report) -> None:
        """Run every task, a bounded number at a time, whatever their number. ``report`` is called from another
        thread too.

        A task that keeps killing its workers is split, down to the video that does it, which is given up.
        """
        from distributed import as_completed

        waiting = iter(tasks)
        with _client(self, len(tasks)) as client, _saying_that_it_stops():
            client.subscribe_topic(_TOPIC, lambda event: report(Progress(**event[1])))
            running: dict[Any, ShardTask[Video]] = {}
            queue = as_completed()

            def submit(task: ShardTask[Video]) -> None:
                future = client.submit(_run_on_worker, work, task, pure=False)
                running[future] = task
                queue.add(future)

            for task in itertools.islice(waiting, 2 * sum(client.nthreads().values()) + 2):
                submit(task)
            stopped: Exception | None = None
            for future in queue:
                task = running.pop(future)
                try:
                    for again in take_result(future, task, work, report):
                        submit(again)
                except Exception as error:
                    # What runs is waited for, so that it is not done again; nothing new is begun.
                    stopped = stopped or error
                if stopped is None:
                    for following in itertools.islice(waiting, 1):
                        submit(following)
            if stopped is not None:
                raise _stop(stopped) from stopped


def _run_on_worker(work: Work[Video], task: ShardTask[Video]) -> Progress:
    from distributed import get_worker

    worker = get_worker()
    return work.run(task, lambda now: worker.log_event(_TOPIC, vars(now)))


def take_result(future: Any, task: ShardTask[Video], work: Work[Video], report: Report) -> list[ShardTask[Video]]:
    """Report a task's result. The tasks to run in its place are returned, if it kept killing its workers."""
    from distributed import KilledWorker

    try:
        report(future.result())
    except KilledWorker:
        if len(task.videos) > 1:
            logger.warning("shard %d killed its worker; its videos are tried one by one", task.number)
            report(Progress(task.number))
            return task.one_by_one()
        report(work.give_up(task, "crashed", "the worker process died with it every time it was tried"))
    return []


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
        f"the run stopped: {type(error).__name__}: {error}; what was finished is kept, "
        "and the same command goes on from there"
    )


@contextmanager
def _client(cluster: Cluster, tasks: int) -> Iterator[Any]:
    """A client of the given scheduler, or of a cluster of spawned processes on this machine."""
    import dask
    from distributed import Client, LocalCluster

    _quieten("distributed")
    if cluster.scheduler:
        try:
            client = Client(cluster.scheduler, timeout="20s")
        except (OSError, ValueError) as error:
            raise SourceError(f"no Dask scheduler at {cluster.scheduler}: {error}") from error
        with client:
            yield client
        return
    settings = {
        # A retry costs a shard, not a video: one that kills its worker twice is split.
        "distributed.scheduler.allowed-failures": 2,
        "distributed.comm.timeouts.connect": "30s",
    }
    environment = dict.fromkeys(_THREAD_VARIABLES, str(cluster.threads))
    with dask.config.set(settings):
        with _holding_interrupts():
            processes = LocalCluster(
                n_workers=min(cluster.workers, tasks),
                threads_per_worker=1,
                host="127.0.0.1",
                dashboard_address="127.0.0.1:0",
                silence_logs=logging.CRITICAL,
                env=environment,
            )
        with processes, Client(processes) as client:
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
