"""The topics of a recording as the node's inputs: which messages the controller gets, and at what time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from deer_vla_ros.bag.recording import Record, Recording, decode
from deer_vla_ros.control.types import Camera, Frame
from deer_vla_ros.errors import UserError
from deer_vla_ros.ros import images
from deer_vla_ros.ros.messages import nanoseconds

STATIC, GRIPPER = (f"camera/{camera.value}/image_raw" for camera in Camera)
POSE, INSTRUCTION, STEPS, PARAMETERS = "ee_pose", "instruction", "deer_vla/step", "parameter_events"
TARGET, GRIPPER_COMMAND = "target_pose", "gripper_command"
GRIPPER_STATE = "gripper_state"
CAMERAS = {STATIC: Camera.STATIC, GRIPPER: Camera.GRIPPER}
COMPRESSED = "sensor_msgs/msg/CompressedImage"
TYPES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(CAMERAS, ("sensor_msgs/msg/Image", COMPRESSED)),
    POSE: ("geometry_msgs/msg/PoseStamped",),
    INSTRUCTION: ("std_msgs/msg/String",),
    STEPS: ("deer_vla_ros/msg/PolicyStep",),
    PARAMETERS: ("rcl_interfaces/msg/ParameterEvent",),
    TARGET: ("geometry_msgs/msg/PoseStamped",),
    GRIPPER_COMMAND: ("std_msgs/msg/Float64MultiArray",),
    GRIPPER_STATE: ("sensor_msgs/msg/JointState",),
}
"""The node's names of topics, and the types that it takes there. convert-bag alone reads GRIPPER_STATE."""
NEEDED = (STATIC, GRIPPER, POSE)
CLOCKS = ("receive", "header")
OTHER_CLOCK_NS = 10_000_000_000
"""A stamp that is further from the time of receipt than this comes from another clock."""

JUMP_NS = 1_000_000_000
JUMP_MESSAGES = 5
"""A stamp that differs by more than JUMP_NS comes from another clock. After JUMP_MESSAGES of them in a row,
that one is the clock."""


@dataclass
class Tally:
    """How many messages were used, by topic, and how many could not be used, by topic and reason.

    notes: what a person should know about the recordings, each once.
    """

    used: Counter[str] = field(default_factory=Counter)
    skipped: Counter[tuple[str, str]] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def skip(self, topic: str, reason: str) -> None:
        """Counts a message, or another fact, that could not be used."""
        self.skipped[topic, reason] += 1

    def note(self, line: str) -> None:
        """Adds a note, if it is new."""
        if line not in self.notes:
            self.notes.append(line)

    def lines(self) -> list[str]:
        """The notes, and one line for each topic and reason of messages that were left out."""
        left_out = [
            f"{topic}: {count} left out: {reason}" for (topic, reason), count in sorted(self.skipped.items())
        ]
        return [*self.notes, *left_out]


def find_topics(
    recording: Recording, renames: Mapping[str, str], read: tuple[str, ...], tally: Tally
) -> dict[str, str]:
    """The recorded topics by the node's names.

    renames: recorded topics by the node's names. Without a rename, it is the topic of that name, or the only
    one that ends with it. read: the topics that will be read besides NEEDED. Raises UserError if one of
    NEEDED is missing, a rename names no topic, several topics could be one that is read, or its type is
    wrong. Any other topic of a wrong type is counted and left out. tally: gets the recording's notes, too.
    """
    for line in recording.notes:
        tally.note(line)
    read = (*NEEDED, *read)
    if unknown := sorted(set(renames) - set(TYPES)):
        raise UserError(
            f"--topic {unknown[0]}:=...: the policy has no such topic: use one of {', '.join(TYPES)}"
        )
    found = {}
    for name in TYPES:
        topic = renames.get(name) or _by_name(recording, name, name in read)
        if topic is None and name in NEEDED:
            raise UserError(
                f"{recording.path} has no topic {name}: name the one it has with --topic {name}:=TOPIC; "
                f"{_listed(recording)}"
            )
        if topic is None:
            continue
        if topic not in recording.topics:
            raise UserError(
                f"--topic {name}:={topic}: {recording.path} has no such topic; {_listed(recording)}"
            )
        if recording.topics[topic] not in TYPES[name]:
            if name not in read and name not in renames:
                tally.skip(
                    topic, f"of type {recording.topics[topic]}, {name} takes {' or '.join(TYPES[name])}"
                )
                continue
            raise UserError(
                f"{recording.path}: {topic} is of type {recording.topics[topic]}, "
                f"{name} takes {' or '.join(TYPES[name])}: name another one with --topic {name}:=TOPIC"
            )
        found[name] = topic
    return found


def _by_name(recording: Recording, name: str, is_read: bool) -> str | None:
    names = (name, f"{name}/compressed") if name in CAMERAS else (name,)
    for each in names:
        if f"/{each}" in recording.topics:
            return f"/{each}"
    for each in names:
        ending = [topic for topic in recording.topics if topic.endswith(f"/{each}")]
        if len(ending) > 1 and is_read:
            raise UserError(
                f"{recording.path}: {', '.join(sorted(ending))} could all be {name}: "
                f"choose with --topic {name}:=TOPIC"
            )
        if len(ending) == 1:
            return ending[0]
    return None


def _listed(recording: Recording) -> str:
    return "it has " + ", ".join(f"{topic} ({kind})" for topic, kind in sorted(recording.topics.items()))


class Stamps:
    """Bag time: the time at which a message was received, or the newest stamp of the messages until then.

    A single stamp that is far from the others (JUMP_NS) does not move the clock. JUMP_MESSAGES of them that
    agree move it, forwards or back, because the clock was set.
    """

    def __init__(self, clock: str, path: object = ""):
        if clock not in CLOCKS:
            raise UserError(f"--clock is {clock!r}: use one of {', '.join(CLOCKS)}")
        self._clock, self._path, self._newest = clock, path, 0
        self._checked = False
        self._odd, self._odd_count = 0, 0

    def time(self, received_ns: int, stamp_ns: int | None) -> int:
        """Bag time after this message [ns], 0 while it is not known.

        stamp_ns: of the message's header; None: no header; 0: a stamp that was not set. Raises UserError if
        bag time is the time of receipt, and the stamps come from another clock.
        """
        if self._clock == "receive":
            if stamp_ns and not self._checked and abs(received_ns - stamp_ns) > OTHER_CLOCK_NS:
                raise UserError(
                    f"{self._path}: messages are stamped {(received_ns - stamp_ns) / 1e9:.0f} s away "
                    "from when they were received, by another clock: replay with --clock header"
                )
            self._checked = self._checked or bool(stamp_ns)
            return received_ns
        if stamp_ns:
            self._see(stamp_ns)
        return self._newest

    def _see(self, stamp_ns: int) -> None:
        if not self._newest or abs(stamp_ns - self._newest) <= JUMP_NS:
            self._newest, self._odd_count = max(self._newest, stamp_ns), 0
            return
        agrees = self._odd_count > 0 and abs(stamp_ns - self._odd) <= JUMP_NS
        self._odd, self._odd_count = stamp_ns, self._odd_count + 1 if agrees else 1
        if self._odd_count == JUMP_MESSAGES:
            self._newest, self._odd_count = stamp_ns, 0


def stamp_of(message: Any) -> int | None:
    """The stamp in the message's header [ns], None for a message without a header."""
    return nanoseconds(message.header.stamp) if hasattr(message, "header") else None


def image(record: Record, message: Any) -> Frame:
    """A camera's message as the frame that the node would make of it. Raises UserError."""
    return (images.compressed_frame if record.type == COMPRESSED else images.frame)(message)


def messages(
    recording: Recording,
    topics: Mapping[str, str],
    tally: Tally,
    window: tuple[int | None, int | None] = (None, None),
    copy: Callable[[Record], None] | None = None,
) -> Iterator[tuple[str, Record, Any]]:
    """Yields (node's name of the topic, record, decoded message). Counts and skips undecodable records.

    window: first time of receipt, and the time before which it ends [ns]. copy: called with every record.
    """
    names = {topic: name for name, topic in topics.items()}
    for record in recording.messages(set(recording.topics) if copy else set(names), *window):
        if copy:
            copy(record)
        if record.topic not in names:
            continue
        try:
            message = decode(record)
        except UserError as error:
            tally.skip(record.topic, str(error).partition(": ")[2])
            continue
        tally.used[record.topic] += 1
        yield names[record.topic], record, message
