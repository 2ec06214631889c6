"""Recordings for the tests: the one in test/data, and others that are made from its messages."""

from pathlib import Path

import yaml
from paths import TABLE_RECORDING
from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer
from std_msgs.msg import String

from deer_vla_ros.bag.cdr import to_cdr, type_of, types
from deer_vla_ros.bag.recording import Record, Recording

TABLE = TABLE_RECORDING
STATIC, GRIPPER, POSE, INSTRUCTION = (
    "/camera/static/image_raw",
    "/camera/gripper/image_raw",
    "/ee_pose",
    "/instruction",
)
INPUTS = (STATIC, GRIPPER, POSE, INSTRUCTION)
SECOND = 1_000_000_000


def records(topics=None, path: Path = TABLE, seconds: float | None = None) -> list[Record]:
    """The messages of a recording, of `topics` or all, from its first `seconds` or all of it."""
    with Recording(path) as recording:
        stop = None if seconds is None else recording.start_ns + round(seconds * SECOND)
        return list(recording.messages(set(topics or recording.topics), None, stop))


def write(
    path: Path,
    found: list[Record],
    storage: StoragePlugin = StoragePlugin.MCAP,
    compression: CompressionMode = CompressionMode.NONE,
    topics: dict[str, str] | None = None,
) -> Path:
    """Writes a recording of these messages. topics: types by topic, if they differ from the messages'."""
    writer = Writer(path, version=9, storage_plugin=storage)
    writer.set_compression(compression, CompressionFormat.ZSTD)
    kinds = topics if topics is not None else {record.topic: record.type for record in found}
    with writer:
        connections = {
            topic: writer.add_connection(topic, kind, typestore=types()) for topic, kind in kinds.items()
        }
        for record in found:
            writer.write(connections[record.topic], record.time_ns, record.data)
    return path


def write_split(path: Path, parts: list[list[Record]], storage: StoragePlugin = StoragePlugin.MCAP) -> Path:
    """Writes a recording of several files, one for each part, as a recorder that splits leaves it."""
    path.mkdir()
    found, names = [], []
    for number, part in enumerate(parts):
        scratch = write(path / f"part_{number}", part, storage)
        found.append(metadata(scratch))
        (old,) = found[-1]["relative_file_paths"]
        names.append(f"{path.name}_{number}{Path(old).suffix}")
        (scratch / old).rename(path / names[-1])
        (scratch / "metadata.yaml").unlink()
        scratch.rmdir()
    topics = {}
    for each in (each for one in found for each in one["topics_with_message_count"]):
        before = topics.setdefault(str(each["topic_metadata"]), each | {"message_count": 0})
        before["message_count"] += each["message_count"]
    whole = found[0] | {"relative_file_paths": names, "topics_with_message_count": list(topics.values())}
    set_metadata(path, whole)
    return path


def metadata(path: Path) -> dict:
    """What the recording's metadata.yaml says."""
    return yaml.safe_load((path / "metadata.yaml").read_text())["rosbag2_bagfile_information"]


def set_metadata(path: Path, found: dict) -> None:
    """Replaces the recording's metadata.yaml."""
    (path / "metadata.yaml").write_text(yaml.safe_dump({"rosbag2_bagfile_information": found}))


def record(topic: str, message, time_ns: int) -> Record:
    """A recorded message with the bytes of a ROS message."""
    return Record(topic, type_of(type(message)), time_ns, to_cdr(message))


def said(text: str, time_ns: int) -> Record:
    """A recorded instruction."""
    return record(INSTRUCTION, String(data=text), time_ns)
