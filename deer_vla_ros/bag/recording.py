"""Reads a recording as a stream: a rosbag2 folder or file, MCAP or sqlite3, compressed or not.

Only the requested messages are read, and memory holds one chunk at a time. Any fault of a file is a UserError
of one line.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from rosbags.interfaces import Connection, MessageDefinitionFormat
from rosbags.rosbag2 import Reader
from rosbags.typesys import Stores, get_types_from_msg, get_typestore

from deer_vla_ros.bag.cdr import from_cdr, types
from deer_vla_ros.errors import UserError, cause

Result = TypeVar("Result")

STORAGES = (".mcap", ".db3")
METADATA = "metadata.yaml"


@dataclass(frozen=True)
class Record:
    """One recorded message, not decoded: its topic and type, when it was received [ns], and its CDR bytes."""

    topic: str
    type: str
    time_ns: int
    data: bytes


class Recording:
    """An open recording; use it as a context manager. UserError for a file that cannot be opened or read.

    start_ns, end_ns: receipt of the first message, and the end [ns]. topics: types, and counts: numbers of
    messages, by topic.
    """

    def __init__(self, path: Path):
        self.path = path
        if not path.exists():
            raise UserError(f"{path}: no such recording: give a rosbag2 folder, or a .mcap or .db3 file")
        if path.is_file() and path.suffix not in STORAGES:
            raise UserError(f"{path}: not a recording: give a rosbag2 folder, or a .mcap or .db3 file")
        if path.is_dir() and not (path / METADATA).is_file():
            raise UserError(
                f"{path}: no {METADATA} in it, as the recorder leaves when it ends: run `ros2 bag reindex "
                f"{path}`, or give the .mcap or .db3 file in it"
            )
        self._reader = self._guarded(lambda: Reader(path))
        self._guarded(self._reader.open)
        if not self._reader.message_count:
            self._reader.close()
            raise UserError(f"{path}: the recording is empty: record it again, with the cameras running")
        self.start_ns, self.end_ns = int(self._reader.start_time), int(self._reader.end_time)
        self.topics: dict[str, str] = {each.topic: each.msgtype for each in self._reader.connections}
        self.counts: dict[str, int] = {}
        for each in self._reader.connections:
            self.counts[each.topic] = self.counts.get(each.topic, 0) + each.msgcount

    def __enter__(self) -> Recording:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._reader.close()

    @property
    def connections(self) -> list[Connection]:
        """Every recorded topic, with its type, quality of service and definition."""
        return list(self._reader.connections)

    def messages(
        self, topics: set[str], start_ns: int | None = None, stop_ns: int | None = None
    ) -> Iterator[Record]:
        """Messages of these topics, received from `start_ns` on and before `stop_ns`, in this order.

        Earlier messages are not read: the index or the database leads to the first one. Raises UserError for
        a damaged file.
        """
        wanted = [each for each in self._reader.connections if each.topic in topics]
        if not wanted:
            return
        stream = self._guarded(lambda: self._reader.messages(wanted, start_ns, stop_ns))
        last_ns = start_ns
        while True:
            try:
                connection, time_ns, data = next(stream)
            except StopIteration:
                return
            except Exception as error:  # for arbitrary bytes, a parser may raise anything
                so_far = (
                    "" if last_ns is None else f", {(last_ns - self.start_ns) / 1e9:.1f} s from its beginning"
                )
                raise UserError(
                    f"{self.path}: damaged{so_far} ({cause(error)}): {_remedy(self.path)}"
                ) from error
            last_ns = int(time_ns)
            yield Record(connection.topic, connection.msgtype, last_ns, bytes(data))

    def _guarded(self, call: Callable[[], Result]) -> Result:
        """Calls `call`. Raises UserError for any error of the parser."""
        try:
            return call()
        except Exception as error:
            raise UserError(f"{self.path}: cannot be read ({cause(error)}): {_remedy(self.path)}") from error


def _remedy(path: Path) -> str:
    name = path if path.is_file() else path / "FILE"
    return (
        f"it was cut short or damaged: recover what is left with `mcap recover {name}` or sqlite3's "
        f".recover, then `ros2 bag reindex`, or record it again"
    )


def decode(record: Record) -> Any:
    """The decoded message, with the fields of the ROS class. UserError if the bytes do not fit the type."""
    try:
        return from_cdr(record.data, record.type)
    except Exception as error:  # for arbitrary bytes, a parser may raise anything
        raise UserError(
            f"{record.topic}: {len(record.data)} bytes are no {record.type} ({cause(error)})"
        ) from error


def definition(connection: Connection) -> tuple[str, str] | None:
    """Message definition and RIHS01 hash of a topic, as recorded or as installed; None if neither exists."""
    store, recorded = types(), connection.msgdef
    if recorded.format is not MessageDefinitionFormat.NONE and connection.digest:
        return recorded.data, connection.digest
    # Older recorders, and MCAP files without their folder, lack the hash.
    if recorded.format is MessageDefinitionFormat.MSG:
        with contextlib.suppress(Exception):  # for arbitrary text, a parser may raise anything
            own = get_typestore(Stores.EMPTY)
            own.register(get_types_from_msg(recorded.data, connection.msgtype))
            return recorded.data, own.hash_rihs01(connection.msgtype)
    if connection.msgtype not in store.fielddefs:
        return None
    return store.generate_msgdef(connection.msgtype, ros_version=2)[0], store.hash_rihs01(connection.msgtype)
