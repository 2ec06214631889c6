"""The node's reports: one message per step, the budget, diagnostics, the overlay, and lines in the log."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.clock import Clock
from rclpy.lifecycle import LifecycleNode
from sensor_msgs.msg import Image

from deer_vla_ros import msg
from deer_vla_ros.budget.types import UNITS
from deer_vla_ros.control.types import Command, Decision, HoldReason
from deer_vla_ros.ros import conversions, overlay
from deer_vla_ros.ros.graph import neighbours
from deer_vla_ros.ros.messages import image_message
from deer_vla_ros.ros.outputs import Outputs
from deer_vla_ros.ros.qos import LATCHED
from deer_vla_ros.ros.telemetry import Telemetry, told_hold

if TYPE_CHECKING:
    from deer_vla_ros.control.controller import Controller

THROTTLE_S = 5.0
STATUS_PERIOD_S = 1.0
NO_IMAGE = np.zeros((0, 0, 3), np.uint8)


class Reports:
    """Publishers and timers exist from the start; reports about a controller are from `open` to `close`."""

    def __init__(self, node: LifecycleNode, outputs: Outputs, overlay_hz: float, steady: Clock):
        """outputs: nobody else should publish on their topics. overlay_hz: 0: none. steady: never stops."""
        self._node, self._outputs = node, outputs
        self._controller: Controller | None = None
        self._active = False
        self._telemetry = Telemetry()
        self._newest: Decision | None = None
        self._was_holding: tuple[HoldReason, ...] = ()
        self._told_problems: set[str] = set()
        self._clamped_id = self._told_id = None
        self._steps = node.create_lifecycle_publisher(msg.PolicyStep, "~/step", 10)
        self._budget = node.create_lifecycle_publisher(msg.BudgetStatus, "~/budget", LATCHED)
        self._diagnostics = node.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self._overlay = node.create_lifecycle_publisher(Image, "~/overlay", 1) if overlay_hz else None
        self._timers = [node.create_timer(STATUS_PERIOD_S, self._publish_status, clock=steady)]
        if overlay_hz:
            self._timers.append(node.create_timer(1 / overlay_hz, self._publish_overlay, clock=steady))

    def open(self, controller: Controller) -> None:
        """Begins the reports about this controller, with new figures."""
        self._controller, self._telemetry, self._newest = controller, Telemetry(), None

    def close(self) -> None:
        self._controller = self._newest = None

    def set_active(self, active: bool) -> None:
        """Sets whether control runs."""
        self._active = active

    def command(self, command: Command) -> None:
        """Reports a command: its step as a message, and a change of the holds in the log."""
        if self._controller.policy.budget_id != self._told_id:
            self.budget()  # before a step that ran under the new budget
        if command.decision is not None:
            self._step(command.decision)
        if command.error:
            self._node.get_logger().error(
                f"inference failed: {command.error}", throttle_duration_sec=THROTTLE_S
            )
        if command.holds != self._was_holding:
            self._was_holding = command.holds
            if command.holds:
                self._node.get_logger().warning(told_hold(command.holds, self._controller.serious))
            else:
                self._node.get_logger().info("controlling")

    def thrown_away(self, command: Command) -> None:
        """Reports a command that came after control had ended. Only its step is published."""
        if command.decision is not None and self._controller is not None:
            self._step(dataclasses.replace(command.decision, limits=(), held=(HoldReason.STOPPING,)))

    def fault(self, reason: str) -> None:
        """Reports at once that control has failed, because the process ends."""
        self._telemetry.fault = reason
        self._publish_diagnostics()

    def _step(self, decision: Decision) -> None:
        self._newest, published_ns = decision, self._now_ns()
        self._telemetry.note_step(decision.stamp_ns, published_ns)
        self._steps.publish(
            conversions.step_message(decision, self._controller.action_space.frame, published_ns)
        )

    def budget(self) -> None:
        """Publishes the present state of the budget, and warns if a new budget cannot be kept."""
        status = self._controller.policy.status
        self._told_id = status.budget_id
        if status.clamped and status.budget_id != self._clamped_id:
            self._clamped_id = status.budget_id
            for name in status.clamped:
                low = status.feasible[name][0]
                self._node.get_logger().warning(
                    f"budget.{name} is {getattr(status.requested, name):g}, but the first exit takes "
                    f"{low:.4g} {UNITS[name]} at the {status.tokens} tokens of this instruction: steps stop "
                    "there"
                )
        self._budget.publish(conversions.budget_message(status, self._now_ns()))

    def _publish_status(self) -> None:
        if self._active:
            self.budget()
        self._publish_diagnostics()

    def _publish_diagnostics(self) -> None:
        around = neighbours(self._node, self._node.subscriptions, self._outputs.publishers)
        for problem in set(around.problems) - self._told_problems:
            self._node.get_logger().warning(problem)
        self._told_problems = set(around.problems)
        name = self._node.get_name()
        self._diagnostics.publish(
            self._telemetry.diagnostics(name, self._controller, self._active, around, self._now_ns())
        )

    def _publish_overlay(self) -> None:
        """Draws the overlay if somebody subscribes; the executor's thread does it, not the control thread."""
        if self._controller is None or self._overlay.get_subscription_count() == 0:
            return
        inputs = self._controller.gate.snapshot()
        frames = [frame.image if frame else NO_IMAGE for frame in (inputs.static, inputs.gripper)]
        picture = overlay.draw(
            *frames,
            inputs.instruction,
            self._newest,
            self._controller.holding,
            self._controller.policy.status,
        )
        self._overlay.publish(image_message(picture, "", self._now_ns()))

    def _now_ns(self) -> int:
        return self._node.get_clock().now().nanoseconds
