"""What crosses between a coordinator and its workers: tasks out, progress back. Knows nothing of Dask."""

import hashlib
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar


class _Video(Protocol):
    @property
    def id(self) -> str: ...


Video = TypeVar("Video", bound=_Video)


@dataclass(frozen=True)
class ShardTask(Generic[Video]):
    """The work of one task: these videos, and the names of the features that they lack."""

    number: int
    videos: tuple[Video, ...]
    features: tuple[str, ...]

    def new_shard(self, digest: str) -> str:
        """A name for what one attempt writes of the feature with this digest; another one at every call.

        So an attempt that was given up while it still ran cannot touch the files of the one that replaced it.
        """
        ids = "\0".join(video.id for video in self.videos)
        work = hashlib.sha256(f"{digest}\0{ids}".encode()).hexdigest()[:12]
        return f"{work}-{uuid.uuid4().hex[:8]}"

    def apart(self, video: str) -> tuple["ShardTask[Video]", "ShardTask[Video]"]:
        """The work on one video, named by its id, and the work on the others."""
        alone = tuple(each for each in self.videos if each.id == video)
        others = tuple(each for each in self.videos if each.id != video)
        # Numbers below zero are free: those of the plan start at 0, and -1 stands for the total.
        number = -1000 * (self.number + 1) - len(self.videos)
        return replace(self, number=number, videos=alone), replace(self, videos=others)

    def one_by_one(self) -> list["ShardTask[Video]"]:
        """The same work, one video a task."""
        if len(self.videos) < 2:
            return [self]
        first, others = self.apart(self.videos[0].id)
        return [first, *others.one_by_one()]


@dataclass(frozen=True)
class Progress:
    """What a task has done so far: videos closed, frames decoded, videos with a failed entry."""

    number: int
    videos: int = 0
    frames: int = 0
    failed: int = 0


Report = Callable[[Progress], None]


class Work(Protocol[Video]):
    """What workers do with tasks. It is pickled with each of them."""

    def run(self, task: ShardTask[Video], report: Report) -> Progress:
        """Do a task, to the receipt; a broken video is a failed entry. Raises only if the store fails."""

    def encodes(self, task: ShardTask[Video]) -> bool:
        """Whether an encoder takes part, so that the task may be done in two halves."""

    def decode(self, task: ShardTask[Video], report: Report) -> Any:
        """The first half: all but what the encoder does. What it gives goes to :meth:`encode`, in another process."""

    def encode(self, task: ShardTask[Video], decoded: Any) -> Progress:
        """The second half, to the receipt."""

    def give_up(self, task: ShardTask[Video], reason: str, detail: str) -> Progress:
        """Write a failed entry for every video of a task that could not be run to its end."""


class Totals:
    """Adds up the tasks' progress, of which a retried task's starts anew."""

    def __init__(self, on_progress: Report) -> None:
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
