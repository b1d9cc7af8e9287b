"""Zero-shot classification: a class is named in a few sentences, and a clip gets the class it is closest to.

CLIP (arXiv 2103.00020): each class's text embeddings are averaged, then normalised; a score is 100 times
the cosine.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from moclip.errors import RunError
from moclip.pipeline.backbones import Encoder, EncoderConfig, load_encoder
from moclip.pipeline.learn.clips import read_labelled
from moclip.pipeline.learn.data import choose_device
from moclip.pipeline.learn.metrics import Evaluation, score
from moclip.store import Store, open_store

TEMPLATES = (
    "a frame from a clip that shows {}.",
    "a person in the middle of {}.",
    "somebody is {} here.",
    "people who are {}.",
    "a still of the activity called {}.",
    "this is what {} looks like.",
    "home footage of {}.",
    "a sports camera's view of {}.",
    "{}, filmed from a distance.",
    "{}, seen up close.",
    "a blurry moment of {}.",
    "an example of the action {}.",
)


def phrase(label: str) -> str:
    """A label as words: ``HandstandPushups``, ``handstand_pushups`` and ``handstand pushups`` mean the same."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", label)
    return " ".join(words.replace("_", " ").replace("-", " ").lower().split())


def class_embeddings(encoder: Encoder, classes: Sequence[str]) -> npt.NDArray[np.float32]:
    """One unit vector a class, (classes, dim): the mean over the templates, then normalised."""
    texts = [template.format(phrase(name)) for name in classes for template in TEMPLATES]
    rows = encoder.encode_text(texts).reshape(len(classes), len(TEMPLATES), -1).mean(1)
    return _normalised(rows)


def zeroshot(
    store_path: str | Path,
    *,
    split: str | None = None,
    feature: str = "embedding",
    weights: str | None = None,
    device: str = "auto",
) -> Evaluation:
    """Classify a store's embeddings by the names of its classes: the test side of ``split``, or every
    labelled clip.

    The encoder is the one that made the embedding; ``weights`` is a file with its weights.
    :class:`RunError` if it has no text side, or the weights are not those that the embedding was made with.
    """
    store = open_store(store_path)
    name = store.resolve(feature)
    encoder = _encoder_of(store, name, weights, str(choose_device(device)))
    clips, classes, missing = read_labelled(store, split, feature=name)
    rows = store.read_all(name, clips.ids)
    images = _normalised(np.stack([some.astype(np.float32).mean(0) for some in rows]))
    logits = torch.from_numpy(100.0 * images @ class_embeddings(encoder, classes).T)
    return score(logits, clips, classes, split=split or "all", protocol="zero-shot", missing=missing)


def _encoder_of(store: Store, feature: str, weights: str | None, device: str) -> Encoder:
    parameters = store.features[feature].parameters
    made_by = str(parameters.get("encoder"))
    if not made_by.startswith("open_clip:"):
        raise RunError(f"{feature} was made by {made_by}, which has no text side; extract with an open_clip encoder")
    encoder = load_encoder(EncoderConfig(made_by, weights), device)
    if encoder.weights_sha256 != parameters.get("weights_sha256"):
        raise RunError(
            f"{feature} was made with other weights ({str(parameters.get('weights_sha256'))[:8]}) than "
            f"{weights or made_by} ({encoder.weights_sha256[:8]}); give the same file with --weights"
        )
    return encoder


def _normalised(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12), np.float32)
