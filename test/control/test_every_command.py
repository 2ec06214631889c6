"""Property tests: whatever the network outputs and whatever happens, every command is within all limits."""

from __future__ import annotations

import dataclasses
import functools

import hypothesis
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from poses import angle_between, distance_between
from scipy.spatial.transform import Rotation

from deer_vla_ros.control.continuity import Continuity
from deer_vla_ros.control.controller import Controller, ControllerSettings
from deer_vla_ros.control.guard import GuardLimits
from deer_vla_ros.control.inputs import InputLimits
from deer_vla_ros.control.types import Camera, Command, Frame, HoldReason, MeasuredPose, Pose
from deer_vla_ros.inference.types import Action
from deer_vla_ros.model.checkpoint import EMBEDDED, load

MS = 1_000_000
PERIOD = 100 * MS
IMAGE = np.zeros((8, 8, 3), np.uint8)
LIMITS = GuardLimits(
    max_translation_m=0.06,
    max_rotation_rad=0.3,
    leash_m=0.1,
    leash_rad=0.5,
    workspace_min=(0.2, -0.4, 0.05),
    workspace_max=(0.7, 0.4, 0.6),
    max_linear_speed_m_s=0.5,
    max_angular_speed_rad_s=2.5,
    ramp_in_steps=2,
)
SETTINGS = ControllerSettings(
    rate_hz=10.0,
    inputs=InputLimits(max_age_ns=300 * MS, max_pose_age_ns=300 * MS, max_skew_ns=50 * MS),
    guard=LIMITS,
    gripper_hysteresis=0.05,
    gripper_dwell_ns=300 * MS,
    follow_timeout_ns=1_000 * MS,
)
EPSILON = 1e-6


def mostly(plain: st.SearchStrategy, odd: st.SearchStrategy, share: int = 8) -> st.SearchStrategy:
    """About one of `share` draws is odd. With more, the arm would always hold and nothing would be tested."""
    return st.integers(1, share).flatmap(lambda draw: odd if draw == share else plain)


def action_of(pose: list[float], gripper: float) -> Action:
    return Action(np.array(pose, np.float32), gripper)


actions = mostly(
    st.builds(action_of, st.lists(st.floats(-2.0, 2.0), min_size=6, max_size=6), st.floats(0, 1)),
    st.builds(
        action_of,
        st.lists(st.sampled_from([0.0, 1.0, float("nan"), float("inf"), 1e30]), min_size=6, max_size=6),
        st.just(0.5) | st.just(float("nan")),
    ),
    share=20,
)
errors = st.tuples(*[st.floats(-0.03, 0.03)] * 6)
"""How far the arm is from its target: [m] and [rad]."""
poses = mostly(
    errors.map(lambda error: ("follows", error)),
    st.one_of(
        errors.map(lambda error: ("stays", error)),
        st.tuples(*[st.floats(-0.5, 0.9)] * 3).map(lambda position: ("teleports", position)),
        st.sampled_from(
            [
                ("nan", ()),
                ("huge", ()),
                ("zero", ()),
                ("none", ()),
                ("old", ()),
                ("other frame", ()),
                ("flipped", ()),
            ]
        ),
    ),
)
requests = mostly(
    st.sampled_from(["", "", "go"]),
    st.sampled_from(
        "hold, hold and go, clear, stop words, new words, same words, reset, demand, lift, looser, tighter, "
        "no cameras, hold now".split(", ")
    ),
    share=4,
)
periods = mostly(st.just(PERIOD), st.sampled_from([80 * MS, 120 * MS, 20 * MS, 450 * MS, -3_000 * MS]))
inference = mostly(st.just(10 * MS), st.sampled_from([90 * MS, 500 * MS]))
events = st.lists(st.tuples(actions, poses, requests, periods, inference), min_size=20, max_size=60)


@functools.cache
def checkpoint():
    return load(EMBEDDED)


def outside_by(limits: GuardLimits, position: np.ndarray) -> np.ndarray:
    """(3,) The distance outside the workspace box on each axis [m]."""
    beyond = np.maximum(np.array(limits.workspace_min) - position, position - np.array(limits.workspace_max))
    return np.maximum(beyond, 0)


class World:
    """One arm and its controller. `step` makes one event happen, and checks every command that is sent."""

    def __init__(self) -> None:
        self.controller = Controller(checkpoint(), SETTINGS)
        self.controller.start()
        self.now, self.steady = 1_000_000 * MS, 50_000 * MS
        self.arm = Pose(np.array([0.4, 0.0, 0.3]), np.array([1.0, 0.0, 0.0, 0.0]))
        self.heard = self.arm
        self.usable = False
        self.limits = LIMITS
        self.continuity = Continuity()
        self.before: Command | None = None
        self.words = self.motions = 0
        self.until_anew = 0
        """Commands until one starts at the measured pose because limits were loosened; 0: none will."""
        self.controller.gate.put_instruction("lift the red block")
        original = self.controller.policy.step
        self._templates = original

    def step(self, action: Action, pose: tuple, request: str, period: int, takes: int) -> None:
        self.now, self.steady = self.now + period, self.steady + abs(period)
        self._move_arm(*pose)
        if request != "no cameras":
            for camera in Camera:
                self.controller.gate.put_frame(camera, Frame(IMAGE, self.now))
        self._say(action)
        command = self.controller.tick(self.now + MS, lambda times: self.now + takes, self.steady)
        self._ask(request)  # between the tick and the sending
        if command is not None:
            command = self.controller.confirm(command, self.now + takes + MS, self.steady + takes)
            self._leave(command)

    def _say(self, action: Action) -> None:
        """Sets the network's next action, whatever the observation."""

        def step(observation):
            return dataclasses.replace(
                taken := self._templates(observation), policy=dataclasses.replace(taken.policy, action=action)
            )

        self.controller.policy.step = step

    def _move_arm(self, how: str, detail: tuple) -> None:
        if (
            how == "follows"
            and self.before is not None
            and self.before.target is not None
            and not self.before.holds
        ):
            turn = Rotation.from_rotvec(detail[3:]) * Rotation.from_quat(self.before.target.quaternion)
            self.arm = Pose(self.before.target.position + 0.3 * np.array(detail[:3]), turn.as_quat())
        elif how == "stays":
            self.arm = Pose(self.arm.position + np.array(detail[:3]), self.arm.quaternion)
        elif how == "teleports":  # a gap in the poses, or a fault
            self.arm = Pose(np.array(detail), self.arm.quaternion)
        elif how == "flipped":
            self.arm = Pose(self.arm.position, -self.arm.quaternion)
        if how == "none":
            return
        position, stamp, frame = self.arm.position, self.now, "base"
        position = {"nan": np.full(3, np.nan), "huge": np.full(3, 1e300), "zero": np.zeros(3)}.get(
            how, position
        )
        stamp -= 1_000 * MS if how == "old" else 0
        frame = "camera" if how == "other frame" else frame
        self.controller.gate.put_pose(MeasuredPose(Pose(position, self.arm.quaternion), frame, stamp))
        self.usable = how not in ("nan", "huge", "zero", "old", "other frame")
        if self.usable:
            self.heard = self.arm

    def _ask(self, request: str) -> None:
        controller = self.controller
        if request in ("hold", "hold and go"):
            controller.gate.request_hold(True)
        if request in ("go", "hold and go"):
            controller.gate.request_hold(False)
        if request == "clear":
            controller.gate.clear()
        if request in ("stop words", "new words", "same words"):
            self.words += request == "new words"
            controller.gate.put_instruction(
                "" if request == "stop words" else f"lift the red block {self.words}".strip("0 ")
            )
        if request == "reset":
            controller.gate.request_reset()
        if request in ("demand", "lift"):
            controller.gate.demand_hold(HoldReason.NOT_ENABLED, request == "demand")
        if request == "looser" and self.limits is LIMITS:
            self.until_anew = 2  # the command of this tick was made before
        if request in ("looser", "tighter"):
            self.limits = (
                dataclasses.replace(LIMITS, leash_m=0.3, max_translation_m=0.1)
                if request == "looser"
                else LIMITS
            )
            controller.settings = dataclasses.replace(SETTINGS, guard=self.limits)
        if request == "hold now":  # as in the node's service ~/hold
            controller.gate.request_hold(True)
            self._leave(controller.hold_now(self.now + MS, HoldReason.REQUESTED))

    def _leave(self, command: Command) -> None:
        """Checks one command that is sent."""
        command, before = self.continuity.passed(command), self.before
        limits, target, twist = self.limits, command.target, command.twist
        assert np.isfinite(twist.linear).all() and np.isfinite(twist.angular).all()
        assert command.gripper in (None, 0.0, 0.08)
        if command.holds:
            assert not twist.linear.any() and not twist.angular.any()
        if target is not None:
            assert self.usable, "a target needs a measured pose that makes sense"
            assert np.isfinite(target.position).all() and abs(np.linalg.norm(target.quaternion) - 1) < 1e-3
            assert distance_between(target, self.heard) <= limits.leash_m + EPSILON
            assert angle_between(target, self.heard) <= limits.leash_rad + EPSILON
        if command.holds and target is not None:
            assert distance_between(target, self.heard) <= limits.max_translation_m + EPSILON
        if not command.holds:
            self.motions += 1
            assert np.linalg.norm(twist.linear) <= limits.max_linear_speed_m_s + EPSILON
            assert np.linalg.norm(twist.angular) <= limits.max_angular_speed_rad_s + EPSILON
            starts_anew = before is None or before.holds or self.until_anew == 1
            start = self.heard if starts_anew else before.target
            outside = [outside_by(limits, each.position) for each in (start, target)]
            assert (outside[1] <= outside[0] + EPSILON).all(), "never further out"
            if before is None or before.holds or limits is self.last_limits:
                assert distance_between(target, start) <= limits.max_translation_m + EPSILON
                assert angle_between(target, start) <= limits.max_rotation_rad + EPSILON
        if before is not None and HoldReason.CLOCK_JUMPED not in command.holds:
            assert command.stamp_ns >= before.stamp_ns
        self.before, self.last_limits = command, limits
        self.until_anew = max(self.until_anew - 1, 0)


def drive(given_events: list[tuple]) -> None:
    """Makes the events happen. The world checks every command."""
    world = World()
    for event in given_events:
        world.step(*event)
    hypothesis.target(world.motions)


WITHOUT_SHRINKING = [phase for phase in Phase if phase is not Phase.shrink]


@settings(max_examples=12, phases=WITHOUT_SHRINKING)
@given(events)
def test_no_sequence_of_outputs_poses_timings_and_requests_leads_to_a_command_outside_any_limit(given_events):
    drive(given_events)


@pytest.mark.long
@settings(max_examples=200, phases=WITHOUT_SHRINKING)
@given(events)
def test_no_sequence_leads_to_a_command_outside_any_limit_in_a_longer_search(given_events):
    drive(given_events)


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(*[st.floats(-1, 1)] * 4).filter(lambda q: np.linalg.norm(q) > 0.1), min_size=2, max_size=20
    )
)
def test_neighbouring_quaternions_never_have_opposite_signs(quaternions):
    continuity, last = Continuity(), None
    for stamp, quaternion in enumerate(quaternions):
        unit = np.array(quaternion) / np.linalg.norm(quaternion)
        sent = continuity.passed(Command(stamp, Pose(np.zeros(3), unit), None, None)).target.quaternion
        assert abs(float(sent @ unit)) > 1 - 1e-9, "the same orientation"
        assert last is None or float(last @ sent) >= 0
        last = sent


@given(st.lists(st.tuples(st.integers(0, 10**9), st.booleans()), max_size=30))
def test_stamps_go_back_only_with_a_clock_that_jumped(stamps):
    continuity, last = Continuity(), 0
    for stamp, jumped in stamps:
        holds = (HoldReason.CLOCK_JUMPED,) if jumped else ()
        sent = continuity.passed(Command(stamp, None, None, None, holds)).stamp_ns
        assert sent == stamp if jumped else sent == max(stamp, last)
        last = sent
