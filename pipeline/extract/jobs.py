"""An extraction as a job: list, plan what is missing, run it, publish."""

from dataclasses import dataclass, replace
from pathlib import Path

from moclip.errors import SourceError, TooManyFailuresError
from moclip.pipeline.extract import schedule
from moclip.pipeline.extract.cluster import Cluster
from moclip.pipeline.extract.features import ExtractConfig, FeatureRequest, resolve
from moclip.pipeline.extract.labelling import label_new
from moclip.pipeline.extract.plan import Plan, make_plan
from moclip.pipeline.extract.shard import Extraction
from moclip.pipeline.extract.sources import SourceList, list_sources
from moclip.pipeline.extract.splits import read_splits
from moclip.pipeline.extract.summary import Summary, summarise
from moclip.pipeline.extract.tasks import Report, Totals
from moclip.store import add_feature, check_place, create_store, is_added, open_store, publish


@dataclass(frozen=True)
class Job:
    """Where and how an extraction runs. ``workers`` None means one a core; ``scheduler`` is a Dask address."""

    source: Path
    store: str | Path
    request: FeatureRequest
    splits: Path | None = None
    workers: int | None = None
    scheduler: str | None = None
    retry_failed: bool = False
    replace_changed: bool = False
    max_failures: int | None = None
    container: str | None = None


@dataclass(frozen=True)
class Prepared:
    """A job that is ready to run: nothing decoded yet, and nothing written."""

    job: Job
    sources: SourceList
    config: ExtractConfig
    plan: Plan
    cluster: Cluster
    unmatched: int


def prepare(job: Job) -> Prepared:
    """List the sources, load the encoder, and plan; raises before any video is decoded."""
    cluster = Cluster.of(job.workers, job.scheduler)
    sources = list_sources(job.source)
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
    config = resolve(job.request, cluster.threads)
    check_place(job.store, job.container)
    for name, spec in config.features.items():
        is_added(job.store, name, spec)
    plan = make_plan(
        job.store,
        sources.videos,
        tuple(config.features),
        workers=cluster.workers,
        retry_failed=job.retry_failed,
        replace_changed=job.replace_changed,
    )
    return Prepared(job, sources, config, plan, cluster, unmatched)


def run(prepared: Prepared, on_progress: Report = lambda _: None) -> Summary:
    """Run a prepared job. Whatever ends it, what was finished is published and the next run goes on from there.

    ``on_progress`` is called from another thread, with totals over all shards (``number`` is -1).
    :class:`TooManyFailuresError` if more than ``max_failures`` of the job's videos have a failed entry.
    """
    job = prepared.job
    create_store(job.store, job.container)
    for name, spec in prepared.config.features.items():
        add_feature(job.store, name, spec)
    label_new(job.store, prepared.sources.videos, prepared.sources.classes, explicit=job.splits is not None)
    totals = Totals(on_progress)
    work = Extraction(open_store(job.store).url, prepared.config)
    try:
        if prepared.plan.tasks:
            schedule.run_tasks(prepared.cluster, prepared.plan.tasks, work, totals.update)
    finally:
        publish(job.store)
        # A bucket has no locks: what a run that began at the same time wrote over is filled in again.
        label_new(job.store, prepared.sources.videos, prepared.sources.classes, explicit=False)
    ids = {source.id for source in prepared.sources.videos}
    summary = summarise(open_store(job.store), prepared.config.features.keys(), ids, totals.sum)
    failed = summary.failed_videos
    if job.max_failures is not None and failed > job.max_failures:
        reasons = ", ".join(f"{feature} {reason}: {n}" for (feature, reason), n in summary.failures.most_common())
        raise TooManyFailuresError(
            f"videos with a failed entry: {failed}, allowed: {job.max_failures} ({reasons}); "
            f"the store is good and `moclip info {job.store}` lists them"
        )
    return summary
