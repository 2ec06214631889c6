"""Tests of the grounding and of the input of the arm's pose."""

import dataclasses

import pytest
import torch
from scipy.spatial.transform import Rotation
from small_model import SMALL, small_model

from deer_vla_ros.errors import UserError
from deer_vla_ros.model.config import GroundingConfig, ModelConfig, ProprioceptionConfig
from deer_vla_ros.model.grounding import turn_from_down

GROUNDED = dataclasses.replace(
    SMALL,
    grounding=GroundingConfig(channels=8, queries=3),
    proprioception=ProprioceptionConfig((0.4, 0.0, 0.2), 0.3, 0.5),
)
TCP = torch.tensor([[0.5, 0.1, 0.2, 1.0, 0.0, 0.0, 0.0], [0.3, -0.1, 0.1, 0.0, 1.0, 0.0, 0.0]])


@pytest.fixture(scope="module")
def model():
    return small_model(GROUNDED)


def test_moments_together_are_what_each_is_alone(model):
    images = torch.randn(2, 2, 3, 16, 16)
    together = model.see(images, TCP)
    assert together.visual.shape == (2, model.config.visual_tokens, model.config.vision.width)
    assert together.found.point.shape == (2, 1, 3) and together.found.logits.shape == (2, 2, 3, 16)
    for row in range(2):
        alone = model.see(images[row : row + 1], TCP[row : row + 1])
        assert torch.allclose(together.visual[row], alone.visual[0], atol=1e-5)


def test_each_thing_is_found_from_its_own_queries_alone():
    config = dataclasses.replace(GROUNDED, grounding=GroundingConfig(channels=8, queries=4, things=2))
    model = small_model(config)
    images = torch.randn(1, 2, 3, 16, 16)
    before = model.see(images, TCP[:1])
    assert before.found.point.shape == (1, 2, 3) and before.found.turn.shape == (1, 2, 2)
    assert before.visual.shape[1] == config.visual_tokens == 2 * config.resampler.latents + 2 + 1
    with torch.no_grad():
        model.grounding.queries[-2:] += 10.0  # of the second thing
    after = model.see(images, TCP[:1])
    assert torch.equal(after.visual[:, :-1], before.visual[:, :-1])
    assert not torch.allclose(after.found.point[:, 1], before.found.point[:, 1], atol=1e-4)
    assert not torch.allclose(after.visual[:, -1], before.visual[:, -1], atol=1e-4)


def test_the_pose_matters_and_its_absence_is_told(model):
    images = torch.randn(1, 2, 3, 16, 16)
    here, there = (model.see(images, tcp[None]).visual for tcp in TCP)
    assert not torch.allclose(here, there)
    with pytest.raises(UserError, match="measured TCP pose"):
        model.see(images)


def test_a_rotation_is_the_same_for_both_of_its_quaternions():
    quaternion = torch.from_numpy(Rotation.random(5, rng=0).as_quat())
    from_down = Rotation.from_quat(quaternion.numpy()) * Rotation.from_quat([1, 0, 0, 0]).inv()
    assert torch.allclose(turn_from_down(quaternion), torch.from_numpy(from_down.as_rotvec()))
    assert torch.allclose(turn_from_down(-quaternion), turn_from_down(quaternion))


def test_the_config_survives_json_and_refuses_nonsense():
    assert ModelConfig.from_dict(GROUNDED.to_dict()) == GROUNDED
    assert ModelConfig.from_dict(SMALL.to_dict()) == SMALL
    with pytest.raises(UserError, match="proprioception"):
        dataclasses.replace(SMALL, proprioception=ProprioceptionConfig((0.0, 0.0), 1.0, 1.0))
    with pytest.raises(UserError, match="grounding.queries is 0"):
        dataclasses.replace(SMALL, grounding=GroundingConfig(queries=0))
    with pytest.raises(UserError, match="grounding.queries 4 is not a multiple of grounding.things 3"):
        dataclasses.replace(SMALL, grounding=GroundingConfig(things=3))
