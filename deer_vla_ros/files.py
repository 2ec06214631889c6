"""Files and folders that a command reads or writes: whole or not at all, and with errors of one line."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from deer_vla_ros.errors import UserError


def read_yaml(path: Path, example: str) -> Any:
    """What is in a YAML file that a person named.

    Raises UserError where it cannot be read or is no YAML; `example` is a file to compare it with.
    """
    try:
        return yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise UserError(f"{path} cannot be read ({reason}): give a file such as {example}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML ({' '.join(str(error).split())})") from error


def write_json(path: Path, report: Any) -> None:
    """Writes `report` as `write_text` writes a text."""
    write_text(path, json.dumps(report, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes `text` in one piece, and makes the folders that lead to it.

    An older file stays as it was when this is interrupted. Devices and pipes (/dev/stdout) are written to,
    they are not replaced. Raises UserError where it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            path.write_text(text)
            return
        with whole_file(path) as scratch:
            scratch.write_text(text)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error}): give another place") from error


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields another path in the same folder, to write the file to. At the end that file takes the place of
    `path` in one step, readable by everybody; after an exception `path` is as it was."""
    scratch = path.with_name(f".{path.stem}.new{path.suffix}")
    try:
        yield scratch
        scratch.chmod(0o644)  # safetensors makes files that only the owner can read
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yields a path of the same name that does not exist yet. The folder that is made there takes the place
    of `path` at the end; after an exception nothing is left.

    What a killed process left of an earlier attempt is removed. Raises UserError where the folder cannot be
    made.
    """
    own = str(os.getpid())
    for old in path.parent.glob(f".{path.name}.partial-*"):
        number = old.name.rpartition("-")[2]
        # Of its own number, too: in a container the next process often has the same.
        if number == own or not Path("/proc", number).exists():
            if (old / "before").exists() and not path.exists():  # it was killed between the two renames
                (old / "before").rename(path)
            shutil.rmtree(old, ignore_errors=True)
    scratch = path.parent / f".{path.name}.partial-{own}"
    try:
        scratch.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{path} cannot be made ({error.strerror}): give another place") from error
    try:
        yield scratch / path.name
        before = scratch / "before"  # it is removed once the new one stands in its place
        try:
            if path.exists():
                path.rename(before)
            (scratch / path.name).rename(path)
        except OSError as error:
            if before.exists():
                before.rename(path)
            raise UserError(f"{path} cannot be replaced ({error.strerror}): give another place") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
