"""Clusters that a file names: real ones of Dask, of a queue's stand-in, and over SSH to this machine."""

import asyncio
import gc
import logging
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import videos
import yaml
from click.testing import CliRunner
from distributed import LocalCluster

from moclip.cli import main
from moclip.errors import SourceError
from moclip.pipeline.extract import cluster as cluster_module
from moclip.pipeline.extract import jobs, schedule
from moclip.pipeline.extract.cluster import Cluster, connect
from moclip.pipeline.extract.cluster_file import read_cluster_file
from moclip.pipeline.extract.features import FeatureRequest
from moclip.store import first_difference, open_store

COMPOSE = Path(__file__).parent.parent / "docker" / "compose.yaml"
#: Clusters that could not be started stay for the collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed cluster:ResourceWarning")
MOTION = FeatureRequest(kinds=("motion",), encoder=None)
LOCAL = """
class = "distributed.LocalCluster"
[arguments]
n_workers = 0
threads_per_worker = 1
host = "127.0.0.1"
dashboard_address = "127.0.0.1:0"
"""
QUEUE = """
class = "dask_jobqueue.{name}"
[arguments]
cores = 1
processes = 1
memory = "2GB"
local_directory = "{folder}"
worker_extra_args = {extra}
scheduler_options = {{host = "127.0.0.1", dashboard_address = "127.0.0.1:0"}}
"""


@pytest.fixture
def collected():
    yield
    gc.collect()


def left_to_the_collector(test):
    """For the clusters of others, which leave half-made ones, pipes and connections for the collector to warn of."""
    for what in ("ResourceWarning", "RuntimeWarning", "pytest.PytestUnraisableExceptionWarning"):
        test = pytest.mark.filterwarnings(f"ignore::{what}")(test)
    return pytest.mark.usefixtures("collected")(test)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(6):
        videos.make_clip(folder / f"clip{i}.avi", frames=10 + i, seed=i)
    return folder


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, corpus, run_tasks_here):
    store = tmp_path_factory.mktemp("undisturbed") / "store.zarr"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule, "run_tasks", run_tasks_here)
        jobs.run(jobs.prepare(jobs.Job(corpus, store, MOTION, workers=1)))
    return store


@pytest.fixture
def write(tmp_path):
    """Writes a cluster file; lines before its tables may be added."""

    def write(text, *lines):
        file = tmp_path / "cluster.toml"
        file.write_text("\n".join([*lines, text]))
        return file

    return write


@pytest.fixture
def queue(tmp_path):
    def text(name, *extra):
        return QUEUE.format(name=name, folder=tmp_path, extra=list(extra))

    return text


@pytest.fixture
def stand_in_for_slurm(tmp_path, monkeypatch):
    """Commands sbatch and scancel that run a job's script here, at once. What they were asked is in the folder."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    scripts = {
        "sbatch": f'cp "$1" {folder}/script; cd {folder}; setsid sh script > log 2>&1 & echo Submitted batch job $!',
        "scancel": f'echo $1 >> {folder}/cancelled; kill -- "-$1"',
    }
    for name, body in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def refusal(file):
    """What is said of a cluster that cannot be had. Nothing holds on to it afterwards."""
    try:
        with connect(Cluster.of(None, None, file), 2):
            pytest.fail("it could be had")
    except SourceError as error:
        return str(error)


def extract(corpus, store, file):
    return jobs.run(jobs.prepare(jobs.Job(corpus, store, MOTION, cluster=file)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("class = ", "is no TOML file"),
        ("workers = 2", "class is missing"),
        ('class = "distributed.LocalCluster"\nworker = 2', "unknown 'worker'; expected only class, arguments"),
        ('class = "LocalCluster"', "expected a dotted path"),
        ('class = "os.system; x"', "expected a dotted path"),
        ('class = "distributed.LocalCluster"\nworkers = "2"', "workers is '2'; expected a whole number"),
        ('class = "distributed.LocalCluster"\nworkers = true', "workers is True; expected a whole number"),
        ('class = "distributed.LocalCluster"\nworkers = 0', "workers is 0; expected 1 or more"),
        ('class = "distributed.LocalCluster"\nworkers = 1\nadaptive = {maximum = 2}', "both workers and adaptive"),
        ('class = "distributed.LocalCluster"\nadaptive = {minimum = 2}', "adaptive names no maximum"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_by_what_is_wrong(write, text, message):
    with pytest.raises(SourceError, match=message):
        read_cluster_file(write(text))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(SourceError, match="there is no cluster file"):
        Cluster.of(None, None, tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('class = "dask_nowhere.NoCluster"', "needs `pip install dask-nowhere` here and on the workers"),
        ('class = "distributed.NoCluster"', "the module distributed has no NoCluster"),
        ('class = "pathlib.Path"', "is no Dask cluster"),
        ('class = "os.abort"', "is no Dask cluster"),
        ('class = "distributed.SpecCluster"\n[arguments]\nprocesse = 1', r"SpecCluster says TypeError.*processe"),
        ('class = "dask_jobqueue.SLURMCluster"', "SLURMCluster says ValueError: You must specify how much cores"),
        ('class = "distributed.SSHCluster"\n[arguments]\nhosts = []', "`hosts` must be a non empty list"),
    ],
)
@left_to_the_collector
def test_a_class_that_cannot_be_started_is_one_error(write, text, message):
    assert re.search(message, refusal(write(text)))


@left_to_the_collector
@pytest.mark.skipif(shutil.which("sbatch") is not None, reason="there is a Slurm")
def test_a_queue_that_refuses_a_job_is_an_error_and_not_a_wait(write, queue):
    said = refusal(write(queue("SLURMCluster"), "workers = 2"))
    assert re.search(r"SLURMCluster says FileNotFoundError.*sbatch", said)


def test_a_local_cluster_s_file(tmp_path, corpus, undisturbed, write):
    assert extract(corpus, tmp_path / "store.zarr", write(LOCAL, "workers = 2")).ok == 6
    assert first_difference(open_store(tmp_path / "store.zarr"), open_store(undisturbed)) is None


def test_a_number_of_workers_that_adapts_from_none(tmp_path, corpus, undisturbed, write):
    file = write(LOCAL, 'adaptive = {minimum = 0, maximum = 2, interval = "200ms"}')
    assert extract(corpus, tmp_path / "store.zarr", file).ok == 6
    assert first_difference(open_store(tmp_path / "store.zarr"), open_store(undisturbed)) is None


@left_to_the_collector
def test_jobs_of_a_queue(tmp_path, corpus, undisturbed, write, queue):
    file = write(queue("local.LocalCluster"), "workers = 2")
    assert extract(corpus, tmp_path / "store.zarr", file).ok == 6
    assert first_difference(open_store(tmp_path / "store.zarr"), open_store(undisturbed)) is None


def test_slurm_s_class_on_a_stand_in_for_slurm(tmp_path, corpus, undisturbed, write, queue, stand_in_for_slurm):
    file = write(queue("SLURMCluster", "--lifetime", "55m") + 'walltime = "01:00:00"', "workers = 1")
    assert extract(corpus, tmp_path / "store.zarr", file).ok == 6
    assert first_difference(open_store(tmp_path / "store.zarr"), open_store(undisturbed)) is None
    script = (stand_in_for_slurm / "script").read_text()
    assert "#SBATCH -t 01:00:00" in script
    assert "--lifetime 55m" in script
    assert len((stand_in_for_slurm / "cancelled").read_text().split()) == 1


def test_settings_reach_a_scheduler_that_a_file_starts(write):
    with connect(Cluster.of(None, None, write(LOCAL, "workers = 1")), 1) as client:
        assert client.cluster.scheduler.allowed_failures == 0


@pytest.fixture(scope="module")
def one_worker():
    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster:
        yield cluster


def test_the_dashboard_s_address_is_said(one_worker, caplog):
    caplog.set_level(logging.INFO, "moclip")
    with connect(Cluster.of(None, one_worker.scheduler_address), 1):
        pass
    assert f"the Dask dashboard is at {one_worker.dashboard_link}" in caplog.text


def test_what_a_worker_cannot_find_is_one_error(one_worker, tmp_path):
    cluster = Cluster(1, 1, one_worker.scheduler_address, reach=(str(tmp_path), str(tmp_path / "elsewhere")))
    with pytest.raises(SourceError, match=r"a worker cannot open .*elsewhere, which is there"), connect(cluster, 1):
        pass


def test_what_is_not_here_either_is_not_asked_of_workers(tmp_path):
    assert Cluster(1, 1).reaching(str(tmp_path), str(tmp_path / "no.avi")).reach == (str(tmp_path),)


def test_another_version_on_the_workers_is_one_error(one_worker, monkeypatch):
    monkeypatch.setattr(cluster_module, "__version__", "0.0")
    with (
        pytest.raises(SourceError, match=r"a worker has moclip .*, here is 0\.0"),
        connect(Cluster.of(None, one_worker.scheduler_address), 1),
    ):
        pass


@contextmanager
def no_workers():
    with LocalCluster(n_workers=0, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster:
        yield cluster


def test_waiting_for_workers_is_said(monkeypatch, caplog):
    monkeypatch.setattr(cluster_module, "_FIRST_WORD", 0.2)
    with no_workers() as place:
        timer = threading.Timer(0.5, place.scale, [1])
        timer.start()
        with connect(Cluster.of(None, place.scheduler_address), 1) as client:
            assert client.submit(sum, [1, 2]).result() == 3
        timer.join()
    assert f"waiting for workers: 0 have come; the Dask dashboard is at {place.dashboard_link}" in caplog.text


def test_ctrl_c_while_waiting_for_workers(tmp_path, corpus):
    hear = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = (
        f"{hear}; from moclip.pipeline.extract import cluster; cluster._FIRST_WORD = 0.5; from moclip.cli import main"
    )
    with no_workers() as place:
        arguments = [
            "extract",
            corpus,
            tmp_path / "s.zarr",
            "--encoder",
            "none",
            "--scheduler",
            place.scheduler_address,
        ]
        process = subprocess.Popen(
            [sys.executable, "-c", f"{code}; main()", *map(str, arguments)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        try:
            assert any("waiting for workers: 0 have come" in line for line in iter(process.stderr.readline, ""))
            os.killpg(process.pid, signal.SIGINT)
            _, err = process.communicate(timeout=60)
        finally:
            if process.poll() is None:
                process.kill()
                process.communicate()
    assert process.returncode == 130, err
    assert "Traceback" not in err


def test_one_place_only_and_the_plan_names_it(tmp_path, corpus, write):
    file = write(LOCAL, "workers = 3")
    arguments = ["extract", str(corpus), str(tmp_path / "s.zarr"), "--encoder", "none", "--cluster", str(file)]
    result = CliRunner().invoke(main, [*arguments, "--workers", "2"])
    assert (result.exit_code, "give one" in result.output) == (2, True)
    result = CliRunner().invoke(main, [*arguments, "--dry-run"])
    assert "6 videos in 6 shards on distributed.LocalCluster, 3 workers" in result.output


@contextmanager
def ssh_server(folder):
    """An SSH server on loopback that runs what it is told; its port. The user's key is folder/key."""
    asyncssh = pytest.importorskip("asyncssh")
    host, user = asyncssh.generate_private_key("ssh-ed25519"), asyncssh.generate_private_key("ssh-ed25519")
    user.write_private_key(folder / "key")
    user.write_public_key(folder / "key.pub")

    async def copy(source, target):
        while data := await source.read(65536):
            target.write(data)

    async def handle(process):
        child = await asyncio.create_subprocess_shell(
            process.command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        with suppress(BrokenPipeError):  # the client may leave first
            # All of the output, then the end: writing to a channel that was ended would end the whole connection.
            await asyncio.gather(copy(child.stdout, process.stdout), copy(child.stderr, process.stderr))
            process.exit(await child.wait())

    async def serve():
        server = await asyncssh.listen(
            "127.0.0.1", 0, server_host_keys=[host], authorized_client_keys=str(folder / "key.pub"),
            process_factory=handle, encoding=None,
        )  # fmt: skip
        known = host.export_public_key().decode()
        (folder / "known").write_text(f"[127.0.0.1]:{server.get_port()} {known}")
        return server

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    server = asyncio.run_coroutine_threadsafe(serve(), loop).result(30)
    try:
        yield server.get_port()
    finally:
        loop.call_soon_threadsafe(server.close)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.mark.slow
@left_to_the_collector
def test_machines_over_ssh(tmp_path, corpus, undisturbed, write):
    with ssh_server(tmp_path) as port:
        file = write(
            f"""
            class = "distributed.SSHCluster"
            [arguments]
            hosts = ["127.0.0.1", "127.0.0.1"]
            remote_python = "{sys.executable}"
            connect_options = {{port = {port}, username = "me", client_keys = ["{tmp_path}/key"],
                                known_hosts = "{tmp_path}/known"}}
            worker_options = {{nthreads = 1}}
            scheduler_options = {{port = 0, dashboard_address = "127.0.0.1:0"}}
        """.replace(",\n", ",")
        )
        assert extract(corpus, tmp_path / "store.zarr", file).ok == 6
    assert first_difference(open_store(tmp_path / "store.zarr"), open_store(undisturbed)) is None


def services():
    return yaml.safe_load(COMPOSE.read_text())["services"]


def compose_command(name):
    service = services()[name]
    return [*service.get("entrypoint", []), *service["command"]]


@pytest.mark.parametrize("name", ["scheduler", "worker", "extract"])
def test_compose_s_commands_parse(name, corpus):
    program, *arguments = [str(corpus) if word == "/videos" else word for word in compose_command(name)]
    if program == "dask":
        from dask.__main__ import main as dask_main  # noqa: F401
        from distributed.cli import dask_scheduler, dask_worker

        command = {"scheduler": dask_scheduler.main, "worker": dask_worker.main}[arguments.pop(0)]
    else:
        command = main.commands[arguments.pop(0)]
    command.make_context(program, arguments)


def test_compose_s_services_stand_on_each_other():
    found = services()
    for service in found.values():
        assert set(service.get("depends_on", [])) <= set(found)
    for name in ("scheduler", "worker", "extract", "bucket"):
        assert found[name]["volumes"] == found["worker"]["volumes"], "a video has one path everywhere"
        assert found[name]["environment"]["AWS_ENDPOINT_URL"] == "http://s3:9000"


@pytest.mark.slow
def test_compose_s_commands_run_without_containers(tmp_path, corpus, undisturbed, s3):
    """Its services as processes, with moto in the place of the S3 store."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    here = {"tcp://scheduler:8786": f"tcp://127.0.0.1:{port}", "8786": str(port), "0.0.0.0": "127.0.0.1"}
    here |= {"/videos": str(corpus), ":8787": "127.0.0.1:0"}

    def start(name):
        words = [here.get(word, word) for word in compose_command(name)]
        program = {"dask": "dask", "moclip": "moclip.cli"}.get(words[0])
        command = [sys.executable, *(["-m", program] if program else []), *words[1:]]
        with open(tmp_path / f"{name}.log", "w") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, cwd=tmp_path)

    assert start("bucket").wait(120) == 0
    servers = [start("scheduler"), start("worker")]
    try:
        assert start("extract").wait(120) == 0, (tmp_path / "extract.log").read_text()
    finally:
        for server in servers:
            server.terminate()
            server.wait(30)
    compared = open_store("s3://moclip/corpus.zarr").entries, open_store(undisturbed).entries
    contents = [{(row["feature"], row["id"]): row["content"] for row in entries.to_pylist()} for entries in compared]
    assert contents[1].items() <= contents[0].items()
    assert shlex.join(compose_command("extract")).endswith("--encoder none")
