"""How do many episodes of one network run at once? In lock step: one batch per step, every lane deciding as it would alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from deer_vla_ros.errors import UserError
from deer_vla_ros.inference.climb import Climb
from deer_vla_ros.inference.exit_rule import ExitRule
from deer_vla_ros.inference.policy import check_exits
from deer_vla_ros.inference.preprocess import ImagePreprocessor
from deer_vla_ros.inference.stopwatch import Stopwatch
from deer_vla_ros.inference.types import Observation, PolicyStep
from deer_vla_ros.model.decoder import TextContext
from deer_vla_ros.model.head import HeadOutput, HeadState, pool
from deer_vla_ros.model.network import MultiExitVLA
from deer_vla_ros.model.text import InstructionTokenizer


@dataclasses.dataclass
class _Lane:
    """One episode: what its next step depends on."""

    rule: ExitRule
    state: HeadState
    instruction: str | None = None
    tokens: int = 0
    last_exit_layer: int = -1
    episode_step: int = 0


class LockstepPolicy:
    """`DeerPolicy` for a number of lanes: `reset` one with its instruction, `step` any of them on an observation each.

    A lane's exits, deltas, actions and memory are those of a DeerPolicy of its own, up to the float noise of another batch size.
    Instructions are padded to the longest of a step, yet no lane sees that: padding stands to the right of text that looks only to
    the left, and the head reads the maximum over a lane's own tokens. Lanes that have exited leave the batch.
    """

    def __init__(self, model: MultiExitVLA, tokenizer: InstructionTokenizer, rule: ExitRule, lanes: int):
        self._model, self._tokenizer = model, tokenizer
        self._preprocess = ImagePreprocessor(model.config.vision.image_size, model.device, model.dtype)
        check_exits(rule, model.config)
        self._lanes = [_Lane(rule, model.shared_head.initial_state()) for _ in range(lanes)]
        self._read_texts: tuple[tuple[str, ...], TextContext, Tensor] | None = None

    @torch.inference_mode()
    def reset(self, lane: int, instruction: str) -> int:
        """Starts an episode in a lane, its memory cleared, its rule kept; returns the instruction's tokens, specials included."""
        tokens = self._tokenizer.encode([instruction])[0].shape[1]
        rule, state = self._lanes[lane].rule, self._model.shared_head.initial_state()
        self._lanes[lane] = _Lane(rule, state, instruction, tokens)
        return tokens

    def set_rule(self, rule: ExitRule, lane: int | None = None) -> None:
        """The exit rule of the next step of one lane, or of all; memories stay."""
        check_exits(rule, self._model.config)
        for each in self._lanes if lane is None else [self._lanes[lane]]:
            each.rule = rule

    @torch.inference_mode()
    def step(self, observations: Mapping[int, Observation]) -> dict[int, PolicyStep]:
        """One decision for each lane that has an observation; the images of one camera may differ in size.

        Times are a lane's equal share of the batch's. UserError before a lane's first `reset`; a lane whose action is not finite keeps
        its memory.
        """
        if not observations:
            return {}
        watch = Stopwatch(self._model.device)
        lanes = [self._lanes[index] for index in observations]
        if any(lane.instruction is None for lane in lanes):
            missing = [index for index in observations if self._lanes[index].instruction is None]
            raise UserError(
                f"policy: lanes {missing} have no instruction yet: call reset(lane, instruction) before step"
            )
        climbs = [Climb(lane.rule, lane.episode_step, lane.last_exit_layer) for lane in lanes]
        visual, text, padding = self._perceive(lanes, list(observations.values()), watch)
        self._climb(lanes, climbs, visual, text, padding, watch)
        actions = [climb.action() for climb in climbs]
        watch.lap("head")
        share = watch.times().shared(len(lanes))
        steps = [
            climb.report(action, lane.tokens, share) for climb, action, lane in zip(climbs, actions, lanes)
        ]
        for lane, climb, step in zip(lanes, climbs, steps):
            if step.action.is_finite:
                lane.state, lane.last_exit_layer = climb.chosen.state, step.exit_layer
                lane.episode_step += 1
        return dict(zip(observations, steps))

    def _perceive(
        self, lanes: Sequence[_Lane], observations: Sequence[Observation], watch: Stopwatch
    ) -> tuple[Tensor, TextContext, Tensor]:
        """Visual tokens, texts, and where the texts are padding (N, S, 1), of N lanes."""
        images = self._preprocess([image for each in observations for image in (each.static, each.gripper)])
        watch.lap("preprocess")
        text, padding = self._texts(tuple(lane.instruction or "" for lane in lanes))
        visual = self._model.see(images.unflatten(1, (len(lanes), -1))[0], self._tcp(observations)).visual
        watch.lap("vision")
        return visual, text, padding

    def _texts(self, instructions: tuple[str, ...]) -> tuple[TextContext, Tensor]:
        """Encoded anew only where lanes or instructions change."""
        if self._read_texts is None or self._read_texts[0] != instructions:
            ids, mask = (tensor.to(self._model.device) for tensor in self._tokenizer.encode(instructions))
            text = self._model.encode_text(ids, mask, self._tokenizer.image_token)
            self._read_texts = instructions, text, (mask == 0)[..., None]
        return self._read_texts[1:]

    def _tcp(self, observations: Sequence[Observation]) -> Tensor | None:
        """(N, 7) where the network looks at it; all lanes have it or none."""
        if self._model.proprioception is None or any(each.tcp is None for each in observations):
            return None
        return torch.stack([torch.as_tensor(each.tcp, dtype=torch.float32) for each in observations]).to(
            self._model.device
        )

    def _climb(
        self,
        lanes: Sequence[_Lane],
        climbs: Sequence[Climb],
        visual: Tensor,
        text: TextContext,
        padding: Tensor,
        watch: Stopwatch,
    ) -> None:
        """Runs the layers, each for the lanes that still climb."""
        hidden, rows = text.embedding, list(range(len(lanes)))  # rows: which lane each row of the batch is
        for index, layer in enumerate(self._model.layers):
            hidden = layer(hidden, visual, text)
            readers = [at for at, row in enumerate(rows) if climbs[row].reads(index)]
            if not readers:
                continue
            features = pool(hidden.masked_fill(padding, float("-inf"))[readers])
            watch.lap("language")
            outputs = self._read(features, [lanes[rows[at]].state for at in readers])
            ended = {at for at, output in zip(readers, outputs) if climbs[rows[at]].ends(index, output)}
            watch.lap("head")
            if ended:
                going = [at for at in range(len(rows)) if at not in ended]
                if not going:
                    return
                rows = [rows[at] for at in going]
                hidden, visual, padding, text = (
                    hidden[going],
                    visual[going],
                    padding[going],
                    _rows(text, going),
                )

    def _read(self, features: Tensor, states: Sequence[HeadState]) -> list[HeadOutput]:
        """The shared head at features (N, width), each from its lane's state."""
        state = HeadState(*(torch.cat(parts, 1) for parts in zip(*states)))
        output = self._model.shared_head(features[:, None], state)
        return [
            HeadOutput(
                output.pose[i : i + 1],
                output.gripper_logit[i : i + 1],
                HeadState(*(part[:, i : i + 1] for part in output.state)),
                output.feature[i : i + 1],
            )
            for i in range(len(states))
        ]


def _rows(text: TextContext, rows: list[int]) -> TextContext:
    """The texts of some lanes only."""
    return TextContext(**{field.name: getattr(text, field.name)[rows] for field in dataclasses.fields(text)})
