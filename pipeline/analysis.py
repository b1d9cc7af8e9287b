"""A store as analysts like it: Dask arrays, pandas rows, xarray datasets and views for a notebook.

    store = moclip.open_store("corpus.zarr")
    analysis.overview(store)                                          # a table, in a notebook
    vectors = analysis.feature_array(store, "embedding")              # (rows, 512), and no row is read yet
    rows = analysis.row_index(store, "embedding")                     # whose rows these are: id, pts_seconds, label
    mean = vectors[(rows["label"] == "Basketball").to_numpy()].mean(axis=0).compute()

    video = analysis.video_dataset(store, "v_0001")
    video["motion"].sel(displacement="x").std("frame").plot()         # where it moves sideways

pandas and xarray come with ``pip install xarray pandas`` (the extra [analysis]) and are imported when they are needed.
"""

import importlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

import dask.array as da
import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
from dask.delayed import delayed

from moclip.errors import FeatureError
from moclip.pipeline.notebook import motion_view, overview
from moclip.store import FeatureSpec, Store

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

#: A chunk of a Dask array holds rows of at most about this size, so that some of them fit on every worker.
CHUNK_BYTES = 64 * 2**20

Shape = tuple[int, ...]

__all__ = ["feature_array", "geometries", "motion_view", "overview", "row_index", "video_dataset"]


def geometries(store: Store, feature: str, videos: Sequence[str] | None = None) -> dict[Shape, list[str]]:
    """The ids of each row shape of ``feature``: {(2, 30, 40): ["v1", "v3"], (2, 68, 120): ["v2"]}.

    One row of each shape is read. ``videos``: all with rows of the feature. :class:`FeatureError` if one has none.
    """
    feature, ids = _chosen(store, feature, videos)
    if store.features[feature].ragged:
        raise FeatureError(
            f"the rows of {feature} are bytes of differing lengths and make no array; "
            "Store.read_bytes(feature, id) returns one video's"
        )
    mine = pc.and_(pc.equal(store.entries["feature"], feature), pc.equal(store.entries["status"], "ok"))
    entries = store.entries.filter(mine)
    array_of = dict(zip(entries["id"].to_pylist(), entries["array"].to_pylist(), strict=True))
    first = {array_of[video]: video for video in reversed(ids)}
    shapes: dict[str, Shape] = {}
    for positions, rows in store.gather_groups(feature, list(first.values()), np.zeros(len(first), np.int64)):
        shapes |= {list(first)[k]: rows.shape[1:] for k in positions}
    found: dict[Shape, list[str]] = {}
    for video in ids:
        found.setdefault(shapes[array_of[video]], []).append(video)
    return found


def feature_array(store: Store, feature: str, videos: Sequence[str] | None = None) -> da.Array:
    """All rows of ``feature``, video after video, as one Dask array (rows, *row_shape) that reads when computed.

    ``videos`` are ids in the order of the rows; without, every video with rows, in id order. A chunk holds whole videos
    of about 64 MiB together, or part of a longer one. Works with threads, processes and a cluster that sees the store.
    :class:`FeatureError` if a video has no rows, if the rows have several shapes or no fixed one.
    """
    feature, ids = _chosen(store, feature, videos)
    row_shape = _only_shape(store, feature, ids)
    dtype = np.dtype(store.features[feature].dtype)
    limit = max(1, CHUNK_BYTES // max(1, dtype.itemsize * prod(row_shape)))
    # One node of the graph, so that a cluster sends the store to each worker once and not with each chunk.
    shared = delayed(store, traverse=False)
    read = delayed(_read_chunk)
    chunks = []
    for first, last, start, stop in _cut(store.row_counts(feature, ids), limit):
        shape = (stop - start, *row_shape)
        rows = read(shared, feature, ids[first:last], start, shape)
        chunks.append(da.from_delayed(rows, shape, dtype))
    array: da.Array = da.concatenate(chunks)
    return array


def row_index(store: Store, feature: str, videos: Sequence[str] | None = None) -> "pd.DataFrame":
    """Who the rows of :func:`feature_array` are, one line a row in the same order.

    Columns: ``id``, ``ordinal`` (the row's place among its video's, from 0), the specification's own, such as
    ``pts_seconds``, and ``label``. Ids and labels are categories. Videos may differ in row shape, or have none.
    """
    pandas = _needs("pandas")
    feature, ids = _chosen(store, feature, videos)
    names, ordinals = _rows_of(ids, store.row_counts(feature, ids))
    columns = {name: store.gather(feature, names, ordinals, name) for name in store.features[feature].columns}
    known = dict(zip(store.labels["id"].to_pylist(), store.labels["label"].to_pylist(), strict=True))
    labels = np.asarray([known.get(video) for video in ids], object)
    lines = {**columns, "id": pandas.Categorical(names), "ordinal": ordinals}
    lines["label"] = pandas.Categorical(labels).repeat(store.row_counts(feature, ids))
    return pandas.DataFrame(lines)[["id", "ordinal", *columns, "label"]]


def video_dataset(store: Store, video: str) -> "xr.Dataset":
    """Every fixed-shape feature that ``video`` has, with named dimensions; rows are read when they are computed.

    Features with a row for each frame lie along ``frame``, those of chosen frames along ``sample``, with
    ``pts_seconds`` and ``sample_pts_seconds``, ``sample_frame_index`` … beside them. ``y`` and ``x`` are the pixels
    that cells sample. Features share a dimension where its coordinates are equal; otherwise the later feature by name
    has its own, ``sample_<feature>``. :class:`FeatureError` if the store does not know the video.
    """
    xarray = _needs("xarray")
    facts = _line(store.videos, video)
    if not facts:
        known = f"Store.videos lists the {len(store.videos)} it has"
        raise FeatureError(f"the video {video!r} is not in {store.url}; {known}")
    dims = _Dimensions(frozenset(store.features))
    variables = {}
    for feature in _features_of(store, video):
        spec = store.features[feature]
        rows = feature_array(store, feature, [video])
        along = [_row_dimension(store, feature, video, dims)]
        along += [dims.add(*axis, feature) for axis in _axes(spec, facts, rows.shape[1:])]
        variables[feature] = (along, rows, _attributes(spec))
    about = {**_present(facts), **_present(_line(store.labels, video))}
    dataset: xr.Dataset = xarray.Dataset(variables, dims.coordinates, about)
    return dataset


def _needs(library: str) -> Any:
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise ImportError(f"{library} is not installed; `pip install xarray pandas` brings what is needed") from error


def _chosen(store: Store, feature: str, videos: Sequence[str] | None) -> tuple[str, list[str]]:
    """The feature's full name, and the ids asked for; refused where there is nothing to make an array of."""
    feature = store.resolve(feature)
    ids = store.ids(feature) if videos is None else list(videos)
    if not ids:
        raise FeatureError(f"no videos to take {feature} of: {len(store.ids(feature))} in {store.url} have rows of it")
    store.row_counts(feature, ids)  # refuses, with a reason, a video without rows
    return feature, ids


def _only_shape(store: Store, feature: str, ids: Sequence[str]) -> Shape:
    found = geometries(store, feature, ids)
    if len(found) == 1:
        return next(iter(found))
    shapes = ", ".join(f"{shape}: {len(members)}" for shape, members in found.items())
    raise FeatureError(
        f"rows of {feature} have {len(found)} shapes (videos of each: {shapes}) and make no one array; "
        "take the videos of one: feature_array(store, feature, geometries(store, feature)[shape])"
    )


def _cut(counts: Iterable[int], limit: int) -> Iterator[tuple[int, int, int, int]]:
    """Chunks of at most ``limit`` rows: videos first … last (exclusive), and rows start … stop among theirs.

    Borders are those of videos; only a video with more rows than the limit is cut.
    """
    first = held = last = 0
    for last, count in enumerate(map(int, counts)):
        if held and held + count > limit:
            yield first, last, 0, held
            first, held = last, 0
        held += count
        if held > limit:
            yield from ((last, last + 1, row, min(row + limit, count)) for row in range(0, count, limit))
            first, held = last + 1, 0
    if held:
        yield first, last + 1, 0, held


def _read_chunk(store: Store, feature: str, ids: Sequence[str], start: int, shape: Shape) -> npt.NDArray[Any]:
    """Rows ``start`` … of those of ``ids``. Rows that lie together are read together, so tiny videos are cheap."""
    names, ordinals = _rows_of(ids, store.row_counts(feature, ids))
    stop = start + shape[0]
    rows = store.gather(feature, names[start:stop], ordinals[start:stop])
    if rows.shape != shape:
        raise FeatureError(
            f"{store.url} has changed since the array was made: {feature} of {ids[0]!r} … gave {rows.shape}, "
            f"not {shape}; open the store and make the array again"
        )
    return rows


def _rows_of(ids: Sequence[str], counts: npt.NDArray[np.int64]) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    """For each row of each video: the id, and the row's place among the video's."""
    before = np.cumsum(counts) - counts
    return np.repeat(np.asarray(ids, object), counts), np.arange(counts.sum()) - np.repeat(before, counts)


def _features_of(store: Store, video: str) -> list[str]:
    """The fixed-shape features that have rows of ``video``, by name."""
    mine = pc.and_(pc.equal(store.entries["id"], video), pc.equal(store.entries["status"], "ok"))
    names: list[str] = sorted(store.entries.filter(mine)["feature"].to_pylist())
    return [name for name in names if name in store.features and not store.features[name].ragged]


def _line(table: Any, video: str) -> dict[str, Any]:
    """A video's line of one of the store's tables; empty where it has none."""
    lines: list[dict[str, Any]] = table.filter(pc.equal(table["id"], video)).to_pylist()
    return lines[0] if lines else {}


def _present(line: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if value is not None}


def _attributes(spec: FeatureSpec) -> dict[str, str]:
    """Text only, so that a dataset can be saved as NetCDF. xarray puts ``units`` on its plots."""
    parameters = json.dumps(dict(spec.parameters), sort_keys=True)
    return {"units": spec.unit, "kind": spec.kind, "digest": spec.digest, "parameters": parameters}


@dataclass
class _Dimensions:
    """The dimensions of a dataset: features share one where size and coordinates are equal.

    ``taken`` are the variables' names, which have no underscore: a dimension's own name never meets them.
    """

    taken: frozenset[str]
    coordinates: dict[str, tuple[str, npt.NDArray[Any]]] = field(default_factory=dict)
    _known: dict[str, tuple[int, dict[str, npt.NDArray[Any]]]] = field(default_factory=dict)

    def add(self, base: str, size: int, beside: dict[str, npt.NDArray[Any]], feature: str) -> str:
        """The name for a dimension of ``size``. ``beside`` are its coordinates; "" is the one of its own name."""
        fits = base not in self.taken and _equal(self._known.get(base, (size, beside)), (size, beside))
        name = base if fits else f"{base}_{feature}"
        if name not in self._known:
            self._known[name] = size, beside
            for column, values in beside.items():
                full = name if not column else column if name == "frame" else f"{name}_{column}"
                self.coordinates[full] = name, values
        return name


def _equal(one: tuple[int, Mapping[str, Any]], other: tuple[int, Mapping[str, Any]]) -> bool:
    (size, beside), (other_size, others) = one, other
    if size != other_size or beside.keys() != others.keys():
        return False
    return all(beside[name].tobytes() == others[name].tobytes() for name in beside)  # NaN equals NaN here


def _row_dimension(store: Store, feature: str, video: str, dims: _Dimensions) -> str:
    columns = {name: store.read(feature, video, name) for name in store.features[feature].columns}
    base = "sample" if "frame_index" in columns else "frame"
    size = int(store.row_counts(feature, [video])[0])
    return dims.add(base, size, {"": np.arange(size), **columns}, feature)


def _axes(
    spec: FeatureSpec, facts: Mapping[str, Any], shape: Shape
) -> Iterator[tuple[str, int, dict[str, npt.NDArray[Any]]]]:
    """Name, size and coordinates of each axis of a row."""
    named = len(spec.axes) == len(shape)
    for k, size in enumerate(shape):
        axis = spec.axes[k] if named else f"axis_{k}"
        values = np.array(["x", "y"]) if (axis, size) == ("displacement", 2) else _sampled(spec, facts, axis, size)
        yield axis, size, {} if values is None else {"": values}


def _sampled(spec: FeatureSpec, facts: Mapping[str, Any], axis: str, cells: int) -> npt.NDArray[np.int64] | None:
    """The pixels that ``cells`` cells sample along x or y: the last one never lies beyond the frame's edge.

    ``None`` for other axes, and where the size of the frame is not known or is not that of the grid.
    """
    cell, size = spec.parameters.get("cell"), spec.parameters.get("size")
    width, height = size or (facts["width"], facts["height"])
    length = {"x": width, "y": height}.get(axis)
    if not cell or not length or -(-length // cell) != cells:
        return None
    pixels: npt.NDArray[np.int64] = np.minimum(np.arange(cells) * cell + cell // 2, length - 1)
    return pixels
