"""Kill an extraction at random moments until it is done, and compare its store with an undisturbed one's.

    python benchmarks/kill.py UNDISTURBED STORE --kills 6 -- SOURCE --encoder none

What follows ``--`` is the extraction's command line without the store. Each round starts ``moclip extract``, waits a
random time, and kills a worker (SIGKILL; the run goes on) or the coordinator (SIGKILL; the next round continues).
Equal means: motion bit for bit, embeddings to a cosine of at least 0.99999.
"""

import argparse
import random
import subprocess
import sys
import time

import psutil

from moclip.store import first_difference, open_store


def extract(arguments: list[str], store: str) -> subprocess.Popen[bytes]:
    code = "from moclip.cli import main; main()"
    command = [sys.executable, "-c", code, "extract", arguments[0], store, *arguments[1:]]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def disturb(process: subprocess.Popen[bytes], victim: str) -> bool:
    """Kill the victim if it is still there."""
    if process.poll() is not None:
        return False
    if victim == "coordinator":
        process.kill()
        return True
    children = psutil.Process(process.pid).children(recursive=True)
    workers = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
    if not workers:
        return False
    random.choice(workers).kill()
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("undisturbed")
    parser.add_argument("store")
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--least", type=float, default=5.0, help="seconds before a kill, at least")
    parser.add_argument("--most", type=float, default=25.0, help="... and at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("extraction", nargs="+", help="SOURCE and options of moclip extract, after --")
    given = parser.parse_args()
    random.seed(given.seed)
    process = extract(given.extraction, given.store)
    kills = 0
    while kills < given.kills:
        time.sleep(random.uniform(given.least, given.most))
        victim = random.choice(["worker", "coordinator"])
        if process.poll() is not None:
            print(f"done after {kills} kills")
            break
        if disturb(process, victim):
            kills += 1
            print(f"killed a {victim}")
        if victim == "coordinator":
            process.wait()
            process = extract(given.extraction, given.store)
    if process.wait() != 0:
        raise SystemExit("the last run failed")
    undisturbed = open_store(given.undisturbed)
    print(first_difference(undisturbed, open_store(given.store)) or f"EQUAL: {len(undisturbed.entries)} entries")


if __name__ == "__main__":
    main()
