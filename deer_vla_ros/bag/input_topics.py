"""The topics of a recording as the node's inputs: which messages the controller gets, and at what time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deer_vla_ros.bag.recording import Record, Recording, decode
from deer_vla_ros.control.types import Camera, Frame
from deer_vla_ros.errors import UserError
from deer_vla_ros.ros import images, parameters
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
INPUTS = (POSE, INSTRUCTION, STATIC, GRIPPER)
"""What the node reads. Cameras come last: they are often called otherwise, or used by several robots."""
OUTPUTS = (STEPS, TARGET, GRIPPER_COMMAND, GRIPPER_STATE)
"""What the node publishes, and what its gripper answers. Without a rename, these topics are taken only from a
namespace of the inputs, or from the node's: in another one they are of another arm. GRIPPER_STATE is found as
an input is, where it is read."""
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
    recording: Recording, renames: Mapping[str, str], read: tuple[str, ...], tally: Tally, node: str = ""
) -> dict[str, str]:
    """The recorded topics by the node's names.

    node: full name of the policy node, if it is known. renames: recorded topics by the node's names. Without
    a rename, an input is the topic of that name in the node's namespace, or in that of the renamed inputs, or
    the one without a namespace, or the only one that ends with the name. For OUTPUTS see there; a topic in
    another namespace is counted and left out. read: the topics that will be read besides NEEDED; without
    INSTRUCTION there, the result has none. tally: gets the recording's notes, too.

    Raises UserError if one of NEEDED is missing, a rename names no topic, several topics could be one that is
    read, the inputs are of several robots, or the type is wrong. Any other topic of a wrong type is counted
    and left out.
    """
    for line in recording.notes:
        tally.note(line)
    read = (*NEEDED, *read)
    if unknown := sorted(set(renames) - set(TYPES)):
        raise UserError(
            f"--topic {unknown[0]}:=...: the policy has no such topic: use one of {', '.join(TYPES)}"
        )
    inputs = [name for name in (*INPUTS, GRIPPER_STATE) if name in read]
    node = parameters.full_name(node) if node else ""
    own = [node.rpartition("/")[0]] if node else []
    found: dict[str, str] = {}
    for name in TYPES:
        topic, spaces = renames.get(name), _namespaces(found, inputs)
        if topic is None and name == STEPS and node:
            topic = f"{node}/step" if f"{node}/step" in recording.topics else None
        elif topic is None and name in OUTPUTS and name not in inputs and spaces:
            topic = _output(recording, name, [*own, *spaces], tally)
        elif topic is None:
            chosen = spaces if name == GRIPPER_STATE else _namespaces(renames, inputs)
            preferred = [*own, *(chosen if len(chosen) == 1 else [])]
            topic = _by_name(recording, name, name in read, preferred)
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
    _check_one_robot(recording, found, renames, inputs)
    spaces = _namespaces(found, inputs)
    if spaces and not renames and not {*own} <= {*spaces}:
        tally.note(
            f"no input is in the namespace of {node}: inputs are taken from "
            f"{', '.join(each or '/' for each in spaces)}"
        )
    if INSTRUCTION not in read:
        found.pop(INSTRUCTION, None)
    return found


def node_of(topics: Mapping[str, str]) -> str:
    """The full name of the policy node that reads these recorded topics (by the node's names): the one whose
    `~/step` is among them, or deer_vla in the namespace of the first of INPUTS that has its usual name."""
    if topics.get(STEPS, "").endswith("/step"):
        return topics[STEPS].removesuffix("/step")
    return f"{next(iter(_namespaces(topics, INPUTS)), '')}/{parameters.NODE_NAME}"


def recorded_parameters(
    params: Path | None,
    bags: Iterable[Path],
    renames: Mapping[str, str],
    read: tuple[str, ...],
    node: str = "",
) -> dict[str, Any]:
    """Every parameter's value that a parameter file gives to the policy node of these recordings.

    node: full name of the node; empty: that of `node_of`. The other arguments are as in `find_topics`. Raises
    UserError as `parameters.from_file` and `find_topics`, and if the file has different values for the nodes
    of several recordings.
    """
    if params is None or node:
        return parameters.from_file(params, node)
    given: dict[str, Any] = {}
    for bag in bags:
        with Recording(bag) as recording:
            node = node_of(find_topics(recording, renames, read, Tally()))
        values = parameters.from_file(params, node, bag)
        if given and values != given:
            raise UserError(
                f"{params}: different parameters for {node} of {bag} than for the recordings before it: "
                "give the recordings of each node in a command of their own, or choose the node with --node"
            )
        given = values
    return given


def _namespaces(topics: Mapping[str, str], names: Iterable[str]) -> list[str]:
    """The namespaces of the topics among `names` that are called as the node calls them, each once; the root
    is an empty text."""
    endings = [(topics[name], f"/{each}") for name in names if name in topics for each in _transports(name)]
    return list(dict.fromkeys(topic.removesuffix(end) for topic, end in endings if topic.endswith(end)))


def _transports(name: str) -> tuple[str, ...]:
    return (name, f"{name}/compressed") if name in CAMERAS else (name,)


def _by_name(recording: Recording, name: str, is_read: bool, preferred: list[str]) -> str | None:
    """The topic of this name. preferred: namespaces that a person chose.

    A topic without messages is taken only where no topic with messages has the name: recorders also list
    topics that were silent.
    """
    names = _transports(name)
    heard = [topic for topic in recording.topics if recording.counts[topic]]
    for topics in (heard, recording.topics):
        for topic in (f"{namespace}/{each}" for namespace in preferred for each in names):
            if topic in topics:
                return topic
    for topics in (heard, recording.topics):
        for each in names:
            if f"/{each}" in topics:
                return f"/{each}"
        for each in names:
            ending = [topic for topic in topics if topic.endswith(f"/{each}")]
            if len(ending) > 1 and is_read:
                raise UserError(
                    f"{recording.path}: {', '.join(sorted(ending))} could all be {name}: "
                    f"choose with --topic {name}:=TOPIC or --node NAME; "
                    "other topics are then taken from the same namespace"
                )
            if len(ending) == 1:
                return ending[0]
    return None


def _output(recording: Recording, name: str, namespaces: list[str], tally: Tally) -> str | None:
    """The topic of this name in the first of the namespaces that has one. Counts others if none has one."""
    for namespace in namespaces:
        if f"{namespace}/{name}" in recording.topics:
            return f"{namespace}/{name}"
    for topic in sorted(recording.topics):
        if topic.endswith(f"/{name}"):
            tally.skip(
                topic,
                f"not in the namespace {namespaces[0] or '/'} of this robot: name it with --topic "
                f"{name}:={topic} if it belongs to it",
            )
    return None


def _check_one_robot(
    recording: Recording, found: Mapping[str, str], renames: Mapping[str, str], inputs: Iterable[str]
) -> None:
    """Raises UserError if an input that was found by its name has a namespace beside that of another input,
    as /right is beside /left: it probably belongs to another robot."""
    spaces = _namespaces(found, inputs)
    doubtful = []
    for name in inputs:
        if name in found and name not in renames:
            (own,) = _namespaces(found, [name])
            if not all(f"{max(own, each)}/".startswith(f"{min(own, each)}/") for each in spaces):
                doubtful.append(f"--topic {name}:={found[name]}")
    if doubtful:
        raise UserError(
            f"{recording.path}: the inputs are in several namespaces "
            f"({', '.join(each or '/' for each in spaces)}): if they belong to one robot, "
            f"say so with {' '.join(doubtful)}"
        )


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
