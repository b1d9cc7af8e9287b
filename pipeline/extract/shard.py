"""One shard: a list of videos in, rows and receipts out. A pure, picklable task that knows nothing of Dask."""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from moclip.errors import VideoError
from moclip.pipeline.extract.decode import DecodedVideo, MotionRows, SampledFrame, decode_video
from moclip.pipeline.extract.embedding import EmbeddingQueue, cap_threads, worker_encoder
from moclip.pipeline.extract.features import ExtractConfig
from moclip.pipeline.extract.image import encode_jpeg
from moclip.pipeline.extract.kinds import ACCUMULATED, EMBEDDING, IMAGE, MOTION
from moclip.pipeline.extract.sources import VideoSource, file_size
from moclip.pipeline.extract.tasks import Progress, Report, ShardTask
from moclip.store import ShardWriter, SourceFacts

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Extraction:
    """An extraction into ``store``: what a worker needs to know, the same for every shard."""

    store: str
    config: ExtractConfig

    def run(self, task: ShardTask[VideoSource], report: Report = lambda _: None) -> Progress:
        """Extract a shard's videos, one after the other; a broken video is a failed entry.

        Raises only if the store cannot be written.
        """
        config = self.config.only(task.features)
        cap_threads(config.threads, encoding=config.encoder is not None)
        run = _ShardRun(self.store, task, config, report)
        for source in task.videos:
            run.extract(source)
        return run.finish()

    def give_up(self, task: ShardTask[VideoSource], reason: str, detail: str) -> Progress:
        """Write a failed entry for every video of a task that could not be run to its end."""
        writers = _writers(self.store, task, self.config.only(task.features))
        for writer in writers.values():
            for source in task.videos:
                writer.fail(_unopened(source), reason, detail)
            writer.finish()
        return Progress(task.number, len(task.videos), 0, len(task.videos))


class _WriteFailed(Exception):
    """The store could not be written: not the video's fault, and no entry of it."""


class _ShardRun:
    """The writers of one attempt, one a feature, and the frames that wait for the encoder."""

    def __init__(self, store: str, task: ShardTask[VideoSource], config: ExtractConfig, report: Report) -> None:
        self._task = task
        self._config = config
        self._report = report
        self._writers = _writers(store, task, config)
        self._motion = _of_kind(config, self._writers, MOTION)
        self._accumulated = _of_kind(config, self._writers, ACCUMULATED)
        self._image = _of_kind(config, self._writers, IMAGE)
        self._embedding = _embedding_queue(config, self._writers)
        self._videos = self._frames = self._failed = 0

    def extract(self, source: VideoSource) -> None:
        facts = _unopened(source)
        try:
            decoded = decode_video(source.path, source.id, self._config.decode, self._emit)
            facts = _facts(source, decoded)
            jpegs = [encode_jpeg(frame.rgb) for frame in decoded.sampled] if self._image else []
            prepared = [self._embedding.prepare(frame.rgb) for frame in decoded.sampled] if self._embedding else []
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
            self._close(facts, decoded, jpegs, prepared)
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

    def _close(self, facts: SourceFacts, decoded: DecodedVideo, jpegs: list[bytes], prepared: list[Any]) -> None:
        for writer in filter(None, (self._motion, self._accumulated)):
            if decoded.motion_error:
                writer.fail(facts, decoded.motion_error.reason, decoded.motion_error.detail)
            else:
                writer.ok(facts)
        if self._image:
            self._image.append_bytes(jpegs, **_columns(decoded.sampled))
            self._image.ok(facts)
        if self._embedding:
            self._embedding.add(facts, prepared, _columns(decoded.sampled))
        self._videos += 1
        self._frames += decoded.frames
        self._failed += decoded.motion_error is not None

    def _fail(self, facts: SourceFacts, error: VideoError) -> None:
        for writer in filter(None, (self._motion, self._accumulated, self._image)):
            writer.fail(facts, error.reason, error.detail)
        if self._embedding:
            self._embedding.fail(facts, error)
        self._videos += 1
        self._failed += 1


def _embedding_queue(config: ExtractConfig, writers: Mapping[str, ShardWriter]) -> EmbeddingQueue | None:
    writer = _of_kind(config, writers, EMBEDDING)
    if writer is None or config.encoder is None:
        return None
    spec = next(spec for spec in config.features.values() if spec.kind == EMBEDDING)
    return EmbeddingQueue(worker_encoder(config.encoder), spec, writer)


def _columns(frames: Sequence[SampledFrame]) -> dict[str, Any]:
    return {
        "frame_index": [frame.index for frame in frames],
        "pts_seconds": [frame.pts_seconds for frame in frames],
    }


def _writers(store: str, task: ShardTask[VideoSource], config: ExtractConfig) -> dict[str, ShardWriter]:
    return {
        name: ShardWriter(store, feature=name, spec=spec, shard=task.new_shard(spec.digest))
        for name, spec in config.features.items()
    }


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
