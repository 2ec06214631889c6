"""How does one control step run? From two images up the layers to the first exit that agrees."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from deer_vla_ros.errors import UserError
from deer_vla_ros.inference.climb import Climb
from deer_vla_ros.inference.exit_rule import ExitRule
from deer_vla_ros.inference.preprocess import ImagePreprocessor
from deer_vla_ros.inference.stopwatch import Stopwatch
from deer_vla_ros.inference.types import Observation, PolicyStep
from deer_vla_ros.model.config import ModelConfig
from deer_vla_ros.model.decoder import TextContext
from deer_vla_ros.model.head import HeadOutput, HeadState, pool
from deer_vla_ros.model.network import MultiExitVLA
from deer_vla_ros.model.text import InstructionTokenizer


class DeerPolicy:
    """The dynamic-depth policy: `reset` with an instruction, then `step` on every observation.

    Its memory is the head's LSTM state, the depth of the last probing step and the step count; nothing grows with the episode.
    `rule` may be replaced between two steps: thresholds change, memory stays.
    """

    def __init__(self, model: MultiExitVLA, tokenizer: InstructionTokenizer, rule: ExitRule):
        self._model = model
        self._tokenizer = tokenizer
        self._preprocess = ImagePreprocessor(model.config.vision.image_size, model.device, model.dtype)
        self._text: TextContext | None = None
        self._clear()
        self.rule = rule

    @property
    def rule(self) -> ExitRule:
        """The exit rule of the next step."""
        return self._rule

    @rule.setter
    def rule(self, rule: ExitRule) -> None:
        check_exits(rule, self._model.config)
        self._rule = rule

    @property
    def state(self) -> HeadState:
        """The head's recurrent state after the last step."""
        return self._state

    @property
    def tokens(self) -> int:
        """Tokens of the current instruction, specials included; 0 before the first `reset`."""
        return 0 if self._text is None else self._text.tokens

    @torch.inference_mode()
    def reset(self, instruction: str) -> None:
        """Starts an episode: clears the memory and encodes the instruction, once."""
        ids, mask = (tensor.to(self._model.device) for tensor in self._tokenizer.encode([instruction]))
        self._text = self._model.encode_text(ids, mask, self._tokenizer.image_token)
        self._clear()

    @torch.inference_mode()
    def step(self, observation: Observation) -> PolicyStep:
        """One decision. Raises UserError before the first `reset`; a failure or a non-finite action leaves the memory as it was."""
        watch = Stopwatch(self._model.device)
        hidden_states = self._perceive(observation, watch)
        return self._decide(hidden_states, watch)

    @torch.inference_mode()
    def features(self, observation: Observation) -> Tensor:
        """(layers, width): what the head would read after every layer, all of which run. Leaves the memory as it is."""
        return torch.cat(
            [pool(hidden) for hidden in self._perceive(observation, Stopwatch(self._model.device))]
        )

    @torch.inference_mode()
    def step_on_features(self, features: Tensor) -> PolicyStep:
        """The same decision as `step`, from `features` of an observation: many rules can be tried on one look at it."""
        return self._decide((feature[None, None] for feature in features), Stopwatch(self._model.device))

    def _perceive(self, observation: Observation, watch: Stopwatch) -> Iterator[Tensor]:
        """Hidden states (1, S, width) of layer 0, 1, ...; each layer runs when it is asked for."""
        if self._text is None:
            raise UserError("policy: no instruction yet: call reset(instruction) before step(observation)")
        images = self._preprocess((observation.static, observation.gripper))
        watch.lap("preprocess")
        visual = self._model.see(images, self._tcp(observation)).visual
        watch.lap("vision")
        return self._model.hidden_states(visual, self._text)

    def _tcp(self, observation: Observation) -> Tensor | None:
        """(1, 7) where the network looks at it."""
        if self._model.proprioception is None or observation.tcp is None:
            return None
        return torch.as_tensor(observation.tcp, dtype=torch.float32, device=self._model.device)[None]

    def _decide(self, hidden_states: Iterator[Tensor], watch: Stopwatch) -> PolicyStep:
        climb = Climb(self._rule, self._episode_step, self._last_exit_layer)
        for layer, hidden in enumerate(hidden_states):
            if climb.reads(layer):
                ended = climb.ends(layer, self._read(hidden, watch))
                watch.lap("head")
                if ended:
                    break
        action = climb.action()
        watch.lap("head")
        step = climb.report(action, self._text.tokens, watch.times())
        if action.is_finite:
            self._state = climb.chosen.state
            self._last_exit_layer = step.exit_layer
            self._episode_step += 1
        return step

    def _read(self, hidden: Tensor, watch: Stopwatch) -> HeadOutput:
        """The shared head at a hidden state (1, S, width), from the stored state, which stays as it is."""
        feature = pool(hidden)[:, None]
        watch.lap("language")
        return self._model.shared_head(feature, self._state)

    def _clear(self) -> None:
        self._state = self._model.shared_head.initial_state()
        self._last_exit_layer = -1
        self._episode_step = 0


def check_exits(rule: ExitRule, config: ModelConfig) -> None:
    """Raises UserError where a rule names layers that are no exits of the network."""
    unknown = sorted(set(rule.exits) - set(config.exits))
    if unknown:
        raise UserError(
            f"exit rule: layers {unknown} are no exits of this network: choose from {config.exits}"
        )
