"""Reads a recording's sqlite3 file in order of time.

rosbags' reader does not see what a killed recorder left in the -wal file, and gives no order to messages of
one time.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator, Set
from pathlib import Path

from rosbags.interfaces import (
    Connection,
    ConnectionExtRosbag2,
    MessageDefinition,
    MessageDefinitionFormat,
)

from deer_vla_ros.bag.inflation import LARGEST
from deer_vla_ros.bag.offered_qos import parsed_qos

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
        with contextlib.closing(self._connect()) as database:
            tables = {
                name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type='table'")
            }
            if not {"topics", "messages"} <= tables:
                raise ValueError("it has no tables of topics and messages")
            definitions = {}
            if "message_definitions" in tables:
                for row in database.execute("SELECT * FROM message_definitions"):
                    form = DEFINITIONS.get(row["encoding"])
                    if form:
                        definitions[row["topic_type"]] = MessageDefinition(
                            form, row["encoded_message_definition"]
                        )
            counts = dict(
                tuple(row)
                for row in database.execute("SELECT topic_id, COUNT(*) FROM messages GROUP BY topic_id")
            )
            first, last = database.execute("SELECT MIN(timestamp), MAX(timestamp) FROM messages").fetchone()
            self.start_ns, self.end_ns = int(first or 0), int(last or 0)
            self.connections = []
            for row in database.execute("SELECT * FROM topics ORDER BY id"):
                fields = dict(row)
                topic, kind, encoding = (
                    str(fields[name]) for name in ("name", "type", "serialization_format")
                )
                count = counts.get(fields["id"], 0)
                if encoding != "cdr":
                    self.foreign[topic] = encoding, count
                    continue
                self.connections.append(
                    Connection(
                        fields["id"],
                        topic,
                        kind,
                        definitions.get(kind, MessageDefinition(MessageDefinitionFormat.NONE, "")),
                        str(fields.get("type_description_hash") or ""),
                        count,
                        ConnectionExtRosbag2(encoding, parsed_qos(fields.get("offered_qos_profiles") or "")),
                        None,
                    )
                )

    def _connect(self) -> sqlite3.Connection:
        database = sqlite3.connect(self._uri, uri=True)
        database.row_factory = sqlite3.Row
        return database

    def messages(self, ids: Set[int], start_ns: int, stop_ns: int) -> Iterator[tuple[int, int, bytes]]:
        """As McapStorage.messages."""
        places = ",".join("?" for _ in ids)
        with contextlib.closing(self._connect()) as database:
            rows = database.execute(
                f"SELECT timestamp, topic_id, CASE WHEN length(data) <= {LARGEST} THEN data END "
                f"FROM messages WHERE topic_id IN ({places}) AND timestamp >= ? AND timestamp < ? "
                "ORDER BY timestamp, id",
                (*ids, start_ns, stop_ns),
            )
            for time_ns, topic, data in rows:
                if not isinstance(time_ns, int) or not isinstance(data, bytes):
                    raise ValueError(f"a message without time or data, or of more than {LARGEST} bytes")
                yield time_ns, topic, data


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
