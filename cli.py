"""The command line: parse, call one function, print. Errors of the domain become one line and exit code 1."""

import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moclip import __version__
from moclip.errors import MoclipError

if TYPE_CHECKING:
    from moclip.pipeline.extract.jobs import Prepared, Summary
    from moclip.pipeline.learn.metrics import Metrics
    from moclip.pipeline.learn.runs import TrainResult
    from moclip.store import StoreInfo

INTERRUPTED = 130
_EXISTING = click.Path(path_type=Path)
_NEW = click.Path(path_type=Path)


class _Commands(click.Group):
    """Turns the errors that moclip raises on purpose into one line, and Ctrl-C into exit code 130."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except MoclipError as error:
            raise click.ClickException(_one_line(str(error))) from error
        except OSError as error:
            raise click.ClickException(f"the operating system says: {_one_line(str(error))}") from error
        except KeyboardInterrupt:
            click.echo("Interrupted. What was finished is kept; run the same command again to go on.", err=True)
            sys.exit(INTERRUPTED)


def _one_line(text: str) -> str:
    return " ".join(text.split())


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="moclip")
@click.option("-v", "--verbose", is_flag=True, help="Also print log messages.")
def main(verbose: bool) -> None:
    """Decode each compressed video once into a feature store; train from the store ever after.

    \b
    Example:
      moclip extract videos/ corpus.zarr --splits splits/
      moclip train tsn corpus.zarr --split 1 --out runs/tsn
      moclip train fusion corpus.zarr --split 1 --motion-run runs/tsn --out runs/fusion
      moclip evaluate runs/fusion corpus.zarr

    Exit codes: 0 done, 1 an error that one line explains, 2 a wrong command line, 130 interrupted.
    """
    logging.basicConfig(format="%(levelname)s: %(message)s")
    logging.getLogger("moclip").setLevel(logging.INFO if verbose else logging.WARNING)


@main.command()
@click.argument("source", type=_EXISTING)
@click.argument("store", type=_NEW)
@click.option("--preset", type=click.Choice(["moclip-lite"]), help="The paper's protocol: mpeg4 motion, accumulated.")
@click.option(
    "--motion",
    type=click.Choice(["native", "mpeg4", "none"]),
    help="Where vectors come from: the stream itself, or CoViAR's re-encode to 340x256.  [default: native]",
)
@click.option("--cell", type=int, metavar="PX", help="Side of a motion cell in pixels.  [default: 8]")
@click.option(
    "--feature",
    "features",
    multiple=True,
    type=click.Choice(["motion", "motion-accumulated", "embedding"]),
    help="What to extract; repeat for several.  [default: all three]",
)
@click.option("--as", "rename", metavar="NAME", help="Another name for the one feature that is extracted.")
@click.option(
    "--frames",
    metavar="POLICY",
    help="Frames for the encoder: middle, uniform:8, random:1, fps:1.  [default: middle]",
)
@click.option(
    "--encoder",
    metavar="NAME",
    help="open_clip:<model>/<weights>, timm:<model> or none.  [default: open_clip:ViT-B-32-quickgelu/openai]",
)
@click.option("--weights", type=_EXISTING, help="A file with the encoder's weights, instead of a download.")
@click.option("--splits", type=_EXISTING, help="A folder with classInd.txt, trainlist0N.txt and testlist0N.txt.")
@click.option("--workers", type=int, help="Worker processes on this machine.  [default: one a core]")
@click.option(
    "--scheduler",
    metavar="ADDRESS",
    help="A running Dask scheduler, tcp://host:port, instead of own workers.",
)
@click.option("--retry-failed", is_flag=True, help="Try videos again whose entry failed.")
@click.option("--replace-changed", is_flag=True, help="Extract videos again whose file has another size now.")
@click.option(
    "--max-failures", type=int, metavar="N", help="Exit with code 1 if more than N videos have a failed entry."
)
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
def extract(source: Path, store: Path, **options: Any) -> None:
    """Decode videos once, into a feature store.

    Only what is missing is done.

    SOURCE is a folder (class folders give labels), a .txt list of paths, or a .csv or .parquet table with a
    column path and, if you like, id, label, group, split_NAME (train, val or test) and more.

    A video that cannot be used becomes a failed entry with a reason; it stops nothing.

    \b
    Example:
      moclip extract UCF-101/ ucf101.zarr --preset moclip-lite --splits ucfTrainTestlist/
      moclip extract videos.csv corpus.zarr --encoder timm:tf_efficientnet_lite0 --weights lite0.pth
    """
    from moclip.pipeline.extract import jobs

    if options["workers"] and options["scheduler"]:
        raise click.UsageError("--workers starts processes here, --scheduler uses those elsewhere: give one.")
    job = jobs.Job(
        source=source,
        store=store,
        request=_request(**options),
        **{
            name: options[name]
            for name in ("splits", "workers", "scheduler", "retry_failed", "replace_changed", "max_failures")
        },
    )
    prepared = jobs.prepare(job)
    _print_plan(prepared)
    if options["dry_run"]:
        return
    if prepared.plan.tasks:
        with _extraction_bar(prepared.plan.videos) as advance:
            summary = jobs.run(prepared, advance)
    else:
        summary = jobs.run(prepared)
    _print_summary(summary, store)


def _request(**options: Any) -> Any:
    """The preset's request, or the default one, with what the command line says instead."""
    from dataclasses import replace

    from moclip.pipeline.backbones import EncoderConfig
    from moclip.pipeline.extract.features import PRESETS, FeatureRequest

    base = PRESETS[options["preset"]] if options["preset"] else FeatureRequest()
    given = {name: options[name] for name in ("motion", "cell", "frames", "rename") if options[name] is not None}
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
        click.echo(f"  {len(sources.skipped)} other files are no videos by their names ({_shown(sources.skipped)})")
    if prepared.unmatched:
        click.echo(f"  {prepared.unmatched} videos of the split lists are not in the source")
    if plan.done:
        click.echo(f"  {plan.done} have everything already")
    if plan.failed_before and not prepared.job.retry_failed:
        click.echo(
            f"  {len(plan.failed_before)} failed before ({_shown(plan.failed_before)}); --retry-failed tries again"
        )
    if plan.changed:
        click.echo(
            f"  {len(plan.changed)} have another size now and are left alone ({_shown(plan.changed)}); "
            "--replace-changed extracts them again, if all features that they have are asked for"
        )
    if not plan.tasks:
        click.echo("  nothing to do")
        return
    where = prepared.job.scheduler or f"{prepared.workers} workers"
    click.echo(f"  to do: {plan.videos} videos in {len(plan.tasks)} shards on {where}")


def _say(line: str) -> None:
    """Print a line with words from a store: a stranger's control characters do not reach the terminal."""
    click.echo("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line))


def _shown(names: Any, most: int = 3) -> str:
    """A few names on one line, quoted and escaped."""
    shown = ", ".join(repr(name) for name in names[:most])
    return shown + (", …" if len(names) > most else "")


@contextmanager
def _extraction_bar(videos: int) -> Iterator[Any]:
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("extract"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} videos · {task.fields[rates]} · failed {task.fields[failed]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=_console(), transient=True) as bar:
        line = bar.add_task("extract", total=videos, rates="starting", failed=0)

        def advance(now: Any) -> None:
            seconds = bar.tasks[line].elapsed or 1.0
            rates = f"{now.videos / seconds:.1f} videos/s · {now.frames / seconds:.0f} frames/s"
            bar.update(line, completed=now.videos, rates=rates, failed=now.failed)

        yield advance


def _console() -> Any:
    from rich.console import Console

    return Console(stderr=True)


def _print_summary(summary: "Summary", store: Path) -> None:
    click.echo(f"{summary.videos} videos, {summary.frames} frames decoded; now in {store}:")
    width = max(len(name) for name in summary.ok_by_feature)
    click.echo(f"  {'feature':{width}}      ok  failed")
    for name, ok in summary.ok_by_feature.items():
        failed = {reason: count for (feature, reason), count in summary.failures.items() if feature == name}
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(failed.items()))
        click.echo(f"  {name:{width}}  {ok:6d}  {sum(failed.values()):6d}  {reasons}".rstrip())


@main.command()
@click.argument("store", type=_EXISTING)
@click.option("--splits", type=_EXISTING, help="A folder with classInd.txt, trainlist0N.txt and testlist0N.txt.")
@click.option("--csv", "table", type=_EXISTING, help="A .csv or .parquet file: id, and label, group or split_NAME.")
def label(store: Path, splits: Path | None, table: Path | None) -> None:
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
        click.echo(f"  listed, but not in the store: {len(found.absent)} ({_shown(found.absent)})")
    if found.unlisted:
        click.echo(
            f"  in the store, but not listed: {len(found.unlisted)} ({_shown(found.unlisted)}); "
            "they are in no part of the listed splits now"
        )


@main.command()
@click.argument("store", type=_EXISTING)
@click.option("--json", "as_json", is_flag=True, help="Everything, as JSON.")
def info(store: Path, as_json: bool) -> None:
    """Show what a store holds, and what failed.

    \b
    Example:
      moclip info corpus.zarr
    """
    from moclip.store import describe, failed_entries, open_store

    opened = open_store(store)
    found = describe(opened)
    if as_json:
        click.echo(json.dumps({**found.to_json(), "failed_entries": failed_entries(opened)}, indent=1))
        return
    _print_info(found)
    failed = failed_entries(opened)
    for row in failed[:20]:
        _say(f"  {_shown([row['id']])} {row['feature']}: {row['reason']}: {_one_line(row['detail'] or '')[:120]}")
    if len(failed) > 20:
        click.echo(f"  … {len(failed) - 20} more: moclip info --json")


def _print_info(found: "StoreInfo") -> None:
    size = found.video_bytes / 1e6
    _say(f"{found.path}: {found.videos} videos, {found.hours:.2f} hours, {found.frames} frames, {size:.1f} MB of video")
    if found.corrupt_frames:
        _say(f"  {found.corrupt_frames} frames are corrupt (concealed or refused by the decoder)")
    if found.unpublished:
        _say(f"  {found.unpublished} finished shards are not in the tables; the next `moclip extract` adds them")
    for feature in found.features:
        spec = feature.specification
        _say(f"{feature.name}  {spec.dtype}, {spec.unit}, digest {feature.digest}")
        per_row = feature.bytes / feature.rows if feature.rows else 0
        _say(f"  {feature.ok} videos, {feature.rows} rows, {feature.bytes / 1e6:.1f} MB, {per_row:.0f} bytes a row")
        parameters = {
            key: value for key, value in spec.parameters.items() if value is not None and not isinstance(value, dict)
        }
        _say("  " + ", ".join(f"{key} {value}" for key, value in parameters.items()))
        for reason, count in feature.failures.items():
            _say(f"  failed: {count} {reason}")
    if found.labels:
        _say(f"{len(found.labels)} classes, {sum(found.labels.values())} labelled videos")
    for name, parts in found.splits.items():
        _say(f"split {name}: " + ", ".join(f"{count} {part}" for part, count in parts.items()))


_Option = Callable[[Callable[..., None]], Callable[..., None]]


def _options(*options: _Option) -> _Option:
    """Several options as one decorator, in the order given."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_TRAINING = _options(
    click.option("--split", required=True, metavar="NAME", help="The split of the store to train and test on."),
    click.option("--out", required=True, type=_NEW, help="The run directory to make."),
    click.option("--epochs", type=int, help="Passes over the training part.  [default: tsn 30, else 100]"),
    click.option("--batch", type=int, help="Clips a step.  [default: tsn 24, else 64]"),
    click.option("--lr", type=float, help="Learning rate.  [default: tsn 0.01, else 0.0001]"),
    click.option("--segments", type=int, help="Segments a clip in training.  [default: 3]"),
    click.option(
        "--val-fraction",
        type=float,
        help="Part of train, in whole groups, that chooses the epoch; 0 takes the last.  [default: 0.15]",
    ),
    click.option("--seed", type=int, help="Fixes every random choice.  [default: 0]"),
    click.option("--device", help="cpu, cuda or auto.  [default: auto]"),
)


@main.group()
def train() -> None:
    """Train a model from a store alone; no video is opened.

    \b
    Example:
      moclip train tsn corpus.zarr --split 1 --out runs/tsn
    """


@train.command()
@click.argument("store", type=_EXISTING)
@_TRAINING
@click.option("--feature", help="motion-accumulated (default), motion, or another name.")
@click.option("--backbone", metavar="NAME", help="timm:<model>.  [default: timm:efficientnet_b0]")
@click.option("--weights", help="A file with the backbone's weights, instead of a download; none: from scratch.")
@click.option("--input-size", type=int, metavar="PX", help="Side of the network's input.  [default: 224]")
@click.option("--no-mirror", is_flag=True, help="For classes that left and right tell apart.")
def tsn(store: Path, out: Path, no_mirror: bool, **options: Any) -> None:
    """Train MV-TSN, a network on motion vectors. Its pooled features stay in the run, for fusion.

    \b
    Example:
      moclip train tsn ucf101.zarr --split 1 --out runs/tsn --epochs 200
    """
    from moclip.pipeline.learn.tsn import TSNConfig, train_tsn

    config = TSNConfig(**_given(options), mirror=not no_mirror)
    with _training_bar(config.epochs) as on_epoch:
        result = train_tsn(store, out, config, on_epoch=on_epoch)
    _print_result(result)


@train.command()
@click.argument("store", type=_EXISTING)
@_TRAINING
@click.option("--motion-run", required=True, type=_EXISTING, help="The run of `moclip train tsn`, of the same split.")
@click.option("--feature", help="The embedding, where the store has several.")
def fusion(store: Path, out: Path, motion_run: Path, **options: Any) -> None:
    """Train the late fusion of a frozen MV-TSN and the image embedding. Runs no CNN.

    \b
    Example:
      moclip train fusion ucf101.zarr --split 1 --motion-run runs/tsn --out runs/fusion
    """
    from moclip.pipeline.learn.fusion import FusionConfig, train_fusion

    config = FusionConfig(**_given(options), motion_run=str(motion_run))
    with _training_bar(config.epochs) as on_epoch:
        result = train_fusion(store, out, config, on_epoch=on_epoch)
    _print_result(result)


@train.command()
@click.argument("store", type=_EXISTING)
@_TRAINING
@click.option("--feature", help="The embedding, where the store has several.")
def probe(store: Path, out: Path, **options: Any) -> None:
    """Train the control: the fusion's classifier on the image embedding alone.

    \b
    Example:
      moclip train probe ucf101.zarr --split 1 --out runs/probe
    """
    from moclip.pipeline.learn.fusion import FusionConfig, train_probe

    config = FusionConfig(**_given(options))
    with _training_bar(config.epochs) as on_epoch:
        result = train_probe(store, out, config, on_epoch=on_epoch)
    _print_result(result)


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """What was said on the command line; the configuration knows the defaults."""
    return {name: value for name, value in options.items() if value is not None}


@contextmanager
def _training_bar(epochs: int) -> Iterator[Any]:
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("train"), BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=_console(), transient=True) as bar:
        line = bar.add_task("", total=epochs)

        def on_epoch(row: Any) -> None:
            said = f"epoch {row.epoch}/{epochs} · loss {row.train_loss:.3f}"
            if row.val_top1 is not None:
                said += f" · held out {100 * row.val_top1:.1f} %"
            bar.update(line, completed=row.epoch, description=said)

        yield on_epoch


def _print_result(result: "TrainResult") -> None:
    best = result.best
    chosen = "the last" if best.val_top1 is None else f"chosen on the held-out part, {100 * best.val_top1:.1f} % there"
    click.echo(f"{result.kind}: epoch {best.epoch} ({chosen}); {result.seconds:.1f} s")
    _print_metrics(result.test)
    click.echo(f"run: {result.run}")


def _print_metrics(metrics: "Metrics", per_class: bool = False) -> None:
    _say(
        f"split {metrics.split}, {metrics.clips} test clips, {metrics.protocol}: top-1 {100 * metrics.top1:.1f} %, "
        f"top-5 {100 * metrics.top5:.1f} %, mean over classes {100 * metrics.mean_class_accuracy:.1f} %"
    )
    for reason, count in metrics.missing.items():
        _say(f"  {count} labelled clips are not in these numbers: {reason}")
    if per_class:
        for name, found in metrics.per_class.items():
            shown = "no clips" if found.accuracy is None else f"{100 * found.accuracy:5.1f} %"
            _say(f"  {shown}  {found.n:4d}  {name}")


@main.command()
@click.argument("run", type=_EXISTING)
@click.argument("store", type=_EXISTING)
@click.option("--split", metavar="NAME", help="The split to test on.  [default: the run's]")
@click.option(
    "--protocol", metavar="SxC", help="For MV-TSN: segments x crops, such as 25x1, 25x10, 32x1.  [default: 25x1]"
)
@click.option("--device", default="auto", help="cpu, cuda or auto.", show_default=True)
def evaluate(run: Path, store: Path, **options: Any) -> None:
    """Test a run on a store. Classes are matched by name; results go into RUN/evaluations.

    \b
    Example:
      moclip evaluate runs/tsn ucf101.zarr --protocol 25x10
    """
    from moclip.pipeline.learn.evaluate import evaluate_run

    _print_metrics(evaluate_run(run, store, **options).metrics, per_class=True)


@main.command()
@click.argument("store", type=_EXISTING)
@click.option("--split", metavar="NAME", help="Only this split's test part.  [default: all labelled videos]")
@click.option("--feature", default="embedding", help="The embedding, where the store has several.", show_default=True)
@click.option("--weights", type=_EXISTING, help="A file with the encoder's weights, instead of a download.")
@click.option("--device", default="auto", help="cpu, cuda or auto.", show_default=True)
def zeroshot(store: Path, weights: Path | None, **options: Any) -> None:
    """Classify CLIP embeddings by the classes' names.

    \b
    Example:
      moclip zeroshot ucf101.zarr --split 1
    """
    from moclip.pipeline.learn.zeroshot import zeroshot as classify

    found = classify(store, weights=None if weights is None else str(weights), **options)
    _print_metrics(found.metrics, per_class=True)


@main.command()
@click.option("--out", type=_NEW, default=Path("moclip-demo"), help="Where it goes.", show_default=True)
def demo(out: Path) -> None:
    """The whole way on a small generated corpus, offline, in about a minute.

    \b
    Example:
      moclip demo --out /tmp/demo
    """
    from moclip.pipeline.demo import run_demo

    run_demo(out, click.echo, lambda arguments: main.main(list(arguments), standalone_mode=False))


if __name__ == "__main__":
    main()
