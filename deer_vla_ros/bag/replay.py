"""Runs the node's controller on recorded messages, to find what the policy would have done on a recording.

A tick of the controller may give a command. A command with a decision comes from one inference, which is a
step of the policy. There are two ways to replay.

`lockstep`: the controller gets every message at its time of receipt. It ticks as in the node: at every new
pair of frames, new instruction and changed parameter, and at the control rate. An inference takes no time, or
the time from a latency table.

`along_steps`: for each `~/step` message of a live node, the controller gets exactly the inputs that the
message names. `lockstep` cannot guarantee that, and one different frame would change the policy's temporal
state.
"""

from __future__ import annotations

import dataclasses
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
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
from deer_vla_ros.budget.types import AVERAGES
from deer_vla_ros.control.controller import Controller
from deer_vla_ros.control.inputs import InputGate
from deer_vla_ros.control.types import Command
from deer_vla_ros.errors import UserError
from deer_vla_ros.inference.types import StageTimes
from deer_vla_ros.ros.images import GREY
from deer_vla_ros.ros.messages import measured_pose, nanoseconds

Messages = Iterator[tuple[str, Record, Any]]
"""What `input_topics.messages` yields: the node's name of a topic, the record, the decoded message."""
SILENCE_NS = 15_000_000_000
"""After this time without a message all inputs are stale. `lockstep` then makes no ticks, which could only
repeat a hold, until one period before the next message."""
REMEMBERED_NS = 3_000_000_000
"""`along_steps` forgets a message when one of the same topic is received this much later. An inference takes
less time, so the inputs of a step are still known when the step is read."""
LATE_NS, LATE_STEPS = REMEMBERED_NS // 2, 8
"""`along_steps` waits this long [ns], and for this many steps, for a step that was recorded too late."""


@dataclass(frozen=True)
class ReplayMoment:
    """A command of the controller, and when it was given.

    now_ns: time by the controller's clock; after the inference in `lockstep`, at its begin in `along_steps`.
    received_ns: time by the recorder's clock at which the last message so far was received; in `along_steps`
    that is the step message. wall_ms: the time that the tick took on this machine. recorded: the message of
    `~/step` that was repeated; None in `lockstep`. is_comparable: whether the live node decided by the same
    thresholds, as far as the replay can know.
    """

    now_ns: int
    received_ns: int
    command: Command
    wall_ms: float
    recorded: Any = None
    is_comparable: bool = True


@dataclass(frozen=True)
class Arrival:
    """A message for the controller. time_ns: its time by the controller's clock. received_ns: by the
    recorder's.

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
    """Yields one arrival for each recorded message that the node's callbacks would take.

    stamps: gives the controller's time of a message. tally: counts images that cannot be decoded, which are
    left out. Messages before the first known time get that time. If no time becomes known, each gets its time
    of receipt.
    """
    waiting: list[tuple[Record, Callable[[InputGate], bool]]] = []
    for name, record, message in messages:
        put = _put(name, record, message, tally, on_parameters)
        time_ns = stamps.time(record.time_ns, stamp_of(message))
        if put is None:
            continue
        waiting.append((record, put))
        if time_ns:
            yield from (Arrival(time_ns, early.time_ns, put_early) for early, put_early in waiting)
            waiting.clear()
    yield from (Arrival(record.time_ns, record.time_ns, put) for record, put in waiting)


def _put(
    name: str, record: Record, message: Any, tally: Tally, on_parameters: ParameterChange
) -> Callable[[InputGate], bool] | None:
    """Returns a function that hands the message to the gate, and returns whether a tick may have something to
    do. None for a topic that the controller does not read, and for an image that cannot be decoded, which is
    counted."""
    if name in CAMERAS:
        try:
            frame = image(record, message)
        except UserError as error:
            tally.skip(record.topic, str(error))
            return None
        if frame.is_grey:
            tally.note(f"{record.topic}: {GREY}")
        return lambda gate: gate.put_frame(CAMERAS[name], frame)
    if name == POSE:
        pose = measured_pose(message)
        return lambda gate: gate.put_pose(pose) or False  # put_pose returns None; a pose alone needs no tick
    if name == INSTRUCTION:
        return lambda gate: gate.put_instruction(message.data) or True  # an instruction always needs one
    if name == PARAMETERS:
        return lambda gate: on_parameters(message)
    return None


def lockstep(
    controller: Controller, coming: Iterator[Arrival], inference_takes_time: bool
) -> Iterator[ReplayMoment]:
    """Yields each command that the controller gives while the recording plays.

    coming: the recording's messages, from `arrivals`. inference_takes_time: whether the clock moves during an
    inference, by the time that the step reports. Messages that arrive meanwhile are handed over at once, as
    in the node, and the next step uses their frames.
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
        # At the beginning, and when the time went back by more than 10 periods, ticks begin at the next
        # message.
        if due_ns is None or clock.next.time_ns < due_ns - 10 * period_ns:
            due_ns = clock.next.time_ns
        if due_ns - clock.heard_ns > SILENCE_NS:
            due_ns = max(due_ns, clock.next.time_ns - period_ns)
        if clock.next.time_ns > due_ns:
            if due_ns >= clock.now_ns:  # A tick that was due during an inference is left out.
                clock.now_ns, clock.woken = due_ns, True
            due_ns += period_ns
        else:
            clock.take(controller)
        while clock.woken:
            clock.woken = False
            controller.gate.clear()  # No person can clear a serious hold here, so none of them lasts.
            began = time.perf_counter()
            command = controller.tick(clock.now_ns, finished)
            if command is not None:
                yield ReplayMoment(
                    clock.now_ns, clock.received_ns, command, (time.perf_counter() - began) * 1e3
                )


class _Clock:
    """The controller's clock, and the next message that the controller has not got yet.

    heard_ns: the controller's time of the last message. received_ns: the recorder's time of the last message.
    woken: whether a tick may have something to do.
    """

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
        """Moves the time forwards, and hands over the messages that arrive meanwhile. It hands over
        none after a message whose time goes back."""
        until = self.now_ns + duration_ns
        while self.next is not None and self.now_ns <= self.next.time_ns <= until:
            self.take(controller)
        self.now_ns = until


@dataclass
class Followed:
    """What a replay along recorded steps could not compare.

    not_repeated: steps whose inputs, or the policy's memory in them, are not known. own_rule: steps that were
    repeated, but not compared, because their thresholds depend on what is not known. recorded_rule: steps
    that were repeated with the recorded exits and thresholds for that reason, and compared. before: number of
    steps before the first recorded one. gaps: numbers of the first and the last step of each gap.
    """

    not_repeated: int = 0
    own_rule: int = 0
    recorded_rule: int = 0
    before: int = 0
    gaps: list[tuple[int, int]] = field(default_factory=list)

    @property
    def unknown(self) -> int:
        """How many recorded steps were not compared."""
        return self.not_repeated + self.own_rule

    def lines(self) -> list[str]:
        """Lines for the person who reads the result."""
        lines = []
        if self.before:
            lines.append(f"{self.before} steps before the recording are not known")
        if self.gaps:
            lost = sum(last - first + 1 for first, last in self.gaps)
            names = [f"step {a}" if a == b else f"steps {a} to {b}" for a, b in self.gaps[:NAMED_GAPS]]
            more = [f"{len(self.gaps) - NAMED_GAPS} more gaps"] if len(self.gaps) > NAMED_GAPS else []
            lines.append(
                f"{', '.join([*names, *more])} {'is' if lost == 1 else 'are'} missing in the recording "
                f"or more than {LATE_NS / 1e9:g} s late there ({lost} in all): "
                "what follows in the same episode is unknown"
            )
        depend = (
            "thresholds of this budget depend on measured times, or on the cost of steps that are not known"
        )
        if self.recorded_rule:
            lines.append(f"{self.recorded_rule} steps were repeated with the recorded thresholds: {depend}")
        if self.own_rule:
            lines.append(f"{self.own_rule} steps were repeated, but not compared: {depend}")
        return lines


NAMED_GAPS = 5
"""This many gaps are named in a note."""


def along_steps(
    controller: Controller,
    messages: Messages,
    tally: Tally,
    on_parameters: ParameterChange,
    followed: Followed,
    is_own_budget: bool,
) -> Iterator[ReplayMoment]:
    """Repeats the recorded steps, each on the inputs that it names, and yields their commands.

    A step is left out, and counted in `tally`, if one of its inputs is not in the recording or cannot be
    decoded, or if the controller gives no command on them. After it, after a gap in the steps' numbers, and
    at the beginning of a recording, all steps are left out until an episode begins, because the policy's
    temporal state is not known. `followed` says how many were left out.

    The governor of an average budget, or measured times, make thresholds depend on all earlier steps. Once a
    step was not repeated, the replay takes the exits and thresholds that each `~/step` message names, until
    the budget changes. With is_own_budget, the budget is not the live node's: the replay then keeps its own
    thresholds, and these steps are not comparable.

    A live node applies a parameter event some time after it was sent. A change of the budget is applied just
    before the first step whose budget id shows that the live node had applied it, or had another reason for a
    new id (new latencies, other layers on the device).
    """
    budget = _FollowedBudget(controller, on_parameters, is_own_budget)
    recent: dict[str, OrderedDict[int, tuple[Record, Any]]] = {
        name: OrderedDict() for name in (STATIC, GRIPPER, POSE)
    }
    is_known = False
    newest_step: int | None = None
    controller.start()
    for name, record, message in _in_order(messages):
        if name in recent:
            past = recent[name]
            # The message is decoded, so its bytes are not needed again.
            past[stamp_of(message)] = dataclasses.replace(record, data=b""), message
            while next(iter(past.values()))[0].time_ns < record.time_ns - REMEMBERED_NS:
                past.popitem(last=False)
        elif name == PARAMETERS:
            budget.hear(message)
        elif name == STEPS:
            expected = 0 if newest_step is None else newest_step + 1
            if message.step == newest_step:
                tally.skip(record.topic, "recorded twice")
                continue
            if newest_step is None:
                followed.before = message.step
            elif message.step > expected:
                followed.gaps.append((expected, message.step - 1))
            if message.step != expected:  # a lower number comes from a node that was started again
                budget.lose()
                is_known = False
            newest_step = message.step
            budget.before(message)
            is_known = is_known or message.episode_step == 0
            try:
                if not is_known:
                    raise _Missing(
                        "its episode began before the recording, or lacks steps or inputs: its memory is not "
                        "known"
                    )
                moment = _again(controller, record, message, recent, tally)
            except _Missing as missing:
                tally.skip(record.topic, str(missing))
                followed.not_repeated += 1
                is_known = False
                budget.skip()
                continue
            budget.after(moment)
            followed.recorded_rule += controller.policy.given_rule is not None
            followed.own_rule += not budget.is_comparable
            yield dataclasses.replace(moment, is_comparable=budget.is_comparable)


def _in_order(messages: Messages) -> Messages:
    """Yields the messages, with their steps in order.

    A step whose predecessor is not there waits for it (see LATE_NS), and so do the steps and parameter events
    after it. Inputs do not wait: `along_steps` only remembers them.
    """
    waiting: list[tuple[str, Record, Any]] = []
    expected = 0
    for each in messages:
        if each[0] in (STEPS, PARAMETERS):
            waiting.append(each)
            _sort(waiting)
        while waiting:
            name, record, message = waiting[0]
            if name == STEPS:
                is_over = each[1].time_ns > record.time_ns + LATE_NS or len(_steps(waiting)) > LATE_STEPS
                if message.step > expected and not is_over:
                    break
                expected = message.step + 1
            yield waiting.pop(0)
        if each[0] not in (STEPS, PARAMETERS):
            yield each
    yield from waiting


def _steps(waiting: list[tuple[str, Record, Any]]) -> list[int]:
    return [place for place, (name, _, _) in enumerate(waiting) if name == STEPS]


def _sort(waiting: list[tuple[str, Record, Any]]) -> None:
    """Moves the last step to its place among the others, which are sorted. It comes before a step with a
    higher number and a later stamp: after a restart of the node only the numbers are lower, and after a clock
    was set back only the stamps are earlier."""
    places = _steps(waiting)
    for before, last in reversed(list(pairwise(places))):
        first, second = waiting[before][2], waiting[last][2]
        if not (0 < first.step - second.step <= LATE_STEPS and stamp_of(first) > stamp_of(second)):
            break
        waiting[before], waiting[last] = waiting[last], waiting[before]


class _FollowedBudget:
    """Finds the step at which a recorded change of the budget takes effect, from the budget ids.

    It also tells the policy to take recorded exits and thresholds while those of the live node's budget are
    not known. is_comparable: whether the next step has the live node's thresholds, as far as is known.
    """

    def __init__(self, controller: Controller, apply: ParameterChange, is_own_budget: bool):
        self._controller, self._apply, self._is_own_budget = controller, apply, is_own_budget
        self.is_comparable = True
        self._waiting: list[Any] = []
        # The live node's budget id minus the replay's; None until the first decision, and after a gap.
        self._ahead: int | None = None
        self._is_known = True  # whether the replay has repeated all steps since the budget began

    def hear(self, event: Any) -> None:
        """Keeps an event that changes the budget, and applies any other one at once."""
        if any(each.name.startswith("budget.") for each in event.changed_parameters):
            self._waiting.append(event)
        else:  # It does not change the budget id, so its step cannot be found.
            self._apply(event)

    def skip(self) -> None:
        """A step was not repeated."""
        self._is_known = False

    def lose(self) -> None:
        """Steps are not in the recording. Meanwhile there may have been new budget ids."""
        self._is_known, self._ahead = False, None

    def before(self, step: Any) -> None:
        """Applies the events that the live node had applied before this step. Where the ids cannot be
        compared, all events that wait are applied."""
        policy = self._controller.policy
        while self._waiting and (self._ahead is None or step.budget_id - self._ahead > self._coming_id(step)):
            # A budget begins anew. Where the ids cannot be compared, some of its steps may be in a gap.
            if self._apply(self._waiting.pop(0)) and self._ahead is not None:
                self._is_known = True
        budget = policy.status.requested
        needs_times = budget.average_ms or budget.deadline_ms
        needs_costs = budget.governor and budget.active(AVERAGES)
        is_rule_known = not needs_times and (self._is_known or not needs_costs)
        self.is_comparable = is_rule_known or not self._is_own_budget
        recorded = tuple(map(int, step.exit_layers)), tuple(map(float, step.thresholds))
        policy.given_rule = None if is_rule_known or self._is_own_budget else recorded

    def after(self, moment: ReplayMoment) -> None:
        """Learns from a decision how the budget ids of live node and replay differ, if that is not known."""
        if self._ahead is None and moment.command.decision is not None:
            self._ahead = moment.recorded.budget_id - moment.command.decision.budget_id

    def _coming_id(self, step: Any) -> int:
        """Returns the budget id that the replay would have in this step if no event were applied. Another
        number of tokens makes a new rule, so it raises the id by 1."""
        policy = self._controller.policy
        return policy.budget_id + int(step.tokens != policy.status.tokens)


class _Missing(Exception):
    """A recorded step cannot be repeated. The text says why."""


def _again(
    controller: Controller,
    record: Record,
    step: Any,
    recent: Mapping[str, OrderedDict[int, tuple[Record, Any]]],
    tally: Tally,
) -> ReplayMoment:
    """Repeats one recorded step. Raises _Missing if an input is not among `recent` or cannot be decoded, and
    if the controller gives no command."""
    named = {GRIPPER: step.gripper_stamp, STATIC: step.static_stamp, POSE: step.pose_stamp}
    found = {name: recent[name].get(nanoseconds(stamp)) for name, stamp in named.items()}
    for name, pair in found.items():
        put = _put(name, *pair, tally, _no_parameters) if pair else None
        if put is None:
            raise _Missing(f"{name} of step {step.step} is not in the recording, or cannot be decoded")
        put(controller.gate)
    controller.gate.put_instruction(step.instruction)
    if step.episode_step == 0:
        controller.gate.request_reset()
    published_ns = nanoseconds(step.header.stamp) + round(step.stamp_to_publish_ms * 1e6)

    def finished(times: StageTimes) -> int:
        # The live node used the last pose that it had received when it published.
        poses = [pose for received, pose in recent[POSE].values() if received.time_ns <= record.time_ns]
        if poses:
            controller.gate.put_pose(measured_pose(poses[-1]))
        return published_ns

    now_ns = nanoseconds(step.static_stamp) + round(step.static_age_ms * 1e6)
    controller.gate.clear()  # The live node made this step, so no serious hold lasted.
    began = time.perf_counter()
    command = controller.tick(now_ns, finished)
    wall_ms = (time.perf_counter() - began) * 1e3
    if command is None:
        raise _Missing(
            f"the controller gives no command on the inputs of step {step.step}: one is not in the recording"
        )
    return ReplayMoment(now_ns, record.time_ns, command, wall_ms, recorded=step)


def _no_parameters(event: Any) -> bool:
    return False
