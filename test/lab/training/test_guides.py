"""Tests of the grounding's losses: they lead to the positions and rotations of things, from the gripper."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from deer_vla_ros.lab.training.losses import heatmap_loss, point_loss, turn_loss
from deer_vla_ros.model.grounding import POINT_UNIT, Found

SIDE = 8
HERE = torch.zeros(1, 1, 3)


def found(point=None, turn=None, logits=None):
    return Found(logits, point, turn, torch.empty(0))


def tcp_turned(yaw, at=(0.0, 0.0, 0.0)):
    """A TCP that points straight down, turned about z."""
    down = Rotation.from_quat([1.0, 0.0, 0.0, 0.0])
    return torch.tensor([[*at, *(Rotation.from_euler("z", yaw) * down).as_quat()]], dtype=torch.float32)


def test_a_point_is_counted_from_the_tcp():
    points, tcp = torch.tensor([[[0.5, 0.1, 0.02]]]), tcp_turned(0.3, at=(0.4, 0.0, 0.12))
    right = torch.tensor([[[0.1, 0.1, -0.1]]]) / POINT_UNIT
    assert (
        point_loss(found(point=right), points, tcp) < 1e-6 < point_loss(found(point=right + 0.1), points, tcp)
    )


def test_what_cannot_be_seen_teaches_no_point_and_no_turn():
    points, tcp = torch.tensor([[[0.5, 0.1, 0.02], [float("nan")] * 3]]), tcp_turned(0.3)
    point, turn = torch.randn(1, 2, 3, requires_grad=True), torch.randn(1, 2, 2, requires_grad=True)
    (
        point_loss(found(point=point), points, tcp)
        + turn_loss(found(turn=turn), torch.zeros(1, 2), points, tcp)
    ).backward()
    for gradient in (point.grad, turn.grad):
        assert gradient[0, 0].abs().min() > 0 and torch.equal(
            gradient[0, 1], torch.zeros_like(gradient[0, 1])
        )


@given(yaw=st.floats(-1.5, 1.5), fingers=st.floats(-1.5, 1.5), quarters=st.integers(-2, 2))
def test_a_turn_is_counted_from_the_fingers_and_a_cube_looks_the_same_after_a_quarter(yaw, fingers, quarters):
    angle = 4 * (yaw - fingers)
    right = torch.tensor([[[math.cos(angle), math.sin(angle)]]])
    yaws = torch.tensor([[yaw + quarters * math.pi / 2]])
    assert turn_loss(found(turn=right), yaws, HERE, tcp_turned(fingers)) < 1e-4
    assert turn_loss(found(turn=-right), yaws, HERE, tcp_turned(fingers)) > 0.5


@pytest.mark.parametrize("things", [1, 2])
def test_a_heatmap_is_right_where_it_looks_at_the_pixel(things):
    pixels = torch.rand(3, things, 2, 2, generator=torch.Generator().manual_seed(0))
    cells = (pixels * SIDE).long().clamp(max=SIDE - 1)
    logits = torch.zeros(3, 2, things * 2, SIDE * SIDE)
    for row, thing, camera in torch.cartesian_prod(*map(torch.arange, (3, things, 2))):
        x, y = cells[row, thing, camera]
        logits[row, camera, 2 * thing, SIDE * y + x] = 4.0
    right = heatmap_loss(found(torch.zeros(3, things, 3), logits=logits), pixels)
    assert right < heatmap_loss(found(torch.zeros(3, things, 3), logits=torch.zeros_like(logits)), pixels)
    assert right < heatmap_loss(found(torch.zeros(3, things, 3), logits=logits.flip(-1)), pixels)


def test_what_no_camera_sees_teaches_nothing():
    pixels = torch.full((2, 1, 2, 2), float("nan"))
    pixels[1] = 1.2
    logits = torch.randn(2, 2, 1, SIDE * SIDE, requires_grad=True)
    loss = heatmap_loss(found(torch.zeros(2, 1, 3), logits=logits), pixels)
    loss.backward()
    assert loss == 0 and torch.equal(logits.grad, torch.zeros_like(logits))
