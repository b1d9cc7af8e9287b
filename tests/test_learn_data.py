"""Splits, sampling and preparation: against plain re-statements of the formulas, and against torch."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from synthetic import CLASSES, Clip, corpus, label, write_store
from torch.nn.functional import interpolate

from moclip.errors import RunError
from moclip.pipeline.learn import data
from moclip.pipeline.learn.clips import read_labelled, read_split
from moclip.pipeline.learn.data import Motion, choose_device, middle_indices, prefetch, random_indices, shuffled
from moclip.pipeline.learn.views import (
    Augmentation,
    Geometry,
    Views,
    fixed_views,
    prepare,
    quantise,
    random_views,
    resize_matrix,
)
from moclip.store import FeatureSpec, ShardWriter, SourceFacts, add_feature, create_store, open_store, publish

torch.set_num_threads(1)
CPU = torch.device("cpu")


def one_view(resize: int, left: int = 0, top: int = 0, mirror: bool = False) -> Views:
    return Views(*(torch.tensor([value]) for value in (resize, left, top, mirror)))


class TestSampling:
    def test_middle_indices_are_the_formula_inside_the_clip(self) -> None:
        for frames in (*range(1, 80), 250, 623):
            for segments in (1, 3, 25, 32):
                wanted = [
                    min(round((frames - 1) / segments * (segment + 0.5)) + 1, frames - 1) for segment in range(segments)
                ]
                assert middle_indices([frames], segments)[0].tolist() == wanted

    def test_random_indices_stay_in_their_segments_and_reach_all_of_them(self) -> None:
        rng = np.random.default_rng(0)
        for frames, segments in ((30, 3), (7, 3), (100, 8)):
            drawn = random_indices([frames] * 3000, segments, rng)
            size = (frames - 2) / segments
            for segment in range(segments):
                first = round(size * segment)
                last = max(round(size * (segment + 1)), first + 1) - 1
                assert sorted(set(drawn[:, segment].tolist())) == list(range(first + 1, last + 2))

    @pytest.mark.parametrize("frames", [1, 2, 3])
    def test_clips_shorter_than_the_segments_repeat_rows(self, frames: int) -> None:
        rng = np.random.default_rng(0)
        for drawn in (random_indices([frames] * 50, 5, rng), middle_indices([frames], 5)):
            assert drawn.shape[1] == 5
            assert drawn.min() >= 0
            assert drawn.max() < frames

    def test_batches_cover_everything_once_and_none_has_a_single_clip(self) -> None:
        batches = shuffled(25, 8, np.random.default_rng(0))
        assert [len(batch) for batch in batches] == [8, 8, 9]
        assert sorted(np.concatenate(batches).tolist()) == list(range(25))

    def test_prefetch_keeps_the_order_and_passes_errors_on(self) -> None:
        assert list(prefetch(range(5), lambda i: i * i)) == [0, 1, 4, 9, 16]
        assert list(prefetch([], abs)) == []
        with pytest.raises(ZeroDivisionError):
            list(prefetch([1, 0], lambda i: 1 / i))


class TestPreparation:
    def test_quantising_is_coviars_on_every_displacement(self) -> None:
        values = np.arange(-200, 201)
        wanted = [min(max(math.trunc(int(v) * 127.5 / 20) + 128, 0), 255) / 255 - 0.5 for v in values]
        np.testing.assert_allclose(quantise(torch.tensor(values).float()).numpy(), wanted, atol=1e-7)

    @pytest.mark.parametrize(("length", "resize"), [(340, 256), (143, 256), (171, 224), (64, 299), (1, 32)])
    def test_at_one_pixel_the_resize_is_torchs(self, length: int, resize: int) -> None:
        line = torch.randn(1, 1, length, dtype=torch.float64)
        weights = resize_matrix(torch.tensor([0]), torch.tensor([resize]), resize, length, 1, length)
        wanted = interpolate(line, resize, mode="linear", align_corners=False)
        torch.testing.assert_close(weights.double() @ line[0, 0], wanted[0], atol=1e-5, rtol=1e-5)

    def test_at_one_pixel_resize_and_crop_are_torchs(self) -> None:
        grids = torch.randint(-30, 31, (1, 2, 2, 143, 171), dtype=torch.int16)
        made = prepare(grids, Geometry(171, 143, 1, 171, 143), one_view(256, left=5, top=20), 224)
        picture = interpolate(quantise(grids[0].float()), (256, 256), mode="bilinear", align_corners=False)
        torch.testing.assert_close(made[0], picture[:, :, 20:244, 5:229], atol=1e-5, rtol=1e-5)

    def test_cells_are_where_their_pixels_are(self) -> None:
        """A field that grows with x is the same picture from 8 px cells, 42.5 of which make 340 px, as in full."""
        centres = np.minimum(np.arange(43) * 8 + 4, 339)
        assert centres[-1] == 339
        weights = resize_matrix(torch.tensor([16]), torch.tensor([256]), 224, 340, 8, 43)[0]
        wanted = np.clip((np.arange(224) + 16 + 0.5) * 340 / 256 - 0.5, 4, 339)
        np.testing.assert_allclose(weights.numpy() @ centres, wanted, rtol=1e-5)

    def test_mirroring_negates_before_quantising(self) -> None:
        geometry = Geometry(64, 48, 8, 8, 6)
        grids = torch.randint(-30, 31, (1, 1, 2, 6, 8), dtype=torch.int16)
        plain = prepare(grids, geometry, one_view(32), 32)
        mirrored = prepare(grids, geometry, one_view(32, mirror=True), 32)
        torch.testing.assert_close(mirrored[:, :, 1], plain[:, :, 1].flip(-1))
        negated = grids.clone()
        negated[:, :, 0] *= -1
        torch.testing.assert_close(mirrored[:, :, 0], prepare(negated, geometry, one_view(32), 32)[:, :, 0].flip(-1))
        still = torch.zeros_like(grids)
        nothing = prepare(still, geometry, one_view(32, mirror=True), 32)
        torch.testing.assert_close(nothing, torch.full_like(nothing, 128 / 255 - 0.5))

    def test_the_callers_grids_are_left_alone(self) -> None:
        grids = torch.ones((1, 1, 2, 6, 8))
        prepare(grids, Geometry(64, 48, 8, 8, 6), one_view(32, mirror=True), 32)
        assert grids.eq(1).all()

    def test_training_views_stay_inside_and_use_every_size(self) -> None:
        views = random_views(500, Augmentation(224), np.random.default_rng(0))
        assert sorted(set(views.resize.tolist())) == [224, 256, 299]
        assert (views.left + 224 <= views.resize).all()
        assert (views.left >= 0).all()
        assert 150 < int(views.mirror.sum()) < 350
        assert not random_views(50, Augmentation(224, mirror=False), np.random.default_rng(0)).mirror.any()
        assert sorted(set(random_views(99, Augmentation(64), np.random.default_rng(0)).resize.tolist())) == [64, 73, 85]

    def test_ten_crops_are_five_and_each_ones_mirror_image(self) -> None:
        views = fixed_views(2, 224, 10)
        boxes = [*zip(views.left.tolist(), views.top.tolist(), views.mirror.tolist(), strict=True)]
        assert boxes[:10] == boxes[10:]
        assert len(set(boxes)) == 10
        assert {box[:2] for box in boxes} == {(16, 16), (0, 0), (32, 0), (0, 32), (32, 32)}
        assert {box[:2] for box in boxes if box[2]} == {box[:2] for box in boxes if not box[2]}
        assert set(views.resize.tolist()) == {256}

    def test_a_grid_that_is_not_of_the_frame_is_refused(self) -> None:
        with pytest.raises(ValueError, match="not of 340x256"):
            Geometry(340, 256, 8, 42, 32)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips of three geometries, two of which share a grid, and one clip of one frame."""
    sizes = [(64, 48), (171, 143), (63, 47), (64, 48), (171, 143)]
    clips = [
        Clip(f"v{i}", CLASSES[i % 4], None, {"1": "train"}, frames=1 if i == 3 else 20 + i, width=w, height=h)
        for i, (w, h) in enumerate(sizes)
    ]
    return write_store(tmp_path_factory.mktemp("mixed") / "s.zarr", clips)


class TestMotion:
    def test_an_i_frame_is_replaced_by_the_frame_before_it(self, mixed: Path) -> None:
        motion = Motion(open_store(mixed), "motion-accumulated", ["v0", "v1"], CPU)
        frames = np.array([[0, 1, 11, 12, 13], [12, 0, 1, 2, 3]])
        replaced = motion.before_i_frames(np.array([0, 1]), frames)
        assert replaced.tolist() == [[0, 1, 11, 11, 13], [11, 0, 1, 2, 3]]

    @pytest.mark.parametrize("resident", [True, False])
    def test_a_mixed_batch_is_what_each_clip_is_alone(
        self, mixed: Path, resident: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(data, "free_bytes", lambda _: 1 << 40 if resident else 0)
        store = open_store(mixed)
        ids = ["v4", "v0", "v2", "v3", "v1"]
        motion = Motion(store, "motion-accumulated", ids, CPU)
        assert motion.resident == resident
        videos = np.array([3, 0, 4, 1, 2, 0])
        frames = np.random.default_rng(0).integers(0, motion.frames[videos][:, None], (6, 2))
        views = random_views(6, Augmentation(32), np.random.default_rng(1))
        batch = motion.prepared(motion.fetch(videos, frames), views, 32)
        assert batch.shape == (6, 2, 2, 32, 32)
        for i, video in enumerate(videos):
            rows = store.read("motion-accumulated", ids[video])[frames[i]]
            facts = store.videos.to_pylist()[int(ids[video][1])]
            geometry = Geometry(facts["width"], facts["height"], 8, rows.shape[3], rows.shape[2])
            alone = prepare(torch.from_numpy(rows)[None], geometry, views.take(np.array([i])), 32)
            torch.testing.assert_close(batch[i], alone[0])

    def test_quarter_pixels_are_pixels(self, tmp_path: Path) -> None:
        create_store(tmp_path / "s")
        columns = {"pts_seconds": "float64", "picture_type": "uint8"}
        spec = FeatureSpec("motion", "int16", "px/4", {"cell": 8, "motion": "mpeg4", "size": [64, 48]}, columns)
        add_feature(tmp_path / "s", "motion", spec)
        writer = ShardWriter(tmp_path / "s", feature="motion", spec=spec, shard="one")
        writer.append(np.full((2, 2, 6, 8), 40), pts_seconds=[0, 1], picture_type=[1, 2])
        writer.ok(SourceFacts(id="v", width=999, height=999))
        writer.finish()
        publish(tmp_path / "s")
        motion = Motion(open_store(tmp_path / "s"), "motion", ["v"], CPU)
        picture = motion.prepared(motion.fetch(np.array([0]), np.array([[1]])), fixed_views(1, 32), 32)
        torch.testing.assert_close(picture, quantise(torch.full_like(picture, 10.0)))

    def test_an_embedding_is_no_motion(self, mixed: Path) -> None:
        with pytest.raises(RunError, match="not a motion feature"):
            Motion(open_store(mixed), "embedding", ["v0"], CPU)


def groups_of(clips: list[Clip], ids: tuple[str, ...]) -> set[str | None]:
    return {clip.group for clip in clips if clip.id in ids}


class TestSplits:
    def split(self, path: Path, **options: float) -> "data.Any":
        return read_split(open_store(path), "1", features=["motion-accumulated"], **options)

    def test_whole_groups_of_train_are_held_out(self, tmp_path: Path) -> None:
        clips = corpus(12)
        split = self.split(write_store(tmp_path / "s", clips), val_fraction=0.25)
        assert len(split.val) == 8
        assert len(split.train) == 24
        assert len(split.test) == 16
        assert not groups_of(clips, split.train.ids) & groups_of(clips, split.val.ids)
        assert split.classes == CLASSES
        assert np.bincount(split.val.targets).tolist() == [2, 2, 2, 2]
        again = self.split(tmp_path / "s", val_fraction=0.25)
        assert again.val.ids == split.val.ids
        assert again.digest == split.digest != self.split(tmp_path / "s", val_fraction=0.5).digest

    def test_without_groups_each_clip_is_its_own(self, tmp_path: Path) -> None:
        clips = [replace(clip, group=None) for clip in corpus(24)]
        split = self.split(write_store(tmp_path / "s", clips))
        assert np.bincount(split.val.targets).tolist() == [2, 2, 2, 2]

    def test_nothing_held_out_and_val_rows_of_the_table(self, tmp_path: Path) -> None:
        clips = corpus(6)
        path = write_store(tmp_path / "s", clips)
        assert len(self.split(path, val_fraction=0).val) == 0
        named = [replace(clip, splits={"1": "val"}) if clip.id.endswith("v00") else clip for clip in clips]
        label(path, named)
        assert {video[-3:] for video in self.split(path).val.ids} == {"v00"}

    def test_a_class_never_loses_all_its_training_clips(self, tmp_path: Path) -> None:
        clips = [replace(clip, group=f"{clip.label}") for clip in corpus(6)]
        path = write_store(tmp_path / "s", clips)
        with pytest.raises(RunError, match="val fraction of 0"):
            self.split(path)
        assert len(self.split(path, val_fraction=0).train) == 16

    def test_failed_videos_are_counted_and_never_made_up(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        clips = corpus(6)
        clips[0] = replace(clips[0], fails=True)
        path = write_store(tmp_path / "s", clips)
        label(path, [*clips, Clip("gone", "RedUp", None, {"1": "train"})])
        split = self.split(path)
        # Of the clips to be tested none is lost; all that are lost are told.
        assert split.missing == ({} if (clips[0].splits or {})["1"] == "train" else {"no_vectors": 1})
        assert "no_vectors 1, not extracted 1" in caplog.text
        assert clips[0].id not in split.every.ids
        assert len(split.every) == 23

    def test_requests_that_cannot_be_met(self, tmp_path: Path) -> None:
        clips = corpus(6, splits=("1", "2"))
        path = write_store(tmp_path / "s", clips)
        with pytest.raises(RunError, match=r"no split '9'; it has: 1, 2"):
            read_split(open_store(path), "9", features=["embedding"])
        untrained = [clip for clip in clips if clip.label != "RedUp" or clip.splits == {"1": "test", "2": "test"}]
        label(path, untrained)
        with pytest.raises(RunError, match=r"no training clip of: RedUp; .*`moclip extract SOURCE .*s`"):
            self.split(path)
        label(path, [replace(clip, splits={"1": "test"}) for clip in clips])
        with pytest.raises(RunError, match="split '1' has no train clip among the labelled videos"):
            self.split(path)
        label(
            path,
            [*(replace(clip, splits={"1": "train"}) for clip in clips), Clip("gone", "RedUp", None, {"2": "test"})],
        )
        with pytest.raises(RunError, match="split '2' has no train clip among"):
            read_split(open_store(path), "2", features=["embedding"])
        with pytest.raises(RunError, match="no labelled clip to test in split '1'"):
            read_labelled(open_store(path), "1", feature=None)
        label(path, [clip for clip in clips if clip.splits == {"1": "train", "2": "train"}])
        with pytest.raises(RunError, match="no test clip"):
            self.split(path)
        label(path, [])
        with pytest.raises(RunError, match="has no labels"):
            self.split(path)
        label(path, clips, classes=["RedUp"])
        with pytest.raises(RunError, match="none of its classes"):
            self.split(path)

    def test_ten_thousand_clips_are_split_in_seconds(self) -> None:
        import pyarrow as pa

        from moclip.pipeline.learn.clips import _hold_out

        n = 13_320
        rng = np.random.default_rng(0)
        labels: npt.NDArray[np.int64] = rng.integers(0, 101, n)
        table = pa.table({"id": [f"v{i}" for i in range(n)], "group": pa.nulls(n, pa.string())})
        held = _hold_out(table, labels, np.ones(n, bool), 0.15)
        assert abs(held.mean() - 0.15) < 0.01


def test_devices() -> None:
    assert choose_device("cpu") == CPU
    with pytest.raises(RunError, match="no device"):
        choose_device("abacus")
    if not torch.cuda.is_available():
        assert choose_device("auto") == CPU
        with pytest.raises(RunError, match="no CUDA"):
            choose_device("cuda")
