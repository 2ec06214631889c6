"""How does a message lie in a recording? As the bytes that DDS would send: from them, and into them, always the same ones.

(rclpy.serialization leaves bytes at the end that are not part of the message, and differ from run to run.)
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from rosbags.interfaces import Nodetype
from rosbags.typesys import Stores, get_types_from_msg, get_typestore
from rosbags.typesys.store import Typestore

import deer_vla_ros.msg
from deer_vla_ros.errors import UserError

TRAILING = 64
"""Bytes that may follow a message: what recorders written with rclpy's serialize_message leave there."""
NUMPY = {"byte": "uint8", "octet": "uint8", "char": "uint8"}
"""Number types whose names numpy does not share."""


@cache
def types() -> Typestore:
    """ROS 2 Jazzy's message types and this package's."""
    store = get_typestore(Stores.ROS2_JAZZY)
    for path in sorted(_definitions().glob("*.msg")):
        store.register(get_types_from_msg(path.read_text(), f"deer_vla_ros/msg/{path.stem}"))
    return store


def _definitions() -> Path:
    """The folder of this package's .msg files, installed beside the generated classes' prefix."""
    for parent in Path(deer_vla_ros.msg.__file__).parents:
        if (folder := parent / "share" / "deer_vla_ros" / "msg").is_dir():
            return folder
    raise UserError(
        "the message definitions are not installed: run `make build`, or build the workspace again"
    )


def type_of(kind: type) -> str:
    """What a recording calls a ROS message class: package/msg/Name."""
    return f"{kind.__module__.partition('.')[0]}/msg/{kind.__name__}"


def to_cdr(message: Any) -> bytes:
    """A ROS message as CDR bytes."""
    kind = type_of(type(message))
    return bytes(types().serialize_cdr(_plain(message, kind), kind))


def from_cdr(data: bytes, kind: str) -> Any:
    """The message of that type; its fields are those of the ROS class. ValueError, or whatever else a parser raises, for other bytes."""
    if len(data) < 4 or data[0] != 0 or data[1] > 1:
        raise ValueError("no CDR encapsulation")
    definition = types().get_msgdef(kind)
    read = definition.deserialize_cdr_le if data[1] else definition.deserialize_cdr_be
    message, end = read(data[4:], 0, definition.cls, types())
    if not 0 <= len(data) - 4 - end <= TRAILING:
        raise ValueError(f"the message ends after {end + 4} of them")
    return message


def _plain(message: Any, kind: str) -> Any:
    """The message with arrays as the serialiser wants them."""
    values = {name: _value(getattr(message, name), *field) for name, field in types().fielddefs[kind][1]}
    return types().types[kind](**values)


def _value(value: Any, node: Nodetype, detail: Any) -> Any:
    if node == Nodetype.NAME:
        return _plain(value, detail)
    if node == Nodetype.BASE:
        return value
    (inner, inner_detail), _ = detail
    if inner == Nodetype.BASE and inner_detail[0] != "string":
        return np.asarray(value, NUMPY.get(inner_detail[0], inner_detail[0]))
    return [_value(each, inner, inner_detail) for each in value]
