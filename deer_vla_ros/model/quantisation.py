"""Matrices of the layers in 8 or 4 bits: how they are made from numbers, and how they multiply.

8 bits: weight = code * scale, with one scale for each row. 4 bits: weight = (code - 8) * scale + zero, with a
scale and a zero for each group of 32 weights of a row. Products take inputs in bfloat16 and add in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deer_vla_ros.errors import UserError
from deer_vla_ros.model.memory import own_memory

BITS = {"int8": 8, "int4": 4}
"""The bits of a weight, by the name of the number type."""
ON_CPU = {8: "_weight_int8pack_mm", 4: "_weight_int4pack_mm_for_cpu"}
"""Torch's operator for a product on a CPU, by the bits."""
GROUP = 32
"""The weights of a row that have a common scale and zero in 4 bits. In 8 bits as well, the number of columns
is a multiple of it: torch's operator on a CPU reads past the end of other rows."""
ROWS = 16
"""The number of rows is a multiple of this, which torch's operator for 4 bits needs on a CPU."""
ROWS_PACKED = 64
"""In 4 bits, a CPU stores the codes of so many rows together."""
PIECE = 2**17
"""How many weights are quantised at once. It bounds the memory that this takes in addition."""
TINY = torch.finfo(torch.bfloat16).tiny


def types_of(wanted: str, device: str) -> tuple[torch.dtype, int | None]:
    """The number type of a network on `device` and the bits of its layers' matrices; None: as all others.

    wanted: a value of the parameter `model.dtype`. Raises UserError if torch is too old for it.
    """
    auto = torch.float16 if device == "cuda" else torch.float32
    bits = BITS.get(wanted)
    if bits and device == "cpu" and not hasattr(torch.ops.aten, ON_CPU[bits]):
        raise UserError(
            f"{wanted}: torch {torch.__version__} has no operator aten::{ON_CPU[bits]}: install torch 2.6 or "
            "newer, or use float32"
        )
    return (auto if bits or wanted == "auto" else getattr(torch, wanted)), bits


def is_quantised(name: str, shape: Sequence[int], bits: int | None) -> bool:
    """Whether the tensor `name` of a network's file has `bits` bits in the network: the layers' matrices."""
    return bits is not None and name.startswith("layers.") and len(shape) == 2


def empty_tensors(
    name: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    bits: int | None,
    new: Callable[..., Tensor] = torch.empty,
) -> dict[str, Tensor]:
    """The network's tensors, without values, for the tensor `name` of a file, by their names.

    One of `dtype`; or, for a matrix (rows, columns) of the layers with 8 bits, int8 codes of its shape and
    bfloat16 scales (rows,); with 4 bits, uint8 codes (rows, columns / 2) and bfloat16 scales and zeros
    (columns / 32, rows, 2). new: makes a tensor from a shape and a dtype. Raises UserError for a size that
    torch's operators do not take.
    """
    if not is_quantised(name, shape, bits):
        return {name: new(shape, dtype=dtype)}
    rows, columns = shape
    if rows % ROWS or columns % GROUP:
        raise UserError(
            f"int{bits}: a matrix of the layers has {rows} rows and {columns} columns, and multiples of "
            f"{ROWS} and {GROUP} are needed: use float32, float16 or bfloat16 for this network"
        )
    if bits == 8:
        codes, scale = new((rows, columns), dtype=torch.int8), (rows,)
    else:
        codes, scale = new((rows, columns // 2), dtype=torch.uint8), (columns // GROUP, rows, 2)
    return {name: codes, name.removesuffix("weight") + "scale": new(scale, dtype=torch.bfloat16)}


class QuantisedLinear(nn.Module):
    """A linear map without bias whose matrix has 8 or 4 bits for each weight.

    On a CPU torch has operators for these products. On other devices the matrix is made in full for each
    product, which takes memory for one matrix in bfloat16 (8 bits) or several in float32 (4 bits).
    """

    def __init__(self, rows: int, columns: int, bits: int):
        """The values have to be loaded. Raises UserError as `empty_tensors` does."""
        super().__init__()
        weight, scale = empty_tensors("layers.weight", (rows, columns), torch.float32, bits).values()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        """(..., columns) -> (..., rows), in the number type of `x`."""
        product = product_on_cpu if x.device.type == "cpu" else product_anywhere
        result = product(x.flatten(0, -2).bfloat16(), self.weight, self.scale)
        return result.to(x.dtype).view(*x.shape[:-1], -1)


def quantise_linear_maps(module: nn.Module, bits: int) -> None:
    """Replaces every nn.Linear inside `module` by a QuantisedLinear without values."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear):
                setattr(parent, name, QuantisedLinear(child.out_features, child.in_features, bits))


def quantise(matrix: Tensor, weight: Tensor, scale: Tensor) -> Iterator[None]:
    """Fills `weight` and `scale`, as `empty_tensors` makes them, from a matrix of any number type, on their
    device. Yields after each piece. The result is the same to the bit each time on one machine."""
    device, columns = weight.device, matrix.shape[1]
    bits = 8 if weight.dtype == torch.int8 else 4
    pack = packed_on_cpu if device.type == "cpu" else packed_anywhere
    step = max(1, PIECE // (columns * ROWS_PACKED)) * ROWS_PACKED
    numbers, codes = (
        own_memory(device, (min(step, len(matrix)), columns), dtype) for dtype in (torch.float32, torch.int32)
    )
    for begin in range(0, len(matrix), step):
        piece = slice(begin, begin + step)
        rows = numbers[: len(matrix[piece])].copy_(matrix[piece])
        scales = quantise_rows(rows, bits)
        if bits == 8:
            weight[piece], scale[piece] = rows, scales
        else:
            weight[piece] = pack(codes[: len(rows)].copy_(rows))
            scale[:, piece] = scales.transpose(0, 1)
        yield


def quantise_rows(rows: Tensor, bits: int) -> Tensor:
    """Replaces a float32 matrix by its codes, and returns its scales: (rows,) in 8 bits; in 4 bits (rows,
    groups, 2), scale and zero. The codes are made for the scales as they are rounded to bfloat16."""
    if bits == 8:
        low, high = rows.aminmax(dim=1)
        scale = (torch.maximum(-low, high) / 127).clamp_min_(TINY).bfloat16()
        rows.div_(scale[:, None]).round_().clamp_(-127, 127)
        return scale
    groups = rows.unflatten(1, (-1, GROUP))
    low, high = groups.aminmax(dim=2)
    scale = ((high - low) / 15).clamp_min_(TINY).bfloat16()
    zero = (low + 8 * scale.float()).bfloat16()
    groups.sub_(zero[..., None]).div_(scale[..., None]).round_().add_(8).clamp_(0, 15)
    return torch.stack((scale, zero), 2)


def dequantised(codes: Tensor, scale: Tensor) -> Tensor:
    """The float32 matrix (rows, columns) for codes of any number type, and scales as `quantise_rows` returns
    them."""
    scale = scale.float()
    if scale.dim() == 1:
        return codes.float() * scale[:, None]
    groups = codes.float().unflatten(1, (-1, GROUP))
    return ((groups - 8) * scale[..., :1] + scale[..., 1:]).flatten(1)


def packed_on_cpu(codes: Tensor) -> Tensor:
    """(rows, columns / 2) The 4-bit codes, int32, in the order of `product_on_cpu` on this machine."""
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)


def packed_anywhere(codes: Tensor) -> Tensor:
    """(rows, columns / 2) The 4-bit codes, int32, in the order of `product_anywhere`: the first of two in the
    lower half of a byte."""
    codes = codes.to(torch.uint8)
    return codes[:, ::2] | codes[:, 1::2] << 4


def product_on_cpu(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """(n, columns) bfloat16 -> (n, rows) bfloat16, by torch's operators for a CPU."""
    if weight.dtype == torch.int8:
        return torch.ops.aten._weight_int8pack_mm(x, weight, scale)
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x, weight, GROUP, scale)


def product_anywhere(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """As `product_on_cpu`, by operators that every device has."""
    if weight.dtype == torch.int8:
        return F.linear(x, weight.bfloat16()) * scale
    codes = torch.stack((weight & 15, weight >> 4), 2).flatten(1)
    return F.linear(x, dequantised(codes, scale.transpose(0, 1)).bfloat16())
