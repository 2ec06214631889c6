"""The policy node: a managed (lifecycle) node that wires topics to the controller, and computes nothing."""

from __future__ import annotations

import functools
import gc
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from geometry_msgs.msg import PoseStamped
from lifecycle_msgs.srv import ChangeState
from rcl_interfaces.msg import SetParametersResult
from rclpy.clock import Clock, ClockType
from rclpy.event_handler import SubscriptionEventCallbacks
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.parameter import Parameter
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import Bool, String
from std_srvs.srv import SetBool, Trigger

from deer_vla_ros.control.types import Camera, Command, Frame, HoldReason
from deer_vla_ros.errors import UserError, one_line
from deer_vla_ros.ros import images, parameters
from deer_vla_ros.ros.decoder import Decoder
from deer_vla_ros.ros.graph import OtherCommanders, watchdog_name
from deer_vla_ros.ros.motions import measured_pose
from deer_vla_ros.ros.outputs import Outputs
from deer_vla_ros.ros.qos import LATCHED, NEWEST, SERVICES
from deer_vla_ros.ros.reports import Reports
from deer_vla_ros.ros.watchdog import Beat, WatchdogSettings
from deer_vla_ros.ros.watchdog_client import WatchdogClient

if TYPE_CHECKING:
    from deer_vla_ros.control.controller import Controller

THROTTLE_S = 5.0
MAX_INSTRUCTION = 500
"""Characters; more than any network here reads."""
TICK_S = 0.05
"""The longest time between two looks at the inputs, and between two beats to the watchdog."""
LOOK_AROUND_S = 0.2
"""How often the node looks who else commands the arm."""
JOIN_S = 0.5
"""How long the end of control waits for an inference."""
ACK_S = 0.2
"""How long the end of the process waits until everybody has the last hold."""


def told(returns: TransitionCallbackReturn) -> Callable:
    """A transition that fails says why in one line, whatever it is that fails, and returns this."""

    def decorated(transition: Callable) -> Callable:
        @functools.wraps(transition)
        def guarded(self: PolicyNode, state: LifecycleState) -> TransitionCallbackReturn:
            try:
                return transition(self, state)
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:  # Rust code that panics is no Exception
                name = transition.__name__.removeprefix("on_")
                self.get_logger().error(f"{name} failed: {one_line(error)}")
                self._stop_control()
                if name != "activate":  # that one may be tried again
                    self._release()
                return returns

        return guarded

    return decorated


class PolicyNode(LifecycleNode):
    """configure loads the checkpoint, activate starts the control thread, deactivate ends it with a hold.

    Four threads. Callbacks (the executor's thread) only hand over what came. The decoder makes frames of
    images. The control thread ticks the controller whenever a pair of frames arrives and every TICK_S, and
    beats to the watchdog process, which holds the arm when the beats stay out. A hold that is asked for
    leaves at once, from whichever thread was asked.
    """

    def __init__(
        self, ros_args: list[str] | None = None, on_failure: Callable[[], None] = lambda: None
    ) -> None:
        """ros_args: those of the process; the watchdog takes the security enclave from them. on_failure: is
        called from the control thread when control has ended by itself: the process has to end then."""
        super().__init__(parameters.NODE_NAME)
        parameters.declare(self)
        self._controller: Controller | None = None
        self._wake = threading.Event()
        # By what is changed: only the newest counts.
        self._changes: dict[str, Callable[[Controller], None]] = {}
        self._changes_lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._output_lock = threading.Lock()  # guards what follows: who may tell the arm something
        self._running = False
        self._instruction = ""
        self._hold_requested = self._value("control.start_held")
        self._enabled, self._enabled_at = False, 0.0
        self.failed, self._on_failure = False, on_failure
        self._is_heard = False
        self._other: HoldReason | None = None
        self._bad_image_told: dict[Camera, float] = {}
        self.add_on_set_parameters_callback(self._check_parameters)
        self.add_post_set_parameters_callback(self._apply_parameters)

        steady = Clock(
            clock_type=ClockType.STEADY_TIME
        )  # what watches over the arm never stops with ROS time
        self._outputs = Outputs(self, self._value("action.mode"), self._value("action.gripper_interface"))
        self._reports = Reports(self, self._outputs, self._value("overlay.rate_hz"), steady)
        commands = [publisher for publisher in (self._outputs.target, self._outputs.twist) if publisher]
        self._others = OtherCommanders(self, commands, self._outputs.stamps)
        self._decoder = Decoder(self._on_frame, self._on_bad_image)

        self._camera_topics = {camera: self._listen_to_camera(camera) for camera in Camera}
        pose = self.create_subscription(PoseStamped, "ee_pose", self._on_pose, NEWEST)
        self._watchdog = WatchdogClient(self._watchdog_settings(pose.topic_name), enclave_of(ros_args or []))
        # A volatile publisher never matches a transient-local subscription, a latched text never reaches a
        # volatile one. Listening both ways hears both; the same text twice changes nothing, and no mismatch
        # is worth a warning.
        quiet = SubscriptionEventCallbacks(use_default_callbacks=False)
        # Depth 1: the newest counts, and DDS keeps memory for the longest text in every place of the queue.
        self.create_subscription(String, "instruction", self._on_instruction, 1)
        self.create_subscription(String, "instruction", self._on_instruction, LATCHED, event_callbacks=quiet)
        if self._value("control.enable_timeout_s"):
            self.create_subscription(Bool, "enable", self._on_enable, 1)  # an old one must not be heard late
        self.create_service(Trigger, "~/reset", self._on_reset, qos_profile=SERVICES)
        self.create_service(SetBool, "~/hold", self._on_hold, qos_profile=SERVICES)
        self._answer_every_transition()
        self._tick_s = min(TICK_S, 1 / self._value("control.rate_hz"))
        self.create_timer(LOOK_AROUND_S, self._look_around, clock=steady)

    def _listen_to_camera(self, camera: Camera) -> str:
        """Raw or compressed, as the parameter says; the topic's name."""
        topic, kind, decode = f"camera/{camera.value}/image_raw", Image, images.frame
        if self._value("inputs.image_transport") == "compressed":
            topic, kind, decode = f"{topic}/compressed", CompressedImage, images.compressed_frame
        self.create_subscription(kind, topic, lambda message: self._on_image(camera, decode, message), NEWEST)
        return topic

    def _watchdog_settings(self, pose_topic: str) -> WatchdogSettings:
        target, twist = self._outputs.target, self._outputs.twist
        return WatchdogSettings(
            target_topic=target.topic_name if target else "",
            twist_topic=twist.topic_name if twist else "",
            pose_topic=pose_topic,
            namespace=self.get_namespace(),
            name=watchdog_name(self),
            use_sim_time=self._value("use_sim_time"),
        )

    # --- life

    @told(TransitionCallbackReturn.FAILURE)
    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._watchdog.start()  # meanwhile it starts
        self._others.listen()
        if strangers := parameters.unknown(self):
            self.get_logger().warning(f"no such parameters: {', '.join(strangers)}: see config/deer_vla.yaml")
        given = parameters.values(self)
        if given["control.rehearsal"]:
            self.get_logger().warning(
                "control.rehearsal is on: for recordings and onlookers, never with an arm"
            )
        self._outputs.open(given)
        from deer_vla_ros.ros import loading  # torch takes seconds: others find the node meanwhile

        controller = loading.warm_controller(given, self.get_logger())
        controller.put_instruction(self._instruction)
        if self._hold_requested:
            controller.request_hold(True)
        self._frame_id = controller.action_space.frame
        self._changes.clear()  # all of them are in what was given
        self._controller = controller
        self._reports.open(controller)
        return super().on_configure(state)

    @told(TransitionCallbackReturn.FAILURE)
    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        if self._thread is not None and self._thread.is_alive():
            raise UserError("an inference of the last activation has not ended yet: restart the node")
        result = super().on_activate(state)
        self._others.begin()
        self._look_around()
        self._controller.start()
        self._reports.budget()
        self._reports.set_active(True)
        self._running = True
        # A daemon: an inference that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._control, name="control", daemon=True)
        self._thread.start()
        self.get_logger().info("active")
        return result

    @told(TransitionCallbackReturn.ERROR)
    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._stop_control()
        return super().on_deactivate(state)

    @told(TransitionCallbackReturn.ERROR)
    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._release()
        return super().on_cleanup(state)

    @told(TransitionCallbackReturn.ERROR)
    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._stop_control()
        self._release()
        return super().on_shutdown(state)

    def _answer_every_transition(self) -> None:
        """rclpy raises where a transition is asked for that the state does not have; the answer is no, and
        the node stays."""
        (service,) = (each for each in self.services if each.srv_type is ChangeState)
        change_state = service.callback

        def answer(request: ChangeState.Request, response: ChangeState.Response) -> ChangeState.Response:
            try:
                return change_state(request, response)
            except Exception as error:
                self.get_logger().error(f"transition {request.transition.id} is refused: {one_line(error)}")
                response.success = False
                return response

        service.callback = answer

    def autostart(self) -> None:
        """Configures and activates, where the parameter asks for it."""
        if self._value("autostart") and self.trigger_configure() == TransitionCallbackReturn.SUCCESS:
            self.trigger_activate()

    def close(self) -> None:
        """A last hold, then everything is released; whatever state the node is in."""
        self._stop_control()
        self._outputs.wait_until_heard(ACK_S)
        self._watchdog.leave() if self.failed else self._watchdog.close()
        self._others.close()
        self._decoder.close(JOIN_S)
        self._release()

    def hold_and_stop(self, reason: HoldReason) -> None:
        """The arm is told to hold, at once; whatever the control thread still decides is thrown away."""
        with self._output_lock:
            if self._running:
                self._running = False
                self._publish(self._controller.hold_now(self._now_ns(), reason))

    def _stop_control(self) -> None:
        if self._thread is None:
            return
        self._reports.set_active(False)
        self.hold_and_stop(HoldReason.STOPPING)
        self._wake.set()
        self._thread.join(JOIN_S)
        if self._thread.is_alive():
            self.get_logger().error(f"the inference has not ended within {JOIN_S:g} s; it is left behind")
        else:
            self._thread = None
        if not self.failed:
            self._beat()

    def _release(self) -> None:
        if self._controller is not None:
            self._controller.close()
        self._controller = None
        self._reports.close()
        self._outputs.close()
        gc.collect()
        if torch := sys.modules.get("torch"):  # not where configure never got so far
            torch.cuda.empty_cache()

    # --- control

    def _control(self) -> None:
        """The control thread: one tick per arrival and per TICK_S. Should it fail, the process ends, after a
        hold."""
        controller = self._controller
        try:
            while self._wait_for_news():
                self._apply_changes()
                self._demand_holds(controller)
                if self._value("control.rehearsal"):
                    controller.clear()
                command = controller.tick(self._now_ns(), lambda times: self._now_ns(), time.monotonic_ns())
                with self._output_lock:
                    if command is not None:
                        self._demand_holds(controller)  # they may have changed during the inference
                        command = controller.confirm(command, self._now_ns(), time.monotonic_ns())
                        if self._running:
                            self._beat()  # before it leaves: the watchdog must not hold in between
                        say = self._publish if self._running else self._reports.thrown_away
                        say(command)
                    controller.demand_hold(
                        HoldReason.CALLBACK_FAILED, False
                    )  # it is serious: the controller keeps it
                    if self._running:
                        self._beat()
        except BaseException as error:  # whatever it is: without this thread nobody commands the arm
            self._fail(error)

    def _wait_for_news(self) -> bool:
        """Until there is something to look at, at most TICK_S; whether control goes on."""
        self._wake.wait(self._tick_s)
        self._wake.clear()
        return self._running

    def _fail(self, error: BaseException) -> None:
        """Control has ended by itself: the arm holds, everybody is told why, and the main thread ends the
        process."""
        self.failed = True
        try:
            self.hold_and_stop(HoldReason.CONTROL_FAILED)
        finally:
            reason = one_line(error)
            self.get_logger().fatal(f"control failed: {reason}\n{''.join(traceback.format_exception(error))}")
            self._reports.fault(reason)
            self._on_failure()

    def _demand_holds(self, controller: Controller) -> None:
        """What only the node can see speaks for or against a hold."""
        controller.demand_hold(HoldReason.WATCHDOG_LOST, not self._watchdog.is_alive())
        may_begin = controller.has_moved or self._other is not HoldReason.OTHER_PUBLISHER
        controller.demand_hold(HoldReason.OTHER_PUBLISHER, not may_begin)
        controller.demand_hold(HoldReason.OTHER_COMMANDER, self._other is HoldReason.OTHER_COMMANDER)
        controller.demand_hold(HoldReason.COMMANDS_UNHEARD, not self._is_heard)
        controller.demand_hold(HoldReason.NOT_ENABLED, not self._is_enabled())

    def _is_enabled(self) -> bool:
        timeout_s = self._value("control.enable_timeout_s")
        return not timeout_s or (self._enabled and time.monotonic() - self._enabled_at <= timeout_s)

    def _look_around(self) -> None:
        """Who else commands the arm, whether anybody but ourselves listens to its commands, and whether the
        watchdog lives."""
        other = self._others.found()
        self._other = None if self._value("control.allow_other_commanders") else other
        listeners = self._outputs.listeners() - int(self._others.listens)
        self._is_heard = listeners > 0 or self._value("control.rehearsal")
        self._watchdog.revive()

    def _beat(self) -> None:
        """Tells the watchdog that the control thread lives; where it does not run, that it need not."""
        last = self._outputs.continuity
        self._watchdog.beat(
            Beat(
                beat_ns=time.monotonic_ns(),
                commands=self._running and not self._controller.is_silent,
                stamp_ns=last.stamp_ns,
                quaternion=() if last.quaternion is None else tuple(map(float, last.quaternion)),
                max_age_s=self._value("inputs.max_age_s"),
                max_pose_age_s=self._value("inputs.max_pose_age_s"),
                max_skew_s=self._value("inputs.max_skew_s"),
                step_m=self._value("guard.max_translation_m"),
                step_rad=self._value("guard.max_rotation_rad"),
                rate_hz=self._value("control.rate_hz"),
                frame=self._frame_id,
            )
        )

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
        if not command.is_silent:
            self._outputs.publish(command, self._frame_id)
        self._reports.command(command)

    # --- callbacks: hand over and wake, nothing else

    def on_callback_error(self, error: Exception) -> None:
        """A callback has raised: a defect of ours, and the arm holds until somebody has looked at it."""
        with self._output_lock:
            if self._running:
                self._controller.demand_hold(HoldReason.CALLBACK_FAILED, True)
                self._publish(self._controller.hold_now(self._now_ns(), HoldReason.CALLBACK_FAILED))
        self._wake.set()
        self.get_logger().error(
            f"a callback failed: {one_line(error)}\n{''.join(traceback.format_exception(error))}",
            throttle_duration_sec=THROTTLE_S,
        )

    def _on_image(
        self, camera: Camera, decode: Callable[[Any], Frame], message: Image | CompressedImage
    ) -> None:
        if self._controller is not None:
            self._decoder.put(camera, decode, message)

    def _on_frame(self, camera: Camera, frame: Frame) -> None:
        controller = self._controller
        if controller is not None and controller.put_frame(camera, frame):
            self._wake.set()  # for less than a pair, a tick would only keep the other image from the interpreter

    def _on_bad_image(self, camera: Camera, reason: str) -> None:
        now = time.monotonic()
        if (
            now - self._bad_image_told.get(camera, -THROTTLE_S) >= THROTTLE_S
        ):  # each camera's own line: rclpy throttles by place
            self._bad_image_told[camera] = now
            self.get_logger().error(f"{self._camera_topics[camera]}: {reason}")

    def _on_pose(self, message: PoseStamped) -> None:
        if self._controller is not None:
            self._controller.put_pose(measured_pose(message))

    def _on_instruction(self, message: String) -> None:
        text = message.data
        if len(text) > MAX_INSTRUCTION:
            self.get_logger().warning(
                f"instruction of {len(text)} characters cut to {MAX_INSTRUCTION}: say it in fewer",
                throttle_duration_sec=THROTTLE_S,
            )
        text = text[:MAX_INSTRUCTION]
        if text.strip() and text.strip() != self._instruction.strip():
            self._outputs.resume()
        self._instruction = text  # a latched text comes once, perhaps before the node is configured
        if self._controller is not None:
            self._controller.put_instruction(text)
            self._wake.set()

    def _on_enable(self, message: Bool) -> None:
        released, self._enabled = self._enabled and not message.data, message.data
        self._enabled_at = time.monotonic()
        if released:
            self._hold_at_once(HoldReason.NOT_ENABLED)
        self._wake.set()

    def _on_reset(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        return self._ask(
            response, lambda controller: controller.request_reset(), "the next step starts a new episode"
        )

    def _on_hold(self, request: SetBool.Request, response: SetBool.Response) -> SetBool.Response:
        if request.data or self._controller is not None:
            self._hold_requested = request.data  # outlives a cleanup, as the instruction does
        done = "the arm holds" if request.data else "holds that were requested or need a person are lifted"
        answer = self._ask(response, lambda controller: controller.request_hold(request.data), done)
        if request.data:
            self._hold_at_once(HoldReason.REQUESTED)
        else:
            self._outputs.resume()
        return answer

    def _hold_at_once(self, reason: HoldReason) -> None:
        """Nothing that was decided before leaves after this."""
        with self._output_lock:
            if self._running:
                self._publish(self._controller.hold_now(self._now_ns(), reason))

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
            settings, before = map(parameters.controller_settings, (given, parameters.values(self)))
            if self._is_moving() and (loosened := settings.loosened_from(before)):
                raise UserError(
                    f"{', '.join(loosened)} would allow more while the arm moves: call ~/hold with true first"
                )
            asked, names = (
                parameters.budget(given),
                parameters.budget_names(parameter.name for parameter in changed),
            )
            asked.check() if self._controller is None else self._controller.check_budget(asked, names)
        except UserError as error:
            return SetParametersResult(successful=False, reason=str(error))
        except Exception as error:  # rclpy would answer nobody
            return SetParametersResult(successful=False, reason=one_line(error))
        return SetParametersResult(successful=True)

    def _is_moving(self) -> bool:
        return self._running and self._controller is not None and not self._controller.holding

    def _apply_parameters(self, changed: list[Parameter]) -> None:
        """Hands accepted values to the control thread, which applies them all between two ticks; where there
        is none, does it itself."""
        for parameter in changed:
            if parameter.name.startswith(("guard.", "inputs.")):
                self.get_logger().warning(f"limit changed: {parameter.name} is {parameter.value} from now on")
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


def enclave_of(ros_args: list[str]) -> list[str]:
    """The part of a process's ROS arguments that names its security enclave, for another process in the same
    one."""
    for option, value in zip(ros_args, ros_args[1:]):
        if option in ("-e", "--enclave"):
            return ["--ros-args", "--enclave", value]
    return []
