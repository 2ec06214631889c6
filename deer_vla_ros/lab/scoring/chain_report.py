"""The figures of an evaluation: average chain length with its interval, rates by task and by wording, cost of
the steps."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import numpy as np
from scipy.stats import binomtest

from deer_vla_ros.budget.cost import CostTable, cost_table
from deer_vla_ros.lab.scoring.chain_run import CHAIN_LENGTH, Attempt
from deer_vla_ros.model.config import ModelConfig

STATIC_LAYERS = 24
"""Layers of the static model that costs are compared with: RoboFlamingo++ runs this many in every step."""
RESAMPLES = 10_000

Chains = Sequence[Sequence[Attempt]]


def summary(config: ModelConfig, chains: Chains, singles: Chains, tasks: Sequence[str]) -> dict[str, Any]:
    """The figures of an evaluation by name; None for a figure that was not measured.

    tasks: the order of the tasks in the report. lengths: the number of successes of every chain.
    steps_by_time: how many attempts took more than 0, 1, ... steps. Costs are means over the steps of the
    chains, or of the single instructions if there are no chains. They count the language part (the layers
    that ran) in GMAC, for each instruction's own number of tokens. wordings: `rated` of every group of
    sentences. sentences: `rated` of every sentence that was given alone, in the order of the tasks.
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
        "tasks": by_task((attempt for chain in chains for attempt in chain), tasks),
        "singles": by_task(alone, tasks) if alone else None,
        "singles_rate": _mean([attempt.succeeded for attempt in alone]),
        "approached": _mean([attempt.approached for attempt in every if attempt.approached is not None]),
        "wordings": {name: rated(found) for name, found in _grouped(every, "wording").items()},
        "sentences": by_sentence(alone, tasks),
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


def rate_interval(successes: int, trials: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a success rate (Wilson 1927), if the trials are independent."""
    found = binomtest(successes, trials).proportion_ci(level, method="wilson")
    return float(found.low), float(found.high)


def rated(attempts: Sequence[Attempt]) -> dict[str, Any]:
    """The success rate of these attempts with its 95% interval, their number, and the mean number of layers
    that a step ran (None if no step ran)."""
    succeeded = sum(attempt.succeeded for attempt in attempts)
    return {
        "rate": succeeded / len(attempts),
        "rate_ci": list(rate_interval(succeeded, len(attempts))),
        "trials": len(attempts),
        "layers": _layers(attempts),
    }


def _layers(attempts: Sequence[Attempt]) -> float | None:
    """The mean number of layers that a step ran; None if no step ran."""
    steps = sum(attempt.steps for attempt in attempts)
    layers = sum((layer + 1) * count for attempt in attempts for layer, count in attempt.exits.items())
    return layers / steps if steps else None


def by_sentence(attempts: Iterable[Attempt], tasks: Sequence[str]) -> list[dict[str, Any]]:
    """`rated` of every sentence, with its task and wording, in the order of the tasks."""
    by_task = _grouped(attempts, "task")
    return [
        {"task": task, "wording": wording, "sentence": sentence, **rated(found)}
        for task in tasks
        for wording, own in _grouped(by_task.get(task, ()), "wording").items()
        for sentence, found in _grouped(own, "instruction").items()
    ]


def _grouped(attempts: Iterable[Attempt], name: str) -> dict[str, list[Attempt]]:
    """The attempts by the value of a field, in the order in which the values first occur."""
    groups: dict[str, list[Attempt]] = {}
    for attempt in attempts:
        groups.setdefault(getattr(attempt, name), []).append(attempt)
    return groups


def by_task(attempts: Iterable[Attempt], tasks: Sequence[str]) -> dict[str, dict[str, Any]]:
    """For every task that was asked for: success rate, trials, and the share of attempts that approached the
    named block.

    The share is None for a task that names no block. tasks: the order.
    """
    found = _grouped(attempts, "task")
    return {
        task: {
            "rate": _mean([attempt.succeeded for attempt in found[task]]),
            "trials": len(found[task]),
            "approached": _mean([each.approached for each in found[task] if each.approached is not None]),
        }
        for task in tasks
        if task in found
    }


def costs(config: ModelConfig, attempts: Sequence[Attempt]) -> dict[str, Any]:
    """The mean cost of a step's language part [GMAC], and each exit's share of the steps.

    llm_gmac_mean: of the layers that ran. llm_gmac_full: of all layers of this network. llm_gmac_static: of a
    static model of STATIC_LAYERS layers and the same width. All three are for the same instructions. saved:
    llm_gmac_static / llm_gmac_mean. layers_mean: of all steps. layers_mean_of_successes: of the steps of
    instructions that succeeded, which is what DeeR's own evaluation prints.
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
        "layers_mean": _layers(attempts),
        "layers_mean_of_successes": _layers([each for each in attempts if each.succeeded]),
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
    lines += [f"wording {name}: {_rate_text(found)}" for name, found in report["wordings"].items()]
    columns = [name for name in ("tasks", "singles") if report[name]]
    lines += [
        "",
        f"{'task':24}" + "".join(f"{'in chains' if name == 'tasks' else 'alone':>20}" for name in columns),
    ]
    for task in dict.fromkeys(task for name in columns for task in report[name]):
        cells = [_cell(report[name].get(task)) for name in columns]
        lines.append(f"{task:24}" + "".join(f"{cell:>20}" for cell in cells))
    if report["singles"] and report.get("sentences_sha256"):
        lines += ["", "sentences given alone, in the same states of each task:"]
        lines += [
            f"{each['task']:24}{_rate_text(each)}  {each['wording']}: {each['sentence']}"
            for each in report["sentences"]
        ]
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
            f"layers per step: {report['layers_mean']:.2f}"
            + (
                f", in instructions that succeeded {mean:.2f}"
                if (mean := report["layers_mean_of_successes"])
                else ""
            ),
        ]
    return "\n".join(lines)


def _rate_text(found: dict[str, Any]) -> str:
    low, high = found["rate_ci"]
    depth = f", {found['layers']:.1f} layers per step" if found["layers"] else ""
    return f"{found['rate']:.1%} of {found['trials']} (95% {low:.1%} to {high:.1%}){depth}"


def _cell(row: dict[str, Any] | None) -> str:
    return f"{row['rate']:.1%} of {row['trials']}" if row else ""
