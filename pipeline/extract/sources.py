"""What there is to extract: a folder, a text list, a CSV or Parquet table, or one video, as ordered sources.

Listing opens no video and asks the file system for nothing beyond the folders' entries, so a million sources
list in seconds; what is missing or broken shows when it is decoded, as a failed entry.
"""

import os
import posixpath
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from moclip.errors import SourceError
from moclip.pipeline.extract.sampling import FIRST_CLIP
from moclip.pipeline.extract.source_folder import VIDEO_EXTENSIONS, strip_extension, walk
from moclip.pipeline.extract.source_table import (
    KNOWN_COLUMNS,
    TABLE_READERS,
    is_split_column,
    plain_column,
    read_table,
    readable,
    split_column,
    text_column,
)
from moclip.store import SPLIT_PREFIX
from moclip.store.schema import EXTRA_PREFIX

#: Of so many videos at a time are there Python objects: a million would take a gigabyte.
_BLOCK = 2**14

#: Told how many videos have been found so far.
Report = Callable[[int], None]
#: A video as a list or a folder gives it: the path that opens it, the relative path, the label.
_Listed = tuple[str, str, str | None]


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
class Sources(Sequence[VideoSource]):
    """Many videos, in columns; a :class:`VideoSource` is made when one is asked for, a slice gives a tuple of them.

    The columns: ``id``, ``path`` (bytes), ``relative_path``, ``label``, ``group``, and as many as there are of
    ``split_<name>`` and ``extra.<name>``.
    """

    table: pa.Table

    def __repr__(self) -> str:
        return f"Sources({len(self)} videos)"

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            start, stop, _ = index.indices(len(self))
            return tuple(map(_video, self.table.slice(start, max(0, stop - start)).to_pylist()))
        at = range(len(self))[index]
        return self[at : at + 1][0]

    def __iter__(self) -> Iterator[VideoSource]:
        for start in range(0, len(self), _BLOCK):
            yield from self[start : start + _BLOCK]

    @property
    def ids(self) -> pa.ChunkedArray:
        return self.table["id"]

    def first_clips(self) -> "Sources":
        """The same videos, which are to be cut: each under the id of its first clip."""
        ids = pc.binary_join_element_wise(self.ids.cast(pa.string()), FIRST_CLIP, "")
        return self._with_ids(self.table, ids).sorted()

    def clips(self, ids: pa.ChunkedArray) -> "Sources":
        """Of videos under their first clips' ids, those clips that are among ``ids``."""
        first = pc.replace_substring_regex(ids, r"#\d{5,}$", FIRST_CLIP)
        at = pc.index_in(first, value_set=self.ids.combine_chunks())
        known = pc.is_valid(at)
        return self._with_ids(self.table.take(at.filter(known)), ids.filter(known))

    def _with_ids(self, table: pa.Table, ids: pa.ChunkedArray) -> "Sources":
        return Sources(table.set_column(table.column_names.index("id"), "id", ids))

    def sorted(self) -> "Sources":
        """The same, in id order."""
        return Sources(self.table.sort_by("id"))

    @property
    def labels(self) -> pa.Table:
        """Their labels table."""
        splits = sorted(name for name in self.table.column_names if is_split_column(name))
        return self.table.select(["id", "label", "group", *splits])


def _video(row: Mapping[str, Any]) -> VideoSource:
    return VideoSource(
        id=row["id"],
        path=row["path"].decode("utf-8", "surrogateescape"),
        relative_path=row["relative_path"],
        label=row["label"],
        group=row["group"],
        splits={n.removeprefix(SPLIT_PREFIX): value for n, value in row.items() if is_split_column(n) and value},
        extra={n.removeprefix(EXTRA_PREFIX): value for n, value in row.items() if n.startswith(EXTRA_PREFIX)},
    )


@dataclass(frozen=True)
class SourceList:
    """Sources sorted by id, their classes in order, and the names of the files that are not videos."""

    videos: Sources
    classes: tuple[str, ...]
    skipped: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"SourceList({len(self.videos)} videos, {len(self.classes)} classes, {len(self.skipped)} skipped)"


def list_sources(source: str | Path, report: Report = lambda _: None) -> SourceList:
    """List the videos of a folder, a .txt, .csv or .parquet list, or one video file.

    SourceError: the source does not exist, holds no videos, repeats an id, or its table cannot be used.
    """
    given = os.fspath(source)
    path = os.path.abspath(given)
    if os.path.isdir(path):
        skipped: list[str] = []
        videos = _as_table(_list_folder(path, skipped), report)
        return _finish(videos, f"the folder {readable(path)!r}", sorted(skipped))
    if not os.path.exists(path):
        raise SourceError(f"no such source: {readable(given)!r}; expected a folder, a list of videos or a video file")
    extension = os.path.splitext(path)[1].lower()
    if extension == ".txt":
        return _finish(_as_table(_read_text(path), report), f"the list {readable(given)!r}")
    if extension in TABLE_READERS:
        return _finish(_table_sources(path, report), f"the table {readable(given)!r}")
    if extension in VIDEO_EXTENSIONS:
        return _finish(_as_table([(path, os.path.basename(path), None)], report), f"{readable(given)!r}")
    raise SourceError(
        f"{readable(given)!r} is neither a video (by its extension) nor a list; "
        "expected a folder, .txt, .csv, .parquet or a video file"
    )


def file_size(path: str | bytes) -> int | None:
    """The size of a file in bytes, None if it cannot be told."""
    try:
        return os.stat(path).st_size
    except OSError:
        return None


def class_order(labels: Iterable[str | None], first: Sequence[str] = ()) -> tuple[str, ...]:
    """The classes of ``first`` in their order, then every other label, sorted."""
    others = {label for label in labels if label is not None}.difference(first)
    return (*first, *sorted(others))


def _list_folder(root: str, skipped: list[str]) -> Iterator[_Listed]:
    """The videos below ``root``; the names of other files go to ``skipped``."""
    for relative, is_video in walk(root):
        if is_video:
            yield os.path.join(root, relative), relative, posixpath.basename(posixpath.dirname(relative)) or None
        else:
            skipped.append(readable(relative))


def _read_text(path: str) -> Iterator[_Listed]:
    """One path a line, optionally a TAB and a label; blank lines and lines that begin with # are left out."""
    folder = os.path.dirname(path)
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            given, *labels = [cell.strip() for cell in line.split("\t")]
            if not given or len(labels) > 1:
                raise SourceError(
                    f"{readable(path)!r}, line {number}: expected a path, or a path, one TAB and a label; "
                    f"found {len(labels) + 1} fields, the first {readable(given)!r}"
                )
            yield *_listed(folder, given), (labels[0] if labels else "") or None


def _table_sources(path: str, report: Report) -> pa.Table:
    """The rows of a table as sources. Row numbers in messages count the data rows from 1."""
    table, where = read_table(path), readable(path)
    if "path" not in table.column_names:
        raise SourceError(f"{where!r} has no column 'path', only {table.column_names}; add one")
    sources = _as_table(_table_paths(table, path), report)
    for name in table.column_names:
        if name in ("id", "label", "group"):
            at = sources.column_names.index(name)
            sources = sources.set_column(at, name, text_column(table[name]))
        elif is_split_column(name):
            sources = sources.append_column(name, split_column(table, name, repr(where)))
        elif name not in KNOWN_COLUMNS:
            sources = sources.append_column(EXTRA_PREFIX + name, plain_column(table[name]))
    return sources


def _table_paths(table: pa.Table, path: str) -> Iterator[_Listed]:
    folder = os.path.dirname(path)
    batches = table.select(["path"]).to_batches(max_chunksize=_BLOCK)
    for row, cell in enumerate((cell for batch in batches for cell in batch["path"].to_pylist()), start=1):
        given = "" if cell is None else _text(cell)
        if not given:
            raise SourceError(f"{readable(path)!r}, row {row}: the path is empty; give one or remove the row")
        yield *_listed(folder, given), None


def _text(cell: object) -> str:
    return cell.decode("utf-8", "surrogateescape") if isinstance(cell, bytes) else str(cell)


def _listed(folder: str, given: str) -> tuple[str, str]:
    """A path of a list: below the list's folder known by its relative path, else by its last two parts."""
    if "\0" in given:
        raise SourceError(f"the path {readable(given)!r} holds a zero byte; is the list UTF-16? save it as UTF-8")
    path = os.path.join(folder, given)
    lexical = os.path.normpath(path)
    inside = folder.rstrip("/") + "/"
    if lexical.startswith(inside):
        return path, lexical.removeprefix(inside)
    return path, "/".join(lexical.split("/")[-2:]).lstrip("/")


def _as_table(listed: Iterable[_Listed], report: Report) -> pa.Table:
    """The columns of :class:`Sources`. An ``id`` of null is still to be settled, by ``_finish``."""
    rows, blocks, count = iter(listed), [_SCHEMA.empty_table()], 0
    while block := list(islice(rows, _BLOCK)):
        paths, relative, labels = zip(*block, strict=True)
        columns = {
            "id": pa.nulls(len(block), pa.string()),
            "path": [path.encode("utf-8", "surrogateescape") for path in paths],
            "relative_path": map(readable, relative),
            "label": [None if label is None else readable(label) for label in labels],
            "group": pa.nulls(len(block), pa.string()),
        }
        blocks.append(pa.table([pa.array(columns[field.name], field.type) for field in _SCHEMA], _SCHEMA))
        count += len(block)
        report(count)
    return pa.concat_tables(blocks)


_SCHEMA = pa.schema(
    [
        (name, pa.binary() if name == "path" else pa.string())
        for name in ("id", "path", "relative_path", "label", "group")
    ]
)


def _finish(videos: pa.Table, where: str, skipped: Sequence[str] = ()) -> SourceList:
    """Settle the ids, refuse repeated ones and an empty source, and sort."""
    if not len(videos):
        others = f"{len(skipped)} other files, the first {skipped[0]!r}" if skipped else "nothing"
        raise SourceError(
            f"{where} holds no videos: found {others}; expected at least one (.avi, .mp4, .mkv, .webm, …)"
        )
    videos = videos.set_column(0, "id", _with_ids(videos["id"], videos["relative_path"])).sort_by("id")
    ids = videos["id"].combine_chunks()
    twice = pc.index(pc.equal(ids[1:], ids[:-1]), True).as_py()
    if twice >= 0:
        one, other = Sources(videos)[twice : twice + 2]
        raise SourceError(
            f"{where} gives the id {one.id!r} twice, to {readable(one.path)!r} and "
            f"{readable(other.path)!r}; remove or rename one, or use a CSV list with a column 'id'"
        )
    pa.default_memory_pool().release_unused()  # several times what the sources take
    return SourceList(Sources(videos), class_order(videos["label"].unique().to_pylist()), tuple(skipped))


def _with_ids(given: pa.ChunkedArray, relative: pa.ChunkedArray) -> pa.ChunkedArray:
    """Ids for the sources that have none: without the extension, unless two would share that id."""
    bare = [pa.array(map(strip_extension, chunk.to_pylist()), pa.string()) for chunk in relative.chunks]
    ids = pc.coalesce(given, pa.chunked_array(bare))
    while True:
        counts = ids.value_counts()
        shared = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
        clashing = pc.and_(pc.is_null(given), pc.is_in(ids, value_set=shared))
        longer = pc.if_else(clashing, relative, ids)
        if longer.equals(ids):
            return ids
        ids = longer  # "a.avi.mp4" is now "a.avi", as the "a.avi" beside "a.mp4" is: look again
