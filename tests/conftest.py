"""Fixtures that several test modules use."""

import itertools
import os
from pathlib import Path

import pytest
from s3 import bucket, s3, s3_server  # noqa: F401
from shards import SPEC

from moclip.pipeline.extract import schedule
from moclip.store import add_feature, create_store


@pytest.fixture(scope="session")
def run_tasks_here():
    """In place of Dask: a job's tasks, one after the other, for tests of everything but the processes."""

    def run(cluster, tasks, work, report):
        for task in tasks:
            report(work.run(task, report))

    return run


@pytest.fixture
def without_dask(monkeypatch, run_tasks_here):
    monkeypatch.setattr(schedule, "run_tasks", run_tasks_here)


@pytest.fixture(scope="session")
def data():
    """The folder of real clips and weights that MOCLIP_DATA names; tests that need it are skipped without."""
    folder = os.environ.get("MOCLIP_DATA")
    if not folder:
        pytest.skip("MOCLIP_DATA names no folder of real clips")
    return Path(folder)


@pytest.fixture(params=["zarr", "hdf5"])
def container(request):
    return request.param


@pytest.fixture(params=["disk", "s3"])
def backend(request):
    return request.param


@pytest.fixture
def new_root(request, backend, container, tmp_path):
    """Makes empty stores with the feature `motion`, on each backend, and gives their addresses."""
    base = str(tmp_path) if backend == "disk" else request.getfixturevalue("bucket")
    made = itertools.count()

    def new():
        root = f"{base}/store{next(made)}"
        create_store(root, container)
        add_feature(root, "motion", SPEC)
        return root

    return new
