"""Preprocessing of camera images on the device, exactly as in the reference implementation.

The reference scales images with Pillow's bicubic filter. Pillow computes it in whole numbers (Pillow,
src/libImaging/Resample.c), so the same values result from any device that multiplies exactly.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

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


def resize_and_crop(image: np.ndarray, size: int) -> np.ndarray:
    """(H, W, 3) uint8 -> (size, size, 3) uint8: scales the shortest side to `size` and cuts out the centre."""
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
    return scaled_and_cropped(pixels, size).permute(1, 2, 0).contiguous().numpy()


def scaled_and_cropped(pixels: Tensor, size: int) -> Tensor:
    """(3, H, W) uint8 -> (3, size, size) uint8, on the same device, as `resize_and_crop`."""
    height, width = pixels.shape[1:]
    short = min(height, width)
    after = (height, width) if short == size else (int(size * height / short), int(size * width / short))
    top, left = (round((length - size) / 2) for length in after)
    # Pillow scales the width first, and rounds in between.
    pixels = _scaled(pixels, width, after[1], left, size)
    return _scaled(pixels.mT, height, after[0], top, size).mT


def _scaled(pixels: Tensor, before: int, after: int, first: int, count: int) -> Tensor:
    """Scales the last dimension of uint8 pixels from `before` to `after`; `count` values from `first` on."""
    if before == after:
        return pixels[..., first : first + count]
    high, low = (part[:, first : first + count] for part in _on_device(before, after, pixels.device))
    values = pixels.to(high.dtype)
    sums = (values @ high).to(torch.int64) * (1 << LOW_BITS) + (values @ low).to(torch.int64)
    return ((sums + (1 << (PRECISION_BITS - 1))) >> PRECISION_BITS).clamp_(0, 255).to(torch.uint8)


@functools.lru_cache(maxsize=32)
def _on_device(before: int, after: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The high and the low part of the weights (before, after) on the device."""
    weights, is_exact = _weights(before, after)
    kind = torch.float32 if is_exact else torch.float64
    high = (weights + (1 << (LOW_BITS - 1))) >> LOW_BITS
    low = weights - (high << LOW_BITS)
    return tuple(torch.from_numpy(part).to(device, kind) for part in (high, low))


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
    largest = max(taps << (LOW_BITS - 1), int(np.abs(weights).sum(0).max()) >> LOW_BITS) * 255
    return weights, largest < 1 << 24


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
    mean, std = (
        torch.tensor(values, device=pixels.device)[:, None, None] for values in (CLIP_MEAN, CLIP_STD)
    )
    return ((pixels.float() / 255 - mean) / std).to(dtype)


class ImagePreprocessor:
    """Turns raw images into one normalised batch on the device."""

    def __init__(self, size: int, device: torch.device, dtype: torch.dtype):
        self.size, self.device, self.dtype = size, device, dtype

    def __call__(self, images: Sequence[np.ndarray]) -> Tensor:
        """Images (H, W, 3) uint8 of any sizes -> (1, cameras, 3, size, size)."""
        pixels = [
            torch.from_numpy(np.ascontiguousarray(image)).to(self.device).permute(2, 0, 1) for image in images
        ]
        cropped = torch.stack([scaled_and_cropped(each, self.size) for each in pixels])
        return normalised(cropped, self.dtype)[None]
