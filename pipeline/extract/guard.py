"""A task in a process of its own, begun by the worker: if it dies, the worker lives and knows which video did it."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import psutil

from moclip.pipeline.extract import watch
from moclip.pipeline.extract.tasks import Progress, Report, ShardTask, Video, Work

#: Part of a worker's memory limit that a process may take: where Dask ends a worker, too.
_MOST_MEMORY = 0.95
#: Seconds between looks at a process's memory.
_LOOK = 0.2


@dataclass(frozen=True)
class Death:
    """How a process died: the ``video`` that it had begun last (None: it had begun none), a reason, and words.

    The reason ``ended`` is that somebody asked it to end, which says nothing of the video.
    """

    video: str | None
    reason: str
    detail: str


@dataclass(frozen=True)
class _Begun:
    video: str
    seconds: float | None


@dataclass(frozen=True)
class _Done:
    progress: Progress


def run_guarded(
    work: Work[Video], task: ShardTask[Video], report: Report, memory_limit: int | None
) -> Progress | Death:
    """Do a task in a fresh process. Raises what the work raises.

    ``memory_limit`` is in bytes. The process also ends when this one does.
    """
    ours, theirs = Pipe()
    command = [sys.executable, "-c", f"from {__name__} import serve; serve({theirs.fileno()})"]
    # Not by multiprocessing: Dask's workers are daemons, which it allows no children.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(
        command,
        pass_fds=[theirs.fileno()],
        stdin=subprocess.DEVNULL,
        env=environment,
        # A queue that ends a job tells all its processes: this one hears of it by the end of its worker.
        start_new_session=True,
    )
    with ours, process:
        theirs.close()
        try:
            return _follow(_Child(process, ours, memory_limit), work, task, report)
        finally:
            process.kill()


@dataclass(frozen=True)
class _Child:
    process: subprocess.Popen[bytes]
    connection: "Connection[Any, Any]"
    memory_limit: int | None

    def hear(self) -> Any:
        """Its next message; None if it died. One that takes too much memory is ended."""
        try:
            while not self.connection.poll(_LOOK):
                if self.takes_too_much():
                    raise MemoryError
            return self.connection.recv()
        except (EOFError, ConnectionError):
            return None

    def takes_too_much(self) -> bool:
        try:
            taken = psutil.Process(self.process.pid).memory_info().rss
        except psutil.Error:
            return False
        return bool(self.memory_limit and taken > _MOST_MEMORY * self.memory_limit)


def _follow(child: _Child, work: Work[Video], task: ShardTask[Video], report: Report) -> Progress | Death:
    begun, since = _Begun("", None), time.monotonic()
    try:
        child.connection.send((work, task))
        while message := child.hear():
            if isinstance(message, _Done):
                return message.progress
            if isinstance(message, Exception):
                raise message
            if isinstance(message, Progress):
                report(message)
            else:
                begun, since = message, time.monotonic()
    except BrokenPipeError:
        pass
    except MemoryError:
        limit = (child.memory_limit or 0) / 2**30
        return Death(begun.video or None, "crashed", f"its process took more memory than a worker may: {limit:.1f} GiB")
    return _death(child.process.wait(), begun, time.monotonic() - since)


def _death(code: int, begun: _Begun, seconds: float) -> Death:
    video = begun.video or None
    # The watchdog's clock began a moment after ours, or before.
    if code == watch.TIMED_OUT and begun.seconds is not None and seconds > begun.seconds - 1:
        return Death(video, "timeout", f"it was not done after {begun.seconds:g} s; --timeout-per-video allows more")
    how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
    if -code in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        return Death(video, "ended", how)
    return Death(video, "crashed", f"its process died of it, alone: {how}")


def serve(handle: int) -> None:
    """The process itself: a task is read from the connection ``handle``, and what happens is written to it."""
    connection: Connection[Any, Any] = Connection(handle)
    lock = threading.Lock()

    def tell(message: Any) -> None:
        with lock:
            connection.send(message)

    work, task = connection.recv()
    threading.Thread(target=_die_with_the_worker, args=(connection,), daemon=True).start()
    watch.listen(lambda video, seconds: tell(_Begun(video, seconds)))
    try:
        tell(_Done(work.run(task, tell)))
    except Exception as error:
        tell(error)


def _die_with_the_worker(connection: "Connection[Any, Any]") -> None:
    with suppress(OSError):
        connection.poll(None)  # nothing more is ever sent: it ends when the other end closes
    os._exit(0)
