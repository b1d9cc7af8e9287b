"""Real clips against what others made of them: CoViAR's arrays, timm's own pipeline. Needs MOCLIP_DATA."""

import os

import av
import numpy as np
import pytest
import sink
import timm
import torch
from PIL import Image

from moclip.pipeline.backbones import EncoderConfig
from moclip.pipeline.extract import jobs
from moclip.pipeline.extract.decoding import DecodeConfig
from moclip.pipeline.extract.features import FeatureRequest
from moclip.pipeline.extract.motion import Grid
from moclip.store import open_store

pytestmark = pytest.mark.data
LITE0 = "timm:tf_efficientnet_lite0"


@pytest.mark.parametrize("cell", [1, 8])
def test_motion_equals_coviar_s_in_36_of_36_frames(data, cell):
    grid = Grid(340, 256, cell)
    equal = {"accumulated": 0, "displacement": 0}
    for truth in sorted((data / "oracle").glob("*.npz")):
        _, taken = sink.decode(truth.with_suffix(".m4v"), DecodeConfig(cell=cell))
        accumulated = taken.all("accumulated")
        # CoViAR keeps whole pixels: quarter pixels, truncated as C does.
        displacement = np.trunc(taken.all("motion") / 4)
        with np.load(truth) as arrays:
            for k, frame in enumerate(arrays["frame"]):
                for name, ours in (("accumulated", accumulated), ("displacement", displacement)):
                    theirs = arrays[name][k].transpose(2, 0, 1)[:, grid.ys][:, :, grid.xs]
                    equal[name] += np.array_equal(ours[frame], theirs)
    assert equal == {"accumulated": 36, "displacement": 36}


@pytest.mark.parametrize(("corpus", "clips"), [("weizmann", 90), ("ucf8", 203)])
def test_every_clip_is_extracted_and_embeddings_are_timm_s(data, tmp_path, corpus, clips):
    weights = data / "weights" / "tf_efficientnet_lite0.pth"
    source = data / "data" / corpus / "videos"
    splits = data / "data" / corpus / "splits"
    request = FeatureRequest(encoder=EncoderConfig(LITE0, str(weights)))
    job = jobs.Job(source, tmp_path / "s.zarr", request, splits=splits if splits.exists() else None)
    summary = jobs.run(jobs.prepare(job))
    assert (summary.videos, summary.ok, summary.failures) == (clips, 3 * clips, {})

    store = open_store(tmp_path / "s.zarr")
    model = timm.create_model("tf_efficientnet_lite0", checkpoint_path=os.fspath(weights)).eval()
    model.reset_classifier(0)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    for row in store.videos.to_pylist()[:: clips // 10]:
        with av.open(os.fspath(source / row["path"])) as container:
            frames = list(container.decode(video=0))
        image = Image.fromarray(frames[len(frames) // 2].to_ndarray(format="rgb24"))
        with torch.inference_mode():
            theirs = model(transform(image)[None]).numpy()
        ours = store.read("embedding", row["id"]).astype(np.float32)
        # float16 keeps 11 bits; the batch a frame is in moves the last bits of float32.
        np.testing.assert_allclose(ours, theirs, rtol=2**-10, atol=2**-12)
