"""The JSON-lines file of an unfinished evaluation: it keeps the finished parts if the process is killed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from deer_vla_ros.errors import UserError
from deer_vla_ros.files import write_text, writing


class ResumeFile:
    """The first line holds `arguments`, on which all results depend; every other line is [key, value] of a
    finished part.

    `done` maps the key of every finished part to its value. The constructor raises UserError if the file has
    other arguments.
    It drops an incomplete last line, which a killed process may leave; the caller then runs that part again.
    """

    def __init__(self, path: Path, arguments: dict[str, Any]):
        self._path = path
        self.done: dict[str, Any] = {}
        header = json.dumps(arguments)
        lines = path.read_text(errors="replace").split("\n")[:-1] if path.is_file() else []
        if lines:
            _check(path, json.loads(lines[0]), json.loads(header))
            self.done = dict(json.loads(line) for line in lines[1:])
        write_text(path, "".join(line + "\n" for line in lines or [header]))

    def add(self, key: str, value: Any) -> None:
        """Adds a finished part. It is on the disk when this returns."""
        with writing(self._path), self._path.open("a") as file:
            file.write(json.dumps([key, value]) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        """Deletes the file, after the whole evaluation is finished."""
        self._path.unlink()


def _check(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    if found != wanted:
        names = [name for name in sorted({*found, *wanted}) if found.get(name) != wanted.get(name)]
        first = names[0]
        raise UserError(
            f"{path} is of an interrupted run with other arguments "
            f"({first}: {found.get(first)} there, {wanted.get(first)} now"
            f"{', and ' + ', '.join(names[1:]) if names[1:] else ''}): "
            "repeat that run to finish it, or delete the file"
        )
