"""The dynamic-depth policy: it runs the layers upwards until two neighbouring exits agree on the action."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deer_vla_ros.errors import UserError
from deer_vla_ros.inference.climb import Climb
from deer_vla_ros.inference.exit_rule import ExitRule
from deer_vla_ros.inference.preprocess import ImagePreprocessor
from deer_vla_ros.inference.types import Observation, PolicyStep, StageTimes
from deer_vla_ros.model.config import ModelConfig
from deer_vla_ros.model.decoder import TextContext
from deer_vla_ros.model.head import HeadOutput, HeadState, PreparedState, pool
from deer_vla_ros.model.network import MultiExitVLA
from deer_vla_ros.model.text import InstructionTokenizer


@dataclass
class _Lane:
    """One episode: everything that its next step depends on."""

    rule: ExitRule
    state: HeadState
    prepared: PreparedState
    instruction: str = ""
    text: TextContext | None = None
    last_exit_layer: int = -1
    episode_step: int = 0

    def climb(self) -> Climb:
        return Climb(self.rule, self.episode_step, self.last_exit_layer)


class DeerPolicy:
    """Decides control steps: call `reset` with an instruction, then `step` on every observation.

    A lane is one running episode with its own instruction, exit rule and memory. The memory is the head's
    LSTM state, the depth of the last probing step and the number of steps; it does not grow.
    A robot uses one lane, lane 0, and all methods use it by default. Scoring uses several lanes: `step_lanes`
    runs them as one batch. Each lane decides as it would alone, up to the rounding that another batch size
    causes, and leaves the batch at its exit.
    """

    def __init__(self, model: MultiExitVLA, tokenizer: InstructionTokenizer, rule: ExitRule, lanes: int = 1):
        self._model = model
        self._tokenizer = tokenizer
        self._preprocess = ImagePreprocessor(model.config.vision.image_size, model.device, model.dtype)
        _check_exits(rule, model.config)
        with torch.inference_mode():
            state = model.shared_head.initial_state()
            prepared = model.shared_head.prepare(state)
        self._lanes = [_Lane(rule, state, prepared) for _ in range(lanes)]
        self._batch_texts: tuple[tuple[str, ...], TextContext, Tensor] | None = None

    @property
    def rule(self) -> ExitRule:
        """The exit rule of the next step. An assignment sets the rule of all lanes; the memory stays."""
        return self._lanes[0].rule

    @rule.setter
    def rule(self, rule: ExitRule) -> None:
        _check_exits(rule, self._model.config)
        for lane in self._lanes:
            lane.rule = rule

    def set_rule(self, rule: ExitRule, lane: int) -> None:
        """Sets the exit rule of the next step of one lane; its memory stays."""
        _check_exits(rule, self._model.config)
        self._lanes[lane].rule = rule

    @property
    def state(self) -> HeadState:
        """The head's recurrent state after the last step."""
        return self._lanes[0].state

    @torch.inference_mode()
    def reset(self, instruction: str, lane: int = 0) -> int:
        """Starts an episode: clears the memory, keeps the rule, and encodes the instruction once.

        Returns the number of the instruction's tokens, special tokens included.
        """
        text, _ = self._encode([instruction])
        state = self._model.shared_head.initial_state()
        prepared = self._model.shared_head.prepare(state)
        self._lanes[lane] = _Lane(self._lanes[lane].rule, state, prepared, instruction, text)
        return text.tokens

    def step(self, observation: Observation) -> PolicyStep:
        """Decides one step. Raises UserError before the first `reset`.

        An exception or an action that is not finite leaves the memory as it was.
        """
        return self.step_lanes({0: observation})[0]

    @torch.inference_mode()
    def step_lanes(self, observations: Mapping[int, Observation]) -> dict[int, PolicyStep]:
        """Decides one step of every lane that has an observation, as `step` does; images may differ in size.

        The times of a lane are its equal share of the times of the batch.
        """
        if not observations:
            return {}
        watch = _Stopwatch(self._model.device)
        visual = self._look(observations, watch)
        lanes = [self._lanes[index] for index in observations]
        climbs = [lane.climb() for lane in lanes]
        self._climb(lanes, climbs, visual, watch)
        return dict(zip(observations, self._conclude(lanes, climbs, watch)))

    @torch.inference_mode()
    def features(self, observation: Observation) -> Tensor:
        """(layers, width): what the head would read after each layer. Runs every layer; the memory stays."""
        visual = self._look({0: observation}, _Stopwatch(self._model.device))
        return torch.cat([pool(hidden) for hidden in self._model.hidden_states(visual, self._lanes[0].text)])

    @torch.inference_mode()
    def step_on_features(self, features: Tensor) -> PolicyStep:
        """Decides as `step` does, from `features` of an observation. Many rules can use the same features."""
        watch, lane = _Stopwatch(self._model.device), self._lanes[0]
        climb = lane.climb()
        for layer, feature in enumerate(features):
            if climb.reads(layer) and climb.ends(layer, self._read([feature], [lane.prepared])[0]):
                break
        return self._conclude([lane], [climb], watch)[0]

    def _look(self, observations: Mapping[int, Observation], watch: _Stopwatch) -> Tensor:
        """The visual tokens (N, visual tokens, vision width) of the observations of N lanes."""
        missing = [index for index in observations if self._lanes[index].text is None]
        if missing and len(self._lanes) == 1:
            raise UserError("policy: no instruction yet: call reset(instruction) before step(observation)")
        if missing:
            raise UserError(
                f"policy: lanes {missing} have no instruction yet: "
                "call reset(instruction, lane) before step_lanes(observations)"
            )
        seen = list(observations.values())
        images = self._preprocess([image for each in seen for image in (each.static, each.gripper)])
        watch.lap("preprocess")
        visual = self._model.see(images.unflatten(1, (len(seen), -1))[0], self._tcp(seen)).visual
        watch.lap("vision")
        return visual

    def _tcp(self, observations: Sequence[Observation]) -> Tensor | None:
        """(N, 7) poses for a network that uses them; None if an observation has none."""
        if self._model.proprioception is None or any(each.tcp is None for each in observations):
            return None
        poses = [torch.as_tensor(each.tcp, dtype=torch.float32) for each in observations]
        return torch.stack(poses).to(self._model.device)

    def _climb(
        self, lanes: Sequence[_Lane], climbs: Sequence[Climb], visual: Tensor, watch: _Stopwatch
    ) -> None:
        """Runs the layers until every climb has ended. A lane whose climb has ended leaves the batch."""
        text, padding = self._texts(lanes)
        hidden, rows = text.embedding, list(range(len(lanes)))  # rows: the lane of each row of the batch
        waiting: dict[int, Tensor] = {}  # by lane: a feature that is read together with the next one
        for index, layer in enumerate(self._model.layers):
            hidden = layer(hidden, visual, text)
            readers = [row for row, lane in enumerate(rows) if climbs[lane].reads(index)]
            if not readers:
                continue
            tokens = hidden if padding is None else hidden.masked_fill(padding, float("-inf"))
            features = {rows[row]: feature for row, feature in zip(readers, pool(_rows(tokens, readers)))}
            kept = [lane for lane in features if climbs[lane].waits(index)]
            waiting |= {lane: features.pop(lane) for lane in kept}
            if not features:
                continue
            watch.lap("language")
            ended = self._ended(lanes, climbs, index, features, waiting)
            ended = {row for row in readers if rows[row] in ended}
            watch.lap("head")
            if not ended:
                continue
            going = [row for row in range(len(rows)) if row not in ended]
            if not going:
                return
            rows = [rows[row] for row in going]
            hidden, visual, text = hidden[going], visual[going], text.rows(going)
            padding = None if padding is None else padding[going]

    def _texts(self, lanes: Sequence[_Lane]) -> tuple[TextContext, Tensor | None]:
        """The texts of a batch, and where they are padding (N, S, 1); None: nowhere.

        A lane does not notice padding. It stands to the right, and a token looks only to the left;
        the head reads the maximum over the lane's own tokens.
        """
        if len(lanes) == 1:
            return lanes[0].text, None
        instructions = tuple(lane.instruction for lane in lanes)
        if self._batch_texts is None or self._batch_texts[0] != instructions:
            text, mask = self._encode(instructions)
            self._batch_texts = instructions, text, (mask == 0)[..., None]
        return self._batch_texts[1:]

    def _encode(self, instructions: Sequence[str]) -> tuple[TextContext, Tensor]:
        """The texts of instructions, and the mask (N, S) of their tokens: 0 where a text is padded."""
        ids, mask = (tensor.to(self._model.device) for tensor in self._tokenizer.encode(instructions))
        return self._model.encode_text(ids, mask, self._tokenizer.image_token), mask

    def _ended(
        self,
        lanes: Sequence[_Lane],
        climbs: Sequence[Climb],
        layer: int,
        features: Mapping[int, Tensor],
        waiting: dict[int, Tensor],
    ) -> set[int]:
        """Reads the head after a layer, as one batch. Returns the lanes whose climb ends there.

        features, waiting: by lane, the feature (width,) after this layer, and after the layer before, if that
            still has to be read. `waiting` loses what is read.
        """
        before = [lane for lane in features if lane in waiting]
        order = [*before, *features]
        outputs = self._read(
            [*(waiting.pop(lane) for lane in before), *features.values()],
            [lanes[lane].prepared for lane in order],
        )
        for lane, output in zip(before, outputs):
            climbs[lane].ends(layer - 1, output)
        return {
            lane for lane, output in zip(features, outputs[len(before) :]) if climbs[lane].ends(layer, output)
        }

    def _read(self, features: Sequence[Tensor], prepared: Sequence[PreparedState]) -> Sequence[HeadOutput]:
        """The shared head's output for each feature (width,), from the state of its lane."""
        return self._model.shared_head.probe(torch.stack(features), PreparedState.joined(prepared)).split()

    def _conclude(
        self, lanes: Sequence[_Lane], climbs: Sequence[Climb], watch: _Stopwatch
    ) -> list[PolicyStep]:
        """The decisions of climbs that have ended. A lane remembers its own, if the action is finite."""
        actions = [climb.action() for climb in climbs]
        watch.lap("head")
        times = watch.times().shared(len(lanes))
        steps = []
        for lane, climb, action in zip(lanes, climbs, actions):
            step = climb.report(action, lane.text.tokens, times)
            steps.append(step)
            if action.is_finite:
                # The action has left the device already, so this does not delay it.
                lane.state, lane.last_exit_layer = climb.chosen.state, step.exit_layer
                lane.prepared = self._model.shared_head.prepare(lane.state)
                lane.episode_step += 1
        return steps


class _Stopwatch:
    """Adds up the milliseconds of each stage of StageTimes. Every lap waits for the device to finish."""

    def __init__(self, device: torch.device):
        self._device = device
        self._laps = {"preprocess": 0.0, "vision": 0.0, "language": 0.0, "head": 0.0}
        self._last = self._now()

    def lap(self, stage: str) -> None:
        """Adds the time since the last lap to `stage`."""
        now = self._now()
        self._laps[stage] += (now - self._last) * 1e3
        self._last = now

    def times(self) -> StageTimes:
        return StageTimes(**self._laps)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def _rows(tensor: Tensor, rows: list[int]) -> Tensor:
    """Some rows of a batch; the tensor itself if these are all."""
    return tensor if len(rows) == len(tensor) else tensor[rows]


def _check_exits(rule: ExitRule, config: ModelConfig) -> None:
    """Raises UserError if a rule names layers that are no exits of the network."""
    unknown = sorted(set(rule.exits) - set(config.exits))
    if unknown:
        raise UserError(
            f"exit rule: layers {unknown} are no exits of this network: choose from {config.exits}"
        )
