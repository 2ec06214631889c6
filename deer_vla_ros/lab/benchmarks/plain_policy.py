"""The plain way to run the network: what a straightforward implementation does in each step.

`benchmark model` compares DeerPolicy with it.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from deer_vla_ros.errors import UserError
from deer_vla_ros.inference.exit_rule import DELTAS, ExitRule, compared
from deer_vla_ros.inference.preprocess import normalised
from deer_vla_ros.inference.types import Action, Observation, StageTimes
from deer_vla_ros.model.decoder import TextContext
from deer_vla_ros.model.grounding import POSE_VALUES
from deer_vla_ros.model.head import pool
from deer_vla_ros.model.network import MultiExitVLA
from deer_vla_ros.model.text import InstructionTokenizer


@dataclass(frozen=True)
class PlainStep:
    """One decision of the plain way: the action, the layers run, and the time of each stage."""

    action: Action
    layers_run: int
    times: StageTimes


class PlainPolicy:
    """Decides the same actions as DeerPolicy with one lane, without any of its measures for speed.

    It resizes the images with Pillow on the host and runs the vision transformer once for each camera. It
    calls nn.LSTM at each exit and waits for the result there. The weights are float32, under torch.autocast
    where that is asked for; the head is always computed in float32, since not every CPU has an LSTM of
    another type. It uses the modules of the network that it is given. Only of the head it has a copy, because
    nn.LSTM on a GPU wants its weights in one piece.
    """

    def __init__(
        self,
        model: MultiExitVLA,
        tokenizer: InstructionTokenizer,
        rule: ExitRule | None,
        autocast: torch.dtype | None = None,
    ):
        """model: with float32 weights. rule: None runs all layers and reads the head once, after the last
        (static full depth). `steps_per_stage` and `ensemble` of a rule have no effect here. autocast: the
        number type of torch.autocast; None: without it. Raises UserError if the weights are not float32.
        """
        if model.dtype != torch.float32:
            raise UserError(f"plain policy: the weights are {model.dtype}: give a network in torch.float32")
        self.rule = rule
        self._model, self._tokenizer, self._autocast = model, tokenizer, autocast
        self._head = copy.deepcopy(model.shared_head)
        for lstm in self._head.lstms:
            lstm.flatten_parameters()
        self._text: TextContext | None = None
        self._state = self._head.initial_state()

    @torch.inference_mode()
    def reset(self, instruction: str) -> None:
        """Starts an episode: clears the memory and encodes the instruction."""
        ids, mask = (tensor.to(self._model.device) for tensor in self._tokenizer.encode([instruction]))
        self._text = self._model.encode_text(ids, mask, self._tokenizer.image_token)
        self._state = self._head.initial_state()

    @torch.inference_mode()
    def step(self, observation: Observation) -> PlainStep:
        """Decides one step. Call `reset` before the first one."""
        clock = _StageClock(self._model.device)
        images = self._preprocess((observation.static, observation.gripper))
        clock.ends("preprocess")
        with self._precision():
            visual = self._see(images, observation)
            clock.ends("vision")
            output, layers = self._climb(visual, clock)
        pose, probability = output.pose[0, 0], output.gripper_logit[0, 0, 0].sigmoid()
        clock.ends("head")
        action = Action(pose.cpu().numpy(), probability.item())
        self._state = output.state
        return PlainStep(action, layers, clock.times())

    def _precision(self) -> contextlib.AbstractContextManager:
        if self._autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self._model.device.type, self._autocast)

    def _preprocess(self, images: Sequence[np.ndarray]) -> Tensor:
        """Images (H, W, 3) uint8 -> (1, cameras, 3, size, size), normalised."""
        size = self._model.config.vision.image_size
        pixels = np.stack([_scaled_and_cropped(image, size) for image in images])
        on_device = torch.from_numpy(pixels).to(self._model.device).permute(0, 3, 1, 2)
        return normalised(on_device, torch.float32)[None]

    def _see(self, images: Tensor, observation: Observation) -> Tensor:
        """The input of the layers, as MultiExitVLA.see makes it, but one camera at a time."""
        model = self._model
        visual = torch.cat([model.resampler(model.vision(camera[None])) for camera in images[0]], 1)
        pose = visual.new_zeros(1, POSE_VALUES)
        if model.proprioception is not None:
            tcp = torch.as_tensor(observation.tcp, dtype=torch.float32)[None].to(model.device)
            pose = model.proprioception.values(tcp)
            visual = torch.cat([visual, model.proprioception(pose)], 1)
        if model.grounding is not None:
            visual = torch.cat([visual, model.grounding(images, pose).tokens], 1)
        return visual

    def _climb(self, visual: Tensor, clock: _StageClock):
        """Runs the layers up to the exit. Returns the head's output there, and the number of layers run."""
        rule, hidden, previous = self.rule, self._text.embedding, None
        last = len(self._model.layers) - 1
        read = {last} if rule is None else {rule.exits[0] - 1, *rule.exits}
        for index, layer in enumerate(self._model.layers):
            hidden = layer(hidden, visual, self._text)
            if index not in read:
                continue
            clock.ends("language")
            with torch.autocast(self._model.device.type, enabled=False):
                output = self._head(pool(hidden)[:, None].float(), self._state)
            if rule is None:
                break
            if index in rule.exits:
                values = (compared(rule.delta, each.pose, each.feature)[0, 0] for each in (output, previous))
                delta = DELTAS[rule.delta](*values).item()
                if index == rule.deepest or rule.agrees(rule.exits.index(index), delta):
                    break
            clock.ends("head")
            previous = output
        return output, index + 1


def _scaled_and_cropped(image: np.ndarray, size: int) -> np.ndarray:
    """(H, W, 3) uint8 -> (size, size, 3) uint8, with Pillow, as the reference does it."""
    height, width = image.shape[:2]
    short = min(height, width)
    after = (height, width) if short == size else (int(size * height / short), int(size * width / short))
    scaled = Image.fromarray(image).resize(after[::-1], Image.Resampling.BICUBIC)
    top, left = (round((length - size) / 2) for length in after)
    return np.asarray(scaled)[top : top + size, left : left + size]


class _StageClock:
    """The time of each stage. On a GPU it records events and never waits for them."""

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._marks = [("", self._now())]

    def ends(self, stage: str) -> None:
        """The work since the last call was of this stage."""
        self._marks.append((stage, self._now()))

    def times(self) -> StageTimes:
        """Adds up the milliseconds of each stage. On a GPU, call it after the results were read."""
        found = {"preprocess": 0.0, "vision": 0.0, "language": 0.0, "head": 0.0}
        for (_, begin), (stage, end) in zip(self._marks, self._marks[1:]):
            found[stage] += begin.elapsed_time(end) if self._on_gpu else (end - begin) * 1e3
        return StageTimes(**found)

    def _now(self):
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
