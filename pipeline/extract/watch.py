"""Which video a process works on, and for how long it may: known even where the process dies of it.

The watchdog is a thread of C that needs no Python (faulthandler's): it ends a process that hangs inside a library.
"""

import faulthandler
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Generic

from moclip.pipeline.extract.tasks import Progress, Report, ShardTask, Video, Work

#: What a process that the watchdog ended exits with: faulthandler's choice.
TIMED_OUT = 1
#: Called with a video's id, and the seconds that it may take, when work on it begins.
Listener = Callable[[str, float | None], None]

_lock = threading.Lock()
_deadlines: dict[object, float] = {}
_listener: Listener | None = None
_limit: float | None = None


@dataclass(frozen=True)
class Limited(Generic[Video]):
    """Work of which no video may take longer than ``seconds``; None is no limit."""

    work: Work[Video]
    seconds: float | None

    def run(self, task: ShardTask[Video], report: Report) -> Progress:
        """As the work itself does it; a process in which a video takes longer ends at once."""
        self._set_limit()
        return self.work.run(task, report)

    def encodes(self, task: ShardTask[Video]) -> bool:
        """As the work itself says."""
        return self.work.encodes(task)

    def decode(self, task: ShardTask[Video], report: Report) -> Any:
        """As the work itself does it, within the limit."""
        self._set_limit()
        return self.work.decode(task, report)

    def encode(self, task: ShardTask[Video], decoded: Any) -> Progress:
        """As the work itself does it."""
        return self.work.encode(task, decoded)

    def _set_limit(self) -> None:
        global _limit
        _limit = self.seconds

    def give_up(self, task: ShardTask[Video], reason: str, detail: str) -> Progress:
        """As the work itself does it."""
        return self.work.give_up(task, reason, detail)


@contextmanager
def watching(video: str) -> Iterator[None]:
    """Work on a video: its id is told to who listens, and the process ends if the block outlasts the limit."""
    seconds = _limit
    if _listener:
        _listener(video, seconds)
    if seconds is None:
        yield
        return
    key = object()
    try:
        with _lock:
            _deadlines[key] = time.monotonic() + seconds
            _arm()
        yield
    finally:
        with _lock:
            _deadlines.pop(key, None)
            _arm()


def listen(listener: Listener) -> None:
    """Let this process say which video it works on."""
    global _listener
    _listener = listener


def _arm() -> None:
    """Set the alarm, of which a process has one, to the next deadline of its threads."""
    if _deadlines:
        left = min(_deadlines.values()) - time.monotonic()
        # What it writes, the places where all threads are, helps nobody here.
        faulthandler.dump_traceback_later(max(left, 0.001), exit=True, file=_nowhere())
    else:
        faulthandler.cancel_dump_traceback_later()


@lru_cache(maxsize=1)
def _nowhere() -> int:
    return os.open(os.devnull, os.O_WRONLY)
