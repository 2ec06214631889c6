"""Counts what a step asks of the device: launches, and times that the host waits for a result."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

WAIT = re.compile(r"cu(da)?(Stream|Event|Device|Ctx)Synchronize")
LAUNCH = re.compile(r"cu(da)?(Launch(Cooperative)?Kernel|GraphLaunch)")
READ = re.compile(r"Memcpy DtoH")
"""The names in a profile of CUDA: calls in which the host waits, calls that start a kernel or a graph of
kernels, and copies from the device to the host."""
STEP = "benchmarked step"


@dataclass(frozen=True)
class StepCounts:
    """The counts of one step.

    host_waits: how often the host waited for the device (CUDA), or took a value out of a tensor (CPU).
    launches: kernels and graphs that were started (CUDA), or ATen operators that were called (CPU).
    reads: copies from the device to the host. A copy is usually followed by a wait, which is counted there.
    busy_ms: the time in which the device computed or copied; None on a CPU, where nothing tells.
    """

    host_waits: int
    launches: int
    reads: int
    busy_ms: float | None = None


def counted(device: torch.device, step: Callable[[], object]) -> StepCounts:
    """Runs `step` on this device, twice on a GPU, and counts the last run. The step must be warmed up."""
    if device.type == "cuda":
        return from_profile(_profile(device, step))
    with _Reads() as reads, _Operators() as operators:
        step()
    return StepCounts(reads.count, operators.count, reads.count)


class _Reads(TorchFunctionMode):
    """Counts the calls that take values out of a tensor to the host. On a CPU they are no operators."""

    CALLS = (Tensor.item, Tensor.tolist, Tensor.cpu)

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += func in self.CALLS
        return func(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    """Counts the operators that no other operator is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with self:
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        self.count += 1
        return func(*args, **kwargs)


class ProfileEvent(NamedTuple):
    """One entry of a profile. on_device: whether it is work of the GPU, not of the host. Times in us."""

    name: str
    on_device: bool
    start: float
    end: float


def from_profile(events: Iterable[ProfileEvent]) -> StepCounts:
    """The counts of the last part of a profile that is named STEP."""
    events = list(events)
    begin, end = max((e.start, e.end) for e in events if e.name == STEP and not e.on_device)
    inside = [e for e in events if begin <= e.start <= end and e.name != STEP]
    host = [e.name for e in inside if not e.on_device]
    device = [e for e in inside if e.on_device]
    return StepCounts(
        host_waits=sum(bool(WAIT.match(name)) for name in host),
        launches=sum(bool(LAUNCH.match(name)) for name in host),
        reads=sum(bool(READ.match(e.name)) for e in device),
        busy_ms=_covered(device) / 1e3,
    )


def _covered(events: Iterable[ProfileEvent]) -> float:
    """The time in which at least one event was running."""
    covered, until = 0.0, float("-inf")
    for event in sorted(events, key=lambda e: e.start):
        covered += max(0.0, event.end - max(event.start, until))
        until = max(until, event.end)
    return covered


def _profile(device: torch.device, step: Callable[[], object]) -> list[ProfileEvent]:
    """The events of two steps. The profiler sets itself up during the first."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as profiler:
        for _ in range(2):
            with torch.profiler.record_function(STEP):
                step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return [
        ProfileEvent(
            event.name,
            event.device_type != torch.autograd.DeviceType.CPU,
            event.time_range.start,
            event.time_range.end,
        )
        for event in profiler.events()
    ]
