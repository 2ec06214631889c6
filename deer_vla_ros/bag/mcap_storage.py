"""Reads an MCAP file in order of time, also one whose end is missing because the recorder was killed.

The format is described at https://mcap.dev/spec. rosbags' reader needs the index at the end, reads no chunk
without a message index, and has no limit for the size of a chunk.
"""

from __future__ import annotations

import os
import struct
import zlib
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from rosbags.interfaces import (
    Connection,
    ConnectionExtRosbag2,
    MessageDefinition,
    MessageDefinitionFormat,
)

from deer_vla_ros.bag.inflation import LARGEST, inflated
from deer_vla_ros.bag.offered_qos import parsed_qos
from deer_vla_ros.errors import UserError

MAGIC = b"\x89MCAP0\r\n"
HEADER, FOOTER, SCHEMA, CHANNEL, MESSAGE, CHUNK, CHUNK_INDEX, STATISTICS, DATA_END = (
    0x01,
    0x02,
    0x03,
    0x04,
    0x05,
    0x06,
    0x08,
    0x0B,
    0x0F,
)
RECORD = struct.Struct("<BQ")
"""What precedes each record: its kind and its length."""
MESSAGE_HEAD = struct.Struct("<HIQQ")
"""Channel, sequence number, time of receipt, time of publishing."""
CHUNK_HEAD = struct.Struct("<QQQII")
"""First and last time of receipt, decompressed size, checksum, length of the compression's name."""
END_SIZE = RECORD.size + 20 + len(MAGIC)
"""The footer and the magic after it."""
RUN = 2**22
"""Messages outside chunks are read together until there are so many bytes of them."""
DEFINITIONS = {
    "ros2msg": MessageDefinitionFormat.MSG,
    "ros2idl": MessageDefinitionFormat.IDL,
    "omgidl": MessageDefinitionFormat.IDL,
}


@dataclass(frozen=True)
class _Part:
    """Messages that are read together: a chunk, or a run of messages outside chunks.

    start_ns, end_ns: times of receipt of the first and the last one. offset, size: place in the file.
    channels: those of its messages; None if that is not known.
    """

    start_ns: int
    end_ns: int
    offset: int
    size: int
    is_chunk: bool
    channels: frozenset[int] | None


class McapStorage:
    """An MCAP file.

    connections: the topics, each with a type and a number of messages. start_ns, end_ns: receipt of first and
    last message; 0 if there is none. note: what is missing, "" for a whole file. foreign: encodings and
    numbers of messages that are not CDR, by topic. Raises ValueError or any other error for arbitrary bytes,
    and UserError for a file that is not of ROS 2.
    """

    def __init__(self, path: Path):
        self._path = path
        self._schemas: dict[int, tuple[str, MessageDefinition]] = {}
        self._channels: dict[int, tuple[int, str, str, dict[str, str]]] = {}
        self._parts: list[_Part] = []
        self._counts: Counter[int] = Counter()
        self.start_ns = self.end_ns = 0
        self.note = ""
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            begin = self._read_header(file, size)
            if not self._read_summary(file, begin, size):
                self._scan(file, begin, size)
        self.foreign: dict[str, tuple[str, int]] = {}
        self.connections: list[Connection] = []
        for number, (schema, topic, encoding, metadata) in self._channels.items():
            kind, definition = self._schemas.get(schema, ("", _NO_DEFINITION))
            if encoding != "cdr" or not kind:
                self.foreign[topic] = (encoding or "nothing", self._counts[number])
                continue
            qos = parsed_qos(metadata.get("offered_qos_profiles", ""))
            self.connections.append(
                Connection(
                    number,
                    topic,
                    kind,
                    definition,
                    metadata.get("topic_type_hash", ""),
                    self._counts[number],
                    ConnectionExtRosbag2(encoding, qos),
                    None,
                )
            )

    def messages(self, ids: Set[int], start_ns: int, stop_ns: int) -> Iterator[tuple[int, int, memoryview]]:
        """Yields (time of receipt, connection's id, data) from start_ns on and before stop_ns, in order of
        time. Messages of one time come in the order of the file."""
        wanted = [
            part
            for part in self._parts
            if part.start_ns < stop_ns
            and part.end_ns >= start_ns
            and (part.channels is None or not part.channels.isdisjoint(ids))
        ]
        waiting: list[tuple[int, int, int, int, memoryview]] = []
        with open(self._path, "rb") as file:
            for part in sorted(wanted, key=lambda part: (part.start_ns, part.offset)):
                count = bisect_left(waiting, (part.start_ns,))
                yield from ((time_ns, channel, data) for time_ns, _, _, channel, data in waiting[:count])
                del waiting[:count]
                for place, (kind, record) in enumerate(_records(self._content(file, part))):
                    if kind == MESSAGE:
                        channel, _, time_ns, _ = MESSAGE_HEAD.unpack_from(record)
                        if channel in ids and start_ns <= time_ns < stop_ns:
                            data = record[MESSAGE_HEAD.size :]
                            waiting.append((time_ns, part.offset, place, channel, data))
                waiting.sort()
            yield from ((time_ns, channel, data) for time_ns, _, _, channel, data in waiting)

    def _read_header(self, file: BinaryIO, size: int) -> int:
        """Returns where the data begin. Raises UserError for a file that is not of ROS 2."""
        file.seek(len(MAGIC))
        kind, length = RECORD.unpack(file.read(RECORD.size))
        if kind != HEADER or length > size - file.tell():
            raise ValueError("it does not begin with a whole header")
        profile = _Fields(file.read(length)).text()
        if profile not in ("ros2", ""):
            remedy = (
                "convert the .bag file that it was made from with `rosbags-convert --src FILE --dst FOLDER`"
                if profile == "ros1"
                else "give a recording of ROS 2"
            )
            raise UserError(
                f"{self._path}: an MCAP file with the profile {profile[:40]!r}, not ros2: {remedy}"
            )
        return len(MAGIC) + RECORD.size + length

    def _read_summary(self, file: BinaryIO, begin: int, size: int) -> bool:
        """Reads the index at the end. Returns False, with nothing read, if it does not suffice."""
        try:
            file.seek(max(size - END_SIZE, 0))
            end = file.read(END_SIZE)
            kind, length = RECORD.unpack_from(end)
            summary_start, _, checksum = struct.unpack_from("<QQI", end, RECORD.size)
            footer = size - END_SIZE
            if (kind, length) != (FOOTER, 20) or not end.endswith(MAGIC):
                raise ValueError("there is no footer")
            if not begin <= summary_start < footer or footer - summary_start > LARGEST:
                return False
            file.seek(summary_start)
            summary = file.read(footer - summary_start)
            if checksum and checksum != zlib.crc32(end[: RECORD.size + 16], zlib.crc32(summary)):
                raise ValueError("the index has another checksum")
            promised = -1
            for kind, record in _records(memoryview(summary)):
                if kind == CHUNK_INDEX:
                    self._parts.append(_chunk_index(record))
                elif kind == STATISTICS:
                    promised = self._read_statistics(record)
                else:
                    self._see(kind, record)
            if promised == self._counts.total() and (not promised or (self._parts and self._channels)):
                return True
        except Exception:  # for arbitrary bytes, a parser may raise anything
            self.note = "its index at the end is missing or damaged, and was made anew from its messages"
        self._parts.clear()
        self._counts.clear()
        self.start_ns = self.end_ns = 0
        return False

    def _read_statistics(self, record: memoryview) -> int:
        """Reads how many messages there are in each channel, and their times. Returns how many in all."""
        fields = _Fields(record)
        promised, _ = fields.number(8), fields.take(18)
        self.start_ns, self.end_ns = fields.number(8), fields.number(8)
        self._counts.update(dict(struct.iter_unpack("<HQ", fields.take(fields.number(4)))))
        return promised

    def _scan(self, file: BinaryIO, begin: int, size: int) -> None:
        """Makes the index from the data, up to their end or the first damaged place."""
        at, is_whole = begin, False
        try:
            while at < size:
                file.seek(at)
                kind, length = RECORD.unpack(file.read(RECORD.size))
                if kind in (DATA_END, FOOTER):
                    is_whole = True
                    break
                end = at + RECORD.size + length
                if not kind or end > size:
                    break
                if kind == CHUNK:
                    self._enter_chunk(file, at, end - at)
                elif kind == MESSAGE:
                    channel, _, time_ns, _ = MESSAGE_HEAD.unpack(file.read(MESSAGE_HEAD.size))
                    self._enter_message(at, end, channel, time_ns)
                elif kind in (SCHEMA, CHANNEL):
                    self._see(kind, memoryview(file.read(length)))
                at = end
        except Exception:  # for arbitrary bytes, a parser may raise anything
            is_whole = False
        used = [part for part in self._parts if part.channels]
        if used:
            self.start_ns = min(part.start_ns for part in used)
            self.end_ns = max(part.end_ns for part in used)
        if not is_whole:
            where = f"its end is missing or damaged from byte {at} of {size} on, as when a recorder is killed"
            self.note = (
                f"{where}: the {self._counts.total()} messages before that are read; `ros2 bag reindex` of "
                "the folder and then `ros2 bag convert` make a whole recording of them"
                if used
                else f"{where}, and no whole chunk comes before that"
            )

    def _enter_chunk(self, file: BinaryIO, offset: int, size: int) -> None:
        part = _Part(0, 0, offset, size, True, None)
        times: list[int] = []
        counts: Counter[int] = Counter()
        for kind, record in list(_records(self._content(file, part))):  # all of them, or none
            if kind == MESSAGE:
                channel, _, time_ns, _ = MESSAGE_HEAD.unpack_from(record)
                times.append(time_ns)
                counts[channel] += 1
            else:
                self._see(kind, record)
        if times:
            self._parts.append(_Part(min(times), max(times), offset, size, True, frozenset(counts)))
            self._counts += counts

    def _enter_message(self, offset: int, end: int, channel: int, time_ns: int) -> None:
        """Adds a message outside chunks to the run before it, or begins a new run."""
        self._counts[channel] += 1
        last = self._parts[-1] if self._parts else None
        if last and not last.is_chunk and end - last.offset <= RUN and last.offset + last.size == offset:
            self._parts[-1] = _Part(
                min(last.start_ns, time_ns),
                max(last.end_ns, time_ns),
                last.offset,
                end - last.offset,
                False,
                last.channels | {channel},
            )
        else:
            self._parts.append(_Part(time_ns, time_ns, offset, end - offset, False, frozenset((channel,))))

    def _see(self, kind: int, record: memoryview) -> None:
        """Remembers a schema or a channel."""
        fields = _Fields(record)
        if kind == SCHEMA:
            number, name, encoding = fields.number(2), fields.text(), fields.text()
            if name.count("/") == 1:  # some writers leave out "msg"
                name = name.replace("/", "/msg/")
            form = DEFINITIONS.get(encoding)
            self._schemas[number] = (
                name,
                MessageDefinition(form, fields.text()) if form else _NO_DEFINITION,
            )
        elif kind == CHANNEL:
            number, schema, topic, encoding = fields.number(2), fields.number(2), fields.text(), fields.text()
            self._channels[number] = schema, topic, encoding, fields.texts()

    def _content(self, file: BinaryIO, part: _Part) -> memoryview:
        """The records of a part, decompressed. Raises ValueError if they are damaged or too large."""
        if part.size > LARGEST:
            raise ValueError(f"a chunk of {part.size} bytes; the limit is {LARGEST}")
        file.seek(part.offset)
        record = memoryview(file.read(part.size))
        if len(record) < part.size:
            raise ValueError("the file ends within a chunk")
        if not part.is_chunk:
            return record
        if RECORD.unpack_from(record) != (CHUNK, part.size - RECORD.size):
            raise ValueError("the index leads to no chunk")
        fields = _Fields(record[RECORD.size :])
        _, _, size, checksum, name = CHUNK_HEAD.unpack(fields.take(CHUNK_HEAD.size))
        if size > LARGEST:
            raise ValueError(f"a chunk of {size} bytes, decompressed; the limit is {LARGEST}")
        compression = bytes(fields.take(name)).decode()
        content = inflated(fields.take(fields.number(8)), compression, size)
        if len(content) != size or (checksum and zlib.crc32(content) != checksum):
            raise ValueError("a chunk has another size or checksum than it says")
        return memoryview(content)


_NO_DEFINITION = MessageDefinition(MessageDefinitionFormat.NONE, "")


class _Fields:
    """Reads the fields of a record one after the other. Raises ValueError beyond its end."""

    def __init__(self, data: bytes | memoryview):
        self._data, self._at = memoryview(data), 0

    def take(self, size: int) -> memoryview:
        end = self._at + size
        if end > len(self._data):
            raise ValueError("a record ends within a field")
        part, self._at = self._data[self._at : end], end
        return part

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def text(self) -> str:
        return bytes(self.take(self.number(4))).decode()

    def texts(self) -> dict[str, str]:
        inner, found = _Fields(self.take(self.number(4))), {}
        while inner._at < len(inner._data):
            key = inner.text()
            found[key] = inner.text()
        return found


def _records(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yields (kind, content) of records that follow each other. Raises ValueError if the last one is cut."""
    at = 0
    while at < len(data):
        kind, length = RECORD.unpack_from(data, at)
        at += RECORD.size
        if length > len(data) - at:
            raise ValueError("a record is longer than its chunk")
        yield kind, data[at : at + length]
        at += length


def _chunk_index(record: memoryview) -> _Part:
    fields = _Fields(record)
    start_ns, end_ns, offset, size = (fields.number(8) for _ in range(4))
    channels = frozenset(channel for channel, _ in struct.iter_unpack("<HQ", fields.take(fields.number(4))))
    return _Part(start_ns, end_ns, offset, size, True, channels or None)
