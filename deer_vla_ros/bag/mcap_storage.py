"""Reads an MCAP file in order of time, also one whose end is missing because the recorder was killed.

The format is described at https://mcap.dev/spec, and the package `mcap` decodes its records. The readers of
`mcap` and rosbags are not used: that of rosbags needs the index at the end and reads no chunk without a
message index, that of `mcap` keeps a file without index in memory, and neither limits the decompressed size.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from mcap.data_stream import ReadDataStream
from mcap.opcode import Opcode
from mcap.records import Channel, ChunkIndex, Footer, Header, Schema, Statistics
from rosbags.interfaces import (
    Connection,
    ConnectionExtRosbag2,
    MessageDefinition,
    MessageDefinitionFormat,
)

from deer_vla_ros.bag.inflation import LARGEST, decompressed_first, inflated
from deer_vla_ros.errors import UserError, cause

MAGIC = b"\x89MCAP0\r\n"
RECORD = struct.Struct("<BQ")
"""What precedes each record: its kind and its length."""
MESSAGE_HEAD = struct.Struct("<HIQQ")
"""Channel, sequence number, time of receipt, time of publishing."""
CHUNK_HEAD = struct.Struct("<16xQII")
"""After the times of the first and the last message: decompressed size, checksum, length of the compression's
name."""
END_SIZE = RECORD.size + 20 + len(MAGIC)
"""The footer and the magic after it."""
MOST_RECORDS, ALWAYS_RECORDS = 500_000, 1000
"""The most records of a chunk. A chunk of fewer bytes in the file may have one for each byte, and
ALWAYS_RECORDS in any case. Messages are larger: 24000 empty ones, each 1 ms after the one before, take 3.4
bytes each at zstd's level 19."""
MOST_CHANNELS = 10_000
MOST_TEXT = 2**24
"""The most bytes of all descriptions of channels and types in a file."""
MOST_WAITING = 2 * LARGEST
"""The most bytes of chunks that overlap in time, decompressed."""
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
    """An MCAP file. name: what a person calls it, in errors.

    connections: the topics, each with a type and a number of messages; quality of service is not parsed.
    start_ns, end_ns: receipt of first and last message; 0 if there is none. note: what is missing, "" for a
    whole file. foreign: encodings and numbers of messages that are not CDR, by topic. Raises ValueError or
    any other error for arbitrary bytes, and UserError for a file that is not of ROS 2.
    """

    def __init__(self, path: Path, name: Path):
        self._path, self._name = path, name
        self._schemas: dict[int, Schema] = {}
        self._channels: dict[int, Channel] = {}
        self._text_bytes = 0
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
        definitions = {number: _definition(schema) for number, schema in self._schemas.items()}
        for each in self._channels.values():
            schema, count = self._schemas.get(each.schema_id), self._counts[each.id]
            if each.message_encoding != "cdr" or schema is None or not schema.name:
                self.foreign[each.topic] = each.message_encoding or "nothing", count
                continue
            qos = each.metadata.get("offered_qos_profiles", "")
            self.connections.append(
                Connection(
                    each.id,
                    each.topic,
                    # Some writers leave out "msg".
                    schema.name.replace("/", "/msg/") if schema.name.count("/") == 1 else schema.name,
                    definitions[each.schema_id],
                    each.metadata.get("topic_type_hash", ""),
                    count,
                    ConnectionExtRosbag2("cdr", qos),
                    None,
                )
            )

    def messages(self, ids: Set[int], start_ns: int, stop_ns: int) -> Iterator[tuple[int, int, memoryview]]:
        """Yields (time of receipt, connection's id, data) from start_ns on and before stop_ns, in order of
        time. Messages of one time come in the order of the file. Raises UserError if more than MOST_WAITING
        bytes of chunks, or 2 MOST_RECORDS messages, overlap in time."""
        wanted = [
            part
            for part in self._parts
            if part.start_ns < stop_ns
            and part.end_ns >= start_ns
            and (part.channels is None or not part.channels.isdisjoint(ids))
        ]
        waiting: list[tuple[int, int, int, int, memoryview]] = []
        kept: list[tuple[int, int]] = []  # of the parts with messages that wait: last time, size
        with open(self._path, "rb") as file:
            for part in sorted(wanted, key=lambda part: (part.start_ns, part.offset)):
                count = bisect_left(waiting, (part.start_ns,))
                yield from ((time_ns, channel, data) for time_ns, _, _, channel, data in waiting[:count])
                del waiting[:count]
                kept = [each for each in kept if each[0] >= part.start_ns]
                content, last_ns = self._content(file, part), None
                for place, (kind, record) in enumerate(_records(content, part.size)):
                    if kind == Opcode.MESSAGE:
                        channel, _, time_ns, _ = MESSAGE_HEAD.unpack_from(record)
                        if channel in ids and start_ns <= time_ns < stop_ns:
                            data = record[MESSAGE_HEAD.size :]
                            waiting.append((time_ns, part.offset, place, channel, data))
                            last_ns = time_ns if last_ns is None else max(last_ns, time_ns)
                waiting.sort()
                if last_ns is not None:
                    kept.append((last_ns, len(content)))
                if sum(size for _, size in kept) > MOST_WAITING or len(waiting) > 2 * MOST_RECORDS:
                    before, plain = decompressed_first(self._name)
                    raise UserError(
                        f"{self._name}: {len(kept)} chunks with {len(waiting)} messages and "
                        f"{sum(size for _, size in kept)} bytes overlap in time; the limits are "
                        f"{2 * MOST_RECORDS} messages and {MOST_WAITING} bytes: put the messages in "
                        f"order with {before}`mcap sort {plain} -o NEW.mcap`"
                    )
            yield from ((time_ns, channel, data) for time_ns, _, _, channel, data in waiting)

    def _read_header(self, file: BinaryIO, size: int) -> int:
        """Returns where the data begin. Raises UserError for a file that is not of ROS 2."""
        file.seek(len(MAGIC))
        kind, length = RECORD.unpack(file.read(RECORD.size))
        if kind != Opcode.HEADER or length > size - file.tell():
            raise ValueError("it does not begin with a whole header")
        profile = Header.read(_stream(file.read(length))).profile
        if profile not in ("ros2", ""):
            remedy = (
                "convert the .bag file that it was made from with `rosbags-convert --src FILE --dst FOLDER`"
                if profile == "ros1"
                else "give a recording of ROS 2"
            )
            raise UserError(
                f"{self._name}: an MCAP file with the profile {profile[:40]!r}, not ros2: {remedy}"
            )
        return len(MAGIC) + RECORD.size + length

    def _read_summary(self, file: BinaryIO, begin: int, size: int) -> bool:
        """Reads the index at the end. Returns False, with nothing read, if it does not suffice."""
        try:
            file.seek(max(size - END_SIZE, 0))
            end = file.read(END_SIZE)
            kind, length = RECORD.unpack_from(end)
            if (kind, length) != (Opcode.FOOTER, 20) or not end.endswith(MAGIC):
                raise ValueError("there is no footer")
            footer = Footer.read(_stream(end[RECORD.size :]))
            length = size - END_SIZE - footer.summary_start
            if footer.summary_start < begin or not 0 < length <= LARGEST:
                return False
            file.seek(footer.summary_start)
            summary = file.read(length)
            if footer.summary_crc not in (0, zlib.crc32(end[: RECORD.size + 16], zlib.crc32(summary))):
                raise ValueError("the index has another checksum")
            promised = -1
            for kind, record in _records(memoryview(summary), len(summary)):
                if kind == Opcode.CHUNK_INDEX:
                    self._parts.append(_indexed(ChunkIndex.read(_stream(record))))
                elif kind == Opcode.STATISTICS:
                    statistics = Statistics.read(_stream(record))
                    promised = statistics.message_count
                    self.start_ns, self.end_ns = statistics.message_start_time, statistics.message_end_time
                    self._counts.update(statistics.channel_message_counts)
                else:
                    self._see(kind, record)
            if len({part.offset for part in self._parts}) < len(self._parts):
                raise ValueError("the index has a chunk twice")
            if promised == self._counts.total() and (not promised or (self._parts and self._channels)):
                return True
        except Exception:  # for arbitrary bytes, a parser may raise anything
            self.note = "its index at the end is missing or damaged, and was made anew from its messages"
        for each in (self._schemas, self._channels, self._parts, self._counts):
            each.clear()
        self._text_bytes = 0
        self.start_ns = self.end_ns = 0
        return False

    def _scan(self, file: BinaryIO, begin: int, size: int) -> None:
        """Makes the index from the data, up to their end or the first damaged place."""
        at, is_whole, why = begin, False, ""
        try:
            while at < size:
                file.seek(at)
                kind, length = RECORD.unpack(file.read(RECORD.size))
                if kind in (Opcode.DATA_END, Opcode.FOOTER):
                    is_whole = True
                    break
                end = at + RECORD.size + length
                if not kind or end > size:
                    break
                if kind == Opcode.CHUNK:
                    self._enter_chunk(file, at, end - at)
                elif kind == Opcode.MESSAGE:
                    channel, _, time_ns, _ = MESSAGE_HEAD.unpack(file.read(MESSAGE_HEAD.size))
                    self._enter_message(at, end, channel, time_ns)
                elif kind in (Opcode.SCHEMA, Opcode.CHANNEL):
                    self._see(kind, memoryview(file.read(length)))
                at = end
        except Exception as error:  # for arbitrary bytes, a parser may raise anything
            why = f" ({cause(error)})"
        used = [part for part in self._parts if part.channels]
        if used:
            self.start_ns = min(part.start_ns for part in used)
            self.end_ns = max(part.end_ns for part in used)
        if not is_whole:
            place = f"from byte {at} of {size} on"
            where = f"its end is missing or damaged {place}, as when a recorder is killed{why}"
            self.note = (
                f"{where}: the {self._counts.total()} messages before that are read; `ros2 bag reindex` of "
                "the folder and then `ros2 bag convert` make a whole recording of them"
                if used
                else f"{where}, and no whole chunk comes before that"
            )

    def _enter_chunk(self, file: BinaryIO, offset: int, size: int) -> None:
        part = _Part(0, 0, offset, size, True, None)
        start_ns, end_ns = 2**64, -1
        counts: Counter[int] = Counter()
        descriptions: list[tuple[int, memoryview]] = []
        for kind, record in _records(self._content(file, part), size):
            if kind == Opcode.MESSAGE:
                channel, _, time_ns, _ = MESSAGE_HEAD.unpack_from(record)
                start_ns, end_ns = min(start_ns, time_ns), max(end_ns, time_ns)
                counts[channel] += 1
            elif kind in (Opcode.SCHEMA, Opcode.CHANNEL):
                descriptions.append((kind, record))
        for kind, record in descriptions:  # now that all records of the chunk are known to be whole
            self._see(kind, record)
        if counts:
            self._parts.append(_Part(start_ns, end_ns, offset, size, True, frozenset(counts)))
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
        """Remembers a schema or a channel, which a file repeats. Raises ValueError for too many."""
        known = {Opcode.SCHEMA: self._schemas, Opcode.CHANNEL: self._channels}.get(kind)
        if known is None or int.from_bytes(record[:2], "little") in known:
            return
        self._text_bytes += len(record)
        if len(known) == MOST_CHANNELS or self._text_bytes > MOST_TEXT:
            raise ValueError(
                f"more than {MOST_CHANNELS} channels or types, or more than {MOST_TEXT} bytes of their "
                "descriptions"
            )
        found = (Schema if kind == Opcode.SCHEMA else Channel).read(_stream(record))
        known[found.id] = found

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
        if RECORD.unpack_from(record) != (Opcode.CHUNK, part.size - RECORD.size):
            raise ValueError("the index leads to no chunk")
        size, checksum, length = CHUNK_HEAD.unpack_from(record, RECORD.size)
        if size > LARGEST:
            raise ValueError(f"a chunk of {size} bytes, decompressed; the limit is {LARGEST}")
        compression, rest = _split(record[RECORD.size + CHUNK_HEAD.size :], length)
        packed, _ = _split(rest[8:], *struct.unpack_from("<Q", rest))
        content = inflated(packed, bytes(compression).decode(), size)
        if len(content) != size or (checksum and zlib.crc32(content) != checksum):
            raise ValueError("a chunk has another size or checksum than it says")
        return memoryview(content)


def _stream(record: bytes | memoryview) -> ReadDataStream:
    return ReadDataStream(io.BytesIO(record))


def _definition(schema: Schema) -> MessageDefinition:
    form = DEFINITIONS.get(schema.encoding)
    if form is None:
        return MessageDefinition(MessageDefinitionFormat.NONE, "")
    return MessageDefinition(form, schema.data.decode())


def _split(data: memoryview, length: int) -> tuple[memoryview, memoryview]:
    """The first `length` bytes, and the rest. Raises ValueError if there are fewer."""
    if length > len(data):
        raise ValueError("a record ends within a field")
    return data[:length], data[length:]


def _records(data: memoryview, stored: int) -> Iterator[tuple[int, memoryview]]:
    """Yields (kind, content) of records that follow each other. stored: bytes that they take in the file.

    Raises ValueError if the last one is cut, or if there are more than MOST_RECORDS allows.
    """
    at, most = 0, min(max(stored, ALWAYS_RECORDS), MOST_RECORDS)
    while at < len(data):
        if not most:
            raise ValueError(
                f"more records in {stored} bytes than one for each byte, or more than {MOST_RECORDS}"
            )
        most -= 1
        kind, length = RECORD.unpack_from(data, at)
        at += RECORD.size
        if length > len(data) - at:
            raise ValueError("a record is longer than its chunk")
        yield kind, data[at : at + length]
        at += length


def _indexed(chunk: ChunkIndex) -> _Part:
    return _Part(
        chunk.message_start_time,
        chunk.message_end_time,
        chunk.chunk_start_offset,
        chunk.chunk_length,
        True,
        frozenset(chunk.message_index_offsets) or None,
    )
