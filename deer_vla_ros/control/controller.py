"""The controller: it turns the newest frames, pose and instruction into one guarded command per tick.

The node and the bag replay both drive this class, so they cannot disagree. Time is an argument.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from deer_vla_ros.budget.budgeted_policy import BudgetedPolicy, BudgetedStep, WarmUp
from deer_vla_ros.budget.latency import LatencyTable
from deer_vla_ros.control.following import Following
from deer_vla_ros.control.guard import StepTiming, guard, is_beyond_workspace, is_near
from deer_vla_ros.control.inputs import InputGate, Inputs
from deer_vla_ros.control.motion import motion_of, twist_of
from deer_vla_ros.control.pace import Pace
from deer_vla_ros.control.settings import ControllerSettings
from deer_vla_ros.control.types import (
    COMMANDED_BY_OTHERS,
    SERIOUS,
    Command,
    Decision,
    HoldReason,
    Pose,
    Twist,
)
from deer_vla_ros.inference.types import Action, Observation, StageTimes
from deer_vla_ros.model.action_space import ActionSpace
from deer_vla_ros.model.checkpoint import Checkpoint

IMAGE_OF_WARM_UP = (200, 200)
"""Height and width [pixels] of the images of the warm-up."""


@dataclass(frozen=True)
class _Held:
    """A hold in progress.

    pose: the pose that is held. sent_ns: steady time at which the hold was last sent.
    """

    pose: Pose | None
    reasons: tuple[HoldReason, ...]
    sent_ns: int


@dataclass(frozen=True)
class _Moved:
    """The newest motion.

    velocity: how fast the target moved. stamp_ns: of the static frame. count: motions since the last hold.
    """

    target: Pose
    velocity: Twist
    stamp_ns: int
    count: int


@dataclass(frozen=True)
class _Time:
    """now_ns: ROS time, which inputs are judged by. steady_ns: time of a clock that never stops or jumps."""

    now_ns: int
    steady_ns: int


class Controller:
    """The control of one arm.

    Threads: any thread may call the methods of `gate` that put, request, demand, clear or take a snapshot;
    call `hold_now` and `policy.check`; and read `action_space`, `holding`, `serious`, `has_moved`,
    `is_silent`, `steps`, `holds`, `policy.status`, `policy.budget_id` and `policy.problem`. Everything else
    belongs to the control thread; another thread may use it only while no control thread runs.

    gate: the inputs. policy: the network and its budget. steps: inferences so far. serious: the reasons among
    `holding` that a person has to clear. has_moved: whether a motion has been sent since control started.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        settings: ControllerSettings,
        action_space: ActionSpace | None = None,
        latencies: LatencyTable | None = None,
        backend: str = "eager",
    ):
        """action_space: this robot's units, frame and gripper values; None: those of the checkpoint.
        latencies: replace the measured latencies of every step (for a replay). backend: what the steps run
        with, as in BudgetedPolicy."""
        self.action_space = action_space or checkpoint.info.action_space
        self.policy = BudgetedPolicy(checkpoint, latencies, backend)
        self.gate = InputGate(settings.inputs, self.action_space.frame)
        self.steps = 0
        self.serious: tuple[HoldReason, ...] = ()
        self.has_moved = False
        self._settings = settings
        self._instruction = ""
        self._resets = 0
        self._episode = -1
        self._episode_step = 0
        self._pace = Pace(settings.rate_hz)
        self._last_tick: _Time | None = None
        self._clock_moved_ns = 0  # steady time at which ROS time last went on
        self._moved: _Moved | None = None
        self._following = Following()
        self._gripper = GripperSwitch(settings.gripper_hysteresis, settings.gripper_dwell_ns)
        self._last_gripper: float | None = None
        self._held: _Held | None = None
        self._holds: Counter[HoldReason] = Counter()
        self._clearances = self._holds_obeyed = 0
        self._gripper_before: tuple[object, float | None] = (self._gripper.state, None)

    @property
    def settings(self) -> ControllerSettings:
        return self._settings

    @settings.setter
    def settings(self, settings: ControllerSettings) -> None:
        if settings.loosened_from(self._settings):
            self._moved = None  # under looser limits, the next motion starts at the measured pose
        self._settings = settings
        self.gate.limits = settings.inputs
        self._gripper.hysteresis = settings.gripper_hysteresis
        self._gripper.dwell_ns = settings.gripper_dwell_ns

    @property
    def holds(self) -> dict[HoldReason, int]:
        """How often a hold began, by reason."""
        return dict(self._holds)

    @property
    def holding(self) -> tuple[HoldReason, ...]:
        """Why the arm holds now; empty when it does not hold."""
        held = self._held
        return held.reasons if held else ()

    @property
    def is_silent(self) -> bool:
        """Whether the arm gets no commands, not even a hold, because somebody else commands it.

        A controller that has moved the arm is never silent: it ends its own motion with a hold.
        """
        return not self.has_moved and not COMMANDED_BY_OTHERS.isdisjoint(self.gate.snapshot().demands)

    def warm_up(
        self,
        seconds: float = math.inf,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> WarmUp:
        """Runs every exit a few times, so that the first real step is not slow. Only latencies stay.

        seconds, on_progress: see BudgetedPolicy.warm_up.
        """
        done = self.policy.warm_up(IMAGE_OF_WARM_UP, seconds, on_progress)
        self._instruction = ""
        return done

    def start(self) -> None:
        """Control starts, or starts again: every earlier motion, hold and time is forgotten."""
        self._held = self._moved = self._last_gripper = self._last_tick = None
        self.serious = ()
        self.has_moved = False
        self._following.reset()
        self._gripper = GripperSwitch(self._settings.gripper_hysteresis, self._settings.gripper_dwell_ns)
        self._pace.forget()
        self.gate.request_reset()
        self.policy.begin()

    def tick(
        self,
        now_ns: int,
        inference_end_ns: Callable[[StageTimes], int] | None = None,
        steady_ns: int | None = None,
    ) -> Command | None:
        """Looks at the newest inputs once. Returns a motion, a new or repeated hold, or None for no command.

        inference_end_ns: returns ROS time at the end of an inference, from the times that it took; the inputs
        are judged again at that time. None: an inference takes no time. steady_ns: time of a clock that never
        stops, which shows whether `now_ns` stands still. None: `now_ns` is such a clock.
        """
        self.policy.absorb()
        time = _Time(now_ns, now_ns if steady_ns is None else steady_ns)
        inputs, before = self.gate.snapshot(), self._last_tick
        self._last_tick = time
        if before is not None and now_ns < before.now_ns - self._settings.inputs.max_skew_ns:
            return self._start_over(time)
        late = self._judge_time(before, time) if steady_ns is not None else ()
        reasons = tuple(dict.fromkeys((*late, *self._judge(inputs, now_ns))))
        if reasons:
            self.gate.mark_seen(inputs.pair)
            return self._hold_or_wait(inputs, reasons, time)
        if self._pace.admits(inputs.pair[0].stamp_ns):
            return self._act(inputs, time, inference_end_ns or (lambda times: now_ns))
        if self.holding:  # the reasons are gone, but the hold lasts until the next step
            return self._hold_or_wait(inputs, self.holding, time)
        return None

    def confirm(self, command: Command, now_ns: int, steady_ns: int) -> Command:
        """Judges the newest inputs again before a command is sent. Returns the command, or a hold instead.

        The caller must not let any other command reach the arm between this call and sending. steady_ns: see
        `tick`.
        """
        decision, time = command.decision, _Time(now_ns, steady_ns)
        # now_ns stays that of the tick: the next tick then sees a clock that jumped meanwhile.
        self._last_tick = dataclasses.replace(self._last_tick, steady_ns=steady_ns)
        if command.holds or decision is None:
            return command
        inputs, limits = self.gate.snapshot(), self._settings.inputs
        reasons = self._judge(inputs, now_ns)
        if now_ns < decision.tick_ns - limits.max_skew_ns:
            reasons = (*reasons, HoldReason.CLOCK_JUMPED)
        age_ns = now_ns - min(decision.static_stamp_ns, decision.gripper_stamp_ns)
        if not reasons and max(age_ns, steady_ns - decision.steady_ns) > limits.max_age_ns:
            reasons = (HoldReason.TOO_SLOW,)
        if not reasons:
            self.has_moved = True
            return command
        self._gripper.state, self._last_gripper = self._gripper_before  # the gripper got no command either
        return self._refuse(inputs, reasons, time, decision)

    def hold_now(self, now_ns: int, reason: HoldReason) -> Command:
        """A hold for `reason`. This changes nothing, so any thread may call it, also during a tick."""
        inputs = self.gate.snapshot()
        pose = self._pose_to_hold(inputs, now_ns)
        return Command(now_ns, pose, Twist.zero(), None, holds=(reason,), is_silent=self.is_silent)

    def _judge(self, inputs: Inputs, now_ns: int) -> tuple[HoldReason, ...]:
        """Why these inputs must not move the arm; empty when they may."""
        if inputs.clearances > self._clearances:
            self._clearances, self.serious = inputs.clearances, ()
            self._following.reset()
        reasons = [*self.serious, *self.gate.judge(inputs, now_ns)]
        if inputs.holds_requested != self._holds_obeyed:  # also a request that was lifted before any tick
            reasons.append(HoldReason.REQUESTED)
        if not reasons and is_beyond_workspace(self._settings.guard, inputs.pose.pose):
            reasons.append(HoldReason.BEYOND_WORKSPACE)
        return tuple(dict.fromkeys(reasons))

    def _judge_time(self, before: _Time | None, time: _Time) -> list[HoldReason]:
        """Whether ROS time stands still while steady time goes on, and whether the ticks paused."""
        limit_ns, reasons = self._settings.inputs.max_age_ns, []
        if before is None or time.now_ns != before.now_ns:
            self._clock_moved_ns = time.steady_ns
        elif time.steady_ns - self._clock_moved_ns > limit_ns:
            reasons.append(HoldReason.CLOCK_STOPPED)
        if before is not None and time.steady_ns - before.steady_ns > limit_ns:
            reasons.append(HoldReason.STALLED)
        return reasons

    def _start_over(self, time: _Time) -> Command:
        """Holds after a jump of the clock. Earlier frames and poses are forgotten; a new episode follows."""
        self.gate.forget()
        self.gate.request_reset()
        self._pace.forget()
        self._held = None
        return self._hold(self.gate.snapshot(), (HoldReason.CLOCK_JUMPED,), time)

    def _act(self, inputs: Inputs, time: _Time, inference_end_ns: Callable[[StageTimes], int]) -> Command:
        """One inference, and the command that follows from it."""
        static, gripper = inputs.pair
        self.gate.mark_seen(inputs.pair)
        self._pace.take(static.stamp_ns)
        try:
            if inputs.instruction != self._instruction or inputs.resets != self._resets:
                self._begin_episode(inputs)
            step = self.policy.step(Observation(static.image, gripper.image, inputs.pose.pose.as_array()))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # also a panic of Rust code, which is no Exception
            text = f"{type(error).__name__}: {error}"
            return self._hold(inputs, (HoldReason.INFERENCE_FAILED,), time, error=text)
        decision = self._decide(inputs, step, time)
        after = _Time(inference_end_ns(step.policy.times), time.steady_ns)
        newest = self.gate.snapshot()
        if not step.policy.action.is_finite:
            return self._refuse(newest, (HoldReason.NOT_FINITE,), after, decision)
        # Inputs may have changed during the inference: they are judged again before the arm moves.
        if reasons := self._judge(newest, after.now_ns):
            return self._refuse(newest, reasons, after, decision)
        if self.gate.is_outdated(inputs.pair, after.now_ns):
            return self._refuse(newest, (HoldReason.TOO_SLOW,), after, decision)
        return self._move(newest, after, decision)

    def _begin_episode(self, inputs: Inputs) -> None:
        """Clears the policy's memory and makes the exit rule for the instruction's length."""
        self._instruction = ""  # after a reset that failed, no instruction goes on with what is left of it
        self.policy.reset(inputs.instruction)
        self._instruction, self._resets = inputs.instruction, inputs.resets
        self._episode += 1
        self._episode_step = 0

    def _decide(self, inputs: Inputs, step: BudgetedStep, time: _Time) -> Decision:
        """The record of one inference; the counters go on."""
        static, gripper = inputs.pair
        decision = Decision(
            step=self.steps,
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
        self.steps += 1
        self._episode_step += 1
        return decision

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
        """Whether the arm has stood still for longer than allowed although its target is ahead of it."""
        limits, timeout_ns = self._settings.guard, self._settings.follow_timeout_ns
        still_ns = self._following.update(
            decision.static_stamp_ns, target, measured, limits, self._pace.period_ns
        )
        return 0 < timeout_ns < still_ns

    def _refuse(
        self, inputs: Inputs, reasons: tuple[HoldReason, ...], time: _Time, decision: Decision
    ) -> Command:
        """A hold instead of the decided motion."""
        return dataclasses.replace(
            self._hold(inputs, reasons, time), decision=dataclasses.replace(decision, held=reasons)
        )

    def _hold_or_wait(self, inputs: Inputs, reasons: tuple[HoldReason, ...], time: _Time) -> Command | None:
        """A hold; None where the same hold was sent less than a control period ago."""
        held = self._held
        if held is not None and reasons == held.reasons:
            interval_ns = self._pace.period_ns - self._pace.slack_ns
            if 0 <= time.steady_ns - held.sent_ns < interval_ns:
                return None
        return self._hold(inputs, reasons, time)

    def _hold(self, inputs: Inputs, reasons: tuple[HoldReason, ...], time: _Time, error: str = "") -> Command:
        """Begins a hold or goes on with it."""
        if HoldReason.NO_INSTRUCTION in reasons:
            self._instruction = ""  # the same text given again starts a new episode
        was_moving = self._moved is not None
        self._moved = None  # the next motion starts from the measured pose
        self._holds_obeyed = inputs.holds_requested
        self._add_serious(
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

    def _add_serious(self, reasons: list[HoldReason]) -> None:
        """These reasons hold until a person clears them. An earlier clearance does not count."""
        if not set(reasons) <= set(self.serious):
            self._clearances = self.gate.snapshot().clearances
        self.serious = tuple(dict.fromkeys((*self.serious, *reasons)))

    def _pose_to_hold(self, inputs: Inputs, now_ns: int) -> Pose | None:
        """The pose that a hold sends: the one held before while the arm is within a step of it, else the
        measured one; None where that is not known.

        An arm controller that joins gets no distant target, and an arm that sags is not lowered bit by bit.
        """
        if self.gate.judge_pose(inputs, now_ns):
            return None
        held, measured = self._held, inputs.pose.pose
        if held and held.pose is not None and is_near(self._settings.guard, held.pose, measured):
            return held.pose
        return measured


class GripperSwitch:
    """Opens at a probability of 0.5 + hysteresis or more, closes at 0.5 - hysteresis or less.

    After a change it does not change again for dwell_ns.

    With a hysteresis of 0, and for the first decision, this is the rule of the reference implementation: open
    above 0.5.
    """

    def __init__(self, hysteresis: float, dwell_ns: int = 0):
        self.hysteresis, self.dwell_ns = hysteresis, dwell_ns
        self._is_open: bool | None = None
        self._changed_ns: int | None = None

    def decide(self, action: Action, now_ns: int = 0) -> bool:
        """Whether the gripper must be open at `now_ns`."""
        wanted = self._is_open
        if self._is_open is None or abs(action.gripper_probability - 0.5) >= self.hysteresis:
            wanted = action.gripper > 0
        if wanted != self._is_open and not self._dwells(now_ns):
            self._is_open, self._changed_ns = wanted, now_ns
        return self._is_open

    @property
    def state(self) -> tuple[bool | None, int | None]:
        """The last decision and when it changed. Set it back if a decision was not carried out."""
        return self._is_open, self._changed_ns

    @state.setter
    def state(self, state: tuple[bool | None, int | None]) -> None:
        self._is_open, self._changed_ns = state

    def _dwells(self, now_ns: int) -> bool:
        """Whether the last change was less than dwell_ns ago; a clock that went back ends the dwell time."""
        return self._changed_ns is not None and 0 <= now_ns - self._changed_ns < self.dwell_ns
