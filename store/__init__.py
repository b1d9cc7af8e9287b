"""The feature store, format 1: bytes in, bytes out. Knows neither torch nor av nor dask."""

from moclip.store.arrays import limit_threads
from moclip.store.compare import first_difference
from moclip.store.describe import FeatureInfo, StoreInfo, describe, failed_entries
from moclip.store.files import exclusive, write_atomic
from moclip.store.fold import fold
from moclip.store.reader import Store, open_store
from moclip.store.receipts import Entry, Receipt, list_receipts, parquet_bytes, write_receipt
from moclip.store.schema import FORMAT, SPLIT_PREFIX, FeatureSpec, SourceFacts
from moclip.store.tables import add_feature, create_store, is_added, is_foreign, publish, write_labels
from moclip.store.writer import ShardWriter

__all__ = [
    "FORMAT",
    "SPLIT_PREFIX",
    "Entry",
    "FeatureInfo",
    "FeatureSpec",
    "Receipt",
    "ShardWriter",
    "SourceFacts",
    "Store",
    "StoreInfo",
    "add_feature",
    "create_store",
    "describe",
    "exclusive",
    "failed_entries",
    "first_difference",
    "fold",
    "is_added",
    "is_foreign",
    "limit_threads",
    "list_receipts",
    "open_store",
    "parquet_bytes",
    "publish",
    "write_atomic",
    "write_labels",
    "write_receipt",
]
