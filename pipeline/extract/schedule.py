"""Tasks on a Dask cluster: a bounded number at a time, retried when their workers die."""

import itertools
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from moclip.errors import MoclipError
from moclip.pipeline.extract.cluster import Cluster, connect
from moclip.pipeline.extract.tasks import Progress, Report, ShardTask, Video, Work

logger = logging.getLogger(__name__)

_TOPIC = "moclip-progress"


def run_tasks(cluster: Cluster, tasks: Sequence[ShardTask[Video]], work: Work[Video], report: Report) -> None:
    """Run every task, a bounded number at a time, whatever their number. ``report`` is called from another
    thread too.

    A task that keeps killing its workers is split, down to the video that does it, which is given up.
    """
    from distributed import as_completed

    waiting = iter(tasks)
    with connect(cluster, len(tasks)) as client, _saying_that_it_stops():
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
