"""How the functions of a step run: as they are, compiled, or as CUDA graphs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable)
TOKENS_APART = 8
"""CUDA graphs exist for texts of this many tokens and of its multiples. A shorter text is padded."""


class Mark(Protocol):
    """A moment on the device."""

    def record(self) -> None:
        """The moment at which the device has finished all that was asked for until now."""

    def wait(self) -> None:
        """Waits until the moment is over."""

    def since(self, earlier: Mark) -> float:
        """Milliseconds between two moments that are over."""


class Backend(Protocol):
    """Runs functions whose inputs and outputs stay at the same place.

    is_immediate: whether a function needs no preparation, so that it can be made during a step. pads: whether
    texts are padded to few lengths.
    """

    is_immediate: bool
    pads: bool

    def compiled(self, function: Function) -> Function:
        """The same function, possibly faster. It has no side effects."""

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """What has the effects of `run`. `run` may be called once or more during the capture."""

    def token_counts(self, most: int) -> Sequence[int]:
        """The lengths of texts to prepare, for instructions of at most `most` tokens."""

    def tokens_for(self, tokens: int) -> int:
        """The length to use for a text of this many tokens."""

    def mark(self) -> Mark: ...

    def host_memory(self, tensor: Tensor) -> Tensor:
        """Memory of the host, to which the device copies `tensor`; on a CPU the tensor itself."""


class Direct:
    """Runs the functions as they are. They are Python functions with the eager operators of torch."""

    is_immediate, pads = True, False

    def __init__(self, device: torch.device):
        self._device = device

    def compiled(self, function: Function) -> Function:
        return function

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        return run

    def token_counts(self, most: int) -> Sequence[int]:
        return ()

    def tokens_for(self, tokens: int) -> int:
        return tokens

    def mark(self) -> Mark:
        return _CudaMark() if self._device.type == "cuda" else _CpuMark()

    def host_memory(self, tensor: Tensor) -> Tensor:
        if self._device.type != "cuda":
            return tensor
        return torch.zeros(tensor.shape, dtype=tensor.dtype, pin_memory=True)


class _CpuMark:
    def __init__(self) -> None:
        self._seconds = 0.0

    def record(self) -> None:
        self._seconds = time.perf_counter()

    def wait(self) -> None:
        pass

    def since(self, earlier: _CpuMark) -> float:
        return (self._seconds - earlier._seconds) * 1e3


class _CudaMark:
    """A CUDA event. Inside a graph it is recorded again in every replay (`external`)."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True, external=True)

    def record(self) -> None:
        self._event.record()

    def wait(self) -> None:
        self._event.synchronize()

    def since(self, earlier: _CudaMark) -> float:
        return earlier._event.elapsed_time(self._event)


class Compiled(Direct):
    """Compiles the functions with torch.compile, for any number of tokens.

    The result is kept on the disk, in `cache_folder`, so that only the first start on a machine takes
    minutes.
    """

    def __init__(self, device: torch.device):
        super().__init__(device)
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder()))
        # The head's weights are in modules of type nn.LSTM. `ActionHead.probe` only reads their weights, but
        # without this setting torch refuses even that.
        torch._dynamo.config.allow_rnn = True

    def compiled(self, function: Function) -> Function:
        return torch.compile(function, dynamic=True, fullgraph=True)


class Captured(Direct):
    """Prepares the functions for texts of few lengths before the first step."""

    is_immediate, pads = False, True

    def token_counts(self, most: int) -> Sequence[int]:
        return range(TOKENS_APART, most + TOKENS_APART, TOKENS_APART)

    def tokens_for(self, tokens: int) -> int:
        return -(-tokens // TOKENS_APART) * TOKENS_APART


class CudaGraphs(Captured):
    """Records the functions as CUDA graphs: a step is then a few launches instead of hundreds.

    torch.compile(mode="reduce-overhead") also makes graphs. It is not used because its outputs are
    overwritten by its next run, it records anew for each path through the exits, and it compiles for minutes
    at a start. Images are scaled by plain operators before the first graph: a graph would have to be recorded
    for each size of an image, which is only known when the first image of a camera is there.
    """

    def __init__(self, device: torch.device):
        super().__init__(device)
        self._warm_up, self._stream = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        self._warm_up.wait_stream(torch.cuda.current_stream(self._device))
        # Libraries make their handles and choose their kernels, which a capture does not allow. This has a
        # stream of its own: cuBLAS has scratch memory for each stream, and a step that another thread runs
        # meanwhile uses the one of the graphs.
        with torch.cuda.stream(self._warm_up):
            run()
            self._warm_up.synchronize()
        with torch.cuda.stream(self._stream):
            # Not `torch.cuda.graph`, which waits for the whole device. Another thread may run a step now; its
            # calls are no errors of this capture ("thread_local"). All graphs share their scratch memory:
            # none runs while another does, and what they return is not in it.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                run()
            finally:
                graph.capture_end()
        return graph.replay


def cache_folder() -> Path:
    """The folder of compiled functions: `$XDG_CACHE_HOME/deer_vla_ros`, or `~/.cache/deer_vla_ros`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deer_vla_ros"
