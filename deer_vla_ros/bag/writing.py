"""What does a run leave? Tables of what was decided, and a recording with what the policy would have said beside the input's topics."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from std_msgs.msg import Float64MultiArray

from deer_vla_ros.bag.bag_file import BagFile
from deer_vla_ros.bag.cdr import to_cdr
from deer_vla_ros.bag.input_topics import GRIPPER_COMMAND, STEPS, TARGET, TYPES, Tally
from deer_vla_ros.bag.recording import RecordedMessage, Recording, definition
from deer_vla_ros.bag.rows import DECIDED, TIMINGS, WALL, Row, RowWriter
from deer_vla_ros.control.types import Command, HoldReason
from deer_vla_ros.ros.stamped import pose_message

OUTPUTS = {f"/{name}": TYPES[name][0] for name in (STEPS, TARGET, GRIPPER_COMMAND)}
RECORDED = "/recorded"
"""Before the names of recorded topics that the replay's own would be mixed with."""
STEPS_CSV, TIMINGS_CSV, HOLDS_CSV, BAG = "steps.csv", "timings.csv", "holds.csv", "bag"


class RunFolder:
    """The folder of one run, which must not be there yet: steps.csv, timings.csv, holds.csv and bag/. Use it as a context manager; left by an
    exception, the recording has no index."""

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
        self._steps.write(row)
        self._timings.write({**row, WALL: wall_ms})

    def held(self, now_ns: int, reasons: Iterable[HoldReason]) -> None:
        self._holds.write({"time_ns": now_ns, "reasons": [reason.name for reason in reasons]})

    def said(self, command: Command, step: bytes | None, frame_id: str, time_ns: int) -> None:
        self._bag.add(command, step, frame_id, time_ns)


class ReplayBag:
    """An MCAP recording in the making; `close` finishes it. Without inputs it holds the replay's topics alone."""

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
                    self._names[each.topic], each.msgtype, found, each.ext.offered_qos_profiles
                )
        for topic, kind in OUTPUTS.items():
            self._file.declare(topic, kind)

    def copy(self, record: RecordedMessage) -> None:
        """One of the input's messages, as it is."""
        if topic := self._names.get(record.topic):
            self._file.write(topic, record.data, record.time_ns)

    def add(self, command: Command, step: bytes | None, frame_id: str, time_ns: int) -> None:
        """What the policy said at `time_ns`; step: its `~/step` message."""
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
        """Ends without an index."""
        self._file.abort()


def _free(topic: str, recording: Recording) -> str:
    """A name for a recorded output that nothing in the recording has: it may be a replay's, and hold RECORDED ones already."""
    while topic in OUTPUTS or topic in recording.topics:
        topic = RECORDED + topic
    return topic
