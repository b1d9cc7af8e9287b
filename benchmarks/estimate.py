"""Which estimator for streams without vectors: python benchmarks/estimate.py VIDEO…

For each video, and each way to come by vectors: frames a second of one core (without the decoding), and how well a
frame is predicted from the one before it by the vectors alone (PSNR of the grey picture, in the mean).
"""

import itertools
import sys
import time
from collections.abc import Iterator
from fractions import Fraction
from functools import partial

import av
import av.filter
import numpy as np

from moclip.pipeline.extract.estimate import Estimator
from moclip.pipeline.extract.motion import VECTOR, Grid, paint_motion

FRAMES = 100
MESTIMATE = ("epzs", "ds", "hexbs", "tdls", "ntss", "tss", "fss", "umh")


def read(path: str, height: int | None, vectors: bool = False) -> list[av.VideoFrame]:
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.options = {"flags2": "+export_mvs"} if vectors else {}
        frames = [frame for frame, _ in zip(container.decode(stream), range(FRAMES), strict=False)]
    if height:
        frames = [f.reformat(f.width * height // f.height // 2 * 2, height, format="yuv420p") for f in frames]
    return frames


def vectors_of(frame: av.VideoFrame) -> np.ndarray:
    side_data = frame.side_data.get("MOTION_VECTORS")
    return np.empty(0, VECTOR) if side_data is None else np.frombuffer(side_data, VECTOR)


def estimator(frames: list[av.VideoFrame]) -> list[np.ndarray]:
    ours = Estimator()
    return [vectors_of(again) for frame in (*frames, None) for again in ours.feed(frame)]


def mestimate(frames: list[av.VideoFrame], method: str) -> list[np.ndarray]:
    return [_completed(frame) for frame in _filtered(frames, method)]


def _filtered(frames: list[av.VideoFrame], method: str) -> Iterator[av.VideoFrame]:
    graph = av.filter.Graph()
    graph.threads = 1
    first = frames[0]
    steps = [
        graph.add_buffer(width=first.width, height=first.height, format=first.format.name, time_base=Fraction(1, 25)),
        graph.add("format", "gray"),
        graph.add("mestimate", f"method={method}:mb_size=16"),
        graph.add("buffersink"),
    ]
    for before, after in itertools.pairwise(steps):
        before.link_to(after)
    graph.configure()
    # It looks one frame ahead, and keeps the last one to itself.
    for number, frame in enumerate((*frames, frames[-1])):
        frame.pts, frame.time_base = number, Fraction(1, 25)
        graph.push(frame)
        try:
            yield graph.pull()
        except (BlockingIOError, av.error.EOFError):
            continue


def _completed(frame: av.VideoFrame) -> np.ndarray:
    """The filter leaves motion_x, motion_y and motion_scale as memory happens to be."""
    vectors = vectors_of(frame).copy()
    for axis in "xy":
        vectors[f"motion_{axis}"] = vectors[f"src_{axis}"].astype(int) - vectors[f"dst_{axis}"]
    vectors["motion_scale"] = 1
    return vectors


def psnr(frames: list[av.VideoFrame], vectors: list[np.ndarray]) -> float:
    grey = [frame.reformat(format="gray").to_ndarray().astype(np.float32) for frame in frames]
    height, width = grey[0].shape
    y, x = np.mgrid[:height, :width].astype(np.float32)
    out = np.empty((1, 2, height, width), np.int16)
    found = []
    for before, now, own in zip(grey, grey[1:], vectors[1:], strict=False):
        paint_motion(own, np.array([len(own)]), np.array([0]), Grid(width, height, 1), out)
        guess = _interpolated(before, x - out[0, 0] / 4, y - out[0, 1] / 4)
        found.append(10 * np.log10(255**2 / max(float(((guess - now) ** 2).mean()), 1e-3)))
    return float(np.mean(found))


def _interpolated(picture: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    height, width = picture.shape
    x, y = np.clip(x, 0, width - 1), np.clip(y, 0, height - 1)
    x0, y0 = np.minimum(x.astype(int), width - 2), np.minimum(y.astype(int), height - 2)
    right, down = x - x0, y - y0
    top = picture[y0, x0] * (1 - right) + picture[y0, x0 + 1] * right
    bottom = picture[y0 + 1, x0] * (1 - right) + picture[y0 + 1, x0 + 1] * right
    return top * (1 - down) + bottom * down


def main(paths: list[str]) -> None:
    for path in paths:
        for height in (None, 720):
            frames = read(path, height)
            print(f"{path.rsplit('/', 1)[-1]}  {frames[0].width}x{frames[0].height}, {len(frames)} frames")
            none = [np.empty(0, VECTOR)] * len(frames)
            print(f"  {'no vectors':16}             {psnr(frames, none):6.2f} dB")
            if height is None:
                native = [vectors_of(frame) for frame in read(path, None, vectors=True)]
                print(f"  {'native':16}             {psnr(frames, native):6.2f} dB")
            methods = MESTIMATE[:1] if height else MESTIMATE
            ways = {f"mestimate {method}": partial(mestimate, method=method) for method in methods}
            for name, way in {"mpeg4": estimator, **ways}.items():
                start = time.process_time()
                vectors = way(frames)
                rate = len(frames) / (time.process_time() - start)
                print(f"  {name:16}{rate:7.0f} frames/s {psnr(frames, vectors):6.2f} dB")


if __name__ == "__main__":
    main(sys.argv[1:])
