"""The figures of the latency benchmark: percentiles of the listener's samples, matched by camera stamp."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deer_vla_ros.errors import UserError
from deer_vla_ros.lab.percentiles import percentiles

PERCENTILES = (50, 99)


@dataclass(frozen=True)
class Heard:
    """Everything that the listener received, by camera stamp [ns]. Of several messages with one stamp, the
    first counts.

    relay, command, camera: the time of arrival [ns]. step: the time of arrival [ns], then the node's own
    values of compute time and static_age [ms], and of the layers run.
    """

    relay: dict[int, list[float]]
    command: dict[int, list[float]]
    camera: dict[int, list[float]]
    step: dict[int, list[float]]


@dataclass(frozen=True)
class LatencyRow:
    """The figures of one condition. Each field that ends in `_ms` has the percentiles p50 and p99 [ms],
    except camera_gap_ms.

    relay_ms: from the camera stamp to the arrival of the relay's pose at the listener. relay_alone_ms: the
    same under the same load, before the policy node ran. command_ms: from the camera stamp to the arrival of
    the node's command. compute_ms: the policy's compute time. overhead_ms: command less compute, for each
    sample. It has two parts: arriving_ms, from the stamp to the begin of the control tick; and leaving_ms,
    the rest of that tick and the command's way to the listener.

    p50_ratio, p99_ratio: overhead_ms divided by relay_ms at the same percentile; those that end in `_alone`:
    by relay_alone_ms. layers: the mean of the layers that a step ran. step_rate_hz, camera_rate_hz,
    camera_rate_heard_hz: steps, published frames, and frames that the relay received, per second.
    camera_gap_ms: the longest time between two frames at the publisher.
    """

    condition: str
    cpu_threads: int
    seconds: float
    samples: int
    p50_ratio: float
    p99_ratio: float
    p50_ratio_alone: float
    p99_ratio_alone: float
    relay_alone_ms: dict[str, float]
    relay_ms: dict[str, float]
    command_ms: dict[str, float]
    compute_ms: dict[str, float]
    overhead_ms: dict[str, float]
    arriving_ms: dict[str, float]
    leaving_ms: dict[str, float]
    layers: float
    step_rate_hz: float
    camera_rate_hz: float
    camera_rate_heard_hz: float
    camera_gap_ms: float


GOAL_RATIOS = {"p50": 2.0, "p99": 3.0}
"""The most overhead that the node may have, as a multiple of the relay's time."""
GOAL_STEPS = 0.98
"""The least share of the frames on which the node must step."""


def missed_goals(row: LatencyRow) -> list[str]:
    """What a row misses of the goal, in words."""
    ratios = {"p50": row.p50_ratio, "p99": row.p99_ratio}
    missed = [
        f"the overhead at {name} is {ratio:.2f} x the relay's time, the goal is {GOAL_RATIOS[name]:g} x"
        for name, ratio in ratios.items()
        if not ratio <= GOAL_RATIOS[name]
    ]
    if not row.step_rate_hz >= GOAL_STEPS * row.camera_rate_hz:
        missed.append(f"{row.step_rate_hz:.1f} steps per second of {row.camera_rate_hz:.1f} frames")
    return missed


def read(log: Path) -> Heard:
    """Reads the listener's log so far.

    It skips an incomplete last line, and lines that other code prints to the same log.
    """
    heard = Heard({}, {}, {}, {})
    for line in log.read_text(errors="replace").splitlines(keepends=True):
        if line.startswith('["') and line.endswith("\n"):
            what, stamp, *figures = json.loads(line)
            getattr(heard, what).setdefault(stamp, figures)
    return heard


def row(
    heard: Heard, condition: str, cpu_threads: int, window: tuple[int, int], alone: tuple[int, int]
) -> LatencyRow:
    """The figures of the frames whose stamps lie in `window`, and of the relay alone in the window `alone`.

    window, alone: begin and end [ns]. Raises UserError if no frame came through both node and relay.
    """

    def within(stamps: dict[int, list[float]], window: tuple[int, int] = window) -> list[int]:
        return sorted(stamp for stamp in stamps if window[0] <= stamp < window[1])

    quiet = within(heard.relay, alone)
    stamps = [stamp for stamp in within(heard.step) if stamp in heard.relay and stamp in heard.command]
    if not stamps or not quiet:
        raise UserError(
            f"no frame came through both node and relay while {condition}: "
            "see their logs, or measure for longer than --seconds"
        )
    relay_alone = np.array([heard.relay[stamp][0] - stamp for stamp in quiet]) / 1e6
    relay = np.array([heard.relay[stamp][0] - stamp for stamp in stamps]) / 1e6
    command = np.array([heard.command[stamp][0] - stamp for stamp in stamps]) / 1e6
    compute, static_age, layers = np.array([heard.step[stamp][1:] for stamp in stamps]).T
    overhead = command - compute
    p50, p99 = np.percentile(overhead, PERCENTILES) / np.percentile(relay, PERCENTILES)
    p50_alone, p99_alone = np.percentile(overhead, PERCENTILES) / np.percentile(relay_alone, PERCENTILES)
    seconds = (window[1] - window[0]) / 1e9
    frames = within(heard.camera)
    return LatencyRow(
        condition=condition,
        cpu_threads=cpu_threads,
        seconds=seconds,
        samples=len(stamps),
        p50_ratio=float(p50),
        p99_ratio=float(p99),
        p50_ratio_alone=float(p50_alone),
        p99_ratio_alone=float(p99_alone),
        relay_alone_ms=percentiles(relay_alone, PERCENTILES),
        relay_ms=percentiles(relay, PERCENTILES),
        command_ms=percentiles(command, PERCENTILES),
        compute_ms=percentiles(compute, PERCENTILES),
        overhead_ms=percentiles(overhead, PERCENTILES),
        arriving_ms=percentiles(static_age, PERCENTILES),
        leaving_ms=percentiles(overhead - static_age, PERCENTILES),
        layers=float(layers.mean()),
        step_rate_hz=len(within(heard.step)) / seconds,
        camera_rate_hz=len(frames) / seconds,
        camera_rate_heard_hz=len(within(heard.relay)) / seconds,
        camera_gap_ms=float(np.diff(frames).max(initial=0) / 1e6),
    )
