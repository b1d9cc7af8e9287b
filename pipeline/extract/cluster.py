"""Where tasks run: worker processes of this machine, or a Dask scheduler elsewhere. The only other place that knows
Dask is ``schedule.py``, which runs tasks there."""

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from typing import Any

from moclip.errors import SourceError

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


@contextmanager
def connect(cluster: Cluster, tasks: int) -> Iterator[Any]:
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
