"""Stored images, and embeddings made of them when the videos are gone."""

import io
import shutil
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
import videos
from PIL import Image

from moclip.errors import EncoderError, FeatureError, MoclipError, SourceError, VideoError
from moclip.pipeline.backbones import Encoder, EncoderConfig, load_encoder
from moclip.pipeline.extract import embedding, features, jobs, reembed, schedule, shard
from moclip.pipeline.extract.features import FeatureRequest
from moclip.pipeline.extract.guard import Death
from moclip.pipeline.extract.image import decode_jpeg, encode_jpeg, fitted, image_spec
from moclip.pipeline.extract.plan import cut
from moclip.pipeline.extract.reembed import EmbedJob, Reembedding
from moclip.pipeline.extract.schedule import Attempt, take_result
from moclip.pipeline.extract.tasks import ShardTask
from moclip.store import (
    ShardWriter,
    SourceFacts,
    add_feature,
    create_store,
    failed_entries,
    first_difference,
    open_store,
    publish,
)

IMAGES = FeatureRequest(kinds=("image",), frames="uniform:3")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "test_vit.pth"
    torch.save(timm.create_model("test_vit", pretrained=False).state_dict(), file)
    return EncoderConfig("timm:test_vit", str(file))


@pytest.fixture(scope="module")
def extracted(tmp_path_factory, encoder, run_tasks_here):
    """Images and motion of seven clips, one of which is no video; the clips are gone."""
    folder = tmp_path_factory.mktemp("images")
    lines = ["path,label,codec,rating"]
    for i in range(6):
        videos.make_clip(folder / f"clip{i}.avi", frames=10 + i, seed=i)
        lines.append(f"clip{i}.avi,x,mine{i},{i}")
    videos.text_file(folder / "text.avi")
    table = folder / "list.csv"
    table.write_text("\n".join([*lines, "text.avi,y,,"]) + "\n")
    request = FeatureRequest(kinds=("image", "motion", "embedding"), frames="uniform:3", encoder=encoder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule, "run_tasks", run_tasks_here)
        jobs.run(jobs.prepare(jobs.Job(table, folder / "store.zarr", request, workers=1)))
    for clip in folder.glob("*.avi"):
        clip.unlink()
    return folder / "store.zarr"


@pytest.fixture
def store(tmp_path, extracted):
    return shutil.copytree(extracted, tmp_path / "store.zarr")


def extract(source, store, request):
    return jobs.run(jobs.prepare(jobs.Job(source, store, request, workers=1)))


def embed(store, encoder, **options):
    return reembed.run(
        reembed.prepare(EmbedJob(store, encoder, **{"rename": "embedding-new", "workers": 1, **options}))
    )


def files_of(store):
    return {path: path.read_bytes() for path in (store / "features").rglob("*") if path.is_file()}


class TestJpeg:
    def test_it_is_pillow_s_own(self):
        (rgb,) = videos.texture_frames(1, 400, 300)
        small = Image.fromarray(rgb).resize((341, 256), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=95, subsampling="4:4:4", optimize=True)
        assert encode_jpeg(rgb) == buffer.getvalue()
        assert np.array_equal(decode_jpeg(encode_jpeg(rgb)), np.asarray(Image.open(buffer)))

    def test_pixels_stay_close(self):
        (rgb,) = videos.texture_frames(1, 128, 96)
        assert np.abs(decode_jpeg(encode_jpeg(rgb)).astype(int) - rgb).mean() < 3

    @pytest.mark.parametrize(
        ("size", "expected"),
        [
            ((320, 240), (320, 240)),
            ((256, 9000), (256, 9000)),
            ((1280, 720), (455, 256)),
            ((720, 1280), (256, 455)),
            ((257, 257), (256, 256)),
            ((1, 1), (1, 1)),
        ],
    )
    def test_the_shorter_side_is_256_or_what_it_was(self, size, expected):
        assert fitted(*size) == expected

    def test_what_is_no_whole_jpeg_is_damaged(self):
        (rgb,) = videos.texture_frames(1, 64, 48)
        png = io.BytesIO()
        Image.fromarray(rgb).save(png, "PNG")
        for data in (b"", b"nonsense", encode_jpeg(rgb)[:300], encode_jpeg(rgb)[:40], png.getvalue()):
            with pytest.raises(VideoError) as caught:
                decode_jpeg(data)
            assert caught.value.reason == "damaged"


@pytest.mark.usefixtures("without_dask")
class TestExtraction:
    def test_sampled_frames_become_jpegs_without_any_encoder(self, tmp_path, monkeypatch):
        def load(*_):
            raise AssertionError("images need no encoder")

        for module in (features, embedding):
            monkeypatch.setattr(module, "load_encoder", load)
        clip = videos.make_clip(tmp_path / "clip.avi", frames=12)
        frames = videos_frames(clip)
        summary = extract(clip, tmp_path / "s.zarr", IMAGES)
        assert (summary.ok, summary.frames) == (1, 12)
        store = open_store(tmp_path / "s.zarr")
        assert store.read_bytes("image", "clip") == [encode_jpeg(frames[i]) for i in (2, 6, 10)]
        assert store.read("image", "clip", "frame_index").tolist() == [2, 6, 10]
        assert np.allclose(store.read("image", "clip", "pts_seconds"), np.array([2, 6, 10]) / 25)
        assert store.features["image"] == image_spec("uniform:3")
        assert set(store.features) == {"image"}

    def test_images_are_asked_for(self):
        assert "image" not in FeatureRequest().wanted
        config = features.resolve(IMAGES)
        assert (config.encoder, config.decode.motion, config.decode.accumulate) == (None, "none", False)
        assert features.resolve(FeatureRequest(kinds=("motion",))).decode.frames is None

    def test_images_may_have_another_name(self, tmp_path, encoder):
        clip = videos.make_clip(tmp_path / "clip.avi")
        extract(clip, tmp_path / "s.zarr", IMAGES)
        middle = FeatureRequest(kinds=("image",))
        with pytest.raises(FeatureError, match="--as NAME"):
            extract(clip, tmp_path / "s.zarr", middle)
        extract(clip, tmp_path / "s.zarr", FeatureRequest(kinds=("image",), rename="image-middle"))
        assert set(open_store(tmp_path / "s.zarr").features) == {"image", "image-middle"}
        embed(tmp_path / "s.zarr", encoder, images="image-middle")
        assert open_store(tmp_path / "s.zarr").read("embedding-new", "clip", "frame_index").tolist() == [12]

    def test_a_broken_video_has_a_failed_entry(self, tmp_path):
        extract(videos.text_file(tmp_path / "text.avi"), tmp_path / "s.zarr", IMAGES)
        (failed,) = failed_entries(open_store(tmp_path / "s.zarr"))
        assert (failed["feature"], failed["reason"]) == ("image", "not_video")


def videos_frames(path):
    import av

    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


@pytest.mark.usefixtures("without_dask")
class TestEmbed:
    def test_rows_are_what_the_encoder_says_of_the_stored_images(self, store, encoder):
        before, videos_before = files_of(store), open_store(store).videos
        summary = embed(store, encoder)
        assert (summary.videos, summary.frames, summary.ok, summary.failures) == (6, 18, 6, {})
        opened, model = open_store(store), load_encoder(encoder)
        direct = opened.resolve(f"embedding-{model.slug}")
        for video in opened.ids("image"):
            images = [decode_jpeg(jpeg) for jpeg in opened.read_bytes("image", video)]
            expected = model.encode(torch.stack([model.prepare(image) for image in images]))
            rows = opened.read("embedding-new", video)
            assert np.allclose(rows, expected, atol=2e-3)
            assert rows.dtype == np.float16
            for column in ("frame_index", "pts_seconds"):
                assert np.array_equal(opened.read("embedding-new", video, column), opened.read("image", video, column))
            assert cosines(rows, opened.read(direct, video)).min() > 0.99
        assert {path: files_of(store)[path] for path in before} == before
        assert opened.videos.equals(videos_before)
        assert videos_before["extra.codec"].to_pylist()[:2] == ["mine0", "mine1"]

    def test_the_specification_says_where_the_frames_came_from(self, store, encoder):
        embed(store, encoder)
        specs = open_store(store).features
        direct = next(
            spec for name, spec in specs.items() if name not in ("embedding-new",) and spec.kind == "embedding"
        )
        new = specs["embedding-new"]
        assert new.parameters == {**direct.parameters, "images": specs["image"].digest}
        assert new.digest != direct.digest
        with pytest.raises(FeatureError, match="--as NAME"):
            embed(store, encoder, rename=None)

    def test_a_rerun_does_nothing(self, store, encoder):
        embed(store, encoder)
        before = files_of(store)
        plan = reembed.prepare(EmbedJob(store, encoder, rename="embedding-new")).plan
        assert (plan.videos, len(plan.done), plan.failed_before, plan.without_images) == (0, 6, (), ("text",))
        assert embed(store, encoder).videos == 0
        assert files_of(store) == before

    def test_what_a_killed_run_finished_counts(self, store, encoder, monkeypatch):
        prepared = reembed.prepare(EmbedJob(store, encoder, rename="embedding-new", workers=1))
        tasks = prepared.plan.tasks
        assert len(tasks) == 3
        add_feature(store, "embedding-new", prepared.spec)
        Reembedding.of(prepared).run(tasks[0])  # and then the coordinator dies: nothing is published
        again = reembed.prepare(prepared.job)
        assert len(again.plan.done) == 2
        assert again.plan.videos == 4

        def stop(self, tasks, work, report):
            report(work.run(tasks[0], report))
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(schedule, "run_tasks", stop)
            with pytest.raises(KeyboardInterrupt):
                reembed.run(again)
        assert len(open_store(store).ids("embedding-new")) == 2 + len(again.plan.tasks[0].videos)
        assert embed(store, encoder).ok == 6

    def test_it_needs_no_libav(self):
        code = "import moclip.pipeline.extract.reembed, sys; print({'av', 'numba', 'torch'} & set(sys.modules))"
        printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        assert printed.strip() == "set()"

    def test_no_images_is_said(self, store, encoder):
        with pytest.raises(FeatureError, match="motion holds no images"):
            embed(store, encoder, images="motion")
        with pytest.raises(FeatureError, match=r"'nothing' is not there in .*, which has: .*image, motion; name one"):
            embed(store, encoder, images="nothing")
        with pytest.raises(SourceError, match="cannot name a feature"):
            embed(store, encoder, rename="Not good")
        with pytest.raises(SourceError, match="workers cannot work"):
            embed(store, encoder, workers=0)

    def test_weights_of_another_worker_are_refused(self, store, encoder, tmp_path):
        prepared = reembed.prepare(EmbedJob(store, encoder, rename="embedding-new", workers=1))
        other = tmp_path / "other.pth"
        torch.save(timm.create_model("test_vit", pretrained=False).state_dict(), other)
        add_feature(store, "embedding-new", prepared.spec)
        work = reembed.replace(Reembedding.of(prepared), encoder=EncoderConfig("timm:test_vit", str(other)))
        with pytest.raises(EncoderError, match="not the coordinator's"):
            work.run(prepared.plan.tasks[0])


def cosines(a, b):
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


@pytest.mark.usefixtures("without_dask")
class TestDamage:
    @pytest.fixture
    def damaged(self, tmp_path):
        """Three videos: b's second image is no JPEG, c failed when it was extracted."""
        (rgb,) = videos.texture_frames(1, 64, 48)
        good, path, spec = encode_jpeg(rgb), tmp_path / "s.zarr", image_spec("uniform:2")
        create_store(path)
        add_feature(path, "image", spec)
        writer = ShardWriter(path, feature="image", spec=spec, shard="one")
        for video, jpegs in {"a": [good, good], "b": [good, b"no JPEG"]}.items():
            writer.append_bytes(jpegs, frame_index=[3, 9], pts_seconds=[0.1, 0.3])
            writer.ok(SourceFacts(video, bytes=7, content_hash="00"))
        writer.fail(SourceFacts("c"), "truncated", "")
        writer.finish()
        publish(path)
        return path

    def test_what_does_not_decode_is_a_failed_entry_that_waits_for_retry_failed(self, damaged, encoder):
        summary = embed(damaged, encoder)
        assert (summary.ok, dict(summary.failures)) == (1, {("embedding-new", "damaged"): 1})
        opened = open_store(damaged)
        assert opened.ids("embedding-new") == ["a"]
        assert np.array_equal(opened.read("embedding-new", "a")[0], opened.read("embedding-new", "a")[1])
        assert {(row["id"], row["feature"]) for row in failed_entries(opened)} == {
            ("b", "embedding-new"),
            ("c", "image"),
        }
        assert reembed.prepare(EmbedJob(damaged, encoder, rename="embedding-new")).plan.videos == 0
        retry = reembed.prepare(EmbedJob(damaged, encoder, rename="embedding-new", retry_failed=True)).plan
        assert [video.id for task in retry.tasks for video in task.videos] == ["b"]
        assert (retry.failed_before, retry.without_images) == (("b",), ("c",))

    def test_damaged_bytes_of_the_store_are_no_embedding(self, damaged, encoder):
        for path in (damaged / "features" / "image").rglob("value/c/0"):
            content = bytearray(path.read_bytes())
            content[20] ^= 255
            path.write_bytes(content)
        assert dict(embed(damaged, encoder).failures) == {("embedding-new", "damaged"): 2}

    def test_a_value_that_is_not_finite_is_a_failed_entry(self, damaged, encoder, monkeypatch):
        real = Encoder.encode
        monkeypatch.setattr(Encoder, "encode", lambda self, batch: real(self, batch) * np.float32(1e9))
        seen = []
        prepared = reembed.prepare(EmbedJob(damaged, encoder, rename="embedding-new", workers=1))
        summary = reembed.run(prepared, seen.append)
        assert dict(summary.failures) == {("embedding-new", "not_finite"): 1, ("embedding-new", "damaged"): 1}
        assert seen[-1].failed == 2

    def test_what_kills_its_worker_is_recorded(self, damaged, encoder):
        prepared = reembed.prepare(EmbedJob(damaged, encoder, rename="embedding-new", workers=1))
        add_feature(damaged, "embedding-new", prepared.spec)
        videos_ = tuple(video for task in prepared.plan.tasks for video in task.videos)
        task = ShardTask(0, videos_, ("embedding-new",))

        class Ended:
            def result(self):
                return Death("a", "timeout", "it hung")

        seen = []
        (again,) = take_result(Ended(), Attempt(task, guarded=True), Reembedding.of(prepared), seen.append)
        assert again.task.videos == videos_[1:]
        publish(damaged)
        assert ("a", "timeout") in {(row["id"], row["reason"]) for row in failed_entries(open_store(damaged))}


def test_processes_of_dask_make_the_same_embeddings(tmp_path, extracted, encoder, monkeypatch, run_tasks_here):
    one, two = (shutil.copytree(extracted, tmp_path / name) for name in ("one.zarr", "two.zarr"))
    seen = []
    prepared = reembed.prepare(EmbedJob(one, encoder, rename="embedding-new", workers=2))
    summary = reembed.run(prepared, seen.append)
    assert (summary.videos, summary.frames, summary.ok) == (6, 18, 6)
    assert seen[-1].frames == 18
    monkeypatch.setattr(schedule, "run_tasks", run_tasks_here)
    embed(two, encoder)
    assert first_difference(open_store(one), open_store(two)) is None


def test_a_batch_crosses_the_borders_between_videos(tmp_path, encoder, monkeypatch):
    sizes = []
    real = Encoder.encode
    monkeypatch.setattr(Encoder, "encode", lambda self, batch: sizes.append(len(batch)) or real(self, batch))
    monkeypatch.setattr(Encoder, "batch", 4)
    model = load_encoder(encoder)
    spec = model.spec("uniform:3")
    create_store(tmp_path / "s.zarr")
    add_feature(tmp_path / "s.zarr", "e", spec)
    queue = embedding.EmbeddingQueue(model, spec, ShardWriter(tmp_path / "s.zarr", feature="e", spec=spec, shard="s"))
    sizes.clear()
    image = queue.prepare(np.zeros((32, 32, 3), np.uint8))
    for video in range(3):
        for _ in range(3):
            queue.add(image)
        queue.close(SourceFacts(str(video)), {"frame_index": range(3), "pts_seconds": range(3)})
    queue.fail(SourceFacts("3"), VideoError("empty", ""))
    queue.flush()
    assert sizes == [4, 4, 1]
    assert queue.failed == 1


def test_shards_stop_at_a_number_of_images():
    assert list(cut([1, 5, 1, 1, 1, 1], most=3, most_size=5)) == [slice(0, 2), slice(2, 5), slice(5, 6)]
    assert list(cut([], most=3, most_size=5)) == []


def test_a_store_that_cannot_be_written_is_no_video_s_fault(tmp_path, monkeypatch, without_dask):
    def append(self, rows, **columns):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shard.ShardWriter, "append_bytes", append)
    with pytest.raises(MoclipError, match="the disk is full"):
        extract(videos.make_clip(tmp_path / "clip.avi"), tmp_path / "s.zarr", IMAGES)


@pytest.mark.parametrize("container", ["zarr", "hdf5"])
def test_both_containers_hold_images(tmp_path, encoder, without_dask, container):
    create_store(tmp_path / "store", container)
    clip = videos.make_clip(tmp_path / "clip.avi", frames=12)
    extract(clip, tmp_path / "store", IMAGES)
    clip.unlink()
    assert embed(tmp_path / "store", encoder).frames == 3
    assert open_store(tmp_path / "store").read("embedding-new", "clip", "frame_index").tolist() == [2, 6, 10]
