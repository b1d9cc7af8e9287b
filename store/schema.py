"""What a store says about a feature, a video and an entry: the types that cross its modules.

Format 1; ``docs/format.md`` draws the files.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from moclip.errors import StoreFormatError

FORMAT = 1

#: One row a (video, feature). ``array``, ``row_start`` and ``row_stop`` say where the rows lie; ``content`` is the
#: first half of a SHA-256 of the rows as written, so that two stores compare without reading their arrays.
#: ``motion_source`` says where the video's vectors came from: native | mpeg4 | estimate; null if it is not motion.
ENTRY_FIELDS = (
    pa.field("id", pa.string(), nullable=False),
    pa.field("feature", pa.string(), nullable=False),
    pa.field("status", pa.string(), nullable=False),
    pa.field("reason", pa.string()),
    pa.field("detail", pa.string()),
    pa.field("shard", pa.string(), nullable=False),
    pa.field("array", pa.string()),
    pa.field("row_start", pa.int64()),
    pa.field("row_stop", pa.int64()),
    pa.field("content", pa.binary(16)),
    pa.field("motion_source", pa.string()),
)

#: One row a video: what was found in the file. Further columns of the source list follow them.
FACT_FIELDS = (
    pa.field("path", pa.string()),
    pa.field("bytes", pa.int64()),
    pa.field("content_hash", pa.string()),
    pa.field("codec", pa.string()),
    pa.field("width", pa.int32()),
    pa.field("height", pa.int32()),
    pa.field("fps", pa.float64()),
    pa.field("frames", pa.int64()),
    pa.field("duration_s", pa.float64()),
    pa.field("corrupt_frames", pa.int64()),
)

#: The kinds of features that videos are extracted into; others are made of these.
EXTRACTED = ("motion", "motion-accumulated", "embedding", "image")
#: In receipts, where facts and entries share a row, the source list's own columns carry this prefix.
EXTRA_PREFIX = "extra."

#: The labels' column of a split, train | val | test, is called so with the split's name behind it.
SPLIT_PREFIX = "split_"

LABEL_FIELDS = (
    pa.field("id", pa.string(), nullable=False),
    pa.field("label", pa.string()),
    pa.field("group", pa.string()),
)

BYTE_AXIS = "byte"

#: The array of each group that holds the rows themselves; the others are the specification's columns.
VALUE = "value"
#: Of ragged rows, ``value`` holds the bytes of all, one after the other, and this column where each row stops in it.
VALUE_STOP = "value_stop"

#: A stranger's specification names one of these, or is refused.
_DTYPES = {f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)} | {"float16", "float32", "float64"}


@dataclass(frozen=True)
class SourceFacts:
    """What is known of one video file; ``None`` where it could not be found out.

    ``path`` is relative to the source and is provenance only: nothing opens it. ``content_hash`` is the SHA-256
    of the file's bytes, ``frames`` the number of decoded frames, ``corrupt_frames`` how many of the stream's
    packets or frames the decoder refused or concealed. ``extra`` holds the source list's further columns.
    """

    id: str
    path: str | None = None
    bytes: int | None = None
    content_hash: str | None = None
    codec: str | None = None
    width: int | None = None
    height: int | None = None
    fps: float | None = None
    frames: int | None = None
    duration_s: float | None = None
    corrupt_frames: int | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class FeatureSpec:
    """Everything that determines a feature's values, and nothing else (library versions are in the receipts).

    ``kind`` names the algorithm and ``parameters`` its settings (plain JSON, the algorithm's version included).
    A row has ``axes`` beyond the row axis; ``columns`` are numbers that go with each row, name to dtype. Where the
    one axis is ``byte``, rows are ``ragged``: each is a file of its own length, such as a JPEG.
    """

    kind: str
    dtype: str
    unit: str
    parameters: Mapping[str, Any]
    columns: Mapping[str, str] = field(default_factory=dict)
    axes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for dtype in (self.dtype, *self.columns.values()):
            if dtype not in _DTYPES:
                raise StoreFormatError(f"dtype {dtype!r} of feature kind {self.kind!r} is not a plain number")
        for name in self.columns:
            if not name.isidentifier() or name in (VALUE, VALUE_STOP):
                raise StoreFormatError(f"column {name!r} of feature kind {self.kind!r} is not a plain name")
        if self.ragged and self.dtype != "uint8":
            raise StoreFormatError(f"rows of bytes have dtype uint8, not {self.dtype}, in feature kind {self.kind!r}")

    @property
    def ragged(self) -> bool:
        """Whether each row is a run of bytes of its own length."""
        return self.axes == (BYTE_AXIS,)

    @property
    def arrays(self) -> dict[str, str]:
        """What each group of the feature's rows holds, name to dtype."""
        return {VALUE: self.dtype, **({VALUE_STOP: "int64"} if self.ragged else {}), **self.columns}

    @property
    def digest(self) -> str:
        """16 hex digits that are equal exactly where two features' values mean the same."""
        canonical = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "dtype": self.dtype,
            "unit": self.unit,
            "parameters": dict(self.parameters),
            "columns": dict(self.columns),
            "axes": list(self.axes),
        }

    @classmethod
    def from_json(cls, data: Any) -> "FeatureSpec":
        """Read what :meth:`to_json` wrote; a :class:`StoreFormatError` says what is wrong with anything else."""
        try:
            return cls(
                kind=str(data["kind"]),
                dtype=str(data["dtype"]),
                unit=str(data["unit"]),
                parameters=dict(data["parameters"]),
                columns={str(name): str(dtype) for name, dtype in dict(data["columns"]).items()},
                axes=tuple(str(axis) for axis in data["axes"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise StoreFormatError(f"not a feature specification: {error!r} in {data!r}") from error


def empty_entries() -> pa.Table:
    return pa.schema(ENTRY_FIELDS).empty_table()


def empty_videos() -> pa.Table:
    return pa.schema([LABEL_FIELDS[0], *FACT_FIELDS]).empty_table()


def empty_labels() -> pa.Table:
    return pa.schema(LABEL_FIELDS).empty_table()
