"""Which recorded messages does the controller hear, and when? The topics of a recording as what the node subscribes to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from deer_vla_ros.bag.recording import RecordedMessage, Recording, decode
from deer_vla_ros.control.types import Camera, Frame
from deer_vla_ros.errors import UserError
from deer_vla_ros.ros import images
from deer_vla_ros.ros.stamped import nanoseconds

STATIC, GRIPPER = (f"camera/{camera.value}/image_raw" for camera in Camera)
POSE, INSTRUCTION, STEPS, PARAMETERS = "ee_pose", "instruction", "deer_vla/step", "parameter_events"
TARGET, GRIPPER_COMMAND = "target_pose", "gripper_command"
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
}
"""What the node calls its topics, and the types that it takes there."""
NEEDED = (STATIC, GRIPPER, POSE)
CLOCKS = ("receive", "header")
OTHER_CLOCK_NS = 10_000_000_000
"""A stamp that is further from the time of receipt than this was taken from another clock."""

JUMP_NS = 1_000_000_000
JUMP_MESSAGES = 5
"""By so much a stamp is another clock's, and so many in a row make it the clock."""


@dataclass
class Tally:
    """What a recording held that could not be used, by topic and reason; how many messages were used."""

    used: Counter[str] = field(default_factory=Counter)
    skipped: Counter[tuple[str, str]] = field(default_factory=Counter)

    def skip(self, topic: str, reason: str) -> None:
        self.skipped[topic, reason] += 1

    def lines(self) -> list[str]:
        """One for each kind of message that was left out."""
        return [
            f"{topic}: {count} left out: {reason}" for (topic, reason), count in sorted(self.skipped.items())
        ]


def find_topics(
    recording: Recording, renames: Mapping[str, str], read: tuple[str, ...], tally: Tally
) -> dict[str, str]:
    """By the node's topic, the recorded one. Without a rename: the topic of that name, or the only one that ends with it.

    read: what is going to be read beside NEEDED. UserError where one of NEEDED is missing, a rename names no topic, several topics could
    be one that is read, or its type is not what the node takes; another one that is of no use is counted and left out.
    """
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
                f"{recording.path} has no topic {name}: name the one it has with --topic {name}:=TOPIC; {_listed(recording)}"
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
                f"{recording.path}: {topic} is of type {recording.topics[topic]}, {name} takes {' or '.join(TYPES[name])}: "
                f"name another one with --topic {name}:=TOPIC"
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
                f"{recording.path}: {', '.join(sorted(ending))} could all be {name}: choose with --topic {name}:=TOPIC"
            )
        if len(ending) == 1:
            return ending[0]
    return None


def _listed(recording: Recording) -> str:
    return "it has " + ", ".join(f"{topic} ({kind})" for topic, kind in sorted(recording.topics.items()))


class Stamps:
    """When is it? By the time at which a message was received, or by the newest stamp that messages carried until then.

    One stamp far from the others (JUMP_NS) does not move the clock; JUMP_MESSAGES that agree do, forwards or back: the clock was set.
    """

    def __init__(self, clock: str, path: object = ""):
        if clock not in CLOCKS:
            raise UserError(f"--clock is {clock!r}: use one of {', '.join(CLOCKS)}")
        self._clock, self._path, self._newest = clock, path, 0
        self._checked = False
        self._odd, self._odd_count = 0, 0

    def time(self, received_ns: int, stamp_ns: int | None) -> int:
        """Nanoseconds, 0 while it is not known; stamp_ns: of the message's header, None where it has none, 0 where it was not set.

        UserError where stamps are of another clock than the times of receipt, and those were asked for.
        """
        if self._clock == "receive":
            if stamp_ns and not self._checked and abs(received_ns - stamp_ns) > OTHER_CLOCK_NS:
                raise UserError(
                    f"{self._path}: messages are stamped {(received_ns - stamp_ns) / 1e9:.0f} s away from when they were received, "
                    "by another clock: replay with --clock header"
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
    """Nanoseconds of the header, None for a message without one."""
    return nanoseconds(message.header.stamp) if hasattr(message, "header") else None


def image(record: RecordedMessage, message: Any) -> Frame:
    """A camera's message as the frame that the node would make of it; UserError."""
    return (images.compressed_frame if record.type == COMPRESSED else images.frame)(message)


def messages(
    recording: Recording,
    topics: Mapping[str, str],
    tally: Tally,
    window: tuple[int | None, int | None] = (None, None),
    copy: Callable[[RecordedMessage], None] | None = None,
) -> Iterator[tuple[str, RecordedMessage, Any]]:
    """The node's name of a topic, the record and its message; what cannot be decoded is counted and left out.

    window: first time of receipt and the one at which it ends [ns]. copy: is given every record of every topic on the way.
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
