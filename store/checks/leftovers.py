"""Files of a store that nothing names: what a killed task left, and what is not moclip's."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal

from moclip.store.receipts import ReadReceipt

#: What a file is called until it is finished.
_UNFINISHED = re.compile(r"\..*\.tmp")

Leftover = tuple[str, Literal["orphan", "extra"], str]


def leftovers(
    sizes: Mapping[str, int], known: set[str], receipts: Iterable[ReadReceipt], names: Iterable[str]
) -> Iterator[Leftover]:
    """What of the files ``sizes`` is neither ``known`` nor named by a receipt: (path, what it is, in words).

    ``names`` are all receipts, those that cannot be read too: what lies in their shards is not given.
    """
    shards = {shard_of(name) for name in names}
    unread = shards - {f"features/{receipt.feature}/{receipt.shard}" for receipt in receipts}
    named = {*known, *names, *(name for receipt in receipts for name in receipt.files)}
    orphans: dict[str, list[int]] = {}
    for name in sorted(sizes.keys() - named):
        place, shard = _place(name)
        if shard in unread:
            continue
        if place is None or shard in shards:
            yield name, "extra", "nothing of moclip's wrote it, and nothing reads it"
        else:
            orphans.setdefault(place, []).append(sizes[name])
    for place, held in orphans.items():
        yield place, "orphan", f"{len(held)} files, {sum(held)} bytes, of a task that was stopped or is running"


def shard_of(receipt: str) -> str:
    """The shard of a receipt: both by their places in the store."""
    return receipt.removesuffix(".parquet").replace("receipts/", "features/", 1)


def _place(name: str) -> tuple[str | None, str | None]:
    """Where a stopped task's file lies (its shard's folder or file, or itself), and its shard, if it is of one."""
    parts = name.split("/")
    if _UNFINISHED.fullmatch(parts[-1]):
        return name, None
    if parts[0] == "features" and len(parts) > 3:
        return "/".join(parts[:3]), "/".join(parts[:3])
    if parts[0] == "features" and len(parts) == 3 and name.endswith(".h5"):
        return name, name.removesuffix(".h5")
    return None, None
