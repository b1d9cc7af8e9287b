"""The command line as a person meets it: help, one-line errors, exit codes, and what it prints."""

import json
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
import videos
from click.testing import CliRunner

from moclip import cli
from moclip.store import open_store

DOCS = Path(__file__).parent.parent / "docs" / "cli.md"


def commands(group=cli.main, path=("moclip",)):
    yield path, group
    for name in sorted(getattr(group, "commands", {})):
        yield from commands(group.commands[name], (*path, name))


def run(*arguments):
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments])


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "videos"
    for label in ("left", "right"):
        (folder / label).mkdir(parents=True)
        videos.make_clip(folder / label / f"{label}_g01_c01.avi")
    videos.zero_bytes(folder / "left" / "empty.mp4")
    (folder / "notes.txt").write_text("not a video")
    return folder


@pytest.mark.parametrize(
    ("path", "command"), list(commands()), ids=lambda value: " ".join(value) if isinstance(value, tuple) else ""
)
def test_every_command_has_help_with_an_example(path, command):
    result = run(*path[1:], "--help")
    assert result.exit_code == 0
    assert "Example:" in result.output
    assert all(option.help for option in command.params if isinstance(option, click.Option))


def test_the_reference_in_the_docs_is_the_help():
    assert DOCS.read_text() == reference(), "run: python tests/write_cli_docs.py"


def reference():
    from write_cli_docs import reference as made

    return made()


@pytest.mark.usefixtures("without_dask")
def test_extract_info_label_and_a_second_run(tmp_path, corpus):
    store = tmp_path / "store.zarr"
    plan = run("extract", corpus, store, "--encoder", "none", "--dry-run")
    assert plan.exit_code == 0, plan.output
    assert "to do: 3 videos" in plan.output
    assert not store.exists()
    first = run("extract", corpus, store, "--encoder", "none", "--workers", 1)
    assert first.exit_code == 0, first.output
    assert "1 other files are no videos by their names ('notes.txt')" in first.output
    assert re.search(r"motion +2 +1 +1 empty\n", first.output)
    again = run("extract", corpus, store, "--encoder", "none", "--workers", 1)
    assert "nothing to do" in again.output
    assert "1 failed before ('left/empty'); --retry-failed" in again.output
    shown = run("info", store)
    assert "motion-accumulated  int16, pixel" in shown.output
    assert "empty: the file has zero bytes" in shown.output
    found = json.loads(run("info", store, "--json").output)
    assert {feature["name"] for feature in found["features"]} == {"motion", "motion-accumulated"}
    assert len(found["failed_entries"]) == 2
    table = tmp_path / "labels.csv"
    table.write_text("id,label,split_1\nleft/left_g01_c01,west,train\nnowhere,west,test\n")
    labelled = run("label", store, "--csv", table)
    assert labelled.exit_code == 0, labelled.output
    assert "listed, but not in the store: 1 ('nowhere')" in labelled.output
    run("extract", corpus, store, "--encoder", "none", "--workers", 1)
    assert open_store(store).labels["label"].to_pylist() == ["left", "west", "right"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("extract", "nowhere", "s.zarr", "--encoder", "none"), "no such source"),
        (("extract", ".", "s.zarr", "--encoder", "none"), "no videos"),
        (("extract", ".", "s.zarr", "--encoder", "none", "--motion", "none"), "nothing to extract"),
        (("extract", ".", "s.zarr", "--feature", "motion", "--cell", "0"), "cell of 0"),
        (("extract", ".", "s.zarr", "--frames", "first"), "expected middle"),
        (("info", "nowhere.zarr"), "no moclip store"),
        (("label", "nowhere.zarr", "--splits", "."), "no moclip store"),
        (("train", "tsn", "nowhere.zarr", "--split", "1", "--out", "run"), "no moclip store"),
        (("evaluate", "nowhere", "nowhere.zarr"), "no run at"),
        (("zeroshot", "nowhere.zarr"), "no moclip store"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_exit_code_1(tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 1
    lines = result.output.strip().splitlines()
    assert len(lines) == 1
    assert said in lines[0]
    assert not (tmp_path / "s.zarr").exists()


@pytest.mark.parametrize(
    "arguments",
    [("label", "s.zarr"), ("extract", "a", "b", "--workers", "2", "--scheduler", "tcp://x"), ("nonsense",)],
)
def test_a_wrong_command_line_is_exit_code_2(arguments):
    assert run(*arguments).exit_code == 2


@pytest.mark.usefixtures("without_dask")
def test_too_many_failures_are_exit_code_1(tmp_path, corpus):
    arguments = ("extract", corpus, tmp_path / "s.zarr", "--feature", "motion", "--workers", 1)
    result = run(*arguments, "--max-failures", 0)
    assert result.exit_code == 1
    assert "videos with a failed entry: 1, allowed: 0" in result.output
    assert run(*arguments, "--max-failures", 1).exit_code == 0


@pytest.mark.usefixtures("without_dask")
def test_a_name_of_another_specification_is_refused(tmp_path, corpus):
    arguments = ("extract", corpus, tmp_path / "s.zarr", "--feature", "motion", "--workers", 1)
    assert run(*arguments).exit_code == 0
    result = run(*arguments, "--cell", 16)
    assert result.exit_code == 1
    assert "--as NAME" in result.output
    assert run(*arguments, "--cell", 16, "--as", "motion-16").exit_code == 0
    assert open_store(tmp_path / "s.zarr").features["motion-16"].parameters["cell"] == 16


@pytest.mark.usefixtures("without_dask")
def test_an_odd_id_reaches_the_terminal_escaped(tmp_path):
    (tmp_path / "videos").mkdir()
    videos.zero_bytes(tmp_path / "videos" / "red\x1b[31m.avi")
    result = run("extract", tmp_path / "videos", tmp_path / "s.zarr", "--feature", "motion", "--workers", 1)
    assert result.exit_code == 0
    assert "\x1b[31m" not in run("info", tmp_path / "s.zarr").output


def test_a_reader_that_has_read_enough_hears_nothing(tmp_path):
    """`moclip … | head -1` ends without a message."""
    command = [sys.executable, "-m", "moclip.cli", "info", str(Path(__file__).parent / "golden" / "format1-zarr")]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1
