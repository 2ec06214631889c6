"""The report of a soak: its figures, the goals that it missed, and the summary as text."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from deer_vla_ros.lab.percentiles import percentiles
from deer_vla_ros.lab.soak.bench import SILENCE_LIMIT_S
from deer_vla_ros.lab.soak.sampling import Sample
from deer_vla_ros.lab.soak.strike import StrikeOutcome

TOLD = 50
"""The most violations that the report lists."""
WARM_UP_S = 60.0
"""Memory growth is measured after this time: a process fills caches and pools in its first minute."""
STARTING_S = 15.0
"""A process's samples count after this time, when its imports are finished."""
LEAST_S = 240.0
"""The least time after the warm-up for a slope; over less time it would be noise."""
POINTS = 300
"""The most samples for the slope, because it uses every pair of them."""

MOST = (
    ("longest_silence_s", "a silence of", " s", SILENCE_LIMIT_S),
    ("time_to_recover_p50", "a median recovery of", " s", 1.0),
    ("time_to_recover_p95", "a 95th percentile of the recoveries of", " s", 3.0),
    ("memory_growth_percent_per_hour", "the node's memory grew per hour by", "%", 1.0),
)
"""The greatest allowed values of figures."""


@dataclass
class SoakFindings:
    """All results of a soak. summary: the observer's Summary as a dictionary; empty if none came."""

    seed: int
    minutes: float
    outcomes: list[StrikeOutcome] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    broken: list[dict[str, Any]] = field(default_factory=list)
    exceptions: list[str] = field(default_factory=list)
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    left_behind: list[str] = field(default_factory=list)
    interrupted: bool = False


def report(seen: SoakFindings) -> dict[str, Any]:
    """The report that `--json` writes."""
    node = longest_lived(seen.samples.get("node", []))
    growth, reason = growth_percent_per_hour(node)
    restarts = [outcome for outcome in seen.outcomes if outcome.restarted]
    others = [outcome for outcome in seen.outcomes if not outcome.restarted]
    violations = seen.summary.get("violations", [])
    return {
        "seed": seen.seed,
        "minutes": seen.minutes,
        "interrupted": seen.interrupted,
        "faults": dict(sorted(Counter(name for outcome in seen.outcomes for name in outcome.faults).items())),
        "commands": seen.summary.get("commands", 0),
        "motions": seen.summary.get("motions", 0),
        "commands_outside_limits": seen.summary.get("commands_outside_limits", 0),
        "stale_commands": seen.summary.get("stale_commands", 0),
        "longest_silence_s": round(seen.summary.get("longest_silence_s", 0.0), 3),
        "unhandled_exceptions": len(seen.exceptions),
        "exceptions": seen.exceptions,
        "recoveries": {
            "expected": len(seen.outcomes),
            "seen": sum(outcome.recovered_s is not None for outcome in seen.outcomes),
            "missing": [list(outcome.faults) for outcome in seen.outcomes if outcome.recovered_s is None],
        },
        "time_to_recover_p50": percentiles(_times(others))["p50"],
        "time_to_recover_p95": percentiles(_times(others))["p95"],
        "restart_p50": percentiles(_times(restarts))["p50"],
        "broken_promises": len(seen.broken),
        "promises": seen.broken[:TOLD],
        "memory_growth_percent_per_hour": growth,
        "memory_reason": reason,
        "rss_mib": {
            name: spread(samples, lambda each: each.rss_kib / 1024) for name, samples in _lives(seen)
        },
        "node_rss_mib_by_minute": by_minute(node),
        "threads": {name: spread(samples, lambda each: each.threads) for name, samples in _lives(seen)},
        "fds": {name: spread(samples, lambda each: each.fds) for name, samples in _lives(seen)},
        "left_behind": seen.left_behind,
        "observer_stalls": {
            "count": seen.summary.get("stalls", 0),
            "longest_s": round(seen.summary.get("longest_stall_s", 0.0), 3),
        },
        "kinds": dict(Counter(violation["what"] for violation in violations)),
        "violations": [_finite(violation) for violation in violations[:TOLD]],
        "outcomes": [vars(outcome) for outcome in seen.outcomes],
    }


def missed(figures: dict[str, Any]) -> list[str]:
    """The goals that the soak missed, in a few words each."""
    goals = (
        ("commands_outside_limits", "{} commands outside their limits"),
        ("stale_commands", "{} stale commands"),
        ("unhandled_exceptions", "{} unhandled exceptions"),
        ("broken_promises", "{} broken promises"),
    )
    found = [text.format(figures[name]) for name, text in goals if figures[name]]
    found += [
        f"{what} {figures[name]:g}{unit} where {most:g}{unit} are allowed"
        for name, what, unit, most in MOST
        if figures[name] is not None and figures[name] > most
    ]
    if not figures["commands"]:
        found.append("no command was heard")
    recoveries = figures["recoveries"]
    if recoveries["seen"] < recoveries["expected"]:
        found.append(f"{recoveries['seen']} of {recoveries['expected']} recoveries")
    if figures["left_behind"]:
        found.append(f"processes left behind: {', '.join(figures['left_behind'])}")
    return found


def longest_lived(samples: Sequence[Sample]) -> list[Sample]:
    """The samples of the one process that lived longest."""
    lives: dict[int, list[Sample]] = {}
    for each in samples:
        lives.setdefault(each.pid, []).append(each)
    return max(lives.values(), key=lambda life: life[-1].at_s - life[0].at_s, default=[])


def growth_percent_per_hour(life: Sequence[Sample]) -> tuple[float | None, str]:
    """The growth of a process's resident memory after the warm-up [percent of its median per hour].

    It is the Theil-Sen slope (the median slope of all pairs of samples), on which single outliers have no
    effect. Returns None and the reason if the process did not run long enough.
    """
    warm = [each for each in life if each.at_s - life[0].at_s >= WARM_UP_S]
    lived_s = warm[-1].at_s - warm[0].at_s if warm else 0.0
    if lived_s < LEAST_S:
        watched = f"watched for {lived_s:.0f} s after its warm-up"
        return None, f"the longest-living node was {watched}: {LEAST_S:g} s are needed"
    warm = warm[:: math.ceil(len(warm) / POINTS)]
    times = np.array([each.at_s for each in warm])
    sizes = np.array([each.rss_kib for each in warm], dtype=float)
    first, second = np.triu_indices(len(warm), 1)
    slope = float(np.median((sizes[second] - sizes[first]) / (times[second] - times[first])))
    return round(slope * 3600 / float(np.median(sizes)) * 100, 3), ""


def by_minute(life: Sequence[Sample]) -> list[float]:
    """The resident memory [MiB] of one process at the end of each minute of its life."""
    last: dict[int, float] = {}
    for each in life:
        last[int((each.at_s - life[0].at_s) // 60)] = round(each.rss_kib / 1024, 1)
    return list(last.values())


def spread(samples: Sequence[Sample], of) -> dict[str, float]:
    """The first, last and greatest value of `of(sample)` after the process's start."""
    begun = [each for each in samples if each.at_s - samples[0].at_s >= STARTING_S] or samples
    values = [of(each) for each in begun]
    return {"first": round(values[0], 1), "last": round(values[-1], 1), "max": round(max(values), 1)}


def summary_lines(figures: dict[str, Any]) -> list[str]:
    """The report as text, line by line."""
    recoveries = figures["recoveries"]
    growth = figures["memory_growth_percent_per_hour"]
    lines = [
        f"{sum(figures['faults'].values())} faults of {len(figures['faults'])} kinds, seed {figures['seed']}",
        f"{figures['commands']} commands judged, {figures['motions']} of them motions: "
        f"{figures['commands_outside_limits']} outside limits, {figures['stale_commands']} stale",
        f"longest silence {figures['longest_silence_s']:g} s; {figures['unhandled_exceptions']} unhandled "
        f"exceptions; {figures['broken_promises']} broken promises",
        f"{recoveries['seen']} of {recoveries['expected']} recoveries; time to recover p50 "
        f"{figures['time_to_recover_p50']} s, p95 {figures['time_to_recover_p95']} s; "
        f"restart {figures['restart_p50']} s",
        f"memory {figures['memory_reason'] or f'{growth:+g}% per hour'}",
    ]
    counted = Counter(
        (violation["what"], " + ".join(violation["faults"]) or "no fault")
        for violation in figures["violations"]
    )
    lines += [f"  {count} x {what} during {faults}" for (what, faults), count in counted.most_common()]
    lines += [f"  broken: {each['message']}" for each in figures["promises"]]
    lines += [f"  not recovered: {' + '.join(faults)}" for faults in recoveries["missing"]]
    return lines + [f"  exception: {line}" for line in figures["exceptions"][:TOLD]]


def _lives(seen: SoakFindings) -> list[tuple[str, list[Sample]]]:
    """The longest-living process of each kind that was sampled."""
    return [(name, life) for name, samples in seen.samples.items() if (life := longest_lived(samples))]


def _times(outcomes: Sequence[StrikeOutcome]) -> list[float]:
    return [outcome.recovered_s for outcome in outcomes if outcome.recovered_s is not None]


def _finite(violation: dict[str, Any]) -> dict[str, Any]:
    """A violation with None instead of NaN and infinity, which JSON does not have."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in violation.items()
    }
