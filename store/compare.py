"""Whether two stores hold the same content, whatever shards it lies in."""

import numpy as np

from moclip.store.reader import Store

#: Embeddings of one frame differ in their last bits with the batch they were computed in.
COSINE = 0.99999


def first_difference(a: Store, b: Store) -> str | None:
    """What makes the content of two stores different, in words; None where it is the same.

    The same means: the same entries, failed for the same reasons; rows equal bit for bit, and embeddings to a cosine
    of at least 0.99999 a row. Rows that are equal are not read: entries carry a hash of them.
    """
    left, right = _entries(a), _entries(b)
    for key in sorted(left.keys() ^ right.keys()):
        return f"{key[1]} of {key[0]!r} is only in {a.path if key in left else b.path}"
    for (video, feature), (status, reason, content) in left.items():
        other = right[video, feature]
        if (status, reason) != other[:2]:
            return f"{feature} of {video!r} is {reason or status} in {a.path}, {other[1] or other[0]} in {b.path}"
        if content != other[2] and not (a.features[feature].kind == "embedding" and _close(a, b, feature, video)):
            return f"{feature} of {video!r} has other rows in {a.path} than in {b.path}"
    return None


def _entries(store: Store) -> dict[tuple[str, str], tuple[str, str | None, str | None]]:
    columns = (store.entries[name].to_pylist() for name in ("id", "feature", "status", "reason", "content"))
    return {(video, feature): tuple(rest) for video, feature, *rest in zip(*columns, strict=True)}


def _close(a: Store, b: Store, feature: str, video: str) -> bool:
    x, y = (store.read(feature, video).astype(np.float64) for store in (a, b))
    if x.shape != y.shape:
        return False
    lengths = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    return bool(((x * y).sum(1) >= COSINE * lengths).all())
