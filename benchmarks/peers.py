"""One feature's rows in the forms that people keep them in, each read in its own usual way.

A peer may ``gather`` (random rows of a draw) and may ``load`` (every row into memory); ``files`` is what it reads.
"""

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
import zarr
from numpy.typing import NDArray

from moclip.store import ShardWriter, SourceFacts, Store, add_feature, create_store, open_store, publish, write_labels

SEGMENTS = 3
VIDEOS_PER_TAR = 64


@dataclass(frozen=True)
class Draw:
    """Which rows to read: of video ``videos[k]`` (a position) the rows ``frames[k]``; shapes (n,) and (n, SEGMENTS)."""

    videos: NDArray[np.int64]
    frames: NDArray[np.int64]


@dataclass(frozen=True)
class Rows:
    """Every row of one feature, (n, *row_shape); those of video ``ids[k]`` are ``starts[k]`` to ``starts[k + 1]``."""

    feature: str
    ids: list[str]
    starts: NDArray[np.int64]
    values: NDArray[Any]

    def of(self, k: int) -> NDArray[Any]:
        return self.values[self.starts[k] : self.starts[k + 1]]

    def numbers(self, draw: Draw) -> NDArray[np.int64]:
        return (self.starts[draw.videos][:, None] + draw.frames).ravel()

    def draw(self, videos: int, rng: np.random.Generator) -> Draw:
        """Videos with replacement, and one random row from each third of each."""
        chosen = rng.integers(len(self.ids), size=videos)
        counts = np.diff(self.starts)[chosen]
        edges = counts[:, None] * np.arange(SEGMENTS + 1) // SEGMENTS
        return Draw(chosen, rng.integers(edges[:, :-1], np.maximum(edges[:, 1:], edges[:, :-1] + 1)))


def read_rows(store: Store, feature: str) -> Rows:
    """All rows of the videos that share the commonest row shape: one array holds no other."""
    ids = store.ids(feature)
    parts = store.read_all(feature, ids)
    shape = Counter(part.shape[1:] for part in parts).most_common(1)[0][0]
    kept = [(video, part) for video, part in zip(ids, parts, strict=True) if part.shape[1:] == shape]
    starts = np.cumsum([0, *(len(part) for _, part in kept)])
    return Rows(feature, [video for video, _ in kept], starts, np.concatenate([part for _, part in kept]))


def facts_of(store: Store) -> dict[str, SourceFacts]:
    """What a store knows of each video, as its writers take it."""
    names = [name for name in SourceFacts.__dataclass_fields__ if name != "extra"]
    return {row["id"]: SourceFacts(**row) for row in store.videos.select(names).to_pylist()}


def copy_store(source: Store, target: Path, container: str) -> Path:
    """The same features, shards, rows and labels in another store, by way of its own writer."""
    create_store(target, container=container)
    facts = facts_of(source)
    shards: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for entry in source.entries.to_pylist():
        shards.setdefault((entry["feature"], entry["shard"]), []).append(entry)
    for feature, spec in source.features.items():
        add_feature(target, feature, spec)
    for (feature, shard), entries in shards.items():
        writer = ShardWriter(target, feature=feature, spec=source.features[feature], shard=shard)
        for entry in entries:
            copy_entry(source, writer, entry, facts[entry["id"]])
        writer.finish()
    publish(target)
    write_labels(target, source.labels, source.classes)
    return target


def copy_entry(source: Store, writer: ShardWriter, entry: dict[str, Any], facts: SourceFacts) -> None:
    if entry["status"] == "failed":
        writer.fail(facts, entry["reason"], entry["detail"])
        return
    copy_rows(source, writer, entry["feature"], entry["id"])
    writer.ok(facts)


def copy_rows(source: Store, writer: ShardWriter, feature: str, video: str, most: int | None = None) -> None:
    """One video's rows and columns, all or the first of them."""
    spec = source.features[feature]
    columns = {name: source.read(feature, video, name)[:most] for name in spec.columns}
    if spec.ragged:
        writer.append_bytes(source.read_bytes(feature, video)[:most], **columns)
    else:
        writer.append(source.read(feature, video)[:most], **columns)


class Moclip:
    """A moclip store of either container."""

    def __init__(self, name: str, url: Path, rows: Rows) -> None:
        self.name = name
        self._url, self._rows = url, rows
        self._store = open_store(url)
        folder = url / "features" / rows.feature
        self.files = [path for path in [*folder.rglob("*"), *url.glob("*.*")] if path.is_file()]

    def gather(self, draw: Draw) -> NDArray[Any]:
        ids = [self._rows.ids[k] for k in draw.videos for _ in range(SEGMENTS)]
        return self._store.gather(self._rows.feature, ids, draw.frames.ravel())

    def load(self) -> Any:
        return open_store(self._url).read_all(self._rows.feature, self._rows.ids)


class ZarrOnStore:
    """zarr-python on the arrays of a moclip store: one index list an array."""

    name = "zarr-python, moclip's arrays"

    def __init__(self, url: Path, rows: Rows) -> None:
        self.files = [path for path in (url / "features" / rows.feature).rglob("*") if path.is_file()]
        self._rows = rows
        entries = open_store(url).entries.to_pylist()
        mine = {entry["id"]: entry for entry in entries if entry["feature"] == rows.feature}
        where = [f"{mine[video]['shard']}/{mine[video]['array']}/value" for video in rows.ids]
        group = zarr.open_group(url / "features" / rows.feature, mode="r")
        self.arrays = {name: group[name] for name in set(where)}
        self._where = np.array(where)
        self._starts = np.array([mine[video]["row_start"] for video in rows.ids])

    def gather(self, draw: Draw) -> NDArray[Any]:
        names = self._where[draw.videos].repeat(SEGMENTS)
        numbers = (self._starts[draw.videos][:, None] + draw.frames).ravel()
        out = np.empty((len(numbers), *self._rows.values.shape[1:]), self._rows.values.dtype)
        for name in np.unique(names):
            mine = np.flatnonzero(names == name)
            out[mine] = self.arrays[name].oindex[numbers[mine]]
        return out


class ZarrOneArray:
    """zarr-python with its own defaults (zstd), one array, no sharding: a file a chunk."""

    def __init__(self, folder: Path, rows: Rows, chunk_rows: int) -> None:
        self.name = f"zarr-python, chunks of {chunk_rows}"
        path = folder / f"plain-{chunk_rows}.zarr"
        shape = rows.values.shape
        chunks = (chunk_rows, *shape[1:])
        self.array = zarr.create_array(path, shape=shape, chunks=chunks, dtype=rows.values.dtype)
        self.array[:] = rows.values
        self.files = [file for file in path.rglob("*") if file.is_file()]
        self._rows = rows

    def gather(self, draw: Draw) -> NDArray[Any]:
        return self.array.oindex[self._rows.numbers(draw)]


class H5One:
    """h5py on one file: gzip 1 + shuffle + fletcher32, rows read one by one in file order."""

    name = "h5py, one file, row by row"

    def __init__(self, folder: Path, rows: Rows, chunk_rows: int) -> None:
        self._path = folder / "one.h5"
        self.files = [self._path]
        self._rows = rows
        if not self._path.exists():
            options = {"compression": "gzip", "compression_opts": 1, "shuffle": True, "fletcher32": True}
            chunks = (chunk_rows, *rows.values.shape[1:])
            with h5py.File(self._path, "w") as file:
                file.create_dataset("value", data=rows.values, chunks=chunks, **options)
        self._dataset = h5py.File(self._path)["value"]

    def gather(self, draw: Draw) -> NDArray[Any]:
        distinct, at = np.unique(self._rows.numbers(draw), return_inverse=True)
        return self._read(distinct)[at]

    def _read(self, distinct: NDArray[np.int64]) -> NDArray[Any]:
        out = np.empty((len(distinct), *self._dataset.shape[1:]), self._dataset.dtype)
        for k, number in enumerate(distinct):
            out[k] = self._dataset[number]
        return out


class H5Whole(H5One):
    """The same file, read from end to end."""

    name = "h5py, one file"

    def load(self) -> Any:
        with h5py.File(self._path) as file:
            return file["value"][:]


class H5Lists(H5One):
    """The same file, all rows of a batch in one index list."""

    name = "h5py, one file, index list"

    def _read(self, distinct: NDArray[np.int64]) -> NDArray[Any]:
        return self._dataset[distinct]


class OneNpy:
    """One raw file, neither compressed nor checked."""

    name = ".npy, one file"

    def __init__(self, folder: Path, rows: Rows) -> None:
        self.files = [folder / "all.npy"]
        np.save(self.files[0], rows.values)

    def load(self) -> Any:
        return np.load(self.files[0])


class NpyPerVideo:
    """A file a video, read whole."""

    name = ".npy a video"

    def __init__(self, folder: Path, rows: Rows) -> None:
        self.files = [folder / f"{k}.npy" for k in range(len(rows.ids))]
        for k, path in enumerate(self.files):
            if not path.exists():
                np.save(path, rows.of(k))

    def gather(self, draw: Draw) -> NDArray[Any]:
        parts = zip(draw.videos, draw.frames, strict=True)
        return np.concatenate([self._read(self.files[k])[frames] for k, frames in parts])

    def _read(self, path: Path) -> Any:
        return np.load(path)

    def load(self) -> Any:
        return [self._read(path) for path in self.files]


class NpyPerVideoMapped(NpyPerVideo):
    """A file a video, mapped: only what is indexed is read."""

    name = ".npy a video, mapped"

    def _read(self, path: Path) -> Any:
        return np.load(path, mmap_mode="r")


class PtPerVideo(NpyPerVideo):
    """A tensor file a video, as the paper's code keeps them."""

    name = ".pt a video"

    def __init__(self, folder: Path, rows: Rows) -> None:
        self.files = [folder / f"{k}.pt" for k in range(len(rows.ids))]
        for k, path in enumerate(self.files):
            torch.save(torch.from_numpy(rows.of(k).copy()), path)

    def _read(self, path: Path) -> Any:
        return torch.load(path).numpy()


class Tars:
    """WebDataset: tars of one .npy a video, read from the first to the last whatever is asked for."""

    name = "WebDataset, whole pass"

    def __init__(self, folder: Path, rows: Rows) -> None:
        import webdataset

        self._pipeline = webdataset.WebDataset
        self._videos = len(rows.ids)
        starts = range(0, self._videos, VIDEOS_PER_TAR)
        self.files = [folder / f"{number:06d}.tar" for number in range(len(starts))]
        for path, start in zip(self.files, starts, strict=True):
            with webdataset.TarWriter(os.fspath(path)) as tar:
                for k in range(start, min(start + VIDEOS_PER_TAR, self._videos)):
                    tar.write({"__key__": f"{k:09d}", "npy": rows.of(k)})

    def _samples(self) -> Any:
        return self._pipeline([os.fspath(path) for path in self.files], shardshuffle=False).decode()

    def gather(self, draw: Draw) -> NDArray[Any]:
        wanted: dict[int, list[int]] = {}
        for at, k in enumerate(draw.videos):
            wanted.setdefault(int(k), []).append(at)
        parts: list[Any] = [None] * len(draw.videos)
        for sample in self._samples():
            for at in wanted.get(int(sample["__key__"]), ()):
                parts[at] = sample["npy"][draw.frames[at]]
        return np.concatenate(parts)

    def load(self) -> Any:
        return [sample["npy"] for sample in self._samples()]


def make_tars(folder: Path, rows: Rows) -> list[Tars]:
    """WebDataset where it is installed."""
    try:
        return [Tars(folder, rows)]
    except ImportError:
        print("WebDataset is not installed (pip install webdataset): left out")
        return []
