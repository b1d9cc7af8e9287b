"""An extraction as a job: list, plan what is missing, run it, publish."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from moclip.errors import SourceError, TooManyFailuresError
from moclip.pipeline.extract import schedule
from moclip.pipeline.extract.cluster import Cluster
from moclip.pipeline.extract.features import ExtractConfig, FeatureRequest, resolve
from moclip.pipeline.extract.full_disk import naming_a_full_disk
from moclip.pipeline.extract.labelling import label_new
from moclip.pipeline.extract.plan import Plan, make_plan
from moclip.pipeline.extract.shard import Extraction
from moclip.pipeline.extract.sources import SourceList, Sources, list_sources
from moclip.pipeline.extract.splits import read_splits
from moclip.pipeline.extract.summary import Summary, summarise
from moclip.pipeline.extract.tasks import Progress, Report, Totals
from moclip.pipeline.extract.watch import Limited
from moclip.store import Store, add_feature, check_place, create_store, is_added, open_store, publish

#: Seconds: more than an honest film takes, and an end to what hangs.
TIMEOUT_PER_VIDEO = 6 * 3600.0


@dataclass(frozen=True)
class Job:
    """Where and how an extraction runs. ``workers`` None means one a core; ``scheduler`` is a Dask address, ``cluster``
    a file that names a Dask cluster. A video that takes longer than ``timeout_per_video`` seconds is a failed entry."""

    source: Path
    store: str | Path
    request: FeatureRequest
    splits: Path | None = None
    workers: int | None = None
    scheduler: str | None = None
    cluster: Path | None = None
    retry_failed: bool = False
    replace_changed: bool = False
    max_failures: int | None = None
    container: str | None = None
    timeout_per_video: float = TIMEOUT_PER_VIDEO


@dataclass(frozen=True)
class Prepared:
    """A job that is ready to run: nothing decoded yet, and nothing written."""

    job: Job
    sources: SourceList
    config: ExtractConfig
    plan: Plan
    cluster: Cluster
    unmatched: int


def prepare(job: Job, say: Callable[[str], None] = lambda _: None) -> Prepared:
    """List the sources, load the encoder, and plan; raises before any video is decoded.

    ``say`` is told what goes on, where that may take long: first something, then nothing.
    """
    cluster = Cluster.of(job.workers, job.scheduler, job.cluster)
    sources = list_sources(job.source, lambda count: say(f"listing videos: {count:,}"))
    say("")
    unmatched = 0
    if job.splits is not None:
        lists = read_splits(job.splits)
        videos, labelling = lists.apply(sources.videos)
        sources = replace(sources, videos=videos, classes=labelling.classes)
        unmatched = len(labelling.absent)
        if len(labelling.unlisted) == len(videos):
            raise SourceError(
                f"none of the {len(videos)} videos of {job.source} is in the lists of {job.splits}; "
                "they name videos by their path under the source, Class/name.avi"
            )
    if job.request.clip_seconds is not None:
        sources = replace(sources, videos=sources.videos.first_clips())
    config = resolve(job.request, cluster.threads)
    if config.encoder is not None:
        cluster = cluster.encoding()
    check_place(job.store, job.container)
    for name, spec in config.features.items():
        is_added(job.store, name, spec)
    say(f"planning {len(sources.videos):,} videos")
    plan = make_plan(
        job.store,
        sources.videos,
        tuple(config.features),
        workers=cluster.workers,
        retry_failed=job.retry_failed,
        replace_changed=job.replace_changed,
        report=lambda done, total: say(f"reading receipts: {done:,} of {total:,}"),
    )
    say("")
    return Prepared(job, sources, config, plan, cluster, unmatched)


def run(prepared: Prepared, on_progress: Report = lambda _: None) -> Summary:
    """Run a prepared job. Whatever ends it, what was finished is published and the next run goes on from there.

    ``on_progress`` is called from another thread, with totals over all shards (``number`` is -1).
    :class:`TooManyFailuresError` if more than ``max_failures`` of the job's videos have a failed entry.
    """
    with naming_a_full_disk(prepared.job.store):
        done = _extract(prepared, on_progress)
    job = prepared.job
    store = open_store(job.store)
    ids = _videos_of(prepared, store).ids
    summary = summarise(store, tuple(prepared.config.features), ids, done)
    failed = summary.failed_videos
    if job.max_failures is not None and failed > job.max_failures:
        reasons = ", ".join(f"{feature} {reason}: {n}" for (feature, reason), n in summary.failures.most_common())
        raise TooManyFailuresError(
            f"videos with a failed entry: {failed}, allowed: {job.max_failures} ({reasons}); "
            f"the store is good and `moclip info {job.store}` lists them"
        )
    return summary


def _extract(prepared: Prepared, on_progress: Report) -> Progress:
    job = prepared.job
    create_store(job.store, job.container)
    for name, spec in prepared.config.features.items():
        add_feature(job.store, name, spec)
    label_new(job.store, prepared.sources.videos, prepared.sources.classes, explicit=job.splits is not None)
    totals = Totals(on_progress)
    work = Extraction(open_store(job.store).url, prepared.config)
    try:
        if prepared.plan.tasks:
            cluster = prepared.cluster.reaching(work.store, prepared.plan.tasks[0].videos[0].path)
            limited = Limited(work, job.timeout_per_video)
            schedule.run_tasks(cluster, prepared.plan.tasks, limited, totals.update)
    finally:
        publish(job.store)
        # A bucket has no locks: what a run that began at the same time wrote over is filled in again.
        # And how many clips a video has is known now.
        videos = _videos_of(prepared, open_store(job.store))
        label_new(job.store, videos, prepared.sources.classes, explicit=False)
    return totals.sum


def _videos_of(prepared: Prepared, store: Store) -> Sources:
    """The job's videos; of those that are cut, all clips that the store has."""
    videos = prepared.sources.videos
    return videos if prepared.job.request.clip_seconds is None else videos.clips(store.videos["id"])
