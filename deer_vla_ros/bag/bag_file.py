"""Writes a recording, topic by topic: a rosbag2 folder NAME with the MCAP file NAME_0.mcap."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rosbags.interfaces import Connection, Qos
from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer

from deer_vla_ros.bag.cdr import types
from deer_vla_ros.errors import UserError
from deer_vla_ros.files import writing


class BagFile:
    """A new recording; without `close` it has no index. Raises UserError if the folder exists, or where the
    disk refuses it."""

    def __init__(self, folder: Path):
        if folder.exists():
            raise UserError(f"{folder} exists: give the recording another name")
        self._writer = Writer(folder, version=9, storage_plugin=StoragePlugin.MCAP)
        self._writer.set_compression(CompressionMode.STORAGE, CompressionFormat.ZSTD)
        self._folder = folder
        with writing(folder):
            self._writer.open()
            # `ros2 bag reindex` finds only files with a number.
            storage = self._writer.storage
            storage.path = storage.path.rename(folder / f"{folder.name}_0.mcap")
        self._connections: dict[str, Connection] = {}

    def declare(
        self, topic: str, kind: str, definition: tuple[str, str] | None = None, qos: Sequence[Qos] = ()
    ) -> None:
        """Adds a topic. definition: text and hash of its type; None for a type that is installed here."""
        text, digest = definition or (None, None)
        self._connections[topic] = self._writer.add_connection(
            topic, kind, typestore=types(), msgdef=text, rihs01=digest, offered_qos_profiles=qos
        )

    def write(self, topic: str, data: bytes, time_ns: int) -> None:
        """Writes a message of a declared topic, as CDR bytes that were received at `time_ns`."""
        with writing(self._folder):
            self._writer.write(self._connections[topic], time_ns, data)

    def close(self) -> None:
        with writing(self._folder):
            self._writer.close()

    def abort(self) -> None:
        """Ends the recording without an index."""
        self._writer.abort()
