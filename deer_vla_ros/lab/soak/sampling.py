"""Samples of the memory, threads and open files of the node's processes, taken from outside."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PERIOD_S = 1.0


@dataclass(frozen=True)
class Sample:
    """The resources of one process. at_s: time.monotonic() [s]. rss_kib: resident memory [KiB]."""

    at_s: float
    pid: int
    rss_kib: int
    threads: int
    fds: int


def sample(pid: int) -> Sample | None:
    """The present resources of a process; None if it has ended."""
    try:
        fields = dict(
            line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line
        )
        fds = sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
        rss_kib = int(fields["VmRSS"].split()[0])
        return Sample(time.monotonic(), pid, rss_kib, int(fields["Threads"]), fds)
    except (OSError, KeyError):  # The process has ended, or is just ending.
        return None


class Sampler:
    """Samples processes every PERIOD_S, in a thread of its own."""

    def __init__(self, pids: Callable[[], dict[str, int]]):
        """pids: returns the process ids to sample now, by the processes' names."""
        self.samples: dict[str, list[Sample]] = {}
        self._pids = pids
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(PERIOD_S):
            for name, pid in self._pids().items():
                if (found := sample(pid)) is not None:
                    self.samples.setdefault(name, []).append(found)
