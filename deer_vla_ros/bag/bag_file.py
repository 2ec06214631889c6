"""How is a recording written? An MCAP rosbag2 folder, topic by topic; no network in here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rosbags.interfaces import Connection, Qos
from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer

from deer_vla_ros.bag.cdr import types
from deer_vla_ros.errors import UserError


class BagFile:
    """A recording in the making; without `close` it has no index. UserError where the folder is there already or cannot be made."""

    def __init__(self, folder: Path):
        if folder.exists():
            raise UserError(f"{folder} exists: give the recording another name")
        self._writer = Writer(folder, version=9, storage_plugin=StoragePlugin.MCAP)
        self._writer.set_compression(CompressionMode.STORAGE, CompressionFormat.ZSTD)
        try:
            self._writer.open()
        except OSError as error:
            raise UserError(
                f"{folder} cannot be written ({error.strerror}): give the recording another place"
            ) from error
        self._connections: dict[str, Connection] = {}

    def declare(
        self, topic: str, kind: str, definition: tuple[str, str] | None = None, qos: Sequence[Qos] = ()
    ) -> None:
        """A topic; definition: its text and hash, None for a type that is installed here."""
        text, digest = definition or (None, None)
        self._connections[topic] = self._writer.add_connection(
            topic, kind, typestore=types(), msgdef=text, rihs01=digest, offered_qos_profiles=qos
        )

    def write(self, topic: str, data: bytes, time_ns: int) -> None:
        """A message of a declared topic as CDR bytes, received at `time_ns`."""
        self._writer.write(self._connections[topic], time_ns, data)

    def close(self) -> None:
        self._writer.close()

    def abort(self) -> None:
        self._writer.abort()
