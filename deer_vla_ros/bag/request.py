"""Makes the request for a replay from a person's options, and checks them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deer_vla_ros.bag.input_topics import recorded_parameters
from deer_vla_ros.bag.parameter_events import MS_BUDGETS
from deer_vla_ros.bag.run import Request, topics_read
from deer_vla_ros.budget.latency import TABLE, LatencyTable
from deer_vla_ros.budget.types import AVERAGES, PEAKS, amounts_of
from deer_vla_ros.model.checkpoint import folder_of
from deer_vla_ros.ros import parameters


def request(
    bag: Path,
    params: Path | None = None,
    budget: str = "",
    topics: Mapping[str, str] | None = None,
    instruction: str | None = None,
    clock: str = "receive",
    start_s: float = 0.0,
    duration_s: float | None = None,
    latency_table: Path | str | None = None,
    follow: bool = False,
    with_inputs: bool = True,
    node: str = "",
) -> Request:
    """The request for one run. Raises UserError for what the node would refuse.

    params: the node's parameter file; None: its defaults. budget: NAME=VALUE, several with commas between; it
    replaces the budget of the parameters, and recorded changes of budgets then have no effect. latency_table:
    None takes the checkpoint folder's, if a budget needs one. node: as in `Request`. The sections of the
    parameter file count that match this node, or else the node of the recording. The other arguments are as
    in `Request`.
    """
    node = parameters.full_name(node) if node else ""
    given = recorded_parameters(params, [bag], topics or {}, topics_read(instruction, follow), node)
    if budget:
        parts = [part.removeprefix("budget.") for part in budget.split(",")]
        asked = {
            f"budget.{name}": value
            for name, value in amounts_of(parts, (*AVERAGES, *PEAKS), "--budget").items()
        }
        given = parameters.with_defaults({**given, **no_budget(), **asked}, f"--budget {budget}")
    stored = folder_of(given["model.path"]) / TABLE
    if latency_table is None and any(given[name] for name in MS_BUDGETS) and stored.is_file():
        latency_table = stored
    return Request(
        bag=bag,
        given=given,
        topics=topics or {},
        clock=clock,
        start_s=start_s,
        duration_s=duration_s,
        instruction=instruction,
        follow=follow,
        keep=("budget.",) if budget else (),
        latencies=LatencyTable.load(Path(latency_table)) if latency_table else None,
        with_inputs=with_inputs,
        node=node,
    )


def no_budget() -> dict[str, Any]:
    """The values of the budget parameters that set no limit."""
    return dict.fromkeys((f"budget.{name}" for name in (*AVERAGES, *PEAKS)), 0.0)
