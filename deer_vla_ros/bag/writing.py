"""The files of a replay: tables of the decisions, and a recording of the policy's commands beside the
inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from std_msgs.msg import Float64MultiArray

from deer_vla_ros.bag.bag_file import BagFile
from deer_vla_ros.bag.cdr import to_cdr
from deer_vla_ros.bag.input_topics import GRIPPER_COMMAND, STEPS, TARGET, TYPES, Tally
from deer_vla_ros.bag.offered_qos import parsed_qos
from deer_vla_ros.bag.recording import Record, Recording, definition
from deer_vla_ros.bag.rows import DECIDED, TIMINGS, WALL, Row, RowWriter
from deer_vla_ros.control.types import Command, HoldReason
from deer_vla_ros.ros.messages import pose_message

OUTPUTS = {f"/{name}": TYPES[name][0] for name in (STEPS, TARGET, GRIPPER_COMMAND)}
RECORDED = "/recorded"
"""Prefix for recorded topics whose names are those of the replay's own topics."""
STEPS_CSV, TIMINGS_CSV, HOLDS_CSV, BAG = "steps.csv", "timings.csv", "holds.csv", "bag"


class RunFolder:
    """The folder of one run: steps.csv, timings.csv, holds.csv and bag/. It must not exist yet.

    Use it as a context manager. After an exception, the recording has no index.
    """

    def __init__(self, folder: Path, recording: Recording, tally: Tally, with_inputs: bool):
        folder.mkdir(parents=True)
        self._stack = contextlib.ExitStack()

        def table(name: str, fields: tuple[str, ...]) -> RowWriter:
            return RowWriter(self._stack.enter_context(open(folder / name, "w", newline="")), fields)

        self._steps = table(STEPS_CSV, DECIDED)
        self._timings = table(TIMINGS_CSV, ("step", *TIMINGS, WALL))
        self._holds = table(HOLDS_CSV, ("time_ns", "reasons"))
        self._bag = ReplayBag(folder / BAG, recording, tally, with_inputs)
        self.copy = self._bag.copy if with_inputs else None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._stack:
            self._bag.abort() if kind else self._bag.close()

    def decided(self, row: Row, wall_ms: float) -> None:
        """Writes a decision. wall_ms: what its tick really took."""
        self._steps.write(row)
        self._timings.write({**row, WALL: wall_ms})

    def held(self, now_ns: int, reasons: Iterable[HoldReason]) -> None:
        """Writes the beginning of a hold, or a change of its reasons, at now_ns [ns, bag time]."""
        self._holds.write({"time_ns": now_ns, "reasons": [reason.name for reason in reasons]})

    def said(self, command: Command, step: bytes | None, frame_id: str, time_ns: int) -> None:
        """Writes a command into the recording, as `ReplayBag.add`."""
        self._bag.add(command, step, frame_id, time_ns)


class ReplayBag:
    """A new MCAP recording; `close` finishes it. Without inputs it contains only the replay's own topics."""

    def __init__(self, folder: Path, recording: Recording, tally: Tally, with_inputs: bool):
        self._file = BagFile(folder)
        self._names: dict[str, str] = {}
        for each in recording.connections if with_inputs else []:
            found = definition(each)
            if found is None:
                tally.skip(
                    each.topic,
                    f"not copied: {each.msgtype} is not defined in the recording, nor installed here",
                )
            elif each.topic not in self._names:
                self._names[each.topic] = (
                    _free(each.topic, recording) if each.topic in OUTPUTS else each.topic
                )
                self._file.declare(
                    self._names[each.topic], each.msgtype, found, parsed_qos(each.ext.offered_qos_profiles)
                )
        for topic, kind in OUTPUTS.items():
            self._file.declare(topic, kind)

    def copy(self, record: Record) -> None:
        """Copies one message of the input, unchanged."""
        if topic := self._names.get(record.topic):
            self._file.write(topic, record.data, record.time_ns)

    def add(self, command: Command, step: bytes | None, frame_id: str, time_ns: int) -> None:
        """Writes what the policy published at `time_ns` [ns]. step: its `~/step` message as CDR bytes."""
        if step is not None:
            self._file.write(f"/{STEPS}", step, time_ns)
        if command.gripper is not None:
            self._file.write(
                f"/{GRIPPER_COMMAND}", to_cdr(Float64MultiArray(data=[float(command.gripper)])), time_ns
            )
        if command.target is not None:
            self._file.write(
                f"/{TARGET}", to_cdr(pose_message(command.target, frame_id, command.stamp_ns)), time_ns
            )

    def close(self) -> None:
        self._file.close()

    def abort(self) -> None:
        """Ends the recording without an index."""
        self._file.abort()


def _free(topic: str, recording: Recording) -> str:
    """A free name for a recorded output. The recording may be a replay's, and have RECORDED topics
    already."""
    while topic in OUTPUTS or topic in recording.topics:
        topic = RECORDED + topic
    return topic
