"""How does a camera seem to move? Random shifts of its image by a few pixels, the border repeated (RandomShiftsAug of DrQ-v2)."""

from __future__ import annotations

import torch
from torch import Tensor

PAD_STATIC, PAD_GRIPPER = 10, 4
"""Largest shift in pixels of a 224 pixel image, static and gripper camera."""


def draw_shifts(count: int, pad: int, generator: torch.Generator | None = None) -> Tensor:
    """(count, 2) offsets x, y of the crop in an image padded by `pad` on every side: 0..2*pad; `pad` is no shift.

    The reference draws from 1 where it shifts whole windows, which moves images by half a pixel on average: not copied.
    """
    return torch.randint(2 * pad + 1, (count, 2), generator=generator)


def shift(images: Tensor, offsets: Tensor, pad: int) -> Tensor:
    """(N, C, H, W) images of any type -> the same, each repeated at its border by `pad` pixels and cropped at its offset x, y.

    The reference resamples at whole pixels instead, the same but for rounding.
    """
    count, channels, height, width = images.shape
    offsets = offsets.to(images.device)
    columns, rows = (
        (torch.arange(size, device=images.device) + offsets[:, axis, None] - pad).clamp(0, size - 1)
        for axis, size in enumerate((width, height))
    )
    planes = torch.arange(count * channels, device=images.device)[:, None] * height
    rows = (rows.repeat_interleave(channels, dim=0) + planes).flatten()
    shifted = images.reshape(-1, width).index_select(0, rows).view(images.shape)
    return shifted.gather(3, columns[:, None, None].expand(images.shape))


def random_shift(images: Tensor, pad: int, generator: torch.Generator | None = None) -> Tensor:
    """(..., C, H, W) images of any type, each shifted by a draw of its own, at most `pad` pixels along either axis."""
    frames = images.flatten(end_dim=-4) if images.ndim > 3 else images[None]
    return shift(frames, draw_shifts(len(frames), pad, generator), pad).view(images.shape)
