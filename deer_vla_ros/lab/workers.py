"""How is work spread over processes? Each is set up once, then gets a job whenever it is free, and tells of parts done.

A pipe per process and nothing else between them: should this process be killed, the others find their pipe closed and end.
"""

from __future__ import annotations

import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from deer_vla_ros.errors import UserError

Job = TypeVar("Job")
Work = Callable[[Any, Callable[[], None]], Any]
"""Does one job; calls its second argument whenever a part of it is done."""


def spread(
    setup: Callable[..., Work],
    arguments: tuple[Any, ...],
    jobs: Sequence[Job],
    processes: int,
    tell: Callable[[], None] = lambda: None,
) -> Iterator[tuple[Job, Any]]:
    """Each job with its result, in the order in which they finish. tell: called for every part of a job that is done.

    setup(*arguments) runs once in each process and returns what does the jobs; all of it has to be picklable. A single process is
    this one. What a process raises ends all of them, and is raised here: UserError as it is, anything else as RuntimeError with its
    traceback.
    """
    if processes == 1:
        work = setup(*arguments) if jobs else None
        yield from ((job, work(job, tell)) for job in jobs)
        return
    context = get_context("spawn")
    waiting = list(reversed(jobs))
    process_of: dict[Connection, Any] = {}
    try:
        for _ in range(min(processes, len(jobs))):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, setup, arguments), daemon=True)
            process.start()
            theirs.close()
            process_of[ours] = process
            _send(ours, process, waiting.pop())
        while busy := [connection for connection in process_of if not connection.closed]:
            for connection in wait(busy):
                message = _received(connection, process_of[connection])
                if message is None:
                    tell()
                    continue
                if waiting:
                    _send(connection, process_of[connection], waiting.pop())
                else:
                    connection.close()
                yield message
    finally:
        for connection, process in process_of.items():
            if not connection.closed:  # another one failed, or nobody wants the rest
                connection.close()
                process.terminate()
            process.join()


def _send(connection: Connection, process: Any, job: Any) -> None:
    try:
        connection.send(job)
    except ConnectionError:
        raise _gone(process) from None


def _received(connection: Connection, process: Any) -> tuple[Any, Any] | None:
    """A job and its result; None for a part of one. Raises what the process raised."""
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


def _serve(connection: Connection, setup: Callable[..., Work], arguments: tuple[Any, ...]) -> None:
    """The life of a worker process; ctrl-c is its parent's business."""
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
        except Exception:
            connection.send(("failed", None, traceback.format_exc()))
    except (EOFError, ConnectionError):
        pass  # the parent has no more jobs, or is gone
