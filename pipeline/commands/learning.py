"""Commands that train from a store, and test: train, evaluate, ablate, zeroshot."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moclip.pipeline.commands.console import EXISTING, NEW, STORE, count, progress, say, together

if TYPE_CHECKING:
    from moclip.pipeline.learn.metrics import Metrics
    from moclip.pipeline.learn.run_writer import TrainResult

_TRAINING = together(
    click.option("--split", required=True, metavar="NAME", help="The split of the store to train and test on."),
    click.option("--out", required=True, type=NEW, help="The run directory to make, or to go on with."),
    click.option(
        "--recipe", default="fast", show_default=True, metavar="NAME|FILE", help="fast, moclip-lite, or a .toml file."
    ),
    click.option("--epochs", type=int, help="Passes over the training part.  [default: the recipe's]"),
    click.option("--batch", type=int, help="Clips a step.  [default: the recipe's]"),
    click.option("--lr", type=float, help="Learning rate.  [default: the recipe's]"),
    click.option(
        "--val-fraction",
        type=float,
        help="Part of train, in whole groups, that chooses the epoch, unless the split names val;"
        " 0 takes the last epoch, and leaves val clips out."
        "  [default: the recipe's]",
    ),
    click.option("--seed", type=int, help="Fixes every random choice.  [default: 0]"),
    click.option("--device", help="cpu, cuda or auto.  [default: auto]"),
    click.option(
        "--strict-reference",
        is_flag=True,
        default=None,
        help="Repeat the defects of the published code (docs/training.md); choose the epoch on test.",
    ),
    click.option(
        "--set", "settings", multiple=True, metavar="NAME=VALUE", help="Any other value of the recipe; again for more."
    ),
)

_SEGMENTS = click.option("--segments", type=int, help="Segments a clip in training.  [default: the recipe's]")
_HEAD = click.option(
    "--head",
    metavar="NAME",
    help="mlp, linear or attention; with motion also gated, cross-attention (docs/training.md).  [default: mlp]",
)


@click.group()
def train() -> None:
    """Train a model from a store alone; no video is opened.

    \b
    Example:
      moclip train tsn corpus.zarr --split 1 --out runs/tsn
    """


@train.command()
@click.argument("store", type=STORE)
@_TRAINING
@_SEGMENTS
@click.option("--feature", help="motion-accumulated (default), motion, or another name.")
@click.option("--backbone", metavar="NAME", help="timm:<model>.  [default: timm:efficientnet_b0]")
@click.option("--weights", help="A file with the backbone's weights, instead of a download; none: from scratch.")
@click.option("--input-size", type=int, metavar="PX", help="Side of the network's input.  [default: the recipe's]")
@click.option("--no-mirror", is_flag=True, help="For classes that left and right tell apart.")
def tsn(store: str, out: Path, no_mirror: bool, **options: Any) -> None:
    """Train MV-TSN, a network on motion vectors. Its pooled features stay in the run, for fusion.

    \b
    Example:
      moclip train tsn ucf101.zarr --split 1 --out runs/tsn --recipe moclip-lite
    """
    from moclip.pipeline.learn.recipes import configured
    from moclip.pipeline.learn.tsn import TSNConfig, train_tsn

    config = configured(TSNConfig, "tsn", **_given({**options, "mirror": False if no_mirror else None}))
    _run(train_tsn, store, out, config)


@train.command()
@click.argument("store", type=STORE)
@_TRAINING
@_SEGMENTS
@click.option("--motion-run", required=True, type=EXISTING, help="The run of `moclip train tsn`, of the same split.")
@_HEAD
@click.option("--zeroshot-run", type=EXISTING, help="A run of `moclip zeroshot`, to add its scores to the head's.")
@click.option("--feature", help="The embedding, where the store has several.")
def fusion(store: str, out: Path, **options: Any) -> None:
    """Train the late fusion of a frozen MV-TSN and the image embedding, both read as features.

    \b
    Example:
      moclip train fusion ucf101.zarr --split 1 --motion-run runs/tsn --out runs/fusion
    """
    from moclip.pipeline.learn.fusion import train_fusion
    from moclip.pipeline.learn.fusion_model import FusionConfig
    from moclip.pipeline.learn.recipes import configured

    config = configured(FusionConfig, "fusion", **_given(options))
    _run(train_fusion, store, out, config)


@train.command()
@click.argument("store", type=STORE)
@_TRAINING
@_HEAD
@click.option("--feature", help="The embedding, where the store has several.")
def probe(store: str, out: Path, **options: Any) -> None:
    """Train the control: the fusion's classifier on the image embedding alone.

    \b
    Example:
      moclip train probe ucf101.zarr --split 1 --out runs/probe
    """
    from moclip.pipeline.learn.fusion import train_probe
    from moclip.pipeline.learn.fusion_model import FusionConfig
    from moclip.pipeline.learn.recipes import configured

    config = configured(FusionConfig, "probe", **_given(options))
    _run(train_probe, store, out, config)


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """What was said on the command line, paths as text; the recipe has the rest."""
    given = {name: value for name, value in options.items() if value is not None}
    return {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}


def _run(train: Callable[..., "TrainResult"], store: str, out: Path, config: Any) -> None:
    """Train, with a bar that tells the last step and the accuracy on the validation clips, and print the result."""
    held_out = ""
    with progress("train", config.epochs, "epoch {epoch}/{total} · {said}") as advance:

        def on_step(epoch: int, how_far: str) -> None:
            advance(epoch - 1, epoch=epoch, said=f"{how_far}{held_out}")

        def on_epoch(row: Any) -> None:
            nonlocal held_out
            if row.val_top1 is not None:
                held_out = f" · last {100 * row.val_top1:.1f} %"
            advance(row.epoch, epoch=row.epoch, said=f"loss {row.train_loss:.3f}{held_out}")

        result = train(store, out, config, on_epoch=on_epoch, on_step=on_step)
    _print_result(result)


def _print_result(result: "TrainResult") -> None:
    best = result.best
    chosen = "the last"
    if best.val_top1 is not None:
        where = "on the TEST clips, as published" if result.chosen_on == "test" else "on the held-out part"
        chosen = f"chosen {where}, {100 * best.val_top1:.1f} % there"
    click.echo(f"{result.kind}: epoch {best.epoch} ({chosen}); {result.seconds:.1f} s")
    _print_metrics(result.test)
    for line in result.card.lines():
        say(line)
    click.echo(f"run: {result.run}")


def _print_metrics(metrics: "Metrics", per_class: bool = False) -> None:
    say(
        f"split {metrics.split}, {metrics.clips} test clips, {metrics.protocol}: top-1 {100 * metrics.top1:.1f} %, "
        f"top-5 {100 * metrics.top5:.1f} %, mean over classes {100 * metrics.mean_class_accuracy:.1f} %, "
        f"calibration error {100 * metrics.calibration_error:.1f} %"
    )
    for reason, lost in metrics.missing.items():
        say(f"  {count(lost, 'labelled clip')} not in these numbers: {reason}")
    if per_class:
        for name, found in metrics.per_class.items():
            shown = "no clips" if found.accuracy is None else f"{100 * found.accuracy:5.1f} %"
            say(f"  {shown}  {found.n:4d}  {name}")
        if confused := metrics.most_confused():
            say("most confused:")
        for name, called, n in confused:
            say(f"  {n:4d} of {name} called {called}")


@click.command()
@click.argument("store", type=STORE)
@click.option("--splits", required=True, metavar="NAME,…", help="The splits to train and test on.")
@click.option("--seeds", default="0,1,2", show_default=True, metavar="N,…", help="The seeds, for each split.")
@click.option("--out", default="ablation", show_default=True, type=NEW, help="Where the runs and the table go.")
@click.option(
    "--recipe", default="fast", show_default=True, metavar="NAME|FILE", help="fast, moclip-lite, or a .toml file."
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KIND.NAME=VALUE",
    help="A value of the recipe of tsn, fusion or probe: tsn.epochs=10, tsn.weights=FILE.",
)
@click.option("--feature", default="embedding", help="The embedding, where the store has several.", show_default=True)
@click.option("--device", default="auto", help="cpu, cuda or auto.", show_default=True)
def ablate(store: str, out: Path, splits: str, seeds: str, settings: tuple[str, ...], **options: Any) -> None:
    """Train every model and its controls on the same splits and seeds; one table.

    Motion alone; images alone, of one frame or all; the average of their scores; fusion, with every head. The same
    command goes on with what was interrupted.

    \b
    Example:
      moclip ablate ucf101.zarr --splits 1,2,3 --seeds 0,1,2 --out ablation
    """
    from moclip.pipeline.learn import ablate as ablation

    try:
        chosen = [int(seed) for seed in seeds.split(",")]
    except ValueError as error:
        what = "expected whole numbers with commas between, such as 0,1,2"
        raise click.BadParameter(what, param_hint="--seeds") from error
    asked = ablation.Ablation([name.strip() for name in splits.split(",")], chosen, settings=settings, **options)
    with progress("ablate", None, "{run} · epoch {done}") as advance:
        rows = ablation.ablate(store, out, asked, lambda run, row: advance(0 if row is None else row.epoch, run=run))
    for line in ablation.markdown(rows):
        say(line)
    click.echo(f"runs and table: {out}")


@click.command()
@click.argument("run", type=EXISTING)
@click.argument("store", type=STORE)
@click.option("--split", metavar="NAME", help="The split to test on.  [default: the run's]")
@click.option(
    "--protocol",
    metavar="SxC",
    help="What the motion network sees of a clip: segments x crops, such as 25x10, 32x1.  [default: 25x1]",
)
@click.option("--device", default="auto", help="cpu, cuda or auto.", show_default=True)
def evaluate(run: Path, store: str, **options: Any) -> None:
    """Test a run on a store. Classes are matched by name; results go into RUN/evaluations.

    \b
    Example:
      moclip evaluate runs/tsn ucf101.zarr --protocol 25x10
    """
    from moclip.pipeline.learn.evaluate import evaluate_run

    _print_metrics(evaluate_run(run, store, **options).metrics, per_class=True)


@click.command()
@click.argument("store", type=STORE)
@click.option("--split", metavar="NAME", help="Only this split's test part.  [default: all labelled videos]")
@click.option("--feature", default="embedding", help="The embedding, where the store has several.", show_default=True)
@click.option("--weights", type=EXISTING, help="A file with the encoder's weights, instead of a download.")
@click.option("--phrases", type=EXISTING, help='A TOML file of other words for classes: TaiChi = ["tai chi", "taiji"].')
@click.option("--out", type=NEW, help="Make a run of it, with the text embeddings, for fusion and `moclip evaluate`.")
@click.option("--device", default="auto", help="cpu, cuda or auto.", show_default=True)
def zeroshot(store: str, weights: Path | None, phrases: Path | None, out: Path | None, **options: Any) -> None:
    """Classify CLIP embeddings by the classes' names.

    \b
    Example:
      moclip zeroshot ucf101.zarr --split 1 --out runs/zeroshot
    """
    from moclip.pipeline.learn import zeroshot as names

    words = {} if phrases is None else names.read_phrases(phrases)
    config = names.ZeroShotConfig(weights=None if weights is None else str(weights), phrases=words, **options)
    _print_metrics(names.zeroshot(store, config, out=out).metrics, per_class=True)
    if out is not None:
        click.echo(f"run: {out}")
