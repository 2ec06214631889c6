"""Changes to the bytes of a file, as damage or malice makes them. Each takes the bytes and a source of random
numbers, and returns other bytes."""

from __future__ import annotations

import copy
import io
import json
import re
import struct
import zipfile
from collections.abc import Callable
from random import Random
from typing import Any

import yaml
from backports import zstd

Mutation = Callable[[bytes, Random], bytes]

NUMBERS = (0, 1, -1, 7, 127, 255, 65535, 10**6, 10**9, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1)
TEXTS = ("0", "1", "-1", "0.5", "1000000000", "9" * 30, "9" * 5000, "1e308", "1e999", "-0.0", "nan", "inf")
WORDS = (*TEXTS, "", "null", "true", "[]", "{}", "[" * 500, "../../x", "\x00", "\n", '"', "é", "x" * 3000)
VALUES = (
    *(None, True, False, 0, 1, -1, 0.5, 10**9, 2**63, 10**30, 1e308, float("nan"), float("inf"), -1e-320),
    *("", "x", "0", "../../x", "\ud800", "line\nbreak", "x" * 3000, "(a+)+$", "(a|a)*b", "a{1000}{1000}"),
    *([], {}, [[]], [[], [1]], {"x": 1}, {"x": {"y": []}}, [0] * 1000, [None, None, None]),
)
"""What replaces a value of a JSON or YAML document."""


def _place(data: bytes, random: Random) -> int:
    """A position, half of the time near the beginning or the end: headers and indexes are there."""
    near = random.choice((min(len(data), 512), len(data), len(data)))
    at = random.randrange(near + 1)
    return len(data) - at if random.random() < 0.25 else at


def _flip(data: bytes, random: Random) -> bytes:
    changed = bytearray(data)
    for _ in range(random.randint(1, 8)):
        at = _place(data, random)
        if at < len(changed):
            changed[at] ^= 1 << random.randrange(8)
    return bytes(changed)


def _cut(data: bytes, random: Random) -> bytes:
    return data[: _place(data, random)]


def _insert(data: bytes, random: Random) -> bytes:
    at, count = _place(data, random), random.choice((1, 2, 8, 100))
    block = random.choice((random.randbytes(count), b"\x00" * count, b"\xff" * count))
    return data[:at] + block + data[at:]


def _remove(data: bytes, random: Random) -> bytes:
    at = _place(data, random)
    return data[:at] + data[at + random.choice((1, 2, 8, 100, 1000)) :]


def _double(data: bytes, random: Random) -> bytes:
    start, count, at = _place(data, random), random.choice((1, 16, 256, 4096)), _place(data, random)
    return data[:at] + data[start : start + count] * random.choice((1, 1, 2, 50)) + data[at:]


def _number(data: bytes, random: Random) -> bytes:
    """Puts a number at the limits of its type in place of some bytes."""
    at, size = _place(data, random), random.choice((1, 2, 4, 8))
    number = random.choice(NUMBERS) % 2 ** (8 * size)
    return data[:at] + number.to_bytes(size, random.choice(("little", "big"))) + data[at + size :]


def _digits(data: bytes, random: Random) -> bytes:
    """Puts another number in place of one that is written in digits."""
    found = list(re.finditer(rb"-?\d+", data[:20_000]))
    if not found:
        return _number(data, random)
    chosen = random.choice(found)
    return data[: chosen.start()] + random.choice(TEXTS).encode() + data[chosen.end() :]


def raw(data: bytes, random: Random) -> bytes:
    """One to three changes of any file's bytes."""
    for _ in range(random.choice((1, 1, 2, 3))):
        data = random.choice((_flip, _cut, _insert, _remove, _double, _number, _digits))(data, random)
    return data


def text(data: bytes, random: Random) -> bytes:
    """Other words, or lines that are doubled, lost or exchanged, in any text: CSV, JSON, YAML."""
    lines = data.decode(errors="replace").split("\n")
    for _ in range(random.choice((1, 1, 2, 3))):
        at, other = random.randrange(len(lines)), random.randrange(len(lines))
        how = random.randrange(6)
        if how == 0:
            lines.insert(other, lines[at])
        elif how == 1 and len(lines) > 1:
            del lines[at]
        elif how == 2:
            lines[at], lines[other] = lines[other], lines[at]
        else:
            words = re.split(r"([\s,:;\[\]{}\"]+)", lines[at])
            words[random.randrange(len(words))] = random.choice(WORDS)
            lines[at] = "".join(words)
    return "\n".join(lines).encode(errors="replace")


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """Every value of a document as (container, key or index)."""
    found, open_ones = [], [tree]
    while open_ones:
        node = open_ones.pop()
        keys = node.keys() if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        for key in keys:
            found.append((node, key))
            open_ones.append(node[key])
    return found


def tree(document: Any, random: Random) -> Any:
    """A copy of a JSON or YAML document with one to three values or names changed."""
    holder = [copy.deepcopy(document)]
    for _ in range(random.choice((1, 1, 2, 3))):
        places = _places(holder)
        # Long lists do not take all changes: half of them are among the first values.
        node, key = random.choice(places[: random.choice((30, len(places)))])
        how = random.randrange(8)
        if how == 0 and isinstance(node, dict):
            node[random.choice(("", "x", "0", "model", "type"))] = node.pop(key)
        elif how == 1 and node is not holder:
            del node[key]
        elif how == 2 and isinstance(node, list) and node is not holder:
            node.extend(copy.deepcopy(node[key : key + 1]) * random.choice((1, 100)))
        elif how == 3:
            source, name = random.choice(places)
            node[key] = copy.deepcopy(source[name])
        else:
            node[key] = copy.deepcopy(random.choice(VALUES))
    return holder[0]


def json_tree(data: bytes, random: Random) -> bytes:
    return json.dumps(tree(json.loads(data), random)).encode()


def json_line(data: bytes, random: Random) -> bytes:
    """Changes a document in one line of a file of JSON lines."""
    lines = data.rstrip(b"\n").split(b"\n")
    at = random.randrange(len(lines))
    lines[at] = json_tree(lines[at], random)
    return b"\n".join(lines) + b"\n"


def yaml_tree(data: bytes, random: Random) -> bytes:
    """As `json_tree`: JSON is YAML, too. The plain loader and writer would take a tenth of a second."""
    return json.dumps(tree(yaml.load(data, yaml.CSafeLoader), random), default=str).encode()


def safetensors_header(data: bytes, random: Random) -> bytes:
    """Changes the JSON header of a safetensors file; its length is right again, and the tensors stay."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json_tree(data[8 : 8 + length], random)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def safetensors_json(name: str) -> Mutation:
    """Changes the JSON document that a safetensors file keeps as metadata under `name`."""

    def change(data: bytes, random: Random) -> bytes:
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        about = header["__metadata__"]
        about[name] = json_tree(about[name].encode(), random).decode()
        written = json.dumps(header).encode()
        return struct.pack("<Q", len(written)) + written + data[8 + length :]

    return change


def npy_header(data: bytes, random: Random) -> bytes:
    """Changes the shape or type that a .npy file declares; the length of its header is right again."""
    (length,) = struct.unpack("<H", data[8:10])
    header = data[10 : 10 + length].rstrip()
    kinds = (b"'<f4'", b"'|u1'", b"'<i8'", b"'|O'", b"'<U9'", b"'|V0'", b"'<M8[s]'", b"[('a', '<f4')]")
    if random.random() < 0.3:
        header = re.sub(rb"'descr': [^,]*", b"'descr': " + random.choice(kinds), header)
    else:
        header = _digits(header, random)
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return data[:8] + struct.pack("<H", len(header) % 2**16) + header + data[10 + length :]


def zip_member(inner: Mutation) -> Mutation:
    """Changes one member of a zip file, with a right checksum."""

    def change(data: bytes, random: Random) -> bytes:
        with zipfile.ZipFile(io.BytesIO(data)) as old:
            members = {name: old.read(name) for name in old.namelist()}
            kind = old.infolist()[0].compress_type
        chosen = random.choice(list(members))
        members[chosen] = inner(members[chosen], random)
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", kind) as new:
            for name, content in members.items():
                new.writestr(name, content)
        return out.getvalue()

    return change


def compressed(inner: Mutation) -> Mutation:
    """Changes what a zstd file holds."""

    def change(data: bytes, random: Random) -> bytes:
        content = zstd.decompress(data)
        return zstd.compress(inner(content, random), 1)

    return change
