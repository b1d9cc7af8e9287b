"""Whether two stores hold the same: their specifications, their entries and the rows themselves."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from moclip.store.reader import Store
from moclip.store.tables import spec_difference

#: Embeddings of one frame differ in their last bits with the batch they were computed in.
COSINE = 0.99999
_READ_VIDEOS = 64


@dataclass(frozen=True)
class RowDifference:
    """How far apart the rows of some videos are, in the feature's unit; cosines are over rows that are not zero."""

    max_abs: float
    mean_abs: float
    min_cosine: float
    mean_cosine: float
    worst: str


@dataclass(frozen=True)
class FeatureComparison:
    """One feature in two stores.

    ``specification`` says in words what differs, empty where nothing does. ``only_a`` and ``only_b`` count the
    entries of one store alone, ``status`` those that are ok in one and failed in the other or failed for another
    reason, ``common`` the videos with rows in both. Of these, ``equal`` are the same bit for bit, ``shape`` have
    another number or shape of rows, and ``rows`` tells of the rest. ``close`` is whether these agree to a cosine of
    at least 0.99999 a row, which is what embeddings of one frame do that were made in other batches.
    """

    feature: str
    embedding: bool
    specification: str
    only_a: int
    only_b: int
    status: int
    common: int
    equal: int
    shape: int
    rows: RowDifference | None

    @property
    def close(self) -> bool:
        return self.embedding and self.rows is not None and self.rows.min_cosine >= COSINE

    @property
    def values_match(self) -> bool:
        """Whether the videos that both stores have carry the same rows."""
        return self.common > 0 and not self.shape and (self.equal == self.common or self.close)

    @property
    def matches(self) -> bool:
        """Whether what both stores have is the same, and means the same."""
        return self.values_match and not (self.specification or self.status)

    @property
    def identical(self) -> bool:
        """Whether it matches and neither store has more."""
        return self.matches and not (self.only_a or self.only_b)


@dataclass(frozen=True)
class Comparison:
    """Two stores side by side; ``missing_a`` and ``missing_b`` are features that the one lacks and the other has."""

    a: str
    b: str
    features: tuple[FeatureComparison, ...]
    missing_a: tuple[str, ...]
    missing_b: tuple[str, ...]

    @property
    def matches(self) -> bool:
        """Whether there is something that both stores have, and all of it is the same."""
        return bool(self.features) and all(feature.matches for feature in self.features)

    @property
    def identical(self) -> bool:
        """Whether the stores match and neither has more."""
        more = self.missing_a or self.missing_b
        return self.matches and not more and all(feature.identical for feature in self.features)

    def to_json(self) -> dict[str, Any]:
        features = [
            {**asdict(f), "values_match": f.values_match, "matches": f.matches, "identical": f.identical}
            for f in self.features
        ]
        return {**asdict(self), "features": features, "matches": self.matches, "identical": self.identical}


def compare(a: Store, b: Store, report: Callable[[int], None] = lambda videos: None) -> Comparison:
    """Compare two stores, feature by feature. Rows whose hashes are equal are not read.

    ``report`` is told how many videos of a feature were looked at so far.
    """
    both = [name for name in a.features if name in b.features]
    return Comparison(
        a.url,
        b.url,
        tuple(_compare_feature(a, b, name, report) for name in both),
        tuple(name for name in b.features if name not in both),
        tuple(name for name in a.features if name not in both),
    )


def _compare_feature(a: Store, b: Store, name: str, report: Callable[[int], None]) -> FeatureComparison:
    left, right = _entries(a, name), _entries(b, name)
    at = pc.index_in(left["id"], right["id"].combine_chunks()).combine_chunks()
    paired = left.filter(at.is_valid())
    other = right.take(at.drop_null())
    same_status = pc.and_(
        pc.equal(paired["status"], other["status"]),
        pc.equal(pc.fill_null(paired["reason"], ""), pc.fill_null(other["reason"], "")),
    )
    ok = pc.and_(pc.equal(paired["status"], "ok"), pc.equal(other["status"], "ok"))
    equal = pc.and_(ok, pc.fill_null(pc.equal(paired["content"], other["content"]), False))
    unequal = paired["id"].filter(pc.and_(ok, pc.invert(equal))).to_pylist()
    shape, rows = _RowStatistics.over(a, b, name, unequal, report)
    spec = a.features[name]
    same_spec = spec.digest == b.features[name].digest
    return FeatureComparison(
        feature=name,
        embedding=spec.kind == "embedding",
        specification="" if same_spec else spec_difference(spec, b.features[name], ("in the first", "in the second")),
        only_a=len(left) - len(paired),
        only_b=len(right) - len(paired),
        status=len(paired) - _true(same_status),
        common=_true(ok),
        equal=_true(equal),
        shape=shape,
        rows=rows,
    )


def _entries(store: Store, feature: str) -> pa.Table:
    entries = store.entries
    return entries.filter(pc.equal(entries["feature"], feature)).combine_chunks()


def _true(values: Any) -> int:
    return int(pc.sum(values).as_py() or 0)


class _RowStatistics:
    """Adds up differences over videos, a block of them in memory at a time."""

    def __init__(self) -> None:
        self.shape = 0
        self._values = self._rows = 0
        self._abs = self._cosine = 0.0
        self._max, self._min = 0.0, 1.0
        self._worst = ""

    @classmethod
    def over(
        cls, a: Store, b: Store, feature: str, ids: list[str], report: Callable[[int], None]
    ) -> tuple[int, RowDifference | None]:
        """How many of ``ids`` have rows of other shapes, and how far apart the others' rows are."""
        statistics = cls()
        if a.features[feature].ragged or b.features[feature].ragged:
            return len(ids), None
        for start in range(0, len(ids), _READ_VIDEOS):
            some = ids[start : start + _READ_VIDEOS]
            for video, x, y in zip(some, a.read_all(feature, some), b.read_all(feature, some), strict=True):
                statistics.add(video, x, y)
            report(start + len(some))
        return statistics.shape, statistics.result()

    def add(self, video: str, x: npt.NDArray[Any], y: npt.NDArray[Any]) -> None:
        if x.shape != y.shape:
            self.shape += 1
            return
        with np.errstate(invalid="ignore"):
            difference = np.abs(x.astype(np.float64) - y.astype(np.float64))
        cosines = _cosines(x, y)
        self._values += difference.size
        self._rows += len(cosines)
        self._abs += float(difference.sum())
        self._cosine += float(cosines.sum())
        self._max = float(np.maximum(self._max, difference.max()))  # unlike max, it does not lose a NaN
        if cosines.size and float(cosines.min()) <= self._min:
            self._min, self._worst = float(cosines.min()), video

    def result(self) -> RowDifference | None:
        if not self._values:
            return None
        mean = self._cosine / self._rows if self._rows else 1.0
        return RowDifference(self._max, self._abs / self._values, self._min, mean, self._worst)


def _cosines(x: npt.NDArray[Any], y: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """The cosine of each pair of rows, (n, …) each.

    Rows that are zero in both are left out; one that is zero, or not finite, in one or both counts as 0.
    """
    flat = [rows.reshape(len(rows), -1).astype(np.float64) for rows in (x, y)]
    lengths = [np.linalg.norm(rows, axis=1) for rows in flat]
    with np.errstate(invalid="ignore"):
        product = lengths[0] * lengths[1]
        dots = (flat[0] * flat[1]).sum(1)
        cosines = np.divide(dots, product, out=np.zeros(len(product)), where=(product > 0) & np.isfinite(dots))
    kept: npt.NDArray[np.float64] = cosines[(lengths[0] != 0) | (lengths[1] != 0)]
    return kept


def first_difference(a: Store, b: Store) -> str | None:
    """What makes the content of two stores different, in words; None where it is the same.

    The same means: the same entries, failed for the same reasons; rows equal bit for bit, and embeddings to a cosine
    of at least 0.99999 a row.
    """
    return next(differences(compare(a, b)), None)


def differences(found: Comparison) -> Iterator[str]:
    """Every difference, in words, one line each."""
    for name in found.missing_a:
        yield f"{name} is only in {found.b}"
    for name in found.missing_b:
        yield f"{name} is only in {found.a}"
    for feature in found.features:
        for text in _differences(feature, found):
            yield f"{feature.feature}: {text}"


def _differences(feature: FeatureComparison, found: Comparison) -> Iterator[str]:
    if feature.specification:
        yield f"the specifications differ ({feature.specification})"
    if feature.only_a:
        yield f"entries only in {found.a}: {feature.only_a}"
    if feature.only_b:
        yield f"entries only in {found.b}: {feature.only_b}"
    if feature.status:
        yield f"entries that are ok in one and failed in the other, or failed for another reason: {feature.status}"
    if feature.shape:
        yield f"videos with rows of another number, shape or length: {feature.shape}"
    unequal = feature.common - feature.equal - feature.shape
    if feature.rows is not None and unequal and not feature.close:
        rows = feature.rows
        yield (
            f"videos with other values: {unequal} of {feature.common} (difference at most {rows.max_abs:.6g}, "
            f"{rows.mean_abs:.4g} in the mean; cosine at least {rows.min_cosine:.6f}, {rows.mean_cosine:.6f} in the "
            f"mean; the farthest is {rows.worst!r})"
        )
