"""The dynamic-depth policy: it runs the layers upwards until two neighbouring exits agree on the action."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deer_vla_ros.errors import UserError
from deer_vla_ros.inference.backends import Backend
from deer_vla_ros.inference.climb import Climb
from deer_vla_ros.inference.exit_rule import ExitRule
from deer_vla_ros.inference.preprocess import ImagePreprocessor, uploaded
from deer_vla_ros.inference.reading import Reading, packed, values_compared
from deer_vla_ros.inference.static_step import PreparedGroups, StaticStep
from deer_vla_ros.inference.types import Observation, PolicyStep, StageTimes
from deer_vla_ros.model.config import ModelConfig
from deer_vla_ros.model.decoder import Layer, TextContext
from deer_vla_ros.model.head import HeadState, PreparedState, pool
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

    def ascent(self) -> _Ascent:
        return _Ascent(self, Climb(self.rule, self.episode_step, self.last_exit_layer))


@dataclass(eq=False)
class _Ascent:
    """One climb of one lane, with what it needs on the device.

    waiting: (width,) the feature of the layer before, if the head is to be read for it together with the next
    one. before: the values of the output before, which the next one is compared with. state: after the chosen
    exit.
    """

    lane: _Lane
    climb: Climb
    waiting: Tensor | None = None
    before: Tensor | None = None
    state: HeadState | None = None


class DeerPolicy:
    """Decides control steps: call `reset` with an instruction, then `step` on every observation.

    A lane is one running episode with its own instruction, exit rule and memory. The memory is the head's
    LSTM state, the depth of the last probing step and the number of steps; it does not grow.
    A robot uses one lane, lane 0, and all methods use it by default. Scoring uses several lanes: `step_lanes`
    runs them as one batch. Each lane decides as it would alone, up to the rounding that another batch size
    causes, and leaves the batch at its exit.
    """

    def __init__(
        self,
        model: MultiExitVLA,
        tokenizer: InstructionTokenizer,
        rule: ExitRule,
        lanes: int = 1,
        backend: Backend | None = None,
    ):
        """backend: runs the steps of a policy with one lane whose rule allows the first exits of the network.
        Other steps run without it, operator by operator."""
        assert backend is None or lanes == 1, "a backend is for one lane"
        # Whether a backend's step launches the next exit before it has read the last one. The device then has
        # no pause, but the result of a step's last launch is not used. It changes no result.
        self.launches_early = False
        self._model = model
        self._tokenizer = tokenizer
        self._preprocess = ImagePreprocessor(model.config.vision.image_size, model.device, model.dtype)
        _check_exits(rule, model.config)
        with torch.inference_mode():
            state = model.shared_head.initial_state()
            prepared = model.shared_head.prepare(state)
        self._lanes = [_Lane(rule, state, prepared) for _ in range(lanes)]
        self._static = StaticStep(model, rule.delta, backend) if backend else None
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
        ids, mask = self._tokenised([instruction])
        text = self._model.encode_text(ids, mask, self._tokenizer.image_token)
        if self._static is not None:
            self._static.reset(ids, mask, self._tokenizer.image_token)
            state, prepared = self._static.state, self._static.prepared
        else:
            state = self._model.shared_head.initial_state()
            prepared = self._model.shared_head.prepare(state)
        self._lanes[lane] = _Lane(self._lanes[lane].rule, state, prepared, instruction, text)
        return text.tokens

    def prepare_layers(
        self, first: int, layers: Sequence[Layer], is_over: Callable[[], bool] = lambda: False
    ) -> PreparedGroups:
        """Prepares steps that use `layers`, the ones from number `first` on. Any thread may call it.

        is_over: once it is true, the rest is not prepared.
        """
        return self._static.prepare(first, layers, is_over) if self._static is not None else {}

    def use_layers(self, prepared: PreparedGroups) -> None:
        """The layers for which `prepare_layers` returned `prepared` are part of the network now."""
        if self._static is not None:
            self._static.use(prepared)

    def forget_layers(self, count: int) -> None:
        """Only the first `count` layers are part of the network now."""
        if self._static is not None:
            self._static.forget(count)

    def step(self, observation: Observation) -> PolicyStep:
        """Decides one step. Raises UserError before the first `reset`.

        An exception or an action that is not finite leaves the memory as it was.
        """
        if self._static is None or not self._static.fits(self.rule):
            return self.step_lanes({0: observation})[0]
        return self._static_step(observation)

    @torch.inference_mode()
    def _static_step(self, observation: Observation) -> PolicyStep:
        lane, static = self._lanes[0], self._static
        self._check_instructions([0])
        climb = Climb(lane.rule, lane.episode_step, lane.last_exit_layer)
        static.start()
        images = self._preprocess([observation.static, observation.gripper])
        # Computed on the host: the few numbers take one copy to the device, not a dozen operators there.
        pose = self._model.pose_values(self._tcp([observation]), 1)
        static.begin(images, uploaded(pose, self._model.device))
        static.launch(0)
        for index, layer in enumerate(lane.rule.exits):
            is_early = self.launches_early and index + 1 < len(lane.rule.exits)
            if is_early:
                static.launch(index + 1)
            if climb.reads(layer) and climb.ends(layer, static.read(index)):
                break
            if not is_early:
                static.launch(index + 1)
        action = climb.action()
        step = climb.report(action, lane.text.tokens, static.times(index))
        if action.is_finite:
            static.keep(index)
            lane.last_exit_layer = layer
            lane.episode_step += 1
        return step

    @torch.inference_mode()
    def step_lanes(self, observations: Mapping[int, Observation]) -> dict[int, PolicyStep]:
        """Decides one step of every lane that has an observation, as `step` does; images may differ in size.

        The rules of all these lanes use the same delta. The times of a lane are its equal share of the times
        of the batch.
        """
        if not observations:
            return {}
        watch = _Stopwatch(self._model.device)
        visual = self._look(observations, watch)
        ascents = [self._lanes[index].ascent() for index in observations]
        assert len({ascent.lane.rule.delta for ascent in ascents}) == 1, "one batch, one delta"
        self._climb(ascents, visual, watch)
        return dict(zip(observations, self._conclude(ascents, watch)))

    @torch.inference_mode()
    def features(self, observation: Observation) -> Tensor:
        """(layers, width): what the head would read after each layer. Runs every layer; the memory stays."""
        visual = self._look({0: observation}, _Stopwatch(self._model.device))
        return torch.cat([pool(hidden) for hidden in self._model.hidden_states(visual, self._lanes[0].text)])

    @torch.inference_mode()
    def step_on_features(self, features: Tensor) -> PolicyStep:
        """Decides as `step` does, from `features` of an observation. Many rules can use the same features."""
        watch, ascent = _Stopwatch(self._model.device), self._lanes[0].ascent()
        for layer, feature in enumerate(features):
            if ascent.climb.reads(layer) and self._read(layer, {ascent: feature}):
                break
        return self._conclude([ascent], watch)[0]

    def _look(self, observations: Mapping[int, Observation], watch: _Stopwatch) -> Tensor:
        """The visual tokens (N, visual tokens, vision width) of the observations of N lanes."""
        self._check_instructions(observations)
        seen = list(observations.values())
        images = self._preprocess([image for each in seen for image in (each.static, each.gripper)])
        watch.lap("preprocess")
        tcp = self._tcp(seen)
        tcp = None if tcp is None else uploaded(tcp, self._model.device)
        visual = self._model.see(images.unflatten(1, (len(seen), -1))[0], tcp).visual
        watch.lap("vision")
        return visual

    def _check_instructions(self, lanes: Iterable[int]) -> None:
        """Raises UserError if a lane has no instruction yet."""
        missing = [index for index in lanes if self._lanes[index].text is None]
        if missing and len(self._lanes) == 1:
            raise UserError("policy: no instruction yet: call reset(instruction) before step(observation)")
        if missing:
            raise UserError(
                f"policy: lanes {missing} have no instruction yet: "
                "call reset(instruction, lane) before step_lanes(observations)"
            )

    def _tcp(self, observations: Sequence[Observation]) -> Tensor | None:
        """(N, 7) poses on the host for a network that uses them; None if an observation has none."""
        if self._model.proprioception is None or any(each.tcp is None for each in observations):
            return None
        poses = [torch.as_tensor(each.tcp, dtype=torch.float32) for each in observations]
        return torch.stack(poses)

    def _climb(self, ascents: Sequence[_Ascent], visual: Tensor, watch: _Stopwatch) -> None:
        """Runs the layers until every climb has ended. A lane whose climb has ended leaves the batch."""
        text, padding = self._texts([ascent.lane for ascent in ascents])
        hidden, going = text.embedding, list(ascents)  # going: the ascent of each row of the batch
        for index, layer in enumerate(self._model.layers):
            hidden = layer(hidden, visual, text)
            readers = [row for row, ascent in enumerate(going) if ascent.climb.reads(index)]
            if not readers:
                continue
            tokens = hidden if padding is None else hidden.masked_fill(padding, float("-inf"))
            features = pool(_rows(tokens, readers))
            if all(going[row].climb.waits(index) for row in readers):
                for row, feature in zip(readers, features):
                    going[row].waiting = feature
                continue
            watch.lap("language")
            ended = self._read(index, {going[row]: feature for row, feature in zip(readers, features)})
            watch.lap("head")
            if not ended:
                continue
            rows = [row for row, ascent in enumerate(going) if ascent not in ended]
            if not rows:
                return
            going = [going[row] for row in rows]
            hidden, visual, text = hidden[rows], visual[rows], text.rows(rows)
            padding = None if padding is None else padding[rows]

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

    def _tokenised(self, instructions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids and mask (N, S) on the device."""
        ids, mask = self._tokenizer.encode(instructions)
        return ids.to(self._model.device), mask.to(self._model.device)

    def _encode(self, instructions: Sequence[str]) -> tuple[TextContext, Tensor]:
        """The texts of instructions, and the mask (N, S) of their tokens: 0 where a text is padded."""
        ids, mask = self._tokenised(instructions)
        return self._model.encode_text(ids, mask, self._tokenizer.image_token), mask

    def _read(self, layer: int, features: Mapping[_Ascent, Tensor]) -> set[_Ascent]:
        """Reads the head after a layer, as one batch. Returns the ascents that end there.

        features: (width,) of each ascent that reads here. One that waits only keeps its feature.
        """
        reads = []
        for ascent, feature in features.items():
            if ascent.climb.waits(layer):
                ascent.waiting = feature
            else:
                reads.append(ascent)
        if not reads:
            return set()
        waited = [ascent for ascent in reads if ascent.waiting is not None]
        order = [*waited, *reads]
        output = self._model.shared_head.probe(
            torch.stack([*(ascent.waiting for ascent in waited), *(features[ascent] for ascent in reads)]),
            PreparedState.joined([ascent.lane.prepared for ascent in order]),
        )
        delta = reads[0].lane.rule.delta
        values = values_compared(delta, output)
        for ascent, value in zip(waited, values):
            ascent.waiting, ascent.before = None, value
        now, first = values[len(waited) :], len(waited)
        nothing = torch.full_like(now[0], float("nan"))
        before = torch.stack([nothing if ascent.before is None else ascent.before for ascent in reads])
        numbers = packed(delta, output.rows(first), now, before).cpu().numpy()
        ended = set()
        for row, ascent in enumerate(reads):
            ascent.before = now[row]
            if ascent.climb.ends(layer, Reading.of(numbers[row])):
                ascent.state = output.state.row(first + row)
                ended.add(ascent)
        return ended

    def _conclude(self, ascents: Sequence[_Ascent], watch: _Stopwatch) -> list[PolicyStep]:
        """The decisions of climbs that have ended. A lane remembers its own, if the action is finite."""
        watch.lap("head")
        times = watch.times().shared(len(ascents))
        steps = []
        for ascent in ascents:
            lane, action = ascent.lane, ascent.climb.action()
            step = ascent.climb.report(action, lane.text.tokens, times)
            steps.append(step)
            if action.is_finite:
                # The action has left the device already, so this does not delay it.
                lane.last_exit_layer = step.exit_layer
                lane.episode_step += 1
                if self._static is not None:
                    self._static.remember(ascent.state)
                else:
                    lane.state, lane.prepared = ascent.state, self._model.shared_head.prepare(ascent.state)
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
