"""A regression test on a robot's recordings: a golden file of decisions, and the first that differs."""

from __future__ import annotations

import io
from collections.abc import Iterable
from itertools import zip_longest
from pathlib import Path
from typing import Any

from deer_vla_ros.bag.request import request
from deer_vla_ros.bag.rows import DECIDED, Row, RowWriter, difference, read_rows
from deer_vla_ros.bag.run import run
from deer_vla_ros.files import write_text


def compare(rows: Iterable[Row], golden: Path, tolerance: float) -> str:
    """The first decision that differs from the golden file, and by how much; empty if all agree.

    tolerance: see `rows.difference`. Raises UserError if the file is not a readable golden file.
    """
    for index, (ours, theirs) in enumerate(zip_longest(rows, read_rows(golden))):
        if ours is None:
            return (
                f"step {index} (stamp {theirs['stamp'] / 1e9:.9f}): "
                "the golden file has it, the replay ends before"
            )
        if theirs is None:
            return (
                f"step {index} (stamp {ours['stamp'] / 1e9:.9f}): "
                "the replay has it, the golden file ends before"
            )
        if found := difference(index, ours, theirs, tolerance):
            return str(found)
    return ""


def write(rows: Iterable[Row], golden: Path) -> None:
    """Writes decisions to a golden file, which is replaced as a whole."""
    text = io.StringIO(newline="")
    writer = RowWriter(text, DECIDED)
    for row in rows:
        writer.write(row)
    write_text(golden, text.getvalue())


def decisions(bag: Path | str, **how: Any) -> list[Row]:
    """All decisions of the policy on a recording, without times. how: arguments of `request.request`."""
    rows: list[Row] = []
    run(request(Path(bag), **how), "replay", on_row=rows.append)
    return rows


def assert_replays(bag: Path | str, golden: Path | str, tolerance: float = 0.0, **how: Any) -> int:
    """For tests: AssertionError with the first step that differs from a golden file, and by how much.

    Returns how many decisions were compared. tolerance: by how much numbers may differ. 0 is possible on one
    machine with one installation. how: as for `decisions`.
    """
    __tracebackhide__ = True  # pytest shows the caller's line
    rows = decisions(bag, **how)
    differs = compare(rows, Path(golden), tolerance)
    if differs:
        raise AssertionError(f"{bag}: {differs}")
    return len(rows)
