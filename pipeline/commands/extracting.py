"""Commands that add to a store: extract, embed, label."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moclip.pipeline.commands.console import EXISTING, STORE, count, progress, say, shown, status, together

if TYPE_CHECKING:
    from moclip.pipeline.extract.jobs import Prepared
    from moclip.pipeline.extract.reembed import PreparedEmbed
    from moclip.pipeline.extract.summary import Summary
    from moclip.pipeline.extract.tasks import Progress


_WORKERS = together(
    click.option("--workers", type=int, help="Worker processes on this machine.  [default: one a core]"),
    click.option(
        "--scheduler",
        metavar="ADDRESS",
        help="A running Dask scheduler, tcp://host:port, instead of own workers.",
    ),
    click.option(
        "--cluster",
        type=EXISTING,
        metavar="FILE",
        help="A TOML file that names a Dask cluster to start, for example on Slurm (docs/clusters.md).",
    ),
    click.option("--retry-failed", is_flag=True, help="Try videos again whose entry failed."),
)


def _check_workers(options: Mapping[str, Any]) -> None:
    if sum(options[name] is not None for name in ("workers", "scheduler", "cluster")) > 1:
        raise click.UsageError(
            "--workers starts processes here, --scheduler uses those elsewhere, --cluster starts them there: give one."
        )


@click.command()
@click.argument("source", type=EXISTING)
@click.argument("store", type=STORE)
@click.option("--preset", type=click.Choice(["moclip-lite"]), help="The paper's protocol: mpeg4 motion, accumulated.")
@click.option(
    "--motion",
    type=click.Choice(["auto", "native", "mpeg4", "estimate", "none"]),
    help="Where vectors come from: the stream itself (native), an estimate from the pictures, the one or the other as "
    "the codec has it (auto), or CoViAR's re-encode to 340x256 (mpeg4).  [default: auto]",
)
@click.option("--cell", type=int, metavar="PX", help="Side of a motion cell in pixels.  [default: 8]")
@click.option(
    "--feature",
    "features",
    multiple=True,
    type=click.Choice(["motion", "motion-accumulated", "embedding", "image"]),
    help="What to extract; repeat for several.  [default: all but image]",
)
@click.option("--as", "rename", metavar="NAME", help="Another name for the one feature that is extracted.")
@click.option(
    "--frames",
    metavar="POLICY",
    help="Frames for encoder and image: middle, uniform:8, random:1, fps:1.  [default: middle]",
)
@click.option(
    "--encoder",
    metavar="NAME",
    help="open_clip:<model>/<weights>, timm:<model> or none.  [default: open_clip:ViT-B-32-quickgelu/openai]",
)
@click.option("--weights", type=EXISTING, help="A file with the encoder's weights, instead of a download.")
@click.option("--splits", type=EXISTING, help="A folder with classInd.txt, trainlist0N.txt and testlist0N.txt.")
@_WORKERS
@click.option("--replace-changed", is_flag=True, help="Extract videos again whose file has another size now.")
@click.option(
    "--max-failures", type=int, metavar="N", help="Exit with code 1 if more than N videos have a failed entry."
)
@click.option(
    "--format",
    "container",
    type=click.Choice(["zarr", "hdf5"]),
    help="What a new store keeps its rows in: sharded Zarr arrays, or an .h5 file a shard.  [default: zarr]",
)
@click.option(
    "--timeout-per-video",
    type=click.FloatRange(min=0, min_open=True),
    default=6 * 3600.0,
    metavar="SECONDS",
    help="A video that takes longer is a failed entry.  [default: 21600, six hours]",
)
@click.option("--stride", type=int, metavar="N", help="Keep the motion of every N-th frame.  [default: 1]")
@click.option(
    "--clip-seconds",
    type=float,
    metavar="S",
    help="Cut videos into clips of S seconds, each a video of its own: film#00000, film#00001, …",
)
@click.option(
    "--exact", is_flag=True, help="Decode all of every frame, also what nobody looks at; the values are the same."
)
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
def extract(source: Path, store: str, **options: Any) -> None:
    """Decode videos once, into a feature store.

    Only what is missing is done.

    STORE is a folder, or an address in a bucket (s3://bucket/name, gs://bucket/name).

    SOURCE is a folder (class folders give labels), a .txt list of paths, or a .csv or .parquet table with a
    column path and, if you like, id, label, group, split_NAME (train, val or test) and more.

    A video that cannot be used becomes a failed entry with a reason; it stops nothing.

    \b
    Example:
      moclip extract UCF-101/ ucf101.zarr --preset moclip-lite --splits ucfTrainTestlist/
      moclip extract videos/ s3://bucket/corpus.zarr
      moclip extract videos.csv corpus.zarr --encoder timm:tf_efficientnet_lite0 --weights lite0.pth
    """
    from moclip.pipeline.extract import jobs

    _check_workers(options)
    job = jobs.Job(
        source=source,
        store=store,
        request=_request(**options),
        **{
            name: options[name]
            for name in (
                "splits",
                "workers",
                "scheduler",
                "cluster",
                "retry_failed",
                "replace_changed",
                "max_failures",
                "container",
                "timeout_per_video",
            )
        },
    )
    with status() as say_now:
        prepared = jobs.prepare(job, say_now)
    _print_plan(prepared)
    if options["dry_run"]:
        return
    if prepared.plan.tasks:
        with _bar("extract", prepared.plan.videos) as advance:
            summary = jobs.run(prepared, advance)
    else:
        summary = jobs.run(prepared)
    _print_summary(summary, store, "decoded")


_REQUEST = ("motion", "cell", "frames", "rename", "stride", "clip_seconds", "exact")


def _request(**options: Any) -> Any:
    """The preset's request, or the default one, with what the command line says instead."""
    from dataclasses import replace

    from moclip.pipeline.backbones import EncoderConfig
    from moclip.pipeline.extract.features import PRESETS, FeatureRequest

    base = PRESETS[options["preset"]] if options["preset"] else FeatureRequest()
    given = {name: options[name] for name in _REQUEST if options[name] is not None}
    if options["features"]:
        given["kinds"] = options["features"]
    encoder, weights = options["encoder"], options["weights"]
    if encoder == "none" or (encoder is None and options["features"] and "embedding" not in options["features"]):
        given["encoder"] = None
    elif encoder or weights:
        name = encoder or base.encoder.name if base.encoder else encoder
        given["encoder"] = EncoderConfig(name, None if weights is None else str(weights.absolute()))
    return replace(base, **given)


def _print_plan(prepared: "Prepared") -> None:
    plan, sources = prepared.plan, prepared.sources
    names = ", ".join(prepared.config.features)
    click.echo(f"{len(sources.videos)} videos in {prepared.job.source}; features: {names}")
    if sources.skipped:
        click.echo(f"  {len(sources.skipped)} other files are no videos by their names ({shown(sources.skipped)})")
    if prepared.unmatched:
        click.echo(f"  {prepared.unmatched} videos of the split lists are not in the source")
    if plan.done:
        click.echo(f"  {plan.done} have everything already")
    _print_failed_before(prepared)
    if plan.changed:
        click.echo(
            f"  {len(plan.changed)} have another size now and are left alone ({shown(plan.changed)}); "
            "--replace-changed extracts them again, if all features that they have are asked for"
        )
    _print_work(prepared)


def _print_failed_before(prepared: "Prepared | PreparedEmbed") -> None:
    failed = prepared.plan.failed_before
    if failed and not prepared.job.retry_failed:
        click.echo(f"  {len(failed)} failed before ({shown(failed)}); --retry-failed tries again")


def _print_work(prepared: "Prepared | PreparedEmbed") -> None:
    plan, cluster = prepared.plan, prepared.cluster
    if not plan.tasks:
        click.echo("  nothing to do")
        return
    click.echo(f"  to do: {plan.videos} videos in {len(plan.tasks)} shards on {cluster.words}")


@contextmanager
def _bar(what: str, videos: int) -> Iterator[Callable[["Progress"], None]]:
    said = "{done}/{total} videos · {rates} · failed {failed}"
    with progress(what, videos, said) as advance:
        start = time.monotonic()

        def update(now: "Progress") -> None:
            seconds = max(time.monotonic() - start, 0.1)
            rates = f"{now.videos / seconds:.1f} videos/s · {now.frames / seconds:.0f} frames/s"
            advance(now.videos, rates=rates, failed=now.failed)

        yield update


def _print_summary(summary: "Summary", store: str, done: str) -> None:
    click.echo(f"{count(summary.videos, 'video')}, {count(summary.frames, 'frame')} {done}; now in {store}:")
    width = max(len(name) for name in summary.ok_by_feature)
    click.echo(f"  {'feature':{width}}      ok  failed")
    for name, ok in summary.ok_by_feature.items():
        failed = {reason: count for (feature, reason), count in summary.failures.items() if feature == name}
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(failed.items()))
        click.echo(f"  {name:{width}}  {ok:6d}  {sum(failed.values()):6d}  {reasons}".rstrip())


@click.command()
@click.argument("store", type=STORE)
@click.option("--encoder", required=True, metavar="NAME", help="open_clip:<model>/<weights> or timm:<model>.")
@click.option("--weights", type=EXISTING, help="A file with the encoder's weights, instead of a download.")
@click.option(
    "--feature", "images", default="image", show_default=True, help="The stored images, where the store has several."
)
@click.option("--as", "rename", metavar="NAME", help="Another name for the new embedding.")
@_WORKERS
@click.option("--device", default="auto", help="cpu, cuda or auto.", show_default=True)
def embed(store: str, encoder: str, weights: Path | None, **options: Any) -> None:
    """Make a new embedding of stored images; no video is opened.

    The store needs the feature image, which `moclip extract SOURCE STORE --feature image` adds. Only what is missing
    is done.

    \b
    Example:
      moclip embed corpus.zarr --encoder timm:tf_efficientnet_lite0 --weights lite0.pth
    """
    from moclip.pipeline.backbones import EncoderConfig
    from moclip.pipeline.extract import reembed

    _check_workers(options)
    config = EncoderConfig(encoder, None if weights is None else str(weights.absolute()))
    prepared = reembed.prepare(reembed.EmbedJob(store, config, **options))
    _print_embed_plan(prepared)
    if prepared.plan.tasks:
        with _bar("embed", prepared.plan.videos) as advance:
            summary = reembed.run(prepared, advance)
    else:
        summary = reembed.run(prepared)
    _print_summary(summary, store, "embedded")


def _print_embed_plan(prepared: "PreparedEmbed") -> None:
    plan = prepared.plan
    say(f"{prepared.feature} from {prepared.images} of {prepared.job.store}")
    if plan.done:
        click.echo(f"  {len(plan.done)} videos have it already")
    _print_failed_before(prepared)
    if plan.without_images:
        click.echo(f"  {len(plan.without_images)} have no stored images ({shown(plan.without_images)})")
    _print_work(prepared)


@click.command()
@click.argument("store", type=STORE)
@click.option("--splits", type=EXISTING, help="A folder with classInd.txt, trainlist0N.txt and testlist0N.txt.")
@click.option("--csv", "table", type=EXISTING, help="A .csv or .parquet file: id, and label, group or split_NAME.")
def label(store: str, splits: Path | None, table: Path | None) -> None:
    """Change labels, groups and splits without extraction.

    A label or group is replaced where one is given. A split is replaced as a whole: a video that it does not
    list leaves it.

    \b
    Example:
      moclip label ucf101.zarr --splits ucfTrainTestlist/
    """
    from moclip.pipeline.extract.labelling import label_store

    if (splits is None) == (table is None):
        raise click.UsageError("Give --splits DIR or --csv FILE.")
    found = label_store(store, splits=splits, csv=table)
    click.echo(f"{len(found.table)} videos, {len(found.classes)} classes")
    if found.absent:
        click.echo(f"  listed, but not in the store: {len(found.absent)} ({shown(found.absent)})")
    if found.unlisted:
        click.echo(
            f"  in the store, but not listed: {len(found.unlisted)} ({shown(found.unlisted)}); "
            "they are in no part of the listed splits now"
        )
