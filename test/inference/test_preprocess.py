"""Tests that images are preprocessed exactly as in the reference."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from deer_vla_ros.inference.preprocess import CLIP_MEAN, CLIP_STD, ImagePreprocessor, resize_and_crop


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def through_pillow(image: np.ndarray, size: int) -> np.ndarray:
    """The same with Pillow alone: scales the shortest side to `size`, the other in proportion (rounded down),
    and cuts out the centre. The width comes first in every release of Pillow: it is asked for first."""
    picture = Image.fromarray(image)
    width, height = picture.size
    if width <= height:
        scaled = (size, int(size * height / width))
    else:
        scaled = (int(size * width / height), size)
    for step in ((scaled[0], height), scaled):
        picture = picture.resize(step, resample=Image.Resampling.BICUBIC)
    left, top = round((scaled[0] - size) / 2), round((scaled[1] - size) / 2)
    return np.asarray(picture.crop((left, top, left + size, top + size)))


@pytest.mark.parametrize(
    ("height", "width"),
    [
        (480, 640),
        (640, 480),
        (200, 200),
        (84, 84),
        (224, 224),
        (224, 301),
        (301, 224),
        (225, 224),
        (37, 91),
        (1, 5),
        (5, 1),
        (1, 1),
    ],
)
def test_an_image_of_any_shape_is_resized_and_cropped_as_pillow_does(height, width):
    image = noise(height, width)
    before = image.copy()
    assert np.array_equal(resize_and_crop(image, 224), through_pillow(image, 224))
    assert np.array_equal(image, before), "the camera's own image stays as it was"


def test_an_image_of_the_right_size_is_taken_as_it_is():
    image = noise(80, 80)
    assert np.array_equal(resize_and_crop(image, 80), image)


def test_an_odd_margin_is_rounded_to_the_even_side():
    image = np.zeros((4, 7, 3), np.uint8)
    image[:, :, 0] = np.arange(7)
    assert resize_and_crop(image, 4)[0, :, 0].tolist() == [2, 3, 4, 5], (
        "a margin of 1.5 pixels becomes 2, as in torchvision"
    )


@settings(max_examples=200)
@given(height=st.integers(1, 700), width=st.integers(1, 700), size=st.integers(1, 60), seed=st.integers(0, 9))
def test_images_of_random_sizes_are_those_of_pillow_to_the_last_bit(height, width, size, seed):
    image = noise(height, width, seed)
    result = resize_and_crop(image, size)
    assert result.dtype == np.uint8
    assert np.array_equal(result, through_pillow(image, size))


@pytest.mark.parametrize("level", [0, 255])
def test_the_largest_sums_are_exact(level):
    image = np.full((480, 640, 3), level, np.uint8)
    image[::2, ::3] = 255 - level
    for size in (64, 224):
        assert np.array_equal(resize_and_crop(image, size), through_pillow(image, size))


def test_a_view_of_a_larger_buffer_is_read_like_a_copy():
    buffer = noise(40, 90)
    view = buffer[::-1, ::2]
    assert np.array_equal(resize_and_crop(view, 16), resize_and_crop(view.copy(), 16))


def test_the_batch_is_normalised_and_holds_both_cameras_in_order():
    images = (noise(30, 40, seed=1), noise(12, 10, seed=2))
    batch = ImagePreprocessor(16, torch.device("cpu"), torch.float32)(images)
    assert batch.shape == (1, 2, 3, 16, 16)
    for camera, image in enumerate(images):
        expected = (through_pillow(image, 16) / 255 - np.array(CLIP_MEAN)) / np.array(CLIP_STD)
        np.testing.assert_allclose(batch[0, camera].numpy(), expected.transpose(2, 0, 1), rtol=0, atol=1e-6)


def test_the_batch_has_the_networks_precision():
    images = (noise(16, 16), noise(16, 16))
    assert ImagePreprocessor(16, torch.device("cpu"), torch.bfloat16)(images).dtype == torch.bfloat16
