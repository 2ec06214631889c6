"""The controller: newest frames, poses and words in, one guarded command out at every tick; time is an
argument.

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
from deer_vla_ros.control.following import Following
from deer_vla_ros.control.gripper import GripperSwitch
from deer_vla_ros.control.guard import StepTiming, guard, is_beyond_workspace, is_near
from deer_vla_ros.control.inputs import InputGate, Inputs
from deer_vla_ros.control.motion import motion_of, twist_of
from deer_vla_ros.control.pace import Pace
from deer_vla_ros.control.settings import ControllerSettings
from deer_vla_ros.control.types import (
    COMMANDED_BY_OTHERS,
    SERIOUS,
    Camera,
    Command,
    Decision,
    Frame,
    HoldReason,
    MeasuredPose,
    Pose,
    Twist,
)
from deer_vla_ros.inference.types import Observation, StageTimes
from deer_vla_ros.model.action_space import ActionSpace
from deer_vla_ros.model.checkpoint import Checkpoint


@dataclass(frozen=True)
class _Held:
    """A hold in progress: the pose that is held, for which reasons, and when it was last repeated, by the
    steady clock."""

    pose: Pose | None
    reasons: tuple[HoldReason, ...]
    repeated_ns: int


@dataclass(frozen=True)
class _Moved:
    """The newest motion: its target, how fast the target moved, the stamp of its frames, and how many came
    since the last hold."""

    target: Pose
    velocity: Twist
    stamp_ns: int
    count: int


@dataclass(frozen=True)
class _Time:
    """now_ns: ROS time, by which inputs are judged. steady_ns: of a clock that never stops or jumps."""

    now_ns: int
    steady_ns: int


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
        """action_space: units, frame and gripper values of this robot, where they are not the checkpoint's.
        latencies: taken for those of every step, in place of what it really takes (replay)."""
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
        self._last_tick: _Time | None = None
        self._clock_moved_ns = 0  # when ROS time last went on, by the steady clock
        self._moved: _Moved | None = None
        self._following = Following()
        self._gripper = GripperSwitch(settings.gripper_hysteresis, settings.gripper_dwell_ns)
        self._last_gripper: float | None = None
        self._held: _Held | None = None
        self._holds: Counter[HoldReason] = Counter()
        self._serious: tuple[HoldReason, ...] = ()
        self._clearances = self._holds_obeyed = 0
        self._has_moved = False
        self._gripper_before: tuple[object, float | None] = (self._gripper.state, None)

    # --- inputs, from any thread

    def put_frame(self, camera: Camera, frame: Frame) -> bool:
        """Returns whether there is a pair of frames that no tick has seen: then a tick may have something to
        do."""
        return self._gate.put_frame(camera, frame)

    def put_pose(self, pose: MeasuredPose) -> None:
        self._gate.put_pose(pose)

    def put_instruction(self, text: str) -> None:
        """A new text starts a new episode at the next step; the same text does not; an empty one means hold.
        """
        self._gate.put_instruction(text)

    def request_hold(self, hold: bool) -> None:
        """Holds, or lets go: of a hold requested before, and of serious reasons, which a person has looked at
        then."""
        self._gate.request_hold(hold)

    def demand_hold(self, reason: HoldReason, stands: bool) -> None:
        """Holds for a reason that only the caller sees, as long as it stands."""
        self._gate.demand_hold(reason, stands)

    def clear(self) -> None:
        """Serious reasons do not hold any longer: a person has looked at them."""
        self._gate.clear()

    def request_reset(self) -> None:
        """Clears the temporal state: the next step starts a new episode."""
        self._gate.request_reset()

    # --- settings, between two ticks

    @property
    def settings(self) -> ControllerSettings:
        return self._settings

    @settings.setter
    def settings(self, settings: ControllerSettings) -> None:
        if settings.loosened_from(self._settings):
            self._moved = (
                None  # what was a small motion by the old limits starts again from the measured pose
            )
        self._settings = settings
        self._gate.limits = settings.inputs
        self._gripper.hysteresis, self._gripper.dwell_ns = (
            settings.gripper_hysteresis,
            settings.gripper_dwell_ns,
        )

    def check_budget(self, budget: Budget, names: Iterable[str] = (*AVERAGES, *PEAKS)) -> None:
        """Raises UserError where one of `names`, what is asked for now, cannot be kept; changes nothing."""
        self._policy.check(budget, names)

    def set_budget(self, budget: Budget) -> None:
        """Asks for a budget that `check_budget` accepted: the next step obeys it, the temporal state stays.
        """
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
        held = self._held  # looked at once: the control thread may end it meanwhile
        return held.reasons if held else ()

    @property
    def serious(self) -> tuple[HoldReason, ...]:
        """Those of `holding` that a person has to clear."""
        return self._serious

    @property
    def has_moved(self) -> bool:
        """Whether a motion has left since control began."""
        return self._has_moved

    @property
    def is_silent(self) -> bool:
        """Whether another one commands the arm, so that even a hold of ours would disturb it. One that has
        moved the arm itself is never silent: what it began, it ends."""
        return not self.has_moved and not COMMANDED_BY_OTHERS.isdisjoint(self._gate.snapshot().demands)

    # --- the tick

    def start(self) -> None:
        """Control begins, or begins again: nothing of an earlier time is remembered, held or repeated."""
        self._held = self._moved = self._last_gripper = self._last_tick = None
        self._serious = ()
        self._has_moved = False
        self._following.begin()
        self._gripper = GripperSwitch(self._settings.gripper_hysteresis, self._settings.gripper_dwell_ns)
        self._pace.forget()
        self._gate.request_reset()
        self._policy.begin()

    def tick(
        self, now_ns: int, finished: Callable[[StageTimes], int] | None = None, steady_ns: int | None = None
    ) -> Command | None:
        """One look at the newest inputs at `now_ns`: a step, a hold (begun or due to be repeated), or None:
        nothing to say.

        finished: tells the time when the inference, which took so long, is over, for then the inputs are
        judged once more; without it an inference takes no time. steady_ns: time of a clock that never stops,
        by which a `now_ns` that stands still is seen; without it `now_ns` is such a clock.
        """
        self._policy.absorb()
        time = _Time(now_ns, now_ns if steady_ns is None else steady_ns)
        inputs, before = self._gate.snapshot(), self._last_tick
        self._last_tick = time
        if before is not None and now_ns < before.now_ns - self._settings.inputs.max_skew_ns:
            return self._start_over(time)
        late = self._judge_time(before, time) if steady_ns is not None else ()
        reasons = tuple(dict.fromkeys((*late, *self._judge(inputs, now_ns))))
        if reasons:
            self._gate.mark_seen(inputs.pair)
            return None if self._is_repeated(reasons, time) else self._hold(inputs, reasons, time)
        if self._pace.admits(inputs.pair[0].stamp_ns):
            return self._act(inputs, time, finished or (lambda times: now_ns))
        reasons = self.holding  # a hold whose reason is gone lasts until the next step
        return None if not reasons or self._is_repeated(reasons, time) else self._hold(inputs, reasons, time)

    def confirm(self, command: Command, now_ns: int, steady_ns: int) -> Command:
        """The last look before a motion leaves; a hold in its place where anything speaks against it by now.

        The caller lets nobody else tell the arm anything until it has left. steady_ns: as `tick` takes it.
        """
        decision, time = command.decision, _Time(now_ns, steady_ns)
        # A clock that jumped meanwhile is seen by the next tick, which forgets what was before.
        self._last_tick = dataclasses.replace(self._last_tick, steady_ns=steady_ns)
        if command.holds or decision is None:
            return command
        inputs, limits = self._gate.snapshot(), self._settings.inputs
        reasons = self._judge(inputs, now_ns)
        if now_ns < decision.tick_ns - limits.max_skew_ns:
            reasons = (*reasons, HoldReason.CLOCK_JUMPED)
        age_ns = now_ns - min(decision.static_stamp_ns, decision.gripper_stamp_ns)
        if not reasons and max(age_ns, steady_ns - decision.steady_ns) > limits.max_age_ns:
            reasons = (HoldReason.TOO_SLOW,)
        if not reasons:
            self._has_moved = True
            return command
        self._gripper.state, self._last_gripper = self._gripper_before  # the fingers were not told either
        return self._refuse(inputs, reasons, time, decision)

    def _judge(self, inputs: Inputs, now_ns: int) -> tuple[HoldReason, ...]:
        """Why the arm must not be moved on these inputs; empty when it may."""
        if inputs.clearances > self._clearances:
            self._clearances, self._serious = inputs.clearances, ()
            self._following.begin()
        reasons = [*self._serious, *self._gate.judge(inputs, now_ns)]
        if inputs.holds_requested != self._holds_obeyed:  # one that was lifted before any tick is a hold, too
            reasons.append(HoldReason.REQUESTED)
        if not reasons and is_beyond_workspace(self._settings.guard, inputs.pose.pose):
            reasons.append(HoldReason.BEYOND_WORKSPACE)
        return tuple(dict.fromkeys(reasons))

    def _judge_time(self, before: _Time | None, time: _Time) -> list[HoldReason]:
        """A clock that stands still while the steady one goes on, or control that stood still itself."""
        limit_ns, reasons = self._settings.inputs.max_age_ns, []
        if before is None or time.now_ns != before.now_ns:
            self._clock_moved_ns = time.steady_ns
        elif time.steady_ns - self._clock_moved_ns > limit_ns:
            reasons.append(HoldReason.CLOCK_STOPPED)
        if before is not None and time.steady_ns - before.steady_ns > limit_ns:
            reasons.append(HoldReason.STALLED)
        return reasons

    def hold_now(self, now_ns: int, reason: HoldReason) -> Command:
        """A hold where the arm is, whatever a tick in another thread is about; changes nothing, so
        any thread may ask."""
        inputs = self._gate.snapshot()
        pose = self._pose_to_hold(inputs, now_ns)
        return Command(now_ns, pose, Twist.zero(), None, holds=(reason,), is_silent=self.is_silent)

    def warm_up(self, image_shape: tuple[int, int] = (200, 200)) -> None:
        """Runs every exit once and more, so that the first real step is not the slow one; leaves no trace but
        latencies."""
        self._policy.warm_up(image_shape)
        self._instruction = ""

    def _start_over(self, time: _Time) -> Command:
        """Holds; nothing from before the jump is acted upon, the measured pose neither, and a new episode
        follows."""
        self._gate.forget()
        self._gate.request_reset()
        self._pace.forget()
        self._held = None
        return self._hold(self._gate.snapshot(), (HoldReason.CLOCK_JUMPED,), time)

    def _act(self, inputs: Inputs, time: _Time, finished: Callable[[StageTimes], int]) -> Command:
        static, gripper = inputs.pair
        self._gate.mark_seen(inputs.pair)
        self._pace.take(static.stamp_ns)
        try:
            if inputs.instruction != self._instruction or inputs.resets != self._resets:
                self._begin_episode(inputs)
            step = self._policy.step(Observation(static.image, gripper.image, inputs.pose.pose.as_array()))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of Rust code is no Exception; whatever it is, the arm holds
            return self._hold(
                inputs, (HoldReason.INFERENCE_FAILED,), time, error=f"{type(error).__name__}: {error}"
            )
        decision = self._decide(inputs, step, time)
        after = _Time(finished(step.policy.times), time.steady_ns)
        newest = self._gate.snapshot()
        if not step.policy.action.is_finite:
            return self._refuse(newest, (HoldReason.NOT_FINITE,), after, decision)
        # Much may have happened during the inference: what it decided is given only to an arm that may still
        # be moved.
        if reasons := self._judge(newest, after.now_ns):
            return self._refuse(newest, reasons, after, decision)
        if self._gate.is_outdated(inputs.pair, after.now_ns):
            return self._refuse(newest, (HoldReason.TOO_SLOW,), after, decision)
        return self._move(newest, after, decision)

    def _move(self, inputs: Inputs, time: _Time, decision: Decision) -> Command:
        """The decision as a command, within the guard's limits around the newest measured pose."""
        action, measured, settings = decision.policy.action, inputs.pose.pose, self._settings
        period_s = 1 / settings.rate_hz
        before = self._moved or _Moved(
            measured, Twist.zero(), decision.static_stamp_ns - self._pace.period_ns, 0
        )
        seconds = min(max(decision.static_stamp_ns - before.stamp_ns, 1) / 1e9, period_s)
        timing = StepTiming(seconds, before.velocity, in_ramp=before.count < settings.guard.ramp_in_steps)
        guarded = guard(
            settings.guard, before.target, measured, *motion_of(action.pose, self.action_space), timing
        )
        if guarded.arm_moved:
            return self._refuse(inputs, (HoldReason.ARM_MOVED,), time, decision)
        if self._stands_still(guarded.target, measured, decision):
            return self._refuse(inputs, (HoldReason.ARM_NOT_FOLLOWING,), time, decision)
        velocity = twist_of(before.target, guarded.target, seconds)
        self._held = None
        self._moved = _Moved(guarded.target, velocity, decision.static_stamp_ns, before.count + 1)
        self._gripper_before = self._gripper.state, self._last_gripper
        space, is_open = self.action_space, self._gripper.decide(action, decision.static_stamp_ns)
        self._last_gripper = space.gripper_open if is_open else space.gripper_closed
        return Command(
            stamp_ns=decision.stamp_ns,
            target=guarded.target,
            twist=twist_of(before.target, guarded.target, period_s),
            gripper=self._last_gripper,
            decision=dataclasses.replace(decision, limits=guarded.limits),
        )

    def _stands_still(self, target: Pose, measured: Pose, decision: Decision) -> bool:
        """Whether the arm has stood still for longer than it may although its target is ahead of it."""
        limits, timeout_ns = self._settings.guard, self._settings.follow_timeout_ns
        still_ns = self._following.still_ns(
            decision.static_stamp_ns, target, measured, limits, self._pace.period_ns
        )
        return 0 < timeout_ns < still_ns

    def _refuse(
        self, inputs: Inputs, reasons: tuple[HoldReason, ...], time: _Time, decision: Decision
    ) -> Command:
        """A hold in place of what was decided."""
        return dataclasses.replace(
            self._hold(inputs, reasons, time), decision=dataclasses.replace(decision, held=reasons)
        )

    def _begin_episode(self, inputs: Inputs) -> None:
        """Clears the temporal state and makes the exit rule for the instruction's length."""
        self._policy.reset(inputs.instruction)
        self._instruction, self._resets = inputs.instruction, inputs.resets
        self._episode += 1
        self._episode_step = 0

    def _decide(self, inputs: Inputs, step: BudgetedStep, time: _Time) -> Decision:
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
            tick_ns=time.now_ns,
            steady_ns=time.steady_ns,
            limits=(),
            held=(),
        )
        self._step += 1
        self._episode_step += 1
        return decision

    def _is_repeated(self, reasons: tuple[HoldReason, ...], time: _Time) -> bool:
        """Whether this very hold was told less than a control period ago."""
        held = self._held
        interval_ns = self._pace.period_ns - self._pace.slack_ns
        return (
            held is not None
            and reasons == held.reasons
            and 0 <= time.steady_ns - held.repeated_ns < interval_ns
        )

    def _hold(self, inputs: Inputs, reasons: tuple[HoldReason, ...], time: _Time, error: str = "") -> Command:
        """Begins or goes on with a hold."""
        if HoldReason.NO_INSTRUCTION in reasons:
            self._instruction = ""  # the same text given again starts a new episode
        was_moving = self._moved is not None
        self._moved = None  # whatever comes next starts from the measured pose
        self._holds_obeyed = inputs.holds_requested
        self._be_serious(
            [r for r in reasons if r in SERIOUS and (was_moving or r is not HoldReason.COMMANDS_UNHEARD)]
        )
        self._holds.update(set(reasons) - set(self.holding))
        pose = self._pose_to_hold(inputs, time.now_ns)
        self._held = _Held(pose, reasons, time.steady_ns)
        return Command(
            time.now_ns,
            pose,
            Twist.zero(),
            self._last_gripper,
            reasons,
            error=error,
            is_silent=self.is_silent,
        )

    def _be_serious(self, reasons: list[HoldReason]) -> None:
        """These hold until a clearance that is given from now on: one from before did not know of them."""
        if not set(reasons) <= set(self._serious):
            self._clearances = self._gate.snapshot().clearances
        self._serious = tuple(dict.fromkeys((*self._serious, *reasons)))

    def _pose_to_hold(self, inputs: Inputs, now_ns: int) -> Pose | None:
        """The pose that was held before, as long as the arm is within a step of it; else where the arm is
        measured to be; None where that is not known. A controller that joins finds nothing to jump to, and an
        arm that sags a little is not let down bit by bit.
        """
        if self._gate.judge_pose(inputs, now_ns):
            return None
        held, measured = self._held, inputs.pose.pose  # looked at once, as in `holding`
        if held and held.pose is not None and is_near(self._settings.guard, held.pose, measured):
            return held.pose
        return measured
