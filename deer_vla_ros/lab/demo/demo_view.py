"""The text output of a demo: a live table in a terminal, else a line per second; and a summary."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from deer_vla_ros.lab.demo.demo_report import VERDICTS, depth_of, rate_hz

ROWS_SHOWN = 12
RATE_WINDOW = 20
"""The number of steps of which the rate is shown."""
LINE_PERIOD_S = 1.0


class DemoView:
    """The view, a context manager. Call `waiting` before the first step and `running` from then on, at any
    rate.

    seconds: the time of control.
    """

    def __init__(self, seconds: float):
        self.console = Console(highlight=False)
        self._seconds = seconds
        self._live = Live(console=self.console, refresh_per_second=10, transient=True, auto_refresh=False)
        self._line_due = 0.0
        self._said = ""

    def __enter__(self) -> DemoView:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.console.is_terminal:
            self._live.stop()

    def say(self, text: str) -> None:
        """Prints a line that stays."""
        self.console.print(Text(text), soft_wrap=True)

    def waiting(self, what: str, elapsed_s: float) -> None:
        """Shows what the demo waits for, and for how long."""
        if self.console.is_terminal:
            self._live.update(Text(f"{elapsed_s:5.1f} s  waiting for {what}"), refresh=True)
        elif what and what != self._said:
            self._said = what
            self.say(f"waiting for {what}")

    def running(self, rows: list[dict[str, Any]], elapsed_s: float) -> None:
        """Shows the newest steps. rows: all steps so far. elapsed_s: the time since the first one."""
        if self.console.is_terminal:
            bar = ProgressBar(total=self._seconds, completed=min(elapsed_s, self._seconds), width=40)
            line = Table.grid(padding=(0, 2))
            line.add_row(
                bar,
                f"{min(elapsed_s, self._seconds):.1f} of {self._seconds:g} s",
                f"{len(rows)} steps",
                f"{_recent_rate(rows):.1f} steps/s",
            )
            self._live.update(Group(_steps_table(rows[-ROWS_SHOWN:]), line), refresh=True)
        elif rows and time.monotonic() >= self._line_due:
            self._line_due = time.monotonic() + LINE_PERIOD_S
            self.say(step_line(rows))

    def summary(self, summary: dict[str, Any], out: str) -> None:
        """Shows the summary (demo_report.summarise) and the files in the folder `out`."""
        table = Table(title=f"{summary['seconds']:.1f} s of control", show_header=False)
        table.add_column(style="bold")
        table.add_column(overflow="fold")
        for name, text in _facts(summary):
            table.add_row(name, text)
        self.console.print(table)
        self.say(f"{out}/summary.json, steps.jsonl, cameras.png")


def step_line(rows: list[dict[str, Any]]) -> str:
    """The newest step in one line of text."""
    row = rows[-1]
    return (
        f"step {row['step']:4d}  {_recent_rate(rows):4.1f} steps/s  "
        f"exit {row['exit_index'] + 1}/{len(row['exit_layers'])}  "
        f"{row['layers_run']:2d} layers  {agreement(row):24}  {row['total_ms']:5.1f} ms  {row['instruction']}"
    )


def agreement(row: dict[str, Any]) -> str:
    """The reason for the step's exit: its delta against the threshold, or that it was the deepest exit."""
    delta, threshold = row["deltas"][row["exit_index"]], row["thresholds"][row["exit_index"]]
    if depth_of(row) == row["exit_layers"][-1] or delta is None or threshold is None:
        return f"delta {'-' if delta is None else f'{delta:.4f}'}, deepest"
    return f"delta {delta:.4f} {'<=' if delta <= threshold else '> '} {threshold:.4f}"


def _recent_rate(rows: list[dict[str, Any]]) -> float:
    return rate_hz(rows[-RATE_WINDOW:])


def _steps_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="table and policy in closed loop")
    for name, justify in (
        ("step", "right"),
        ("instruction", "left"),
        ("exit", "left"),
        ("layers", "right"),
        ("", "left"),
    ):
        table.add_column(name, justify=justify, no_wrap=True)
    table.add_column("delta : threshold", no_wrap=True)
    table.add_column("ms", justify="right")
    table.add_column("verdict")
    for row in rows:
        exits = len(row["exit_layers"])
        depth = row["exit_layers"][-1] + 1
        bar = Text("█" * row["layers_run"] + "·" * (depth - row["layers_run"]), style="cyan")
        table.add_row(
            str(row["step"]),
            row["instruction"],
            f"{row['exit_index'] + 1} of {exits}",
            f"{row['layers_run']} of {depth}",
            bar,
            agreement(row),
            f"{row['total_ms']:.1f}",
            VERDICTS[row["verdict"]],
        )
    return table


def _facts(summary: dict[str, Any]) -> list[tuple[str, str]]:
    latency = summary["latency_ms"]
    return [
        (
            "steps",
            f"{summary['steps']} at {summary['rate_hz']:.2f} steps/s, "
            f"{summary['lost_steps']} lost, {summary['dropped']} frames dropped",
        ),
        ("first step", f"{summary['first_step_s']:.1f} s after the start"),
        (
            "done",
            f"{summary['done']} of {len(summary['instructions'])} instructions: "
            + ", ".join(
                f"{told['instruction']} ({'' if told['done'] else 'not done, '}{told['steps']} steps)"
                for told in summary["instructions"]
            ),
        ),
        ("exits", "  ".join(f"layer {layer}: {count}" for layer, count in summary["exits"].items())),
        (
            "language MACs",
            f"{summary['macs_fraction']:.0%} of full depth, "
            f"{summary['mean_layers_run']:.1f} layers in the mean",
        ),
        (
            "p50 / p95 ms",
            "  ".join(f"{stage} {value['p50']:.1f} / {value['p95']:.1f}" for stage, value in latency.items()),
        ),
        (
            "holds",
            ", ".join(f"{reason}: {count}" for reason, count in summary["holds"].items())
            or "none since the first instruction",
        ),
        ("guard", ", ".join(f"{name} {count}" for name, count in summary["verdicts"].items())),
        ("weights", summary["weights"]),
    ]
