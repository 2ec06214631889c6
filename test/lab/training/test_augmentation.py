"""Tests of random shifts: an image moves by exactly the drawn number of pixels."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deer_vla_ros.lab.training.augmentation import draw_shifts, random_shift, shift

images = st.fixed_dictionaries(
    {
        "count": st.integers(1, 4),
        "channels": st.integers(1, 3),
        "height": st.integers(1, 12),
        "width": st.integers(1, 12),
        "pad": st.integers(0, 6),
        "seed": st.integers(0, 2**31),
        "kind": st.sampled_from((torch.uint8, torch.float32, torch.float16)),
    }
)


def noise(count: int, channels: int, height: int, width: int, kind: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randint(
        256, (count, channels, height, width), generator=torch.Generator().manual_seed(seed)
    ).to(kind)


@given(images)
def test_every_pixel_moves_by_its_image_s_draw_and_the_border_repeats(case):
    pad, seed = case.pop("pad"), case["seed"]
    batch = noise(**case)
    offsets = draw_shifts(len(batch), pad, torch.Generator().manual_seed(seed))
    shifted = shift(batch, offsets, pad)
    assert shifted.shape == batch.shape and shifted.dtype == batch.dtype
    height, width = batch.shape[2:]
    for image, result, (x, y) in zip(batch, shifted, offsets.tolist(), strict=True):
        for row in range(height):
            for column in range(width):
                source_row = min(max(row + y - pad, 0), height - 1)
                source_column = min(max(column + x - pad, 0), width - 1)
                assert torch.equal(result[:, row, column], image[:, source_row, source_column])


@given(images)
def test_the_middle_draw_is_no_shift(case):
    pad = case.pop("pad")
    batch = noise(**case)
    assert torch.equal(shift(batch, torch.full((len(batch), 2), pad), pad), batch)


def test_a_spot_moves_left_and_up_where_the_crop_moves_right_and_down():
    image = torch.zeros(1, 1, 9, 9)
    image[0, 0, 4, 4] = 1
    shifted = shift(image, torch.tensor([[2 + 1, 2 + 2]]), pad=2)
    assert shifted[0, 0].nonzero().tolist() == [[4 - 2, 4 - 1]]


def test_draws_reach_both_ends_and_are_fair():
    drawn = draw_shifts(30000, 4, torch.Generator().manual_seed(0))
    counts = torch.bincount(drawn.flatten(), minlength=9)
    assert len(counts) == 9 and counts.tolist() == pytest.approx([60000 / 9] * 9, rel=0.06)
    assert float(drawn.float().mean()) == pytest.approx(4, abs=0.05)


def test_every_frame_of_a_window_draws_its_own_and_a_seed_repeats_it():
    frame = noise(1, 3, 10, 10, torch.uint8, 0)
    window = frame.expand(2, 8, 3, 10, 10)
    shifted = random_shift(window, 4, torch.Generator().manual_seed(1))
    assert shifted.shape == window.shape and shifted.dtype == torch.uint8
    assert len({tuple(image.flatten().tolist()) for image in shifted.flatten(0, 1)}) > 8
    assert torch.equal(shifted, random_shift(window, 4, torch.Generator().manual_seed(1)))


def test_one_image_without_a_batch_shifts_too():
    image = noise(1, 3, 10, 10, torch.uint8, 0)[0]
    assert random_shift(image, 4).shape == image.shape
    assert torch.equal(random_shift(image, 0), image)
