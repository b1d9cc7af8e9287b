"""Training from a store against what people do without one.

    python benchmarks/train.py fusion [--videos 13320] [--epochs 100]
    python benchmarks/train.py tensors VIDEO_FOLDER [--clips 24] [--rounds 5]
    python benchmarks/train.py gpu [--batch 80]

``fusion``: a fusion trained by moclip, from opening the store to the tested run, against a bare torch loop over the
same tensors in memory, on an invented store as large as UCF101. ``tensors``: batches ready for MV-TSN (3 segments,
224 px) from a store, against the published way: decode the group of pictures at every access, accumulate, resize.
``gpu``: the clips a second of MV-TSN's training, against the same network on tensors that lie on the device.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import av
import numba
import numpy as np
import torch
from extract import frames_of, write
from torch import nn
from torch.nn.functional import cross_entropy, interpolate

from moclip.pipeline.backbones import timm_backbone
from moclip.pipeline.extract.motion import VECTOR
from moclip.pipeline.extract.sources import list_sources
from moclip.pipeline.learn.card import ModelCard
from moclip.pipeline.learn.clips import read_split
from moclip.pipeline.learn.data import Motion, random_indices, shuffled
from moclip.pipeline.learn.fit import EpochRow, Fitted, fit
from moclip.pipeline.learn.fusion import train_fusion
from moclip.pipeline.learn.fusion_model import FusionConfig
from moclip.pipeline.learn.heads import mlp
from moclip.pipeline.learn.metrics import score
from moclip.pipeline.learn.network import MotionTSN
from moclip.pipeline.learn.pooled import POOLED, write_pooled
from moclip.pipeline.learn.run_writer import RunWriter
from moclip.pipeline.learn.runs import FEATURES
from moclip.pipeline.learn.tsn import TSNConfig, _Batches
from moclip.pipeline.learn.views import Augmentation, random_views
from moclip.store import (
    FeatureSpec,
    ShardWriter,
    SourceFacts,
    add_feature,
    create_store,
    open_store,
    publish,
    write_labels,
)

CLASSES, MOTION_SIZE, IMAGE_SIZE, SEGMENTS = 101, 1280, 512, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["fusion", "tensors", "gpu"])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--videos", type=int, default=13_320)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--clips", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=80)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        {"fusion": fusion, "tensors": tensors, "gpu": gpu}[given.what](Path(folder), given)


# fusion --------------------------------------------------------------------------------------------------------------


def fusion(folder: Path, given: argparse.Namespace) -> None:
    store, run = invented(folder / "s.zarr", given.videos), folder / "tsn"
    motion_run(store, run)
    print(f"a store of {given.videos} videos is ready", flush=True)
    config = FusionConfig("1", motion_run=str(run), epochs=given.epochs, val_fraction=0.0)
    start = time.perf_counter()
    result = train_fusion(store, folder / "fusion", config)
    ours = time.perf_counter() - start
    print(f"moclip: {ours:.1f} s, of which its epochs are {result.seconds:.1f} s", flush=True)

    opened, pooled = open_store(store), open_store(run / FEATURES)
    split = read_split(opened, "1", features=["embedding"], val_fraction=0.0)
    rows = torch.from_numpy(np.stack(pooled.read_all(POOLED, split.train.ids)))
    images = torch.from_numpy(np.concatenate(opened.read_all("embedding", split.train.ids)))
    targets = torch.from_numpy(split.train.targets)
    for name, threads, fused in (("as torch does by itself", torch.get_num_threads(), None), ("tuned", 1, True)):
        torch.set_num_threads(threads)
        start = time.perf_counter()
        bare_loop(rows, images, targets, config, fused)
        bare = time.perf_counter() - start
        print(f"bare loop, {name}: {bare:.1f} s; moclip takes {ours / bare:.2f} x as long", flush=True)


def bare_loop(
    rows: torch.Tensor, images: torch.Tensor, targets: torch.Tensor, config: FusionConfig, fused: bool | None
) -> None:
    """The recipe in as few lines as torch allows: nothing is read, held out, tested or kept."""
    head = mlp(MOTION_SIZE, IMAGE_SIZE, CLASSES)
    optimizer = torch.optim.AdamW(head.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=fused)
    parts = torch.arange(rows.shape[1]).tensor_split(SEGMENTS)
    for _ in range(config.epochs):
        for some in torch.randperm(len(targets)).split(config.batch):
            drawn = torch.stack([part[torch.randint(len(part), some.shape)] for part in parts], 1)
            seen = torch.cat([rows[some[:, None], drawn].float().mean(1), images[some].float()], 1)
            loss = cross_entropy(nn.Sequential.forward(head, seen), targets[some])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def invented(path: Path, videos: int, frames: int = 26, cells: int = 4) -> Path:
    """A store of random embeddings and motion, with a split of UCF101's proportions."""
    create_store(path)
    motion = FeatureSpec(
        kind="motion-accumulated",
        dtype="int16",
        unit="px",
        parameters={"version": 1, "motion": "native", "cell": 8, "size": [8 * cells, 8 * cells]},
        columns={"pts_seconds": "float64", "picture_type": "uint8"},
    )
    image = FeatureSpec(
        kind="embedding",
        dtype="float16",
        unit="1",
        parameters={"encoder": "none:invented", "weights_sha256": "0" * 64, "preprocessing": {}, "frames": "middle"},
        columns={"frame_index": "int32", "pts_seconds": "float64"},
    )
    ids = [f"v{i:06d}" for i in range(videos)]
    rng = np.random.default_rng(0)
    for name, spec in (("motion-accumulated", motion), ("embedding", image)):
        add_feature(path, name, spec)
        writer = ShardWriter(path, feature=name, spec=spec, shard="one")
        seconds = np.arange(frames) / 25
        for video in ids:
            if spec is motion:
                rows = rng.integers(-20, 21, (frames, 2, cells, cells), np.int16)
                writer.append(rows, pts_seconds=seconds, picture_type=np.full(frames, 2, np.uint8))
            else:
                rows = rng.normal(size=(1, IMAGE_SIZE)).astype(np.float16)
                writer.append(rows, frame_index=np.zeros(1, np.int32), pts_seconds=np.zeros(1))
            writer.ok(SourceFacts(id=video))
        writer.finish()
    publish(path)
    import pyarrow as pa

    labels = [f"class {i % CLASSES:03d}" for i in range(videos)]
    parts = ["test" if i % 7 in (0, 3) else "train" for i in range(videos)]
    table = {"id": ids, "label": labels, "group": [None] * videos, "split_1": parts}
    schema = pa.schema([(name, pa.string()) for name in table])
    write_labels(path, pa.table(table, schema=schema), sorted(set(labels)))
    return path


def motion_run(store: Path, out: Path) -> None:
    """What `moclip train tsn` leaves, of a network that says anything: its size is what matters here."""
    config = TSNConfig("1", input_size=32, views=1, epochs=1, val_fraction=0.0)
    opened = open_store(store)
    split = read_split(opened, "1", features=["motion-accumulated"], val_fraction=0.0)
    writer = RunWriter(out, "tsn", config, split, {"motion-accumulated": opened.features["motion-accumulated"]})
    motion = Motion(opened, "motion-accumulated", split.every.ids, torch.device("cpu"))
    augmented = config.augmented(len(split.train))
    write_pooled(out / FEATURES, anything, motion, size=32, augmented=augmented, weights_sha256="0" * 64)
    row = EpochRow(1, 1.0, None, None, 1.0, 0.01)
    writer.keep({"nothing": torch.zeros(1)}, [row])
    test = score(torch.zeros(len(split.test), CLASSES), split.test, split.classes, split="1", protocol="x", missing={})
    writer.finish(Fitted((row,), row), test, ModelCard(()))


def anything(images: torch.Tensor) -> torch.Tensor:
    return torch.randn(len(images), MOTION_SIZE)


# tensors -------------------------------------------------------------------------------------------------------------


def tensors(folder: Path, given: argparse.Namespace) -> None:
    """Both sides see the same clips, re-encoded as CoViAR does: MPEG-4, 340x256, a key frame every 12."""
    videos = list_sources(given.folder).videos
    paths = [video.path for video in videos][:: max(1, len(videos) // given.clips)][: given.clips]
    (folder / "clips").mkdir()
    files = [folder / "clips" / f"{i:03d}.mp4" for i in range(len(paths))]
    for path, file in zip(paths, files, strict=True):
        write(file, frames_of(path), (340, 256), {"g": "12", "bf": "0"}, "mpeg4")
    store = folder / "s.zarr"
    options = ["--feature", "motion-accumulated", "--motion", "native", "--encoder", "none", "--workers", "1"]
    subprocess.run(
        [sys.executable, "-m", "moclip.cli", "extract", str(folder / "clips"), str(store), *options],
        check=True, capture_output=True,
    )  # fmt: skip
    opened = open_store(store)
    motion = Motion(opened, "motion-accumulated", opened.ids("motion-accumulated"), torch.device("cpu"))
    rng = np.random.default_rng(0)
    found: dict[str, list[float]] = {"moclip": [], "published way": []}
    for turn in range(given.rounds + 1):
        frames = random_indices(motion.frames, SEGMENTS, rng)
        views = random_views(len(files), Augmentation(224), rng)
        clips = np.arange(len(files))
        start = time.perf_counter()
        ours = motion.prepared(motion.fetch(clips, motion.before_i_frames(clips, frames)), views, 224)
        middle = time.perf_counter()
        theirs = torch.stack([published(file, row) for file, row in zip(files, frames, strict=True)])
        end = time.perf_counter()
        assert ours.shape == theirs.shape == (len(files), SEGMENTS, 2, 224, 224)
        if turn:  # the first one compiles
            found["moclip"].append(middle - start)
            found["published way"].append(end - middle)
    for name, seconds in found.items():
        print(f"{name}: {len(files) / median(seconds):.1f} clips/s")
    ratios = [b / a for a, b in zip(*found.values(), strict=True)]
    print(f"moclip is {median(ratios):.1f} x ({min(ratios):.1f} to {max(ratios):.1f}) the published way")


def published(file: Path, frames: Any) -> torch.Tensor:
    """A clip's pictures (segments, 2, 224, 224): for each, open, go to the key frame before it, decode, accumulate."""
    pictures = []
    for number in frames.tolist():
        with av.open(str(file)) as container:
            stream = container.streams.video[0]
            stream.codec_context.options = {"flags2": "+export_mvs"}
            wanted = int(number / stream.average_rate / stream.time_base)
            container.seek(wanted, stream=stream, backward=True)
            moved = None
            for frame in container.decode(stream):
                if moved is None or frame.key_frame:
                    moved = np.zeros((2, frame.height, frame.width), np.int32)
                vectors = frame.side_data.get("MOTION_VECTORS")
                if vectors is not None:
                    moved = accumulated(vectors.to_ndarray().view(VECTOR).ravel(), moved)
                if frame.pts >= wanted:
                    break
        assert moved is not None
        bytes_ = np.clip((moved * (127.5 / 20)).astype(np.int32) + 128, 0, 255).astype(np.uint8)
        picture = torch.from_numpy(bytes_)[None].float()
        pictures.append(interpolate(picture, (224, 224), mode="bilinear")[0] / 255 - 0.5)
    return torch.stack(pictures)


@numba.njit(cache=True)
def accumulated(vectors, before):  # type: ignore[no-untyped-def]
    """CoViAR's accumulation: a pixel's displacement is its vector's, and that of where it came from."""
    after = before.copy()
    height, width = before.shape[1:]
    for v in vectors:
        dx, dy = int(v.dst_x) - int(v.src_x), int(v.dst_y) - int(v.src_y)
        left, top = int(v.dst_x) - v.w // 2, int(v.dst_y) - v.h // 2
        for y in range(max(top, 0, dy), min(top + v.h, height, height + dy)):
            for x in range(max(left, 0, dx), min(left + v.w, width, width + dx)):
                after[0, y, x] = before[0, y - dy, x - dx] + dx
                after[1, y, x] = before[1, y - dy, x - dx] + dy
    return after


# gpu -----------------------------------------------------------------------------------------------------------------


class Nowhere:
    """A run that is not kept."""

    def keep(self, *_: Any) -> None: ...

    def save(self, *_: Any) -> None: ...

    def saved(self) -> None: ...


def gpu(folder: Path, given: argparse.Namespace) -> None:
    """Epochs of training from resident rows, and of the same steps on random tensors that are there already."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    opened = open_store(invented(folder / "s.zarr", min(given.videos, 20 * given.batch), cells=40))
    split = read_split(opened, "1", features=["motion-accumulated"], val_fraction=0.0)
    config = TSNConfig("1", batch=given.batch, epochs=3, input_size=224, weights="none", val_fraction=0.0)
    motion = Motion(opened, "motion-accumulated", split.every.ids, device)
    batches = _Batches(motion, split, config)
    images = torch.randn(given.batch, SEGMENTS, 2, 224, 224, device=device)
    targets = torch.randint(CLASSES, (given.batch,), device=device)

    def ready(epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for some in shuffled(len(split.train), given.batch, np.random.default_rng(epoch)):
            yield images[: len(some)], targets[: len(some)]

    rates = {}
    for name, train in (("random tensors", ready), ("moclip", batches.train)) * 2:  # the first turn warms up
        model = MotionTSN(timm_backbone("efficientnet_b0", pretrained=False), CLASSES).to(device)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, eps=1e-3)
        fitted = fit(model, optimizer, config, train=train, val=None, keeper=Nowhere())
        rates[name] = len(split.train) / min(row.seconds for row in fitted.history)
        print(f"{name}: {rates[name]:.0f} clips/s on {device}", flush=True)
    print(f"moclip / random tensors: {rates['moclip'] / rates['random tensors']:.2f}")


if __name__ == "__main__":
    main()
