"""Extraction against its floor, bare decoding loops over the same files, in turn, in one run.

    python benchmarks/extract.py speed VIDEO_FOLDER [--clips 20] [--rounds 5]
    python benchmarks/extract.py workers VIDEO_FOLDER
    python benchmarks/extract.py encoder VIDEO_FOLDER --encoder timm:tf_efficientnet_lite0 --weights lite0.pth
    python benchmarks/extract.py memory VIDEO_FOLDER
    python benchmarks/extract.py film VIDEO_FOLDER [--hours 2]

``speed``: CPU time of one process that decodes and writes a store, against bare PyAV loops and, where it is installed
(pip install motion-vector-extractor), that package; on the files as they are (MPEG-4 for UCF101), and on H.264 and
H.264 720p made of them. Quote the median ratio; other work on the machine weighs on it, least on the ratio of the best
times. ``workers``: two processes against one. ``encoder``: wall time against (decoding + encoding CPU time) / cores.
``memory``: the peak memory of a worker after 100 and after 10,000 clips. ``film``: a worker's peak memory over one
long 1080p file.
"""

import argparse
import contextlib
import csv
import gc
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import psutil

from moclip.pipeline.extract.features import ExtractConfig, FeatureRequest, resolve
from moclip.pipeline.extract.sampling import FramePolicy
from moclip.pipeline.extract.shard import Extraction
from moclip.pipeline.extract.sources import list_sources
from moclip.pipeline.extract.tasks import ShardTask
from moclip.store import add_feature, create_store

#: A key frame every two seconds, as streaming services have it, or one for the whole clip.
FAST = {"preset": "veryfast", "g": "50"}
MEDIUM = {"preset": "medium", "g": "50"}
ONE_GOP = {"preset": "veryfast", "g": "600", "x264-params": "scenecut=0"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "workers", "encoder", "memory", "film"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--clips", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--encoder")
    parser.add_argument("--weights")
    parser.add_argument("--hours", type=float, default=2.0)
    given = parser.parse_args()
    videos = list_sources(given.folder).videos
    paths = [video.path for video in videos][:: max(1, len(videos) // given.clips)][: given.clips]
    with tempfile.TemporaryDirectory() as folder:
        {"speed": speed, "workers": workers, "encoder": encoder, "memory": memory, "film": film}[given.what](
            paths, Path(folder), given
        )


# speed ---------------------------------------------------------------------------------------------------------------


def speed(paths: list[str], folder: Path, given: argparse.Namespace) -> None:
    for corpus, files in corpora(paths, folder).items():
        ways = {
            "bare decode": lambda path: bare(path, vectors=False),
            "bare decode with vectors": bare,
            **({"motion-vector-extractor": other} if has_other() else {}),
        }
        runs: dict[str, Callable[[], int]] = {
            name: lambda way=way, files=files: sum(way(path) for path in files) for name, way in ways.items()
        }
        for name, (kinds, frames, exact) in MOCLIP.items():
            runs[name] = lambda k=kinds, f=frames, e=exact, files=files: moclip(files, folder, k, f, e)
        compare(corpus, runs, given.rounds)


#: Which features, which sampled frames, and whether everything is decoded in the plain way.
MOCLIP = {
    "moclip motion": (("motion",), None, False),
    "moclip motion + middle frame": (("motion",), "middle", False),
    "moclip motion + accumulated": (("motion", "motion-accumulated"), None, False),
    "moclip motion, --exact": (("motion",), None, True),
}


def compare(corpus: str, runs: dict[str, Callable[[], int]], rounds: int) -> None:
    """Every way once a round; the ratios of a round have the same neighbours on the machine."""
    frames = {name: run() for name, run in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            gc.collect()  # nobody pays for what another left
            start = time.process_time()
            run()
            seconds[name].append(time.process_time() - start)
    print(f"{corpus}: {frames['bare decode']} frames, {rounds} rounds")
    base = seconds["bare decode with vectors"]
    for name, found in seconds.items():
        ratios = [b / s for b, s in zip(base, found, strict=True)]
        rate = frames["bare decode"] / statistics.median(found)
        middle, best = statistics.median(ratios), min(base) / min(found)
        span = f"({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"  {name:30} {rate:7.0f} frames/s  median {middle:.2f} x {span}, best times {best:.2f} x", flush=True)


def bare(path: str, vectors: bool = True) -> int:
    """Decode, one thread; with exported vectors, read as numpy. Nothing is done with them."""
    frames = 0
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        stream.codec_context.thread_count = 1
        if vectors:
            stream.codec_context.options = {"flags2": "+export_mvs"}
        for frame in container.decode(stream):
            side_data = frame.side_data.get("MOTION_VECTORS") if vectors else None
            if side_data is not None:
                side_data.to_ndarray()
            frames += 1
    return frames


def has_other() -> bool:
    with contextlib.suppress(ImportError):
        import mvextractor.videocap  # noqa: F401

        return True
    return False


def other(path: str) -> int:
    """motion-vector-extractor: vectors of every frame, without its pictures."""
    from mvextractor.videocap import VideoCap

    capture = VideoCap()
    capture.open(path)
    with contextlib.suppress(AttributeError):
        capture.set_decode_frames(False)
    frames = 0
    while capture.read()[0]:
        frames += 1
    capture.release()
    return frames


def moclip(paths: list[str], folder: Path, kinds: tuple[str, ...], frames: str | None, exact: bool) -> int:
    """One shard, from its files to its receipt."""
    config = resolve(FeatureRequest(kinds=kinds, encoder=None))
    policy = FramePolicy(frames) if frames else None
    # The frames are sampled and made RGB; what an encoder would cost is not what is compared.
    decode = replace(config.decode, frames=policy, exact=exact)
    config = AsItIs(features=config.features, decode=decode, encoder=None)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        store = f"{place}/s.zarr"
        create_store(store)
        for name, spec in config.features.items():
            add_feature(store, name, spec)
        videos = tuple(list_sources(Path(path)).videos[0] for path in paths)
        videos = tuple(replace(video, id=f"{number}") for number, video in enumerate(videos))
        return Extraction(store, config).run(ShardTask(0, videos, tuple(config.features))).frames


class AsItIs(ExtractConfig):
    """Samples frames although no feature asks for them."""

    def only(self, names):
        return self


def corpora(paths: list[str], folder: Path) -> dict[str, list[str]]:
    return {
        "the files as they are": paths,
        "H.264 veryfast, 320x240": [made(path, folder / "240", (320, 240), FAST) for path in paths[:10]],
        "H.264 veryfast, 1280x720": [made(path, folder / "720", (1280, 720), FAST) for path in paths[:3]],
        "H.264 medium, 1280x720": [made(path, folder / "720m", (1280, 720), MEDIUM) for path in paths[:3]],
        "H.264 veryfast, 1280x720, one GOP": [made(path, folder / "gop", (1280, 720), ONE_GOP) for path in paths[:3]],
    }


def made(path: str, folder: Path, size: tuple[int, int], options: dict[str, str]) -> str:
    """A file's frames as H.264."""
    folder.mkdir(exist_ok=True)
    out = folder / (Path(path).stem + ".mp4")
    write(out, frames_of(path), size, options)
    return str(out)


def frames_of(path: str) -> Iterator[av.VideoFrame]:
    with av.open(path) as container:
        yield from container.decode(video=0)


def write(
    out: Path,
    frames: Iterator[av.VideoFrame],
    size: tuple[int, int],
    options: dict[str, str],
    codec: str = "libx264",
) -> None:
    with av.open(str(out), "w") as target:
        stream = target.add_stream(codec, rate=25, options=options)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        for number, frame in enumerate(frames):
            scaled = frame.reformat(*size, format="yuv420p", interpolation="BICUBIC")
            scaled.pts, scaled.time_base, scaled.pict_type = number, Fraction(1, 25), 0
            target.mux(stream.encode(scaled))
        target.mux(stream.encode())


# whole commands ------------------------------------------------------------------------------------------------------


def command(source: Path, store: Path, *options: str) -> tuple[float, float, float]:
    """Run ``moclip extract``: its wall seconds, the CPU seconds of all its processes, a worker's peak memory in MB."""
    code = "from moclip.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "extract", str(source), str(store), *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    start, peak, cpu = time.monotonic(), 0.0, {}
    while process.poll() is None:
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(process.pid).children(recursive=True):
                peak = max(peak, child.memory_info().rss / 1e6)
                times = child.cpu_times()
                cpu[child.pid] = times.user + times.system
        time.sleep(0.2)
    seconds = time.monotonic() - start
    if process.returncode:
        raise SystemExit(process.stderr.read().decode() if process.stderr else "failed")
    return seconds, sum(cpu.values()), peak


def listed(paths: list[str], count: int, folder: Path) -> Path:
    """A list of ``count`` videos: the files over and over, under ids of their own."""
    table = folder / f"{count}.csv"
    with table.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "id"])
        rows.writerows([paths[number % len(paths)], f"{number:06d}"] for number in range(count))
    return table


def workers(paths: list[str], folder: Path, given: argparse.Namespace) -> None:
    source = listed(paths, 600, folder)
    for turn in range(given.rounds):
        found = [
            command(source, folder / f"{turn}-{n}.zarr", "--feature", "motion", "--workers", f"{n}")[0] for n in (1, 2)
        ]
        start = [
            command(
                listed(paths, 2, folder), folder / f"{turn}-{n}-start.zarr", "--feature", "motion", "--workers", f"{n}"
            )[0]
            for n in (1, 2)
        ]
        whole, net = found[0] / found[1], (found[0] - start[0]) / (found[1] - start[1])
        print(f"600 clips: one worker {found[0]:.1f} s, two {found[1]:.1f} s: {whole:.2f} x", end="")
        print(f"; without starting up {net:.2f} x", flush=True)


def encoder(paths: list[str], folder: Path, given: argparse.Namespace) -> None:
    """CPU time is that of one worker alone. What 400 clips take more than 100 is free of the time to start."""
    options = ("--encoder", given.encoder, *(("--weights", given.weights) if given.weights else ()))
    found = {}
    for count in (100, 400):
        source = listed(paths, count, folder)
        wall, _, _ = command(source, folder / f"{count}.zarr", *options)
        _, cpu, _ = command(source, folder / f"{count}-one.zarr", *options, "--workers", "1")
        found[count] = (wall, cpu)
        print(f"{count} clips: wall {wall:.1f} s; CPU of one worker {cpu:.1f} s", flush=True)
    wall, cpu = (more - less for less, more in zip(found[100], found[400], strict=True))
    cores = os.cpu_count() or 1
    print(f"300 more: wall {wall:.1f} s, CPU {cpu:.1f} s, wall / (CPU / {cores} cores) = {wall / cpu * cores:.2f}")


def memory(paths: list[str], folder: Path, given: argparse.Namespace) -> None:
    for count in (100, 1000, 10_000):
        seconds, _, peak = command(listed(paths, count, folder), folder / f"{count}.zarr", "--feature", "motion")
        print(f"{count} clips: {seconds:.1f} s, peak of a worker {peak:.0f} MB", flush=True)


def film(paths: list[str], folder: Path, given: argparse.Namespace) -> None:
    """A 1080p film of the clips, over and over; ten minutes are encoded, and their packets repeated."""
    path = folder / "film.mp4"
    make_film(paths, path, folder, given.hours)
    print(f"film: {given.hours} hours, {path.stat().st_size / 1e6:.0f} MB", flush=True)
    features = [word for kind in ("motion", "motion-accumulated", "image") for word in ("--feature", kind)]
    options = (*features, "--frames", "fps:1", "--clip-seconds", "10", "--workers", "1")
    seconds, _, peak = command(path, folder / "film.zarr", *options)
    print(f"{' '.join(options)}: {seconds:.0f} s, peak of the worker {peak:.0f} MB", flush=True)


def make_film(paths: list[str], out: Path, folder: Path, hours: float) -> None:
    part = folder / "part.mp4"
    frames = (frame for path in paths for frame in frames_of(path))
    write(part, frames, (1920, 1080), {"g": "50", "preset": "ultrafast", "crf": "30", "bf": "2"})
    with av.open(str(out), "w") as target, av.open(str(part)) as first:
        stream = target.add_stream_from_template(first.streams.video[0])
        length = first.streams.video[0].duration
        seconds = float(length * first.streams.video[0].time_base)
        for turn in range(round(hours * 3600 / seconds)):
            with av.open(str(part)) as again:
                for packet in again.demux(again.streams.video[0]):
                    if packet.size:
                        packet.stream = stream
                        packet.pts += turn * length
                        packet.dts += turn * length
                        target.mux(packet)


if __name__ == "__main__":
    main()
