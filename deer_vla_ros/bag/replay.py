"""Runs the node's controller on recorded messages and bag time: what the policy would have done on a
recording.

There are two ways. In lock step: the controller gets every message at its time of receipt, and ticks as in
the node, at every new pair of frames and at the control rate. An inference takes no time, or the time from a
latency table. Along recorded steps: the controller gets exactly the inputs that a live node's `~/step`
messages name, because one dropped frame changes the temporal state.
"""

from __future__ import annotations

import dataclasses
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from deer_vla_ros.bag.input_topics import (
    CAMERAS,
    GRIPPER,
    INSTRUCTION,
    PARAMETERS,
    POSE,
    STATIC,
    STEPS,
    Stamps,
    Tally,
    image,
    stamp_of,
)
from deer_vla_ros.bag.recording import Record
from deer_vla_ros.control.controller import Controller
from deer_vla_ros.control.inputs import InputGate
from deer_vla_ros.control.types import Command
from deer_vla_ros.errors import UserError
from deer_vla_ros.inference.types import StageTimes
from deer_vla_ros.ros.messages import measured_pose, nanoseconds

Messages = Iterator[tuple[str, Record, Any]]
"""What `input_topics.messages` yields: the node's name of a topic, the record, the decoded message."""
SILENCE_NS = 15_000_000_000
"""After this time without a message all inputs are stale, and the controller could only repeat a hold."""
REMEMBERED_NS = 3_000_000_000
"""How long before a recorded step its inputs may have been received. An inference takes less."""


@dataclass(frozen=True)
class ReplayMoment:
    """A command of the controller.

    now_ns: the controller's time. received_ns: when the newest message so far was received. wall_ms: what the
    tick really took. recorded: the live node's step that was followed, None in lock step.
    """

    now_ns: int
    received_ns: int
    command: Command
    wall_ms: float
    recorded: Any = None


@dataclass(frozen=True)
class Arrival:
    """A message for the controller. time_ns: by the controller's clock. received_ns: by the recorder's clock.

    put: hands the message over, and returns whether a tick may have something to do.
    """

    time_ns: int
    received_ns: int
    put: Callable[[InputGate], bool]


ParameterChange = Callable[[Any], bool]
"""Applies a parameter event, and returns whether it changed anything."""


def arrivals(
    messages: Messages, stamps: Stamps, tally: Tally, on_parameters: ParameterChange
) -> Iterator[Arrival]:
    """Recorded messages as the node's callbacks take them. Undecodable images are counted and left out.

    Messages that come before the time is known arrive as soon as it is known.
    """
    waiting: list[tuple[Record, Callable[[InputGate], bool]]] = []
    for name, record, message in messages:
        put, time_ns = (
            _put(name, record, message, tally, on_parameters),
            stamps.time(record.time_ns, stamp_of(message)),
        )
        if put is None:
            continue
        waiting.append((record, put))
        if time_ns:
            yield from (Arrival(time_ns, each.time_ns, its) for each, its in waiting)
            waiting.clear()
    yield from (Arrival(record.time_ns, record.time_ns, put) for record, put in waiting)


def _put(
    name: str, record: Record, message: Any, tally: Tally, on_parameters: ParameterChange
) -> Callable[[InputGate], bool] | None:
    if name in CAMERAS:
        try:
            frame = image(record, message)
        except UserError as error:
            tally.skip(record.topic, str(error))
            return None
        return lambda gate: gate.put_frame(CAMERAS[name], frame)
    if name == POSE:
        pose = measured_pose(message)
        return lambda gate: gate.put_pose(pose) or False
    if name == INSTRUCTION:
        return lambda gate: gate.put_instruction(message.data) or True
    if name == PARAMETERS:
        return lambda gate: on_parameters(message)
    return None


def lockstep(
    controller: Controller, coming: Iterator[Arrival], inference_takes_time: bool
) -> Iterator[ReplayMoment]:
    """Every command of the controller while the recording plays.

    inference_takes_time: an inference takes the time that its step reports. Messages that arrive meanwhile
    wait, and the newest ones are used next, as in the node.
    """
    clock = _Clock(coming)

    def finished(times: StageTimes) -> int:
        if inference_takes_time:
            clock.advance(round(times.total * 1e6), controller)
        return clock.now_ns

    controller.start()
    period_ns = round(1e9 / controller.settings.rate_hz)
    due_ns = None
    while clock.next is not None:
        if due_ns is None or clock.next.time_ns < due_ns - 10 * period_ns:  # the beginning, or time went back
            due_ns = clock.next.time_ns
        if due_ns - clock.heard_ns > SILENCE_NS:
            due_ns = max(due_ns, clock.next.time_ns - period_ns)
        if clock.next.time_ns > due_ns:
            if due_ns >= clock.now_ns:  # otherwise an inference was running at that time
                clock.now_ns, clock.woken = due_ns, True
            due_ns += period_ns
        else:
            clock.take(controller)
        while clock.woken:
            clock.woken = False
            controller.gate.clear()  # no person clears a serious hold here: it would never end
            began = time.perf_counter()
            command = controller.tick(clock.now_ns, finished)
            if command is not None:
                yield ReplayMoment(
                    clock.now_ns, clock.received_ns, command, (time.perf_counter() - began) * 1e3
                )


class _Clock:
    """Bag time, and the messages that have arrived until then."""

    def __init__(self, coming: Iterator[Arrival]):
        self._coming = coming
        self.next = next(coming, None)
        self.now_ns = self.heard_ns = self.received_ns = 0
        self.woken = False

    def take(self, controller: Controller) -> None:
        """Hands over the next message, and moves the time to it, forwards or back."""
        self.now_ns = self.heard_ns = self.next.time_ns
        self.received_ns = self.next.received_ns
        self.woken = self.next.put(controller.gate) or self.woken
        self.next = next(self._coming, None)

    def advance(self, duration_ns: int, controller: Controller) -> None:
        """Moves the time forwards, and hands over the messages that arrive meanwhile."""
        until = self.now_ns + duration_ns
        while self.next is not None and self.now_ns <= self.next.time_ns <= until:
            self.take(controller)
        self.now_ns = until


def along_steps(
    controller: Controller, messages: Messages, tally: Tally, on_parameters: ParameterChange
) -> Iterator[ReplayMoment]:
    """Repeats the recorded steps, each on the inputs that it names.

    A step is counted and left out if the recording lacks one of its inputs, or the step itself. The steps
    after it are left out, too, until an episode begins, because the temporal state is not known. A live node
    applies a parameter event some time after it was sent: here, at the step whose budget id shows it.
    """
    budget = _FollowedBudget(controller, on_parameters)
    recent: dict[str, OrderedDict[int, tuple[Record, Any]]] = {
        name: OrderedDict() for name in (STATIC, GRIPPER, POSE)
    }
    is_known = False
    newest_step: int | None = None
    controller.start()
    for name, record, message in messages:
        if name in recent:
            past = recent[name]
            # The message is decoded, so its bytes are not needed again.
            past[stamp_of(message)] = dataclasses.replace(record, data=b""), message
            while next(iter(past.values()))[0].time_ns < record.time_ns - REMEMBERED_NS:
                past.popitem(last=False)
        elif name == PARAMETERS:
            budget.hear(message)
        elif name == STEPS:
            budget.before(message)
            if newest_step is None and message.step:
                tally.skip(
                    record.topic,
                    f"{message.step} steps before the recording: an average budget's governor remembers "
                    "their cost, so thresholds may differ",
                )
            if newest_step is not None and message.step > newest_step + 1:
                tally.skip(
                    record.topic,
                    f"steps {newest_step + 1} to {message.step - 1} are missing in the recording: the memory "
                    "after them is "
                    "unknown until an episode begins, and an average budget's governor does not know their "
                    "cost",
                )
                is_known = False
            newest_step = message.step
            is_known = is_known or message.episode_step == 0
            if not is_known:
                tally.skip(
                    record.topic,
                    "the episode began before the recording, or lacks inputs: its memory is not known",
                )
                continue
            try:
                moment = _again(controller, record, message, recent, tally)
                budget.after(moment)
                yield moment
            except _Missing as missing:
                tally.skip(record.topic, f"{missing} is not in the recording, or cannot be decoded")
                is_known = False


class _FollowedBudget:
    """Finds the step at which a recorded change of the budget takes effect, from the budget ids."""

    def __init__(self, controller: Controller, apply: ParameterChange):
        self._controller, self._apply = controller, apply
        self._waiting: list[Any] = []
        self._ahead: int | None = None  # by how much the live node's id is ahead of the replay's

    def hear(self, event: Any) -> None:
        """Keeps an event that changes the budget, and applies any other one at once."""
        if any(each.name.startswith("budget.") for each in event.changed_parameters):
            self._waiting.append(event)
        else:  # the budget id does not change
            self._apply(event)

    def before(self, step: Any) -> None:
        """Applies the events that the live node had applied before this step."""
        while self._waiting and (self._ahead is None or step.budget_id - self._ahead > self._coming_id(step)):
            self._apply(self._waiting.pop(0))

    def after(self, moment: ReplayMoment) -> None:
        """Learns from the first decision how the budget ids of live node and replay differ."""
        if self._ahead is None and moment.command.decision is not None:
            self._ahead = moment.recorded.budget_id - moment.command.decision.budget_id

    def _coming_id(self, step: Any) -> int:
        """The replay's budget id in this step without any event: another number of tokens makes a new
        rule."""
        policy = self._controller.policy
        return policy.budget_id + int(step.tokens != policy.status.tokens)


class _Missing(Exception):
    """An input that a recorded step names is missing."""


def _again(
    controller: Controller,
    record: Record,
    step: Any,
    recent: Mapping[str, OrderedDict[int, tuple[Record, Any]]],
    tally: Tally,
) -> ReplayMoment:
    """Repeats one recorded step. Raises _Missing."""
    named = {GRIPPER: step.gripper_stamp, STATIC: step.static_stamp, POSE: step.pose_stamp}
    found = {name: recent[name].get(nanoseconds(stamp)) for name, stamp in named.items()}
    for name, one in found.items():
        put = _put(name, *one, tally, _no_parameters) if one else None
        if put is None:
            raise _Missing(f"{name} of step {step.step}")
        put(controller.gate)
    controller.gate.put_instruction(step.instruction)
    if step.episode_step == 0:
        controller.gate.request_reset()
    published_ns = nanoseconds(step.header.stamp) + round(step.stamp_to_publish_ms * 1e6)

    def finished(times: StageTimes) -> int:
        newest = [message for its, message in recent[POSE].values() if its.time_ns <= record.time_ns]
        if newest:
            controller.gate.put_pose(measured_pose(newest[-1]))
        return published_ns

    now_ns = nanoseconds(step.static_stamp) + round(step.static_age_ms * 1e6)
    controller.gate.clear()  # the live node moved, so a person had cleared its holds
    began = time.perf_counter()
    command = controller.tick(now_ns, finished)
    wall_ms = (time.perf_counter() - began) * 1e3
    if command is None:
        raise _Missing(f"what made the live node step on {GRIPPER} and {STATIC} in step {step.step}")
    return ReplayMoment(now_ns, record.time_ns, command, wall_ms, recorded=step)


def _no_parameters(event: Any) -> bool:
    return False
