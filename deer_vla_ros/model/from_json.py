"""Reading dataclasses from JSON values, with a check of every name and type."""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from typing import Any

from deer_vla_ros.errors import UserError, shown


def from_json(cls: type, values: Any, where: str) -> Any:
    """Makes a dataclass, with nested dataclasses, from JSON values. Lists become tuples,
    and names of objects become numbers where the type says so.

    Messages call the values `where`, which begins with the file. Raises a UserError that names an
    unknown or missing key or a wrong type.
    """
    if not isinstance(values, dict):
        raise UserError(f"{where} is {shown(values)}: give an object with the fields of {cls.__name__}")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    unknown = sorted(set(values) - set(fields), key=str)
    missing = sorted(name for name, field in fields.items() if name not in values and _is_required(field))
    if unknown or missing:
        raise UserError(
            f"{where} has unknown keys {shown(unknown)} and lacks {missing}: compare with {cls.__name__}"
        )
    types = typing.get_type_hints(cls)
    return cls(**{name: _value(types[name], value, f"{where}.{name}") for name, value in values.items()})


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _name(kind: type, name: Any) -> Any:
    """A name of a JSON object, which is always text, as a number where numbers are asked for."""
    digits = kind is int and isinstance(name, str) and name.isdecimal() and len(name) < 10
    return int(name) if digits else name


def _value(kind: Any, value: Any, where: str) -> Any:
    if isinstance(kind, types.UnionType):  # configs have no union but `X | None`
        return None if value is None else _value(typing.get_args(kind)[0], value, where)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        if value not in [member.value for member in kind]:
            raise UserError(
                f"{where} is {shown(value)}: use one of {', '.join(str(member.value) for member in kind)}"
            )
        return kind(value)
    if dataclasses.is_dataclass(kind):
        return from_json(kind, value, where)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{where} is {shown(value)}: give a list")
        return tuple(_value(typing.get_args(kind)[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if typing.get_origin(kind) is dict:
        if not isinstance(value, dict):
            raise UserError(f"{where} is {shown(value)}: give an object")
        of_name, of_value = typing.get_args(kind)
        return {
            _value(of_name, _name(of_name, name), where): _value(of_value, item, f"{where}.{name}")
            for name, item in value.items()
        }
    if kind is float and type(value) is int and abs(value) < 1e300:
        return float(value)
    if type(value) is not kind:  # isinstance would accept a bool as an int
        raise UserError(f"{where} is {shown(value)}: give a value of type {kind.__name__}")
    return value
