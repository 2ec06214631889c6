"""Random shifts of camera images by a few pixels, with a repeated border (RandomShiftsAug of DrQ-v2)."""

from __future__ import annotations

import torch
from torch import Tensor

PAD_STATIC, PAD_GRIPPER = 10, 4
"""Largest shift in pixels at an image size of 224, for the static and the gripper camera."""


def draw_shifts(count: int, pad: int, generator: torch.Generator | None = None) -> Tensor:
    """Draws (count, 2) offsets x, y of the crop in an image padded by `pad` on every side.

    Offsets are in 0..2*pad; `pad` is no shift. Where the reference shifts whole windows, it draws from 1 on.
    This moves images by half a pixel on average and is not copied.
    """
    return torch.randint(2 * pad + 1, (count, 2), generator=generator)


def shift(images: Tensor, offsets: Tensor, pad: int) -> Tensor:
    """Pads (N, C, H, W) images of any type by `pad` repeated border pixels and crops each at its offset x, y.

    The reference resamples at whole pixels instead; the results differ only by rounding.
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
    """Shifts each of (..., C, H, W) images by its own draw, at most `pad` pixels along each axis."""
    frames = images.flatten(end_dim=-4) if images.ndim > 3 else images[None]
    return shift(frames, draw_shifts(len(frames), pad, generator), pad).view(images.shape)
