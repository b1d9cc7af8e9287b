"""Zero-shot classification: a class is named in a few sentences, and a clip gets the class it is closest to.

CLIP (arXiv 2103.00020): each class's text embeddings are averaged, then normalised; a score is 100 times
the cosine.
"""

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch.nn.functional import normalize

from moclip.errors import RunError
from moclip.pipeline.backbones import Encoder, EncoderConfig, load_encoder
from moclip.pipeline.learn.clips import Clips, Split, read_labelled
from moclip.pipeline.learn.data import choose_device
from moclip.pipeline.learn.metrics import Evaluation, by_name, score
from moclip.pipeline.learn.run_writer import RunWriter
from moclip.pipeline.learn.runs import Run
from moclip.store import Store, open_store

#: The name of what is tested where no split was asked for.
EVERY = "all"
_TEXT = "text"

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


def read_phrases(path: str | Path) -> dict[str, list[str]]:
    """A user's words for classes, from a TOML file of ``label = "words"`` or ``label = ["words", "other words"]``.

    :class:`RunError` if it holds anything else.
    """
    try:
        said = tomllib.loads(Path(path).read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RunError(f"the phrases {path} cannot be read: {error}") from error
    phrases = {label: [words] if isinstance(words, str) else words for label, words in said.items()}
    for label, words in phrases.items():
        if not isinstance(words, list) or not words or not all(isinstance(some, str) and some for some in words):
            raise RunError(f'{path} has {words!r} for {label}; expected "words", or ["words", "other words"]')
    return phrases


def class_embeddings(
    encoder: Encoder, classes: Sequence[str], phrases: Mapping[str, Sequence[str]] | None = None
) -> torch.Tensor:
    """One unit vector a class, (classes, dim): the mean over templates and phrases, then normalised."""
    of_class = [(phrases or {}).get(name, [phrase(name)]) for name in classes]
    texts = [[template.format(words) for words in some for template in TEMPLATES] for some in of_class]
    rows = torch.from_numpy(encoder.encode_text([text for some in texts for text in some]))
    return normalize(torch.stack([part.mean(0) for part in torch.split(rows, [len(some) for some in texts])]))


@dataclass(frozen=True)
class ZeroShotConfig:
    """What to classify: the test side of ``split``, or every labelled clip without one.

    The encoder is the one that made ``feature``; ``weights`` is a file with its weights. ``phrases`` are words for
    classes; the others' are made from their labels.
    """

    split: str | None = None
    feature: str = "embedding"
    weights: str | None = None
    phrases: Mapping[str, Sequence[str]] = field(default_factory=dict)
    device: str = "auto"


def zeroshot(store_path: str | Path, config: ZeroShotConfig, *, out: str | Path | None = None) -> Evaluation:
    """Classify a store's embeddings by the names of its classes. ``out`` becomes a run that holds the text embeddings.

    :class:`RunError` if the encoder has no text side, or the weights are not those that the embedding was made with.
    """
    store = open_store(store_path)
    name = store.resolve(config.feature)
    if unknown := sorted(set(config.phrases) - set(store.classes)):
        raise RunError(
            f"there are words for {', '.join(unknown)}, which the store does not have; "
            f"write its classes as they are: {', '.join(store.classes)}"
        )
    clips, classes, missing = read_labelled(store, config.split, feature=name)
    tested = config.split or EVERY
    encoder = _encoder_of(store, name, config.weights, str(choose_device(config.device)))
    text = class_embeddings(encoder, classes, config.phrases)
    found = _classified(store, name, clips, text, classes, tested, missing)
    if out is not None:
        nobody = clips.only(set())
        split = Split(tested, classes, nobody, nobody, clips, missing, "")
        with RunWriter(out, "zeroshot", replace(config, feature=name), split, {name: store.features[name]}) as writer:
            writer.write_weights({_TEXT: text})
            writer.write_test(found)
    return found


def evaluate_zeroshot(run: Run, store: Store, split: str | None) -> Evaluation:
    """Classify a store's embeddings by the text embeddings that a run holds; no encoder runs."""
    name = run.feature("embedding")
    run.check_features(store)
    found, names, missing = read_labelled(store, split, feature=name)
    clips = by_name(found, names, run.classes)
    return _classified(store, name, clips, _text(run, store, name), run.classes, split or EVERY, missing)


def text_of(run: Run, store: Store, feature: str, classes: Sequence[str]) -> torch.Tensor:
    """A zero-shot run's text embeddings, (classes, dim), in the order of ``classes``.

    :class:`RunError` if the run is of another embedding, or lacks a class.
    """
    if feature not in run.features:
        raise RunError(f"{run.path} is of {', '.join(run.features)}, not of {feature}; make one of it")
    run.check_features(store)
    if lacking := sorted(set(classes) - set(run.classes)):
        raise RunError(f"{run.path} has no text of {', '.join(lacking)}; make it again on this store")
    return _text(run, store, feature)[[run.classes.index(name) for name in classes]]


def _text(run: Run, store: Store, feature: str) -> torch.Tensor:
    text, some = run.weights().get(_TEXT), store.ids(feature)[:1]
    size = store.read(feature, some[0]).shape[1] if some else 0
    if text is None or text.dtype != torch.float32 or text.shape != (len(run.classes), size):
        raise RunError(f"{run.path}/model.safetensors does not hold a text embedding a class; make the run again")
    return text


def _classified(
    store: Store,
    feature: str,
    clips: Clips,
    text: torch.Tensor,
    classes: Sequence[str],
    split: str,
    missing: Mapping[str, int],
) -> Evaluation:
    if not len(clips):
        raise RunError(f"no clip of split {split!r} has rows of {feature}; extract them, or take another split")
    rows = store.read_all(feature, clips.ids)
    images = normalize(torch.stack([torch.from_numpy(some).float().mean(0) for some in rows]))
    return score(100 * images @ text.T, clips, classes, split=split, protocol="zero-shot", missing=missing)


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
