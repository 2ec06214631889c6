"""One replay: a recording and a set of parameters in; tables and a recording of the policy's commands out."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from deer_vla_ros.bag.cdr import from_cdr, to_cdr
from deer_vla_ros.bag.input_topics import (
    GRIPPER_COMMAND,
    INSTRUCTION,
    PARAMETERS,
    STATIC,
    STEPS,
    TARGET,
    Stamps,
    Tally,
    find_topics,
    image,
    messages,
    node_of,
)
from deer_vla_ros.bag.parameter_events import ParameterEvents, check_clock
from deer_vla_ros.bag.recording import Record, Recording
from deer_vla_ros.bag.replay import Followed, Messages, ReplayMoment, along_steps, arrivals, lockstep
from deer_vla_ros.bag.rows import AGES, DECIDED, STEP_TYPE, Row, RowDifference, difference, row_of
from deer_vla_ros.bag.writing import RunFolder
from deer_vla_ros.budget.latency import LatencyTable
from deer_vla_ros.control.controller import Controller
from deer_vla_ros.control.types import HoldReason
from deer_vla_ros.errors import UserError
from deer_vla_ros.ros import parameters
from deer_vla_ros.ros.conversions import step_message
from deer_vla_ros.ros.loading import warm_controller
from deer_vla_ros.ros.messages import measured_pose, nanoseconds

THUMBNAILS = 8
FOLLOWED = tuple(
    name for name in DECIDED if name not in (*AGES, "step", "episode", "budget_id", "verdict", "reasons")
)
"""The fields that a replay along recorded steps has to decide as the live node did. The others are numbers
that count from the node's start, ages, which the controller's clock rounds, and the guard's verdict, which
depends on poses that came during the live node's inference."""


@dataclass(frozen=True)
class Request:
    """What is replayed, and how.

    given: value of every parameter of the node. topics: recorded topics by the node's names. clock: one of
    input_topics.CLOCKS. start_s: from the beginning of the recording. duration_s: None: to its end.
    instruction: replaces the recorded ones. follow: along recorded steps. keep: prefixes of the parameters on
    which recorded changes have no effect. latencies: give the time of an inference. with_inputs: copy the
    inputs to the output. node: full name of the policy node, whose parameter events and `~/step` count;
    empty: see `input_topics.node_of`.
    """

    bag: Path
    given: dict[str, Any]
    topics: Mapping[str, str] = field(default_factory=dict)
    clock: str = "receive"
    start_s: float = 0.0
    duration_s: float | None = None
    instruction: str | None = None
    follow: bool = False
    keep: tuple[str, ...] = ()
    latencies: LatencyTable | None = None
    with_inputs: bool = True
    node: str = ""


@dataclass(frozen=True)
class Step:
    """What a report needs of one decision. stamp [ns]. seconds: receipt, from the start of the replayed part.

    exit_layer: counted from 0. action: (6,), the six pose values. target: position [m], quaternion. held_for:
    why the arm was held in place of this motion; empty if it was not.
    """

    stamp: int
    seconds: float
    exit_layer: int
    language_gmac: float
    language_gmac_full: float
    total_gmac: float
    wall_ms: float
    action: np.ndarray
    target: tuple[np.ndarray, np.ndarray] | None
    held_for: tuple[HoldReason, ...]
    instruction: str


@dataclass
class Result:
    """The outcome of one replay. Times are from the start of the replayed part [s].

    holds: (start, reasons). thumbnails: (time, (H, W, 3) image) of the static camera. recorded_targets:
    position and quaternion by stamp [ns], as they were recorded. followed, differences: what could not be
    compared with the recorded steps, and what was decided otherwise, if they were followed.
    """

    label: str
    steps: list[Step] = field(default_factory=list)
    holds: list[tuple[float, tuple[HoldReason, ...]]] = field(default_factory=list)
    thumbnails: list[tuple[float, np.ndarray]] = field(default_factory=list)
    recorded_targets: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    tally: Tally = field(default_factory=Tally)
    notes: list[str] = field(default_factory=list)
    followed: Followed | None = None
    differences: list[RowDifference] = field(default_factory=list)
    seconds: float = 0.0
    wall_s: float = 0.0
    exits: tuple[int, ...] = ()
    dropped: int = 0
    parameter_events: int = 0

    @property
    def same(self) -> int:
        """How many recorded steps were decided in the same way, if they were followed."""
        return len(self.steps) - self.followed.own_rule - len(self.differences)

    @property
    def hold_reasons(self) -> Counter[str]:
        """How often a hold began, by reason."""
        return Counter(reason.name for _, reasons in self.holds for reason in reasons)


def run(
    request: Request,
    label: str,
    folder: Path | None = None,
    on_row: Callable[[Row], None] = lambda row: None,
    on_progress: Callable[[float, float], None] = lambda seconds, of: None,
) -> Result:
    """Replays a recording. folder: where to write steps.csv, timings.csv, holds.csv and bag/; a new one.

    on_row: called with the DECIDED fields of every decision. on_progress: called with the seconds that are
    done, and their total. Raises UserError for a recording that cannot be replayed, or that leads to no step.
    """
    check_clock(request.given, request.latencies is not None)
    with contextlib.ExitStack() as stack:
        recording = stack.enter_context(Recording(request.bag))
        result = Result(label)
        read = topics_read(request.instruction, request.follow)
        topics = find_topics(recording, request.topics, read, result.tally, request.node)
        if request.follow and STEPS not in topics:
            raise UserError(
                f"{request.bag} has no topic {STEPS} to follow: record ~/step too, name it with --topic "
                f"{STEPS}:=TOPIC, or replay without --follow"
            )
        if INSTRUCTION in read and INSTRUCTION not in topics:
            raise UserError(
                f"{request.bag} has no topic {INSTRUCTION}: name one with --topic {INSTRUCTION}:=TOPIC, "
                "or say what to do with --instruction"
            )
        node = request.node or node_of(topics)
        window = _window(request, recording)
        # Along recorded steps, the measured pose is the live arm's. Only holds between steps are unknown.
        feedback = {"guard.follow_timeout_s": 0.0} if request.follow else parameters.NO_FEEDBACK
        controller = warm_controller(request.given | feedback, logging.getLogger(__name__), request.latencies)
        stack.callback(controller.policy.close)
        result.seconds = (window[1] - window[0]) / 1e9
        files = (
            stack.enter_context(RunFolder(folder, recording, result.tally, request.with_inputs))
            if folder
            else None
        )
        events = ParameterEvents(request.given, node, request.keep, request.latencies is not None)
        replaying = _Replaying(request, recording, topics, window, controller, events, files, result)
        replaying.finish(on_row, on_progress)
        return result


def topics_read(instruction: str | None, follow: bool) -> tuple[str, ...]:
    """The topics that a replay reads besides NEEDED, by the node's names. Arguments: as in `Request`."""
    if follow:
        return (STEPS,)
    return (INSTRUCTION,) if instruction is None else ()


def _window(request: Request, recording: Recording) -> tuple[int, int]:
    """The first and the last time of receipt of the replayed part [ns]."""
    start_ns, stop_ns = recording.start_ns + round(request.start_s * 1e9), recording.end_ns
    if start_ns >= stop_ns:
        raise UserError(
            f"--start is {request.start_s:g} s, "
            f"but {request.bag} is {(stop_ns - recording.start_ns) / 1e9:.1f} s long"
        )
    if request.duration_s is not None:
        stop_ns = min(stop_ns, start_ns + round(request.duration_s * 1e9))
    return start_ns, stop_ns


class _Replaying:
    """A replay in progress."""

    def __init__(
        self,
        request: Request,
        recording: Recording,
        topics: dict[str, str],
        window: tuple[int, int],
        controller: Controller,
        events: ParameterEvents,
        files: RunFolder | None,
        result: Result,
    ):
        self._request, self._recording, self._window = request, recording, window
        self._controller, self._events = controller, events
        self._files, self._result = files, result
        unused = {GRIPPER_COMMAND} if request.follow else {GRIPPER_COMMAND, STEPS}
        self._topics = {name: topic for name, topic in topics.items() if name not in unused}
        self._held: tuple[HoldReason, ...] = ()
        self._next_thumbnail = 0

    def finish(self, on_row: Callable[[Row], None], on_progress: Callable[[float, float], None]) -> None:
        """Replays from the first message to the last. Raises UserError if the controller took no step."""
        began, result = time.perf_counter(), self._result
        for moment in self._moments(on_progress):
            self._take(moment, on_row)
        if not result.steps:
            held = (
                ", ".join(f"{reason} ({HoldReason[reason].value})" for reason in result.hold_reasons)
                or "nothing arrived"
            )
            left_out = "; ".join([*result.tally.lines(), *self._events.notes()])
            raise UserError(
                f"{self._request.bag}: no step was taken: {held}{'; ' + left_out if left_out else ''}"
            )
        result.wall_s = time.perf_counter() - began
        result.dropped = self._controller.gate.snapshot().dropped
        result.parameter_events = self._events.applied
        result.notes += [*(result.followed.lines() if result.followed else ()), *self._events.notes()]

    def _moments(self, on_progress: Callable[[float, float], None]) -> Iterator[ReplayMoment]:
        request = self._request
        apply = functools.partial(self._events.apply, self._controller)
        self._obey_earlier_changes()
        heard = self._heard(on_progress)
        if request.follow:
            self._result.followed = followed = Followed()
            is_own_budget = "budget." in request.keep
            return along_steps(self._controller, heard, self._result.tally, apply, followed, is_own_budget)
        self._controller.gate.put_instruction(self._first_instruction())
        stamps = Stamps(request.clock, request.bag)
        coming = arrivals(heard, stamps, self._result.tally, apply)
        return lockstep(self._controller, coming, inference_takes_time=request.latencies is not None)

    def _first_instruction(self) -> str:
        """The given instruction, or the last one before the replayed part, because instructions are
        latched."""
        if self._request.instruction is not None:
            return self._request.instruction
        topics = {INSTRUCTION: self._topics[INSTRUCTION]}
        before = [
            message.data
            for _, _, message in messages(self._recording, topics, Tally(), (None, self._window[0]))
        ]
        return before[-1] if before else ""

    def _obey_earlier_changes(self) -> None:
        """Applies the changes of parameters from before the replayed part."""
        topics = {name: topic for name, topic in self._topics.items() if name == PARAMETERS}
        for _, _, message in messages(self._recording, topics, Tally(), (None, self._window[0])):
            self._events.apply(self._controller, message)

    def _heard(self, on_progress: Callable[[float, float], None]) -> Messages:
        """Yields the messages of the inputs, copies them to the output, and collects what a report needs."""
        copy = self._files.copy if self._files else None
        for name, record, message in messages(
            self._recording, self._topics, self._result.tally, self._window, copy
        ):
            if name == STATIC:
                seconds = self._seconds(record.time_ns)
                on_progress(seconds, self._result.seconds)
                place = int(THUMBNAILS * seconds / self._result.seconds)
                if place >= self._next_thumbnail:
                    self._next_thumbnail = place + 1
                    self._thumbnail(record, message)
            if name == TARGET:
                pose = measured_pose(message)
                self._result.recorded_targets[pose.stamp_ns] = pose.pose.position, pose.pose.quaternion
            yield name, record, message

    def _thumbnail(self, record: Record, message: Any) -> None:
        with contextlib.suppress(UserError):  # `arrivals` counts an image that cannot be decoded
            self._result.thumbnails.append(
                (self._seconds(record.time_ns), image(record, message).image[::2, ::2].copy())
            )

    def _seconds(self, received_ns: int) -> float:
        return (received_ns - self._window[0]) / 1e9

    def _take(self, moment: ReplayMoment, on_row: Callable[[Row], None]) -> None:
        """Adds a command of the controller to the result and the output."""
        command, seconds = moment.command, self._seconds(moment.received_ns)
        if command.error:
            raise UserError(
                f"{self._request.bag}: the inference failed {seconds:.3f} s from the start: {command.error}"
            )
        step = self._enter(moment, seconds, on_row) if command.decision is not None else None
        if command.holds and command.holds != self._held:
            self._result.holds.append((seconds, command.holds))
            if self._files:
                self._files.held(moment.now_ns, command.holds)
        self._held = command.holds
        if self._files:
            self._files.said(command, step, self._controller.action_space.frame, moment.received_ns)

    def _enter(self, moment: ReplayMoment, seconds: float, on_row: Callable[[Row], None]) -> bytes:
        """Adds a decision, and returns its `~/step` message as CDR bytes."""
        command, result, decision = moment.command, self._result, moment.command.decision
        data = to_cdr(step_message(decision, self._controller.action_space.frame, _published(moment)))
        row = row_of(from_cdr(data, STEP_TYPE))
        if moment.recorded is not None and moment.is_comparable:
            if found := difference(len(result.steps), row, row_of(moment.recorded), 0.0, FOLLOWED):
                result.differences.append(found)
        on_row({name: row[name] for name in DECIDED})
        if self._files:
            self._files.decided(row, moment.wall_ms)
        result.exits = decision.policy.exits
        result.steps.append(
            Step(
                stamp=decision.stamp_ns,
                seconds=seconds,
                exit_layer=decision.policy.exit_layer,
                language_gmac=decision.cost.language_gmac,
                language_gmac_full=decision.cost.language_gmac_full,
                total_gmac=decision.cost.total_gmac,
                wall_ms=moment.wall_ms,
                action=decision.policy.action.pose,
                target=None
                if command.target is None
                else (command.target.position, command.target.quaternion),
                held_for=tuple(decision.held),
                instruction=decision.instruction,
            )
        )
        return data


def _published(moment: ReplayMoment) -> int:
    """When the command was published [ns, bag time]."""
    recorded = moment.recorded
    if recorded is not None:
        return nanoseconds(recorded.header.stamp) + round(recorded.stamp_to_publish_ms * 1e6)
    return moment.now_ns
