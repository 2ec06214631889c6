"""Jobs on several machines: the workers of a Dask cluster do them, and Dask's scheduler hands them out.

A worker process is set up once per run and does one job at a time. Before its first job it compares its
software and its files with those of the process that asks, because the figures have to be the same as on one
machine.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import json
import logging
import os
import pickle
import re
import sys
import traceback
import uuid
from asyncio import TimeoutError  # Python 3.10 has two of this name.
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from distributed import Client, Future, Security, get_worker
from distributed.scheduler import KilledWorker

import deer_vla_ros
from deer_vla_ros.errors import Cancelled, UserError, cause, shown
from deer_vla_ros.files import refusal
from deer_vla_ros.lab.checksums import file_sha256

if TYPE_CHECKING:
    from deer_vla_ros.lab.workers import Job, Work

ANSWER_TIMEOUT_S = 30
"""How long the scheduler may take to answer."""
CHECK_INTERVAL_S = 1
"""If nothing has happened for this long, it is checked whether the cluster has any worker."""
_PACKAGES = ("numpy", "scipy", "torch", "mujoco")
_SOURCES = (".py", ".xml", ".yaml")


@dataclass(frozen=True)
class Cluster:
    """A Dask cluster, and the files that its workers need.

    address: of the scheduler, such as tcp://host:8786, or the path of its scheduler file. files: what the
    jobs read, as absolute paths. Every machine needs the same files under the same paths.
    """

    address: str
    files: Sequence[Path] = ()

    def spread(
        self,
        setup: Callable[..., Work],
        arguments: tuple[Any, ...],
        jobs: Sequence[Job],
        on_progress: Callable[[], None],
    ) -> Iterator[tuple[Job, Any]]:
        """Yields each job with its result, as workers.spread. Workers may join and leave at any time.

        A job whose worker is lost runs again on another worker. Raises UserError if a worker differs from
        this process, if a job lost too many workers, or if the scheduler is not there or is lost.
        """
        if not jobs:
            return
        run = _Run(uuid.uuid4().hex, software(), sums_of(self.files), pickle.dumps((setup, arguments)))
        parts, waiting = [0] * len(jobs), len(jobs)
        events: SimpleQueue[tuple[int, int | None]] = SimpleQueue()
        """A job's number and its finished parts so far; None instead of them: the job has ended."""
        client, nobody = self._client(), False
        try:
            client.subscribe_topic(run.token, lambda event: events.put(event[1]))
            keys = [f"deer_vla-{run.token}-{number}" for number in range(len(jobs))]
            pickled = [pickle.dumps(job) for job in jobs]
            futures = client.map(_do, range(len(jobs)), pickled, run=run, key=keys)
            for number, future in enumerate(futures):
                future.add_done_callback(lambda _, number=number: events.put((number, None)))
            while waiting:
                try:
                    number, finished = events.get(timeout=CHECK_INTERVAL_S)
                except Empty:
                    nobody = self._is_without_workers(client, nobody)
                    continue
                ended = finished is None
                if ended:
                    finished, result = self._result(futures[number], jobs[number])
                    futures[number].release()  # The worker forgets the result.
                    waiting -= 1
                for _ in range(parts[number], finished):
                    on_progress()
                parts[number] = max(parts[number], finished)
                if ended:
                    yield jobs[number], result
        finally:
            client.close()  # The scheduler forgets the jobs of a client that is gone.

    def _client(self) -> Client:
        for logger in ("distributed", "distributed.client"):  # What goes wrong is told in one line, by us.
            logging.getLogger(logger).setLevel(logging.CRITICAL)
        try:
            file = Path(self.address)
            address = str(json.loads(file.read_text())["address"]) if file.is_file() else self.address
            if not re.fullmatch(r"(tcp|tls)://.+:[0-9]{1,5}", address):
                raise ValueError(f"{shown(address)} is no address")
            security, is_tls = Security().get_connection_args("client"), address.startswith("tls:")
            if not security["ssl_context"] if is_tls else security["require_encryption"]:
                raise ValueError("this address and Dask's settings of TLS do not fit together")
            return Client(address, timeout=ANSWER_TIMEOUT_S, set_as_default=False)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"--cluster {self.address}: no scheduler answers there ({cause(error)}): start one with "
                "`dask scheduler`, and give the address that it prints, such as tcp://HOST:8786"
            ) from error

    def _is_without_workers(self, client: Client, told: bool) -> bool:
        """Whether no worker takes jobs now. Says so, unless it was told before."""
        if client.status != "running":
            raise self._lost()
        try:
            known = client.sync(client.scheduler.identity, n_workers=-1, callback_timeout=ANSWER_TIMEOUT_S)
        except (OSError, TimeoutError, AttributeError) as error:  # The client has no scheduler any more.
            raise self._lost() from error
        nobody = all(worker["status"] != "running" for worker in known["workers"].values())
        if nobody and not told:
            print(
                f"waiting for workers at {self.address}: start some with `dask worker`, "
                "on machines with deer_vla_ros",
                file=sys.stderr,
                flush=True,
            )
        return nobody

    def _result(self, future: Future, job: Any) -> tuple[int, Any]:
        """The number of a finished job's parts, and its result. Raises the worker's error."""
        try:
            pickled = future.result()
        except (CancelledError, OSError) as error:
            raise self._lost() from error
        except KilledWorker as error:
            raise UserError(
                f"{error.allowed_failures + 1} workers ended while they did the job {shown(job)}, as when "
                "memory runs out: read the workers' output, use fewer workers per machine, and run the same "
                "command again"
            ) from None
        except Exception as error:  # The job was not even begun: see _do.
            raise UserError(
                f"--cluster {self.address}: a worker or the scheduler cannot read the jobs ({cause(error)}): "
                f"install deer_vla_ros {deer_vla_ros.__version__} on every machine, and start both with it"
            ) from error
        parts, value, error = pickle.loads(pickled)
        if error is not None:
            raise error if isinstance(error, UserError) else RuntimeError(error)
        return parts, value

    def _lost(self) -> UserError:
        return UserError(
            f"--cluster {self.address}: the scheduler was lost: start it and its workers again, "
            "then run the same command again"
        )


@functools.cache
def software() -> dict[str, str]:
    """What figures depend on, by its name, as this process has loaded it."""
    root, digest = Path(deer_vla_ros.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*")):
        place = path.relative_to(root)
        if path.suffix in _SOURCES and place.parts[0] != "msg":  # which is generated
            digest.update(f"{place}\0{file_sha256(path)}\n".encode())
    return {
        "deer_vla_ros": deer_vla_ros.__version__,
        "source files of deer_vla_ros with the SHA-256 sum": digest.hexdigest(),
        "Python": "{}.{}".format(*sys.version_info),
        **{name: _version(name) for name in _PACKAGES},
        "MUJOCO_GL": os.environ.get("MUJOCO_GL", "not set"),
    }


def sums_of(files: Sequence[Path]) -> dict[str, str | None]:
    """The SHA-256 sum of every file by its path; None for a missing one."""
    return {str(path): file_sha256(path) for path in files}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


# In a worker process.


@dataclass(frozen=True)
class _Run:
    """What every job of a run is sent with.

    software, files: as `software` and `sums_of` give them where the run was started. work: setup and
    arguments, pickled, so that a worker with another version can read the rest.
    """

    token: str
    software: dict[str, str]
    files: dict[str, str | None]
    work: bytes


_ready: tuple[str, Work] | None = None
"""The token of the run that this process is set up for, and the function that does its jobs."""


def _do(number: int, job: bytes, run: _Run) -> bytes:
    """Does one job. Returns, pickled, the number of its finished parts, its result, and None or the error.

    The error names this worker. It is a UserError, or a text with the traceback of any other error: whatever
    the job raised may not be picklable, and a SystemExit would end this process.
    """
    worker, finished = get_worker(), 0
    key = worker.get_current_task()

    def on_progress() -> None:
        nonlocal finished
        if worker.state.tasks[key].state != "executing":
            raise Cancelled("the process that asked for this job is gone")
        finished += 1
        worker.log_event(run.token, (number, finished))

    try:
        result = _work_of(run)(pickle.loads(job), on_progress)
        return pickle.dumps((finished, result, None))
    except (Exception, SystemExit) as failed:
        told = failed if isinstance(failed, UserError) else refusal(failed)
        if told is not None:
            error = UserError(f"the worker {worker.address}: {told}")
        else:
            error = f"in the worker {worker.address}:\n{traceback.format_exc()}"
    return pickle.dumps((finished, None, error))


def _work_of(run: _Run) -> Work:
    """The function that does the jobs of this run in this process. An older run's is dropped before."""
    global _ready
    if _ready is None or _ready[0] != run.token:
        _ready = None
        gc.collect()  # in this thread, to which the OpenGL contexts of the older run belong
        _check(run)
        setup, arguments = pickle.loads(run.work)
        _ready = run.token, setup(*arguments)
    return _ready[1]


def _check(run: _Run) -> None:
    """Raises UserError if this process cannot give the same figures as the one that started the run."""
    worker = get_worker()
    if worker.state.nthreads != 1:
        raise UserError(
            f"it has {worker.state.nthreads} threads, but a simulator needs a process of its own: start the "
            "worker with --nthreads 1, and more processes with --nworkers"
        )
    for name, wanted in run.software.items():
        if (found := software().get(name, "unknown")) != wanted:
            raise UserError(
                f"it has {name} {found}, this machine has {wanted}: install the same on both, and start the "
                "worker again"
            )
    for path, found in sums_of([Path(each) for each in run.files]).items():
        if found != run.files[path]:
            there, here = (
                f"the SHA-256 sum {each}" if each else "no file" for each in (found, run.files[path])
            )
            raise UserError(
                f"{path}: it has {there}, this machine has {here}: copy the file to the same path on every "
                "machine"
            )
