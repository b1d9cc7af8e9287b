"""Which features one extraction makes, and the specification that determines each one's values."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from moclip.errors import SourceError
from moclip.pipeline.backbones import EncoderConfig, Preparation, load_encoder
from moclip.pipeline.extract.decoding import DecodeConfig
from moclip.pipeline.extract.estimate import ESTIMATOR, MotionOption
from moclip.pipeline.extract.image import image_spec
from moclip.pipeline.extract.kinds import (
    ACCUMULATED,
    DEFAULT_KINDS,
    EMBEDDING,
    IMAGE,
    KINDS,
    MOTION,
    check_feature_name,
)
from moclip.pipeline.extract.reencode import SIZE
from moclip.pipeline.extract.sampling import FramePolicy
from moclip.store import FeatureSpec

DEFAULT_ENCODER = "open_clip:ViT-B-32-quickgelu/openai"
#: On longer GOPs the accumulation starts anew after this many frames: CoViAR's GOP.
WINDOW = 12


@dataclass(frozen=True)
class FeatureRequest:
    """What a person asks for: kinds of features and their settings. ``rename`` is the name of a single one.

    ``stride``, ``clip_seconds`` and ``exact`` are :class:`DecodeConfig`'s.
    """

    kinds: tuple[str, ...] = DEFAULT_KINDS
    motion: MotionOption = "auto"
    cell: int = 8
    frames: str = "middle"
    encoder: EncoderConfig | None = field(default_factory=lambda: EncoderConfig(DEFAULT_ENCODER))
    rename: str | None = None
    stride: int = 1
    clip_seconds: float | None = None
    exact: bool = False

    def __post_init__(self) -> None:
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown:
            raise SourceError(f"unknown feature {unknown[0]!r}; expected one of: {', '.join(KINDS)}")
        FramePolicy(self.frames)
        if not 1 <= self.cell <= 256:
            raise SourceError(f"a cell of {self.cell} pixels cannot be used; expected 1 to 256")
        if self.stride < 1 or (self.clip_seconds is not None and not 0 < self.clip_seconds < math.inf):
            raise SourceError(
                f"a stride of {self.stride} and clips of {self.clip_seconds} seconds; expected 1 or more, and above 0"
            )
        if not self.wanted:
            raise SourceError("nothing to extract: the motion is 'none' and so is the encoder")
        if self.rename and len(self.wanted) > 1:
            raise SourceError(f"--as names one feature, but {len(self.wanted)} are asked for; add --feature")
        if self.rename:
            check_feature_name(self.rename)

    @property
    def wanted(self) -> tuple[str, ...]:
        """The kinds that are left when motion or encoder are 'none'."""
        absent = {MOTION, ACCUMULATED} if self.motion == "none" else set()
        if self.encoder is None:
            absent.add(EMBEDDING)
        return tuple(kind for kind in KINDS if kind in self.kinds and kind not in absent)


#: The paper's own protocol: CoViAR's re-encode, the middle frame, CLIP ViT-B/32 with QuickGELU.
PRESETS: Mapping[str, FeatureRequest] = {
    "moclip-lite": FeatureRequest(kinds=(ACCUMULATED, EMBEDDING), motion="mpeg4"),
}


@dataclass(frozen=True)
class ExtractConfig:
    """What a shard task needs to know, the same for every shard: the features by name, and how to make them.

    ``preparation`` is the encoder's, for workers that decode and have no encoder. ``threads`` caps each of the
    libraries that a worker process uses.
    """

    features: Mapping[str, FeatureSpec]
    decode: DecodeConfig
    encoder: EncoderConfig | None
    preparation: Preparation | None = field(default=None, repr=False)
    threads: int = 1

    def only(self, names: Sequence[str]) -> "ExtractConfig":
        """The same, for some of the features: what the others would have cost is not done."""
        features = {name: self.features[name] for name in names}
        kinds = {spec.kind for spec in features.values()}
        decode = replace(
            self.decode,
            motion=self.decode.motion if kinds & {MOTION, ACCUMULATED} else "none",
            accumulate=ACCUMULATED in kinds,
            frames=self.decode.frames if kinds & {EMBEDDING, IMAGE} else None,
        )
        return replace(self, features=features, decode=decode, encoder=self.encoder if EMBEDDING in kinds else None)


def resolve(request: FeatureRequest, threads: int = 1) -> ExtractConfig:
    """Turn a request into specifications. Loads the encoder, so that missing weights show before any decoding."""
    policy = FramePolicy(request.frames)
    features: dict[str, FeatureSpec] = {}
    preparation = None
    for kind in request.wanted:
        if kind == EMBEDDING and request.encoder is not None:
            encoder = load_encoder(request.encoder)
            features[request.rename or f"{EMBEDDING}-{encoder.slug}"] = encoder.spec(request.frames)
            preparation = encoder.preparation
        elif kind == IMAGE:
            features[request.rename or kind] = image_spec(request.frames)
        else:
            features[request.rename or kind] = motion_spec(kind, request.motion, request.cell, request.stride)
    if request.clip_seconds is not None:
        features = {name: _of_clips(spec, request.clip_seconds) for name, spec in features.items()}
    decode = DecodeConfig(
        motion=request.motion,
        cell=request.cell,
        window=WINDOW,
        stride=request.stride,
        clip_seconds=request.clip_seconds,
        frames=policy,
        exact=request.exact,
    )
    config = ExtractConfig(features, decode, request.encoder, preparation, threads)
    return config.only(tuple(features))


def _of_clips(spec: FeatureSpec, seconds: float) -> FeatureSpec:
    """The specification where videos are cut: clips of other lengths must not lie under one name."""
    return replace(spec, parameters={**spec.parameters, "clip_seconds": seconds})


def motion_spec(kind: str, motion: MotionOption, cell: int, stride: int = 1) -> FeatureSpec:
    """The specification of ``motion`` or ``motion-accumulated``. ``size`` is null where it is each video's own."""
    accumulated = kind == ACCUMULATED
    return FeatureSpec(
        kind=kind,
        dtype="int16",
        unit="pixel" if accumulated else "quarter pixel",
        parameters={
            "version": 1,
            "motion": motion,
            "cell": cell,
            "size": list(SIZE) if motion == "mpeg4" else None,
            **({"estimator": dict(ESTIMATOR)} if motion in ("auto", "estimate") else {}),
            **({"window": WINDOW} if accumulated else {}),
            **({"stride": stride} if stride > 1 else {}),
        },
        columns={"pts_seconds": "float64", "picture_type": "uint8"},
        axes=("displacement", "y", "x"),
    )
