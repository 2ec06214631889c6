"""Conversion between ROS messages and CDR bytes, which DDS sends and recordings keep.

A message always gives the same bytes. (rclpy.serialization adds bytes at the end that are not part of the
message, and differ from run to run.)
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
"""Bytes that may follow a message: recorders that use rclpy's serialize_message leave such bytes."""
NUMPY = {"byte": "uint8", "octet": "uint8", "char": "uint8"}
"""The ROS number types that have other names in numpy."""


@cache
def types() -> Typestore:
    """The message types of ROS 2 Jazzy and of this package. UserError if the latter are not installed."""
    store = get_typestore(Stores.ROS2_JAZZY)
    for path in sorted(_definitions().glob("*.msg")):
        store.register(get_types_from_msg(path.read_text(), f"deer_vla_ros/msg/{path.stem}"))
    return store


def _definitions() -> Path:
    """The folder of this package's installed .msg files, found from the generated Python classes."""
    for parent in Path(deer_vla_ros.msg.__file__).parents:
        if (folder := parent / "share" / "deer_vla_ros" / "msg").is_dir():
            return folder
    raise UserError(
        "the message definitions are not installed: run `make build`, or build the workspace again"
    )


def type_of(kind: type) -> str:
    """The name of a ROS message class in a recording: package/msg/Name."""
    return f"{kind.__module__.partition('.')[0]}/msg/{kind.__name__}"


def to_cdr(message: Any) -> bytes:
    """A ROS message as CDR bytes."""
    kind = type_of(type(message))
    return bytes(types().serialize_cdr(_plain(message, kind), kind))


def from_cdr(data: bytes, kind: str) -> Any:
    """The message of type `kind`, with the fields of the ROS class. Raises ValueError, or any other error of
    the parser, for other bytes."""
    if len(data) < 4 or data[0] != 0 or data[1] > 1:
        raise ValueError("no CDR encapsulation")
    definition = types().get_msgdef(kind)
    read = definition.deserialize_cdr_le if data[1] else definition.deserialize_cdr_be
    message, end = read(data[4:], 0, definition.cls, types())
    if not 0 <= len(data) - 4 - end <= TRAILING:
        raise ValueError(f"the message ends after {end + 4} of them")
    return message


def _plain(message: Any, kind: str) -> Any:
    """The message with the arrays that the serialiser needs."""
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
