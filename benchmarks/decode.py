"""Motion-only decoding against a bare PyAV loop that decodes and reads the vectors, over the same files, in turn.

    python benchmarks/decode.py VIDEO_FOLDER [--clips 40] [--rounds 5]

Prints frames per second of CPU time and the ratio of each round; quote the median ratio.
"""

import argparse
import statistics
import time
from pathlib import Path

import av

from moclip.pipeline.extract.decode import DecodeConfig, decode_video
from moclip.pipeline.extract.sampling import FramePolicy
from moclip.pipeline.extract.sources import list_sources

CONFIGS = {
    "motion": DecodeConfig(accumulate=False),
    "motion + accumulated": DecodeConfig(),
    "motion + middle frame": DecodeConfig(accumulate=False, frames=FramePolicy("middle")),
}


def bare(path: str) -> int:
    """Decode with exported vectors, read as numpy, one thread: nothing is done with them."""
    frames = 0
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        stream.codec_context.thread_count = 1
        stream.codec_context.options = {"flags2": "+export_mvs"}
        for frame in container.decode(stream):
            side_data = frame.side_data.get("MOTION_VECTORS")
            if side_data is not None:
                side_data.to_ndarray()
            frames += 1
    return frames


def moclip(path: str, config: DecodeConfig) -> int:
    return decode_video(path, path, config, lambda rows: None).frames


def frames_per_second(run, paths):
    start = time.process_time()
    frames = sum(run(path) for path in paths)
    return frames / (time.process_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--clips", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    paths = [video.path for video in list_sources(given.folder).videos]
    paths = paths[:: max(1, len(paths) // given.clips)]
    for config in CONFIGS.values():
        moclip(paths[0], config)
    ratios: dict[str, list[float]] = {name: [] for name in CONFIGS}
    for number in range(given.rounds):
        base = frames_per_second(bare, paths)
        print(f"round {number + 1}: bare decode with vectors {base:.0f} frames/s")
        for name, config in CONFIGS.items():
            speed = frames_per_second(lambda path, config=config: moclip(path, config), paths)
            ratios[name].append(speed / base)
            print(f"  {name:24} {speed:6.0f} frames/s  {speed / base:.2f} x")
    for name, found in ratios.items():
        print(
            f"{name:24} median {statistics.median(found):.2f} x of the bare loop ({min(found):.2f} to {max(found):.2f})"
        )


if __name__ == "__main__":
    main()
