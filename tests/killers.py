"""Work that kills the process which does it: an extraction in which chosen videos do harm when they are decoded."""

import os
import re
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moclip.pipeline.extract import shard
from moclip.pipeline.extract.shard import Extraction

_decode = shard.decode_video


def segfault():
    os.kill(os.getpid(), signal.SIGSEGV)
    time.sleep(60)


def told_to_end():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)


def sleep():
    time.sleep(600)


def hold_the_lock():
    """Hang inside C, so that no other thread of Python runs."""
    re.match("(a+)+$", "a" * 50 + "b")


def eat_memory():
    eaten = []
    while True:
        eaten.append(bytearray(2**24))
        time.sleep(0.01)


@dataclass(frozen=True)
class Deadly:
    """``work`` with ``harm`` done by videos, by id; each the first ``times`` only, counted in the folder ``counts``."""

    work: Extraction
    harm: Mapping[str, str]
    counts: Path
    times: int = 1000

    def run(self, task, report):
        def decode(path, video_id, *rest):
            if video_id in self.harm and self._count(video_id) <= self.times:
                globals()[self.harm[video_id]]()
            return _decode(path, video_id, *rest)

        shard.decode_video = decode
        return self.work.run(task, report)

    def give_up(self, task, reason, detail):
        return self.work.give_up(task, reason, detail)

    def _count(self, video_id):
        with open(self.counts / video_id.replace("/", "_"), "ab") as file:
            file.write(b"x")
            return file.tell()


@dataclass(frozen=True)
class Noted:
    """``work`` that notes in a folder which process does what."""

    work: Extraction
    notes: Path

    def encodes(self, task):
        return self.work.encodes(task)

    def run(self, task, report):
        return self._note("whole", self.work.run(task, report))

    def decode(self, task, report):
        return self._note("decode", self.work.decode(task, report))

    def encode(self, task, decoded):
        return self._note("encode", self.work.encode(task, decoded))

    def _note(self, what, done):
        with (self.notes / f"{what}-{os.getpid()}").open("a") as file:
            file.write("x")
        return done
