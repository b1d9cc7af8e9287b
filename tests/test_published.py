"""What the published code does otherwise, piece by piece: the crops and mirror images of ``strict_reference``."""

from pathlib import Path

import numpy as np
import torch
from synthetic import corpus, write_store

from moclip.pipeline.learn.data import Motion
from moclip.pipeline.learn.frozen import ImageEmbeddings
from moclip.pipeline.learn.pooled import pool
from moclip.pipeline.learn.published import segment_views
from moclip.pipeline.learn.views import Augmentation
from moclip.store import open_store

CPU = torch.device("cpu")


def test_a_clips_segments_share_side_and_mirroring_and_each_has_its_own_box() -> None:
    how = Augmentation(64)
    each, views = segment_views(np.arange(5, 45), 3, how, np.random.default_rng(0))
    assert each.tolist() == np.repeat(np.arange(5, 45), 3).tolist()
    sides, mirrored = views.resize.view(40, 3), views.mirror.view(40, 3)
    assert sides.unique().tolist() == [64, 73, 85]
    assert mirrored.unique().tolist() == [False, True]
    assert (sides == sides[:, :1]).all()
    assert (mirrored == mirrored[:, :1]).all()
    for offset in (views.left, views.top):
        assert (offset >= 0).all()
        assert (offset <= views.resize - 64).all()
        assert (offset.view(40, 3) != offset.view(40, 3)[:, :1]).any()


def test_the_mirrored_five_of_ten_crops_are_mirrored_all_or_none(tmp_path: Path) -> None:
    store = open_store(write_store(tmp_path / "s.zarr", corpus(6)))
    motion = Motion(store, "motion-accumulated", store.ids("motion-accumulated"), CPU)
    seen: list[torch.Tensor] = []

    def features(images: torch.Tensor) -> torch.Tensor:
        seen.append(images)
        return images.flatten(1)[:, :1]

    list(pool(features, motion, 32, 1, 10, strict_reference=True))
    crops = torch.cat(seen).unflatten(0, (len(motion.ids), 10))
    same = (crops[:, :5] == crops[:, 5:]).flatten(2).all(2)
    assert (same == same[:, :1]).all()
    assert same[:, 0].unique().tolist() == [False, True]


def test_a_random_frame_is_drawn_once_and_one_that_is_missing_is_zeros(tmp_path: Path) -> None:
    clips = corpus(2)
    rows = {clip.id: np.arange(1, 10, dtype=np.float16)[:, None].repeat(16, 1) for clip in clips}
    rows[clips[0].id] = np.zeros((0, 16), np.float16)
    store = open_store(write_store(tmp_path / "s.zarr", clips, rows=rows))
    ids, everyone = [clip.id for clip in clips], np.arange(len(clips))

    def drawn(of: list[str], *, as_published: bool) -> list[list[float]]:
        images = ImageEmbeddings(store, "embedding-invented", of, CPU, frames="random", as_published=as_published)
        epochs = [images.of(everyone[: len(of)], np.random.default_rng(seed))[0] for seed in range(3)]
        return [epoch[:, 0, 0].tolist() for epoch in epochs]

    first, second, third = drawn(ids, as_published=True)
    assert first == second == third
    assert (first[0], min(first[1:]) > 0, len(set(first[1:])) > 1) == (0, True, True)
    first, second, third = drawn(ids[1:], as_published=False)
    assert first != second != third
