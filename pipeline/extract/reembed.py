"""A new embedding of stored images: another encoder, and no video is opened.

The module and all it imports know nothing of libav: the videos may be gone.
"""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from moclip.errors import FeatureError, StoreFormatError, VideoError
from moclip.pipeline.backbones import Encoder, EncoderConfig, Preparation, load_encoder
from moclip.pipeline.extract import schedule
from moclip.pipeline.extract.cluster import Cluster
from moclip.pipeline.extract.embedding import (
    EmbeddingQueue,
    ImageCollector,
    Images,
    ImageTaker,
    cap_threads,
    worker_encoder,
)
from moclip.pipeline.extract.full_disk import naming_a_full_disk
from moclip.pipeline.extract.image import decode_jpeg
from moclip.pipeline.extract.kinds import EMBEDDING, IMAGE, check_feature_name
from moclip.pipeline.extract.plan import Tasks, cut, videos_a_shard
from moclip.pipeline.extract.summary import Summary, summarise
from moclip.pipeline.extract.tasks import Progress, Report, ShardTask, Totals
from moclip.pipeline.extract.watch import watching
from moclip.store import (
    FeatureSpec,
    ShardWriter,
    SourceFacts,
    Store,
    add_feature,
    is_added,
    open_store,
    publish,
)
from moclip.store.schema import EXTRA_PREFIX

#: A shard stops growing at so many images: a bound on what a killed task costs.
SHARD_IMAGES = 4096
_FIXED = frozenset(SourceFacts.__dataclass_fields__) - {"extra"}


@dataclass(frozen=True)
class EmbedJob:
    """What to embed, with what, and where it runs.

    ``images`` is the feature that holds the images, ``rename`` another name for the new one. ``device`` is cpu, cuda
    or auto. ``workers`` None means one a core; ``scheduler`` is a Dask address, ``cluster`` a file that names a Dask
    cluster.
    """

    store: str | Path
    encoder: EncoderConfig
    images: str = IMAGE
    rename: str | None = None
    device: str = "auto"
    workers: int | None = None
    scheduler: str | None = None
    cluster: Path | None = None
    retry_failed: bool = False

    def __post_init__(self) -> None:
        if self.rename:
            check_feature_name(self.rename)


@dataclass(frozen=True)
class EmbedPlan:
    """The tasks to run, and the ids that are left out: done, failed before, or without stored images."""

    tasks: Tasks[SourceFacts]
    done: tuple[str, ...]
    failed_before: tuple[str, ...]
    without_images: tuple[str, ...]

    @property
    def videos(self) -> int:
        return len(self.tasks.videos)


@dataclass(frozen=True)
class PreparedEmbed:
    """A job that is ready to run: the feature's name and specification, and what is missing of it."""

    job: EmbedJob
    feature: str
    spec: FeatureSpec
    preparation: Preparation
    images: str
    plan: EmbedPlan
    cluster: Cluster


def prepare(job: EmbedJob) -> PreparedEmbed:
    """Load the encoder and plan. Publishes what a killed run left finished, so that it counts."""
    cluster = Cluster.of(job.workers, job.scheduler, job.cluster).encoding()
    images = image_feature(open_store(job.store), job.images)
    encoder = load_encoder(job.encoder)
    publish(job.store)
    store = open_store(job.store)
    spec = embedding_spec(encoder, store.features[images])
    feature = job.rename or f"{EMBEDDING}-{encoder.slug}"
    is_added(job.store, feature, spec)
    plan = _plan(store, images, feature, workers=cluster.workers, retry_failed=job.retry_failed)
    return PreparedEmbed(job, feature, spec, encoder.preparation, images, plan, cluster)


def run(prepared: PreparedEmbed, on_progress: Report = lambda _: None) -> Summary:
    """Run a prepared job. Whatever ends it, what was finished is published and the next run goes on from there.

    ``on_progress`` is called from another thread, with totals over all shards (``number`` is -1).
    """
    job = prepared.job
    add_feature(job.store, prepared.feature, prepared.spec)
    totals = Totals(on_progress)
    work = Reembedding.of(prepared)
    with naming_a_full_disk(job.store):
        try:
            if prepared.plan.tasks:
                schedule.run_tasks(prepared.cluster.reaching(work.store), prepared.plan.tasks, work, totals.update)
        finally:
            publish(job.store)
    store = open_store(job.store)
    return summarise(store, [prepared.feature], store.videos["id"], totals.sum)


def image_feature(store: Store, name: str) -> str:
    """The full name of the feature whose images are meant; :class:`FeatureError` if there is none."""
    full = store.resolve(name)
    kind = store.features[full].kind
    if kind != IMAGE:
        raise FeatureError(f"{full} holds no images, but {kind}; `moclip extract … --feature image` stores them")
    return full


def embedding_spec(encoder: Encoder, images: FeatureSpec) -> FeatureSpec:
    """The specification of an encoder's embeddings of stored images: not that of the video's own frames."""
    spec = encoder.spec(str(images.parameters.get("frames")))
    return replace(spec, parameters={**spec.parameters, "images": images.digest})


def _plan(store: Store, images: str, feature: str, *, workers: int, retry_failed: bool) -> EmbedPlan:
    status = _status(store, feature)
    stored = store.ids(images)
    todo = [id_ for id_ in stored if status.get(id_) is None or (status[id_] == "failed" and retry_failed)]
    counts = store.row_counts(images, todo).tolist()
    runs = cut(counts, most=videos_a_shard(len(todo), workers), most_size=SHARD_IMAGES)
    return EmbedPlan(
        tasks=Tasks(_facts(store, todo), tuple((run, (feature,)) for run in runs)),
        done=tuple(id_ for id_ in stored if status.get(id_) == "ok"),
        failed_before=tuple(id_ for id_ in stored if status.get(id_) == "failed"),
        without_images=tuple(sorted(set(store.videos["id"].to_pylist()) - set(stored))),
    )


def _status(store: Store, feature: str) -> dict[str, str]:
    entries = store.entries.filter(pc.equal(store.entries["feature"], feature))
    return dict(zip(entries["id"].to_pylist(), entries["status"].to_pylist(), strict=True))


def _facts(store: Store, ids: list[str]) -> list[SourceFacts]:
    """What the store knows of these videos. New entries must repeat it: one with another size would replace them."""
    rows = store.videos.filter(pc.is_in(store.videos["id"], pa.array(ids, pa.string())))
    by_id = {row["id"]: _as_facts(row) for row in rows.to_pylist()}
    return [by_id[id_] for id_ in ids]


def _as_facts(row: Mapping[str, Any]) -> SourceFacts:
    extra = {_own_name(name): value for name, value in row.items() if name not in _FIXED and value is not None}
    return SourceFacts(**{name: row[name] for name in _FIXED}, extra=extra)


def _own_name(column: str) -> str:
    """What the source list called a column; the table of videos prefixes those that are called like a fixed one."""
    bare = column.removeprefix(EXTRA_PREFIX)
    return bare if bare in _FIXED else column


@dataclass(frozen=True)
class Reembedding:
    """An embedding of stored images: what a worker needs to know, the same for every shard.

    ``moment`` is another one in every run, so that a worker that outlives a run opens the store anew.
    """

    store: str
    images: str
    feature: str
    spec: FeatureSpec
    encoder: EncoderConfig
    preparation: Preparation
    device: str
    threads: int
    moment: str

    @classmethod
    def of(cls, prepared: PreparedEmbed) -> "Reembedding":
        """The work of a prepared job."""
        return cls(
            store=open_store(prepared.job.store).url,
            images=prepared.images,
            feature=prepared.feature,
            spec=prepared.spec,
            encoder=prepared.job.encoder,
            preparation=prepared.preparation,
            device=prepared.job.device,
            threads=prepared.cluster.threads,
            moment=uuid.uuid4().hex,
        )

    def run(self, task: ShardTask[SourceFacts], report: Report = lambda _: None) -> Progress:
        """Embed a shard's videos, one after the other; one whose images are damaged is a failed entry.

        Raises only if the store cannot be written.
        """
        writer = self._writer(task)
        queue = self._queue(writer)
        read = self._read(task, queue, report)
        queue.flush()
        writer.finish()
        return replace(read, failed=queue.failed)

    def encodes(self, task: ShardTask[SourceFacts]) -> bool:
        """Always."""
        return True

    def decode(self, task: ShardTask[SourceFacts], report: Report = lambda _: None) -> Images:
        """The first half of :meth:`run`: the stored images, prepared."""
        collector = ImageCollector(self.preparation)
        read = self._read(task, collector, report)
        return collector.collected(read)

    def encode(self, task: ShardTask[SourceFacts], decoded: Images) -> Progress:
        """The second half of :meth:`run`: the embedding."""
        writer = self._writer(task)
        queue = self._queue(writer)
        queue.take_all(decoded)
        writer.finish()
        return replace(decoded.decoded, failed=decoded.decoded.failed + queue.failed)

    def _queue(self, writer: ShardWriter) -> EmbeddingQueue:
        cap_threads(self.threads, encoding=True)
        return EmbeddingQueue(worker_encoder(self.encoder, self.device), self.spec, writer)

    def _read(self, task: ShardTask[SourceFacts], taker: ImageTaker, report: Report) -> Progress:
        store = _opened(self.store, self.moment)
        images = 0
        for done, facts in enumerate(task.videos, start=1):
            with watching(facts.id):
                images += self._embed(store, facts, taker)
            report(Progress(task.number, done, images, taker.failed))
        return Progress(task.number, len(task.videos), images, taker.failed)

    def give_up(self, task: ShardTask[SourceFacts], reason: str, detail: str) -> Progress:
        """Write a failed entry for every video of a task that could not be run to its end."""
        writer = self._writer(task)
        for facts in task.videos:
            writer.fail(facts, reason, detail)
        writer.finish()
        return Progress(task.number, len(task.videos), 0, len(task.videos))

    def _embed(self, store: Store, facts: SourceFacts, queue: ImageTaker) -> int:
        """Queue one video's images; how many there are, 0 if they cannot be read."""
        try:
            jpegs = store.read_bytes(self.images, facts.id)
            columns = {name: store.read(self.images, facts.id, name) for name in self.spec.columns}
            for jpeg in jpegs:
                queue.add(queue.prepare(decode_jpeg(jpeg)))
        except StoreFormatError as error:
            queue.fail(facts, VideoError("damaged", str(error)))
            return 0
        except VideoError as error:
            queue.fail(facts, error)
        else:
            queue.close(facts, columns)
        return len(jpegs)

    def _writer(self, task: ShardTask[SourceFacts]) -> ShardWriter:
        return ShardWriter(self.store, feature=self.feature, spec=self.spec, shard=task.new_shard(self.spec.digest))


@lru_cache(maxsize=1)
def _opened(url: str, moment: str) -> Store:
    return open_store(url)
