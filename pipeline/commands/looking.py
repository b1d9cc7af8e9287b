"""Commands that look at whole stores: info, diff, verify."""

import json
import sys
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from moclip.pipeline.commands.console import STORE, count, one_line, progress, say, shown, size

if TYPE_CHECKING:
    from moclip.store import Comparison, FeatureComparison, FeatureInfo, Repaired, StoreInfo


@click.command()
@click.argument("store", type=STORE)
@click.option("--json", "as_json", is_flag=True, help="Everything, as JSON.")
def info(store: str, as_json: bool) -> None:
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
    _print_failed(failed_entries(opened))


def _print_info(found: "StoreInfo") -> None:
    videos = f"{count(found.videos, 'video')}, {found.hours:.2f} hours, {count(found.frames, 'frame')}"
    say(f"{found.url} ({found.container}): {videos}, {size(found.video_bytes)} of video")
    if found.corrupt_frames:
        say(f"  {count(found.corrupt_frames, 'corrupt frame')} (concealed or refused by the decoder)")
    if found.unpublished:
        say(f"  not in the tables: {count(found.unpublished, 'finished shard')}; the next `moclip extract` adds them")
    for feature in found.features:
        _print_feature(feature)
    if found.labels:
        say(f"{count(len(found.labels), 'label')}, {count(sum(found.labels.values()), 'labelled video')}")
    for name, parts in found.splits.items():
        say(f"split {name}: " + ", ".join(f"{n} {part}" for part, n in parts.items()))


def _print_feature(feature: "FeatureInfo") -> None:
    spec = feature.specification
    say(f"{feature.name}  {spec.dtype}, {spec.unit}, digest {feature.digest}")
    a_frame = f", {feature.bytes / feature.rows:.0f} bytes a frame" if feature.rows else ""
    say(f"  {count(feature.ok, 'video')}, {count(feature.rows, 'frame')}, {size(feature.bytes)}{a_frame}")
    for line in (_words(spec.parameters), "made with " + _words(feature.versions)):
        say(f"  {line}")
    if feature.motion_sources:
        say("  vectors: " + ", ".join(f"{n} {source}" for source, n in feature.motion_sources.items()))
    for reason, n in feature.failures.items():
        say(f"  failed: {n} {reason}")


def _words(parameters: Mapping[str, Any]) -> str:
    """``name value, …``, with what is nested in brackets."""
    words: list[str] = []
    for name, value in parameters.items():
        if isinstance(value, Mapping):
            value = f"({_words(value)})"
        if isinstance(value, list):
            value = str(value[0]) if len(value) == 1 else f"({', '.join(str(item) for item in value)})"
        words += [f"{name} {value}"] if value is not None else []
    return ", ".join(words)


def _print_failed(entries: list[dict[str, Any]], most: int = 20) -> None:
    """A line a video and reason, whatever the number of features that it failed for."""
    features: dict[tuple[str, str, str], list[str]] = {}
    for entry in entries:
        features.setdefault((entry["id"], entry["reason"], entry["detail"] or ""), []).append(entry["feature"])
    for (video, reason, detail), names in list(features.items())[:most]:
        say(f"  {shown([video])} {', '.join(names)}: {reason}: {one_line(detail)[:120]}")
    if len(features) > most:
        click.echo(f"  … {len(features) - most} more: moclip info --json")


@click.command()
@click.argument("a", type=STORE)
@click.argument("b", type=STORE)
@click.option("--json", "as_json", is_flag=True, help="Everything, as JSON.")
def diff(a: str, b: str, as_json: bool) -> None:
    """Do features made elsewhere match mine? Compares two stores' specifications and rows.

    Rows match when they are equal bit for bit; embeddings also when their cosines are at least 0.99999, which is
    what the same frame gives in another batch. What only one store has is named and is no mismatch. The exit code
    is 0 for a match, else 1.

    \b
    Example:
      moclip diff mine.zarr theirs.zarr
    """
    from moclip.store import compare, differences, open_store

    stores = open_store(a), open_store(b)
    with progress("diff", None, "{done} videos") as advance:
        found = compare(*stores, advance)
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=1))
    else:
        for feature in found.features:
            _print_comparison(feature)
        lines = list(differences(found))
        for line in lines:
            say(f"  {line}")
        say(f"{_verdict(found)}: {found.a} and {found.b}, {count(len(found.features), 'feature')} in both")
    if not found.matches:
        sys.exit(1)


def _verdict(found: "Comparison") -> str:
    if found.identical:
        return "MATCH"
    if found.matches:
        return "MATCH in what both have"
    if found.features and all(feature.values_match for feature in found.features):
        return "NO MATCH, though the rows that both have are the same"
    return "NO MATCH"


def _print_comparison(feature: "FeatureComparison") -> None:
    said = f"{feature.feature}: {count(feature.common, 'video')} in both, {feature.equal} equal bit for bit"
    if feature.rows is not None:
        rows = feature.rows
        said += f"; the rest: at most {rows.max_abs:.6g} apart, {rows.mean_abs:.4g} in the mean, "
        said += f"cosine {rows.min_cosine:.6f} or more, {rows.mean_cosine:.6f} in the mean"
    say(said)


@click.command()
@click.argument("store", type=STORE)
@click.option("--repair", "mend", is_flag=True, help="Mend what can be mended, and say what is to be extracted again.")
def verify(store: str, mend: bool) -> None:
    """Read every byte of a store, and name each file that is damaged, missing or too much.

    With --repair, tables are made again from the receipts, and shards with a damaged or missing file are taken out:
    the next `moclip extract` of the same source makes them again. What a stopped run left goes when it is a day old.

    Exit code 1 if there are problems that are left.

    \b
    Example:
      moclip verify corpus.zarr
      moclip verify corpus.zarr --repair
    """
    from moclip import store as stores

    with progress("reading", None, "{files} of {all_files} files, {read} of {all}") as advance:

        def report(now: stores.Verified) -> None:
            read, whole = size(now.bytes), size(now.all_bytes)
            advance(now.bytes, now.all_bytes, files=now.files, all_files=now.all_files, read=read, all=whole)

        repaired = stores.repair(store, report=report) if mend else None
        problems = list(repaired.problems) if repaired else stores.verify(store, report)
    for problem in problems:
        say(f"{problem.kind}: {problem.path}: {problem.detail}")
    if repaired:
        _print_repaired(repaired)
    elif problems:
        kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(Counter(problem.kind for problem in problems).items()))
        say(f"{kinds}. `moclip verify {store} --repair` mends what can be mended.")
    else:
        say("Every file is there, with the bytes that were written.")
    left = repaired.remaining if repaired else problems
    if left:
        sys.exit(1)


def _print_repaired(repaired: "Repaired") -> None:
    say(f"Made again: {count(len(repaired.written), 'file')}; deleted: {count(len(repaired.deleted), 'place')}.")
    for problem in repaired.remaining:
        say(f"left: {problem.path}: {problem.detail}")
    if "labels.parquet" in repaired.written:
        say("labels.parquet was lost and is empty now: `moclip label` brings labels and splits back.")
    if repaired.again:
        say(
            f"To be extracted again: {shown([f'{feature} of {video}' for video, feature in repaired.again])} "
            f"({len(repaired.again)} in all): run the `moclip extract` that made them once more."
        )
