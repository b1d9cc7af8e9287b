"""Fixtures that several test modules use."""

import os
from pathlib import Path

import pytest

from moclip.pipeline.extract import jobs
from moclip.pipeline.extract.shard import extract_shard


@pytest.fixture(scope="session")
def run_tasks_here():
    """In place of Dask: an extraction's tasks, one after the other, for tests of everything but the processes."""

    def run(prepared, totals):
        for task in prepared.plan.tasks:
            totals.update(extract_shard(str(prepared.job.store), task, prepared.config, totals.update))

    return run


@pytest.fixture
def without_dask(monkeypatch, run_tasks_here):
    monkeypatch.setattr(jobs, "_run_tasks", run_tasks_here)


@pytest.fixture(scope="session")
def data():
    """The folder of real clips and weights that MOCLIP_DATA names; tests that need it are skipped without."""
    folder = os.environ.get("MOCLIP_DATA")
    if not folder:
        pytest.skip("MOCLIP_DATA names no folder of real clips")
    return Path(folder)
