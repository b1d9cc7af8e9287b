"""Writing one shard of one feature: rows as they come, then the receipt that makes them count."""

import hashlib
import json
import re
import shutil
import tempfile
import time
import weakref
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moclip.store.containers import CONTAINERS
from moclip.store.containers.rows import RowWriter
from moclip.store.files import LocalFolder, check_name, open_folder, sha256_of
from moclip.store.groups import read_mark
from moclip.store.receipts import Entry, Receipt, write_receipt
from moclip.store.schema import FORMAT, VALUE, VALUE_STOP, FeatureSpec, SourceFacts

BYTES_ARRAY = "bytes"


#: An absolute path in quotes, as Python's own messages have it, and the folders of one without.
_QUOTED_PATH = re.compile(r"""(['"])/(?:(?!\1).)*?([^/'"]+)\1""")
_FOLDERS = re.compile(r"(?<![\w:/.])/(?:[^\s/'\"]+/)+")


class ShardWriter:
    """Collects one shard's videos, one after the other, and ends with a :class:`Receipt`.

    Rows of one shape share an array, ``features/<feature>/<shard>/<array>``; ``array`` is the row's shape without
    its leading channel axis, ``30x40`` for (2, 30, 40) and ``512`` for (512,). Until :meth:`finish` returns, the
    store does not know of the shard. No two writers may be given the same shard name.

    On a disk the files grow in place. For a bucket they are made in a temporary folder and uploaded whole.
    """

    def __init__(self, url: str | Path, *, feature: str, spec: FeatureSpec, shard: str) -> None:
        self._store = open_folder(url)
        self._spec = spec
        self._feature = check_name(feature, "a feature")
        self._shard = check_name(shard, "a shard")
        self._name = f"features/{feature}/{shard}"
        local = self._store.local
        self._base = local or Path(tempfile.mkdtemp(prefix="moclip-"))
        # Called by hand, or when the writer is forgotten, or when the process ends; on a disk there is nothing to do.
        self._discard = weakref.finalize(self, _discard, None if local else self._base)
        about = {"format": FORMAT, "feature": feature, "shard": shard, "specification": spec.to_json()}
        container = CONTAINERS[read_mark(self._store)]
        self._files = container.shard(self._base, self._name, json.dumps(about, sort_keys=True))
        self._arrays: dict[str, dict[str, RowWriter]] = {}
        self._videos: list[tuple[SourceFacts, Entry]] = []
        self._open: VideoRows | None = None

    def append(self, rows: npt.NDArray[Any], **columns: npt.ArrayLike) -> None:
        """Add rows of the current video, shape (n, *row_shape), and its columns, each of length n.

        A video's rows all have one shape; ``ValueError`` otherwise.
        """
        if self._spec.ragged:
            raise ValueError("rows of this feature have lengths of their own; use append_bytes")
        values = {VALUE: np.asarray(rows, self._spec.dtype), **self._columns(len(rows), columns)}
        video = self._video(array_name(values[VALUE].shape[1:]), values[VALUE].shape[1:])
        for column, array in values.items():
            self._arrays[video.array][column].append(array)
            video.update(column, array)
        video.rows += len(rows)

    def append_bytes(self, rows: Sequence[bytes], **columns: npt.ArrayLike) -> None:
        """Add ragged rows of the current video, each a run of bytes, and its columns, each of length n."""
        if not self._spec.ragged:
            raise ValueError("rows of this feature are arrays of one shape; use append")
        values = self._columns(len(rows), columns)
        video = self._video(BYTES_ARRAY, ())
        arrays = self._arrays[video.array]
        lengths = np.array([len(row) for row in rows], np.int64)
        joined = np.frombuffer(b"".join(rows), np.uint8)
        arrays[VALUE_STOP].append(arrays[VALUE].rows + np.cumsum(lengths))
        arrays[VALUE].append(joined)
        for column, array in values.items():
            arrays[column].append(array)
        # Where a row stops depends on the shard, how long it is does not.
        for column, array in {**values, VALUE: joined, "value_bytes": lengths}.items():
            video.update(column, array)
        video.rows += len(rows)

    def cut(self) -> "VideoRows":
        """End the current video's rows; whose they are is said later, to :meth:`ok`."""
        video = self._open
        if video is None or not video.rows:
            raise ValueError("there are no rows to end: an ok entry needs at least one")
        self._open = None
        return video

    def restart(self) -> None:
        """Forget the current video's rows; they stay in the array, named by nothing."""
        self._open = None

    def ok(self, facts: SourceFacts, rows: "VideoRows | None" = None, *, motion_source: str | None = None) -> Entry:
        """Close a video, the current one unless its ``rows`` were cut: they count. Gives its entry.

        ``motion_source`` says where motion comes from: native, mpeg4 or estimate.
        """
        video = rows or self.cut()
        stop = video.row_start + video.rows
        entry = Entry("ok", None, None, video.array, video.row_start, stop, video.content(), motion_source)
        self._close(facts, entry)
        return entry

    def fail(self, facts: SourceFacts, reason: str, detail: str) -> None:
        """Close the current video as failed; rows already appended stay in the array, named by nothing."""
        self._close(facts, Entry("failed", reason, without_folders(detail)))

    def finish(self, *, versions: Mapping[str, str] | None = None, written_at: int | None = None) -> Receipt:
        """Write what is pending, then the receipt, last.

        Whoever copies rows gives the ``versions`` that made them; ``written_at`` is now unless given.
        """
        try:
            for arrays in self._arrays.values():
                for array in arrays.values():
                    array.finish()
            self._files.finish()
            receipt = Receipt(
                feature=self._feature,
                shard=self._shard,
                specification=self._spec,
                written_at=time.time_ns() if written_at is None else written_at,
                versions=dict(library_versions() if versions is None else versions),
                files=self._stored(),
                videos=tuple(self._videos),
            )
            write_receipt(self._store, receipt)
        finally:
            self._discard()
        return receipt

    def _columns(self, rows: int, columns: dict[str, npt.ArrayLike]) -> dict[str, npt.NDArray[Any]]:
        if set(columns) != set(self._spec.columns):
            raise ValueError(f"columns {sorted(columns)} given, {sorted(self._spec.columns)} expected")
        values = {name: np.asarray(columns[name], dtype) for name, dtype in self._spec.columns.items()}
        for name, array in values.items():
            if array.shape != (rows,):
                raise ValueError(f"column {name} has shape {array.shape}, ({rows},) expected")
        return values

    def _video(self, array: str, row_shape: tuple[int, ...]) -> "VideoRows":
        """The video whose rows these are: the one that is open, or a new one."""
        if array not in self._arrays:
            self._arrays[array] = self._new_arrays(array, row_shape)
        if self._open is None:
            counted = VALUE_STOP if self._spec.ragged else VALUE
            self._open = VideoRows(array, self._arrays[array][counted].rows)
        if self._open.array != array:
            raise ValueError(f"a video's rows changed from {self._open.array} to {array}")
        return self._open

    def _new_arrays(self, array: str, row_shape: tuple[int, ...]) -> dict[str, RowWriter]:
        axes = self._spec.axes if len(self._spec.axes) == len(row_shape) else ()
        shapes = {VALUE: (row_shape, axes)}
        return {
            name: self._files.new_array(array, name, dtype, *shapes.get(name, ((), ())))
            for name, dtype in self._spec.arrays.items()
        }

    def _close(self, facts: SourceFacts, entry: Entry) -> None:
        self._videos.append((facts, entry))
        self._open = None

    def _stored(self) -> dict[str, dict[str, Any]]:
        """The shard's files, with sizes and checksums; in a bucket they are brought there now."""
        base = LocalFolder(str(self._base))
        sizes = {**base.files(self._name), **_file_size(base, self._name + ".h5")}
        files = {name: {"bytes": size, "sha256": sha256_of(self._base / name)} for name, size in sorted(sizes.items())}
        if self._base != self._store.local:
            for name in files:
                self._store.put(self._base / name, name)
        return files


def _discard(folder: Path | None) -> None:
    if folder:
        shutil.rmtree(folder, ignore_errors=True)


def _file_size(folder: LocalFolder, name: str) -> dict[str, int]:
    return {name: (folder.local / name).stat().st_size} if folder.exists(name) else {}


class VideoRows:
    """The video whose rows are being appended: where they start, and a running hash of each of its columns."""

    def __init__(self, array: str, row_start: int) -> None:
        self.array = array
        self.row_start = row_start
        self.rows = 0
        self._hashes: dict[str, Any] = {}

    def update(self, column: str, values: npt.NDArray[Any]) -> None:
        little = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
        self._hashes.setdefault(column, hashlib.sha256()).update(little.data)

    def content(self) -> bytes:
        """A hash that depends neither on how the rows were cut into blocks nor on where they lie: 16 bytes."""
        whole = hashlib.sha256(self.array.encode())
        for column in sorted(self._hashes):
            whole.update(column.encode() + b"\0" + self._hashes[column].digest())
        return whole.digest()[:16]


def without_folders(text: str) -> str:
    """``text`` with absolute paths cut to their last part: a store does not tell of the machine that made it."""
    return _FOLDERS.sub("", _QUOTED_PATH.sub(r"\1\2\1", text))


def array_name(row_shape: tuple[int, ...]) -> str:
    """``30x40`` for (2, 30, 40), ``197x768`` for (197, 768), ``512`` for (512,)."""
    return "x".join(str(size) for size in (row_shape[-2:] or (1,)))


@cache
def library_versions() -> Mapping[str, str]:
    """Versions of what takes part in making values: provenance, never compared."""
    versions = {}
    for name in ("moclip", "av", "h5py", "numpy", "open_clip_torch", "pillow", "tensorstore", "timm", "torch"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
