"""Reads a recording's sqlite3 file in order of time.

rosbags' reader does not see what a killed recorder left in the -wal file, and gives no order to messages of
one time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

import apsw
from rosbags.interfaces import (
    Connection,
    ConnectionExtRosbag2,
    MessageDefinition,
    MessageDefinitionFormat,
)

from deer_vla_ros.bag.inflation import LARGEST

DEFINITIONS = {"ros2msg": MessageDefinitionFormat.MSG, "ros2idl": MessageDefinitionFormat.IDL}


class SqliteStorage:
    """An sqlite3 file; attributes as McapStorage. Raises ValueError or any other error for arbitrary
    bytes."""

    def __init__(self, path: Path):
        self.note, self.foreign = "", {}
        wal = path.with_name(path.name + "-wal")
        # A killed recorder leaves its newest messages in the -wal file.
        has_wal = wal.exists() and wal.stat().st_size > 0
        self._uri = f"{path.absolute().as_uri()}?mode=ro{'' if has_wal else '&immutable=1'}"
        if not has_wal:
            _check_size(path)
        with self._connected() as database:
            tables = {
                name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type='table'")
            }
            if not {"topics", "messages"} <= tables:
                raise ValueError("it has no tables of topics and messages")
            definitions = {}
            for row in _rows(database, "message_definitions") if "message_definitions" in tables else []:
                if form := DEFINITIONS.get(row["encoding"]):
                    text = str(row["encoded_message_definition"])
                    definitions[row["topic_type"]] = MessageDefinition(form, text)
            counts = dict(database.execute("SELECT topic_id, COUNT(*) FROM messages GROUP BY topic_id"))
            first, last, largest = database.execute(
                "SELECT MIN(timestamp), MAX(timestamp), MAX(length(data)) FROM messages"
            ).fetchone()
            if (largest or 0) > LARGEST:
                raise ValueError(f"a message of {largest} bytes; the limit is {LARGEST}")
            self.start_ns, self.end_ns = int(first or 0), int(last or 0)
            self.connections = []
            for row in _rows(database, "topics"):
                number, topic, kind, encoding = (
                    row[name] for name in ("id", "name", "type", "serialization_format")
                )
                count = counts.get(number, 0)
                if encoding != "cdr":
                    self.foreign[topic] = str(encoding), count
                    continue
                self.connections.append(
                    Connection(
                        number,
                        str(topic),
                        str(kind),
                        definitions.get(kind, MessageDefinition(MessageDefinitionFormat.NONE, "")),
                        str(row.get("type_description_hash") or ""),
                        count,
                        ConnectionExtRosbag2(encoding, row.get("offered_qos_profiles") or ""),
                        None,
                    )
                )

    @contextlib.contextmanager
    def _connected(self) -> Iterator[apsw.Connection]:
        database = apsw.Connection(self._uri, flags=apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI)
        try:
            yield database
        finally:
            database.close(True)  # also in the midst of a query

    def messages(self, ids: Set[int], start_ns: int, stop_ns: int) -> Iterator[tuple[int, int, bytes]]:
        """As McapStorage.messages."""
        places = ",".join("?" for _ in ids)
        with self._connected() as database:
            rows = database.execute(
                f"SELECT timestamp, topic_id, data FROM messages WHERE topic_id IN ({places}) "
                "AND timestamp >= ? AND timestamp < ? ORDER BY timestamp, id",
                (*ids, start_ns, stop_ns),
            )
            for time_ns, topic, data in rows:
                if not isinstance(time_ns, int) or not isinstance(data, bytes):
                    raise ValueError("a message without a time or without data")
                yield time_ns, topic, data


def _rows(database: apsw.Connection, table: str) -> Iterator[dict[str, Any]]:
    """The rows of a table by the names of their columns, which differ between versions."""
    cursor = database.execute(f"SELECT * FROM {table}")
    for row in cursor:
        yield {name: value for (name, _), value in zip(cursor.get_description(), row, strict=True)}


def _check_size(path: Path) -> None:
    """Raises ValueError if the file is shorter than its header says. sqlite3 itself sees that only in some
    cases."""
    with open(path, "rb") as file:
        head = file.read(100)
    page_size = int.from_bytes(head[16:18], "big")
    pages, is_valid = int.from_bytes(head[28:32], "big"), head[24:28] == head[92:96]
    size = path.stat().st_size
    promised = pages * (65536 if page_size == 1 else page_size)
    if len(head) < 100 or (is_valid and size < promised):
        raise ValueError(f"it has {size} bytes, and {promised} according to its header")
