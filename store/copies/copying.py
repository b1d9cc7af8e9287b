"""Copies of entries: their rows in blocks of bounded size, checked against the hash that each entry carries."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moclip.errors import StoreFormatError
from moclip.store.containers import CONTAINERS
from moclip.store.containers.rows import Pending, Rows, row_bytes
from moclip.store.files import Folder, check_name, open_folder
from moclip.store.groups import read_mark
from moclip.store.receipts import Entry, Receipt
from moclip.store.schema import VALUE, VALUE_STOP, FeatureSpec, SourceFacts
from moclip.store.writer import ShardWriter

#: A film's rows do not fit in memory: they come in blocks of about this size.
BLOCK_BYTES = 16 * 2**20
#: Blocks that are being read while others are written, at most this much and this many.
_AHEAD_BYTES = 64 * 2**20
_AHEAD_BLOCKS = 64
#: Arrays that stay open between entries.
_OPEN_ARRAYS = 1024


@dataclass(frozen=True)
class Block:
    """Consecutive rows of one entry: ``columns`` holds ``value`` and the specification's columns, by name.

    Of ragged rows, ``value`` is their bytes one after the other and ``lengths`` tells how long each row is.
    ``last`` says that the entry has no further rows.
    """

    columns: dict[str, npt.NDArray[Any]]
    lengths: npt.NDArray[np.int64] | None
    last: bool


@dataclass(frozen=True)
class StartedBlock:
    """A block whose reading was begun; ``wait`` gives it."""

    bytes: int
    wait: Callable[[], Block]


class RowSource:
    """The rows of one feature of a store by where they lie, whether a table names them or not."""

    def __init__(self, folder: Folder, feature: str, spec: FeatureSpec) -> None:
        self._url = folder.url
        self._feature = check_name(feature, "a feature")
        self._spec = spec
        self._reader = CONTAINERS[read_mark(folder)].reader(folder)
        self._open_once = lru_cache(_OPEN_ARRAYS)(self._open_anew)

    def start(self, shard: str, entry: Entry) -> Iterator[StartedBlock]:
        """Read the rows of an ok entry of ``shard``; each block is begun when it is asked for."""
        if entry.array is None or entry.row_start is None or entry.row_stop is None:
            raise StoreFormatError(
                f"an entry of {self._feature}/{shard} in {self._url} does not say where its rows lie"
            )
        if not 0 <= entry.row_start < entry.row_stop:
            raise StoreFormatError(
                f"an entry of {self._feature}/{shard} in {self._url} has a row range that is none: "
                f"{entry.row_start} to {entry.row_stop}"
            )
        opened = {name: self._open(shard, entry.array, name, entry.row_stop) for name in self._spec.columns}
        if self._spec.ragged:
            yield from self._ragged(shard, entry.array, opened, entry.row_start, entry.row_stop)
        else:
            value = self._open(shard, entry.array, VALUE, entry.row_stop)
            size = row_bytes(self._spec.dtype, value.shape[1:])
            yield from _regular({**opened, VALUE: value}, entry.row_start, entry.row_stop, size)

    def _ragged(
        self, shard: str, array: str, columns: dict[str, Rows], start: int, stop: int
    ) -> Iterator[StartedBlock]:
        stops = self._open(shard, array, VALUE_STOP, stop, 8 * (stop - start))
        bounds = stops.start(slice(max(0, start - 1), stop))()
        if not start:
            bounds = np.concatenate([np.zeros(1, np.int64), bounds])
        lengths = np.diff(bounds)
        if bounds[0] < 0 or (lengths < 0).any():
            raise StoreFormatError(f"{self._url}: rows of {self._feature}/{shard} stop where there are no bytes")
        value = self._open(shard, array, VALUE, int(bounds[-1]), int(lengths.max(initial=0)))
        columns = {**columns, VALUE: value}
        for first, last in _byte_runs(lengths):
            rows, data = slice(start + first, start + last), slice(int(bounds[first]), int(bounds[last]))
            begun = {name: column.start(data if name == VALUE else rows) for name, column in columns.items()}
            size = (data.stop - data.start) // (last - first)
            yield _started(begun, lengths[first:last], rows, stop, size)

    def _open(self, shard: str, array: str, column: str, needed: int, at_once: int = 0) -> Rows:
        """A column that holds at least ``needed`` rows. Its files are looked for before much is read ``at_once``."""
        rows = self._open_once(shard, array, column, needed if at_once > BLOCK_BYTES else 0)
        if rows.shape[0] < needed:
            raise StoreFormatError(
                f"{self._url}: {self._feature}/{shard}/{array}/{column} has {rows.shape[0]} rows; "
                f"an entry names {needed} rows of it"
            )
        return rows

    def _open_anew(self, shard: str, array: str, column: str, needed: int) -> Rows:
        name = f"features/{self._feature}/{check_name(shard, 'a shard')}"
        return self._reader.open(name, check_name(array, "an array"), column, self._spec.arrays[column], needed)


def _regular(columns: Mapping[str, Rows], start: int, stop: int, size: int) -> Iterator[StartedBlock]:
    step = max(1, BLOCK_BYTES // size)
    for first in range(start, stop, step):
        rows = slice(first, min(first + step, stop))
        yield _started({name: column.start(rows) for name, column in columns.items()}, None, rows, stop, size)


def _byte_runs(lengths: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Runs of ragged rows of about a block, one row at least."""
    first = size = 0
    for k, length in enumerate(lengths.tolist()):
        if k > first and size + length > BLOCK_BYTES:
            yield first, k
            first, size = k, 0
        size += length
    yield first, len(lengths)


def _started(
    begun: Mapping[str, Pending], lengths: npt.NDArray[np.int64] | None, rows: slice, stop: int, size: int
) -> StartedBlock:
    def wait() -> Block:
        return Block({name: pending() for name, pending in begun.items()}, lengths, rows.stop == stop)

    return StartedBlock((rows.stop - rows.start) * size, wait)


def read_ahead(started: Iterable[StartedBlock]) -> Iterator[Block]:
    """The blocks in order, while the next ones are already being read."""
    waiting: deque[StartedBlock] = deque()
    size = 0
    for block in started:
        waiting.append(block)
        size += block.bytes
        while size > _AHEAD_BYTES or len(waiting) > _AHEAD_BLOCKS:
            first = waiting.popleft()
            size -= first.bytes
            yield first.wait()
    while waiting:
        yield waiting.popleft().wait()


@dataclass(frozen=True)
class Copy:
    """One entry to be copied: what is known of its video, and where its rows lie."""

    facts: SourceFacts
    entry: Entry
    rows: RowSource
    shard: str


def copy_shard(
    url: str | Path,
    *,
    feature: str,
    spec: FeatureSpec,
    shard: str,
    copies: Sequence[Copy],
    versions: Mapping[str, str],
    written_at: int | None = None,
    report: Callable[[int], None] = lambda done: None,
) -> Receipt:
    """Write a shard of the entries ``copies``, in their order, failed ones too; ``report`` is told after each.

    What a killed attempt left under the shard's name is deleted first. :class:`StoreFormatError` names the video
    whose rows are not those that its entry was written with; there is no receipt then.
    """
    delete_shard_files(open_folder(url), feature, shard)
    writer = ShardWriter(url, feature=feature, spec=spec, shard=shard)
    blocks = read_ahead(
        block for copy in copies if copy.entry.status == "ok" for block in copy.rows.start(copy.shard, copy.entry)
    )
    for done, copy in enumerate(copies, 1):
        if copy.entry.status == "ok":
            _copy_rows(writer, blocks, copy, feature)
        else:
            writer.fail(copy.facts, copy.entry.reason or "", copy.entry.detail or "")
        report(done)
    return writer.finish(versions=versions, written_at=written_at)


def _copy_rows(writer: ShardWriter, blocks: Iterator[Block], copy: Copy, feature: str) -> None:
    for block in blocks:
        columns = {name: values for name, values in block.columns.items() if name != VALUE}
        value = block.columns[VALUE]
        if block.lengths is None:
            writer.append(value, **columns)
        else:
            writer.append_bytes(_cut(value, block.lengths), **columns)
        if block.last:
            break
    written = writer.ok(copy.facts, motion_source=copy.entry.motion_source)
    if written.content != copy.entry.content:
        raise StoreFormatError(
            f"{feature} of {copy.facts.id!r} in shard {copy.shard} is not what was written: the checksum of its rows "
            "differs; nothing was copied of it. Put a good copy of the shard's files back, or extract the video again"
        )


def _cut(value: npt.NDArray[Any], lengths: npt.NDArray[np.int64]) -> list[bytes]:
    data = value.tobytes()
    return [data[a:b] for a, b in pairwise([0, *np.cumsum(lengths).tolist()])]


def delete_shard_files(folder: Folder, feature: str, shard: str) -> None:
    """Delete the files of a shard, finished or not, in either container."""
    base = f"features/{feature}/{shard}"
    for name in (*folder.files(base), f"{base}.h5", f"features/{feature}/.{shard}.h5.tmp"):
        folder.delete(name)
