"""The steps of a demo as rows, and their summary. The functions work on plain data, without ROS.

A row is one `~/step` message as a dictionary with the message's field names. `steps.jsonl` has one row a
line.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deer_vla_ros.files import write_text
from deer_vla_ros.lab.percentiles import percentiles

CONTROL_RATE_HZ = 10.0
ENOUGH = 0.9
"""A demo has failed if it has less than this share of the steps that the control rate gives."""
STAGES = {
    "preprocess": "preprocess_ms",
    "vision": "vision_ms",
    "language": "language_ms",
    "head": "head_ms",
    "total": "total_ms",
    "stamp_to_publish": "stamp_to_publish_ms",
}
STOPS = ("agreed", "deepest", "stage")
"""The names of the values of `stop_reason`, in the order of PolicyStep's STOP_ constants."""
VERDICTS = ("accepted", "limited", "held")
"""The names of the values of `verdict`, in the order of PolicyStep's VERDICT_ constants."""
HOLDS = "holds."


@dataclass(frozen=True)
class PictureMoment:
    """A step and the two images on which it acted: (H, W, 3) uint8 RGB."""

    row: dict[str, Any]
    static: np.ndarray
    gripper: np.ndarray


@dataclass
class InstructionResult:
    """An instruction that was given. done: whether the table reported success.

    steps: the number of steps until the success, or until the next instruction.
    """

    instruction: str
    done: bool = False
    steps: int = 0


def row_of(message: Any) -> dict[str, Any]:
    """A ROS message as a dictionary for JSON, nested ones included. NaN and infinity become None."""
    return {name: _plain(getattr(message, name)) for name in message.get_fields_and_field_types()}


def image_array(message: Any) -> np.ndarray:
    """(H, W, 3) uint8 RGB pixels of a sensor_msgs/Image. Raises ValueError if its encoding is not rgb8."""
    if message.encoding != "rgb8":
        raise ValueError(f"encoding '{message.encoding}': the demo draws rgb8")
    rows = np.frombuffer(message.data, np.uint8).reshape(message.height, message.step)
    return rows[:, : 3 * message.width].reshape(message.height, message.width, 3).copy()


def seconds_of(stamp: dict[str, int]) -> float:
    """A row's stamp [s]. The rounding error of a double is less than 1 us at the present time."""
    return stamp["sec"] + stamp["nanosec"] * 1e-9


def depth_of(row: dict[str, Any]) -> int:
    """The layer of the exit that a step took, from 0."""
    return row["exit_layers"][row["exit_index"]]


def rate_hz(rows: list[dict[str, Any]]) -> float:
    """Steps per second by their camera stamps; 0 before the second step."""
    if len(rows) < 2:
        return 0.0
    span = seconds_of(rows[-1]["header"]["stamp"]) - seconds_of(rows[0]["header"]["stamp"])
    return (len(rows) - 1) / span if span > 0 else 0.0


def lost_steps(rows: list[dict[str, Any]]) -> int:
    """The number of steps whose message did not arrive: the gaps in the step numbers, which begin with 0."""
    numbers = [-1] + [row["step"] for row in rows]
    return sum(max(0, later - earlier - 1) for earlier, later in zip(numbers, numbers[1:]))


def verdict_on(rows: list[dict[str, Any]], seconds: float) -> str:
    """One line that says why a demo of `seconds` of control has failed; empty if enough steps came."""
    expected = seconds * CONTROL_RATE_HZ
    if len(rows) >= ENOUGH * expected:
        return ""
    slowest = percentiles(row["total_ms"] for row in rows)["p95"] if rows else math.nan
    return (
        f"{len(rows)} steps in {seconds:g} s, "
        f"at least {math.ceil(ENOUGH * expected)} are expected at {CONTROL_RATE_HZ:g} Hz "
        f"(a step takes up to {slowest:.0f} ms): is something else using the machine?"
    )


def counted_since(before: dict[str, str], after: dict[str, str], prefix: str) -> dict[str, int]:
    """How much the counters of `/diagnostics` rose between two messages.

    Returns the counters that rose and whose key begins with `prefix`, by the rest of the key.
    """
    grown = {
        key: int(value) - int(before.get(key, 0)) for key, value in after.items() if key.startswith(prefix)
    }
    return {key.removeprefix(prefix): count for key, count in grown.items() if count}


def summarise(
    rows: list[dict[str, Any]],
    before: dict[str, str],
    after: dict[str, str],
    told: list[InstructionResult],
    **facts: Any,
) -> dict[str, Any]:
    """The content of `summary.json`.

    rows: at least one step. before, after: the policy node's values in `/diagnostics` when the first
    instruction was given, and after the last step. Holds of the start-up (no instruction, no frame yet)
    therefore do not count. told: the instructions in their order. facts: further entries, which are added as
    they are.
    """
    layers = rows[0]["exit_layers"]
    taken = Counter(depth_of(row) for row in rows)
    stops = Counter(row["stop_reason"] for row in rows)
    verdicts = Counter(row["verdict"] for row in rows)
    full = layers[-1] + 1
    language = sum(row["language_gmac"] for row in rows)
    return {
        "steps": len(rows),
        "rate_hz": round(rate_hz(rows), 3),
        "exits": {str(layer): taken[layer] for layer in layers},
        "exits_readable": {
            (
                f"exit {index + 1} of {len(layers)}, after layer {layer} ({layer + 1} of {full} layers run)"
            ): f"{taken[layer] / len(rows):.1%}"
            for index, layer in enumerate(layers)
        },
        "stops": {name: stops[value] for value, name in enumerate(STOPS)},
        "mean_layers_run": round(sum(row["layers_run"] for row in rows) / len(rows), 3),
        "macs_fraction": round(language / sum(row["language_gmac_full"] for row in rows), 4),
        "language_gmac_mean": round(language / len(rows), 6),
        "latency_ms": {stage: percentiles(row[field] for row in rows) for stage, field in STAGES.items()},
        "holds": counted_since(before, after, HOLDS),
        "dropped": counted_since(before, after, "dropped").get("", 0),
        "lost_steps": lost_steps(rows),
        "verdicts": {name: verdicts[value] for value, name in enumerate(VERDICTS)},
        "limits": dict(Counter(reason for row in rows for reason in row["reasons"]).most_common()),
        "done": sum(each.done for each in told),
        "instructions": [asdict(each) for each in told],
        "episodes": len({row["episode"] for row in rows}),
        **facts,
    }


def write_steps(rows: list[dict[str, Any]], path: Path) -> None:
    """Writes the steps as JSON lines, one line a step."""
    write_text(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))


def write_summary(summary: dict[str, Any], path: Path) -> None:
    """Writes the summary as a JSON file."""
    write_text(path, json.dumps(summary, indent=2, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    if hasattr(value, "get_fields_and_field_types"):
        return row_of(value)
    if isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, np.generic):
        return value.item()
    return [_plain(item) for item in value]
