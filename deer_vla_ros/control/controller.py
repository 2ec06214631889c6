"""What does the arm get told at this tick? Frames and poses in, guarded command out; time is an argument.

The node and the bag replay both drive this class, which is why they cannot disagree.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from deer_vla_ros.budget.latency import LatencyTable
from deer_vla_ros.budget.types import AVERAGES, PEAKS, Budget, BudgetStatus
from deer_vla_ros.control.budgeted_policy import BudgetedPolicy, BudgetedStep
from deer_vla_ros.control.gripper import GripperSwitch
from deer_vla_ros.control.guard import GuardLimits, guard, is_beyond_workspace
from deer_vla_ros.control.inputs import InputGate, InputLimits, Inputs
from deer_vla_ros.control.motion import motion_of, twist_of
from deer_vla_ros.control.pace import Pace
from deer_vla_ros.control.types import Camera, Command, Decision, Frame, HoldReason, MeasuredPose, Pose, Twist
from deer_vla_ros.inference.types import Observation, StageTimes
from deer_vla_ros.model.action_space import ActionSpace
from deer_vla_ros.model.checkpoint import Checkpoint


@dataclass(frozen=True)
class ControllerSettings:
    """rate_hz: at most so many steps, and while holding as many repeats, per second.

    gripper_hysteresis: how far from one half the gripper's probability must be to change it.
    """

    rate_hz: float
    inputs: InputLimits
    guard: GuardLimits
    gripper_hysteresis: float = 0.0


@dataclass(frozen=True)
class _Held:
    """A hold in progress: where the arm was when it began, for which reasons, and when it was last repeated."""

    pose: Pose | None
    reasons: tuple[HoldReason, ...]
    repeated_ns: int


class Controller:
    """One arm's control, from newest inputs to guarded command.

    Inputs may be given from any thread; `start`, `tick` and the budget from one thread at a time.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        settings: ControllerSettings,
        action_space: ActionSpace | None = None,
        latencies: LatencyTable | None = None,
    ):
        """action_space: units, frame and gripper values of this robot, where they are not the checkpoint's. latencies: taken for those of
        every step, in place of what it really takes (replay)."""
        self.action_space = action_space or checkpoint.info.action_space
        self._policy = BudgetedPolicy(checkpoint, latencies)
        self._gate = InputGate(settings.inputs, self.action_space.frame)
        self._settings = settings
        self._instruction = ""
        self._resets = 0
        self._step = 0
        self._episode = -1
        self._episode_step = 0
        self._pace = Pace(settings.rate_hz)
        self._last_tick_ns: int | None = None
        self._last_target: Pose | None = None
        self._gripper = GripperSwitch(settings.gripper_hysteresis)
        self._last_gripper: float | None = None
        self._held: _Held | None = None
        self._holds: Counter[HoldReason] = Counter()

    # --- inputs, from any thread

    def put_frame(self, camera: Camera, frame: Frame) -> bool:
        """Returns whether there is a pair of frames that no tick has seen: then a tick may have something to do."""
        return self._gate.put_frame(camera, frame)

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

    def check_budget(self, budget: Budget, names: Iterable[str] = (*AVERAGES, *PEAKS)) -> None:
        """Raises UserError where one of `names`, what is asked for now, cannot be kept; changes nothing."""
        self._policy.check(budget, names)

    def set_budget(self, budget: Budget) -> None:
        """Asks for a budget that `check_budget` accepted: the next step obeys it, the temporal state stays."""
        self._policy.set(budget)

    def wait_for_layers(self) -> None:
        """Until layers that a new budget has room for are loaded: the next step may go there."""
        self._policy.wait_for_layers()

    def close(self) -> None:
        """Ends what goes on in the background; no tick comes after it."""
        self._policy.close()

    # --- what is going on

    @property
    def budget_status(self) -> BudgetStatus:
        return self._policy.status

    @property
    def budget_id(self) -> int:
        """Of the next step."""
        return self._policy.budget_id

    @property
    def problem(self) -> str:
        """What keeps the network from being as deep as the budget allows; empty for nothing."""
        return self._policy.problem

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
    def instruction(self) -> str:
        """The newest instruction, whether or not a step has acted on it."""
        return self._gate.snapshot().instruction

    @property
    def steps(self) -> int:
        return self._step

    @property
    def holding(self) -> tuple[HoldReason, ...]:
        """Why the arm holds now; empty when it does not."""
        return self._held.reasons if self._held else ()

    # --- the tick

    def start(self) -> None:
        """Control begins, or begins again: nothing of an earlier time is remembered, held or repeated."""
        self.forget_motion()
        self._last_gripper = self._last_tick_ns = None
        self._gripper = GripperSwitch(self._settings.gripper_hysteresis)
        self._pace.forget()
        self._gate.request_reset()
        self._policy.begin()

    def forget_motion(self) -> None:
        """The last command was not given to the arm: the next one starts from the measured pose."""
        self._held = self._last_target = None

    def tick(self, now_ns: int, finished: Callable[[StageTimes], int] | None = None) -> Command | None:
        """One look at the newest inputs at `now_ns`: a step, a hold (begun or due to be repeated), or None: nothing to say.

        finished: tells the time when the inference, which took so long, is over, for then the inputs are judged once more; without it an
        inference takes no time.
        """
        self._policy.absorb()
        if self._clock_jumped(now_ns):
            return self._start_over(now_ns)
        inputs = self._gate.snapshot()
        reasons = self._judge(inputs, now_ns)
        if reasons:
            self._gate.mark_seen(inputs.pair)
            return None if self._is_repeated(reasons, now_ns) else self._hold(inputs, reasons, now_ns)
        if self._pace.admits(inputs.pair[0].stamp_ns):
            return self._act(inputs, now_ns, finished or (lambda times: now_ns))
        reasons = self.holding  # a hold whose reason is gone lasts until the next step
        return None if not reasons or self._is_repeated(reasons, now_ns) else self._hold(inputs, reasons, now_ns)

    def _judge(self, inputs: Inputs, now_ns: int) -> tuple[HoldReason, ...]:
        """Why the arm must not be moved on these inputs; empty when it may."""
        reasons = self._gate.judge(inputs, now_ns)
        if not reasons and is_beyond_workspace(self._settings.guard, inputs.pose.pose):
            reasons = (HoldReason.BEYOND_WORKSPACE,)
        return reasons

    def hold_now(self, now_ns: int, reason: HoldReason) -> Command:
        """A hold at the newest measured pose, whatever a tick in another thread is about; changes nothing, so any thread may ask."""
        inputs = self._gate.snapshot()
        pose = None if self._gate.judge_pose(inputs, now_ns) else inputs.pose.pose
        return Command(now_ns, pose, Twist.zero(), None, holds=(reason,))

    def warm_up(self, image_shape: tuple[int, int] = (200, 200)) -> None:
        """Runs every exit once and more, so that the first real step is not the slow one; leaves no trace but latencies."""
        self._policy.warm_up(image_shape)
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
        self._pace.forget()
        self._held = None
        return self._hold(inputs, (HoldReason.CLOCK_JUMPED,), now_ns)

    def _act(self, inputs: Inputs, now_ns: int, finished: Callable[[StageTimes], int]) -> Command:
        static, gripper = inputs.pair
        self._gate.mark_seen(inputs.pair)
        self._pace.take(static.stamp_ns)
        try:
            if inputs.instruction != self._instruction or inputs.resets != self._resets:
                self._begin_episode(inputs)
            step = self._policy.step(Observation(static.image, gripper.image, inputs.pose.pose.as_array()))
        except Exception as error:  # whatever the device or the network throws: the arm holds, and the reason is told
            return self._hold(inputs, (HoldReason.INFERENCE_FAILED,), now_ns, error=f"{type(error).__name__}: {error}")
        decision = self._decide(inputs, step, now_ns)
        after_ns = finished(step.policy.times)
        after = self._gate.snapshot()
        if not step.policy.action.is_finite:
            return self._refuse(after, (HoldReason.NOT_FINITE,), after_ns, decision)
        # Much may have happened during the inference: what it decided is given only to an arm that may still be moved.
        if reasons := self._judge(after, after_ns):
            return self._refuse(after, reasons, after_ns, decision)
        if self._gate.is_outdated(inputs.pair, after_ns):
            return self._refuse(after, (HoldReason.TOO_SLOW,), after_ns, decision)
        return self._move(after, after_ns, decision)

    def _move(self, inputs: Inputs, now_ns: int, decision: Decision) -> Command:
        """The decision as a command, within the guard's limits around the newest measured pose."""
        action, measured = decision.policy.action, inputs.pose.pose
        last_target = self._last_target or measured
        guarded = guard(self._settings.guard, last_target, measured, *motion_of(action.pose, self.action_space))
        if guarded.arm_moved:
            self._held = None
            return self._refuse(inputs, (HoldReason.ARM_MOVED,), now_ns, decision)
        self._held = None
        self._last_target = guarded.target
        space = self.action_space
        self._last_gripper = space.gripper_open if self._gripper.decide(action) else space.gripper_closed
        return Command(
            stamp_ns=decision.stamp_ns,
            target=guarded.target,
            twist=twist_of(last_target, guarded.target, 1 / self._settings.rate_hz),
            gripper=self._last_gripper,
            decision=dataclasses.replace(decision, limits=guarded.limits),
        )

    def _refuse(self, inputs: Inputs, reasons: tuple[HoldReason, ...], now_ns: int, decision: Decision) -> Command:
        """A hold in place of what was decided."""
        return dataclasses.replace(self._hold(inputs, reasons, now_ns), decision=dataclasses.replace(decision, held=reasons))

    def _begin_episode(self, inputs: Inputs) -> None:
        """Clears the temporal state and makes the exit rule for the instruction's length."""
        self._policy.reset(inputs.instruction)
        self._instruction, self._resets = inputs.instruction, inputs.resets
        self._episode += 1
        self._episode_step = 0

    def _decide(self, inputs: Inputs, step: BudgetedStep, now_ns: int) -> Decision:
        static, gripper = inputs.pair
        decision = Decision(
            step=self._step,
            episode=self._episode,
            episode_step=self._episode_step,
            instruction=self._instruction,
            policy=step.policy,
            cost=step.cost,
            budget_id=step.budget_id,
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
        interval_ns = self._pace.period_ns - self._pace.slack_ns
        return held is not None and reasons == held.reasons and 0 <= now_ns - held.repeated_ns < interval_ns

    def _hold(self, inputs: Inputs, reasons: tuple[HoldReason, ...], now_ns: int, error: str = "") -> Command:
        """Begins or goes on with a hold. The pose held is the one measured when it began, or the first usable one since."""
        if HoldReason.NO_INSTRUCTION in reasons:
            self._instruction = ""  # the same text given again starts a new episode
        pose = self._held.pose if self._held else None
        if self._held is None:
            self._last_target = None  # whatever comes next starts from the measured pose
        if pose is None and not self._gate.judge_pose(inputs, now_ns):
            pose = inputs.pose.pose
        self._holds.update(set(reasons) - set(self.holding))
        self._held = _Held(pose, reasons, now_ns)
        return Command(now_ns, pose, Twist.zero(), self._last_gripper, holds=reasons, error=error)
