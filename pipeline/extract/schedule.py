"""Tasks on a Dask cluster: a bounded number at a time, and none is lost when workers die."""

import ctypes
import itertools
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Generic

from moclip.errors import MoclipError
from moclip.pipeline.extract.cluster import Cluster, connect
from moclip.pipeline.extract.guard import Death, run_guarded
from moclip.pipeline.extract.tasks import Progress, Report, ShardTask, Video, Work

logger = logging.getLogger(__name__)

_TOPIC = "moclip-progress"
#: A task in a process of its own that takes its worker down so often is at fault; before, the machines may be.
MOST_DEATHS = 10


@dataclass(frozen=True)
class Attempt(Generic[Video]):
    """A task as it is tried now: in the worker itself, or ``guarded``, in a process that the worker watches.

    ``deaths`` counts the workers that died while they watched. Where workers with GPUs encode for others, ``half`` is
    the decoding alone, and ``decoded`` the future of what it gave.
    """

    task: ShardTask[Video]
    guarded: bool = False
    deaths: int = 0
    half: bool = False
    decoded: Any = None


def run_tasks(cluster: Cluster, tasks: Sequence[ShardTask[Video]], work: Work[Video], report: Report) -> None:
    """Run every task, a bounded number at a time, whatever their number. ``report`` is called from another
    thread too.

    Dask blames every task that a dead worker had been given; here none is, but tried again in a process of its own.
    A video that kills that too, alone, is given up.
    """
    from distributed import as_completed

    waiting = (Attempt(task) for task in tasks)
    with connect(cluster, len(tasks)) as client, _saying_that_it_stops():
        client.subscribe_topic(_TOPIC, lambda event: report(Progress(**event[1])))
        running: dict[Any, Attempt[Video]] = {}
        queue = as_completed()

        def submit(attempt: Attempt[Video]) -> None:
            offered = _offered(client)
            half = "gpu" in offered and not (attempt.guarded or attempt.decoded) and work.encodes(attempt.task)
            attempt = replace(attempt, half=half)
            future = _submit(client, work, attempt, offered)
            running[future] = attempt
            queue.add(future)

        # Most workers may be yet to come: from a queue, or because their number adapts to what waits.
        slots = max(cluster.workers, sum(client.nthreads().values()))
        for attempt in itertools.islice(waiting, 2 * slots + 2):
            submit(attempt)
        stopped: Exception | None = None
        for future in queue:
            attempt = running.pop(future)
            try:
                following = take_result(future, attempt, work, report)
            except Exception as error:
                following, stopped = [], stopped or error
            for held in (attempt.decoded, None if any(each.decoded is future for each in following) else future):
                if held is not None:
                    # Else a worker that ends while its result is held counts as one that died.
                    held.release()
            # What runs is waited for, so that it is not done again; nothing new is begun.
            if stopped is None:
                for attempt in following or itertools.islice(waiting, 1):
                    submit(attempt)
        if stopped is not None:
            raise _stop(stopped) from stopped


def _offered(client: Any) -> set[str]:
    """The resources that any worker has."""
    return {name for worker in client.scheduler_info(-1)["workers"].values() for name in worker["resources"]}


def _submit(client: Any, work: Work[Video], attempt: Attempt[Video], offered: set[str]) -> Any:
    """Give an attempt to Dask. Workers that offer the resource ``gpu`` encode, those with ``decode`` decode.

    A shard is in the window until it is encoded: decoders cannot run ahead of an encoder by more than that.
    """
    if attempt.decoded is not None:
        # First, so that what was decoded does not lie about.
        return client.submit(
            _encode_on_worker, work, attempt.task, attempt.decoded, resources={"gpu": 1}, priority=1, pure=False
        )
    place = {"resources": {"decode": 1}} if "decode" in offered else {}
    if attempt.half:
        return client.submit(_decode_on_worker, work, attempt.task, **place, pure=False)
    return client.submit(_run_on_worker, work, attempt, **place, pure=False)


def _decode_on_worker(work: Work[Video], task: ShardTask[Video]) -> Any:
    with _memory_given_back():
        return work.decode(task, _reporter())


def _encode_on_worker(work: Work[Video], task: ShardTask[Video], decoded: Any) -> Progress:
    with _memory_given_back():
        return work.encode(task, decoded)


@contextmanager
def _memory_given_back() -> Iterator[None]:
    """glibc keeps what threads have freed, some more with each shard; other allocators need not be told."""
    yield
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _reporter() -> Report:
    from distributed import get_worker

    worker = get_worker()
    return lambda now: worker.log_event(_TOPIC, vars(now))


def _run_on_worker(work: Work[Video], attempt: Attempt[Video]) -> Progress | Death:
    from distributed import get_worker

    if attempt.guarded:
        return run_guarded(work, attempt.task, _reporter(), get_worker().memory_manager.memory_limit)
    with _memory_given_back():
        return work.run(attempt.task, _reporter())


def take_result(future: Any, attempt: Attempt[Video], work: Work[Video], report: Report) -> list[Attempt[Video]]:
    """Report how an attempt ended. The attempts to make in its place are returned, if a process died with it."""
    from distributed import KilledWorker

    try:
        if attempt.half and future.status == "finished":
            # What was decoded stays where it is.
            return [replace(attempt, decoded=future)]
        ended = future.result()
    except KilledWorker:
        ended = None
    if isinstance(ended, Progress):
        report(ended)
        return []
    report(Progress(attempt.task.number))
    if ended is None or ended.reason == "ended":
        return _after_a_worker(attempt, work, report)
    return _after_its_process(ended, attempt.task, work, report)


def _after_a_worker(attempt: Attempt[Video], work: Work[Video], report: Report) -> list[Attempt[Video]]:
    task = attempt.task
    if not attempt.guarded:
        logger.info("a worker died; shard %d, which it had, is done again in a process of its own", task.number)
        return [Attempt(task, guarded=True)]
    if attempt.deaths + 1 < MOST_DEATHS:
        return [replace(attempt, deaths=attempt.deaths + 1)]
    if len(task.videos) > 1:
        return [Attempt(alone, guarded=True) for alone in task.one_by_one()]
    report(work.give_up(task, "crashed", f"{MOST_DEATHS} workers died with it, alone"))
    return []


def _after_its_process(death: Death, task: ShardTask[Video], work: Work[Video], report: Report) -> list[Attempt[Video]]:
    """A video is given up if it was alone, or hung; else it is tried alone, and the others without it."""
    if death.video is None:
        raise MoclipError(
            f"a process died before it opened a video ({death.detail}); see whether memory or disk is full"
        )
    alone, others = task.apart(death.video)
    following = [Attempt(others, guarded=True)] if others.videos else []
    if others.videos and death.reason != "timeout":
        return [Attempt(alone, guarded=True), *following]
    logger.warning("%s: %s", death.video, death.detail)
    report(work.give_up(alone if others.videos else task, death.reason, death.detail))
    return following


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
