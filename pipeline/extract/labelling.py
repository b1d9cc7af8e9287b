"""Labels, groups and splits of a store: set for new videos by an extraction, changed at will without one."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from moclip.errors import SourceError
from moclip.pipeline.extract.source_table import text_column
from moclip.pipeline.extract.sources import Sources, class_order
from moclip.pipeline.extract.splits import Labelling, label_from_table, merge_labels, read_labels_csv, read_splits
from moclip.store import Store, exclusive, open_store, write_labels


def label_store(store: str | Path, *, splits: Path | None = None, csv: Path | None = None) -> Labelling:
    """Change a store's labels from UCF101-style split lists or from a table; extracted features stay as they are."""
    with exclusive(open_store(store).url):
        return _label_store(open_store(store), splits, csv)


def _label_store(opened: Store, splits: Path | None, csv: Path | None) -> Labelling:
    table = _extended(opened.labels, opened.videos.select(["id"]))
    if splits is not None:
        at = pc.index_in(table["id"], value_set=opened.videos["id"].combine_chunks()).combine_chunks()
        paths = text_column(opened.videos["path"].combine_chunks().take(at))
        labelling = read_splits(splits).label(table, paths)
    elif csv is not None:
        labelling = label_from_table(table, read_labels_csv(csv), opened.classes)
    else:
        raise ValueError("label_store needs splits or csv")
    if len(labelling.unlisted) == len(table):
        raise SourceError(
            f"none of the {len(table)} videos of {opened.url} is listed, so nothing was changed; "
            f"their ids are like {table['id'][0].as_py()!r}"
            if len(table)
            else f"{opened.url} has no videos to label"
        )
    write_labels(opened.url, labelling.table, list(labelling.classes))
    return labelling


def label_new(store: str | Path, sources: Sources, classes: Sequence[str], explicit: bool) -> None:
    """Give the sources' labels to a store.

    What the store already says of a video stays, since `moclip label` may have said it; unless the labels were
    named ``explicit``-ly for this run.
    """
    with exclusive(open_store(store).url):
        _label_new(open_store(store), sources, classes, explicit)


def _label_new(opened: Store, sources: Sources, classes: Sequence[str], explicit: bool) -> None:
    there, new = opened.labels, sources.labels
    mine = pc.is_in(there["id"], value_set=new["id"].combine_chunks())
    others, known = there.filter(pc.invert(mine)), _extended(there.filter(mine), new.select(["id"]))
    merged = merge_labels(known, new) if explicit else _filled_from(known, new)
    table = pa.concat_tables([others, merged], promote_options="default").sort_by("id")
    order = [*opened.classes, *classes] if not explicit else [*classes, *opened.classes]
    labels = table["label"].unique().to_pylist()
    used = {*labels, *classes}
    first = [name for name in dict.fromkeys(order) if name in used]
    ordered = list(class_order(labels, first))
    if not (table.equals(there) and ordered == opened.classes):
        write_labels(opened.url, table, ordered)


def _filled_from(known: pa.Table, new: pa.Table) -> pa.Table:
    """``known`` with its empty cells filled from ``new``; both have the same ids, in order."""
    for name in new.column_names[1:]:
        if name in known.column_names:
            at = known.column_names.index(name)
            known = known.set_column(at, name, pc.coalesce(known[name], new[name]))
        else:
            known = known.append_column(name, new[name])
    return known


def _extended(labels: pa.Table, ids: pa.Table) -> pa.Table:
    """``labels`` with a row, empty so far, for each of ``ids`` that it lacks."""
    missing = ids.filter(pc.invert(pc.is_in(ids["id"], value_set=labels["id"].combine_chunks())))
    return pa.concat_tables([labels, missing], promote_options="default").sort_by("id")
