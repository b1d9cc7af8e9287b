"""Frozen image encoders under their library's names, with their library's own preprocessing.

``open_clip:<model>/<weights>`` is a CLIP-like model with an image and a text side, ``timm:<model>`` an image
backbone whose pooled features are the embedding. Weights come by name through the library, or from a file.
torch, timm and open_clip take seconds to import, so they are imported where they are used.
"""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moclip.errors import EncoderError
from moclip.pipeline.weights import hash_weights, load_strictly, quiet_root_logger, reaching_weights, read_weights
from moclip.store import FeatureSpec

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncoderConfig:
    """Which encoder, ``open_clip:<model>/<weights>`` or ``timm:<model>``, and a file that replaces its weights.

    With a file, open_clip's weights name may be left out; it then only chooses the preprocessing.
    """

    name: str
    weights: str | None = None

    def __post_init__(self) -> None:
        if self.library not in _BUILDERS or not self.model:
            raise EncoderError(
                f"no encoder {self.name!r}; expected open_clip:<model>/<weights> or timm:<model>, "
                "for example open_clip:ViT-B-32-quickgelu/openai"
            )

    @property
    def library(self) -> str:
        return self.name.partition(":")[0]

    @property
    def model(self) -> str:
        return self.name.partition(":")[2]


@dataclass(frozen=True)
class Encoder:
    """A frozen image encoder in eval mode. ``dim`` is the length of one embedding."""

    name: str
    slug: str
    dim: int
    weights_sha256: str
    preprocessing: Mapping[str, Any]
    device: str
    _model: Any
    _transform: "Preparation"
    _tokenizer: Callable[[list[str]], "torch.Tensor"] | None

    @property
    def batch(self) -> int:
        """How many images go through the encoder at once."""
        return 256 if self.device.startswith("cuda") else 32

    @property
    def preparation(self) -> "Preparation":
        """What :meth:`prepare` does, without the model: it can be sent to other processes."""
        return self._transform

    def prepare(self, rgb: npt.NDArray[np.uint8]) -> "torch.Tensor":
        """One frame, (H, W, 3) uint8, resized and cropped by the library's own transform: (3, S, S) uint8.

        (float32, and normalised already, where that transform does not end with the usual steps.)
        """
        return self._transform(rgb)

    def normalised(self, batch: "torch.Tensor") -> "torch.Tensor":
        """Prepared frames (n, 3, S, S) as the model sees them: float32 on its device."""
        if self.device.startswith("cuda"):
            batch = batch.pin_memory()
        return self._transform.normalise(batch.to(self.device, non_blocking=True))

    def encode(self, batch: "torch.Tensor") -> npt.NDArray[np.float32]:
        """Prepared frames (n, 3, S, S) to embeddings (n, dim), not normalised.

        On a GPU, matrix products are in float16 (torch's autocast).
        """
        import torch

        on_gpu = self.device.startswith("cuda")
        with torch.inference_mode(), torch.autocast("cuda", torch.float16, enabled=on_gpu):
            images = self.normalised(batch)
            if on_gpu:
                images = images.contiguous(memory_format=torch.channels_last)
            rows = self._model(images) if self._tokenizer is None else self._model.encode_image(images)
        return _rows(rows)

    def encode_text(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Texts to embeddings (n, dim), not normalised. :class:`EncoderError` if the encoder has no text side."""
        import torch

        if self._tokenizer is None:
            raise EncoderError(f"{self.name} has no text side; texts need an open_clip encoder")
        with torch.inference_mode():
            rows = self._model.encode_text(self._tokenizer(list(texts)).to(self.device))
        return _rows(rows)

    def spec(self, frames_policy: str) -> FeatureSpec:
        """The specification of this encoder's embeddings of the frames that ``frames_policy`` samples."""
        return FeatureSpec(
            kind="embedding",
            dtype="float16",
            unit="1",
            parameters={
                "version": 1,
                "encoder": self.name,
                "weights_sha256": self.weights_sha256,
                "preprocessing": dict(self.preprocessing),
                "frames": frames_policy,
            },
            columns={"frame_index": "int32", "pts_seconds": "float64"},
            axes=("channel",),
        )


@dataclass(frozen=True)
class Preparation:
    """A library's transform in two parts: pixels are moved as bytes, and become numbers where the model is."""

    _shape: Callable[[Any], "torch.Tensor"]
    mean: "torch.Tensor | None" = None
    std: "torch.Tensor | None" = None

    def __call__(self, rgb: npt.NDArray[np.uint8]) -> "torch.Tensor":
        from PIL import Image

        return self._shape(Image.fromarray(rgb))

    @classmethod
    def of(cls, transform: Any) -> "Preparation":
        from torchvision import transforms

        *steps, to_tensor, normalise = transform.transforms
        if not isinstance(to_tensor, transforms.ToTensor) or not isinstance(normalise, transforms.Normalize):
            return cls(transform)
        mean, std = (_channels(values) for values in (normalise.mean, normalise.std))
        return cls(transforms.Compose([*steps, transforms.PILToTensor()]), mean, std)

    def normalise(self, batch: "torch.Tensor") -> "torch.Tensor":
        """The rest of the transform, with the library's own arithmetic."""
        if self.mean is None or self.std is None:
            return batch
        return batch.float().div(255).sub_(self.mean.to(batch.device)).div_(self.std.to(batch.device))


def _channels(values: Any) -> "torch.Tensor":
    import torch

    return torch.as_tensor(values, dtype=torch.float32).view(-1, 1, 1)


@dataclass(frozen=True)
class _Parts:
    """What a library gives for a name: the model, its transform, the transform in JSON, a tokenizer or None."""

    model: Any
    transform: Callable[[Any], "torch.Tensor"]
    preprocessing: dict[str, Any]
    tokenizer: Callable[[list[str]], "torch.Tensor"] | None = None


def load_encoder(config: EncoderConfig, device: str = "cpu") -> Encoder:
    """Build an encoder. :class:`EncoderError`, in one line, if it is unknown or its weights are out of reach."""
    import torch

    parts = _BUILDERS[config.library](config)
    model = parts.model.eval().requires_grad_(False)
    digest = hash_weights(model.state_dict())
    layout = torch.channels_last if device.startswith("cuda") else torch.preserve_format
    model = model.to(device, memory_format=layout)
    slug = re.sub(r"[^a-z0-9]+", "-", config.model.lower()).strip("-")
    encoder = Encoder(
        name=config.name,
        slug=f"{slug}-{digest[:8]}" if config.weights else slug,
        dim=0,
        weights_sha256=digest,
        preprocessing=parts.preprocessing,
        device=device,
        _model=model,
        _transform=Preparation.of(parts.transform),
        _tokenizer=parts.tokenizer,
    )
    probe = encoder.encode(torch.stack([encoder.prepare(np.zeros((64, 64, 3), np.uint8))]))
    return Encoder(**{**_shallow(encoder), "dim": probe.shape[1]})


def image_tower(name: str) -> tuple[Any, int]:
    """The image side of the encoder ``name`` on torch's ``meta`` device, without weights, and the side of its input.

    :class:`EncoderError` if the libraries here do not have it: nothing is fetched, as a stranger's store may name it.
    """
    import torch

    config = EncoderConfig(name)
    if ":" in config.model:
        raise EncoderError(f"{name} is described elsewhere, which is not asked here")
    if config.library == "timm":
        import timm

        with torch.device("meta"):
            backbone = timm_backbone(config.model, pretrained=False)
        library: Any = timm.data
        return backbone, int(library.resolve_model_data_config(backbone)["input_size"][-1])
    import open_clip

    name = config.model.partition("/")[0]
    architecture = open_clip.get_model_config(name)
    if architecture is None:
        raise EncoderError(f"open_clip has no model {name!r}")
    with torch.device("meta"):
        tower: Any = open_clip.model._build_vision_tower(
            architecture["embed_dim"], architecture["vision_cfg"], architecture.get("quick_gelu", False)
        )
    return tower, int(architecture["vision_cfg"].get("image_size", 224))


def timm_backbone(model: str, weights: str | None = None, *, pretrained: bool = True, in_chans: int = 3) -> Any:
    """A timm model without its classifier: images to pooled features, ``num_features`` long.

    Its weights are those of the file ``weights``, else timm's own by name, else (``pretrained=False``) random.
    """
    import timm

    if not model.startswith("hf-hub:") and not timm.is_model(model):
        close = ", ".join(timm.list_models(f"*{model.split('.')[0]}*")[:5])
        raise EncoderError(f"timm has no model {model!r}" + (f"; close to it: {close}" if close else ""))
    if weights is not None or not pretrained:
        backbone = timm.create_model(model, pretrained=False, num_classes=0, in_chans=in_chans)
        if weights is not None:
            load_strictly(backbone, _without_head(read_weights(weights), backbone), weights)
        return backbone
    if not model.startswith("hf-hub:"):
        known = timm.get_pretrained_cfg(model, allow_unregistered=True)
        if known is None or not known.has_weights:
            raise EncoderError(f"timm has no weights for {model!r}; give a file with --weights FILE")
    with reaching_weights(f"timm:{model}"):
        return timm.create_model(model, pretrained=True, num_classes=0)


def _build_timm(config: EncoderConfig) -> _Parts:
    import timm

    model = timm_backbone(config.model, config.weights)
    library: Any = timm.data
    data = library.resolve_model_data_config(model)
    transform = library.create_transform(**data, is_training=False)
    return _Parts(model, transform, {"library": "timm", **_plain(data)})


def _build_open_clip(config: EncoderConfig) -> _Parts:
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg
    from open_clip.transform import PreprocessCfg, image_transform_v2

    name, _, tag = config.model.partition("/")
    architecture = open_clip.get_model_config(name)
    if architecture is None:
        raise EncoderError(f"open_clip has no model {name!r}; python -c 'import open_clip; "
                           "print(open_clip.list_models())' lists them")  # fmt: skip
    weights = get_pretrained_cfg(name, tag) if tag else {}
    if config.weights is None and not weights:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise EncoderError(f"open_clip has no weights {tag!r} for {name}; it has: {tags}; or give --weights FILE")
    if weights.get("quick_gelu", tag == "openai") and not architecture.get("quick_gelu", False):
        log.warning(
            "%s: these weights were trained with QuickGELU and %s computes GELU; use %s-quickgelu/%s",
            config.name, name, name, tag,
        )  # fmt: skip
    known = {field.name for field in fields(PreprocessCfg)}
    options: dict[str, Any] = {"force_preprocess_cfg": {k: v for k, v in weights.items() if k in known}}
    with reaching_weights(config.name), quiet_root_logger():
        if config.weights is None:
            options["pretrained"] = open_clip.pretrained.download_pretrained(weights)
        model = open_clip.create_model(name, pretrained_text=False, **options)
        tokenizer = open_clip.get_tokenizer(name)
    if config.weights is not None:
        state = read_weights(config.weights)
        if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
            state = open_clip.model.convert_to_custom_text_state_dict(state)
        load_strictly(model, state, config.weights)
    preprocessing = PreprocessCfg(**model.visual.preprocess_cfg)
    transform = image_transform_v2(preprocessing, is_train=False)
    return _Parts(model, transform, {"library": "open_clip", **_plain(asdict(preprocessing))}, tokenizer)


_BUILDERS: dict[str, Callable[[EncoderConfig], _Parts]] = {"open_clip": _build_open_clip, "timm": _build_timm}


def _without_head(state: dict[str, "torch.Tensor"], backbone: Any) -> dict[str, "torch.Tensor"]:
    heads = backbone.pretrained_cfg.get("classifier") or ()
    prefixes = tuple(f"{head}." for head in ((heads,) if isinstance(heads, str) else heads))
    own = backbone.state_dict()
    return {name: value for name, value in state.items() if name in own or not name.startswith(prefixes)}


def _rows(rows: "torch.Tensor") -> npt.NDArray[np.float32]:
    return np.asarray(rows.float().cpu().numpy(), np.float32)


def _shallow(encoder: Encoder) -> dict[str, Any]:
    return {field.name: getattr(encoder, field.name) for field in fields(encoder)}


def _plain(value: Any) -> Any:
    """The same in JSON's types: tuples become lists."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value
