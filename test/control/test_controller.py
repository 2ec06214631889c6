"""Tests of the controller on the embedded checkpoint. Time is an argument."""

import dataclasses
import shutil
import time

import numpy as np
import pytest
from poses import distance_between

from deer_vla_ros.budget.types import Budget
from deer_vla_ros.control.controller import Controller, ControllerSettings
from deer_vla_ros.control.guard import GuardLimits
from deer_vla_ros.control.inputs import InputLimits
from deer_vla_ros.control.types import Camera, Frame, HoldReason, MeasuredPose, Pose
from deer_vla_ros.errors import UserError
from deer_vla_ros.inference.policy import DeerPolicy
from deer_vla_ros.model.checkpoint import EMBEDDED, load

MS = 1_000_000
PERIOD = 100 * MS
START = 5_000 * MS
DOWN = np.array([1.0, 0.0, 0.0, 0.0])
SETTINGS = ControllerSettings(
    rate_hz=10.0,
    inputs=InputLimits(max_age_ns=300 * MS, max_pose_age_ns=300 * MS, max_skew_ns=50 * MS),
    guard=GuardLimits(0.06, 0.3, 0.15, 0.6, (-0.8, -0.8, 0.0), (0.8, 0.8, 1.2)),
)


@pytest.fixture(scope="module")
def checkpoint():
    return load(EMBEDDED)


@pytest.fixture
def controller(checkpoint):
    return Controller(checkpoint, SETTINGS)


class Robot:
    """Gives a controller camera frames and a measured pose at each tick of an artificial clock."""

    def __init__(self, controller: Controller, instruction: str = "lift the red block"):
        self.controller = controller
        self.now = START
        self.pose = Pose(np.array([0.4, 0.0, 0.3]), DOWN)
        self._random = np.random.default_rng(0)
        if instruction:
            controller.gate.put_instruction(instruction)

    def image(self) -> np.ndarray:
        return self._random.integers(0, 255, (60, 80, 3), dtype=np.uint8)

    def tick(self, cameras=tuple(Camera), with_pose=True, follow=True):
        """One period: new inputs, then a tick. With `follow`, the arm then moves to the target."""
        self.now += PERIOD
        self.perceive(self.now, cameras, with_pose)
        command = self.controller.tick(self.now + MS)
        if follow and command is not None and command.target is not None:
            self.pose = command.target
        return command

    def perceive(self, now: int, cameras=tuple(Camera), with_pose=True) -> None:
        """New inputs stamped `now`."""
        for camera in cameras:
            self.controller.gate.put_frame(camera, Frame(self.image(), now))
        if with_pose:
            self.controller.gate.put_pose(MeasuredPose(self.pose, "base", now))

    def tick_until(self, condition, timeout: float = 10.0) -> list[int]:
        """Ticks until `condition` holds. Returns the number of layers that each step ran."""
        depths, deadline = [], time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, "the background was not done in time"
            depths.append(self.tick().decision.policy.layers_run)
            time.sleep(0.01)
        return depths

    def tick_during_which(self, happens, lasts: int):
        """One period whose inference takes `lasts` [ns]; `happens` is called during it, with its end time."""
        self.now += PERIOD
        self.perceive(self.now)
        policy, end = self.controller.policy, self.now + lasts
        original = policy.step
        policy.step = lambda observation: (happens(end), original(observation))[1]
        try:
            return self.controller.tick(self.now + MS, lambda times: end)
        finally:
            policy.step = original


def test_a_frame_in_gives_a_command_out(controller):
    command = Robot(controller).tick()
    assert command.holds == ()
    assert command.decision.policy.layers_run == command.decision.policy.exit_layer + 1
    assert command.stamp_ns == command.decision.static_stamp_ns == START + PERIOD
    assert (
        0
        < distance_between(command.target, Pose(np.array([0.4, 0.0, 0.3]), DOWN))
        <= SETTINGS.guard.max_translation_m
    )
    assert command.gripper in (0.0, 0.08)


def test_one_static_frame_gives_one_step(controller):
    robot = Robot(controller)
    robot.tick()
    assert controller.tick(robot.now + 2 * MS) is None
    robot.controller.gate.put_frame(Camera.GRIPPER, Frame(robot.image(), robot.now + 10 * MS))
    assert controller.tick(robot.now + 11 * MS) is None


def test_a_fast_camera_is_stepped_at_the_control_rate(controller):
    robot = Robot(controller)
    robot.tick()
    stepped = []
    for i in range(1, 31):
        now = robot.now + i * PERIOD // 3
        for camera in Camera:
            controller.gate.put_frame(camera, Frame(robot.image(), now))
        controller.gate.put_pose(MeasuredPose(robot.pose, "base", now))
        if controller.tick(now) is not None:
            stepped.append(i)
    assert stepped == list(range(3, 31, 3))
    assert controller.gate.snapshot().dropped == 20


def test_a_stale_camera_holds_where_the_arm_was_and_recovery_starts_from_there(controller):
    robot = Robot(controller)
    for _ in range(5):
        robot.tick(follow=False)
    for _ in range(4):
        held = robot.tick(cameras=())
    assert controller.gate.snapshot().dropped == 0
    assert set(held.holds) == {HoldReason.STATIC_STALE, HoldReason.GRIPPER_STALE}
    np.testing.assert_array_equal(held.target.position, robot.pose.position)
    assert not held.twist.linear.any() and not held.twist.angular.any()
    moved = Pose(robot.pose.position + [0.0, 0.2, 0.0], DOWN)
    robot.pose = moved  # somebody moved the arm meanwhile
    resumed = robot.tick()
    assert resumed.holds == ()
    assert distance_between(resumed.target, moved) <= SETTINGS.guard.max_translation_m


def test_a_clock_that_jumps_back_holds_forgets_and_starts_a_new_episode(controller):
    robot = Robot(controller)
    for _ in range(3):
        robot.tick()
    robot.now -= 2_000 * MS
    jumped = controller.tick(robot.now)
    assert jumped.holds == (HoldReason.CLOCK_JUMPED,)
    assert HoldReason.NO_STATIC_FRAME in controller.tick(robot.now + PERIOD).holds
    assert HoldReason.CLOCK_JUMPED in robot.tick().holds, "a person has to clear it"
    controller.gate.put_instruction("lift the red block")
    assert HoldReason.CLOCK_JUMPED in robot.tick().holds, "the same words again are no other instruction"
    controller.gate.request_hold(False)
    resumed = robot.tick()
    assert resumed.decision.episode == 1 and resumed.decision.episode_step == 0


def test_a_clock_that_wavers_does_not_count_as_a_jump(controller):
    robot = Robot(controller)
    robot.tick()
    assert controller.tick(robot.now - 10 * MS) is None
    assert robot.tick().decision.episode == 0


def test_a_frozen_stamp_gives_no_steps_and_then_a_hold(controller):
    robot = Robot(controller)
    robot.tick()
    frozen = robot.now
    told = []
    for i in range(1, 5):
        for camera in Camera:
            controller.gate.put_frame(camera, Frame(robot.image(), frozen))
        controller.gate.put_pose(MeasuredPose(robot.pose, "base", frozen + i * PERIOD))
        told.append(controller.tick(frozen + i * PERIOD + MS))
    assert told[:2] == [None, None]
    assert set(told[-1].holds) == {HoldReason.STATIC_STALE, HoldReason.GRIPPER_STALE}


def test_a_frame_older_than_the_last_one_stepped_on_is_not_acted_upon(controller):
    robot = Robot(controller)
    robot.tick()
    for camera in Camera:
        controller.gate.put_frame(camera, Frame(robot.image(), robot.now - 50 * MS))
    assert controller.tick(robot.now + 2 * MS) is None


def test_a_hold_is_repeated_at_the_control_rate_and_no_faster(controller):
    told = [controller.tick(START + i * 10 * MS) is not None for i in range(40)]
    assert 4 <= sum(told) <= 6


def test_a_hold_keeps_the_pose_measured_when_it_began_while_the_arm_sags(controller):
    robot = Robot(controller)
    robot.tick()
    controller.gate.request_hold(True)
    first = robot.tick(follow=False)
    for _ in range(5):
        robot.pose = Pose(robot.pose.position - [0.0, 0.0, 0.01], DOWN)
        later = robot.tick(follow=False)
    np.testing.assert_array_equal(later.target.position, first.target.position)
    controller.gate.request_hold(False)
    assert robot.tick().holds == ()


@pytest.mark.parametrize(
    "hold",
    [lambda c: c.gate.request_hold(True), lambda c: c.gate.put_instruction("")],
    ids=["requested", "no words"],
)
def test_the_target_of_a_hold_stays_within_a_step_of_an_arm_that_is_led_by_hand(controller, hold):
    robot = Robot(controller)
    robot.tick()
    hold(controller)
    for _ in range(40):
        robot.pose = Pose(robot.pose.position + [0.0, 0.0125, 0.0], DOWN)
        held = robot.tick(follow=False)
        assert distance_between(held.target, robot.pose) <= SETTINGS.guard.max_translation_m


def test_a_hold_that_began_at_a_pose_that_was_none_never_publishes_it(controller):
    robot = Robot(controller, instruction="")
    real, robot.pose = robot.pose, Pose(np.zeros(3), np.array([0.0, 0.0, 0.0, 1.0]))
    assert robot.tick(follow=False).target is None
    robot.pose = real
    np.testing.assert_array_equal(robot.tick().target.position, real.position)


def test_a_hold_without_a_measured_pose_publishes_no_target(controller):
    robot = Robot(controller)
    command = robot.tick(with_pose=False)
    assert command.holds == (HoldReason.NO_POSE,)
    assert command.target is None


def test_a_hold_leaves_the_gripper_as_it_is(controller):
    robot = Robot(controller)
    moving = robot.tick()
    controller.gate.request_hold(True)
    assert robot.tick().gripper == moving.gripper


def test_a_new_instruction_starts_an_episode_and_the_same_one_does_not(controller):
    robot = Robot(controller)
    first, second = robot.tick().decision, robot.tick().decision
    controller.gate.put_instruction(" lift the red block ")
    same = robot.tick().decision
    controller.gate.put_instruction("open the drawer")
    new = robot.tick().decision
    assert [d.episode for d in (first, second, same, new)] == [0, 0, 0, 1]
    assert [d.episode_step for d in (first, second, same, new)] == [0, 1, 2, 0]


def test_an_empty_instruction_holds_and_the_old_one_given_again_starts_anew(controller):
    robot = Robot(controller)
    robot.tick()
    controller.gate.put_instruction("")
    assert robot.tick().holds == (HoldReason.NO_INSTRUCTION,)
    controller.gate.put_instruction("lift the red block")
    assert robot.tick().decision.episode == 1


def test_a_reset_clears_the_memory(checkpoint):
    fresh, used = Robot(Controller(checkpoint, SETTINGS)), Robot(Controller(checkpoint, SETTINGS))
    for _ in range(3):
        used.tick(follow=False)  # the network reads the pose, so the arm stays at that of the fresh one
    used.controller.gate.request_reset()
    used._random = np.random.default_rng(0)
    np.testing.assert_array_equal(
        used.tick().decision.policy.action.pose, fresh.tick().decision.policy.action.pose
    )


def test_the_same_inputs_give_the_same_decisions(checkpoint):
    def run():
        robot = Robot(Controller(checkpoint, SETTINGS))
        return [robot.tick() for _ in range(10)]

    for a, b in zip(run(), run()):
        assert a.decision.policy.exit_index == b.decision.policy.exit_index
        np.testing.assert_array_equal(a.target.position, b.target.position)
        np.testing.assert_array_equal(a.target.quaternion, b.target.quaternion)


BUDGETS = ("average_gmac", "average_fraction", "average_ms", "peak_gmac", "memory_gib", "deadline_ms")


def middle(controller: Controller, name: str) -> float:
    low, high = controller.policy.status.feasible[name]
    return (low + high) / 2


@pytest.mark.parametrize("name", BUDGETS)
def test_a_live_budget_is_obeyed_from_the_next_step_on_and_the_memory_stays(name):
    checkpoint = load(EMBEDDED)  # its own copy: a memory budget removes layers
    controller = Controller(checkpoint, SETTINGS)
    controller.warm_up()
    robot, seen = Robot(controller), []
    original = controller.policy.step
    controller.policy.step = lambda observation: (seen.append(observation), original(observation))[1]
    decisions = [robot.tick().decision for _ in range(4)]
    before = controller.policy.status
    budget = Budget(**{name: middle(controller, name)}, governor=False)
    controller.policy.check(budget)
    controller.policy.set(budget)
    rule = controller.policy.status.rule
    decisions += [robot.tick().decision for _ in range(4)]

    # A policy alone on the same observations; only its rule changes, after four steps.
    plain = load(EMBEDDED)
    policy = DeerPolicy(plain.model, plain.tokenizer, before.rule)
    policy.reset("lift the red block")
    for number, (observation, decision) in enumerate(zip(seen, decisions, strict=True)):
        policy.rule = before.rule if number < 4 else rule
        step = policy.step(observation)
        np.testing.assert_array_equal(step.action.pose, decision.policy.action.pose)
        assert (step.exits, step.exit_index) == (decision.policy.exits, decision.policy.exit_index)
        assert decision.episode_step == number and decision.step == number, (
            "no step is lost, no episode begins"
        )
    assert rule != before.rule
    assert {d.budget_id for d in decisions[:4]} == {before.budget_id} != {d.budget_id for d in decisions[4:]}
    assert {d.budget_id for d in decisions[4:]} == {controller.policy.status.budget_id}
    controller.policy.close()


def test_a_memory_budget_drops_layers_at_once_and_control_goes_on_while_they_come_back():
    checkpoint = load(EMBEDDED)
    controller = Controller(checkpoint, SETTINGS)
    robot = Robot(controller)
    controller.policy.set(Budget(memory_gib=controller.policy.status.feasible["memory_gib"][0]))
    assert controller.policy.status.resident_layers == 2
    assert all(parameter.is_meta for parameter in checkpoint.model.layers[2].parameters())
    assert robot.tick().decision.policy.layers_run == 2
    controller.policy.set(Budget(average_fraction=1.0))
    depths = robot.tick_until(lambda: controller.policy.status.resident_layers == 12)
    assert set(depths) <= {2, 12}
    assert robot.tick().decision.policy.layers_run == 12 and not controller.policy.problem
    controller.policy.close()


def test_a_memory_budget_of_a_network_without_a_folder_is_refused(checkpoint):
    controller = Controller(dataclasses.replace(checkpoint, folder=None), SETTINGS)
    with pytest.raises(UserError, match="no folder to load layers back from"):
        controller.policy.check(Budget(memory_gib=1000.0))


def test_layers_that_cannot_come_back_are_told_and_control_goes_on(tmp_path):
    folder = shutil.copytree(EMBEDDED, tmp_path / "checkpoint")
    controller = Controller(load(folder), SETTINGS)
    robot = Robot(controller)
    controller.policy.set(Budget(memory_gib=controller.policy.status.feasible["memory_gib"][0]))
    (folder / "model.safetensors").unlink()
    controller.policy.set(Budget())
    assert set(robot.tick_until(lambda: controller.policy.problem)) == {2}
    assert "model.safetensors" in controller.policy.problem
    controller.policy.close()


def test_layers_of_other_weights_are_never_mixed_in(tmp_path):
    folder = shutil.copytree(EMBEDDED, tmp_path / "checkpoint")
    controller = Controller(load(folder), SETTINGS)
    robot = Robot(controller)
    controller.policy.set(Budget(memory_gib=controller.policy.status.feasible["memory_gib"][0]))
    shutil.copyfile(EMBEDDED / "model.safetensors", folder / "new")
    (folder / "new").replace(folder / "model.safetensors")
    controller.policy.set(Budget())
    robot.tick_until(lambda: controller.policy.problem)
    assert "another one than the network was loaded from" in controller.policy.problem
    assert controller.policy.status.resident_layers == 2
    controller.policy.close()


def test_a_network_of_which_only_some_layers_were_loaded_acts_and_grows():
    checkpoint = load(EMBEDDED, layers=4)
    assert all(parameter.is_meta for parameter in checkpoint.model.layers[4].parameters())
    controller = Controller(checkpoint, SETTINGS)
    controller.warm_up()
    robot = Robot(controller)
    assert controller.policy.status.resident_layers == 4
    assert robot.tick().decision.policy.layers_run <= 4
    controller.policy.set(Budget())
    robot.tick_until(lambda: controller.policy.status.resident_layers == 12)
    controller.policy.close()


def test_a_peak_below_the_first_exit_is_refused_and_changes_nothing(controller):
    Robot(controller).tick()
    before = controller.policy.status
    low, high = before.feasible["peak_gmac"]
    with pytest.raises(UserError, match=f"to {high:.4g}, or 0"):
        controller.policy.check(Budget(peak_gmac=low * 0.99))
    assert controller.policy.status.budget_id == before.budget_id


def test_an_arm_far_outside_the_workspace_holds_until_it_is_moved_back(controller):
    robot = Robot(controller)
    robot.pose = Pose(np.array([1.0, 0.0, 0.3]), DOWN)
    assert robot.tick().holds == (HoldReason.BEYOND_WORKSPACE,)
    assert robot.tick().holds == (HoldReason.BEYOND_WORKSPACE,)
    robot.pose = Pose(np.array([0.7, 0.0, 0.3]), DOWN)
    assert robot.tick().holds == ()


def test_an_arm_that_drifts_away_from_its_targets_never_takes_them_out_of_the_workspace(controller):
    robot = Robot(controller)
    for i in range(20):  # the arm does not follow on the way out
        robot.pose = Pose(np.array([0.4 + 0.05 * i, 0.0, 0.3]), DOWN)
        command = robot.tick(follow=False)
        if not command.holds:
            assert command.target.position[0] <= SETTINGS.guard.workspace_max[0]
    assert command.holds == (HoldReason.BEYOND_WORKSPACE,)


def test_an_inference_that_fails_holds_until_a_person_has_cleared_it(controller, monkeypatch):
    robot = Robot(controller)
    robot.tick()
    with monkeypatch.context() as patch:
        patch.setattr(controller.policy, "step", lambda observation: 1 / 0)
        failed = robot.tick()
    assert failed.holds == (HoldReason.INFERENCE_FAILED,)
    assert "ZeroDivisionError" in failed.error
    np.testing.assert_array_equal(failed.target.position, robot.pose.position)
    assert robot.tick().holds == (HoldReason.INFERENCE_FAILED,) == controller.serious
    controller.gate.request_hold(False)
    assert robot.tick().holds == () == controller.serious


def test_after_a_reset_that_failed_the_old_instruction_begins_a_new_episode(controller, monkeypatch):
    robot, told, reset = Robot(controller), [], controller.policy.reset
    robot.tick()

    def half_done(instruction: str) -> int:
        reset(instruction)
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(controller.policy, "reset", half_done)
        controller.gate.put_instruction("open the drawer")
        assert robot.tick().holds == (HoldReason.INFERENCE_FAILED,)
    monkeypatch.setattr(controller.policy, "reset", lambda text: (told.append(text), reset(text)))
    controller.gate.put_instruction("lift the red block")
    assert robot.tick().holds == () and told == ["lift the red block"]


def test_rust_code_that_panics_is_an_inference_that_fails(controller, monkeypatch):
    class PanicException(BaseException):
        """Stands for the exception that pyo3 raises."""

    def panics(instruction):
        raise PanicException("index out of bounds")

    robot = Robot(controller)
    monkeypatch.setattr(controller.policy, "reset", panics)
    failed = robot.tick()
    assert (
        failed.holds == (HoldReason.INFERENCE_FAILED,)
        and "PanicException: index out of bounds" in failed.error
    )
    monkeypatch.undo()
    controller.gate.put_instruction("open the drawer")
    assert robot.tick().holds == ()


def test_an_action_that_is_not_finite_holds_and_leaves_no_trace():
    checkpoint = load(EMBEDDED)  # its own copy, which the test damages
    controller = Controller(checkpoint, SETTINGS)
    robot = Robot(controller)
    robot.tick()
    weight = checkpoint.model.shared_head.pose.out.bias
    original = weight.clone()
    weight.fill_(float("nan"))
    refused = robot.tick()
    assert refused.holds == refused.decision.held == (HoldReason.NOT_FINITE,)
    weight.copy_(original)
    assert robot.tick().holds == (HoldReason.NOT_FINITE,)
    controller.gate.request_hold(False)
    assert np.isfinite(robot.tick().target.position).all()


def test_warming_up_leaves_no_trace(checkpoint):
    cold, warm = Robot(Controller(checkpoint, SETTINGS)), Robot(Controller(checkpoint, SETTINGS))
    warm.controller.warm_up()
    a, b = cold.tick().decision, warm.tick().decision
    assert (a.step, a.episode, a.budget_id) == (b.step, b.episode, b.budget_id)
    np.testing.assert_array_equal(a.policy.action.pose, b.policy.action.pose)


def test_a_hold_can_be_had_at_any_time_and_changes_nothing(controller):
    robot = Robot(controller)
    robot.tick(follow=False)
    robot.controller.gate.put_pose(MeasuredPose(robot.pose, "base", robot.now))
    held = controller.hold_now(robot.now + 2 * MS, HoldReason.STOPPING)
    assert held.holds == (HoldReason.STOPPING,)
    np.testing.assert_array_equal(held.target.position, robot.pose.position)
    assert controller.holding == () and robot.tick().holds == ()


def test_control_that_begins_again_remembers_nothing_of_before(controller):
    robot = Robot(controller)
    robot.tick()
    controller.gate.request_hold(True)
    robot.tick()
    robot.now += 10_000 * MS
    robot.pose = Pose(robot.pose.position + [0.0, 0.4, 0.0], DOWN)  # somebody moved the arm meanwhile
    controller.start()
    held = robot.tick(follow=False)
    np.testing.assert_array_equal(held.target.position, robot.pose.position)
    assert held.gripper is None
    controller.gate.request_hold(False)
    assert robot.tick().decision.episode_step == 0


def test_a_hold_requested_during_the_inference_is_obeyed(controller):
    robot = Robot(controller)
    robot.tick()
    command = robot.tick_during_which(lambda now: controller.gate.request_hold(True), lasts=10 * MS)
    assert command.holds == (HoldReason.REQUESTED,) == command.decision.held
    assert not command.twist.linear.any()


def test_an_inference_that_outlasts_its_frames_is_thrown_away(controller):
    robot = Robot(controller)
    robot.tick()
    command = robot.tick_during_which(robot.perceive, lasts=2_000 * MS)
    assert command.holds == (HoldReason.TOO_SLOW,)
    np.testing.assert_array_equal(command.target.position, robot.pose.position)


@pytest.mark.parametrize("soon", [True, False])
def test_a_measured_pose_that_is_displaced_for_good_holds_until_a_person_has_cleared_it(controller, soon):
    robot = Robot(controller)
    robot.tick()
    robot.pose = elsewhere = Pose(np.array([-0.6, -0.6, 0.1]), DOWN)  # 1.2 m in 0.1 s
    jumped = robot.tick()
    assert HoldReason.POSE_JUMPED in jumped.holds and jumped.target is None
    if soon:
        controller.gate.request_hold(False)
        assert robot.tick(follow=False).holds == ()
        return
    for _ in range(10):
        assert robot.tick().holds == (HoldReason.POSE_JUMPED,)
    controller.gate.put_instruction("lift the red block")
    assert robot.tick().holds == (HoldReason.POSE_JUMPED,), "the same words are no other instruction"
    controller.gate.request_hold(False)
    steady = robot.tick()
    assert (
        steady.holds == () and distance_between(steady.target, elsewhere) <= SETTINGS.guard.max_translation_m
    )


def test_a_hold_that_began_without_a_pose_takes_the_first_usable_one(controller):
    robot = Robot(controller, instruction="")
    assert robot.tick(with_pose=False).target is None
    np.testing.assert_array_equal(robot.tick().target.position, robot.pose.position)


def test_a_failing_inference_is_held_at_the_control_rate(controller, monkeypatch):
    robot = Robot(controller)
    robot.tick()
    monkeypatch.setattr(controller.policy, "step", lambda observation: 1 / 0)
    assert robot.tick().holds == (HoldReason.INFERENCE_FAILED,)
    assert controller.tick(robot.now + 100 * MS).holds == (HoldReason.INFERENCE_FAILED,)
    assert controller.tick(robot.now + 110 * MS) is None


# --- reasons that a person must clear, reasons that end by themselves, and the last check of a command


def test_a_hold_that_is_requested_and_lifted_between_two_ticks_is_a_hold(controller):
    robot = Robot(controller)
    for _ in range(5):
        robot.tick(follow=False)
    controller.gate.request_hold(True)
    controller.gate.request_hold(False)
    held = robot.tick(follow=False)
    assert held.holds == (HoldReason.REQUESTED,)
    np.testing.assert_array_equal(held.target.position, robot.pose.position)
    start = robot.pose
    assert distance_between(robot.tick().target, start) <= SETTINGS.guard.max_translation_m


def test_an_arm_that_stands_still_while_its_target_is_ahead_of_it_holds_until_it_is_cleared(checkpoint):
    controller = Controller(checkpoint, dataclasses.replace(SETTINGS, follow_timeout_ns=1_000 * MS))
    robot = Robot(controller)
    told = [robot.tick(follow=False) for _ in range(40)]
    motions = [command for command in told if not command.holds]
    assert 10 <= len(motions) <= 25, "it takes a moment until the target is ahead, and then a second"
    assert told[-1].holds == (HoldReason.ARM_NOT_FOLLOWING,) and not told[-1].twist.linear.any()
    controller.gate.request_hold(False)
    assert robot.tick().holds == ()


def test_an_arm_that_follows_slowly_is_not_taken_for_one_that_stands_still(checkpoint):
    controller = Controller(checkpoint, dataclasses.replace(SETTINGS, follow_timeout_ns=500 * MS))
    robot = Robot(controller)
    for _ in range(40):
        command = robot.tick(follow=False)
        assert command.holds == ()
        robot.pose = Pose(0.8 * robot.pose.position + 0.2 * command.target.position, DOWN)


def test_commands_that_nobody_hears_any_more_need_a_person_and_a_late_controller_does_not(controller):
    robot = Robot(controller)
    controller.gate.demand_hold(HoldReason.COMMANDS_UNHEARD, True)
    assert robot.tick().holds == (HoldReason.COMMANDS_UNHEARD,) and not controller.serious
    controller.gate.demand_hold(HoldReason.COMMANDS_UNHEARD, False)
    assert robot.tick().holds == ()
    controller.gate.demand_hold(HoldReason.COMMANDS_UNHEARD, True)
    robot.tick()
    controller.gate.demand_hold(HoldReason.COMMANDS_UNHEARD, False)
    assert robot.tick().holds == (HoldReason.COMMANDS_UNHEARD,) == controller.serious


def test_the_first_steps_after_a_hold_are_a_third_of_the_limits(checkpoint):
    limits = dataclasses.replace(SETTINGS.guard, ramp_in_steps=3, max_translation_m=0.006)
    robot = Robot(Controller(checkpoint, dataclasses.replace(SETTINGS, guard=limits)))
    begins = []
    for _ in range(2):
        begins.append([np.linalg.norm(robot.tick().twist.linear) * 0.1 for _ in range(6)])
        robot.tick(cameras=())
        for _ in range(3):
            robot.tick(cameras=())
    for lengths in begins:
        assert max(lengths[:3]) <= 0.002 + 1e-9 < max(lengths[3:]) <= 0.006 + 1e-9


def test_loosened_limits_start_again_from_the_measured_pose(controller):
    robot = Robot(controller)
    for _ in range(8):
        robot.tick(follow=False)
    controller.settings = dataclasses.replace(
        SETTINGS, guard=dataclasses.replace(SETTINGS.guard, leash_m=1.0, max_translation_m=1.0)
    )
    assert distance_between(robot.tick(follow=False).target, robot.pose) <= 0.06


@pytest.fixture
def decided(controller):
    """A robot, and a motion that is decided but not yet confirmed."""
    robot = Robot(controller)
    robot.tick()
    return robot, robot.tick()


def test_a_motion_leaves_as_it_is_where_nothing_speaks_against_it(controller, decided):
    robot, command = decided
    assert controller.confirm(command, robot.now + 10 * MS, robot.now + 10 * MS) is command


@pytest.mark.parametrize(
    ("happens", "later", "steady", "reason"),
    [
        (lambda c: None, 400 * MS, 400 * MS, HoldReason.STATIC_STALE),
        (lambda c: None, 10 * MS, 400 * MS, HoldReason.TOO_SLOW),
        (lambda c: None, -2_000 * MS, 10 * MS, HoldReason.CLOCK_JUMPED),
        (lambda c: c.gate.request_hold(True), 10 * MS, 10 * MS, HoldReason.REQUESTED),
        (
            lambda c: (c.gate.request_hold(True), c.gate.request_hold(False)),
            10 * MS,
            10 * MS,
            HoldReason.REQUESTED,
        ),
        (lambda c: c.gate.put_instruction(""), 10 * MS, 10 * MS, HoldReason.NO_INSTRUCTION),
        (
            lambda c: c.gate.demand_hold(HoldReason.NOT_ENABLED, True),
            10 * MS,
            10 * MS,
            HoldReason.NOT_ENABLED,
        ),
    ],
    ids=[
        "old frames",
        "stopped while ROS time stood still",
        "clock back",
        "hold",
        "hold and go",
        "no instruction",
        "not enabled",
    ],
)
def test_a_motion_that_something_speaks_against_by_now_is_a_hold_and_its_inference_is_told(
    controller, decided, happens, later, steady, reason
):
    robot, command = decided
    happens(controller)
    last = controller.confirm(command, robot.now + later, robot.now + steady)
    assert (
        reason in last.holds
        and last.decision.held == last.holds
        and last.decision.step == command.decision.step
    )
    assert not last.twist.linear.any() and controller.holding == last.holds
    start = robot.pose
    controller.gate.request_hold(False)
    controller.gate.demand_hold(HoldReason.NOT_ENABLED, False)
    robot.tick()
    controller.gate.put_instruction("lift the red block")
    assert distance_between(robot.tick().target, start) <= 2 * SETTINGS.guard.max_translation_m


def test_a_clock_that_stands_still_is_a_hold_by_the_steady_clock_and_is_repeated_by_it(controller):
    robot = Robot(controller)
    robot.tick()
    still = [controller.tick(robot.now + 5 * MS, steady_ns=robot.now + i * 50 * MS) for i in range(40)]
    told = [command for command in still if command is not None]
    assert {command.holds for command in told} == {(HoldReason.CLOCK_STOPPED,)}
    assert 12 <= len(told) <= 20 and still[:6] == [None] * 6


def test_control_that_stood_still_holds_before_it_goes_on(controller):
    robot = Robot(controller)
    for i in range(5):
        robot.now += PERIOD
        robot.perceive(robot.now)
        controller.tick(robot.now + MS, steady_ns=i * PERIOD)
    robot.now += 2_000 * MS
    robot.perceive(robot.now)
    assert controller.tick(robot.now + MS, steady_ns=4 * PERIOD + 2_000 * MS).holds == (HoldReason.STALLED,)
    robot.now += PERIOD
    robot.perceive(robot.now)
    assert controller.tick(robot.now + MS, steady_ns=5 * PERIOD + 2_000 * MS).holds == ()


def test_a_clock_that_jumps_back_during_an_inference_is_noticed_and_the_arm_can_go_on_afterwards(controller):
    robot = Robot(controller)
    robot.tick()
    command = robot.tick()
    robot.now -= 4_000 * MS
    last = controller.confirm(command, robot.now, robot.now)
    assert HoldReason.CLOCK_JUMPED in last.holds
    assert HoldReason.CLOCK_JUMPED in robot.tick().holds
    controller.gate.request_hold(False)
    for _ in range(3):
        after = robot.tick()
    assert after.holds == () and after.decision.episode == 1


def test_the_fingers_are_not_told_what_a_refused_motion_wanted(controller, monkeypatch):
    robot = Robot(controller)
    original, probability = controller.policy.step, 0.0

    def step(observation):
        taken = original(observation)
        action = dataclasses.replace(taken.policy.action, gripper_probability=probability)
        return dataclasses.replace(taken, policy=dataclasses.replace(taken.policy, action=action))

    monkeypatch.setattr(controller.policy, "step", step)
    closed = robot.tick().gripper
    probability = 1.0
    wanted = robot.tick()
    assert wanted.gripper != closed
    controller.gate.request_hold(True)
    assert controller.confirm(wanted, robot.now + MS, robot.now + MS).gripper == closed
    controller.gate.request_hold(False)
    assert robot.tick().gripper == wanted.gripper


def test_a_clearance_from_before_a_failure_does_not_clear_it(controller, monkeypatch):
    robot = Robot(controller)
    robot.tick()

    def fails(observation):
        controller.gate.put_instruction("open the drawer")
        raise RuntimeError("lost")

    with monkeypatch.context() as patch:
        patch.setattr(controller.policy, "step", fails)
        robot.tick()
    assert robot.tick().holds == (HoldReason.INFERENCE_FAILED,)
    controller.gate.request_hold(False)
    assert robot.tick().holds == ()


def test_a_frozen_pose_is_noticed_although_other_holds_come_in_between(checkpoint):
    controller = Controller(checkpoint, dataclasses.replace(SETTINGS, follow_timeout_ns=1_000 * MS))
    robot = Robot(controller)
    for i in range(200):
        command = robot.tick(cameras=() if i % 14 > 9 else tuple(Camera), follow=False)
        if controller.serious:
            break
    assert command.holds == (HoldReason.ARM_NOT_FOLLOWING,) and controller.holds[HoldReason.STATIC_STALE] >= 1


def test_one_who_has_not_moved_the_arm_is_silent_beside_another_and_one_who_has_is_not(controller):
    robot = Robot(controller)
    controller.gate.demand_hold(HoldReason.OTHER_PUBLISHER, True)
    assert robot.tick().is_silent and controller.hold_now(robot.now, HoldReason.STOPPING).is_silent
    controller.gate.demand_hold(HoldReason.OTHER_PUBLISHER, False)
    moved = robot.tick()
    assert controller.confirm(moved, robot.now + MS, robot.now + MS) is moved
    controller.gate.demand_hold(HoldReason.OTHER_COMMANDER, True)
    held = robot.tick()
    assert held.holds == (HoldReason.OTHER_COMMANDER,) and not held.is_silent


def test_a_hold_that_ends_while_another_thread_asks_for_one_keeps_nobody_from_holding(checkpoint):
    """The control thread may end a hold between any two steps of `hold_now` and of diagnostics."""

    class Ending(Controller):
        """Its hold ends as soon as it was looked at."""

        @property
        def _held(self):
            held, self.__dict__["held"] = self.__dict__.get("held"), None
            return held

        @_held.setter
        def _held(self, held):
            self.__dict__["held"] = held

    controller = Ending(checkpoint, SETTINGS)
    robot = Robot(controller)
    controller.gate.request_hold(True)
    robot.tick()
    assert controller.holding == (HoldReason.REQUESTED,)
    robot.tick()
    assert controller.hold_now(robot.now, HoldReason.STOPPING).target is not None
