"""The figures of an evaluation: average chain length with its interval, rates by task, cost of the steps."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import numpy as np

from deer_vla_ros.budget.cost import CostTable, cost_table
from deer_vla_ros.lab.scoring.chain_run import Attempt
from deer_vla_ros.lab.scoring.chains import CHAIN_LENGTH
from deer_vla_ros.lab.sim.tasks import TASKS
from deer_vla_ros.model.config import ModelConfig

STATIC_LAYERS = 24
"""Layers of the static model that costs are compared with: RoboFlamingo++ runs this many in every step."""
RESAMPLES = 10_000

Chains = Sequence[Sequence[Attempt]]


def summary(config: ModelConfig, chains: Chains, singles: Chains) -> dict[str, Any]:
    """The figures of an evaluation by name; None for a figure that was not measured.

    lengths: the number of successes of every chain. steps_by_time: how many attempts took more than 0, 1, ...
    steps. Costs are means over the steps of the chains, or of the single instructions if there are no chains.
    They count the language part (the layers that ran) in GMAC, for each instruction's own number of tokens.
    """
    lengths = [sum(attempt.succeeded for attempt in chain) for chain in chains]
    every = [attempt for chain in (*chains, *singles) for attempt in chain]
    alone = [attempt for chain in singles for attempt in chain]
    return {
        "chains": len(chains),
        "average_length": float(np.mean(lengths)) if lengths else None,
        "average_length_ci": list(mean_interval(lengths)) if lengths else None,
        "lengths": lengths,
        "success_by_position": [
            float(np.mean([length > k for length in lengths])) for k in range(CHAIN_LENGTH)
        ]
        if lengths
        else None,
        "tasks": by_task(attempt for chain in chains for attempt in chain),
        "singles": by_task(alone) if alone else None,
        "singles_rate": _mean([attempt.succeeded for attempt in alone]),
        "approached": _mean([attempt.approached for attempt in every if attempt.approached is not None]),
        "phrasing_rates": {
            name: {
                "rate": _mean(found := [a.succeeded for a in every if a.held_out == new]),
                "trials": len(found),
            }
            for name, new in (("training", False), ("held_out", True))
        },
        "steps_by_time": [
            sum(attempt.steps > time for attempt in every) for time in range(max(a.steps for a in every))
        ],
        "infeasible": sum(not attempt.feasible for attempt in every),
        **costs(config, [attempt for chain in chains or singles for attempt in chain]),
    }


def mean_interval(values: Sequence[int], level: float = 0.95) -> tuple[float, float]:
    """The percentile bootstrap interval of the mean of `values` (Efron 1979), which are lengths or their
    differences.

    It is the same for the same values: the seed is fixed. level: the interval's confidence, 0..1.
    """
    levels, counts = np.unique(values, return_counts=True)
    drawn = np.random.default_rng(0).multinomial(counts.sum(), counts / counts.sum(), RESAMPLES)
    means = drawn @ levels / counts.sum()
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def by_task(attempts: Iterable[Attempt]) -> dict[str, dict[str, Any]]:
    """For every task that was asked for: success rate, trials, and the share of attempts that approached the
    named block.

    The share is None for a task that names no block.
    """
    attempts, rows = list(attempts), {}
    for task in TASKS:
        own = [attempt for attempt in attempts if attempt.task == task.name]
        if own:
            rows[task.name] = {
                "rate": _mean([attempt.succeeded for attempt in own]),
                "trials": len(own),
                "approached": _mean(
                    [attempt.approached for attempt in own if attempt.approached is not None]
                ),
            }
    return rows


def costs(config: ModelConfig, attempts: Iterable[Attempt]) -> dict[str, Any]:
    """The mean cost of a step's language part [GMAC], and each exit's share of the steps.

    llm_gmac_mean: of the layers that ran. llm_gmac_full: of all layers of this network. llm_gmac_static: of a
    static model of STATIC_LAYERS layers and the same width. All three are for the same instructions. saved:
    llm_gmac_static / llm_gmac_mean.
    """
    static_config = dataclasses.replace(
        config, decoder=dataclasses.replace(config.decoder, layers=STATIC_LAYERS)
    )
    table, static_table = _tables(config), _tables(static_config)
    steps, gmac, full, static, exits = 0, 0.0, 0.0, 0.0, Counter()
    for attempt in attempts:
        steps += attempt.steps
        gmac += sum(
            count * table(attempt.tokens).language(layer + 1) for layer, count in attempt.exits.items()
        )
        full += attempt.steps * table(attempt.tokens).language(config.decoder.layers)
        static += attempt.steps * static_table(attempt.tokens).language(STATIC_LAYERS)
        exits.update(attempt.exits)
    return {
        "steps": steps,
        "llm_gmac_mean": gmac / steps if steps else None,
        "llm_gmac_full": full / steps if steps else None,
        "llm_gmac_static": static / steps if steps else None,
        "saved": static / gmac if gmac else None,
        "exits": list(config.exits),
        "exit_shares": [exits[layer] / steps for layer in config.exits] if steps else None,
    }


def _tables(config: ModelConfig):
    @cache
    def table(tokens: int) -> CostTable:
        return cost_table(config, tokens)

    return table


def _mean(values: Sequence[bool]) -> float | None:
    return float(np.mean(values)) if len(values) else None


def report_text(report: dict[str, Any]) -> str:
    """The report as text."""
    lines = []
    if report["chains"]:
        low, high = report["average_length_ci"]
        rates = "  ".join(f"{rate:.1%}" for rate in report["success_by_position"])
        lines += [
            f"average length {report['average_length']:.2f} of {CHAIN_LENGTH} "
            f"(95% {low:.2f} to {high:.2f}), {report['chains']} chains",
            f"at least 1 to {CHAIN_LENGTH} in a row: {rates}",
        ]
    if report["singles"]:
        lines.append(f"single instructions: {report['singles_rate']:.1%}")
    if report["approached"] is not None:
        lines.append(f"the named block approached: {report['approached']:.1%}")
    if report["infeasible"]:
        lines.append(f"not possible when asked for, counted as failures: {report['infeasible']}")
    for name, found in report["phrasing_rates"].items():
        if found["trials"]:
            lines.append(f"{name.replace('_', '-')} phrasings: {found['rate']:.1%} of {found['trials']}")
    columns = [name for name in ("tasks", "singles") if report[name]]
    lines += [
        "",
        f"{'task':24}" + "".join(f"{'in chains' if name == 'tasks' else 'alone':>20}" for name in columns),
    ]
    for task in TASKS:
        cells = [_cell(report[name].get(task.name)) for name in columns]
        if any(cells):
            lines.append(f"{task.name:24}" + "".join(f"{cell:>20}" for cell in cells))
    if report["llm_gmac_mean"]:
        shares = "  ".join(
            f"{layer + 1}: {share:.0%}" for layer, share in zip(report["exits"], report["exit_shares"])
        )
        lines += [
            "",
            f"language part: {report['llm_gmac_mean']:.4g} GMAC per step, "
            f"a static model of {STATIC_LAYERS} layers "
            f"{report['llm_gmac_static']:.4g}: {report['saved']:.2f} times as much",
            f"steps by layers run: {shares}",
        ]
    return "\n".join(lines)


def _cell(row: dict[str, Any] | None) -> str:
    return f"{row['rate']:.1%} of {row['trials']}" if row else ""
