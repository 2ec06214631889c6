"""Decisions as lines of a table, with every field of `PolicyStep`, comparable to the bit."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from rosbags.interfaces import Nodetype

from deer_vla_ros.bag.cdr import types
from deer_vla_ros.errors import UserError, cause
from deer_vla_ros.ros.messages import nanoseconds

STEP_TYPE = "deer_vla_ros/msg/PolicyStep"
TIMINGS = ("preprocess_ms", "vision_ms", "language_ms", "head_ms", "total_ms", "stamp_to_publish_ms")
"""Fields that depend on the speed of the machine, and not on the decision."""
WALL = "wall_ms"
"""The time that a replayed tick really took."""
STAMPS = ("static_stamp", "gripper_stamp", "pose_stamp")
AGES = ("static_age_ms", "gripper_age_ms", "pose_age_ms", "skew_ms")
FIELDS = ("stamp", "frame_id", *(name for name, _ in types().fielddefs[STEP_TYPE][1] if name != "header"))
DECIDED = tuple(name for name in FIELDS if name not in TIMINGS)

Row = dict[str, Any]
"""Values by field name: numbers, text, or lists of either; stamps as integer nanoseconds."""


def row_of(message: Any) -> Row:
    """The row of a `PolicyStep` message that was decoded from a recording."""
    row: Row = {"stamp": nanoseconds(message.header.stamp), "frame_id": message.header.frame_id}
    for name in FIELDS[2:]:
        value = getattr(message, name)
        if name in STAMPS:
            value = nanoseconds(value)
        row[name] = value.tolist() if isinstance(value, np.ndarray) else value
    return row


def text_of(value: Any) -> str:
    """A value as a cell. A float has the digits that give the same float back; spaces separate list items."""
    if isinstance(value, (list, tuple)):
        return " ".join(map(text_of, value))
    return repr(value) if isinstance(value, float) else str(value)


class RowWriter:
    """Writes some fields of rows, as CSV with a header."""

    def __init__(self, file: TextIO, fields: Iterable[str]):
        self._fields = tuple(fields)
        self._writer = csv.writer(file, lineterminator="\n")
        self._writer.writerow(self._fields)

    def write(self, row: Mapping[str, Any]) -> None:
        """Writes one line."""
        self._writer.writerow([text_of(row[name]) for name in self._fields])


def read_rows(path: Path) -> Iterator[Row]:
    """The decisions in a `steps.csv`. Raises UserError for any other file."""
    try:
        with open(path, newline="") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != DECIDED:
                raise UserError(
                    f"{path}: not the decisions of a replay of this version: write it again with --golden "
                    f"{path}"
                )
            for row in reader:
                if len(row) != len(DECIDED) or None in row.values():
                    raise ValueError(f"line {reader.line_num} does not have {len(DECIDED)} cells")
                yield {name: _value(name, text) for name, text in row.items()}
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): write it with --golden {path}") from error
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path}: damaged ({cause(error)}): write it again with --golden {path}") from error


_KINDS = dict(types().fielddefs[STEP_TYPE][1])


def _value(name: str, text: str) -> Any:
    """The inverse of `text_of` for the field `name`."""
    if name == "stamp" or name in STAMPS:
        return _number("int64", text)
    if name == "frame_id":
        return text
    kind, detail = _KINDS[name]
    if kind in (Nodetype.ARRAY, Nodetype.SEQUENCE):
        return [_number(detail[0][1][0], part) for part in text.split()]
    return _number(detail[0], text)


def _number(kind: str, text: str) -> Any:
    if kind == "string":
        return text
    if kind.startswith("float"):
        return float(text)
    if len(text) > 20:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


@dataclass(frozen=True)
class RowDifference:
    """The first field in which two decisions differ. index: of the step, from 0. stamp: its stamp [ns].

    by: how far apart two numbers are; infinite for other values.
    """

    index: int
    stamp: int
    field: str
    ours: Any
    theirs: Any
    by: float

    def __str__(self) -> str:
        far = "" if math.isinf(self.by) else f", {self.by:.3g} apart"
        return (
            f"step {self.index} (stamp {self.stamp / 1e9:.9f}): "
            f"{self.field} is {text_of(self.ours)}, not {text_of(self.theirs)}{far}"
        )


def difference(
    index: int, ours: Row, theirs: Row, tolerance: float, fields: Iterable[str] = DECIDED
) -> RowDifference | None:
    """The first of `fields` in which two decisions differ by more than `tolerance`; None if they agree.

    Whole numbers, text and the lengths of lists have to be equal. NaN equals NaN.
    """
    for name in fields:
        by = _distance(ours[name], theirs[name])
        if by > tolerance:
            return RowDifference(index, ours["stamp"], name, ours[name], theirs[name], by)
    return None


def _distance(ours: Any, theirs: Any) -> float:
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        return max(map(_distance, ours, theirs), default=0.0)
    if isinstance(ours, float) and isinstance(theirs, float):
        if ours == theirs or (math.isnan(ours) and math.isnan(theirs)):
            return 0.0
        return math.inf if math.isnan(ours) or math.isnan(theirs) else abs(ours - theirs)
    return 0.0 if ours == theirs else math.inf
