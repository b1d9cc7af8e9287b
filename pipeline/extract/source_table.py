"""Tables that name videos, CSV or Parquet: their columns, with the types that moclip expects."""

import csv
import os
from collections import Counter
from collections.abc import Callable, Mapping

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pa_parquet

from moclip.errors import SourceError
from moclip.store import SPLIT_PREFIX

_PLAIN_TYPES = (
    pa.types.is_boolean,
    pa.types.is_floating,
    pa.types.is_string,
    pa.types.is_date,
    pa.types.is_timestamp,
    pa.types.is_null,
)
SPLIT_VALUES = ("train", "val", "test")
KNOWN_COLUMNS = ("path", "id", "label", "group")


def readable(text: str) -> str:
    """Valid UTF-8 for any file name: bytes that are not UTF-8 are written as ``\\xff``."""
    if text.isascii():
        return text
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def check_split_value(value: str, where: str) -> None:
    """SourceError unless the value is train, val or test."""
    if value not in SPLIT_VALUES:
        raise SourceError(f"{where}: found {value!r}; expected train, val, test or nothing")


def is_split_column(name: str) -> bool:
    return name.startswith(SPLIT_PREFIX) and name != SPLIT_PREFIX


def read_table(path: str) -> pa.Table:
    """A CSV or Parquet table. The columns that moclip knows become text: "001" stays "001".

    ``path`` may be binary, because a file's name may be. SourceError if the file cannot be read.
    """
    try:
        table = TABLE_READERS[os.path.splitext(path)[1].lower()](path)
        for index, name in enumerate(table.column_names):
            if name in ("id", "label", "group") or is_split_column(name):
                table = table.set_column(index, name, table.column(index).cast(pa.string()))
        table.validate(full=True)
    except (pa.ArrowException, OSError, UnicodeError, StopIteration, csv.Error) as error:
        reason = (str(error) or "it is empty").splitlines()[0]
        raise SourceError(f"cannot read the table {readable(path)!r}: {reason}; expected CSV or Parquet") from error
    repeated = [name for name, count in Counter(table.column_names).items() if count > 1]
    if repeated:
        raise SourceError(f"{readable(path)!r} has several columns {repeated[0]!r}; rename or remove all but one")
    return table


def _read_csv(path: str) -> pa.Table:
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
        header = next(row for row in csv.reader(file) if row)
    types = {name: pa.string() for name in header if name in KNOWN_COLUMNS or is_split_column(name)}
    types["path"] = pa.binary()
    return pa_csv.read_csv(
        path,
        parse_options=pa_csv.ParseOptions(newlines_in_values=True),
        convert_options=pa_csv.ConvertOptions(column_types=types),
    )


TABLE_READERS: Mapping[str, Callable[[str], pa.Table]] = {
    ".csv": _read_csv,
    ".parquet": lambda path: pa_parquet.ParquetFile(path).read(),
}


def text_column(column: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """A column of text whose empty cells are null."""
    return pc.if_else(pc.equal(column, ""), pa.scalar(None, pa.string()), column)


def split_column(table: pa.Table, name: str, where: str) -> pa.ChunkedArray:
    """A split's column, null where a video is in none of its parts. SourceError for any other value."""
    values = text_column(table[name])
    for value in values.drop_null().unique().to_pylist():
        check_split_value(value, f"{where}, row {pc.index(values, value).as_py() + 1}, column {name!r}")
    return values


def plain_column(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A further column. What is neither number, text, time nor a list of those becomes text."""
    if _is_plain(column.type):
        return column
    cells = (None if cell is None else readable(str(cell)) for cell in column.to_pylist())
    return pa.chunked_array([pa.array(cells, pa.string())])


def _is_plain(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind):
        return _is_plain(kind.value_type)
    return any(fits(kind) for fits in _PLAIN_TYPES) or (pa.types.is_integer(kind) and kind != pa.uint64())
