"""The report of a replay: one HTML page without links, and the same figures for JSON."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import numpy as np

from deer_vla_ros.bag import timeline
from deer_vla_ros.bag.run import Result
from deer_vla_ros.control.types import HoldReason

FULL_DEPTH = "full depth"
NEAR_NS = 50_000_000
"""Half a period of 10 Hz. A target from a policy has a frame's stamp; another target has its own."""


def summary(result: Result, reference: Result | None) -> dict[str, Any]:
    """A run's figures. reference: the run at full depth, or None. A figure without data is None."""
    steps = result.steps
    exits = np.array([step.exit_layer for step in steps])
    wall = np.array([step.wall_ms for step in steps])
    _, away = deviations(result, reference)
    metres, radians = from_recorded(result)
    notes = list(result.notes)
    if result.recorded_targets and not len(metres):
        notes.append(
            f"none of the {len(result.recorded_targets)} recorded targets is within {NEAR_NS / 1e9:g} s "
            "of a step: not compared"
        )
    return {
        "label": result.label,
        "steps": len(steps),
        "language_gmac_mean": float(np.mean([step.language_gmac for step in steps])),
        "language_gmac_full": float(np.mean([step.language_gmac_full for step in steps])),
        "total_gmac_mean": float(np.mean([step.total_gmac for step in steps])),
        "exit_shares": {str(layer): float((exits == layer).mean()) for layer in result.exits},
        "deviation_from_full_depth": _figures(away),
        "position_from_recorded_m": _figures(metres),
        "rotation_from_recorded_rad": _figures(radians),
        "wall_ms": _figures(wall),
        "steps_held": sum(bool(step.held_for) for step in steps),
        "holds": dict(result.hold_reasons),
        "frames_dropped": result.dropped,
        "parameter_events": result.parameter_events,
        "left_out": result.tally.lines(),
        "notes": notes,
        "seconds": result.seconds,
        "wall_s": result.wall_s,
        "followed_unknown": result.followed.unknown if result.followed else 0,
        "followed_differently": [str(difference) for difference in result.differences],
    }


def deviations(result: Result, reference: Result | None) -> tuple[np.ndarray, np.ndarray]:
    """Times [s] of the steps that both runs took, and how far their actions are from those at full depth.

    The distance is the root mean square over the six pose values of the action.
    """
    full = {step.stamp: step.action for step in reference.steps} if reference else {}
    both = [step for step in result.steps if step.stamp in full]
    away = [np.sqrt(np.mean((step.action.astype(float) - full[step.stamp]) ** 2)) for step in both]
    return np.array([step.seconds for step in both]), np.array(away)


def from_recorded(result: Result) -> tuple[np.ndarray, np.ndarray]:
    """Distances [m] and angles [rad] between the run's targets and the recorded targets.

    A target is compared with the recorded one of the nearest stamp, if that is within NEAR_NS.
    """
    stamps = np.array(sorted(result.recorded_targets), np.int64)
    pairs = []
    for step in result.steps:
        if step.target and len(stamps):
            nearest = int(stamps[np.abs(stamps - step.stamp).argmin()])
            if abs(nearest - step.stamp) <= NEAR_NS:
                pairs.append((step.target, result.recorded_targets[nearest]))
    metres = np.array([np.linalg.norm(ours[0] - theirs[0]) for ours, theirs in pairs])
    radians = np.array([2 * np.arccos(min(1.0, abs(float(ours[1] @ theirs[1])))) for ours, theirs in pairs])
    return metres, radians


def _figures(values: np.ndarray) -> dict[str, float] | None:
    if not len(values):
        return None
    return {
        "mean": float(values.mean()),
        "p50": float(np.median(values)),
        "p99": float(np.quantile(values, 0.99)),
        "max": float(values.max()),
    }


def page(title: str, results: Sequence[Result], rows: list[dict[str, Any]], reference: Result | None) -> str:
    """The report as HTML; rows: the `summary` of each result."""
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p>{results[0].seconds:.1f} s of recording. "
        "Cost counts the language part: decoder and cross-attention layers run.</p>",
        _table(rows),
        _holds(results),
        *(_section(result, reference) for result in results),
        _followed(results),
        _left_out(rows),
    ]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}{timeline.STYLE}</style>"
        f"{''.join(parts)}<script>{timeline.SCRIPT}</script>"
    )


STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:1100px;margin:1.5em auto;padding:0 1em 9em;color:#1f2937}
h1,h2,li{overflow-wrap:anywhere}h1{font-size:1.6em;line-height:1.25}h2{font-size:1.2em;margin:1.6em 0 .5em}
.scroll{overflow-x:auto}table{border-collapse:collapse;margin:1em 0}
td,th{padding:.3em .8em;border-bottom:1px solid #e5e7eb;text-align:right}th{vertical-align:bottom}
td:first-child,th:first-child{padding-left:0;text-align:left}td:first-child{min-width:9em}
td+td{white-space:nowrap}
"""


def _table(rows: list[dict[str, Any]]) -> str:
    def cell(figures: dict[str, float] | None, scale: float = 1.0) -> str:
        return "-" if figures is None else f"{figures['mean'] * scale:.3g} / {figures['max'] * scale:.3g}"

    head = (
        "budget",
        "steps",
        "GMAC per step",
        "share of full depth",
        "from full depth<br>mean / max",
        "from recorded, mm<br>mean / max",
        "tick, ms<br>p50 / p99",
        "holds",
        "× real time",
    )
    body = [
        (
            html.escape(row["label"]),
            row["steps"],
            f"{row['language_gmac_mean']:.4g}",
            f"{row['language_gmac_mean'] / row['language_gmac_full']:.1%}",
            cell(row["deviation_from_full_depth"]),
            cell(row["position_from_recorded_m"], 1e3),
            f"{row['wall_ms']['p50']:.1f} / {row['wall_ms']['p99']:.1f}",
            sum(row["holds"].values()),
            f"{row['seconds'] / max(row['wall_s'], 1e-9):.1f}",
        )
        for row in rows
    ]
    lines = [
        "<tr>" + "".join(f"<{tag}>{value}</{tag}>" for value in line) + "</tr>"
        for tag, line in [("th", head), *(("td", each) for each in body)]
    ]
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def _holds(results: Sequence[Result]) -> str:
    reasons = sorted({name for result in results for name in result.hold_reasons})
    if not reasons:
        return "<p>The arm was never held.</p>"
    head = "".join(f"<th>{html.escape(result.label)}</th>" for result in results)
    lines = [
        f"<tr><td>{html.escape(HoldReason[name].value)}</td>"
        + "".join(f"<td>{result.hold_reasons[name]}</td>" for result in results)
        + "</tr>"
        for name in reasons
    ]
    table = f"<table><tr><th>reason</th>{head}</tr>{''.join(lines)}</table>"
    return f'<h2>Why the arm was held</h2><div class="scroll">{table}</div>'


def _left_out(rows: list[dict[str, Any]]) -> str:
    lines = sorted({line for row in rows for line in (*row["left_out"], *row["notes"])})
    return (
        f"<h2>Left out</h2><ul>{''.join(f'<li>{html.escape(line)}</li>' for line in lines)}</ul>"
        if lines
        else ""
    )


def _followed(results: Sequence[Result]) -> str:
    """How the decisions compare with those of the live node, if its steps were repeated."""
    lines = [
        f"<li>{html.escape(result.label)}: decided as recorded in {result.same} steps, differently in "
        f"{len(result.differences)}, unknown in {result.followed.unknown}"
        + "".join(f"<br>{html.escape(str(difference))}" for difference in result.differences[:3])
        for result in results
        if result.followed
    ]
    return f"<h2>Compared with the recorded steps</h2><ul>{''.join(lines)}</ul>" if lines else ""


def _section(result: Result, reference: Result | None) -> str:
    known = dict(zip(*(values.tolist() for values in deviations(result, reference))))
    away = [known.get(step.seconds) for step in result.steps]
    return f"<h2>{html.escape(result.label)}</h2>{timeline.chart(result, away)}"
