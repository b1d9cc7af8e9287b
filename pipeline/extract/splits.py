"""Labels, groups and splits of videos: UCF101's lists, or a table, brought together by id.

Everything works on a *labels table*: ``id``, ``label``, ``group`` and one ``split_<name>`` for each split,
all nullable strings, sorted by id. Sources about to be extracted and videos in a store share this code.
"""

import os
import posixpath
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from moclip.errors import SourceError
from moclip.pipeline.extract.sources import (
    TABLE_READERS,
    VideoSource,
    check_split_value,
    class_order,
    is_split_column,
    list_sources,
    read_table,
    readable,
    strip_extension,
)
from moclip.store import SPLIT_PREFIX

_CLASS_LINE = re.compile(r"(\d+)\s+(\S.*)")
_LIST_NAME = re.compile(r"(train|test)list(\d+)\.txt")
_LIST_LINE = re.compile(r"(.+?)(?:\s+(\d+))?")
_GROUP = re.compile(r"_(g\d+)_c\d+")


@dataclass(frozen=True)
class ListedVideo:
    """What the split lists say of one video: its class, its group ("g01") and its part in each split."""

    label: str
    group: str | None
    splits: Mapping[str, str]


@dataclass(frozen=True)
class Labelling:
    """A labels table brought up to date, its classes in order, and what did not find a partner.

    ``absent``: videos that are listed and not in the table; ``unlisted``: ids of the table that no list has.
    """

    table: pa.Table
    classes: tuple[str, ...]
    absent: tuple[str, ...]
    unlisted: tuple[str, ...]

    def __repr__(self) -> str:
        return (
            f"Labelling({len(self.table)} videos, {len(self.classes)} classes, "
            f"{len(self.absent)} listed but absent, {len(self.unlisted)} in no list)"
        )


@dataclass(frozen=True)
class Splits:
    """UCF101-style split lists: the classes in order, every listed video by its path without extension."""

    classes: tuple[str, ...]
    names: tuple[str, ...]
    videos: Mapping[str, ListedVideo]

    def label(self, table: pa.Table, paths: Mapping[str, str] | None = None) -> Labelling:
        """Bring a labels table up to date. ``paths`` gives an id's relative path where the id is not one.

        A video is found by its relative path without extension, or by its bare name where that is unique on
        both sides. Labels and groups of unlisted videos stay as they are; see :func:`merge_labels`.
        """
        ids = table["id"].to_pylist()
        keys = {video_id: strip_extension((paths or {}).get(video_id, video_id)) for video_id in ids}
        partner = self._partners(keys)
        found = [(video_id, self.videos[listed]) for video_id, listed in partner.items()]
        merged = merge_labels(table, _listed_table(found, self.names))
        return Labelling(
            table=merged,
            classes=class_order(merged["label"].to_pylist(), self.classes),
            absent=tuple(sorted(self.videos.keys() - set(partner.values()))),
            unlisted=tuple(video_id for video_id in ids if video_id not in partner),
        )

    def apply(self, videos: Sequence[VideoSource]) -> tuple[tuple[VideoSource, ...], Labelling]:
        """The sources with label, group and splits set, and the labelling that did it."""
        paths = {video.id: video.relative_path for video in videos}
        labelling = self.label(labels_table(videos), paths)
        rows = {row["id"]: row for row in labelling.table.to_pylist()}
        return tuple(_with_labels(video, rows[video.id]) for video in videos), labelling

    def _partners(self, keys: Mapping[str, str]) -> dict[str, str]:
        """id -> key of the listed video, for the ids that have one."""
        by_name = _unique_names(self.videos)
        own_names = _unique_names(set(keys.values()))
        partners = {}
        for video_id, key in keys.items():
            name = posixpath.basename(key)
            listed = key if key in self.videos else by_name.get(name) if name in own_names else None
            if listed is not None:
                partners[video_id] = listed
        return partners


def read_splits(folder: str | Path) -> Splits:
    """Read UCF101's classInd.txt, trainlist0N.txt ("Class/v_x_g01_c01.avi 1") and testlist0N.txt (no index).

    Split N is named "N". SourceError, with the file and the line: a file is missing or cannot be understood,
    a class or index that classInd.txt does not have, a video that is on both sides of a split.
    """
    path = os.fspath(folder)
    classes = _read_classes(os.path.join(path, "classInd.txt"))
    lists = sorted((match[2], match[1], name) for name in os.listdir(path) if (match := _LIST_NAME.fullmatch(name)))
    if not lists:
        raise SourceError(f"no split lists in {readable(path)!r}; expected trainlist01.txt and testlist01.txt")
    videos: dict[str, ListedVideo] = {}
    for number, part, name in lists:
        split = str(int(number))
        for key, label, where in _read_list(os.path.join(path, name), classes):
            known = videos.get(key) or ListedVideo(label, _group_of(key), {})
            if known.splits.get(split, part) != part:
                raise SourceError(f"{where}: {key!r} is in train and in test of split {split}; remove it from one")
            videos[key] = replace(known, splits={**known.splits, split: part})
    names = tuple(dict.fromkeys(str(int(number)) for number, _, _ in lists))
    return Splits(tuple(classes.values()), names, videos)


def labels_table(videos: Sequence[VideoSource]) -> pa.Table:
    """The labels table of sources."""
    names = sorted({name for video in videos for name in video.splits})
    columns: dict[str, list[str | None]] = {
        "id": [video.id for video in videos],
        "label": [video.label for video in videos],
        "group": [video.group for video in videos],
    }
    columns |= {SPLIT_PREFIX + name: [video.splits.get(name) for video in videos] for name in names}
    return _text_table(columns).sort_by("id")


def read_labels_csv(file: str | Path) -> pa.Table:
    """The labels table of a CSV or Parquet file: its ids (or those of its paths) and the columns it names.

    Columns that the file does not have are not in the result. SourceError as for lists of sources.
    """
    path = os.path.abspath(os.fspath(file))
    if os.path.splitext(path)[1].lower() not in TABLE_READERS:
        raise SourceError(f"{readable(path)!r} is not a table of labels; expected a .csv or .parquet file")
    table = read_table(path)
    named = [name for name in table.column_names if name in ("label", "group") or is_split_column(name)]
    if not named:
        raise SourceError(f"{readable(path)!r} names no label, group or split_*; found {table.column_names}")
    if "path" in table.column_names:
        return _filled(labels_table(list_sources(path).videos), named).select(["id", *named])
    if "id" not in table.column_names:
        raise SourceError(f"{readable(path)!r} has no column 'id' and none 'path'; found {table.column_names}")
    columns = {name: [cell or None for cell in table[name].to_pylist()] for name in ["id", *named]}
    _check_rows(columns, readable(path))
    return _text_table(columns).sort_by("id")


def label_from_table(table: pa.Table, new: pa.Table, classes: Sequence[str] = ()) -> Labelling:
    """Bring a labels table up to date from another; ids that only ``new`` has are reported, never added.

    ``classes`` is the order so far: classes still in use keep it, others follow, sorted.
    """
    merged = merge_labels(table, new)
    old_ids, new_ids = set(table["id"].to_pylist()), set(new["id"].to_pylist())
    labels = merged["label"].to_pylist()
    return Labelling(
        table=merged,
        classes=class_order(labels, [name for name in classes if name in set(labels)]),
        absent=tuple(sorted(new_ids - old_ids)),
        unlisted=tuple(sorted(old_ids - new_ids)),
    )


def merge_labels(table: pa.Table, new: pa.Table) -> pa.Table:
    """The rows of ``table`` with the values of ``new``, by id. Columns that ``new`` does not have stay.

    A label or group is replaced where ``new`` has one. A split is replaced as a whole: a video that the new
    split does not mention leaves it, or its old place could put it on both sides.
    """
    position = {video_id: row for row, video_id in enumerate(new["id"].to_pylist())}
    rows = pa.array([position.get(video_id) for video_id in table["id"].to_pylist()], pa.int64())
    columns = {name: table[name] for name in table.column_names}
    for name in new.column_names:
        if name != "id":
            values = new[name].take(rows)
            keep = name in columns and not is_split_column(name)
            columns[name] = pc.coalesce(values, columns[name]) if keep else values
    splits = sorted(name for name in columns if is_split_column(name))
    return _filled(pa.table(columns), ["label", "group"]).select(["id", "label", "group", *splits]).sort_by("id")


def _read_classes(path: str) -> dict[int, str]:
    """Index -> class name, in the order of the indices."""
    classes: dict[int, str] = {}
    for where, line in _lines(path):
        match = _CLASS_LINE.fullmatch(line)
        if not match:
            raise SourceError(f"{where}: found {line!r}; expected an index and a class name, as in '1 Biking'")
        if int(match[1]) in classes or match[2] in classes.values():
            raise SourceError(f"{where}: the index or the class of {line!r} is there already; remove one")
        classes[int(match[1])] = match[2]
    return dict(sorted(classes.items()))


def _read_list(path: str, classes: Mapping[int, str]) -> Iterator[tuple[str, str, str]]:
    """(path without extension, class name, where) of each line; the class agrees with index and folder."""
    names = set(classes.values())
    for where, line in _lines(path):
        listed, index = _LIST_LINE.fullmatch(line).groups()  # type: ignore[union-attr]  # a line is never empty
        listed = posixpath.normpath(listed)
        folder = posixpath.basename(posixpath.dirname(listed))
        if index is not None and int(index) not in classes:
            raise SourceError(f"{where}: {line!r} has the label {index}, which classInd.txt does not have")
        label = folder or (classes[int(index)] if index is not None else "")
        if label not in names:
            raise SourceError(f"{where}: {line!r} is of the class {label!r}, which classInd.txt does not have")
        if index is not None and classes[int(index)] != label:
            raise SourceError(f"{where}: {line!r} has the label of {classes[int(index)]!r}; mend the label or the path")
        yield strip_extension(listed), label, where


def _lines(path: str) -> Iterator[tuple[str, str]]:
    """("file, line N", text) of every line that is not blank."""
    try:
        with open(path, encoding="utf-8-sig", errors="backslashreplace") as file:
            lines = file.read().split("\n")
    except OSError as error:
        raise SourceError(
            f"cannot read {readable(path)!r}: {error.strerror}; expected UCF101's lists: "
            "classInd.txt, trainlist01.txt, testlist01.txt"
        ) from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield f"{readable(path)!r}, line {number}", line.strip()


def _group_of(key: str) -> str | None:
    match = _GROUP.search(posixpath.basename(key))
    return match[1] if match else None


def _unique_names(keys: Collection[str]) -> dict[str, str]:
    """basename -> key, for the basenames that only one key has."""
    counts = Counter(posixpath.basename(key) for key in keys)
    return {name: key for key in keys if counts[name := posixpath.basename(key)] == 1}


def _with_labels(video: VideoSource, row: Mapping[str, str | None]) -> VideoSource:
    splits = {name.removeprefix(SPLIT_PREFIX): value for name, value in row.items() if is_split_column(name) and value}
    return replace(video, label=row["label"], group=row["group"], splits=splits)


def _listed_table(found: Sequence[tuple[str, ListedVideo]], names: Sequence[str]) -> pa.Table:
    columns: dict[str, list[str | None]] = {
        "id": [video_id for video_id, _ in found],
        "label": [video.label for _, video in found],
        "group": [video.group for _, video in found],
    }
    return _text_table(columns | {SPLIT_PREFIX + name: [v.splits.get(name) for _, v in found] for name in names})


def _check_rows(columns: Mapping[str, Sequence[str | None]], path: str) -> None:
    """SourceError for a row without an id, a repeated id or a split value that is none."""
    seen: dict[str | None, int] = {None: 0}
    for row, video_id in enumerate(columns["id"], start=1):
        if seen.setdefault(video_id, row) != row:
            what = "has no id" if video_id is None else f"repeats the id {video_id!r} of row {seen[video_id]}"
            raise SourceError(f"{path!r}, row {row} {what}; every row needs an id of its own")
    for name in filter(is_split_column, columns):
        for row, value in enumerate(columns[name], start=1):
            if value is not None:
                check_split_value(value, f"{path!r}, row {row}, column {name!r}")


def _filled(table: pa.Table, names: Sequence[str]) -> pa.Table:
    """The table with empty text columns for the names it lacks (a split that no row is in, for one)."""
    for name in names:
        if name not in table.column_names:
            table = table.append_column(name, pa.nulls(len(table), pa.string()))
    return table


def _text_table(columns: Mapping[str, Sequence[str | None]]) -> pa.Table:
    return pa.table({name: pa.array(cells, pa.string()) for name, cells in columns.items()})
