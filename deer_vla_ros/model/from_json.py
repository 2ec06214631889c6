"""Reading dataclasses from JSON values, with a check of every name and type."""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from typing import Any

from deer_vla_ros.errors import UserError


def from_json(cls: type, values: Any, where: str) -> Any:
    """Makes a dataclass, with nested dataclasses, from JSON values. Lists become tuples.

    Messages call the values `where`, which begins with the file. Raises a UserError that names an
    unknown or missing key or a wrong type.
    """
    if not isinstance(values, dict):
        raise UserError(f"{where} is {values!r}: give an object with the fields of {cls.__name__}")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    unknown = sorted(set(values) - set(fields))
    missing = sorted(name for name, field in fields.items() if name not in values and _is_required(field))
    if unknown or missing:
        raise UserError(
            f"{where} has unknown keys {unknown} and lacks {missing}: compare with {cls.__name__}"
        )
    types = typing.get_type_hints(cls)
    return cls(**{name: _value(types[name], value, f"{where}.{name}") for name, value in values.items()})


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _value(kind: Any, value: Any, where: str) -> Any:
    if isinstance(kind, types.UnionType):  # configs have no union but `X | None`
        return None if value is None else _value(typing.get_args(kind)[0], value, where)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        if value not in [member.value for member in kind]:
            raise UserError(
                f"{where} is {value!r}: use one of {', '.join(str(member.value) for member in kind)}"
            )
        return kind(value)
    if dataclasses.is_dataclass(kind):
        return from_json(kind, value, where)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{where} is {value!r}: give a list")
        return tuple(_value(typing.get_args(kind)[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:  # isinstance would accept a bool as an int
        raise UserError(f"{where} is {value!r}: give a value of type {kind.__name__}")
    return value
