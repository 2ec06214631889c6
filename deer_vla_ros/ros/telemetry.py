"""The node's state for `/diagnostics`: rolling rate and latency, holds, dropped frames, budget."""

from __future__ import annotations

import dataclasses
from collections import deque
from typing import TYPE_CHECKING

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue

from deer_vla_ros.budget.types import AVERAGES, PEAKS, BudgetStatus
from deer_vla_ros.control.types import HoldReason
from deer_vla_ros.ros.conversions import milliseconds
from deer_vla_ros.ros.graph import Neighbours
from deer_vla_ros.ros.messages import SECOND, stamp

if TYPE_CHECKING:
    from deer_vla_ros.budget.budgeted_policy import BudgetedPolicy
    from deer_vla_ros.control.controller import Controller

LATENCY_STEPS = 100
"""Number of newest steps that the latency percentiles cover."""
RATE_NS = 5 * SECOND
"""The rate covers this time [ns]."""
RARE = 0.01
"""Share of the newest steps that may miss a deadline without a warning."""
MAX_STEPS = 1000
"""Steps in RATE_NS at the highest control rate."""


class Telemetry:
    """Keeps publication times and latencies of the newest steps. Its memory does not grow with the episode.

    The control thread adds steps, and the executor's thread reads them.
    """

    def __init__(self) -> None:
        self._published_ns: deque[int] = deque(maxlen=MAX_STEPS)
        self._latency_ms: deque[float] = deque(maxlen=LATENCY_STEPS)
        self.fault = ""

    def note_step(self, stamp_ns: int, published_ns: int) -> None:
        """Adds a step: its newest camera stamp, and the time when its command was published [ns]."""
        self._published_ns.append(published_ns)
        self._latency_ms.append(milliseconds(published_ns - stamp_ns))

    def rate_hz(self, now_ns: int) -> float:
        """Steps per second in the newest RATE_NS; 0 for fewer than two steps."""
        times = [time for time in tuple(self._published_ns) if 0 <= now_ns - time <= RATE_NS]
        span = times[-1] - times[0] if len(times) > 1 else 0
        return (len(times) - 1) * SECOND / span if span > 0 else 0.0

    def diagnostics(
        self, name: str, controller: Controller | None, active: bool, around: Neighbours, now_ns: int
    ) -> DiagnosticArray:
        """The node's status. controller: None while the node is not configured. now_ns: ROS time [ns].

        OK: the node moves the arm. WARN: it holds, or budget or graph have a problem. ERROR: it holds until a
        person clears the hold, or control has failed. STALE: the node is not active.
        """
        level, message = DiagnosticStatus.OK, "controlling"
        if self.fault:
            level, message = DiagnosticStatus.ERROR, f"fault: {self.fault}"
        elif controller is None or not active:
            level, message = DiagnosticStatus.STALE, "not active"
        elif controller.holding:
            level = DiagnosticStatus.ERROR if controller.serious else DiagnosticStatus.WARN
            message = told_hold(controller.holding, controller.serious)
        elif problems := [*budget_problems(controller.policy), *around.problems]:
            level, message = DiagnosticStatus.WARN, "; ".join(problems)
        figures = {f"publishers.{topic}": str(count) for topic, count in around.publishers.items()}
        figures |= {f"problem.{i}": problem for i, problem in enumerate(around.problems)}
        if controller is not None:
            figures |= self._figures(controller, now_ns)
        status = DiagnosticStatus(level=level, name=f"{name}: control", hardware_id=name, message=message)
        status.values = [KeyValue(key=key, value=value) for key, value in figures.items()]
        array = DiagnosticArray(status=[status])
        array.header.stamp = stamp(now_ns)
        return array

    def _figures(self, controller: Controller, now_ns: int) -> dict[str, str]:
        import torch  # the controller has already loaded it

        latency = tuple(self._latency_ms)
        figures = {
            "steps": str(controller.steps),
            "rate_hz": f"{self.rate_hz(now_ns):.2f}",
            "dropped": str(controller.gate.snapshot().dropped),
        }
        if latency:
            for percentile in (50, 95, 99):
                figures[f"stamp_to_publish_ms.p{percentile}"] = f"{np.percentile(latency, percentile):.1f}"
        figures |= {f"holds.{reason.name}": str(count) for reason, count in controller.holds.items()}
        figures |= _budget_figures(controller.policy.status)
        figures |= {
            f"action.{name}": str(value)
            for name, value in dataclasses.asdict(controller.action_space).items()
        }
        if torch.cuda.is_available():
            figures["device_memory_mib"] = f"{torch.cuda.memory_allocated() / 2**20:.0f}"
        return figures


def told_hold(holding: tuple[HoldReason, ...], serious: tuple[HoldReason, ...]) -> str:
    """Text that says why the arm holds and, if the hold does not end by itself, what a person has to do."""
    needs = "; look at the arm, then call ~/hold with false or give another instruction" if serious else ""
    return "holding: " + "; ".join(reason.value for reason in holding) + needs


def budget_problems(policy: BudgetedPolicy) -> list[str]:
    """Reasons why the budget is not kept, one text each."""
    problems, status = [policy.problem] if policy.problem else [], policy.status
    if status.achieved.recent_miss_rate > RARE:
        problems.append(
            f"{status.achieved.recent_miss_rate:.1%} of the newest steps took longer than budget.deadline_ms "
            f"({status.requested.deadline_ms:g} ms)"
        )
    problems += [f"budget.{name} is below the cost of the first exit" for name in status.clamped]
    return problems


def _budget_figures(status: BudgetStatus) -> dict[str, str]:
    """Requested and achieved cost, by key of /diagnostics."""
    done = status.achieved
    figures = {
        f"budget.{name}": f"{value:g}" for name, value in status.requested.active((*AVERAGES, *PEAKS)).items()
    }
    figures |= {
        "budget.achieved_gmac": f"{done.gmac:.4g}",
        "budget.achieved_fraction": f"{done.fraction:.3f}",
        "budget.achieved_ms": f"{done.ms:.1f}",
        "budget.correction": f"{status.correction:.2f}",
        "budget.resident_layers": str(status.resident_layers),
    }
    if status.requested.deadline_ms:
        figures["budget.deadline_misses"] = str(done.deadline_misses)
    return figures
