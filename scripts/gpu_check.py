"""Checks the steps of a full-size network on a GPU against eager steps and goals. See gpu_check.sh."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deer_vla_ros.inference.backend_check import choose
from deer_vla_ros.inference.exit_rule import ExitRule
from deer_vla_ros.inference.policy import DeerPolicy
from deer_vla_ros.inference.residency import ResidentLayers, bytes_held
from deer_vla_ros.inference.types import Observation
from deer_vla_ros.lab.benchmarks.latency_benchmark import INSTRUCTION
from deer_vla_ros.lab.benchmarks.model_benchmark import Subject, random_subject
from deer_vla_ros.lab.benchmarks.step_counts import counted
from deer_vla_ros.model.action_space import CALVIN
from deer_vla_ros.model.checkpoint import Checkpoint, CheckpointInfo, load, save

NEAR = 1e-3
"""A delta this near to its threshold may lead to another exit."""
GOALS = {
    "decisions_that_differ": (0, "of steps whose deltas are not within 1e-3 of a threshold"),
    "host_waits_beyond_exits": (1, "host waits of a step, less the exits that it read"),
    "device_allocations": (0, "of memory, in 200 steps"),
    "device_memory_ratio": (1.1, "of the weights"),
    "reload_p99_over_p50": (1.2, "p99 of steps while layers are loaded, over p50 of steps without"),
    "idle_share": (0.05, "of a step at the paper's mean depth"),
    "language_over_bandwidth": (
        1.25,
        "language part over its bytes / the measured bandwidth, the worst exit",
    ),
    "plain_over_ours": (4.0, "whole step: the plain way over ours at the paper's mean depth; at least"),
}
AT_LEAST = {"plain_over_ours"}


def observations(count: int) -> list[Observation]:
    random = np.random.default_rng(1)
    return [
        Observation(
            *(random.integers(0, 256, (side, side, 3), dtype=np.uint8) for side in (200, 84)),
            np.array([*random.normal(0, 0.3, 3), 0.0, 0.0, 0.0, 1.0]),
        )
        for _ in range(count)
    ]


def check_steps(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that `benchmark model` does not measure."""
    device = torch.device(args.device)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    subject = random_subject(args.preset, None, device, dtype)
    exits = subject.model.config.exits
    never = ExitRule(exits, (-1.0,) * len(exits), subject.delta)
    chosen = choose(args.backend, subject.model, subject.tokenizer, never)
    policy, eager = chosen.policy, DeerPolicy(subject.model, subject.tokenizer, never)
    seen = observations(args.steps)
    weights = sum(tensor.nbytes for tensor in subject.model.state_dict().values())
    return {
        "device": device.type,
        "backend": chosen.backend,
        "backend_report": chosen.report,
        "device_memory_ratio": bytes_held(device) / weights if device.type == "cuda" else None,
        **_decisions(policy, eager, never, seen),
        **_waits(policy, device, never, seen),
        **_allocations(policy, device, never, seen),
        **_early(policy, seen),
        **_reloading(subject, args, seen),
    }


def _decisions(policy: DeerPolicy, eager: DeerPolicy, never: ExitRule, seen: list[Observation]):
    """Steps at thresholds in the middle of the deltas, beside eager steps. A difference begins a new episode,
    because the memories differ after it."""
    eager.reset(INSTRUCTION)
    deltas = np.array([eager.step(each).deltas for each in seen[:20]])
    rule = dataclasses.replace(never, thresholds=(*np.median(deltas, 0)[:-1].tolist(), 1e8))
    for each in (policy, eager):
        each.rule = rule
        each.reset(INSTRUCTION)
    differ = near = 0
    for observation in seen:
        ours, theirs = policy.step(observation), eager.step(observation)
        if ours.exit_index == theirs.exit_index:
            continue
        index = min(ours.exit_index, theirs.exit_index)
        is_near = abs(theirs.deltas[index] - rule.thresholds[index]) <= NEAR
        near, differ = near + is_near, differ + (not is_near)
        for each in (policy, eager):
            each.reset(INSTRUCTION)
    return {"decisions": len(seen), "decisions_that_differ": differ, "decisions_near_a_threshold": near}


def _waits(policy: DeerPolicy, device: torch.device, never: ExitRule, seen: list[Observation]):
    found = []
    for count in range(1, len(never.exits) + 1):
        policy.rule = ExitRule(never.exits[:count], never.thresholds[:count], never.delta)
        policy.step(seen[0])
        counts = counted(device, lambda: policy.step(seen[1]))
        found.append({"exits_read": count, **dataclasses.asdict(counts)})
    return {
        "counts": found,
        "host_waits_beyond_exits": max(each["host_waits"] - each["exits_read"] for each in found),
    }


def _allocations(policy: DeerPolicy, device: torch.device, never: ExitRule, seen: list[Observation]):
    if device.type != "cuda":
        return {"device_allocations": None}
    policy.rule = never
    policy.step(seen[0])
    before = torch.cuda.memory_stats(device)["num_device_alloc"]
    for observation in seen:
        policy.step(observation)
    return {"device_allocations": torch.cuda.memory_stats(device)["num_device_alloc"] - before}


def _early(policy: DeerPolicy, seen: list[Observation]):
    """The time of a step that goes to the deepest exit, without and with launches before the verdict."""
    found = {}
    for early in (False, True, False, True):
        policy.launches_early = early
        times = _times(policy, seen)
        name = "early_p50_ms" if early else "plain_p50_ms"
        found[name] = min(found.get(name, np.inf), float(np.median(times)))
    policy.launches_early = False
    return found


def _times(policy: DeerPolicy, seen: list[Observation]) -> list[float]:
    found = []
    for observation in seen:
        begin = time.perf_counter()
        policy.step(observation)
        found.append((time.perf_counter() - begin) * 1e3)
    return found


def _reloading(subject: Subject, args: argparse.Namespace, seen: list[Observation]):
    """Steps to the second exit, alone and while the deeper layers are loaded again and again."""
    model = subject.model
    exits = model.config.exits
    info = CheckpointInfo(model.config, CALVIN, "random", False, subject.delta, (0.0,) * len(exits))
    with tempfile.TemporaryDirectory(dir=args.json.parent) as folder:
        save(Path(folder), Checkpoint(info, model, subject.tokenizer), "", model.dtype)
        loaded = load(Path(folder), model.device, model.dtype)
        shallow = ExitRule(exits[:2], (-1.0,) * 2, subject.delta)
        policy = choose(args.backend, loaded.model, loaded.tokenizer, shallow).policy
        policy.reset(INSTRUCTION)
        layers = ResidentLayers(loaded.model, Path(folder), policy)
        alone = _times(policy, seen)
        during: list[float] = []
        for _ in range(3):
            layers.keep(exits[1] + 1)
            layers.keep(exits[-1] + 1)
            while layers.count < layers.wanted and len(during) < 5000:
                during += _times(policy, seen[:1])
                layers.absorb()
        layers.close()
    return {
        "alone_p50_ms": float(np.median(alone)),
        "alone_p99_ms": float(np.quantile(alone, 0.99)),
        "reload_p99_ms": float(np.quantile(during, 0.99)),
        "reload_steps": len(during),
        "reload_p99_over_p50": float(np.quantile(during, 0.99) / np.median(alone)),
    }


def judge(steps: dict[str, Any], model: dict[str, Any]) -> bool:
    """Prints every goal with its figure. Returns whether all are met; on a GPU, no figure is a miss."""
    bandwidth = model["rates"]["bytes_per_s"]
    language = [
        row["ms"]["language"]["p50"] / (row["weight_bytes"]["language"] / bandwidth * 1e3)
        for row in model["rows"]
        if row["kind"] == "exit"
    ]
    figures = {
        **steps,
        "idle_share": model["idle_share"],
        "language_over_bandwidth": max(language, default=None),
        "plain_over_ours": model["whole_step_ratio"],
    }
    met = True
    for name, (goal, meaning) in GOALS.items():
        figure = figures[name]
        is_met = figure is not None and (figure >= goal if name in AT_LEAST else figure <= goal)
        told = "not measured here" if figure is None else f"{figure:.3g}"
        relation = ">=" if name in AT_LEAST else "<="
        print(f"{'ok  ' if is_met else 'MISS'} {name}: {told} (goal {relation} {goal:g}): {meaning}")
        met = met and is_met
    if steps["device"] != "cuda":
        print("the goals are those of a GPU: here they only show that the script runs")
        return True
    return met


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="openflamingo_3b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--json", type=Path, default=Path("out/gpu_check/steps.json"))
    parser.add_argument(
        "--goals", nargs=2, type=Path, metavar=("STEPS", "MODEL"), help="only judge two reports"
    )
    args = parser.parse_args()
    if args.goals:
        return 0 if judge(*(json.loads(path.read_text()) for path in args.goals)) else 1
    args.json.parent.mkdir(parents=True, exist_ok=True)
    report = check_steps(args)
    args.json.write_text(json.dumps(report, indent=2))
    print(json.dumps({key: value for key, value in report.items() if key != "counts"}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
