"""Labels, groups and splits of videos: UCF101's lists, or a table, brought together by id.

Everything works on a *labels table*: ``id``, ``label``, ``group`` and one ``split_<name>`` for each split,
all nullable strings, sorted by id. Sources about to be extracted and videos in a store share this code.
"""

import os
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from moclip.errors import SourceError
from moclip.pipeline.extract.source_folder import strip_extension
from moclip.pipeline.extract.source_table import TABLE_READERS, check_split_value, is_split_column, read_table, readable
from moclip.pipeline.extract.sources import Sources, class_order, list_sources
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

    def label(self, table: pa.Table, paths: pa.Array | None = None) -> Labelling:
        """Bring a labels table up to date. ``paths`` are the relative paths of its videos, null where it is the id.

        A video is found by its relative path without extension, or by its bare name where that is unique on
        both sides. Labels and groups of unlisted videos stay as they are; see :func:`merge_labels`.
        """
        ids = table["id"].combine_chunks()
        keys = ids if paths is None else pc.coalesce(paths, ids)
        partner = self._partners(pa.array(map(strip_extension, keys.to_pylist()), pa.string()))
        listed = self._table()
        new = listed.take(partner.drop_null()).set_column(0, "id", ids.filter(pc.is_valid(partner)))
        merged = merge_labels(table, new)
        absent = np.setdiff1d(np.arange(len(listed)), partner.drop_null().to_numpy())
        return Labelling(
            table=merged,
            classes=class_order(merged["label"].unique().to_pylist(), self.classes),
            absent=tuple(sorted(listed["id"].take(pa.array(absent)).to_pylist())),
            unlisted=tuple(ids.filter(pc.is_null(partner)).to_pylist()),
        )

    def apply(self, videos: Sources) -> tuple[Sources, Labelling]:
        """The sources, in order of ids, with label, group and splits set, and the labelling that did it."""
        table = videos.table.sort_by("id")
        labelling = self.label(videos.labels.sort_by("id"), table["relative_path"].combine_chunks())
        labels = labelling.table
        others = [name for name in table.column_names if name not in labels.column_names]
        columns = {name: (table if name in others else labels)[name] for name in (*labels.column_names, *others)}
        return Sources(pa.table(columns)), labelling

    def _table(self) -> pa.Table:
        """The labels table of the listed videos; their ids are their paths without extension."""
        columns: dict[str, list[str | None]] = {
            "id": list(self.videos),
            "label": [video.label for video in self.videos.values()],
            "group": [video.group for video in self.videos.values()],
        }
        splits = {SPLIT_PREFIX + n: [v.splits.get(n) for v in self.videos.values()] for n in self.names}
        return _text_table(columns | splits)

    def _partners(self, keys: pa.Array) -> pa.Array:
        """For each key, which of the listed videos it is; null for those that are none."""
        listed = pa.array(list(self.videos), pa.string())
        names, own = _base_names(listed), _base_names(keys)
        singles = (_that_occur_once(names), _that_occur_once(_base_names(keys.unique())))
        alone = pc.and_(*(pc.is_in(own, value_set=single) for single in singles))
        by_name = pc.if_else(alone, pc.index_in(own, value_set=names), pa.scalar(None, pa.int32()))
        return pc.coalesce(pc.index_in(keys, value_set=listed), by_name)


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
        return _filled(list_sources(path).videos.labels, named).select(["id", *named])
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
    used = merged["label"].unique().to_pylist()
    return Labelling(
        table=merged,
        classes=class_order(used, [name for name in classes if name in used]),
        absent=_ids_without(new, table),
        unlisted=_ids_without(table, new),
    )


def _ids_without(table: pa.Table, other: pa.Table) -> tuple[str, ...]:
    """The ids that only the first of two tables has, sorted."""
    shared = pc.is_in(table["id"], value_set=other["id"].combine_chunks())
    return tuple(sorted(table["id"].filter(pc.invert(shared)).to_pylist()))


def merge_labels(table: pa.Table, new: pa.Table) -> pa.Table:
    """The rows of ``table`` with the values of ``new``, by id. Columns that ``new`` does not have stay.

    A label or group is replaced where ``new`` has one. A split is replaced as a whole: a video that the new
    split does not mention leaves it, or its old place could put it on both sides.
    """
    rows = pc.index_in(table["id"], value_set=new["id"].combine_chunks()).combine_chunks()
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


def _base_names(paths: pa.Array) -> pa.Array:
    return pc.replace_substring_regex(paths, "(?s)^.*/", "")


def _that_occur_once(names: pa.Array) -> pa.Array:
    counts = names.value_counts()
    return counts.field("values").filter(pc.equal(counts.field("counts"), 1))


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
