import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

from moclip import cli
from moclip.errors import SourceError
from moclip.pipeline import demo
from moclip.pipeline.extract.encode import Frame, write_video
from moclip.pipeline.extract.sources import list_sources
from moclip.pipeline.extract.splits import read_splits

BT601 = np.array([0.299, 0.587, 0.114])


@pytest.fixture(scope="module")
def scene() -> demo.Scene:
    return next(demo.make_scenes(seed=0))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo")
    demo.render_corpus(out, seed=0)
    return out


def luma(frames: list[Frame]) -> np.ndarray:
    return np.stack(frames) @ BT601


def vertical_motion(path: Path) -> float:
    """The area-weighted mean of the vertical displacements that point to past frames, in pixels."""
    down, area = 0.0, 0.0
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.options = {"flags2": "+export_mvs"}
        for frame in container.decode(stream):
            side = frame.side_data.get("MOTION_VECTORS")
            if side is not None:
                vectors = side.to_ndarray()
                vectors = vectors[vectors["source"] < 0]
                size = vectors["w"].astype(float) * vectors["h"]
                down -= float((size * vectors["motion_y"] / vectors["motion_scale"]).sum())
                area += float(size.sum())
    return down / area


class TestScenes:
    def test_up_is_down_played_backwards_about_the_same_middle(self, scene: demo.Scene) -> None:
        down, up = (np.stack(demo.film(scene, f"Orange{way}")) for way in ("Down", "Up"))
        assert (down == up[::-1]).all()
        middle = scene.frames // 2
        assert (down[middle] == up[middle]).all()

    def test_colours_have_equal_luma(self, scene: demo.Scene) -> None:
        blue, orange = (demo.film(scene, f"{colour}Up") for colour in ("Blue", "Orange"))
        assert np.abs(luma(blue) - luma(orange)).max() <= 1.01  # each side rounds to whole RGB values
        assert np.abs(np.stack(blue).astype(int) - np.stack(orange)).max() > 100

    def test_no_scene_is_without_a_middle_frame(self, scene: demo.Scene) -> None:
        assert all(s.frames % 2 for s in demo.make_scenes(seed=1))
        with pytest.raises(ValueError, match="no middle one"):
            replace(scene, frames=34)

    @pytest.mark.parametrize("codec", demo.CODECS, ids=lambda codec: codec.name)
    def test_vectors_show_the_direction_and_not_the_colour(
        self, tmp_path: Path, scene: demo.Scene, codec: demo.Codec
    ) -> None:
        found = {}
        for label in demo.CLASSES:
            path = tmp_path / f"{label}{codec.suffix}"
            write_video(path, demo.film(scene, label), codec=codec.name, options=codec.options)
            found[label] = vertical_motion(path)
        assert min(found["BlueDown"], found["OrangeDown"]) > 0.15
        assert max(found["BlueUp"], found["OrangeUp"]) < -0.15
        for way in ("Up", "Down"):
            assert abs(found[f"Blue{way}"] - found[f"Orange{way}"]) < 0.1


class TestCorpus:
    def test_classes_are_balanced_and_groups_stay_on_one_side(self, corpus: Path) -> None:
        videos, labelling = read_splits(corpus / "splits").apply(list_sources(corpus / "videos").videos)
        assert (labelling.classes, labelling.absent, labelling.unlisted) == (demo.CLASSES, (), ())
        assert len(videos) == 4 * demo.GROUPS * demo.SCENES_A_GROUP
        sides = Counter((video.label, video.splits["1"]) for video in videos)
        assert {sides[label, "train"] for label in demo.CLASSES} == {21}
        assert {sides[label, "test"] for label in demo.CLASSES} == {9}
        groups = [{v.group for v in videos if v.splits["1"] == side} for side in ("train", "test")]
        assert not groups[0] & groups[1]
        assert {Path(video.path).suffix for video in videos} == {".avi", ".mp4", ".mpg"}

    def test_rendering_is_deterministic(self, corpus: Path, tmp_path: Path, scene: demo.Scene) -> None:
        path = tmp_path / f"clip{scene.codec.suffix}"
        write_video(path, demo.film(scene, "BlueUp"), codec=scene.codec.name, options=scene.codec.options)
        assert path.read_bytes() == (corpus / "videos" / scene.name("BlueUp")).read_bytes()
        other = next(demo.make_scenes(seed=1))
        assert not np.array_equal(other.background, scene.background)


def test_the_untrained_weights_are_seeded(tmp_path: Path) -> None:
    for name in "ab":
        demo.write_untrained_weights(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_second_demo_is_not_put_on_top_of_the_first(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    with pytest.raises(SourceError, match="is not empty"):
        demo.run_demo(tmp_path, print, print)


@pytest.mark.slow
def test_both_eyes_are_needed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The whole way, by the command itself: neither stream alone gets far beyond half, both together do."""
    cli.main.main(["demo", "--out", str(tmp_path / "demo")], standalone_mode=False)
    found = {}
    for kind in demo.BEST:
        metrics = json.loads((tmp_path / "demo" / "runs" / kind / "metrics.json").read_text())
        found[kind] = metrics["test"]["top1"]
    assert found["fusion"] >= 0.9
    assert max(found["tsn"], found["probe"]) <= 0.6
    assert "UNTRAINED" in capfd.readouterr().out
