"""The two containers that hold a store's rows, behind one interface (:mod:`moclip.store.containers.rows`)."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moclip.store.containers.hdf5 import Hdf5Reader, Hdf5Shard
from moclip.store.containers.rows import RowReader, ShardFiles
from moclip.store.containers.zarr_arrays import ZarrReader, ZarrShard
from moclip.store.files import Folder


@dataclass(frozen=True)
class Container:
    """How a store's rows are written and read.

    ``shard`` takes a local folder, the shard's name below it, and what the shard holds, as JSON.
    """

    shard: Callable[[Path, str, str], ShardFiles]
    reader: Callable[[Folder], RowReader]


CONTAINERS = {"zarr": Container(ZarrShard, ZarrReader), "hdf5": Container(Hdf5Shard, Hdf5Reader)}
