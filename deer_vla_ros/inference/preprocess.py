"""Preprocessing of camera images on the device, exactly as in the reference implementation.

The reference scales images with Pillow's bicubic filter. Pillow computes it in whole numbers (Pillow,
src/libImaging/Resample.c), so the same values result from any device that multiplies exactly. From release
13 on, Pillow scales the height first if an image is more than twice as high as wide, and rounds in between;
the reference was recorded with an earlier release, which always scaled the width first, as this file does.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
PRECISION_BITS = 22
"""Bits after the point of Pillow's weights for images with 8 bits."""
LOW_BITS = 11
"""Each weight is split into a high and a low part of about this length. A float32 then holds every sum
exactly."""
BLOCK = 16
"""Results of one block, where pixels are scaled down to less than half. Larger blocks waste products with 0,
smaller blocks are too small for a fast matrix product."""


def resize_and_crop(image: np.ndarray, size: int) -> np.ndarray:
    """(H, W, 3) uint8 -> (size, size, 3) uint8: scales the shortest side to `size`, cuts out the centre."""
    pixels = torch.from_numpy(np.require(image, requirements="CW")).permute(2, 0, 1)
    return scaled_and_cropped(pixels, size).permute(1, 2, 0).contiguous().numpy()


def scaled_and_cropped(pixels: Tensor, size: int) -> Tensor:
    """(3, H, W) uint8 -> (3, size, size) uint8, on the same device, as `resize_and_crop`."""
    height, width = pixels.shape[1:]
    short = min(height, width)
    after = (height, width) if short == size else (int(size * height / short), int(size * width / short))
    top, left = (round((length - size) / 2) for length in after)
    if after == (height, width):
        return pixels[:, top : top + size, left : left + size]
    rows, columns = (
        _scaling(before, scaled, first, size, pixels.device)
        for before, scaled, first in ((height, after[0], top), (width, after[1], left))
    )
    # Rows that no result needs are left out.
    needed = pixels[:, rows.first : rows.end]
    return _scaled(_scaled(needed, columns).mT, rows, rows.first).mT


@dataclass(frozen=True)
class _Scaling:
    """How one dimension is scaled, for blocks of neighbouring results. A result depends on few neighbouring
    pixels, so a block needs a short window of them.

    starts: the first pixel of each block's window. weights: (blocks, window, 2 * results of a block), first
    the high parts of all weights, then the low parts. half: (2 * results of a block), is added to the low
    parts so that the results are rounded to the nearest. count: the number of results. first, end: the pixels
    that any window needs.
    """

    starts: tuple[int, ...]
    weights: Tensor
    half: Tensor
    count: int
    first: int
    end: int


def _scaled(pixels: Tensor, scaling: _Scaling, origin: int = 0) -> Tensor:
    """Scales the last dimension of uint8 pixels (3, n, m). origin: the number of the first of them."""
    window = scaling.weights.shape[1]
    parts = [pixels[..., start - origin : start - origin + window] for start in scaling.starts]
    windows = torch.stack(parts).to(scaling.weights.dtype).flatten(1, 2)
    high, low = torch.baddbmm(scaling.half, windows, scaling.weights).to(torch.int32).chunk(2, -1)
    sums = torch.add(low, high, alpha=1 << LOW_BITS)
    values = (sums >> PRECISION_BITS).clamp_(0, 255).to(torch.uint8)  # (blocks, 3 n, results of a block)
    return values.transpose(0, 1).flatten(1)[:, : scaling.count].unflatten(0, pixels.shape[:2])


@functools.lru_cache(maxsize=32)
def _scaling(before: int, after: int, first: int, count: int, device: torch.device) -> _Scaling:
    """Scales `before` pixels to `after` and keeps `count` of them from number `first` on."""
    weights, is_exact = _weights(before, after)
    weights = weights[:, first : first + count]
    each = BLOCK if before > 2 * after else count
    blocks = [weights[:, start : start + each] for start in range(0, count, each)]
    spans = [np.flatnonzero(block.any(1))[[0, -1]] for block in blocks]
    window = max(int(last - begin) + 1 for begin, last in spans)
    starts = tuple(min(int(begin), before - window) for begin, _ in spans)
    parts = np.zeros((len(blocks), window, 2 * each))
    for part, block, start in zip(parts, blocks, starts):
        cut = block[start : start + window]
        high = (cut + (1 << (LOW_BITS - 1))) >> LOW_BITS
        part[:, : cut.shape[1]] = high
        part[:, each : each + cut.shape[1]] = cut - (high << LOW_BITS)
    kind = torch.float32 if is_exact else torch.float64
    half = np.repeat([0.0, 1 << (PRECISION_BITS - 1)], each)
    on_device = (torch.from_numpy(values).to(device, kind) for values in (parts, half))
    return _Scaling(starts, *on_device, count, min(starts), max(starts) + window)


@functools.lru_cache(maxsize=32)
def _weights(before: int, after: int) -> tuple[np.ndarray, bool]:
    """Pillow's weights of a bicubic filter (before, after), and whether float32 holds every sum exactly."""
    scale = before / after
    wide = max(scale, 1.0)
    support = 2.0 * wide
    weights = np.zeros((before, after), np.int64)
    for column in range(after):
        centre = (column + 0.5) * scale
        low = max(int(centre - support + 0.5), 0)
        high = min(int(centre + support + 0.5), before)
        values = [_bicubic((place - centre + 0.5) / wide) for place in range(low, high)]
        total = sum(values)
        for place, value in enumerate(values, start=low):
            share = value / total * (1 << PRECISION_BITS)
            weights[place, column] = int(share - 0.5) if share < 0 else int(share + 0.5)
    taps = int(np.count_nonzero(weights, axis=0).max())
    low = (taps << (LOW_BITS - 1)) * 255 + (1 << (PRECISION_BITS - 1))
    high = (int(np.abs(weights).sum(0).max() >> LOW_BITS) + taps) * 255
    return weights, max(low, high) < 1 << 24


def _bicubic(x: float) -> float:
    """Pillow's bicubic filter: the cubic convolution of Keys (1981) with a = -0.5."""
    x = abs(x)
    if x < 1.0:
        return (1.5 * x - 2.5) * x * x + 1
    if x < 2.0:
        return (((x - 5) * x + 8) * x - 4) * -0.5
    return 0.0


def normalised(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """(..., 3, H, W) uint8 -> the same shape, normalised by CLIP's mean and standard deviation."""
    mean, std = _mean_and_std(pixels.device)
    return pixels.float().div_(255).sub_(mean).div_(std).to(dtype)


@functools.lru_cache(maxsize=8)
def _mean_and_std(device: torch.device) -> tuple[Tensor, Tensor]:
    return tuple(torch.tensor(values, device=device)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))


def uploaded(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device. The host does not wait for a copy to a GPU."""
    if tensor.device.type == device.type:
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


class ImagePreprocessor:
    """Turns raw images into one normalised batch on the device."""

    def __init__(self, size: int, device: torch.device, dtype: torch.dtype):
        self.size, self.device, self.dtype = size, device, dtype

    def __call__(self, images: Sequence[np.ndarray]) -> Tensor:
        """Images (H, W, 3) uint8 of any sizes -> (1, cameras, 3, size, size)."""
        pixels = [
            uploaded(torch.from_numpy(np.require(image, requirements="CW")), self.device).permute(2, 0, 1)
            for image in images
        ]
        cropped = torch.stack([scaled_and_cropped(each, self.size) for each in pixels])
        return normalised(cropped, self.dtype)[None]
