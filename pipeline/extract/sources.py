"""What there is to extract: a folder, a text list, a CSV or Parquet table, or one video, as ordered sources.

Listing opens no video and asks the file system for nothing beyond the folders' entries, so a million sources
list in seconds; what is missing or broken shows when it is decoded, as a failed entry.
"""

import csv
import os
import posixpath
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pa_parquet

from moclip.errors import SourceError
from moclip.store import SPLIT_PREFIX

VIDEO_EXTENSIONS = frozenset(
    ".3g2 .3gp .asf .avi .divx .f4v .flv .h264 .hevc .ivf .m2ts .m2v .m4v .mjpeg .mkv .mov .mp4 .mpeg "
    ".mpg .mts .mxf .ogv .ts .vob .webm .wmv .y4m".split()
)
_PLAIN_TYPES = (
    pa.types.is_boolean,
    pa.types.is_floating,
    pa.types.is_string,
    pa.types.is_date,
    pa.types.is_timestamp,
    pa.types.is_null,
)
SPLIT_VALUES = ("train", "val", "test")
KNOWN_COLUMNS = ("path", "id", "label", "group")


@dataclass(frozen=True, slots=True)
class VideoSource:
    """One video to extract.

    ``path`` opens it (absolute, with the file system's bytes behind surrogate escapes); ``relative_path`` is
    its provenance and, like ``id``, always valid UTF-8. ``splits`` maps a split's name to train, val or test;
    ``extra`` holds the further columns of a table of sources.
    """

    id: str
    path: str
    relative_path: str
    label: str | None = None
    group: str | None = None
    splits: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class SourceList:
    """Sources sorted by id, their classes in order, and the names of the files that are not videos."""

    videos: tuple[VideoSource, ...]
    classes: tuple[str, ...]
    skipped: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"SourceList({len(self.videos)} videos, {len(self.classes)} classes, {len(self.skipped)} skipped)"


def list_sources(source: str | Path) -> SourceList:
    """List the videos of a folder, a .txt, .csv or .parquet list, or one video file.

    SourceError: the source does not exist, holds no videos, repeats an id, or its table cannot be used.
    """
    given = os.fspath(source)
    path = os.path.abspath(given)
    if os.path.isdir(path):
        return _list_folder(path)
    if not os.path.exists(path):
        raise SourceError(f"no such source: {readable(given)!r}; expected a folder, a list of videos or a video file")
    extension = os.path.splitext(path)[1].lower()
    if extension == ".txt":
        return _finish(_read_text(path), f"the list {readable(given)!r}")
    if extension in TABLE_READERS:
        return _finish(_table_sources(path), f"the table {readable(given)!r}")
    if extension in VIDEO_EXTENSIONS:
        return _finish([_derive(path, os.path.basename(path))], f"{readable(given)!r}")
    raise SourceError(
        f"{readable(given)!r} is neither a video (by its extension) nor a list; "
        "expected a folder, .txt, .csv, .parquet or a video file"
    )


def file_size(path: str) -> int | None:
    """The size of a file in bytes, None if it cannot be told."""
    try:
        return os.stat(path).st_size
    except OSError:
        return None


def readable(text: str) -> str:
    """Valid UTF-8 for any file name: bytes that are not UTF-8 are written as ``\\xff``."""
    if text.isascii():
        return text
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def class_order(labels: Iterable[str | None], first: Sequence[str] = ()) -> tuple[str, ...]:
    """The classes of ``first`` in their order, then every other label, sorted."""
    others = {label for label in labels if label is not None}.difference(first)
    return (*first, *sorted(others))


def strip_extension(relative_path: str) -> str:
    """The path without its extension, where that is one of a video."""
    stem, extension = posixpath.splitext(relative_path)
    return stem if extension.lower() in VIDEO_EXTENSIONS else relative_path


def _list_folder(root: str) -> SourceList:
    videos, skipped = [], []
    for relative, is_video in _walk(root):
        if is_video:
            label = posixpath.basename(posixpath.dirname(relative))
            source = _derive(os.path.join(root, relative), relative)
            videos.append(replace(source, label=readable(label)) if label else source)
        else:
            skipped.append(readable(relative))
    skipped.sort()
    return _finish(videos, f"the folder {readable(root)!r}", skipped)


def _walk(root: str) -> Iterator[tuple[str, bool]]:
    """Every file below ``root``: its relative path, and whether its name says that it is a video.

    Links to folders are followed after all real folders, and each folder is listed once, under the first name
    that leads to it: no loop is entered, and no video is found twice.
    """
    folders: list[str] = [""]
    links: list[str] = []
    seen: set[tuple[int, int]] = set()
    while folders or links:
        relative = folders.pop() if folders else links.pop(0)
        folder = os.path.join(root, relative)
        try:
            facts = os.stat(folder)
            if (facts.st_dev, facts.st_ino) in seen:
                continue
            seen.add((facts.st_dev, facts.st_ino))
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise SourceError(
                f"cannot list the folder {readable(folder)!r}: {error.strerror}; make it readable or move it"
            ) from error
        for entry in entries:
            inside = f"{relative}/{entry.name}" if relative else entry.name
            if _is_folder(entry):
                (links if entry.is_symlink() else folders).append(inside)
            else:
                yield inside, _is_video(entry)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself is not one
        return False


def _is_video(entry: os.DirEntry[str]) -> bool:
    """By name only. Hidden files are left out: "._clip.avi" is macOS's note about a clip, not a clip.

    A link that leads nowhere stays (it becomes a failed entry); a pipe does not (opening it never returns).
    """
    extension = os.path.splitext(entry.name)[1].lower()
    return (
        extension in VIDEO_EXTENSIONS
        and not entry.name.startswith(".")
        and (entry.is_file(follow_symlinks=False) or entry.is_symlink())
    )


def _read_text(path: str) -> list[VideoSource]:
    """One path a line, optionally a TAB and a label; blank lines and lines that begin with # are left out."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
        lines = file.read().split("\n")
    folder, sources = os.path.dirname(path), []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        given, *labels = [cell.strip() for cell in line.split("\t")]
        if not given or len(labels) > 1:
            raise SourceError(
                f"{readable(path)!r}, line {number}: expected a path, or a path, one TAB and a label; "
                f"found {len(labels) + 1} fields, the first {readable(given)!r}"
            )
        sources.append(replace(_listed(folder, given), label=readable(labels[0]) or None if labels else None))
    return sources


def _table_sources(path: str) -> list[VideoSource]:
    """The rows of a table as sources. Row numbers in messages count the data rows from 1."""
    table = read_table(path)
    if "path" not in table.column_names:
        raise SourceError(f"{readable(path)!r} has no column 'path', only {table.column_names}; add one")
    folder, sources = os.path.dirname(path), []
    extra_names = [n for n in table.column_names if n not in KNOWN_COLUMNS and not is_split_column(n)]
    columns = {
        name: _plain(table[name]) if name in extra_names else table[name].to_pylist() for name in table.column_names
    }
    columns["path"] = [None if cell is None else _text(cell) for cell in columns["path"]]
    for row in range(len(table)):
        if not columns["path"][row]:
            raise SourceError(f"{readable(path)!r}, row {row + 1}: the path is empty; give one or remove the row")
        sources.append(
            replace(
                _listed(folder, columns["path"][row]),
                id=(columns["id"][row] or "") if "id" in columns else "",
                label=columns["label"][row] or None if "label" in columns else None,
                group=columns["group"][row] or None if "group" in columns else None,
                splits=_row_splits(columns, row, path),
                extra={name: columns[name][row] for name in extra_names},
            )
        )
    return sources


def _plain(column: pa.ChunkedArray) -> list[Any]:
    """A further column's cells. What is neither number, text, time nor a list of those becomes text."""
    cells: list[Any] = column.to_pylist()
    if _is_plain(column.type):
        return cells
    return [None if cell is None else readable(str(cell)) for cell in cells]


def _is_plain(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind):
        return _is_plain(kind.value_type)
    return any(fits(kind) for fits in _PLAIN_TYPES) or (pa.types.is_integer(kind) and kind != pa.uint64())


def _row_splits(columns: Mapping[str, list[Any]], row: int, path: str) -> dict[str, str]:
    splits = {}
    for name, cells in columns.items():
        if is_split_column(name) and cells[row]:
            check_split_value(cells[row], f"{readable(path)!r}, row {row + 1}, column {name!r}")
            splits[name.removeprefix(SPLIT_PREFIX)] = cells[row]
    return splits


def check_split_value(value: str, where: str) -> None:
    """SourceError unless the value is train, val or test."""
    if value not in SPLIT_VALUES:
        raise SourceError(f"{where}: found {value!r}; expected train, val, test or nothing")


def is_split_column(name: str) -> bool:
    return name.startswith(SPLIT_PREFIX) and name != SPLIT_PREFIX


def read_table(path: str) -> pa.Table:
    """A CSV or Parquet table. The columns that moclip knows become text: "001" stays "001".

    ``path`` may be binary, because a file's name may be. SourceError if the file cannot be read.
    """
    try:
        table = TABLE_READERS[os.path.splitext(path)[1].lower()](path)
        for index, name in enumerate(table.column_names):
            if name in ("id", "label", "group") or is_split_column(name):
                column = table.column(index).cast(pa.string())
                column.validate(full=True)
                table = table.set_column(index, name, column)
    except (pa.ArrowException, OSError, UnicodeError, StopIteration, csv.Error) as error:
        reason = (str(error) or "it is empty").splitlines()[0]
        raise SourceError(f"cannot read the table {readable(path)!r}: {reason}; expected CSV or Parquet") from error
    repeated = [name for name, count in Counter(table.column_names).items() if count > 1]
    if repeated:
        raise SourceError(f"{readable(path)!r} has several columns {repeated[0]!r}; rename or remove all but one")
    return table


def _read_csv(path: str) -> pa.Table:
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
        header = next(row for row in csv.reader(file) if row)
    types = {name: pa.string() for name in header if name in KNOWN_COLUMNS or is_split_column(name)}
    types["path"] = pa.binary()
    return pa_csv.read_csv(
        path,
        parse_options=pa_csv.ParseOptions(newlines_in_values=True),
        convert_options=pa_csv.ConvertOptions(column_types=types),
    )


TABLE_READERS: Mapping[str, Callable[[str], pa.Table]] = {
    ".csv": _read_csv,
    ".parquet": lambda path: pa_parquet.ParquetFile(path).read(),
}


def _listed(folder: str, given: str) -> VideoSource:
    """A path of a list: below the list's folder known by its relative path, else by its last two parts."""
    if "\0" in given:
        raise SourceError(f"the path {readable(given)!r} holds a zero byte; is the list UTF-16? save it as UTF-8")
    path = os.path.join(folder, given)
    lexical = os.path.normpath(path)
    inside = folder.rstrip("/") + "/"
    if lexical.startswith(inside):
        return _derive(path, lexical.removeprefix(inside))
    return _derive(path, "/".join(lexical.split("/")[-2:]).lstrip("/"))


def _derive(path: str, relative_path: str) -> VideoSource:
    """A source whose id is still to be settled: empty ids are given by ``_finish``."""
    return VideoSource(id="", path=path, relative_path=readable(relative_path))


def _finish(sources: Sequence[VideoSource], where: str, skipped: Sequence[str] = ()) -> SourceList:
    """Settle the ids, refuse repeated ones and an empty source, and sort."""
    if not sources:
        others = f"{len(skipped)} other files, the first {skipped[0]!r}" if skipped else "nothing"
        raise SourceError(
            f"{where} holds no videos: found {others}; expected at least one (.avi, .mp4, .mkv, .webm, …)"
        )
    videos = sorted(_with_ids(sources), key=lambda video: video.id)
    for one, other in pairwise(videos):
        if one.id == other.id:
            raise SourceError(
                f"{where} gives the id {one.id!r} twice, to {readable(one.path)!r} and "
                f"{readable(other.path)!r}; remove or rename one, or use a CSV list with a column 'id'"
            )
    return SourceList(tuple(videos), class_order(video.label for video in videos), tuple(skipped))


def _with_ids(sources: Sequence[VideoSource]) -> list[VideoSource]:
    """Ids for the sources that have none: without the extension, unless two would share that id."""
    short = [source.id or strip_extension(source.relative_path) for source in sources]
    while True:
        counts = Counter(short)
        longer = [
            source.relative_path if counts[name] > 1 and not source.id else name
            for source, name in zip(sources, short, strict=True)
        ]
        if longer == short:
            return [replace(source, id=name) for source, name in zip(sources, short, strict=True)]
        short = longer  # "a.avi.mp4" is now "a.avi", as the "a.avi" beside "a.mp4" is: look again


def _text(cell: object) -> str:
    return cell.decode("utf-8", "surrogateescape") if isinstance(cell, bytes) else str(cell)
