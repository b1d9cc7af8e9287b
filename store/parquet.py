"""Parquet files that notice a flipped bit: a checksum of the whole file in its own footer.

The footer's key ``moclip.sha256`` holds the SHA-256, in hex, of the file with these 64 digits replaced by zeros.
Every reader of Parquet reads such a file; moclip also checks it.
"""

import hashlib
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from moclip.errors import StoreFormatError

_KEY = "moclip.sha256"
_BLANK = b"0" * 64
#: Every row has an id of its own, which cannot be compressed away; a header that claims more is not believed.
_MOST_ROWS_A_BYTE = 32


def parquet_bytes(table: pa.Table) -> bytes:
    """A table as the bytes of a Parquet file with its checksum."""
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, table.schema, compression="zstd") as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({_KEY: _BLANK.decode()})
    data = bytes(sink.getvalue())
    at = _place(data)
    assert data[at : at + 64] == _BLANK
    return data[:at] + hashlib.sha256(data).hexdigest().encode() + data[at + 64 :]


def read_parquet(
    data: bytes, columns: Sequence[str] | None = None, *, dictionaries: Sequence[str] = ()
) -> tuple[pa.Table, str]:
    """The table in a Parquet file's bytes, and the file's checksum. :class:`StoreFormatError` unless it is whole.

    ``columns`` are read as dictionaries where ``dictionaries`` names them: text that repeats takes little memory.
    """
    try:
        file = pq.ParquetFile(pa.BufferReader(data), read_dictionary=list(dictionaries) or None)
        stated = (file.metadata.metadata or {}).get(_KEY.encode(), b"")
        _check(data, stated)
        if file.metadata.num_rows > _MOST_ROWS_A_BYTE * len(data):
            raise StoreFormatError(f"{len(data)} bytes cannot hold its {file.metadata.num_rows} rows")
        table = file.read(columns if columns is None else list(columns))
        table.validate(full=True)  # text may be no text: Parquet files hold any bytes there
        return table, stated.decode()
    except (pa.ArrowException, OSError, UnicodeDecodeError, OverflowError, MemoryError) as error:
        raise StoreFormatError(f"it is not a whole Parquet file: {error}") from error


def _check(data: bytes, stated: bytes) -> None:
    if len(stated) != 64:
        raise StoreFormatError("it carries no checksum of moclip's")
    at = _place(data)
    if data[at : at + 64] != stated:
        raise StoreFormatError("its footer is not as moclip writes it")
    digest = hashlib.sha256(memoryview(data)[:at])
    digest.update(_BLANK)
    digest.update(memoryview(data)[at + 64 :])
    if digest.hexdigest().encode() != stated:
        raise StoreFormatError("its bytes are not those that were written: the checksum differs")


def _place(data: bytes) -> int:
    """Where the checksum's digits are: behind the key's last occurrence and two bytes of Thrift, type and length."""
    return data.rindex(_KEY.encode()) + len(_KEY) + 2
