"""Parts of a store as a store of their own, and several stores as one."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from moclip.errors import FeatureError, SourceError, StoreFormatError
from moclip.store.copies.filling import Copied, Report, Wanted, fill, silent
from moclip.store.copies.labels import union_classes, union_labels
from moclip.store.copies.selection import EVERYTHING, Selection, select, some
from moclip.store.reader import Store, open_store
from moclip.store.schema import FACT_FIELDS, FeatureSpec
from moclip.store.tables import spec_difference


def export_store(
    source_url: str | Path,
    out_url: str | Path,
    selection: Selection = EVERYTHING,
    container: str | None = None,
    report: Report = silent,
) -> Copied:
    """Copy some features of some videos, as they were published, into a store of their own.

    Rows come bit for bit, each video's against its checksum; failed entries, facts, labels and the versions that
    made the rows come with them. Classes are those that the copied labels use, in the source's order. ``container``
    is the source's own unless given. Interrupted, the same call goes on; into a store that holds anything else than
    a part of the same, it refuses (:class:`StoreFormatError`). ``report`` is told (entries there, of how many).

    Two exports into one bucket at the same time tear each other's files; on a disk the second one waits.
    """
    source = open_store(source_url)
    chosen = select(source, selection)
    labels = source.labels.filter(pc.is_in(source.labels["id"], pc.unique(chosen.entries["id"])))
    used = set(labels["label"].to_pylist())
    wanted = Wanted(
        stores=(source,),
        features={name: source.features[name] for name in chosen.features},
        entries=_of_source(chosen.entries, 0),
        labels=labels,
        classes=[name for name in source.classes if name in used],
    )
    return fill(out_url, container, wanted, report)


def merge_stores(
    urls: Sequence[str | Path], out_url: str | Path, container: str | None = None, report: Report = silent
) -> Copied:
    """Copy everything that several stores hold, as published, into one new store; interrupted, it goes on.

    Of one entry in several stores ok beats failed, and of two failed ones the first store's stays. Of facts that the
    stores know differently, such as a video's path, the first store's stay; further columns of the source lists must
    agree. Classes keep the first store's order, new ones follow.

    Nothing else is chosen: :class:`FeatureError` where a feature's name stands for two specifications,
    :class:`SourceError` where an id stands for two files or labels contradict, :class:`StoreFormatError` where one
    file has two contents.
    """
    stores = tuple(open_store(url) for url in urls)
    if not stores:
        raise SourceError("no stores to merge; name two or more")
    features = _common_features(stores)
    _check_same_files(stores)
    _check_same_extra(stores)
    entries = pa.concat_tables([_of_source(store.entries, k) for k, store in enumerate(stores)])
    _check_same_content(entries)
    wanted = Wanted(
        stores=stores,
        features=features,
        entries=_best(entries),
        labels=union_labels([(store.url, store.labels) for store in stores]),
        classes=union_classes([store.classes for store in stores]),
    )
    return fill(out_url, container, wanted, report)


def _of_source(entries: pa.Table, number: int) -> pa.Table:
    return entries.append_column("source", pa.array([number] * len(entries), pa.int32()))


def _common_features(stores: Sequence[Store]) -> dict[str, FeatureSpec]:
    features: dict[str, FeatureSpec] = {}
    first: dict[str, str] = {}
    for store in stores:
        for name, spec in store.features.items():
            if features.setdefault(name, spec).digest != spec.digest:
                raise FeatureError(
                    f"{store.url} asks for another {name!r} than {first[name]} has "
                    f"({spec_difference(features[name], spec)}); `moclip export` one of the stores with its other "
                    "features only (--feature), and merge that"
                )
            first.setdefault(name, store.url)
    return dict(sorted(features.items()))


def _best(entries: pa.Table) -> pa.Table:
    """One entry for each (id, feature): ok before failed, then the first store's."""
    ordered = entries.sort_by(
        [("id", "ascending"), ("feature", "ascending"), ("status", "descending"), ("source", "ascending")]
    )
    numbered = ordered.append_column("row", pa.array(range(len(ordered)), pa.int64()))
    first = numbered.group_by(["id", "feature"]).aggregate([("row", "min")])["row_min"]
    return ordered.take(first.combine_chunks().sort())


def _check_same_files(stores: Sequence[Store]) -> None:
    videos = pa.concat_tables([store.videos.select(["id", "bytes", "content_hash"]) for store in stores])
    for column in ("bytes", "content_hash"):
        differing = [row["id"] for row in _several(videos, ["id"], column)]
        if differing:
            raise SourceError(
                f"{len(differing)} videos are not the same files in all stores, by their {column}: {some(differing)}; "
                "`moclip export` a store without them (--ids) and merge that, or extract them again under other ids"
            )


def _check_same_content(entries: pa.Table) -> None:
    ok = entries.filter(pc.equal(entries["status"], "ok"))
    differing = [f"{row['feature']} of {row['id']}" for row in _several(ok, ["id", "feature"], "content")]
    if differing:
        raise StoreFormatError(
            f"{len(differing)} entries have other rows in one store than in another, though their files do not differ: "
            f"{some(differing)}; `moclip export` the store whose rows you trust less without them (--ids, --feature) "
            "and merge that"
        )


def _several(table: pa.Table, keys: list[str], column: str) -> list[dict[str, Any]]:
    """The keys for which ``column`` has more than one value, in order."""
    counts = table.group_by(keys).aggregate([(column, "count_distinct")])
    several: list[dict[str, Any]] = counts.filter(pc.greater(counts[f"{column}_count_distinct"], 1)).to_pylist()
    return sorted(several, key=lambda row: [row[key] for key in keys])


def _check_same_extra(stores: Sequence[Store]) -> None:
    known: dict[tuple[str, str], tuple[Any, str]] = {}
    for store in stores:
        for video, column, value in _extra(store.videos):
            before, where = known.setdefault((video, column), (value, store.url))
            if before != value and repr(before) != repr(value):  # NaN is not even equal to itself
                raise SourceError(
                    f"the {column} of {video!r} is {before!r} in {where}, {value!r} in {store.url}; "
                    "extract one of the stores again with a source list that agrees"
                )


def _extra(videos: pa.Table) -> Iterator[tuple[str, str, Any]]:
    """What the source lists' own columns say: (id, column, value)."""
    ids = videos["id"].to_pylist()
    for column in videos.column_names:
        if column not in {"id", *(field.name for field in FACT_FIELDS)}:
            for video, value in zip(ids, videos[column].to_pylist(), strict=True):
                if value is not None:
                    yield video, column, value
