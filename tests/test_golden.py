"""What earlier versions wrote stays readable: the golden stores, made once by make_golden.py, against its formulas."""

import numpy as np
import pytest
from make_golden import CONTAINERS, GOLDEN, SPECS, VIDEOS, embedding, images, motion, picture_types, seconds

from moclip.store import failed_entries, open_store, verify


@pytest.fixture(params=CONTAINERS)
def golden(request):
    return open_store(GOLDEN / f"format1-{request.param}")


def test_rows_are_those_of_the_formulas(golden):
    for number, (video, (frames, grid)) in enumerate(VIDEOS.items()):
        if grid is not None:
            np.testing.assert_array_equal(golden.read("motion", video), motion(number, frames, grid))
            np.testing.assert_array_equal(golden.read("motion", video, "pts_seconds"), seconds(frames))
            np.testing.assert_array_equal(golden.read("motion", video, "picture_type"), picture_types(frames))
        np.testing.assert_array_equal(golden.read("embedding", video), embedding(number))
        assert golden.read_bytes("image", video) == images(number)
        assert golden.read("image", video, "frame_index").tolist() == [1, 3]


def test_tables_are_those_that_were_written(golden):
    assert golden.features == SPECS
    assert golden.videos["id"].to_pylist() == sorted(VIDEOS)
    assert golden.videos["year"].to_pylist() == [2000, 2001, 2002, 2003, 2004]
    assert golden.classes == ["up", "down"]
    assert golden.labels["split_1"].to_pylist() == ["train", "train", None, "test", "test"]
    assert [(row["id"], row["reason"]) for row in failed_entries(golden)] == [("b/zwei é", "no_vectors")]


def test_digests_stay_what_they_were(golden):
    digests = {name: spec.digest for name, spec in golden.features.items()}
    assert digests == DIGESTS


def test_every_byte_is_in_place(golden):
    assert verify(golden.url) == []


#: A digest that changes makes every store in the world look like another specification.
DIGESTS = {"embedding-golden": "8c1aeff055f70e20", "image": "00d44ed06783f5d5", "motion": "6c9ec4c43891346d"}
