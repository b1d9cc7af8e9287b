"""The feature store, format 1: bytes in, bytes out. Knows neither torch nor av nor dask."""

from moclip.store.checks.compare import Comparison, FeatureComparison, compare, differences, first_difference
from moclip.store.checks.repair import Repaired, repair
from moclip.store.checks.verify import Problem, Verified, verify
from moclip.store.containers.zarr_arrays import limit_threads
from moclip.store.copies.filling import Copied
from moclip.store.copies.removal import Removal, plan_removal, remove_videos
from moclip.store.copies.selection import Selection
from moclip.store.copies.sharing import export_store, merge_stores
from moclip.store.copies.single_file import export_hdf5_file
from moclip.store.describe import FeatureInfo, StoreInfo, describe, failed_entries
from moclip.store.files import Folder, exclusive, open_folder, write_atomic
from moclip.store.fold import Fold, FoldReport
from moclip.store.parquet import parquet_bytes
from moclip.store.reader import Store, open_store
from moclip.store.receipts import Entry, Receipt, list_receipts, write_receipt
from moclip.store.schema import EXTRACTED, FORMAT, SPLIT_PREFIX, FeatureSpec, SourceFacts
from moclip.store.tables import (
    add_feature,
    check_place,
    create_store,
    fold_store,
    is_added,
    is_store,
    publish,
    settled,
    write_labels,
)
from moclip.store.writer import ShardWriter, VideoRows

__all__ = [
    "EXTRACTED",
    "FORMAT",
    "SPLIT_PREFIX",
    "Comparison",
    "Copied",
    "Entry",
    "FeatureComparison",
    "FeatureInfo",
    "FeatureSpec",
    "Fold",
    "FoldReport",
    "Folder",
    "Problem",
    "Receipt",
    "Removal",
    "Repaired",
    "Selection",
    "ShardWriter",
    "SourceFacts",
    "Store",
    "StoreInfo",
    "Verified",
    "VideoRows",
    "add_feature",
    "check_place",
    "compare",
    "create_store",
    "describe",
    "differences",
    "exclusive",
    "export_hdf5_file",
    "export_store",
    "failed_entries",
    "first_difference",
    "fold_store",
    "is_added",
    "is_store",
    "limit_threads",
    "list_receipts",
    "merge_stores",
    "open_folder",
    "open_store",
    "parquet_bytes",
    "plan_removal",
    "publish",
    "remove_videos",
    "repair",
    "settled",
    "verify",
    "write_atomic",
    "write_labels",
    "write_receipt",
]
