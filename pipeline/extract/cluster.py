"""Where tasks run: worker processes of this machine, a Dask cluster that a file names, or a Dask scheduler elsewhere.
The only other place that knows Dask is ``schedule.py``, which runs tasks there."""

import importlib
import inspect
import logging
import os
import signal
import threading
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from moclip import __version__
from moclip.errors import MoclipError, SourceError
from moclip.pipeline.extract.cluster_file import ClusterFile, read_cluster_file
from moclip.store import is_store

logger = logging.getLogger(__name__)

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
_SETTINGS = {
    # Dask blames all tasks of a worker that dies. One death is enough: schedule.py finds out whose fault it was.
    "distributed.scheduler.allowed-failures": 0,
    "distributed.comm.timeouts.connect": "30s",
}
#: Seconds until the first word about workers that do not come, doubled from word to word up to the longest.
_FIRST_WORD, _LONGEST = 10.0, 600.0
#: How often this machine's workers are started, and seconds between looks at whether they live.
_STARTS, _LOOK = 3, 5.0


@dataclass(frozen=True)
class Cluster:
    """Who runs the tasks: ``workers`` processes of this machine with ``threads`` threads each.

    With ``scheduler``, a Dask address, the workers behind it do, and with ``file`` those of the cluster that it names;
    then ``workers`` only guides the cutting of shards. ``reach`` are a store and videos that workers must find.
    ``gpus`` more processes of this machine have a GPU each; the others decode for them.
    """

    workers: int
    threads: int
    scheduler: str | None = None
    file: ClusterFile | None = None
    reach: tuple[str, ...] = ()
    gpus: int = 0

    @classmethod
    def of(cls, workers: int | None, scheduler: str | None, file: Path | None = None) -> "Cluster":
        """The cluster that was asked for: one worker a core where nothing is said."""
        # In a container this can be fewer than the machine has.
        from dask.system import CPU_COUNT

        if workers is not None and workers < 1:
            raise SourceError(f"{workers} workers cannot work; expected 1 or more")
        cores = int(CPU_COUNT)
        if file is not None:
            described = read_cluster_file(file)
            return cls(described.most_workers or cores, described.threads, file=described)
        count = workers or cores
        return cls(count, 1 if scheduler else max(1, cores // count), scheduler)

    def encoding(self) -> "Cluster":
        """The same for work with an encoder: this machine's GPUs take part, if its own processes do the work."""
        import torch

        return self if self.scheduler or self.file else replace(self, gpus=torch.cuda.device_count())

    def reaching(self, *paths: str) -> "Cluster":
        """The same, and its workers must find these; those that are not here either are left out."""
        return replace(self, reach=tuple(path for path in paths if _is_there(path)))

    @property
    def words(self) -> str:
        """Where tasks run, for people."""
        if self.file:
            return self.file.words
        return self.scheduler or f"{self.workers} workers"


@contextmanager
def connect(cluster: Cluster, tasks: int) -> Iterator[Any]:
    """A client of the cluster, once a first worker has come, and has found what it must."""
    import dask

    _quieten("distributed")
    _quieten("tornado")
    with dask.config.set(_SETTINGS), _started(cluster, tasks) as place, _client(place) as client:
        _say_dashboard(client, cluster)
        if cluster.file:
            _scale(place, cluster.file, tasks)
        _wait_for_a_worker(client, cluster)
        if cluster.file or cluster.scheduler:
            _check_worker(client, cluster.reach)
        if cluster.file:
            _keep(place, cluster.file, tasks)
            yield client
        else:
            with _kept_up(place, client):
                yield client


@contextmanager
def _started(cluster: Cluster, tasks: int) -> Iterator[Any]:
    """The scheduler's address, or a cluster that lives as long as the block."""
    if cluster.scheduler:
        yield cluster.scheduler
        return
    with _holding_interrupts():
        place = _from_file(cluster.file) if cluster.file else _own_processes(cluster, tasks)
    try:
        yield place
    finally:
        _close(place)


def _close(place: Any) -> None:
    try:
        place.close()
    except Exception as error:
        # The work is done, or failed with an error that says more.
        name = type(place).__name__
        logger.warning("%s did not close as it should (%r); see that no jobs of it are left", name, error)


def _own_processes(cluster: Cluster, tasks: int) -> Any:
    """Started anew if one is killed while it starts: Dask gives up then."""
    for _ in range(_STARTS - 1):
        try:
            return _local_cluster(cluster, tasks)
        except RuntimeError as error:
            logger.warning("the workers did not start (%s); trying again", _first_cause(error))
    try:
        return _local_cluster(cluster, tasks)
    except RuntimeError as error:
        raise MoclipError(f"the workers do not start: {_first_cause(error)}; see whether memory is short") from error


@contextmanager
def _kept_up(place: Any, client: Any) -> Iterator[None]:
    """Look after this machine's own workers: one that was killed while it started again would be gone for good."""
    from distributed import LocalCluster

    if not isinstance(place, LocalCluster):
        yield
        return
    done = threading.Event()

    def look() -> None:
        while not done.wait(_LOOK):
            with suppress(Exception):  # it is looked again
                place.sync(_started_again, place)
                if not client.nthreads():
                    logger.warning("no worker lives; waiting for new ones")

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


async def _started_again(place: Any) -> None:
    """Awaiting a cluster starts the workers that it should have and has not."""
    await place


def _local_cluster(cluster: Cluster, tasks: int) -> Any:
    from distributed import LocalCluster

    place = LocalCluster(
        n_workers=min(cluster.workers, tasks),
        threads_per_worker=1,
        host="127.0.0.1",
        dashboard_address="127.0.0.1:0",
        silence_logs=logging.CRITICAL,
        env=dict.fromkeys(_THREAD_VARIABLES, str(cluster.threads)),
        resources={"decode": 1} if cluster.gpus else None,
    )
    for gpu in range(cluster.gpus):
        (spec,) = place.new_worker_spec().values()
        environment = {**spec["options"]["env"], "CUDA_VISIBLE_DEVICES": str(gpu)}
        options = {**spec["options"], "resources": {"gpu": 1}, "env": environment}
        place.worker_spec[f"gpu-{gpu}"] = {**spec, "options": options}
    place.sync(_started_again, place)
    return place


def _client(place: Any) -> Any:
    from distributed import Client

    try:
        return Client(place, timeout="20s")
    except (OSError, ValueError) as error:
        raise SourceError(f"no Dask scheduler at {place}: {error}") from error


def _from_file(file: ClusterFile) -> Any:
    """The cluster, started with the file's arguments."""
    from distributed.deploy.cluster import Cluster as DaskCluster

    make = _imported(file)
    # Some are made by functions (distributed.SSHCluster), whose annotation says so.
    made = make if inspect.isclass(make) else _returned(make)
    if not (inspect.isclass(made) and issubclass(made, DaskCluster)):
        raise file.error(f"{file.class_path} is no Dask cluster: neither a class of clusters nor a function of one")
    return _asked(file, make, **file.arguments)


def _imported(file: ClusterFile) -> Any:
    module, _, name = file.class_path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        package = (error.name or module).split(".")[0].replace("_", "-")
        raise file.error(f"{file.class_path} needs `pip install {package}` here and on the workers: {error}") from error
    except AttributeError:
        raise file.error(f"the module {module} has no {name}") from None


def _returned(function: Any) -> Any:
    try:
        return typing.get_type_hints(function).get("return")
    except (TypeError, NameError):
        return None


def _asked(file: ClusterFile, do: Callable[..., Any], *args: Any, **arguments: Any) -> Any:
    """Call the cluster's own code: whatever it raises becomes one line, since any class may be named."""
    try:
        return do(*args, **arguments)
    except Exception as error:
        first = _first_cause(error)
        raise file.error(f"{file.class_path} says {type(first).__name__}: {first}") from error


def _first_cause(error: BaseException) -> BaseException:
    return _first_cause(error.__cause__) if error.__cause__ else error


def _scale(place: Any, file: ClusterFile, tasks: int) -> None:
    """Ask for the workers: no more than there are tasks, and one where their number adapts."""
    workers = file.workers if file.adaptive is None else 1
    if workers:
        _asked(file, place.sync, _scaled, place, min(workers, tasks))


def _keep(place: Any, file: ClusterFile, tasks: int) -> None:
    """Have the cluster watch its size. Only after a first worker: with a minimum of 0 none would come before tasks do.

    A fixed number is kept too, where this process starts the workers: a new one for each that is gone.
    """
    from distributed import SpecCluster

    if file.adaptive is not None:
        _asked(file, place.adapt, **file.adaptive)
    elif file.workers and isinstance(place, SpecCluster):
        workers = min(file.workers, tasks)
        _asked(file, place.adapt, minimum=workers, maximum=workers)


async def _scaled(place: Any, workers: int) -> None:
    asked = place.scale(workers)
    if inspect.isawaitable(asked):
        await asked
    # So that a job that the queue refuses raises here. Otherwise nobody hears of it, and workers never come.
    await place


def _say_dashboard(client: Any, cluster: Cluster) -> None:
    """Without bokeh the page of a scheduler in this process says only that bokeh is missing."""
    if cluster.scheduler or find_spec("bokeh"):
        if address := _dashboard(client):
            logger.info("the Dask dashboard is at %s", address)


def _dashboard(client: Any) -> str | None:
    try:
        return client.dashboard_link or None
    except KeyError:  # it has none
        return None


def _wait_for_a_worker(client: Any, cluster: Cluster) -> None:
    seconds = _FIRST_WORD
    while True:
        try:
            client.wait_for_workers(1, timeout=seconds)
            return
        except TimeoutError:
            of = f" of {cluster.workers}" if cluster.file and cluster.file.most_workers else ""
            at = f"; the Dask dashboard is at {address}" if (address := _dashboard(client)) else ""
            logger.warning("waiting for workers: 0%s have come%s", of, at)
        seconds = min(2 * seconds, _LONGEST)


def _check_worker(client: Any, reach: tuple[str, ...]) -> None:
    """What a worker lacks is said in one line here, instead of once for every video."""
    try:
        version, missing = client.submit(_look, reach, pure=False).result()
    except ImportError as error:
        raise SourceError(f"a worker could not import moclip: {error}; install moclip {__version__} there") from error
    if version != __version__:
        raise SourceError(f"a worker has moclip {version}, here is {__version__}; install the same on both")
    if missing:
        raise SourceError(
            f"a worker cannot open {', '.join(missing)}, which is there for this machine; workers need the same "
            "paths, on a file system that all share, and the same access to buckets"
        )


def _look(reach: tuple[str, ...]) -> tuple[str, list[str]]:
    return __version__, [path for path in reach if not _is_there(path)]


def _is_there(path: str) -> bool:
    if "://" not in path:
        return os.path.exists(path)
    try:
        return is_store(path)
    except (MoclipError, OSError, ImportError):
        return False


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
