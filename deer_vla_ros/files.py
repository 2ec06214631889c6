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

from deer_vla_ros.errors import UserError, cause

YAML_BYTES, YAML_NODES, YAML_DEPTH = 1_000_000, 100_000, 32
"""The most that `read_yaml` takes: the size of a file, the number of values in it when every alias is
replaced by what it stands for, and how deep values are nested."""


def read_yaml(path: Path, example: str) -> Any:
    """What is in a YAML file that a person named: dicts, lists and plain values.

    Raises UserError where the file cannot be read, is no YAML, gives a key twice, or exceeds YAML_BYTES,
    YAML_NODES or YAML_DEPTH; the last two are checked before any value is made. `example` is a file to
    compare it with.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(YAML_BYTES + 1)
        if len(data) > YAML_BYTES:
            raise UserError(f"{path}: longer than {YAML_BYTES} bytes: give a file such as {example}")
        text = data.decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise UserError(f"{path} cannot be read ({reason}): give a file such as {example}") from error
    loader = None
    try:
        _check_extent(text, path)
        loader = YAML_LOADER(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check_keys(node, path)
        return loader.construct_document(node)
    except UserError:
        raise
    except Exception as error:  # the constructors of dates and numbers may raise anything
        raise UserError(f"{path}: not YAML ({cause(error)}): compare with {example}") from error
    finally:
        if loader is not None:
            loader.dispose()


YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _check_extent(text: str, path: Path) -> None:
    """Raises UserError if the document exceeds YAML_NODES or YAML_DEPTH, or has an alias in its own value."""
    anchored: dict[str | None, tuple[int, int]] = {}  # by anchor: number of values, and levels of nesting
    unfinished: list[tuple[str | None, int]] = []  # collections: anchor, and number of values before it
    deepest: list[int] = [0]  # levels inside each of `unfinished`; the first is the document's
    count = 0
    for event in yaml.parse(text, Loader=YAML_LOADER):
        where = f"{path}, line {event.start_mark.line + 1}"
        if isinstance(event, yaml.CollectionStartEvent):
            unfinished.append((event.anchor, count))
            deepest.append(0)
            count += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            (anchor, before), levels = unfinished.pop(), deepest.pop() + 1
            anchored[anchor] = count - before, levels
            deepest[-1] = max(deepest[-1], levels)
        elif isinstance(event, yaml.ScalarEvent):
            anchored[event.anchor] = 1, 0
            count += 1
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor in (anchor for anchor, _ in unfinished):
                raise UserError(f"{where}: the alias *{event.anchor[:40]} stands in its own value: remove it")
            values, levels = anchored.get(event.anchor, (1, 0))
            deepest[-1] = max(deepest[-1], levels)
            count += values
        if count > YAML_NODES:
            raise UserError(f"{where}: more than {YAML_NODES} values, aliases included: shorten the file")
        if len(unfinished) + deepest[-1] > YAML_DEPTH:
            raise UserError(f"{where}: values are nested deeper than {YAML_DEPTH}: make them flatter")


def _check_keys(node: yaml.Node, path: Path) -> None:
    """Raises UserError if a mapping in the document has the same key twice: only the last one would count."""
    checked, waiting = set(), [node]
    while waiting:
        node = waiting.pop()
        if id(node) in checked or isinstance(node, yaml.ScalarNode):
            continue
        checked.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
            continue
        keys = set()
        for key, value in node.value:
            name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key)
            if name in keys:
                line = key.start_mark.line + 1
                raise UserError(f"{path}, line {line}: {key.value[:80]!r} stands twice: remove one of them")
            keys.add(name)
            waiting += [key, value]


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
