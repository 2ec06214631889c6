"""A step of one episode as a few functions with fixed memory: one that looks, and one for each exit.

Every input and output of these functions stays at the same place in memory. A backend (see `backends`) can
therefore record them once, as CUDA graphs, and replay them in every step, or compile them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deer_vla_ros.inference.backends import Backend
from deer_vla_ros.inference.exit_rule import ExitRule
from deer_vla_ros.inference.reading import NUMBERS, Reading, packed, values_compared
from deer_vla_ros.inference.types import StageTimes
from deer_vla_ros.model.config import CAMERAS
from deer_vla_ros.model.decoder import Layer, TextContext
from deer_vla_ros.model.grounding import POSE_VALUES
from deer_vla_ros.model.head import ActionHead, HeadState, PreparedState, pool
from deer_vla_ros.model.network import MultiExitVLA

Parts = TypeVar("Parts", HeadState, PreparedState)
PreparedGroups = dict[tuple[int, int], Callable[[], None]]
"""The functions of exits, by the number of tokens of the text and the index of the exit."""


class ExitGroup(nn.Module):
    """The layers from the one after an exit to the next exit, and the head's reading there.

    The first group reads the head also after its last layer but one, with which its exit is compared.
    """

    def __init__(self, layers: Sequence[Layer], head: ActionHead, delta: str, is_first: bool):
        super().__init__()
        self.layers, self.head, self.delta, self.is_first = nn.ModuleList(layers), head, delta, is_first

    def forward(
        self,
        hidden: Tensor,
        visual: Tensor,
        text: TextContext,
        padding: Tensor | None,
        before: Tensor,
        prepared: PreparedState,
    ) -> tuple[Tensor, Tensor, Tensor, HeadState]:
        """Returns the hidden state (1, S, width), and what `read` returns."""
        hidden, features = self.climb(hidden, visual, text, padding)
        return hidden, *self.read(features, before, prepared)

    def climb(
        self, hidden: Tensor, visual: Tensor, text: TextContext, padding: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Runs the layers. Returns the hidden state (1, S, width) and the features to read (1 or 2, width).

        padding: (1, S, 1), true where the text is padded; None: nowhere.
        """
        for layer in self.layers[:-1]:
            hidden = layer(hidden, visual, text)
        earlier = [hidden] if self.is_first else []
        hidden = self.layers[-1](hidden, visual, text)
        states = torch.cat([*earlier, hidden])
        return hidden, pool(states if padding is None else states.masked_fill(padding, float("-inf")))

    def read(
        self, features: Tensor, before: Tensor, prepared: PreparedState
    ) -> tuple[Tensor, Tensor, HeadState]:
        """Returns the values (1, ...) that the next exit is compared with, the packed reading (1, NUMBERS)
        and the memory after this exit. before: the values of the exit before."""
        output = self.head.probe(features, prepared)
        values = values_compared(self.delta, output)
        if self.is_first:
            before, values, output = values[:1], values[1:], output.rows(1)
        return values, packed(self.delta, output, values, before), output.state


@dataclass(frozen=True)
class _Text:
    """A text of a fixed number of tokens, and the hidden state after each exit. padding: as in ExitGroup."""

    context: TextContext
    padding: Tensor | None
    hidden: list[Tensor]


class StaticStep:
    """The functions of a step, their memory, and the memory of the episode.

    The order of calls: `reset`, then for each step `begin`, `launch` and `read` for the exits in turn, and
    `keep` with the exit that was chosen. Only the thread that steps the policy calls these methods; only
    `prepare` may run in another thread meanwhile.
    """

    def __init__(self, model: MultiExitVLA, delta: str, backend: Backend):
        """Prepares the functions of all layers that are on the device. delta: as in ExitRule."""
        self._model, self._delta, self._backend = model, delta, backend
        config, head = model.config, model.shared_head
        empty = {"device": model.device, "dtype": model.dtype}
        side = config.vision.image_size
        self._images = torch.zeros(1, CAMERAS, 3, side, side, **empty)
        self._pose = torch.zeros(1, POSE_VALUES, **empty)
        self._visual = torch.zeros(1, config.visual_tokens, config.vision.width, **empty)
        self.state, *self._after = (_own_memory(head.initial_state()) for _ in (None, *config.exits))
        self.prepared = _own_memory(head.prepare(self.state))
        values = config.decoder.width if delta == "feature" else 6
        self._values = torch.zeros(len(config.exits), 1, values, device=model.device)
        self._numbers = torch.zeros(len(config.exits), NUMBERS, device=model.device)
        self._host = backend.host_memory(self._numbers)
        self._host_numbers = self._host.numpy()
        self._began, self._preprocessed, self._seen = (backend.mark() for _ in range(3))
        self._climbed, self._done = ([backend.mark() for _ in config.exits] for _ in range(2))
        self._began_s = 0.0
        self._texts: dict[int, _Text] = {}
        self._look = backend.capture(self._looking())
        self._keeps = [backend.capture(self._keeping(index)) for index in range(len(config.exits))]
        self._groups: PreparedGroups = {}
        present = [layer for layer in model.layers if not next(layer.parameters()).is_meta]
        for tokens in backend.token_counts(config.max_tokens):
            self._texts[tokens] = self._new_text(tokens)
        self.use(self.prepare(0, present))
        self._text = next(iter(self._texts.values()), None)

    def fits(self, rule: ExitRule) -> bool:
        """Whether steps under this rule can run here: it allows the first exits, none left out."""
        return rule.exits == self._model.config.exits[: len(rule.exits)] and rule.delta == self._delta

    # --- an episode

    def reset(self, ids: Tensor, mask: Tensor, image_token: int) -> None:
        """Begins an episode. ids, mask: (1, S), the token ids of its instruction and as many ones."""
        count = ids.shape[1]
        tokens = self._backend.tokens_for(count)
        if tokens not in self._texts:  # the backend needs no preparation: only the newest text is kept
            self._texts, self._groups = {tokens: self._new_text(tokens)}, {}
        self._text = self._texts[tokens]
        padded = (F.pad(values, (0, tokens - count)) for values in (ids, mask))
        for own, given in zip(self._text.context, self._model.encode_text(*padded, image_token)):
            own.copy_(given)
        if self._text.padding is not None:
            self._text.padding[0, :, 0] = torch.arange(tokens, device=self._model.device) >= count
        self.remember(self._model.shared_head.initial_state())

    def remember(self, state: HeadState) -> None:
        """Makes `state` the memory of the episode."""
        for own, given in zip(self.state, state):
            own.copy_(given)
        self._prepare_state()

    # --- a step

    def start(self) -> None:
        """The time of a step begins."""
        self._began_s = time.perf_counter()
        self._began.record()

    def begin(self, images: Tensor, pose: Tensor) -> None:
        """Looks. images: (1, cameras, 3, size, size) normalised. pose: (1, POSE_VALUES)."""
        self._images.copy_(images)
        self._pose.copy_(pose)
        self._preprocessed.record()
        self._look()
        self._seen.record()

    def launch(self, index: int) -> None:
        """Runs the layers up to exit number `index` and reads the head. The exit before was launched."""
        self._group(index)()
        self._done[index].record()

    def read(self, index: int) -> Reading:
        """Waits for exit number `index`: the one wait of the host for this exit."""
        self._done[index].wait()
        return Reading.of(self._host_numbers[index])

    def keep(self, index: int) -> None:
        """The memory that exit number `index` left becomes the memory of the episode."""
        self._keeps[index]()

    def times(self, index: int) -> StageTimes:
        """The times of a step that ended at exit number `index`, which was read."""
        starts = (self._seen, *self._done[:index])
        language = sum(climbed.since(start) for start, climbed in zip(starts, self._climbed))
        before = self._preprocessed.since(self._began), self._seen.since(self._preprocessed)
        total = (time.perf_counter() - self._began_s) * 1e3
        # The head's time includes that of the host until it has read the last exit.
        return StageTimes(*before, language, max(0.0, total - sum(before) - language))

    # --- layers that come and go

    @torch.inference_mode()
    def prepare(
        self, first: int, layers: Sequence[Layer], is_over: Callable[[], bool] = lambda: False
    ) -> PreparedGroups:
        """Prepares the functions of the exits that need `layers`, the ones from number `first` on. Any thread
        may call it. It changes only the outputs of these exits, which no step may use before `use`.

        is_over: once it is true, the rest is left out.
        """
        if self._backend.is_immediate:
            return {}
        all_layers = [*self._model.layers[:first], *layers]
        exits = self._model.config.exits
        return {
            (tokens, index): self._backend.capture(self._climbing(index, tokens, all_layers))
            for tokens in self._texts
            for index, exit_layer in enumerate(exits)
            if first <= exit_layer < len(all_layers) and not is_over()
        }

    def use(self, prepared: PreparedGroups) -> None:
        """Begins to use what `prepare` has returned."""
        self._groups.update(prepared)

    def forget(self, count: int) -> None:
        """Forgets the functions that need more than the first `count` layers."""
        exits = self._model.config.exits
        self._groups = {key: run for key, run in self._groups.items() if exits[key[1]] < count}

    def _group(self, index: int) -> Callable[[], None]:
        key = self._text.context.tokens, index
        if key not in self._groups:
            assert self._backend.is_immediate, "the functions of this exit were not prepared"
            self._groups[key] = self._climbing(index, key[0], self._model.layers)
        return self._groups[key]

    # --- the functions

    def _looking(self) -> Callable[[], None]:
        see = self._backend.compiled(lambda images, pose: self._model.see_from(images, pose).visual)

        def run() -> None:
            self._visual.copy_(see(self._images, self._pose))

        return run

    def _climbing(self, index: int, tokens: int, layers: Sequence[Layer]) -> Callable[[], None]:
        exits, text = self._model.config.exits, self._texts[tokens]
        first = exits[index - 1] + 1 if index else 0
        group = ExitGroup(
            layers[first : exits[index] + 1], self._model.shared_head, self._delta, is_first=index == 0
        )
        climb, read = self._backend.compiled(group.climb), self._backend.compiled(group.read)
        hidden = text.hidden[index - 1] if index else text.context.embedding
        before, mark = self._values[max(index - 1, 0)], self._climbed[index]

        def run() -> None:
            after, features = climb(hidden, self._visual, text.context, text.padding)
            text.hidden[index].copy_(after)
            mark.record()
            values, numbers, state = read(features, before, self.prepared)
            self._values[index].copy_(values)
            self._numbers[index].copy_(numbers[0])
            for own, part in zip(self._after[index], state):
                own.copy_(part)
            if self._host is not self._numbers:
                self._host[index].copy_(self._numbers[index], non_blocking=True)

        return run

    def _keeping(self, index: int) -> Callable[[], None]:
        def run() -> None:
            for own, given in zip(self.state, self._after[index]):
                own.copy_(given)
            self._prepare_state()

        return run

    def _prepare_state(self) -> None:
        for own, given in zip(self.prepared, self._model.shared_head.prepare(self.state)):
            own.copy_(given)

    def _new_text(self, tokens: int) -> _Text:
        decoder = self._model.config.decoder
        empty = {"device": self._model.device, "dtype": self._model.dtype}
        context = TextContext(
            torch.zeros(1, tokens, decoder.width, **empty),
            torch.zeros(1, decoder.heads, tokens, tokens, **empty),
            torch.zeros(1, tokens, 1, **empty),
        )
        padding = None
        if self._backend.pads:
            padding = torch.zeros(1, tokens, 1, dtype=torch.bool, device=self._model.device)
        hidden = [torch.zeros(1, tokens, decoder.width, **empty) for _ in self._model.config.exits]
        return _Text(context, padding, hidden)


def _own_memory(parts: Parts) -> Parts:
    """The same values, each part in memory that nothing else uses."""
    return type(parts)(*(part.clone() for part in parts))
