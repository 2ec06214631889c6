"""Tests of jobs on a Dask cluster of this machine: a scheduler and two worker processes, some of them killed.

The workers import this module, so it imports little.
"""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from threading import Lock

import dask
import pytest
from distributed import Client, LocalCluster
from paths import ROOT
from processes import wait_until

from deer_vla_ros.__main__ import main
from deer_vla_ros.errors import UserError
from deer_vla_ros.lab import cluster as cluster_module
from deer_vla_ros.lab.workers import spread
from deer_vla_ros.processes import end_with_parent


def _squarer(power: int):
    """A setup for `spread`. A job is what to do, and a number or a folder."""

    def work(job: tuple, on_progress):
        what, value = job
        on_progress()
        if what == "refuse":
            raise UserError(f"{value} is no job: give another")
        if what == "fail":
            return 1 // 0
        if what == "end":
            os._exit(3)
        if what == "leave":
            sys.exit("left")
        if what == "give a lock":
            return Lock()
        if what == "refuse with two values":
            raise _TwoValues("13 is no job", "give another")
        if what == "hold" and _is_first(Path(value)):
            time.sleep(3600)
        if what == "go on" and _is_first(Path(value)):
            while True:
                time.sleep(0.01)
                on_progress()
        return value**power if isinstance(value, int) else what

    return work


class _TwoValues(UserError):
    """Cannot be unpickled: an exception is made again from its message alone."""

    def __init__(self, what: str, remedy: str):
        super().__init__(f"{what}: {remedy}")


def _is_first(folder: Path) -> bool:
    """Whether no other process has asked before. The first one leaves its process id there."""
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    (folder / "new").write_text(str(os.getpid()))
    (folder / "new").rename(folder / "pid")
    return True


def _pid(folder: Path) -> int:
    """The process that _is_first let go on."""
    wait_until((folder / "pid").is_file, 240, "a job's begin")
    return int((folder / "pid").read_text())


def _environment() -> dict[str, str]:
    """The environment of processes that import this module."""
    paths = (ROOT / "test", ROOT / "test/lab", os.environ.get("PYTHONPATH", ""))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}


def _start(folder: Path, *command: str) -> subprocess.Popen:
    """`dask COMMAND`, at ports that the system chooses."""
    environment = {
        **_environment(),
        "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "1",
        "DASK_TEMPORARY_DIRECTORY": str(folder),
    }
    always = "--host 127.0.0.1 --no-dashboard --dashboard-address 127.0.0.1:0 --scheduler-file".split()
    with (folder / f"{command[0]}.log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "dask", *command, *always, str(folder / "scheduler.json")],
            env=environment,
            stdout=log,
            stderr=log,
            preexec_fn=end_with_parent(),
        )


@pytest.fixture
def scheduler(tmp_path) -> Iterator[subprocess.Popen]:
    """A scheduler without workers, with its file in tmp_path."""
    process = _start(tmp_path, "scheduler", "--port", "0")
    wait_until((tmp_path / "scheduler.json").is_file, 240, "the scheduler")
    yield process
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[str]:
    """The address of a scheduler with two workers."""
    folder = tmp_path_factory.mktemp("cluster")
    processes = [
        _start(folder, "scheduler", "--port", "0"),
        _start(folder, "worker", *"--nthreads 1 --nworkers 2 --memory-limit 0".split()),
    ]
    wait_until((folder / "scheduler.json").is_file, 240, "the scheduler")
    with Client(scheduler_file=str(folder / "scheduler.json"), set_as_default=False) as client:
        client.wait_for_workers(2, timeout=240)
    yield str(folder / "scheduler.json")
    for process in processes:
        process.kill()  # Worker processes end with the `dask worker` that started them.
        process.wait()


# Jobs.


def test_jobs_are_done_and_their_parts_told_once_though_a_worker_is_killed(cluster, tmp_path):
    jobs = [("hold", str(tmp_path / "held")), *(("square", number) for number in range(5))]
    told, results = [], {}
    for job, result in spread(_squarer, (2,), jobs, 1, lambda: told.append(1), cluster):
        if not results:
            os.kill(_pid(tmp_path / "held"), signal.SIGKILL)
        results[job] = result
    assert results == {jobs[0]: "hold", **{("square", number): number**2 for number in range(5)}}
    assert len(told) == len(jobs)
    assert list(spread(_squarer, (2,), [], 1, cluster=cluster)) == []


def test_workers_are_free_again_after_a_parent_was_killed_or_stopped(cluster, tmp_path):
    endless = [("go on", str(tmp_path / name)) for name in "ab"]
    code = (
        "from test_cluster import _squarer\n"
        "from deer_vla_ros.lab.workers import spread\n"
        f"list(spread(_squarer, (2,), {endless}, 1, cluster={cluster!r}))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], env=_environment())
    try:
        for _, folder in endless:
            _pid(Path(folder))
    finally:
        parent.kill()
        parent.wait()
    jobs = [("square", 3), ("go on", str(tmp_path / "c")), ("go on", str(tmp_path / "d"))]
    stopped = spread(_squarer, (3,), jobs, 1, cluster=cluster)
    assert next(stopped) == (("square", 3), 27)
    stopped.close()
    assert dict(spread(_squarer, (2,), [("square", 4), ("square", 5)], 1, cluster=cluster)) == {
        ("square", 4): 16,
        ("square", 5): 25,
    }


def test_what_goes_wrong_in_a_worker_is_told(cluster):
    for what in ("refuse", "refuse with two values"):
        with pytest.raises(UserError, match=r"^the worker tcp://[0-9.:]+: 13 is no job: give another$"):
            list(spread(_squarer, (2,), [(what, 13)], 1, cluster=cluster))
    for what, said in (
        ("fail", "return 1 // 0.*ZeroDivisionError"),
        ("leave", "SystemExit: left"),
        ("give a lock", "cannot pickle '_thread.lock' object"),
    ):
        with pytest.raises(RuntimeError, match=rf"(?s)^in the worker tcp://[0-9.:]+:\n.*{said}"):
            list(spread(_squarer, (2,), [(what, 1)], 1, cluster=cluster))
    with pytest.raises(UserError, match=r"2 workers ended while they did the job \('end', 1\).*run the same"):
        list(spread(_squarer, (2,), [("end", 1)], 1, cluster=cluster))


def test_a_worker_with_other_software_or_files_is_refused(cluster, tmp_path, monkeypatch):
    jobs = [("square", 1)]
    with pytest.raises(UserError, match="worker tcp.*: /proc/self/cmdline: it has the SHA-256 sum [0-9a-f]"):
        list(spread(_squarer, (2,), jobs, 1, cluster=cluster, files=[Path("/proc/self/cmdline")]))
    with (tmp_path / "only here").open("w") as file:
        os.dup2(file.fileno(), 190)
    with pytest.raises(UserError, match="/proc/self/fd/190: it has no file, this machine has the SHA"):
        list(spread(_squarer, (2,), jobs, 1, cluster=cluster, files=[Path("/proc/self/fd/190")]))
    os.close(190)
    other = {**cluster_module.software(), "numpy": "1.0"}
    monkeypatch.setattr(cluster_module, "software", lambda: other)
    with pytest.raises(
        UserError, match=r"the worker tcp.*: it has numpy 2.*, this machine has 1\.0: install"
    ):
        list(spread(_squarer, (2,), jobs, 1, cluster=cluster))


def test_a_worker_with_several_threads_is_refused(tmp_path):
    with (
        dask.config.set(temporary_directory=str(tmp_path)),
        LocalCluster(
            n_workers=1,
            threads_per_worker=2,
            processes=False,
            protocol="tcp://",
            dashboard_address="127.0.0.1:0",
        ) as several,
        pytest.raises(UserError, match="worker tcp.*: it has 2 threads.*start the worker with --nthreads 1"),
    ):
        list(spread(_squarer, (2,), [("square", 1)], 1, cluster=several.scheduler_address))


def test_a_scheduler_that_waits_for_workers_and_is_lost_is_told(scheduler, tmp_path, capsys, monkeypatch):
    address = str(tmp_path / "scheduler.json")
    check = cluster_module.Cluster._is_without_workers

    def check_then_kill(*arguments):
        nobody = check(*arguments)
        scheduler.kill()
        return nobody

    monkeypatch.setattr(cluster_module.Cluster, "_is_without_workers", check_then_kill)
    with pytest.raises(UserError, match="the scheduler was lost: start it and its workers again"):
        list(spread(_squarer, (2,), [("square", 1)], 1, cluster=address))
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith(f"waiting for workers at {address}: start some with")


@pytest.mark.parametrize(
    "address", ["host:8786", "http://127.0.0.1:8786", "tls://127.0.0.1:8786", "tcp://127.0.0.1:1"]
)
def test_an_address_without_a_scheduler_is_told_in_one_line(address, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cluster_module, "ANSWER_TIMEOUT_S", 0.1)
    command = ["record-demos", "--demos", "1", "--out", str(tmp_path), "--cluster", address]
    assert main(command) == 1
    error = capsys.readouterr().err
    assert (
        error.startswith(f"error: --cluster {address}: no scheduler answers there") and error.count("\n") == 1
    )


# The commands.


def test_record_demos_gives_the_same_bytes_and_records_what_is_missing(cluster, tmp_path):
    from deer_vla_ros.lab.demonstrations.record_run import DemoRequest, record

    frames = DemoRequest(tmp_path / "frames", demos=2, seed=3, image_size=16, demos_per_shard=1)
    calvin = replace(frames, folder=tmp_path / "calvin", demos=1, image_size=None)
    far = tmp_path / "far"
    for request, kept in ((frames, 1), (calvin, 0)):
        record(request, jobs=1)
        if kept:  # as an interrupted run leaves it
            shutil.copytree(frames.folder / "shard-0000", far / "frames/shard-0000")
        assert record(replace(request, folder=far / request.folder.name), 1, cluster)[1] == kept
        assert _contents(far / request.folder.name) == _contents(request.folder)


def _contents(folder: Path) -> dict[str, str]:
    """The SHA-256 sum of every file."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_evaluate_gives_the_same_report_though_its_process_was_killed(cluster, tmp_path):
    short = ["evaluate", "--chains", "0", "--trials", "1", "--tasks", "open_drawer,close_drawer"]
    short += ["--steps", "2", "--json"]
    code = f"""
import os
from deer_vla_ros.__main__ import main
from deer_vla_ros.lab.scoring import evaluation_run
add = evaluation_run.ResumeFile.add
evaluation_run.ResumeFile.add = lambda *arguments: (add(*arguments), os.kill(os.getpid(), 9))
main({[*short, str(tmp_path / "far.json"), "--cluster", cluster]})
"""
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == -9
    assert (tmp_path / "far.json.partial.jsonl").read_text().count("\n") == 2, "one of two tasks is done"
    assert main([*short, str(tmp_path / "far.json"), "--cluster", cluster]) == 0
    assert main([*short, str(tmp_path / "near.json"), "--jobs", "1"]) == 0
    assert (tmp_path / "far.json").read_bytes() == (tmp_path / "near.json").read_bytes()
    assert not (tmp_path / "far.json.partial.jsonl").exists()


def test_chains_of_calvin_give_the_same_report_on_a_cluster(cluster, tmp_path):
    from stand_ins import stand_in_calvin  # The workers, which import this module, do not find it.

    install = stand_in_calvin(tmp_path)
    command = ["evaluate", "--benchmark", "calvin", "--calvin-root", str(install.root)]
    command += [
        "--calvin-python",
        install.python,
        "--sequences",
        "2",
        "--steps",
        "2",
        "--lanes",
        "1",
        "--json",
    ]
    assert main([*command, str(tmp_path / "far.json"), "--cluster", cluster]) == 0
    assert main([*command, str(tmp_path / "near.json"), "--jobs", "1"]) == 0
    assert (tmp_path / "far.json").read_bytes() == (tmp_path / "near.json").read_bytes()


def test_processes_of_this_machine_and_of_a_cluster_are_not_chosen_together(capsys):
    for command in (["evaluate"], ["record-demos", "--demos", "1", "--out", "x"]):
        with pytest.raises(SystemExit):
            main([*command, "--jobs", "1", "--cluster", "tcp://127.0.0.1:1"])
        assert "--cluster: not allowed with argument --jobs" in capsys.readouterr().err
