"""The feature store, format 1: bytes in, bytes out. Knows neither torch nor av nor dask."""

from moclip.store.arrays import limit_threads
from moclip.store.describe import FeatureInfo, StoreInfo, describe, failed_entries
from moclip.store.reader import Store, open_store
from moclip.store.receipts import Entry, Receipt, fold, list_receipts, write_receipt
from moclip.store.schema import FORMAT, FeatureSpec, SourceFacts
from moclip.store.tables import add_feature, create_store, publish, write_labels
from moclip.store.writer import ShardWriter

__all__ = [
    "FORMAT",
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
    "failed_entries",
    "fold",
    "limit_threads",
    "list_receipts",
    "open_store",
    "publish",
    "write_labels",
    "write_receipt",
]
