"""Small stores with known content, written with the store's own writer: nothing is decoded."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from moclip.store import (
    FeatureSpec,
    ShardWriter,
    SourceFacts,
    add_feature,
    create_store,
    publish,
    write_labels,
)

#: (appearance, direction): only both together name a class.
CLASSES = ("RedUp", "RedDown", "BlueUp", "BlueDown")
EMBEDDING_DIM = 16


@dataclass(frozen=True)
class Clip:
    """A video to be invented: ``frames`` motion rows on a grid of 8 px cells over ``width`` x ``height``."""

    id: str
    label: str | None
    group: str | None = None
    splits: Mapping[str, str] | None = None
    frames: int = 12
    width: int = 64
    height: int = 48
    images: int = 1
    fails: bool = False


def motion_spec(kind: str = "motion-accumulated", cell: int = 8) -> FeatureSpec:
    return FeatureSpec(
        kind=kind,
        dtype="int16",
        unit="px",
        parameters={"version": 1, "motion": "native", "cell": cell, "size": None},
        columns={"pts_seconds": "float64", "picture_type": "uint8"},
    )


def embedding_spec(encoder: str = "timm:invented", weights_sha256: str = "0" * 64) -> FeatureSpec:
    return FeatureSpec(
        kind="embedding",
        dtype="float16",
        unit="1",
        parameters={
            "encoder": encoder,
            "weights_sha256": weights_sha256,
            "preprocessing": {},
            "frames": "middle",
        },
        columns={"frame_index": "int32", "pts_seconds": "float64"},
    )


def picture_types(frames: int, gop: int = 12) -> npt.NDArray[np.uint8]:
    """1 at every I-frame, 2 (P) elsewhere."""
    return np.where(np.arange(frames) % gop == 0, 1, 2).astype(np.uint8)


def motion_rows(clip: Clip, rng: np.random.Generator) -> npt.NDArray[np.int16]:
    """Noise, with everything moving up or down where the label says so; nothing at I-frames."""
    shape = (clip.frames, 2, -(-clip.height // 8), -(-clip.width // 8))
    rows = rng.integers(-2, 3, shape)
    rows[:, 1] += 12 * (("Down" in str(clip.label)) - ("Up" in str(clip.label)))
    rows[picture_types(clip.frames) == 1] = 0
    return rows.astype(np.int16)


def embedding_rows(clip: Clip, rng: np.random.Generator) -> npt.NDArray[np.float16]:
    """Noise around one of two means: red or not."""
    rows = rng.normal(0, 0.5, (clip.images, EMBEDDING_DIM))
    rows[:, 0] += 4 if "Red" in str(clip.label) else -4
    return rows.astype(np.float16)


def corpus(per_class: int = 6, *, splits: Sequence[str] = ("1",), **facts: int) -> list[Clip]:
    """``per_class`` clips of each class; the last third of the groups are the test side."""
    clips = []
    for label in CLASSES:
        for g in range(per_class):
            part = "test" if g >= per_class - max(1, per_class // 3) else "train"
            clip = Clip(f"{label}/v{g:02d}", label, f"{label}_g{g // 2}", dict.fromkeys(splits, part), **facts)
            clips.append(clip)
    return clips


def write_store(
    path: Path,
    clips: Sequence[Clip],
    *,
    classes: Sequence[str] = CLASSES,
    seed: int = 0,
    embedding: FeatureSpec | None = None,
    rows: Mapping[str, npt.NDArray[np.float16]] | None = None,
) -> Path:
    """A store with motion-accumulated and an embedding of every clip; a failing clip has a failed motion
    entry, one without images a failed embedding.

    ``rows`` gives embeddings by id instead of invented ones.
    """
    create_store(path)
    rng = np.random.default_rng(seed)
    image, motion = embedding or embedding_spec(), motion_spec()
    features = {"motion-accumulated": motion, "embedding-invented": image}
    writers = {}
    for name, spec in features.items():
        add_feature(path, name, spec)
        writers[name] = ShardWriter(path, feature=name, spec=spec, shard="one")
    for clip in clips:
        facts = SourceFacts(id=clip.id, width=clip.width, height=clip.height, frames=clip.frames)
        seconds = np.arange(clip.frames) / 25
        writer = writers["motion-accumulated"]
        if clip.fails:
            writer.fail(facts, "no_vectors", "hevc exports none")
        else:
            writer.append(motion_rows(clip, rng), pts_seconds=seconds, picture_type=picture_types(clip.frames))
            writer.ok(facts)
        vectors = embedding_rows(clip, rng) if rows is None else rows[clip.id]
        index = np.arange(len(vectors))
        writer = writers["embedding-invented"]
        if len(vectors):
            writer.append(vectors, frame_index=index, pts_seconds=index / 25)
            writer.ok(facts)
        else:
            writer.fail(facts, "truncated", "no frame")
    for writer in writers.values():
        writer.finish()
    publish(path)
    label(path, clips, classes)
    return path


def label(path: Path, clips: Sequence[Clip], classes: Sequence[str] = CLASSES) -> None:
    """Write the clips' labels, groups and splits into the store."""
    text = pa.string()
    names = sorted({name for clip in clips for name in clip.splits or ()})
    columns = {
        "id": pa.array([clip.id for clip in clips], text),
        "label": pa.array([clip.label for clip in clips], text),
        "group": pa.array([clip.group for clip in clips], text),
    }
    for name in names:
        columns[f"split_{name}"] = pa.array([(clip.splits or {}).get(name) for clip in clips], text)
    write_labels(path, pa.table(columns), list(classes))


def tiny_clip(folder: Path, *, quick_gelu: bool = True) -> tuple[str, Path]:
    """A CLIP of a few thousand image weights, known to open_clip: its model name and a file of random weights."""
    import open_clip
    import torch

    name = "moclip-tiny-quickgelu" if quick_gelu else "moclip-tiny"
    tower = {"width": 32, "layers": 1}
    architecture = {
        "embed_dim": EMBEDDING_DIM,
        "quick_gelu": quick_gelu,
        "vision_cfg": {"image_size": 32, "patch_size": 16, "head_width": 16, **tower},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "heads": 2, **tower},
    }
    config = folder / f"{name}.json"
    config.write_text(json.dumps(architecture))
    open_clip.add_model_config(config)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = open_clip.model.CLIP(**architecture)
    file = folder / f"{name}.pt"
    torch.save(model.state_dict(), file)
    return name, file
