"""Preprocessing of camera images with Pillow, exactly as in the reference implementation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def resize_and_crop(image: np.ndarray, size: int) -> np.ndarray:
    """(H, W, 3) uint8 -> (size, size, 3) uint8: scales the shortest side to `size` and cuts out the centre.

    Pillow's bicubic filter is required: torch's antialiased bicubic differs from it by up to two grey levels.
    """
    height, width = image.shape[:2]
    short = min(height, width)
    if short != size:
        width, height = int(size * width / short), int(size * height / short)
        image = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
    top, left = round((height - size) / 2), round((width - size) / 2)
    return image[top : top + size, left : left + size]


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
        pixels = np.stack([resize_and_crop(image, self.size) for image in images]).transpose(0, 3, 1, 2)
        return normalised(torch.from_numpy(np.ascontiguousarray(pixels)).to(self.device), self.dtype)[None]
