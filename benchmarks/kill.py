"""Kill an extraction at random moments until it is done, and compare its store with an undisturbed one's.

    python benchmarks/kill.py SOURCE FOLDER --kills 30 --copies 3 -- --feature motion --encoder none

What follows ``--`` are options of ``moclip extract``. SOURCE is a folder of videos, extracted ``--copies`` times under
different ids, so that there is time for the kills. One run is left in peace. Then ``moclip extract`` is started again
and again: at random moments a worker is killed (SIGKILL; the run goes on), and after every ninth the coordinator
(SIGKILL; the next start continues). Equal means: the same entries, motion bit for bit, embeddings to a cosine of at
least 0.99999. A video that was blamed for a kill is a failed entry, and a difference.
"""

import argparse
import csv
import random
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil

from moclip.pipeline.extract.sources import list_sources
from moclip.store import first_difference, open_store


def write_list(source: Path, copies: int, file: Path) -> Path:
    """A list of the videos of ``source``, each several times."""
    with open(file, "w", newline="") as opened:
        writer = csv.writer(opened)
        writer.writerow(["id", "path"])
        for video in list_sources(source).videos:
            writer.writerows([f"{copy}/{video.id}", Path(video.path).absolute()] for copy in range(copies))
    return file


def extract(videos: Path, store: Path, options: list[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "moclip.cli", "extract", str(videos), str(store), *options]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def kill_worker(process: subprocess.Popen[bytes], source: Path) -> bool:
    """Kill a worker that has a video open, if there is one."""
    try:
        children = psutil.Process(process.pid).children(recursive=True)
        workers = [child for child in children if "spawn_main" in " ".join(child.cmdline()) and _reads(child, source)]
        if workers:
            random.choice(workers).kill()
    except psutil.Error:  # it ended just now
        return False
    return bool(workers)


def _reads(process: psutil.Process, source: Path) -> bool:
    """Whether it, or a process of its own, has a video open."""
    files = [file for each in (process, *process.children()) for file in each.open_files()]
    return any(Path(file.path).is_relative_to(source.resolve()) for file in files)


def disturbed(start: Callable[[], subprocess.Popen[bytes]], given: argparse.Namespace) -> int:
    """Extract under kills; how many there was time for."""
    process, done = start(), 0
    while done < given.kills:
        time.sleep(random.uniform(given.least, given.most))
        if process.poll() is not None:
            break
        if done % 10 == 9:
            process.kill()
            process.wait()
            process, done = start(), done + 1
        else:
            done += kill_worker(process, given.source)
    if process.wait() != 0:
        raise SystemExit(f"the last run failed, after {done} kills")
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("folder", type=Path, help="a new folder for the two stores")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--copies", type=int, default=1)
    parser.add_argument("--least", type=float, default=2.0, help="seconds before a kill, at least")
    parser.add_argument("--most", type=float, default=6.0, help="... and at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("options", nargs="+", help="options of moclip extract, after --")
    given = parser.parse_args()
    random.seed(given.seed)
    given.folder.mkdir(parents=True)
    videos = write_list(given.source, given.copies, given.folder / "videos.csv")
    peace, war = given.folder / "undisturbed.zarr", given.folder / "disturbed.zarr"
    begin = time.monotonic()
    if extract(videos, peace, given.options).wait() != 0:
        raise SystemExit("the undisturbed run failed")
    print(f"undisturbed: {time.monotonic() - begin:.0f} s")
    begin = time.monotonic()
    done = disturbed(partial(extract, videos, war, given.options), given)
    print(f"{done} kills: {time.monotonic() - begin:.0f} s")
    undisturbed = open_store(peace)
    print(first_difference(undisturbed, open_store(war)) or f"EQUAL: {len(undisturbed.entries)} entries")


if __name__ == "__main__":
    main()
