"""Reading of files that other people made: JSON, YAML and numpy arrays.

Sizes are checked before memory is taken, and no pickle is read. Any fault is a UserError of one line.
"""

from __future__ import annotations

import json
import math
import os
import re
import zipfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import yaml

from deer_vla_ros.errors import UserError, cause, shown

MOST_JSON = 2**20
"""The most bytes of a JSON document. In memory, an object takes 50 times what it takes in the file."""
MOST_ARRAY = 512 * 2**20
"""The most bytes of one array that is read at once."""
YAML_BYTES, YAML_NODES, YAML_DEPTH = 1_000_000, 100_000, 32
"""The most that `read_yaml` takes: the size of a file, the number of values in it when every alias is
replaced by what it stands for, and how deep values are nested."""
LFS_POINTER = b"version https://git-lfs"
"""The beginning of the small text that Git LFS leaves in place of a file that it has not fetched."""
HTML = (b"<!doctype html", b"<html")
"""The beginning of a page of a server that was saved in place of a file, in lower case."""
YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
KINDS = ("b1", "u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8")
"""The number types of arrays that are read."""

_HEADER = re.compile(
    rb"\{'descr': '([<|])(\w\w)', 'fortran_order': (False|True), "
    rb"'shape': \(((?:\d{1,18}, ?)*(?:\d{1,18})?)\), \}\s*"
)
"""As every version of numpy writes it for numbers. numpy itself also reads records and dates, which are not
needed here."""


def first_bytes(path: Path) -> bytes:
    """The first 64 bytes of a file. Raises OSError."""
    with open(path, "rb") as file:
        return file.read(64)


def stand_in_of(path: Path) -> str | None:
    """What a file is that stands in place of the real one, with the remedy, as the end of a sentence; None if
    it does not. Raises OSError if it cannot be read."""
    begin = first_bytes(path)
    if begin.startswith(LFS_POINTER):
        return "is a pointer of Git LFS, not the file itself: run `git lfs pull` in its folder"
    if begin.lstrip().lower().startswith(HTML):
        return "is a web page, not the file itself: download the file itself"
    return None


def check_fetched(path: Path) -> None:
    """Raises UserError if something stands in place of this file, see `stand_in_of`, and OSError."""
    if stand_in := stand_in_of(path):
        raise UserError(f"{path} {stand_in}")


def read_bytes(path: Path, most: int, remedy: str) -> bytes:
    """The content of a file. Raises UserError, with the remedy, if it cannot be read or has over `most`
    bytes, or if something stands in its place."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > most:
                raise UserError(f"{path} has {size} bytes, and {most} are the most that is read: {remedy}")
            content = file.read(most)
        check_fetched(path)
        return content
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {remedy}") from error


def read_json(path: Path, remedy: str) -> Any:
    """The values of a JSON file. Raises UserError, with the remedy, as `read_bytes` and if it is no JSON."""
    content = read_bytes(path, MOST_JSON, remedy)
    try:
        return parse_json(content)
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({cause(error)}): {remedy}") from error


def parse_json(content: bytes | str, most: int = MOST_JSON) -> Any:
    """The values of a JSON text; NaN and Infinity are read as Python writes them.

    Raises ValueError for everything else that is not JSON, for an object with the same key twice, and for a
    text that is longer than `most`.
    """
    if len(content) > most:
        raise ValueError(f"its length is {len(content)}, and {most} is the most")
    try:
        return json.loads(content, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError if it has the same key twice: only the last one would count."""
    values = dict(pairs)
    if len(values) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise ValueError(f"the key {shown(max(counts, key=counts.get))} stands twice")
    return values


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
    return parse_yaml(text, path, example)


def parse_yaml(text: str, path: Path, example: str) -> Any:
    """The values of a YAML text, which is the content of `path`. Raises UserError as `read_yaml`."""
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


def read_header(file: BinaryIO) -> tuple[np.dtype, tuple[int, ...], bool]:
    """Type, shape and Fortran order of the array in a .npy file, which is then read up to its numbers.

    Raises ValueError if it is no array of numbers.
    """
    begin = file.read(8)
    if begin[:6] != b"\x93NUMPY" or len(begin) < 8:
        raise ValueError("it does not begin as numpy's files do")
    length = int.from_bytes(file.read(2 if begin[6] == 1 else 4), "little")
    if length > 2**16:
        raise ValueError(f"a header of {length} bytes")
    header = _HEADER.fullmatch(file.read(length))
    if header is None or header[2].decode() not in KINDS:
        raise ValueError("its header is not that of an array of numbers")
    shape = tuple(int(part) for part in header[4].split(b",") if part.strip())
    if len(shape) > 8:
        raise ValueError(f"an array of {len(shape)} axes")
    return np.dtype((header[1] + header[2]).decode()), shape, header[3] == b"True"


def read_array(file: BinaryIO, most: int = MOST_ARRAY) -> np.ndarray:
    """The array of a .npy file. Raises ValueError if it is no array of numbers, is cut short, or has over
    `most` bytes."""
    kind, shape, is_fortran = read_header(file)
    size = math.prod(shape) * kind.itemsize
    if size > most:
        raise ValueError(f"an array {shape} of {size} bytes, and {most} are the most that is read")
    content = file.read(size)
    if len(content) < size:
        raise ValueError(f"cut short: {len(content)} of {size} bytes")
    return np.frombuffer(bytearray(content), kind).reshape(shape, order="F" if is_fortran else "C")


def map_array(path: Path) -> np.ndarray:
    """The array of a .npy file, which stays on disk until it is read. Raises OSError, ValueError as
    `read_header`, and UserError as `check_fetched`."""
    check_fetched(path)
    with open(path, "rb") as file:
        kind, shape, is_fortran = read_header(file)
        size, begin = math.prod(shape) * kind.itemsize, file.tell()
        if os.fstat(file.fileno()).st_size < begin + size:
            raise ValueError(f"cut short: it declares {size} bytes of numbers")
        if not size:  # of which no map can be made
            raise ValueError("an empty array")
        return np.memmap(file, kind, "r", begin, shape, "F" if is_fortran else "C")


def read_npz(path: Path, names: Iterable[str] | None = None, most: int = MOST_ARRAY) -> dict[str, np.ndarray]:
    """Arrays of a .npz file by name: those of `names`, or all.

    Raises FileNotFoundError; UserError as `check_fetched`; ValueError if it is no readable .npz file, if an
    array is missing, or if they have over `most` bytes together.
    """
    arrays: dict[str, np.ndarray] = {}
    check_fetched(path)
    try:
        with zipfile.ZipFile(path) as archive:
            members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
            for name in members if names is None else names:
                if name not in members:
                    raise ValueError(f"it has no {name}")
                # Other compressions reserve memory by what the file says.
                if members[name].compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise ValueError(f"{name} is compressed in another way than numpy does")
                with archive.open(members[name]) as file:
                    arrays[name] = read_array(file, most)
                most -= arrays[name].nbytes
    except Exception as error:  # for arbitrary bytes, zipfile raises many kinds of exceptions
        raise ValueError(cause(error)) from error
    return arrays
