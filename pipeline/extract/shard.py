"""One shard: a list of videos in, rows and receipts out. A pure, picklable task that knows nothing of Dask."""

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy.typing as npt

from moclip.errors import VideoError
from moclip.pipeline.extract.decode import decode_video
from moclip.pipeline.extract.decoding import DecodedVideo, SampledFrame
from moclip.pipeline.extract.embedding import (
    EmbeddingQueue,
    ImageCollector,
    Images,
    ImageTaker,
    cap_threads,
    worker_encoder,
)
from moclip.pipeline.extract.features import ExtractConfig
from moclip.pipeline.extract.full_disk import what_is_full
from moclip.pipeline.extract.image import encode_jpeg
from moclip.pipeline.extract.kinds import ACCUMULATED, EMBEDDING, IMAGE, MOTION
from moclip.pipeline.extract.motion_rows import MotionRows
from moclip.pipeline.extract.sampling import clip_id
from moclip.pipeline.extract.sources import VideoSource, file_size
from moclip.pipeline.extract.tasks import Progress, Report, ShardTask
from moclip.pipeline.extract.watch import watching
from moclip.store import ShardWriter, SourceFacts, VideoRows

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
        config = self._of(task)
        writers = _writers(self.store, task, config)
        embedding = _embedding_queue(config, writers)
        progress = self._decode(task, config, writers, embedding, report)
        if embedding:
            embedding.flush()
        for writer in writers.values():
            writer.finish()
        return progress

    def encodes(self, task: ShardTask[VideoSource]) -> bool:
        """Whether an embedding is among the task's features."""
        return self.config.only(task.features).encoder is not None

    def decode(self, task: ShardTask[VideoSource], report: Report = lambda _: None) -> Images:
        """The first half of :meth:`run`: every feature but the embedding, and the images for that."""
        config = self._of(task)
        if config.preparation is None:
            raise ValueError("this task has no embedding; run it whole")
        collector = ImageCollector(config.preparation)
        features = {name: spec for name, spec in config.features.items() if spec.kind != EMBEDDING}
        writers = _writers(self.store, task, replace(config, features=features))
        progress = self._decode(task, config, writers, collector, report)
        for writer in writers.values():
            writer.finish()
        return collector.collected(progress)

    def encode(self, task: ShardTask[VideoSource], decoded: Images) -> Progress:
        """The second half of :meth:`run`: the embedding."""
        config = self._of(task)
        features = {name: spec for name, spec in config.features.items() if spec.kind == EMBEDDING}
        writers = _writers(self.store, task, replace(config, features=features))
        queue = _embedding_queue(config, writers)
        if queue:
            queue.take_all(decoded)
        for writer in writers.values():
            writer.finish()
        return decoded.decoded

    def _of(self, task: ShardTask[VideoSource]) -> ExtractConfig:
        config = self.config.only(task.features)
        cap_threads(config.threads, encoding=config.encoder is not None)
        return config

    def _decode(
        self,
        task: ShardTask[VideoSource],
        config: ExtractConfig,
        writers: Mapping[str, ShardWriter],
        embedding: ImageTaker | None,
        report: Report,
    ) -> Progress:
        run = _ShardRun(task.number, config, writers, embedding)
        for source in task.videos:
            with watching(source.id):
                run.extract(source)
            report(run.progress())
        return run.progress()

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
    """The writers of one attempt, one a feature, and who takes images. It is the decoder's sink."""

    def __init__(
        self, number: int, config: ExtractConfig, writers: Mapping[str, ShardWriter], embedding: ImageTaker | None
    ) -> None:
        self._number = number
        self._config = config
        self._embedding = embedding
        motion = {kind: _of_kind(config, writers, kind) for kind in (MOTION, ACCUMULATED)}
        self._motion = {kind: _ClipWriter(writer) for kind, writer in motion.items() if writer}
        image = _of_kind(config, writers, IMAGE)
        self._image = _ClipWriter(image) if image else None
        self._sampled: list[tuple[int, int, float]] = []
        self._videos = self._frames = self._failed = 0

    def extract(self, source: VideoSource) -> None:
        facts = _unopened(source)
        try:
            decoded = decode_video(source.path, source.id, self._config.decode, self)
            closing = _facts(source, decoded, self._config)
        except _WriteFailed as error:
            raise error.__cause__ or error from None
        except VideoError as error:
            self._fail(facts, error)
        except FileNotFoundError:
            self._fail(facts, VideoError("missing", "it was there and is gone"))
        except Exception as error:
            if what_is_full(error):
                raise
            logger.debug("unexpected error in %s", source.id, exc_info=True)
            self._fail(facts, VideoError("error", f"{type(error).__name__}: {error}"))
        else:
            self._close(closing, decoded)

    def progress(self) -> Progress:
        return Progress(self._number, self._videos, self._frames, self._failed)

    def rows(self, rows: MotionRows) -> None:
        columns: dict[str, npt.NDArray[Any]] = {"pts_seconds": rows.pts_seconds, "picture_type": rows.picture_type}
        values: dict[str, Any] = {MOTION: rows.motion, ACCUMULATED: rows.accumulated}
        with _writing():
            for kind, writer in self._motion.items():
                writer.of_clip(rows.clip).append(values[kind], **columns)

    def frame(self, frame: SampledFrame) -> None:
        self._sampled.append((frame.clip, frame.index, frame.pts_seconds))
        if self._image:
            jpeg = encode_jpeg(frame.rgb)
            with _writing():
                columns: dict[str, Any] = {"frame_index": [frame.index], "pts_seconds": [frame.pts_seconds]}
                self._image.of_clip(frame.clip).append_bytes([jpeg], **columns)
        if self._embedding:
            image = self._embedding.prepare(frame.rgb)
            with _writing():
                self._embedding.add(image)

    def restart(self) -> None:
        self._sampled = []
        for writer in self._clip_writers():
            writer.restart()
        if self._embedding:
            self._embedding.restart()

    def _close(self, clips: Sequence[SourceFacts], decoded: DecodedVideo) -> None:
        error = decoded.motion_error
        for writer in self._motion.values():
            if error:
                writer.fail(clips[0], error)
            else:
                writer.ok(clips, decoded.motion_source)
        if self._image:
            self._image.ok(clips)
        if self._embedding:
            for facts, (_, frames) in zip(clips, groupby(self._sampled, key=itemgetter(0)), strict=True):
                _, index, seconds = zip(*frames, strict=True)
                self._embedding.close(facts, {"frame_index": index, "pts_seconds": seconds}, len(index))
        self._count(decoded.frames, failed=error is not None)

    def _fail(self, facts: SourceFacts, error: VideoError) -> None:
        for writer in self._clip_writers():
            writer.fail(facts, error)
        if self._embedding:
            self._embedding.fail(facts, error)
        self._count(0, failed=True)

    def _count(self, frames: int, *, failed: bool) -> None:
        self._sampled = []
        self._videos += 1
        self._frames += frames
        self._failed += failed

    def _clip_writers(self) -> list["_ClipWriter"]:
        return [*self._motion.values(), *([self._image] if self._image else [])]


class _ClipWriter:
    """A feature's writer, for the rows of one video, clip by clip; whose they are is known when all are there."""

    def __init__(self, writer: ShardWriter) -> None:
        self._writer = writer
        self._cut: list[VideoRows] = []
        self._clip = 0

    def of_clip(self, clip: int) -> ShardWriter:
        """The writer, ready for rows of this clip."""
        if clip > self._clip:
            self._cut.append(self._writer.cut())
            self._clip = clip
        return self._writer

    def ok(self, clips: Sequence[SourceFacts], motion_source: str | None = None) -> None:
        self._cut.append(self._writer.cut())
        for facts, rows in zip(clips, self._cut, strict=True):
            self._writer.ok(facts, rows, motion_source=motion_source)
        self.restart()

    def fail(self, facts: SourceFacts, error: VideoError) -> None:
        self._writer.fail(facts, error.reason, error.detail)
        self.restart()

    def restart(self) -> None:
        self._writer.restart()
        self._cut, self._clip = [], 0


@contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise _WriteFailed from error


def _embedding_queue(config: ExtractConfig, writers: Mapping[str, ShardWriter]) -> EmbeddingQueue | None:
    writer = _of_kind(config, writers, EMBEDDING)
    if writer is None or config.encoder is None:
        return None
    spec = next(spec for spec in config.features.values() if spec.kind == EMBEDDING)
    return EmbeddingQueue(worker_encoder(config.encoder), spec, writer)


def _writers(store: str, task: ShardTask[VideoSource], config: ExtractConfig) -> dict[str, ShardWriter]:
    return {
        name: ShardWriter(store, feature=name, spec=spec, shard=task.new_shard(spec.digest))
        for name, spec in config.features.items()
    }


def _of_kind(config: ExtractConfig, writers: Mapping[str, ShardWriter], kind: str) -> ShardWriter | None:
    names = (name for name, spec in config.features.items() if spec.kind == kind)
    return next((writers[name] for name in names if name in writers), None)


def _unopened(source: VideoSource) -> SourceFacts:
    """What is known of a video before, or without, decoding it."""
    return SourceFacts(source.id, source.relative_path, file_size(source.path), extra=source.extra)


def _facts(source: VideoSource, decoded: DecodedVideo, config: ExtractConfig) -> list[SourceFacts]:
    """The facts of a video, or of each clip of one that is cut, whose first clip the source then is."""
    with open(source.path, "rb") as file:
        content_hash = hashlib.file_digest(file, "sha256").hexdigest()
    whole = replace(
        _unopened(source),
        content_hash=content_hash,
        codec=decoded.codec,
        width=decoded.width,
        height=decoded.height,
        fps=decoded.fps,
        frames=decoded.frames,
        duration_s=decoded.duration_s,
        corrupt_frames=decoded.corrupt_frames,
    )
    if config.decode.clip_seconds is None:
        return [whole]
    starts = range(0, decoded.frames, decoded.clip_frames)
    lengths = [min(decoded.clip_frames, decoded.frames - start) for start in starts]
    return [
        # Which clip holds the corrupt frames is not known where there are several.
        replace(whole, id=clip_id(source.id, clip), frames=frames, duration_s=frames / decoded.fps,
                corrupt_frames=None if len(lengths) > 1 else decoded.corrupt_frames)
        for clip, frames in enumerate(lengths)
    ]  # fmt: skip
