"""Commands that copy stores and shrink them: export, merge, remove."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moclip.pipeline.commands.console import EXISTING, STORE, count, progress, shown

if TYPE_CHECKING:
    from moclip.store import Copied, Removal


@click.command()
@click.argument("store", type=STORE)
@click.argument("out", type=STORE)
@click.option("--feature", "features", multiple=True, metavar="F", help="Only this feature; repeat for several.")
@click.option("--split", metavar="NAME", help="Only videos of this split.")
@click.option(
    "--part",
    "parts",
    multiple=True,
    type=click.Choice(["train", "val", "test"]),
    help="Only this part of the split; repeat for several.  [default: all of them]",
)
@click.option("--label", "labels", multiple=True, metavar="L", help="Only videos of this class; repeat for several.")
@click.option("--ids", type=EXISTING, help="A text file with the ids of the videos, one a line.")
@click.option(
    "--format",
    "container",
    type=click.Choice(["zarr", "hdf5"]),
    help="How the new store keeps its rows.  [default: as STORE does]",
)
def export(store: str, out: str, features: tuple[str, ...], ids: Path | None, **options: Any) -> None:
    """Copy a part of a store into a store of its own, or into one HDF5 file.

    What is given narrows down: --feature, --split, --label and --ids together mean the videos that fit all of them.
    Labels, splits, what is known of the videos' files and failed entries come too. Every video's rows are checked.

    OUT is a folder or an address (s3://bucket/name). If it ends in .h5, it is one file on this disk that h5py alone
    reads; its attribute read_me says how. The same command goes on where it was interrupted.

    \b
    Example:
      moclip export corpus.zarr part.zarr --feature motion --split 1 --part train
      moclip export corpus.zarr s3://bucket/corpus.zarr
      moclip export corpus.zarr runners.h5 --label running --label walking
    """
    from moclip.store import Selection, describe, export_hdf5_file, export_store, open_store

    container = options.pop("container")
    single = out.endswith(".h5")
    if options["parts"] and options["split"] is None:
        raise click.UsageError("--part is a part of a split: give --split NAME too.")
    if single and container == "zarr":
        raise click.UsageError("an OUT that ends in .h5 is one HDF5 file; leave --format away, or name a folder.")
    selection = Selection(features=features, ids=None if ids is None else _read_ids(ids), **options)
    _note_unpublished(describe(open_store(store)).unpublished, store)
    with progress("export", None, "{done}/{total} entries") as report:
        if single:
            copied = export_hdf5_file(store, out, selection, report)
        else:
            copied = export_store(store, out, selection, container, report)
    click.echo(_summary(copied, out))


@click.command()
@click.argument("stores", nargs=-1, required=True, metavar="STORE STORE...")
@click.argument("out", type=STORE)
@click.option(
    "--format",
    "container",
    type=click.Choice(["zarr", "hdf5"]),
    help="How the new store keeps its rows.  [default: as the first one does]",
)
def merge(stores: tuple[str, ...], out: str, container: str | None) -> None:
    """Copy what several stores hold into one new store.

    An ok entry beats a failed one. Where the stores contradict each other (one feature name with two specifications,
    one id with two files, other rows of the same file, other labels) nothing is made, and a line says what differs.
    The same command goes on where it was interrupted.

    \b
    Example:
      moclip merge monday.zarr tuesday.zarr s3://bucket/wednesday.zarr week.zarr
    """
    from moclip.store import describe, merge_stores, open_store

    if len(stores) < 2:
        raise click.UsageError("name two stores or more, and then the new one.")
    for store in stores:
        _note_unpublished(describe(open_store(store)).unpublished, store)
    with progress("merge", None, "{done}/{total} entries") as report:
        copied = merge_stores(stores, out, container, report)
    click.echo(_summary(copied, out))


@click.command()
@click.argument("store", type=STORE)
@click.option(
    "--ids",
    required=True,
    type=EXISTING,
    help="A text file with the ids of the videos, one a line.",
)
@click.option("--yes", is_flag=True, help="Do not ask.")
def remove(store: str, ids: Path, yes: bool) -> None:
    """Take videos out of a store for good: rows, facts, labels, and what killed runs left of them.

    The shards that hold them are written anew without them; all other videos stay as they are, and can be read all
    the time. Let no extraction, export or merge write into STORE meanwhile: unfinished files are deleted too.
    The same command completes what was interrupted.

    \b
    Example:
      moclip remove corpus.zarr --ids takedown.txt
    """
    from moclip.store import plan_removal, remove_videos

    asked = _read_ids(ids)
    plan = plan_removal(store, asked)
    _print_plan(plan)
    if not yes:
        click.confirm("This cannot be undone. Remove them?", abort=True, err=True)
    with progress("remove", None, "{done}/{total} shards") as report:
        done = remove_videos(store, asked, report)
    click.echo(
        f"{count(len(done.ids), 'video')} removed, {count(len(done.receipts), 'shard')} written anew: {done.url}"
    )


def _print_plan(plan: "Removal") -> None:
    click.echo(f"to remove from {plan.url}: {count(len(plan.ids), 'video')} ({shown(plan.ids)})")
    click.echo(
        f"  {count(plan.entries, 'entry')} in {count(len(plan.receipts), 'shard')}, to be written anew without them"
    )
    if plan.unfinished:
        click.echo(
            f"  {count(len(plan.unfinished), 'file')} of unfinished runs, to be deleted: let none be running now"
        )
    if plan.absent:
        click.echo(f"  not in the store: {len(plan.absent)} ({shown(plan.absent)})")


def _summary(copied: "Copied", out: str) -> str:
    before = f", {copied.kept} were there before" if copied.kept else ""
    failed = f", {copied.failed} of them failed ones" if copied.failed else ""
    entries = copied.entries + copied.kept
    what = f"{count(copied.videos, 'video')}, {', '.join(copied.features)}"
    return f"{what}: {count(entries, 'entry')}{failed}{before}; now in {out}"


def _note_unpublished(unpublished: int, store: str) -> None:
    if unpublished:
        click.echo(
            f"{store}: {count(unpublished, 'finished shard')} not in the tables and left out; "
            "the next `moclip extract` adds them",
            err=True,
        )


def _read_ids(path: Path) -> tuple[str, ...]:
    """The lines of a text file; empty ones do not count."""
    return tuple(line for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
