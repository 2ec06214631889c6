"""Worker processes: each one is set up once, gets a job whenever it is free, and reports every finished part
of it.

The processes of this machine are connected by one pipe each and by nothing else. If the parent ends, the
kernel ends every worker. Those of other machines belong to a Dask cluster (cluster.py).
"""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from deer_vla_ros.errors import UserError
from deer_vla_ros.files import refusal
from deer_vla_ros.processes import end_with_parent

Job = TypeVar("Job")
Work = Callable[[Any, Callable[[], None]], Any]
"""Does one job and returns its result. It calls its second argument whenever a part of the job is
finished."""


def progress_bar() -> Progress:
    """A progress bar for the parts of jobs that are finished, with the time so far and the time left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )


def spread(
    setup: Callable[..., Work],
    arguments: tuple[Any, ...],
    jobs: Sequence[Job],
    processes: int,
    on_progress: Callable[[], None] = lambda: None,
    cluster: str | None = None,
    files: Sequence[Path] = (),
) -> Iterator[tuple[Job, Any]]:
    """Yields each job with its result, in the order in which the jobs finish.

    setup(*arguments) runs once in each process and returns the function that does the jobs. setup, the
    arguments, the jobs and the results have to be picklable. With `processes` 1 everything runs in this
    process. on_progress: called in this process for every finished part of a job.

    cluster: address of a Dask scheduler. Its workers do the jobs, whatever `processes` is. files: absolute
    paths of what the jobs read there; each worker needs the same files as this machine.

    If a worker raises an error, all workers end. A UserError is raised here as it is, any other error as a
    RuntimeError with the worker's traceback. A worker that dies raises UserError; a cluster gives its job to
    another worker.
    """
    if cluster is not None:
        from deer_vla_ros.lab.cluster import Cluster  # One machine needs no Dask.

        yield from Cluster(cluster, files).spread(setup, arguments, jobs, on_progress)
        return
    if processes == 1:
        work = setup(*arguments) if jobs else None
        yield from ((job, work(job, on_progress)) for job in jobs)
        return
    context = get_context("spawn")
    waiting = list(reversed(jobs))
    process_of: dict[Connection, Any] = {}
    try:
        for _ in range(min(processes, len(jobs))):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, os.getpid(), setup, arguments), daemon=True
            )
            process.start()
            theirs.close()
            process_of[ours] = process
            _send(ours, process, waiting.pop())
        while busy := [connection for connection in process_of if not connection.closed]:
            for connection in wait(busy):
                message = _received(connection, process_of[connection])
                if message is None:
                    on_progress()
                    continue
                if waiting:
                    _send(connection, process_of[connection], waiting.pop())
                else:
                    connection.close()
                yield message
    finally:
        for connection, process in process_of.items():
            if not connection.closed:  # Another worker failed, or the caller stopped the iteration.
                connection.close()
                process.terminate()
            process.join()


def _send(connection: Connection, process: Any, job: Any) -> None:
    try:
        connection.send(job)
    except ConnectionError:
        raise _gone(process) from None


def _received(connection: Connection, process: Any) -> tuple[Any, Any] | None:
    """A finished job and its result, or None for a finished part of a job. Raises the worker's error."""
    try:
        kind, job, value = connection.recv()
    except (EOFError, ConnectionError):
        raise _gone(process) from None
    if kind == "failed":
        raise value if isinstance(value, UserError) else RuntimeError(f"in a worker process:\n{value}")
    return (job, value) if kind == "done" else None


def _gone(process: Any) -> UserError:
    process.join()
    return UserError(
        f"a worker process ended with exit code {process.exitcode}, as when memory runs out: use fewer --jobs"
    )


def _serve(
    connection: Connection, parent: int, setup: Callable[..., Work], arguments: tuple[Any, ...]
) -> None:
    """Runs in a worker process from its start to its end. The parent alone handles Ctrl-C."""
    end_with_parent(parent)()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        try:
            work = setup(*arguments)
            while True:
                job = connection.recv()
                connection.send(("done", job, work(job, lambda: connection.send(("part", None, None)))))
        except (EOFError, ConnectionError):
            raise
        except UserError as error:
            connection.send(("failed", None, error))
        except Exception as error:
            connection.send(("failed", None, refusal(error) or traceback.format_exc()))
    except (EOFError, ConnectionError):
        pass  # The parent has no more jobs, or has ended.
