"""Do words find what they name, moment by moment, and does the arm's pose enter as it should?"""

import dataclasses

import pytest
import torch
from scipy.spatial.transform import Rotation
from small_model import INSTRUCTION, SMALL, small_model, small_tokenizer

from deer_vla_ros.errors import UserError
from deer_vla_ros.model.config import GroundingConfig, ModelConfig, ProprioceptionConfig
from deer_vla_ros.model.grounding import POSE_VALUES, Grounding, turn_from_down

GROUNDED = dataclasses.replace(
    SMALL, grounding=GroundingConfig(channels=8, queries=3), proprioception=ProprioceptionConfig((0.4, 0.0, 0.2), 0.3, 0.5)
)
TCP = torch.tensor([[0.5, 0.1, 0.2, 1.0, 0.0, 0.0, 0.0], [0.3, -0.1, 0.1, 0.0, 1.0, 0.0, 0.0]])


@pytest.fixture(scope="module")
def model():
    return small_model(GROUNDED)


def text_of(model, instructions):
    tokenizer = small_tokenizer()
    ids, mask = tokenizer.encode(instructions)
    return model.encode_text(ids, mask, tokenizer.image_token)


def test_several_instructions_on_one_moment_are_what_each_is_alone(model):
    images = torch.randn(2, 2, 3, 16, 16)
    instructions = [INSTRUCTION, "lift the blue block", "lift the red block", "push the blue block"]
    together, found = model.visual_tokens(model.see(images, TCP), text_of(model, instructions))
    assert together.shape == (4, model.config.visual_tokens, model.config.vision.width)
    assert found.point.shape == (4, 1, 3) and found.logits.shape == (4, 2, 3, 16)
    for row, instruction in enumerate(instructions):
        moment = slice(row // 2, row // 2 + 1)
        alone, _ = model.visual_tokens(model.see(images[moment], TCP[moment]), text_of(model, [instruction]))
        assert torch.allclose(together[row], alone[0], atol=1e-5)


def test_each_thing_is_found_from_its_own_queries_alone():
    config = dataclasses.replace(GROUNDED, grounding=GroundingConfig(channels=8, queries=4, things=2))
    model = small_model(config)
    images, text = torch.randn(1, 2, 3, 16, 16), text_of(model, [INSTRUCTION])
    tokens, before = model.visual_tokens(model.see(images, TCP[:1]), text)
    assert before.point.shape == (1, 2, 3) and before.turn.shape == (1, 2, 2)
    assert tokens.shape[1] == config.visual_tokens == 2 * config.resampler.latents + 2 * 4 + 2 + 1
    with torch.no_grad():
        model.grounding.query[-1].bias[-2 * 8 :] += 100.0  # of the second thing's two queries
    _, after = model.visual_tokens(model.see(images, TCP[:1]), text)
    assert torch.allclose(after.point[:, 0], before.point[:, 0], atol=1e-6)
    assert not torch.allclose(after.point[:, 1], before.point[:, 1], atol=1e-4)


def test_the_same_colour_word_can_ask_for_that_colour_and_for_another():
    """`red` for what is red, `nearest to red` for what is blue, and the other way round: an exclusive or."""
    torch.manual_seed(0)
    grounding = Grounding(GroundingConfig(channels=8, queries=1), 16, text_width=16, visual_width=16, cameras=1)
    red, blue, nearest = torch.randn(3, 16)
    words = torch.stack([red, blue, (red + nearest) / 2, (blue + nearest) / 2])
    wanted = torch.tensor([3, 7, 7, 3])  # cells
    maps, pose = torch.randn(1, 1, 8, 16), torch.zeros(1, POSE_VALUES)
    optimiser = torch.optim.Adam(grounding.query.parameters(), 1e-2)
    for _ in range(200):
        logits = grounding.find(maps, words, pose).logits[:, 0, 0]
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(logits, wanted).backward()
        optimiser.step()
    assert logits.argmax(-1).tolist() == wanted.tolist()


def test_the_pose_matters_and_its_absence_is_told(model):
    images, text = torch.randn(1, 2, 3, 16, 16), text_of(model, [INSTRUCTION])
    here, there = (model.visual_tokens(model.see(images, tcp[None]), text)[0] for tcp in TCP)
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
