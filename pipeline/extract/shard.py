"""One shard: a list of videos in, rows and receipts out. A pure, picklable task that knows nothing of Dask."""

import hashlib
import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from moclip.errors import EncoderError, VideoError
from moclip.pipeline.backbones import Encoder, EncoderConfig, load_encoder
from moclip.pipeline.extract.decode import (
    DecodedVideo,
    MotionRows,
    SampledFrame,
    decode_video,
)
from moclip.pipeline.extract.features import ACCUMULATED, EMBEDDING, MOTION, ExtractConfig
from moclip.pipeline.extract.sources import VideoSource, file_size
from moclip.store import ShardWriter, SourceFacts, limit_threads

logger = logging.getLogger(__name__)

#: How many frames go through the encoder at once; a batch crosses the borders between videos.
ENCODE_BATCH = 32


@dataclass(frozen=True)
class ShardTask:
    """The work of one task: these videos, and the names of the features that they lack."""

    number: int
    videos: tuple[VideoSource, ...]
    features: tuple[str, ...]


@dataclass(frozen=True)
class Progress:
    """What a task has done so far: videos closed, frames decoded, videos with a failed entry."""

    number: int
    videos: int = 0
    frames: int = 0
    failed: int = 0


def extract_shard(
    store: str, task: ShardTask, config: ExtractConfig, report: Callable[[Progress], None] = lambda _: None
) -> Progress:
    """Extract a shard's videos into ``store``, one after the other; a broken video is a failed entry.

    Each attempt writes under a name of its own, so that an attempt that was given up while it still ran cannot
    touch the files of the one that replaced it. Raises only if the store cannot be written.
    """
    config = config.only(task.features)
    _cap_threads(config)
    run = _ShardRun(store, task, config, report)
    for source in task.videos:
        run.extract(source)
    return run.finish()


def record_failure(store: str, task: ShardTask, config: ExtractConfig, reason: str, detail: str) -> Progress:
    """Write a failed entry for every video of a task that could not be run to its end."""
    writers = _writers(store, task, config.only(task.features))
    for writer in writers.values():
        for source in task.videos:
            writer.fail(_unopened(source), reason, detail)
        writer.finish()
    return Progress(task.number, len(task.videos), 0, len(task.videos))


class _WriteFailed(Exception):
    """The store could not be written: not the video's fault, and no entry of it."""


class _ShardRun:
    """The writers of one attempt, one a feature, and the frames that wait for the encoder."""

    def __init__(self, store: str, task: ShardTask, config: ExtractConfig, report: Callable[[Progress], None]) -> None:
        self._task = task
        self._config = config
        self._report = report
        self._writers = _writers(store, task, config)
        self._motion = _of_kind(config, self._writers, MOTION)
        self._accumulated = _of_kind(config, self._writers, ACCUMULATED)
        self._embedding = _EmbeddingQueue.for_shard(config, self._writers)
        self._videos = self._frames = self._failed = 0

    def extract(self, source: VideoSource) -> None:
        facts = _unopened(source)
        try:
            decoded = decode_video(source.path, source.id, self._config.decode, self._emit)
            facts = _facts(source, decoded)
            prepared = self._embedding.prepare(decoded.sampled) if self._embedding else None
        except _WriteFailed as error:
            raise error.__cause__ or error from None
        except VideoError as error:
            self._fail(facts, error)
        except FileNotFoundError:
            self._fail(facts, VideoError("missing", "it was there and is gone"))
        except Exception as error:
            logger.debug("unexpected error in %s", source.id, exc_info=True)
            self._fail(facts, VideoError("error", f"{type(error).__name__}: {error}"))
        else:
            self._close(facts, decoded, prepared)
        self._report(self._progress())

    def finish(self) -> Progress:
        if self._embedding:
            self._embedding.flush()
        for writer in self._writers.values():
            writer.finish()
        return self._progress()

    def _progress(self) -> Progress:
        return Progress(self._task.number, self._videos, self._frames, self._failed)

    def _emit(self, rows: MotionRows) -> None:
        columns: dict[str, npt.NDArray[Any]] = {"pts_seconds": rows.pts_seconds, "picture_type": rows.picture_type}
        try:
            if self._motion:
                self._motion.append(rows.motion, **columns)
            if self._accumulated and rows.accumulated is not None:
                self._accumulated.append(rows.accumulated, **columns)
        except Exception as error:
            raise _WriteFailed from error

    def _close(self, facts: SourceFacts, decoded: DecodedVideo, prepared: Any) -> None:
        for writer in filter(None, (self._motion, self._accumulated)):
            if decoded.motion_error:
                writer.fail(facts, decoded.motion_error.reason, decoded.motion_error.detail)
            else:
                writer.ok(facts)
        if self._embedding:
            self._embedding.add(facts, decoded.sampled, prepared)
        self._videos += 1
        self._frames += decoded.frames
        self._failed += decoded.motion_error is not None

    def _fail(self, facts: SourceFacts, error: VideoError) -> None:
        for writer in filter(None, (self._motion, self._accumulated)):
            writer.fail(facts, error.reason, error.detail)
        if self._embedding:
            self._embedding.fail(facts, error)
        self._videos += 1
        self._failed += 1


class _EmbeddingQueue:
    """Frames of several videos wait here until they fill a batch; entries leave in the order of the videos."""

    def __init__(self, encoder: Encoder, writer: ShardWriter) -> None:
        self._encoder = encoder
        self._writer = writer
        self._waiting: list[tuple[SourceFacts, tuple[SampledFrame, ...] | VideoError]] = []
        self._tensors: list[Any] = []

    @classmethod
    def for_shard(cls, config: ExtractConfig, writers: Mapping[str, ShardWriter]) -> "_EmbeddingQueue | None":
        writer = _of_kind(config, writers, EMBEDDING)
        if writer is None or config.encoder is None:
            return None
        encoder = _encoder(config.encoder)
        expected = next(spec for spec in config.features.values() if spec.kind == EMBEDDING)
        if encoder.weights_sha256 != expected.parameters["weights_sha256"]:
            raise EncoderError(f"the weights of {config.encoder.name} on this worker are not the coordinator's")
        return cls(encoder, writer)

    def prepare(self, frames: Sequence[SampledFrame]) -> list[Any]:
        return [self._encoder.prepare(frame.rgb) for frame in frames]

    def add(self, facts: SourceFacts, frames: Sequence[SampledFrame], tensors: list[Any]) -> None:
        slim = tuple(SampledFrame(f.index, f.pts_seconds, np.empty((0, 0, 3), np.uint8)) for f in frames)
        self._waiting.append((facts, slim))
        self._tensors += tensors
        if len(self._tensors) >= ENCODE_BATCH:
            self.flush()

    def fail(self, facts: SourceFacts, error: VideoError) -> None:
        self._waiting.append((facts, error))

    def flush(self) -> None:
        """Encode what waits and close its videos. A value that is not finite fails its video."""
        rows = self._encode()
        start = 0
        for facts, found in self._waiting:
            if isinstance(found, VideoError):
                self._writer.fail(facts, found.reason, found.detail)
                continue
            mine = rows[start : start + len(found)]
            start += len(found)
            if not np.isfinite(mine).all():
                self._writer.fail(facts, "not_finite", "the encoder gave a value that float16 cannot hold")
                continue
            self._writer.append(
                mine,
                frame_index=[frame.index for frame in found],
                pts_seconds=[frame.pts_seconds for frame in found],
            )
            self._writer.ok(facts)
        self._waiting, self._tensors = [], []

    def _encode(self) -> npt.NDArray[np.float16]:
        import torch

        if not self._tensors:
            return np.empty((0, self._encoder.dim), np.float16)
        batches = [torch.stack(batch) for batch in _batches(self._tensors)]
        with np.errstate(over="ignore"):
            return np.concatenate([self._encoder.encode(batch) for batch in batches]).astype(np.float16)


def _batches(tensors: list[Any]) -> list[list[Any]]:
    return [tensors[at : at + ENCODE_BATCH] for at in range(0, len(tensors), ENCODE_BATCH)]


@lru_cache(maxsize=1)
def _encoder(config: EncoderConfig) -> Encoder:
    """One model a process, loaded once."""
    import torch

    return load_encoder(config, "cuda" if torch.cuda.is_available() else "cpu")


def _cap_threads(config: ExtractConfig) -> None:
    """More threads than cores, over all workers, make every one of them slower."""
    limit_threads(config.threads)
    if config.encoder is not None:
        import torch

        torch.set_num_threads(config.threads)


def _writers(store: str, task: ShardTask, config: ExtractConfig) -> dict[str, ShardWriter]:
    attempt = uuid.uuid4().hex[:8]
    return {
        name: ShardWriter(store, feature=name, spec=spec, shard=f"{_shard_hash(task, spec.digest)}-{attempt}")
        for name, spec in config.features.items()
    }


def _shard_hash(task: ShardTask, digest: str) -> str:
    ids = "\0".join(source.id for source in task.videos)
    return hashlib.sha256(f"{digest}\0{ids}".encode()).hexdigest()[:12]


def _of_kind(config: ExtractConfig, writers: Mapping[str, ShardWriter], kind: str) -> ShardWriter | None:
    return next((writers[name] for name, spec in config.features.items() if spec.kind == kind), None)


def _unopened(source: VideoSource) -> SourceFacts:
    """What is known of a video before, or without, decoding it."""
    return SourceFacts(source.id, source.relative_path, file_size(source.path), extra=source.extra)


def _facts(source: VideoSource, decoded: DecodedVideo) -> SourceFacts:
    with open(source.path, "rb") as file:
        content_hash = hashlib.file_digest(file, "sha256").hexdigest()
    return SourceFacts(
        id=source.id,
        path=source.relative_path,
        bytes=file_size(source.path),
        content_hash=content_hash,
        codec=decoded.codec,
        width=decoded.width,
        height=decoded.height,
        fps=decoded.fps,
        frames=decoded.frames,
        duration_s=decoded.duration_s,
        corrupt_frames=decoded.corrupt_frames,
        extra=source.extra,
    )
