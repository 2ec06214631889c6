"""Reads a recording in order of time: a rosbag2 folder or file, MCAP or sqlite3, compressed or not.

The files of a recording may overlap in time, and their messages need not be in order. Memory holds the chunks
that contain the present time, which is about one of each file. Any fault of a file is a UserError of one
line.
"""

from __future__ import annotations

import contextlib
import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from rosbags.interfaces import Connection, ConnectionExtRosbag2, MessageDefinition, MessageDefinitionFormat
from rosbags.typesys import Stores, get_types_from_msg, get_typestore

from deer_vla_ros.bag.bag_folder import MCAP, ZSTD, BagFolder, Promise, bag_folder, kind_of
from deer_vla_ros.bag.cdr import from_cdr, types
from deer_vla_ros.bag.inflation import ZSTD_MAGIC, decompressed_first, inflated, inflated_file
from deer_vla_ros.bag.mcap_storage import McapStorage
from deer_vla_ros.bag.sqlite_storage import SqliteStorage
from deer_vla_ros.errors import UserError, cause

Result = TypeVar("Result")
IMAGES = ("sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage")
LARGEST_PLAIN = 2**20
"""The most bytes of a message that is decoded and is no image. A list of empty parameters of this size takes
0.6 s. The policy's own topics have some hundred bytes."""
FIRST_NS, LAST_NS = -(2**63), 2**63 - 1


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
    messages, by topic. connections: every topic, with its type, quality of service (not parsed, see
    `parsed_qos`) and definition. notes: what is missing or was left out, one line each.
    """

    def __init__(self, path: Path):
        self.path, self.notes = path, []
        self._stack = contextlib.ExitStack()
        try:
            self._open(self._guarded(bag_folder, path))
        except BaseException:
            self.close()
            raise

    def _open(self, folder: BagFolder) -> None:
        self.notes += folder.notes
        self._is_message_compressed = folder.is_message_compressed
        self._storages = [(each, self._guarded(self._storage, each)) for each in folder.files]
        for each, storage in self._storages:
            if storage.note:
                self.notes.append(f"{each}: {storage.note}")
            self.notes += [
                f"{each}: {topic}: {count} messages left out: encoded as {encoding[:40]}, not as CDR"
                for topic, (encoding, count) in storage.foreign.items()
                if count
            ]
        merged = _merged([storage for _, storage in self._storages], folder.promises)
        self.connections = self._chosen(merged)
        self.topics = {each.topic: each.msgtype for each in self.connections}
        self.counts = {each.topic: each.msgcount for each in self.connections}
        used = [
            storage for _, storage in self._storages if any(each.msgcount for each in storage.connections)
        ]
        if not used:
            why = f" ({'; '.join(self.notes)[:1000]})" if self.notes else ""
            what = "cannot be read: it has no message that can be read" if why else "the recording is empty"
            raise UserError(f"{self.path}: {what}{why}: record it again, with the cameras running")
        self._check_promises(folder.promises, merged)
        self.start_ns = min(storage.start_ns for storage in used)
        self.end_ns = max(storage.end_ns for storage in used) + 1

    def _storage(self, path: Path) -> McapStorage | SqliteStorage:
        """Opens a file. A decompressed one lasts until this recording is closed."""
        name, kind = path, kind_of(path)
        if kind == ZSTD:
            path = Path(self._stack.enter_context(inflated_file(path)).name)
            kind = kind_of(path, name)
        return McapStorage(path, name) if kind == MCAP else SqliteStorage(path)

    def _check_promises(
        self, promises: dict[tuple[str, str], Promise], found: dict[tuple[str, str], Connection]
    ) -> None:
        other = [
            f"{promise.count} of {topic}, and {found[topic, kind].msgcount} are found"
            for (topic, kind), promise in promises.items()
            if promise.count != found[topic, kind].msgcount
        ]
        if other:
            more = f"; and {len(other) - 10} other topics" if len(other) > 10 else ""
            numbers = "; ".join(other[:10]) + more
            self.notes.append(f"{self.path}: metadata.yaml promises other numbers of messages: {numbers}")

    def _chosen(self, found: dict[tuple[str, str], Connection]) -> list[Connection]:
        """One connection for each topic: that of the type with the most messages."""
        chosen: dict[str, Connection] = {}
        for each in sorted(found.values(), key=lambda each: -each.msgcount):
            if each.topic not in chosen:
                chosen[each.topic] = each
            elif each.msgcount:
                self.notes.append(
                    f"{self.path}: {each.topic}: {each.msgcount} messages of type {each.msgtype} left out, "
                    f"because most are {chosen[each.topic].msgtype}"
                )
        return [each for each in found.values() if chosen[each.topic] is each]

    def __enter__(self) -> Recording:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._stack.close()

    def messages(
        self, topics: set[str], start_ns: int | None = None, stop_ns: int | None = None
    ) -> Iterator[Record]:
        """Messages of these topics, received from `start_ns` on and before `stop_ns`, in order of time.

        Messages of one time come in the order of the files, and in a file in the order in which it has them.
        Earlier messages are not read: the index or the database leads to the first one. Raises UserError for
        a damaged file.
        """
        first_ns = FIRST_NS if start_ns is None else start_ns
        end_ns = LAST_NS if stop_ns is None else stop_ns
        streams = [self._stream(each, storage, topics, first_ns, end_ns) for each, storage in self._storages]
        for _, record in heapq.merge(*streams, key=itemgetter(0)):
            if record is not None:
                yield record

    def _stream(
        self, path: Path, storage: McapStorage | SqliteStorage, topics: set[str], start_ns: int, stop_ns: int
    ) -> Iterator[tuple[int, Record | None]]:
        """Yields (time, message) of one file, and first its beginning without a message: no file is read
        before its time."""
        wanted = {each.id: each for each in storage.connections if self.topics[each.topic] == each.msgtype}
        wanted = {number: each for number, each in wanted.items() if each.topic in topics}
        if not wanted or storage.end_ns < start_ns or storage.start_ns >= stop_ns:
            return
        last_ns = max(storage.start_ns, start_ns)
        yield last_ns, None
        with contextlib.closing(storage.messages(wanted.keys(), start_ns, stop_ns)) as stream:
            while True:
                try:
                    time_ns, number, view = next(stream)
                    data = bytes(view)
                    if self._is_message_compressed or data.startswith(ZSTD_MAGIC):  # CDR begins with a 0
                        data = inflated(data)
                except StopIteration:
                    return
                except UserError:
                    raise
                except Exception as error:  # for arbitrary bytes, a parser may raise anything
                    so_far = f"{(last_ns - self.start_ns) / 1e9:.1f} s from its beginning"
                    raise UserError(f"{path}: damaged, {so_far} ({cause(error)}): {_remedy(path)}") from error
                last_ns = time_ns
                each = wanted[number]
                yield time_ns, Record(each.topic, each.msgtype, time_ns, data)

    @staticmethod
    def _guarded(call: Callable[[Path], Result], path: Path) -> Result:
        """The result for `path`. Raises UserError for any error of the parser."""
        try:
            return call(path)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{path}: cannot be read ({cause(error)}): {_remedy(path)}") from error


def _merged(
    storages: list[McapStorage | SqliteStorage], promises: dict[tuple[str, str], Promise]
) -> dict[tuple[str, str], Connection]:
    """The topics of all files and of metadata.yaml, by topic and type, with the sum of their messages."""
    merged: dict[tuple[str, str], Connection] = {}
    for storage in storages:
        for each in storage.connections:
            key = each.topic, each.msgtype
            if key in merged:
                each = merged[key]._replace(msgcount=merged[key].msgcount + each.msgcount)
            merged[key] = each
    for key, promise in promises.items():
        each = merged.get(key) or Connection(
            0,
            *key,
            MessageDefinition(MessageDefinitionFormat.NONE, ""),
            "",
            0,
            ConnectionExtRosbag2("cdr", []),
            None,
        )
        qos = ConnectionExtRosbag2("cdr", promise.qos or each.ext.offered_qos_profiles)
        merged[key] = each._replace(digest=each.digest or promise.digest, ext=qos)
    return merged


def _remedy(path: Path) -> str:
    before, plain = decompressed_first(path)
    tool = (
        f"`sqlite3 {plain} .recover | sqlite3 NEW.db3`"
        if plain.suffix == ".db3"
        else f"`mcap recover {plain} -o NEW.mcap`"
    )
    return (
        f"it was cut short or damaged: copy it again, or recover what is left with {before}{tool} and give "
        "the new file, or record it again"
    )


def decode(record: Record) -> Any:
    """The decoded message, with the fields of the ROS class. UserError if the bytes do not fit the type, or
    are more than LARGEST_PLAIN and no image."""
    if len(record.data) > LARGEST_PLAIN and record.type not in IMAGES:
        raise UserError(
            f"{record.topic}: {len(record.data)} bytes are more than the {LARGEST_PLAIN} that are read of a "
            f"{record.type}"
        )
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
