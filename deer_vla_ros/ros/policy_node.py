"""The policy node: a managed (lifecycle) node that connects topics and services to the controller."""

from __future__ import annotations

import functools
import gc
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from geometry_msgs.msg import PoseStamped
from lifecycle_msgs.msg import Transition
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
from deer_vla_ros.errors import Cancelled, UserError, one_line
from deer_vla_ros.ros import images, parameters
from deer_vla_ros.ros.cancellable import Work
from deer_vla_ros.ros.graph import OtherCommanders, watchdog_name
from deer_vla_ros.ros.image_decoder import Decoder
from deer_vla_ros.ros.messages import measured_pose
from deer_vla_ros.ros.outputs import Outputs
from deer_vla_ros.ros.qos import LATCHED, NEWEST, SERVICES
from deer_vla_ros.ros.reports import Reports
from deer_vla_ros.ros.watchdog import Beat, WatchdogSettings
from deer_vla_ros.ros.watchdog_client import WatchdogClient

if TYPE_CHECKING:
    from deer_vla_ros.control.controller import Controller

THROTTLE_S = 5.0
MAX_INSTRUCTION = 500
"""Characters of an instruction. No network here reads more."""
TICK_S = 0.05
"""The longest time [s] between two ticks of the controller, and between two beats to the watchdog."""
LOOK_AROUND_S = 0.2
"""Period of the check for other nodes that command the arm [s]."""
JOIN_S = 0.5
"""How long the end of control waits for an inference [s]."""
ACK_S = 0.2
"""How long the end of the process waits until every subscriber has the last hold [s]."""
LOOK_S = 0.05
"""Period [s] of the check, while the checkpoint loads, for a signal or a request that ends the load."""
SHUTDOWNS = {
    Transition.TRANSITION_UNCONFIGURED_SHUTDOWN,
    Transition.TRANSITION_INACTIVE_SHUTDOWN,
    Transition.TRANSITION_ACTIVE_SHUTDOWN,
}
ENDS_OF_CONFIGURE = {
    "cleanup": {Transition.TRANSITION_CLEANUP},
    "deactivate": {Transition.TRANSITION_DEACTIVATE},
    "shutdown": SHUTDOWNS,
}
"""The requests that end a configure in progress: their labels and ids."""


def told(returns: TransitionCallbackReturn) -> Callable:
    """Decorator of a transition: after an error of any kind it logs one line, stops control, and returns
    `returns`.

    Unless the transition was activate, it also releases the controller.
    """

    def decorated(transition: Callable) -> Callable:
        @functools.wraps(transition)
        def guarded(self: PolicyNode, state: LifecycleState) -> TransitionCallbackReturn:
            name = transition.__name__.removeprefix("on_")
            try:
                return transition(self, state)
            except (KeyboardInterrupt, SystemExit):
                raise
            except Cancelled as cancelled:
                self.get_logger().warning(f"{name} is cancelled: {cancelled}")
                self._release()
                return returns
            except BaseException as error:  # a panic of Rust code is not an Exception
                self.get_logger().error(f"{name} failed: {one_line(error)}")
                self._stop_control()
                if name != "activate":  # activation may be tried again
                    self._release()
                return returns

        return guarded

    return decorated


class PolicyNode(LifecycleNode):
    """configure loads the checkpoint, activate starts the control thread, deactivate ends it with a hold.

    Threads: the executor's thread runs the callbacks, which only hand messages over. A thread of configure
    loads the checkpoint; meanwhile the executor's thread waits, and looks for a signal or a request that ends
    the load. The decoder's thread turns image messages into frames. The control thread ticks the controller
    when a pair of frames arrives and every TICK_S. It sends beats to the watchdog process, which holds the
    arm when beats are missing. The thread that receives a request to hold publishes the hold at once.
    """

    def __init__(
        self,
        ros_args: list[str] | None = None,
        on_failure: Callable[[], None] = lambda: None,
        is_ending: Callable[[], bool] = lambda: False,
    ) -> None:
        """ros_args: those of the process; the watchdog takes the security enclave from them.

        on_failure: called in the control thread when control has failed. The process has to end then.
        is_ending: whether the process has to end; then configure gives up.
        """
        super().__init__(parameters.NODE_NAME, automatically_declare_parameters_from_overrides=True)
        parameters.declare(self)
        for name in parameters.unknown(self):
            self.get_logger().warning(f"no such parameter: {name}: see config/deer_vla.yaml")
            self.undeclare_parameter(name)
        self._controller: Controller | None = None
        self._wake = threading.Event()
        # The changes that wait for the next tick, by what they change: a newer one replaces an older one.
        self._changes: dict[str, Callable[[Controller], None]] = {}
        self._changes_lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._load: Work[Controller] | None = None
        self._is_ending = is_ending
        self._waiting: deque[tuple[ChangeState.Request, Any]] = deque()  # requests that came during a load
        self._output_lock = threading.Lock()  # held while a command is published; guards _running
        self._running = False
        self._instruction = ""
        self._hold_requested = self._value("control.start_held")
        self._enabled, self._enabled_at = False, 0.0
        self.failed, self._on_failure = False, on_failure
        self._is_heard = False
        self._other: HoldReason | None = None
        self._bad_image_told: dict[Camera, float] = {}
        self._grey_told: set[Camera] = set()
        self.add_on_set_parameters_callback(self._check_parameters)
        self.add_post_set_parameters_callback(self._apply_parameters)

        # The checks that protect the arm go on when ROS time stops.
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        self._outputs = Outputs(self, self._value("action.mode"), self._value("action.gripper_interface"))
        self._reports = Reports(self, self._outputs, self._value("overlay.rate_hz"), steady)
        commands = [publisher for publisher in (self._outputs.target, self._outputs.twist) if publisher]
        self._others = OtherCommanders(self, commands, self._is_own_command)
        self._decoder = Decoder(self._on_frame, self._on_bad_image)

        self._camera_topics = {camera: self._listen_to_camera(camera) for camera in Camera}
        pose = self.create_subscription(PoseStamped, "ee_pose", self._on_pose, NEWEST)
        self._watchdog = WatchdogClient(self._watchdog_settings(pose.topic_name), enclave_of(ros_args or []))
        # A volatile publisher never matches a transient-local subscription, and a latched text never reaches
        # a volatile one. Two subscriptions receive both. The same text twice changes nothing, and a mismatch
        # needs no warning.
        quiet = SubscriptionEventCallbacks(use_default_callbacks=False)
        # Depth 1: only the newest text matters, and DDS reserves memory for a long text in every place of a
        # queue.
        self.create_subscription(String, "instruction", self._on_instruction, 1)
        self.create_subscription(String, "instruction", self._on_instruction, LATCHED, event_callbacks=quiet)
        if self._value("control.enable_timeout_s"):
            # Depth 1: an old message must not arrive late.
            self.create_subscription(Bool, "enable", self._on_enable, 1)
        self.create_service(Trigger, "~/reset", self._on_reset, qos_profile=SERVICES)
        self.create_service(SetBool, "~/hold", self._on_hold, qos_profile=SERVICES)
        self._answer_every_transition()
        self._tick_s = min(TICK_S, 1 / self._value("control.rate_hz"))
        self.create_timer(LOOK_AROUND_S, self._look_around, clock=steady)

    def _listen_to_camera(self, camera: Camera) -> str:
        """Subscribes to raw or compressed images, as the parameter says. Returns the topic."""
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

    # --- life cycle

    @told(TransitionCallbackReturn.FAILURE)
    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Starts the watchdog, loads the checkpoint, and runs every exit a few times."""
        self._watchdog.start()  # first, so that it starts while the checkpoint loads
        self._others.listen()
        given = parameters.values(self)
        if given["control.rehearsal"]:
            self.get_logger().warning(
                "control.rehearsal is on: for recordings and onlookers, never with an arm"
            )
        self._outputs.open(given)
        controller = self._loaded(given)
        controller.gate.put_instruction(self._instruction)
        if self._hold_requested:
            controller.gate.request_hold(True)
        self._frame_id = controller.action_space.frame
        self._changes.clear()  # `given` contains them all
        self._controller = controller
        self._reports.open(controller)
        return super().on_configure(state)

    def _loaded(self, given: dict[str, Any]) -> Controller:
        """The controller for these parameter values. Raises Cancelled as soon as it must not go on."""

        def do(check: Callable[[], None]) -> Controller:
            # A late import: torch takes seconds, and other nodes can find this one meanwhile.
            from deer_vla_ros.ros import loading

            controller = loading.warm_controller(given, self.get_logger(), check=check)
            loading.warn_of_slow_steps(controller, self.get_logger())
            return controller

        if self._load is not None:
            self._wait_for(self._load)  # it was given up, and still does its last step
        self._load = Work("load", do)
        self._load.start()
        self._wait_for(self._load)
        load, self._load = self._load, None
        return load.take_result()

    def _wait_for(self, load: Work[Controller]) -> None:
        """Waits until the load has ended. Gives it up and raises Cancelled if somebody asks for an end."""
        while load.is_alive():
            load.join(LOOK_S)
            self._take_requests()
            asked = [label for request, _ in self._waiting if (label := _ends_configure(request))]
            if why := "the process ends" if self._is_ending() else asked and f"{asked[0]} was requested":
                load.give_up(why)
                raise Cancelled(why)

    @told(TransitionCallbackReturn.FAILURE)
    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Starts the control thread. Fails if an inference of the last activation still runs."""
        if self._thread is not None and self._thread.is_alive():
            raise UserError("an inference of the last activation has not ended yet: restart the node")
        result = super().on_activate(state)
        self._others.begin()
        self._look_around()
        self._controller.start()
        self._reports.budget()
        self._reports.set_active(True)
        self._running = True
        # A daemon thread: an inference that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._control, name="control", daemon=True)
        self._thread.start()
        self.get_logger().info("active")
        return result

    @told(TransitionCallbackReturn.ERROR)
    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Publishes a hold and ends the control thread."""
        self._stop_control()
        return super().on_deactivate(state)

    @told(TransitionCallbackReturn.ERROR)
    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Releases the controller and its memory. The watchdog goes on."""
        self._release()
        return super().on_cleanup(state)

    @told(TransitionCallbackReturn.ERROR)
    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """As deactivate and cleanup, from any state."""
        self._stop_control()
        self._release()
        return super().on_shutdown(state)

    def _answer_every_transition(self) -> None:
        """Answers success = False to a transition that the present state does not have; rclpy would raise."""
        (service,) = (each for each in self.services if each.srv_type is ChangeState)
        change_state = service.callback

        def answer(request: ChangeState.Request, response: ChangeState.Response) -> ChangeState.Response:
            try:
                response = change_state(request, response)
            except Exception as error:
                self.get_logger().error(f"transition {request.transition.id} is refused: {one_line(error)}")
                response.success = False
            self._answer_waiting()
            return response

        service.callback = answer
        self._change_state = service

    def _take_requests(self) -> None:
        """Takes the requests for transitions that have arrived. Only the executor's thread may call it, which
        takes them itself when no transition runs."""
        handle = self._change_state.handle
        with handle:
            while (taken := handle.service_take_request(ChangeState.Request))[1] is not None:
                self._waiting.append(taken)

    def _answer_waiting(self) -> None:
        """Carries out the requests that came during a load, in their order."""
        while self._waiting:
            request, header = self._waiting.popleft()
            if request.transition.id in SHUTDOWNS:
                # Whoever asks during configure cannot know the state that configure ends in.
                request.transition.label = "shutdown"
            response = self._change_state.callback(request, ChangeState.Response())
            self._change_state.send_response(response, header)

    def autostart(self) -> None:
        """Configures and activates the node if the parameter `autostart` is true."""
        if self._value("autostart") and self.trigger_configure() == TransitionCallbackReturn.SUCCESS:
            self.trigger_activate()
        self._answer_waiting()

    def close(self) -> None:
        """Publishes a last hold and releases everything, in any state of the node."""
        self._stop_control()
        self._outputs.wait_until_heard(ACK_S)
        self._watchdog.leave() if self.failed else self._watchdog.close()
        self._others.close()
        self._decoder.close(JOIN_S)
        self._release()

    def hold_and_stop(self, reason: HoldReason) -> None:
        """Publishes a hold at once. Later decisions are discarded. Any thread may call it."""
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
            self._controller.policy.close()
        self._controller = None
        self._reports.close()
        self._outputs.close()
        gc.collect()
        torch = sys.modules.get("torch")  # configure may have failed before the import
        # A load that was given up may still import it.
        if torch and (self._load is None or not self._load.is_alive()):
            torch.cuda.empty_cache()

    # --- control

    def _control(self) -> None:
        """The control thread: one tick per pair of frames and per TICK_S. If it fails, the process ends,
        after a hold."""
        controller = self._controller
        try:
            while self._wait_for_news():
                self._apply_changes()
                self._demand_holds(controller)
                if self._value("control.rehearsal"):
                    controller.gate.clear()
                command = controller.tick(self._now_ns(), lambda times: self._now_ns(), time.monotonic_ns())
                with self._output_lock:
                    if command is not None:
                        self._demand_holds(controller)  # they may have changed during the inference
                        command = controller.confirm(command, self._now_ns(), time.monotonic_ns())
                        if self._running:
                            self._beat()  # before it leaves: the watchdog must not hold in between
                        say = self._publish if self._running else self._reports.thrown_away
                        say(command)
                    # The demand ends, but the hold stays: it is serious, so the controller keeps it.
                    controller.gate.demand_hold(HoldReason.CALLBACK_FAILED, False)
                    if self._running:
                        self._beat()
        except BaseException as error:  # of any kind: without this thread nobody commands the arm
            self._fail(error)

    def _wait_for_news(self) -> bool:
        """Waits until something has arrived, at most TICK_S. Returns whether control goes on."""
        self._wake.wait(self._tick_s)
        self._wake.clear()
        return self._running

    def _fail(self, error: BaseException) -> None:
        """Control has failed: publishes a hold, reports the reason, and makes the main thread end the
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
        """Demands or ends the holds whose reasons only the node can see."""
        gate = controller.gate
        gate.demand_hold(HoldReason.WATCHDOG_LOST, not self._watchdog.is_alive())
        may_begin = controller.has_moved or self._other is not HoldReason.OTHER_PUBLISHER
        gate.demand_hold(HoldReason.OTHER_PUBLISHER, not may_begin)
        gate.demand_hold(HoldReason.OTHER_COMMANDER, self._other is HoldReason.OTHER_COMMANDER)
        gate.demand_hold(HoldReason.COMMANDS_UNHEARD, not self._is_heard)
        gate.demand_hold(HoldReason.NOT_ENABLED, not self._is_enabled())

    def _is_enabled(self) -> bool:
        timeout_s = self._value("control.enable_timeout_s")
        return not timeout_s or (self._enabled and time.monotonic() - self._enabled_at <= timeout_s)

    def _look_around(self) -> None:
        """Checks for other nodes that command the arm, for subscribers, and for the watchdog."""
        other = self._others.found()
        self._other = None if self._value("control.allow_other_commanders") else other
        listeners = self._outputs.listeners() - int(self._others.listens)
        self._is_heard = listeners > 0 or self._value("control.rehearsal")
        self._watchdog.revive()

    def _is_own_command(self, stamp_ns: int) -> bool:
        return stamp_ns in self._outputs.stamps or self._watchdog.has_published(stamp_ns)

    def _beat(self) -> None:
        """Tells the watchdog that the control thread lives, or that it does not command the arm."""
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
        """Applies accepted parameters between two ticks, all of one request together."""
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
        """Publishes a command to the arm, and then reports it."""
        if not command.is_silent:
            self._outputs.publish(command, self._frame_id)
        self._reports.command(command)

    # --- callbacks: they only hand messages over and wake the control thread

    def on_callback_error(self, error: Exception) -> None:
        """A callback has raised an exception, which is a defect: the arm holds until a person clears it."""
        with self._output_lock:
            if self._running:
                self._controller.gate.demand_hold(HoldReason.CALLBACK_FAILED, True)
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
        if frame.is_grey and camera not in self._grey_told:
            self._grey_told.add(camera)
            self.get_logger().warning(f"{self._camera_topics[camera]}: {images.GREY}")
        controller = self._controller
        # Only for a pair: a tick for a single frame would only delay the decoding of the other one.
        if controller is not None and controller.gate.put_frame(camera, frame):
            self._wake.set()

    def _on_bad_image(self, camera: Camera, reason: str) -> None:
        now = time.monotonic()
        # Throttled for each camera by itself: rclpy throttles by line of code.
        if now - self._bad_image_told.get(camera, -THROTTLE_S) >= THROTTLE_S:
            self._bad_image_told[camera] = now
            self.get_logger().error(f"{self._camera_topics[camera]}: {reason}")

    def _on_pose(self, message: PoseStamped) -> None:
        if self._controller is not None:
            self._controller.gate.put_pose(measured_pose(message))

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
        self._instruction = text  # a latched text arrives once, perhaps before configure
        if self._controller is not None:
            self._controller.gate.put_instruction(text)
            self._wake.set()

    def _on_enable(self, message: Bool) -> None:
        released, self._enabled = self._enabled and not message.data, message.data
        self._enabled_at = time.monotonic()
        if released:
            self._hold_at_once(HoldReason.NOT_ENABLED)
        self._wake.set()

    def _on_reset(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        return self._ask(
            response, lambda controller: controller.gate.request_reset(), "the next step starts a new episode"
        )

    def _on_hold(self, request: SetBool.Request, response: SetBool.Response) -> SetBool.Response:
        if request.data or self._controller is not None:
            self._hold_requested = request.data  # kept over a cleanup, like the instruction
        done = "the arm holds" if request.data else "holds that were requested or need a person are lifted"
        answer = self._ask(response, lambda controller: controller.gate.request_hold(request.data), done)
        if request.data:
            self._hold_at_once(HoldReason.REQUESTED)
        else:
            self._outputs.resume()
        return answer

    def _hold_at_once(self, reason: HoldReason) -> None:
        """Publishes a hold. No command that was decided earlier is published after it."""
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
        """Accepts a change, or refuses it with the reason. Nothing is applied here."""
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
            asked.check() if self._controller is None else self._controller.policy.check(asked, names)
        except UserError as error:
            return SetParametersResult(successful=False, reason=str(error))
        except Exception as error:  # after an exception rclpy would not answer
            return SetParametersResult(successful=False, reason=one_line(error))
        return SetParametersResult(successful=True)

    def _is_moving(self) -> bool:
        return self._running and self._controller is not None and not self._controller.holding

    def _apply_parameters(self, changed: list[Parameter]) -> None:
        """Hands accepted values to the control thread, or applies them itself if there is no such thread."""
        for parameter in changed:
            if parameter.name.startswith(("guard.", "inputs.")):
                self.get_logger().warning(f"limit changed: {parameter.name} is {parameter.value} from now on")
        if self._controller is None:
            return  # configure will read them
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


def _ends_configure(request: ChangeState.Request) -> str:
    """The label of a request that ends a configure in progress; empty for another request."""
    label, number = request.transition.label, request.transition.id
    return next((name for name, ids in ENDS_OF_CONFIGURE.items() if label == name or number in ids), "")


def enclave_of(ros_args: list[str]) -> list[str]:
    """The ROS arguments that put another process into the same security enclave; empty if none is named."""
    for option, value in zip(ros_args, ros_args[1:]):
        if option in ("-e", "--enclave"):
            return ["--ros-args", "--enclave", value]
    return []
