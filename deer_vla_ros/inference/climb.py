"""One climb up the layers: an exit rule decides after which layer it ends, and which action results."""

from __future__ import annotations

import numpy as np

from deer_vla_ros.inference.exit_rule import ExitRule
from deer_vla_ros.inference.reading import Reading
from deer_vla_ros.inference.types import Action, PolicyStep, StageTimes, StopReason


class Climb:
    """One step of one episode. The caller runs the layers in turn and asks after each whether the climb
    `reads` it. If so, the caller reads the shared head after this layer and passes the result to `ends`. If
    the climb also `waits` there, it cannot end before the next layer: the caller keeps the feature, computes
    the head's outputs after both layers as one batch, and passes only the later one.

    A probing step compares each exit with the exit before it, and the first exit with the layer before it. It
    stops at the first exit where the two agree, or at the deepest exit. A step between two probing steps
    stops at the first exit that is at least as deep as the last exit taken.
    """

    def __init__(self, rule: ExitRule, episode_step: int, last_exit_layer: int):
        self._rule = rule
        self._stage = (
            None if rule.probes(episode_step) else rule.exits[rule.index_not_shallower(last_exit_layer)]
        )
        self._index = -1
        self._readings: list[Reading] = []
        self._deltas = [float("nan")] * len(rule.exits)

    @property
    def probes(self) -> bool:
        """Whether this step probes the exits."""
        return self._stage is None

    def reads(self, layer: int) -> bool:
        """Whether the head must be read after this layer."""
        if self._stage is not None:
            return layer == self._stage
        return layer in self._rule.exits or layer == self._rule.exits[0] - 1

    def waits(self, layer: int) -> bool:
        """Whether the output after this layer is only compared with the next layer's."""
        return self._stage is None and layer == self._rule.exits[0] - 1

    def ends(self, layer: int, reading: Reading) -> bool:
        """Takes what was read after `layer`, an exit. Returns whether the climb ends here."""
        self._index = self._rule.exits.index(layer)
        self._readings.append(reading)
        if self._stage is not None:
            return True
        self._deltas[self._index] = reading.delta
        return layer == self._rule.deepest or self._rule.agrees(self._index, reading.delta)

    def action(self) -> Action:
        """The chosen exit's action; with `ensemble`, its mean with the previous exit's action."""
        _, pose, probability = self._readings[-1]
        if self._rule.ensemble and len(self._readings) > 1:
            before = self._readings[-2]
            pose = np.mean([pose, before.pose], axis=0)
            probability = (probability + before.gripper_probability) / 2
        return Action(pose, probability)

    def report(self, action: Action, tokens: int, times: StageTimes) -> PolicyStep:
        """The decision with all that the climb measured."""
        return PolicyStep(
            action=action,
            exits=self._rule.exits,
            exit_index=self._index,
            stop=self._stop(),
            deltas=tuple(self._deltas),
            thresholds=self._rule.thresholds,
            # A probing step also reads the layer before the first exit.
            head_probes=self._index + 2 if self.probes else 1,
            tokens=tokens,
            times=times,
        )

    def _stop(self) -> StopReason:
        if self._stage is not None:
            return StopReason.STAGE
        return StopReason.DEEPEST if self._index == len(self._rule.exits) - 1 else StopReason.AGREED
