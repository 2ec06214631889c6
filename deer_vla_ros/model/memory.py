"""Memory for tensors that returns to the system as soon as it is not needed."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor


def own_memory(device: torch.device, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An empty tensor whose memory returns to the system as soon as the tensor is dropped."""
    if device.type != "cpu":
        return torch.empty(shape, device=device, dtype=dtype)
    # Not malloc: glibc keeps what lies between other blocks, and up to 64 MiB of what a second thread frees.
    pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(shape)
