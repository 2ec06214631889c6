"""How does the policy meet the robot? A managed node that wires topics to the controller, and computes nothing."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from geometry_msgs.msg import PoseStamped
from rcl_interfaces.msg import SetParametersResult
from rclpy.clock import Clock, ClockType
from rclpy.event_handler import SubscriptionEventCallbacks
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.parameter import Parameter
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import String
from std_srvs.srv import SetBool, Trigger

from deer_vla_ros.control.controller import Controller
from deer_vla_ros.control.types import Camera, Command, Frame, HoldReason
from deer_vla_ros.errors import UserError
from deer_vla_ros.ros import conversions, images, loading, parameters
from deer_vla_ros.ros.outputs import Outputs
from deer_vla_ros.ros.qos import LATCHED, NEWEST
from deer_vla_ros.ros.reports import Reports

THROTTLE_S = 5.0
MAX_INSTRUCTION = 500
"""Characters; more than any network here reads."""
JOIN_S = 2.0
"""How long the end of control waits for an inference."""


class PolicyNode(LifecycleNode):
    """configure loads the checkpoint, activate starts the control thread, deactivate ends it with a hold.

    Subscriptions only hand over what came; the control thread ticks the controller whenever a frame arrives and at the control
    rate, so that no inference ever runs inside a callback.
    """

    def __init__(self) -> None:
        super().__init__(parameters.NODE_NAME)
        parameters.declare(self)
        self._controller: Controller | None = None
        self._wake = threading.Event()
        self._changes: dict[str, Callable[[Controller], None]] = {}  # by what is changed: only the newest counts
        self._changes_lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._output_lock = threading.Lock()  # guards what follows: who may tell the arm something
        self._running = False
        self._busy_since: float | None = None
        self._overruled = False
        self._instruction = ""
        self._hold_requested = self._value("control.start_held")
        self.failure: Exception | None = None
        self.add_on_set_parameters_callback(self._check_parameters)
        self.add_post_set_parameters_callback(self._apply_parameters)

        steady = Clock(clock_type=ClockType.STEADY_TIME)  # ticks come in ROS time; what watches over them must not stop with it
        self._outputs = Outputs(self, self._value("action.mode"), self._value("action.gripper_interface"))
        self._reports = Reports(self, self._outputs, self._value("overlay.rate_hz"), steady)

        for camera in Camera:
            self._listen_to_camera(camera)
        self.create_subscription(PoseStamped, "ee_pose", self._on_pose, NEWEST)
        # A volatile publisher never matches a transient-local subscription, a latched text never reaches a volatile one.
        # Listening both ways hears both; the same text twice changes nothing, and no mismatch is worth a warning.
        quiet = SubscriptionEventCallbacks(use_default_callbacks=False)
        self.create_subscription(String, "instruction", self._on_instruction, 10)
        self.create_subscription(String, "instruction", self._on_instruction, LATCHED, event_callbacks=quiet)
        self.create_service(Trigger, "~/reset", self._on_reset)
        self.create_service(SetBool, "~/hold", self._on_hold)
        self._tick_s = 1 / self._value("control.rate_hz")
        self._tick_timer = self.create_timer(self._tick_s, self._wake.set)
        self._watch_timer = self.create_timer(self._tick_s, self._watch, clock=steady)

    def _listen_to_camera(self, camera: Camera) -> None:
        """Raw or compressed, as the parameter says."""
        topic = f"camera/{camera.value}/image_raw"
        kind, decode = Image, images.frame
        if self._value("inputs.image_transport") == "compressed":
            topic, kind, decode = f"{topic}/compressed", CompressedImage, images.compressed_frame
        self.create_subscription(kind, topic, lambda message: self._on_image(camera, topic, decode, message), NEWEST)

    # --- life

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        if strangers := parameters.unknown(self):
            self.get_logger().warning(f"no such parameters: {', '.join(strangers)}: see config/deer_vla.yaml")
        try:
            given = parameters.values(self)
            self._outputs.open(given)
            controller = loading.warm_controller(given, self.get_logger())
            controller.put_instruction(self._instruction)
            controller.request_hold(self._hold_requested)
            self._frame_id = controller.action_space.frame
            self._changes.clear()  # all of them are in what was given
            self._controller = controller
            self._reports.open(controller)
        except (UserError, RuntimeError) as error:
            self.get_logger().error(f"configure failed: {error}")
            self._release()
            return TransitionCallbackReturn.FAILURE
        return super().on_configure(state)

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        if self._thread is not None and self._thread.is_alive():
            self.get_logger().error("activate failed: an inference of the last activation has not ended yet: restart the node")
            return TransitionCallbackReturn.FAILURE
        result = super().on_activate(state)
        self._controller.start()
        self._reports.budget()
        self._reports.set_active(True)
        self._running, self._overruled = True, False
        # A daemon: an inference that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._control, name="control", daemon=True)
        self._thread.start()
        return result

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._stop_control()
        return super().on_deactivate(state)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._release()
        return super().on_cleanup(state)

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._stop_control()
        self._release()
        return super().on_shutdown(state)

    def autostart(self) -> None:
        """Configures and activates, where the parameter asks for it."""
        if self._value("autostart") and self.trigger_configure() == TransitionCallbackReturn.SUCCESS:
            self.trigger_activate()

    def close(self) -> None:
        """A last hold, then everything is released; whatever state the node is in."""
        self._stop_control()
        self._release()

    def _stop_control(self) -> None:
        """Tells the arm to hold, at once; whatever the control thread still decides is thrown away."""
        if self._thread is None:
            return
        self._reports.set_active(False)
        with self._output_lock:
            if self._running:
                self._running = False
                self._publish(self._controller.hold_now(self._now_ns(), HoldReason.STOPPING))
        self._wake.set()
        self._thread.join(JOIN_S)
        if self._thread.is_alive():
            self.get_logger().error(f"the inference has not ended within {JOIN_S:g} s; it is left behind")
        else:
            self._thread = None

    def _release(self) -> None:
        if self._controller is not None:
            self._controller.close()
        self._controller = None
        self._reports.close()
        self._outputs.close()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    # --- control

    def _control(self) -> None:
        """The control thread: one tick per arrival and per control period. Should it fail, the process ends, after a hold."""
        controller = self._controller
        try:
            while self._running:
                self._wake.wait(self._tick_s)
                self._wake.clear()
                self._apply_changes()
                self._busy_since = time.monotonic()
                command = controller.tick(self._now_ns(), lambda times: self._now_ns())
                with self._output_lock:
                    self._busy_since = None
                    if self._overruled:
                        self._overruled = False
                        controller.forget_motion()
                    elif command is not None and self._running:
                        self._publish(command)
        except Exception as error:
            self.failure = error

    def _watch(self) -> None:
        """Overrules a step that takes longer than its inputs may be old: the arm holds now, and what the step decides is thrown away."""
        with self._output_lock:
            busy_since = self._busy_since
            if self._running and busy_since is not None and time.monotonic() - busy_since > self._value("inputs.max_age_s"):
                self._overruled = True
                self._publish(self._controller.hold_now(self._now_ns(), HoldReason.TOO_SLOW))

    def _apply_changes(self) -> None:
        """Accepted parameters take effect here: all of one request at once, between two ticks."""
        with self._changes_lock:
            changes, self._changes = self._changes, {}
        try:
            for change in changes.values():
                change(self._controller)
        except UserError as error:
            self.get_logger().error(f"parameters are not applied: {error}")
        if changes:
            self._reports.budget()

    def _publish(self, command: Command) -> None:
        """Tells the arm, then everybody else."""
        self._outputs.publish(command, self._frame_id)
        self._reports.command(command, self._frame_id)

    # --- callbacks: hand over and wake, nothing else

    def _on_image(self, camera: Camera, topic: str, decode: Callable[[Any], Frame], message: Image | CompressedImage) -> None:
        if self._controller is None:
            return
        try:
            is_new_pair = self._controller.put_frame(camera, decode(message))
        except UserError as error:
            self.get_logger().error(f"{topic}: {error}", throttle_duration_sec=THROTTLE_S)
            return
        if is_new_pair:  # a tick for anything less would compete with the other image's callback for the interpreter
            self._wake.set()

    def _on_pose(self, message: PoseStamped) -> None:
        if self._controller is not None:
            self._controller.put_pose(conversions.measured_pose(message))

    def _on_instruction(self, message: String) -> None:
        text = message.data
        if len(text) > MAX_INSTRUCTION:
            self.get_logger().warning(f"instruction of {len(text)} characters cut to {MAX_INSTRUCTION}: say it in fewer")
        self._instruction = text[:MAX_INSTRUCTION]  # a latched text comes once, perhaps before the node is configured
        if self._controller is not None:
            self._controller.put_instruction(self._instruction)
            self._wake.set()

    def _on_reset(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        return self._ask(response, lambda controller: controller.request_reset(), "the next step starts a new episode")

    def _on_hold(self, request: SetBool.Request, response: SetBool.Response) -> SetBool.Response:
        self._hold_requested = request.data  # outlives a cleanup, as the instruction does
        done = "the arm holds" if request.data else "the hold is lifted"
        answer = self._ask(response, lambda controller: controller.request_hold(request.data), done)
        with self._output_lock:  # nothing that was decided before leaves after the answer
            if request.data and self._running:
                self._overruled = self._busy_since is not None
                self._publish(self._controller.hold_now(self._now_ns(), HoldReason.REQUESTED))
        return answer

    def _ask(self, response: Any, request: Callable[[Controller], None], done: str) -> Any:
        if self._controller is None:
            response.success, response.message = False, "the node is not configured: configure it first"
        else:
            request(self._controller)
            self._wake.set()
            response.success, response.message = True, done
        return response

    # --- parameters

    def _check_parameters(self, changed: list[Parameter]) -> SetParametersResult:
        """Refuses a change with its reason; nothing is applied here."""
        try:
            given = parameters.values(self, {parameter.name: parameter.value for parameter in changed})
            parameters.controller_settings(given)
            asked, names = parameters.budget(given), parameters.budget_names(parameter.name for parameter in changed)
            asked.check() if self._controller is None else self._controller.check_budget(asked, names)
        except UserError as error:
            return SetParametersResult(successful=False, reason=str(error))
        return SetParametersResult(successful=True)

    def _apply_parameters(self, changed: list[Parameter]) -> None:
        """Hands accepted values to the control thread, which applies them all between two ticks; where there is none, does it itself."""
        if self._controller is None:
            return  # configure reads them
        changes = parameters.changes((parameter.name for parameter in changed), parameters.values(self))
        with self._changes_lock:
            self._changes |= changes
        if self._thread is None:
            self._apply_changes()
        self._wake.set()

    def _value(self, name: str) -> Any:
        return self.get_parameter(name).value

    def _now_ns(self) -> int:
        return self.get_clock().now().nanoseconds
