"""The report of a replay: one HTML page without links, and the same figures for JSON."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from deer_vla_ros.bag.run import Result, Step
from deer_vla_ros.control.types import HoldReason

FULL_DEPTH = "full depth"
NEAR_NS = 50_000_000
"""Half a period of 10 Hz. A target from a policy has a frame's stamp; another target has its own."""
COLOURS = ("#0d9488", "#d97706", "#7c3aed", "#dc2626", "#2563eb", "#65a30d")


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
        "steps_held": sum(step.held for step in steps),
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
        *(_section(result, reference, colour) for result, colour in zip(results, COLOURS * len(results))),
        _left_out(rows),
    ]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style>" + "".join(parts)
    )


STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#1f2937}"
    "table{border-collapse:collapse;margin:1em 0}"
    "td,th{padding:.3em .8em;border-bottom:1px solid #e5e7eb;text-align:right}"
    "td:first-child,th:first-child{text-align:left}img{max-width:100%}"
)


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
    return f"<table>{''.join(lines)}</table>"


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
    return f"<h2>Why the arm was held</h2><table><tr><th>reason</th>{head}</tr>{''.join(lines)}</table>"


def _left_out(rows: list[dict[str, Any]]) -> str:
    lines = sorted({line for row in rows for line in (*row["left_out"], *row["notes"])})
    return (
        f"<h2>Left out</h2><ul>{''.join(f'<li>{html.escape(line)}</li>' for line in lines)}</ul>"
        if lines
        else ""
    )


def _section(result: Result, reference: Result | None, colour: str) -> str:
    picture = base64.b64encode(_picture(result, reference, colour)).decode()
    image = f'<img alt="exits over time" src="data:image/png;base64,{picture}">'
    return f"<h2>{html.escape(result.label)}</h2>{image}"


def _picture(result: Result, reference: Result | None, colour: str) -> bytes:
    """A PNG of the run over time: camera frames, depth of every step with the holds, deviation, tick time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        4, 1, figsize=(11, 6.6), sharex=True, layout="constrained", height_ratios=(1.2, 1.4, 1, 0.8)
    )
    frames, depth, away, wall = axes
    span = max(result.seconds, 1e-9)
    for seconds, image in result.thumbnails:
        frames.imshow(
            image,
            extent=(seconds, seconds + 0.9 * span / max(1, len(result.thumbnails)), 0, 1),
            aspect="auto",
        )
    frames.set(xlim=(0, span), ylim=(0, 1), yticks=[])
    at = [step.seconds for step in result.steps]
    depth.step(at, [step.exit_layer + 1 for step in result.steps], where="post", color=colour, linewidth=1)
    depth.set(
        ylabel="layers run", ylim=(0, result.exits[-1] + 2), yticks=[layer + 1 for layer in result.exits]
    )
    for (begin, _), end in zip(result.holds, _ends(result.holds, result.steps, span)):
        depth.axvspan(begin, end, color="#fca5a5", alpha=0.5, linewidth=0)
    at_both, deviation = deviations(result, reference)
    away.plot(at_both, deviation, color=colour, linewidth=1)
    away.set(ylabel="from full depth" if len(at_both) else "from full depth\n(not measured)")
    wall.plot(at, [step.wall_ms for step in result.steps], color="#6b7280", linewidth=1)
    wall.set(ylabel="tick, ms", xlabel="s (red: the arm is held)")
    for axis in (depth, away, wall):
        axis.grid(alpha=0.3)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    pyplot.close(figure)
    return file.getvalue()


def _ends(holds: list[tuple[float, tuple[HoldReason, ...]]], steps: list[Step], span: float) -> list[float]:
    """When each hold ended [s]: at the next hold, or at the next step that moved the arm."""
    moving = np.array([step.seconds for step in steps if not step.held])
    begins = [begin for begin, _ in holds]
    ends = []
    for begin, following in zip(begins, [*begins[1:], span]):
        later = moving[moving > begin]
        ends.append(min(following, float(later[0]) if len(later) else span))
    return ends
