"""The commands about whole stores, as a person meets them."""

import json
import shutil

import pytest
from click.testing import CliRunner
from shards import rows_of, write_shard
from synthetic import CLASSES, corpus, write_store

from moclip import cli
from moclip.store import add_feature, create_store, open_store, publish


def run(*arguments, **settings):
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments], **settings)


@pytest.fixture
def store(tmp_path):
    return write_store(tmp_path / "s.zarr", corpus())


def test_info_shows_specifications_versions_and_sizes(store):
    shown = run("info", store).output
    assert "(zarr): 24 videos" in shown
    assert "motion-accumulated  int16, px, digest" in shown
    assert "motion native, cell 8" in shown or "cell 8" in shown
    assert "made with " in shown
    assert "tensorstore" in shown
    assert "bytes a frame" in shown
    found = json.loads(run("info", store, "--json").output)
    assert found["container"] == "zarr"
    assert found["features"][0]["versions"]["moclip"]


def test_diff_of_a_store_with_itself_and_with_another(store, tmp_path):
    copy = tmp_path / "copy.zarr"
    assert run("export", store, copy, "--format", "hdf5").exit_code == 0
    same = run("diff", store, copy)
    assert same.exit_code == 0, same.output
    assert same.output.splitlines()[-1].startswith("MATCH: ")
    part = tmp_path / "part.zarr"
    assert run("export", store, part, "--label", CLASSES[0], "--feature", "motion-accumulated").exit_code == 0
    within = run("diff", store, part)
    assert within.exit_code == 0
    assert within.output.splitlines()[-1].startswith("MATCH in what both have: ")
    other = write_store(tmp_path / "other.zarr", corpus(), seed=1)
    differs = run("diff", store, other)
    assert differs.exit_code == 1
    assert "24 videos in both, 0 equal bit for bit" in differs.output
    assert differs.output.splitlines()[-1].startswith("NO MATCH: ")
    assert json.loads(run("diff", store, other, "--json").output)["matches"] is False


def test_export_by_class_and_to_one_file(store, tmp_path):
    result = run("export", store, tmp_path / "red.zarr", "--label", CLASSES[0], "--feature", "motion-accumulated")
    assert result.exit_code == 0, result.output
    assert "6 videos, motion-accumulated: 6 entries" in result.output
    assert open_store(tmp_path / "red.zarr").classes == [CLASSES[0]]
    assert run("export", store, tmp_path / "part.h5", "--split", "1", "--part", "test").exit_code == 0
    assert (tmp_path / "part.h5").is_file()
    assert run("export", store, tmp_path / "x.zarr", "--part", "test").exit_code == 2
    unknown = run("export", store, tmp_path / "x.zarr", "--label", "Blue")
    assert unknown.exit_code == 1
    assert "Blue" in unknown.output


def test_merge_puts_parts_together(store, tmp_path):
    for label in CLASSES:
        assert run("export", store, tmp_path / f"{label}.zarr", "--label", label).exit_code == 0
    result = run("merge", *(tmp_path / f"{label}.zarr" for label in CLASSES), tmp_path / "all.zarr")
    assert result.exit_code == 0, result.output
    assert run("diff", store, tmp_path / "all.zarr").exit_code == 0


def test_remove_asks_first(store, tmp_path):
    gone = open_store(store).videos["id"].to_pylist()[:2]
    (tmp_path / "ids.txt").write_text("\n".join([*gone, "nobody"]))
    asked = run("remove", store, "--ids", tmp_path / "ids.txt", input="n\n")
    assert asked.exit_code == 1
    assert "2 videos" in asked.output
    assert "not in the store: 1 ('nobody')" in asked.output
    assert len(open_store(store).videos) == 24
    assert run("remove", store, "--ids", tmp_path / "ids.txt", "--yes").exit_code == 0
    assert not set(gone) & set(open_store(store).videos["id"].to_pylist())


def test_verify_finds_and_repairs(container, tmp_path):
    root = tmp_path / "s"
    create_store(root, container)
    from shards import SPEC

    add_feature(root, "motion", SPEC)
    write_shard(root, "one", {"a": rows_of(0, 30)})
    receipt = write_shard(root, "two", {"b": rows_of(1, 30)})
    publish(root)
    good = run("verify", root)
    assert good.exit_code == 0, good.output
    damaged = max((root / name for name in receipt.files), key=lambda path: path.stat().st_size)
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(bytes(data))
    found = run("verify", root)
    assert found.exit_code == 1
    assert damaged.name in found.output
    assert "--repair" in found.output
    repaired = run("verify", root, "--repair")
    assert "'b'" in repaired.output or "b" in repaired.output
    assert run("verify", root).exit_code in (0, 1)
    assert open_store(root).ids("motion") == ["a"]


def test_a_store_with_the_other_container_is_refused(tmp_path, store):
    shutil.copytree(store, tmp_path / "t.zarr")
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.avi").write_bytes(b"")
    result = run("extract", tmp_path / "videos", tmp_path / "t.zarr", "--format", "hdf5", "--encoder", "none")
    assert result.exit_code == 1
    assert "as zarr, not as hdf5" in result.output
