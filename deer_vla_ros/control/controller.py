"""What does the arm get told at this tick? Frames and poses in, guarded command out; time is an argument.

The node and the bag replay both drive this class, which is why they cannot disagree.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass

import numpy as np

from deer_vla_ros.budget.keeper import Budget, BudgetKeeper, BudgetStatus
from deer_vla_ros.control.gripper import GripperSwitch
from deer_vla_ros.control.guard import GuardLimits, guard, is_beyond_workspace
from deer_vla_ros.control.inputs import InputGate, InputLimits, Inputs
from deer_vla_ros.control.motion import motion_of, twist_of
from deer_vla_ros.control.types import Camera, Command, Decision, Frame, HoldReason, MeasuredPose, Pose, Twist
from deer_vla_ros.inference.exit_rule import ExitRule
from deer_vla_ros.inference.policy import DeerPolicy
from deer_vla_ros.inference.types import Observation, PolicyStep
from deer_vla_ros.model.action_space import ActionSpace
from deer_vla_ros.model.checkpoint import Checkpoint

JITTER = 0.8
"""Share of the control period that must pass between two steps: a camera at the control rate may jitter by the rest."""


@dataclass(frozen=True)
class ControllerSettings:
    """rate_hz: at most so many steps, and while holding as many repeats, per second.

    gripper_hysteresis: how far from one half the gripper's probability must be to change it.
    """

    rate_hz: float
    inputs: InputLimits
    guard: GuardLimits
    gripper_hysteresis: float = 0.0

    @property
    def min_interval_ns(self) -> int:
        return int(JITTER * 1e9 / self.rate_hz)


@dataclass(frozen=True)
class _Held:
    """A hold in progress: where the arm was when it began, for which reasons, and when it was last repeated."""

    pose: Pose | None
    reasons: tuple[HoldReason, ...]
    repeated_ns: int


class Controller:
    """One arm's control, from newest inputs to guarded command.

    Inputs may be given from any thread; `tick`, `stop` and the budget from one thread at a time.
    """

    def __init__(self, checkpoint: Checkpoint, settings: ControllerSettings, action_space: ActionSpace | None = None):
        """action_space: units, frame and gripper values of this robot, where they are not the checkpoint's."""
        info = checkpoint.info
        self.action_space = action_space or info.action_space
        self._budget = BudgetKeeper(info.model, info.delta, info.thresholds, checkpoint.model.dtype.itemsize)
        self._policy = DeerPolicy(checkpoint.model, checkpoint.tokenizer, self._budget.rule)
        self._gate = InputGate(settings.inputs, self.action_space.frame)
        self._settings = settings
        self._instruction = ""
        self._resets = 0
        self._step = 0
        self._episode = -1
        self._episode_step = 0
        self._last_static_ns: int | None = None
        self._last_tick_ns: int | None = None
        self._last_target: Pose | None = None
        self._gripper = GripperSwitch(settings.gripper_hysteresis)
        self._last_gripper: float | None = None
        self._held: _Held | None = None
        self._holds: Counter[HoldReason] = Counter()

    # --- inputs, from any thread

    def put_frame(self, camera: Camera, frame: Frame) -> None:
        self._gate.put_frame(camera, frame)

    def put_pose(self, pose: MeasuredPose) -> None:
        self._gate.put_pose(pose)

    def put_instruction(self, text: str) -> None:
        """A new text starts a new episode at the next step; the same text does not; an empty one means hold."""
        self._gate.put_instruction(text)

    def request_hold(self, hold: bool) -> None:
        """Holds, or lets go of a hold requested before."""
        self._gate.request_hold(hold)

    def request_reset(self) -> None:
        """Clears the temporal state: the next step starts a new episode."""
        self._gate.request_reset()

    # --- settings, between two ticks

    @property
    def settings(self) -> ControllerSettings:
        return self._settings

    @settings.setter
    def settings(self, settings: ControllerSettings) -> None:
        self._settings = settings
        self._gate.limits = settings.inputs
        self._gripper.hysteresis = settings.gripper_hysteresis

    def check_budget(self, budget: Budget) -> None:
        """Raises UserError where `budget` cannot be kept; changes nothing."""
        self._budget.check(budget)

    def set_budget(self, budget: Budget) -> None:
        """Asks for a budget that `check_budget` accepted: the next step obeys it, the temporal state stays."""
        self._budget.set(budget)
        self._policy.rule = self._budget.rule

    # --- what is going on

    @property
    def budget_status(self) -> BudgetStatus:
        return self._budget.status()

    @property
    def dropped(self) -> int:
        """Camera pairs that were replaced by newer ones before a tick saw them."""
        return self._gate.snapshot().dropped

    @property
    def holds(self) -> dict[HoldReason, int]:
        """How often a hold began, by reason."""
        return dict(self._holds)

    @property
    def newest_frames(self) -> tuple[Frame | None, Frame | None]:
        """The newest static and gripper frame, whether or not a step acts on them."""
        inputs = self._gate.snapshot()
        return inputs.static, inputs.gripper

    @property
    def steps(self) -> int:
        return self._step

    @property
    def holding(self) -> tuple[HoldReason, ...]:
        """Why the arm holds now; empty when it does not."""
        return self._held.reasons if self._held else ()

    # --- the tick

    def tick(self, now_ns: int) -> Command | None:
        """One look at the newest inputs at `now_ns`: a step, a hold (begun or due to be repeated), or None: nothing to say."""
        if self._clock_jumped(now_ns):
            return self._start_over(now_ns)
        inputs = self._gate.snapshot()
        reasons = self._gate.judge(inputs, now_ns)
        if not reasons and is_beyond_workspace(self._settings.guard, inputs.pose.pose):
            reasons = (HoldReason.BEYOND_WORKSPACE,)
        if reasons:
            self._gate.mark_seen(inputs.pair)
            return None if self._is_repeated(reasons, now_ns) else self._hold(inputs, reasons, now_ns)
        if not self._is_due(inputs.pair[0]):
            return None
        return self._act(inputs, now_ns)

    def stop(self, now_ns: int) -> Command:
        """The last command before control ends: a hold, whatever the inputs."""
        self._held = None
        return self._hold(self._gate.snapshot(), (HoldReason.STOPPING,), now_ns)

    def warm_up(self, image_shape: tuple[int, int] = (200, 200)) -> None:
        """Runs every exit once on a grey image, so that the first real step is not the slow one; leaves no trace."""
        grey = np.full((*image_shape, 3), 128, dtype=np.uint8)
        rule = self._policy.rule
        for depth in range(len(rule.exits)):
            exits = rule.exits[: depth + 1]
            self._policy.rule = ExitRule(exits, (-1.0,) * len(exits), rule.delta)
            self._policy.reset("warm up")
            self._policy.step(Observation(grey, grey))
        self._policy.rule = rule
        self._instruction = ""

    def _clock_jumped(self, now_ns: int) -> bool:
        """Whether time went back since the last tick, by more than the clocks of two inputs may differ anyway."""
        last_ns, self._last_tick_ns = self._last_tick_ns, now_ns
        return last_ns is not None and now_ns < last_ns - self._settings.inputs.max_skew_ns

    def _start_over(self, now_ns: int) -> Command:
        """Holds; nothing from before the jump is acted upon, the measured pose neither, and a new episode follows."""
        inputs = self._gate.snapshot()
        self._gate.forget()
        self._gate.request_reset()
        self._last_static_ns = None
        self._held = None
        return self._hold(inputs, (HoldReason.CLOCK_JUMPED,), now_ns)

    def _is_due(self, static: Frame) -> bool:
        """Once per new static frame, and not faster than the control rate; one older than the last step's is not new."""
        return self._last_static_ns is None or static.stamp_ns - self._last_static_ns >= self._settings.min_interval_ns

    def _act(self, inputs: Inputs, now_ns: int) -> Command:
        static, gripper = inputs.pair
        self._gate.mark_seen(inputs.pair)
        self._last_static_ns = static.stamp_ns
        try:
            if inputs.instruction != self._instruction or inputs.resets != self._resets:
                self._begin_episode(inputs)
            policy_step = self._policy.step(Observation(static.image, gripper.image))
        except Exception as error:  # whatever the device or the network throws: the arm holds, and the reason is told
            return self._hold(inputs, (HoldReason.INFERENCE_FAILED,), now_ns, error=f"{type(error).__name__}: {error}")
        decision = self._decide(inputs, policy_step, now_ns)
        action = policy_step.action
        if not action.is_finite:
            held = (HoldReason.NOT_FINITE,)
            return dataclasses.replace(self._hold(inputs, held, now_ns), decision=dataclasses.replace(decision, held=held))
        self._held = None
        measured = inputs.pose.pose
        guarded = guard(self._settings.guard, self._last_target or measured, measured, *motion_of(action.pose, self.action_space))
        self._last_target = guarded.target
        space = self.action_space
        self._last_gripper = space.gripper_open if self._gripper.decide(action) else space.gripper_closed
        return Command(
            stamp_ns=decision.stamp_ns,
            target=guarded.target,
            twist=twist_of(guarded.start, guarded.target, 1 / self.action_space.rate_hz),
            gripper=self._last_gripper,
            decision=dataclasses.replace(decision, limits=guarded.limits),
        )

    def _begin_episode(self, inputs: Inputs) -> None:
        """Clears the temporal state and makes the exit rule for the instruction's length."""
        self._policy.reset(inputs.instruction)
        self._budget.set_tokens(self._policy.tokens)
        self._policy.rule = self._budget.rule
        self._instruction, self._resets = inputs.instruction, inputs.resets
        self._episode += 1
        self._episode_step = 0

    def _decide(self, inputs: Inputs, policy_step: PolicyStep, now_ns: int) -> Decision:
        static, gripper = inputs.pair
        decision = Decision(
            step=self._step,
            episode=self._episode,
            episode_step=self._episode_step,
            instruction=self._instruction,
            policy=policy_step,
            cost=self._budget.book(policy_step),
            budget_id=self._budget.budget_id,
            static_stamp_ns=static.stamp_ns,
            gripper_stamp_ns=gripper.stamp_ns,
            pose_stamp_ns=inputs.pose.stamp_ns,
            tick_ns=now_ns,
            limits=(),
            held=(),
        )
        self._step += 1
        self._episode_step += 1
        return decision

    def _is_repeated(self, reasons: tuple[HoldReason, ...], now_ns: int) -> bool:
        """Whether this very hold was told less than a control period ago."""
        held = self._held
        return held is not None and reasons == held.reasons and 0 <= now_ns - held.repeated_ns < self._settings.min_interval_ns

    def _hold(self, inputs: Inputs, reasons: tuple[HoldReason, ...], now_ns: int, error: str = "") -> Command:
        """Begins or goes on with a hold. The pose held is the one measured when it began."""
        if HoldReason.NO_INSTRUCTION in reasons:
            self._instruction = ""  # the same text given again starts a new episode
        if self._held is None:
            usable = inputs.pose is not None and not self._gate.judge_pose(inputs.pose, now_ns)
            pose = inputs.pose.pose if usable else None
            self._last_target = None  # whatever comes next starts from the measured pose
        else:
            pose = self._held.pose
        self._holds.update(set(reasons) - set(self.holding))
        self._held = _Held(pose, reasons, now_ns)
        return Command(now_ns, pose, Twist.zero(), self._last_gripper, holds=reasons, error=error)
