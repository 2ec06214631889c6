"""One climb up the layers: an exit rule decides after which layer it ends, and which action results."""

from __future__ import annotations

import torch

from deer_vla_ros.inference.exit_rule import ExitRule, compared
from deer_vla_ros.inference.types import Action, PolicyStep, StageTimes, StopReason
from deer_vla_ros.model.head import HeadOutput


class Climb:
    """One step of one episode. The caller runs the layers in turn and asks after each whether the climb
    `reads` it. If so, the caller passes the shared head's output after this layer to `ends`. If the climb
    also `waits` there, it cannot end before the next layer, so the caller may keep the feature and compute
    both outputs as one batch.

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
        self._probes = 0
        self._previous: HeadOutput | None = None
        self._chosen: HeadOutput | None = None
        self._deltas = [float("nan")] * len(rule.exits)

    @property
    def chosen(self) -> HeadOutput:
        """The head's output at the exit where the climb ended."""
        assert self._chosen is not None, "asked before the climb ended"
        return self._chosen

    def reads(self, layer: int) -> bool:
        """Whether the head must be read after this layer."""
        if self._stage is not None:
            return layer == self._stage
        return layer in self._rule.exits or layer == self._rule.exits[0] - 1

    def waits(self, layer: int) -> bool:
        """Whether the output after this layer is only compared with the next layer's."""
        return self._stage is None and layer == self._rule.exits[0] - 1

    def ends(self, layer: int, output: HeadOutput) -> bool:
        """Takes the head's output (1, 1, ...) after `layer`. Returns whether the climb ends here."""
        rule = self._rule
        self._probes += 1
        if layer in rule.exits:
            self._index = rule.exits.index(layer)
            if self._stage is None:
                now, before = (
                    compared(rule.delta, o.pose, o.feature)[0, 0] for o in (output, self._previous)
                )
                self._deltas[self._index] = rule.measure(now, before)
            if (
                self._stage is not None
                or layer == rule.deepest
                or rule.agrees(self._index, self._deltas[self._index])
            ):
                self._chosen = output
                return True
        self._previous = output
        return False

    def action(self) -> Action:
        """The chosen exit's action; with `ensemble`, its mean with the previous exit's action."""
        outputs = [self.chosen]
        if self._rule.ensemble and self._stage is None and self._index > 0:
            outputs.append(self._previous)
        pose = torch.stack([output.pose[0, 0].float() for output in outputs]).mean(0)
        probability = torch.stack(
            [output.gripper_logit[0, 0, 0].float().sigmoid() for output in outputs]
        ).mean(0)
        return Action(pose.cpu().numpy(), probability.item())

    def report(self, action: Action, tokens: int, times: StageTimes) -> PolicyStep:
        """The decision with all that the climb measured."""
        return PolicyStep(
            action=action,
            exits=self._rule.exits,
            exit_index=self._index,
            stop=self._stop(),
            deltas=tuple(self._deltas),
            thresholds=self._rule.thresholds,
            head_probes=self._probes,
            tokens=tokens,
            times=times,
        )

    def _stop(self) -> StopReason:
        if self._stage is not None:
            return StopReason.STAGE
        return StopReason.DEEPEST if self._index == len(self._rule.exits) - 1 else StopReason.AGREED
