"""The JSON-lines file of an unfinished evaluation: it keeps the finished parts if the process is killed."""

from __future__ import annotations

import fcntl
import json
import os
from io import FileIO
from pathlib import Path
from typing import Any

from deer_vla_ros.errors import UserError, cause, shown
from deer_vla_ros.files import writing
from deer_vla_ros.untrusted import parse_json, read_bytes

MOST_BYTES = 128 * 2**20
"""The largest file that is read."""


class ResumeFile:
    """The first line holds `arguments`, on which all results depend; every other line is [key, value] of a
    finished part.

    `done` maps the key of every finished part to its value. The object holds a lock on the file until
    `remove` or the end of the process, so that no other run uses it.

    The constructor raises UserError if the file has other arguments, is damaged, or belongs to a run that
    goes on. It drops an incomplete last line, which a killed process may leave; the caller then runs that
    part again.
    """

    def __init__(self, path: Path, arguments: dict[str, Any]):
        self._path = path
        self.done: dict[str, Any] = {}
        self._file = _locked(path)
        is_new = path.stat().st_size == 0
        try:
            self._read(json.dumps(arguments))
        except BaseException:
            if is_new:
                path.unlink()
            self._file.close()
            raise

    def _read(self, header: str) -> None:
        """Reads what an interrupted run has left. Writes the first line if there is none."""
        path = self._path
        content = read_bytes(path, MOST_BYTES, "delete it")
        lines = content.decode(errors="replace").split("\n")[:-1]
        if not lines and not header.encode().startswith(content):
            raise _damaged(path, 1, "the line has no end, and is not the first line that this run writes")
        if lines:
            _check(path, _parsed(path, 1, lines[0], dict), json.loads(header))
            for number, line in enumerate(lines[1:], start=2):
                part = _parsed(path, number, line, list)
                if len(part) != 2 or not isinstance(part[0], str):
                    raise _damaged(path, number, "no key and value")
                self.done[part[0]] = part[1]
        with writing(path):
            self._file.truncate(content.rfind(b"\n") + 1)
            if not lines:
                self._write(header)

    def add(self, key: str, value: Any) -> None:
        """Adds a finished part. It is on the disk when this returns."""
        with writing(self._path):
            self._write(json.dumps([key, value]))

    def remove(self) -> None:
        """Deletes the file, after the whole evaluation is finished."""
        self._path.unlink()
        self._file.close()

    def _write(self, line: str) -> None:
        left = line.encode() + b"\n"
        while left:
            left = left[self._file.write(left) :]
        os.fsync(self._file.fileno())


def _locked(path: Path) -> FileIO:
    """The file, made if it was not there, for this process alone until it is closed. Raises UserError."""
    while True:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("ab", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise UserError(
                f"{path} belongs to a run that goes on now: wait for its end, or give another file"
            ) from None
        except OSError:
            return file  # A file system without locks, as those of clusters can be.
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()  # A run that has just ended has deleted it.


def _parsed(path: Path, number: int, line: str, kind: type) -> Any:
    """The value of a line. Raises UserError if it is not JSON of this kind."""
    try:
        value = parse_json(line, MOST_BYTES)
    except ValueError as error:
        raise _damaged(path, number, cause(error)) from error
    if not isinstance(value, kind):
        raise _damaged(path, number, f"{shown(value)} is no {kind.__name__}")
    return value


def _damaged(path: Path, number: int, why: str) -> UserError:
    return UserError(
        f"{path}: line {number} is damaged ({why}): delete the file, and everything is run again"
    )


def _check(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    if found != wanted:
        there, now = ({name: shown(value) for name, value in each.items()} for each in (found, wanted))
        names = [
            name
            for name in sorted({*found, *wanted})
            if not (name in found and name in wanted and found[name] == wanted[name])
        ]
        first, *others = (" ".join(name.split())[:100] for name in names)
        raise UserError(
            f"{path} is of an interrupted run with other arguments "
            f"({first}: {there.get(names[0], 'nothing')} there, {now.get(names[0], 'nothing')} now"
            f"{', and ' + ', '.join(others)[:200] if others else ''}): "
            "repeat that run to finish it, or delete the file"
        )
