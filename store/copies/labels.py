"""Labels of several stores as one: nothing is chosen silently."""

from collections.abc import Iterable, Sequence

import pyarrow as pa

from moclip.errors import SourceError
from moclip.store.schema import LABEL_FIELDS


def union_labels(tables: Sequence[tuple[str, pa.Table]]) -> pa.Table:
    """One table of labels out of several (where from, table), sorted by id; an empty cell takes what another says.

    :class:`SourceError` names a video of which two tables say different things.
    """
    known: dict[str, dict[str, str]] = {}
    said_by: dict[str, str] = {}
    columns = dict.fromkeys([field.name for field in LABEL_FIELDS])
    for where, table in tables:
        columns.update(dict.fromkeys(table.column_names))
        for row in table.to_pylist():
            said = {name: value for name, value in row.items() if value is not None}
            _check_same(known.get(row["id"], {}), said, said_by.get(row["id"], where), where)
            known.setdefault(row["id"], {}).update(said)
            said_by.setdefault(row["id"], where)
    rows = [known[video] for video in sorted(known)]
    fixed = {field.name: field for field in LABEL_FIELDS}
    schema = pa.schema([fixed.get(name, pa.field(name, pa.string())) for name in columns])
    return pa.Table.from_pylist(rows, schema)


def _check_same(known: dict[str, str], said: dict[str, str], first: str, second: str) -> None:
    for name in sorted(known.keys() & said.keys()):
        if known[name] != said[name]:
            raise SourceError(
                f"the {name} of {said['id']!r} is {known[name]!r} in {first}, {said[name]!r} in {second}; "
                "make them agree with `moclip label` first"
            )


def union_classes(orders: Iterable[Sequence[str]]) -> list[str]:
    """The classes of all, in the first one's order; new ones follow in theirs."""
    return list(dict.fromkeys(name for order in orders for name in order))
