"""The memory of a device: what is free, and the peak of what this process takes."""

from __future__ import annotations

import threading
from pathlib import Path

import torch

PERIOD_S = 0.02


def free_bytes(device: torch.device) -> int:
    """The bytes that this process could still take."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return _kibibytes(Path("/proc/meminfo"), "MemAvailable") * 1024


class PeakMemory:
    """A context that measures the most memory taken inside it beyond what was taken before. The result is in
    `bytes` when it ends.

    On a GPU this is what torch's allocator gave out; on a CPU the memory of this process that is not a mapped
    file (RssAnon), which a thread reads every PERIOD_S.
    """

    bytes = 0

    def __init__(self, device: torch.device):
        self._device = device

    def __enter__(self) -> PeakMemory:
        if self._device.type == "cuda":
            torch.cuda.init()  # the next line needs it
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        else:
            self._before = self._highest = _anonymous_bytes()
            self._done = threading.Event()
            self._thread = threading.Thread(target=self._sample, name="peak_memory", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self._device) - self._before
        else:
            self._done.set()
            self._thread.join()
            self.bytes = max(self._highest, _anonymous_bytes()) - self._before

    def _sample(self) -> None:
        while not self._done.wait(PERIOD_S):
            self._highest = max(self._highest, _anonymous_bytes())


def _anonymous_bytes() -> int:
    return _kibibytes(Path("/proc/self/status"), "RssAnon") * 1024


def _kibibytes(path: Path, name: str) -> int:
    """The value of a line `name:   123 kB` of a file of /proc."""
    (line,) = (line for line in path.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1])
