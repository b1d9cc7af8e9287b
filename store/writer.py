"""Writing one shard of one feature: rows as they come, then the receipt that makes them count."""

import hashlib
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moclip.store.arrays import ArrayWriter
from moclip.store.files import check_name, sha256_of, write_atomic
from moclip.store.groups import GROUP
from moclip.store.receipts import Entry, Receipt, write_receipt
from moclip.store.schema import FeatureSpec, SourceFacts

#: The array of each group that holds the rows themselves; the others are the specification's columns.
VALUE = "value"


class ShardWriter:
    """Collects one shard's videos, one after the other, and ends with a :class:`Receipt`.

    Rows of one shape share a group, ``features/<feature>/<shard>/<array>/``; ``array`` is the row's shape without
    its leading channel axis, ``30x40`` for (2, 30, 40) and ``512`` for (512,). Until :meth:`finish` returns, the
    store does not know of the shard. No two writers may be given the same shard name.
    """

    def __init__(self, root: str | Path, *, feature: str, spec: FeatureSpec, shard: str) -> None:
        self._root = Path(root)
        self._feature = check_name(feature, "a feature")
        self._spec = spec
        self._shard = check_name(shard, "a shard")
        self._arrays: dict[str, dict[str, ArrayWriter]] = {}
        self._videos: list[tuple[SourceFacts, Entry]] = []
        self._open: _OpenVideo | None = None

    @property
    def folder(self) -> Path:
        return self._root / "features" / self._feature / self._shard

    def append(self, rows: npt.NDArray[Any], **columns: npt.ArrayLike) -> None:
        """Add rows of the current video, shape (n, *row_shape), and its columns, each of length n.

        A video's rows all have one shape; ``ValueError`` otherwise.
        """
        if set(columns) != set(self._spec.columns):
            raise ValueError(f"columns {sorted(columns)} given, {sorted(self._spec.columns)} expected")
        values = {VALUE: np.asarray(rows, self._spec.dtype)}
        for name, dtype in self._spec.columns.items():
            values[name] = np.asarray(columns[name], dtype)
            if values[name].shape != (len(rows),):
                raise ValueError(f"column {name} has shape {values[name].shape}, ({len(rows)},) expected")
        name = array_name(values[VALUE].shape[1:])
        arrays = self._arrays.setdefault(name, {}) or self._new_arrays(name, values[VALUE].shape[1:])
        if self._open is None:
            self._open = _OpenVideo(name, arrays[VALUE].rows)
        if self._open.array != name:
            raise ValueError(f"a video's rows changed from {self._open.array} to {name}")
        for column, array in values.items():
            arrays[column].append(array)
            self._open.update(column, array)

    def ok(self, facts: SourceFacts) -> None:
        """Close the current video: its rows count."""
        video = self._open
        if video is None:
            raise ValueError(f"{facts.id}: an ok entry needs at least one row")
        stop = self._arrays[video.array][VALUE].rows
        entry = Entry("ok", None, None, video.array, video.row_start, stop, video.content())
        self._close(facts, entry)

    def fail(self, facts: SourceFacts, reason: str, detail: str) -> None:
        """Close the current video as failed; rows already appended stay in the array, named by nothing."""
        self._close(facts, Entry("failed", reason, detail))

    def finish(self) -> Receipt:
        """Write what is pending, then the receipt, last."""
        for arrays in self._arrays.values():
            for array in arrays.values():
                array.finish()
        receipt = Receipt(
            feature=self._feature,
            shard=self._shard,
            digest=self._spec.digest,
            written_at=time.time_ns(),
            versions=library_versions(),
            files=self._files(),
            videos=tuple(self._videos),
        )
        write_receipt(self._root, receipt)
        return receipt

    def _close(self, facts: SourceFacts, entry: Entry) -> None:
        self._videos.append((facts, entry))
        self._open = None

    def _new_arrays(self, name: str, row_shape: tuple[int, ...]) -> dict[str, ArrayWriter]:
        group = self.folder / name
        for folder in (self.folder, group):
            write_atomic(folder / "zarr.json", GROUP)
        axes = self._spec.axes if len(self._spec.axes) == len(row_shape) else ()
        arrays = {VALUE: ArrayWriter(group / VALUE, self._spec.dtype, row_shape, axes)}
        for column, dtype in self._spec.columns.items():
            arrays[column] = ArrayWriter(group / column, dtype, (), ())
        self._arrays[name] = arrays
        return arrays

    def _files(self) -> dict[str, dict[str, Any]]:
        if not self.folder.exists():
            return {}
        files = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return {
            path.relative_to(self._root).as_posix(): {
                "bytes": path.stat().st_size,
                "sha256": sha256_of(path),
            }
            for path in files
        }


class _OpenVideo:
    """The video whose rows are being appended: where they start, and a running hash of each of its columns."""

    def __init__(self, array: str, row_start: int) -> None:
        self.array = array
        self.row_start = row_start
        self._hashes: dict[str, Any] = {}

    def update(self, column: str, values: npt.NDArray[Any]) -> None:
        little = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
        self._hashes.setdefault(column, hashlib.sha256()).update(little.data)

    def content(self) -> str:
        """One hash that does not depend on how the rows were cut into blocks."""
        whole = hashlib.sha256(self.array.encode())
        for column in sorted(self._hashes):
            whole.update(column.encode() + b"\0" + self._hashes[column].digest())
        return whole.hexdigest()


def array_name(row_shape: tuple[int, ...]) -> str:
    """``30x40`` for (2, 30, 40), ``197x768`` for (197, 768), ``512`` for (512,)."""
    return "x".join(str(size) for size in (row_shape[-2:] or (1,)))


def library_versions() -> dict[str, str]:
    """Versions of what takes part in making values: provenance, never compared."""
    versions = {}
    for name in ("moclip", "av", "numpy", "open_clip_torch", "tensorstore", "timm", "torch", "torchvision"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
