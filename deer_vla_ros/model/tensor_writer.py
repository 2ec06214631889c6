"""Writes a safetensors file tensor by tensor, so that the whole network is never in memory.

The library `safetensors` writes only what is in memory at once. The format is described at
https://huggingface.co/docs/safetensors: a length of 8 bytes, a JSON header, and the tensors' bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class TensorWriter:
    """Writes the tensors in the order in which they were declared. Use it as a context manager."""

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype):
        """shapes: of all tensors, by name, in their order. dtype: of all tensors."""
        self._file = path.open("wb")
        self._dtype, self._coming = dtype, iter(shapes.items())
        header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape in shapes.items():
            begin, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: Tensor) -> None:
        """Writes the next tensor, converted to the file's number type."""
        expected, shape = next(self._coming)
        assert (expected, shape) == (name, tuple(tensor.shape)), "tensors are written in the declared order"
        data = tensor.to(self._dtype).contiguous().reshape(-1).view(torch.uint8)
        self._file.write(memoryview(data.numpy()))

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
