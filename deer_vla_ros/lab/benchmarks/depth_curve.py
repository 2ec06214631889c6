"""The depth curve: average chain length in closed loop against the language part's MACs.

It compares the dynamic network, its fixed exits and static networks. Every point is one run of `evaluate` on
the same chains and has a file of its own. A point whose file exists already is not run again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deer_vla_ros.budget.types import Budget
from deer_vla_ros.files import whole_file
from deer_vla_ros.lab.scoring.chain_report import STATIC_LAYERS, mean_interval, report_text
from deer_vla_ros.lab.scoring.evaluation_run import Evaluation, report_of
from deer_vla_ros.lab.scoring.network_driver import ExitChoice
from deer_vla_ros.lab.scoring.table_benchmark import TableBenchmark
from deer_vla_ros.model.checkpoint import load_info
from deer_vla_ros.untrusted import parse_json

FRACTIONS = (0.2, 0.25, 0.3, 0.35, 0.4, 0.5)
"""Average budgets of the dynamic points, as shares of full depth. One more point has the checkpoint's own
thresholds."""
EQUAL_WITHIN = 0.2
"""The margin of equal length [instructions]: the lower end of the 95% interval of the mean difference must be
above minus this."""
KINDS = {"dynamic": "#0d9488", "fixed exit": "#7c3aed", "static network": "#d97706"}


@dataclass(frozen=True)
class Point:
    """One evaluation.

    kind: one of KINDS, or "ablation". label: the point's name within its kind. folder: the checkpoint's
    folder. choice: what decides how many layers run.
    """

    kind: str
    label: str
    folder: Path
    choice: ExitChoice

    @property
    def name(self) -> str:
        """The name of the point's file, without its ending."""
        return f"{self.kind}-{self.label}".translate(str.maketrans(" .:", "-__"))


def points(folder: Path, statics: Iterable[Path], fractions: Iterable[float] = FRACTIONS) -> list[Point]:
    """The points of the curve.

    They are the dynamic network in `folder` under each of `fractions` and at each of its exits, and the
    networks in `statics`, which were trained to run all their layers.
    """
    exits = load_info(folder).model.exits
    return [
        Point("dynamic", "own thresholds", folder, ExitChoice()),
        *(
            Point("dynamic", f"{share:g}", folder, ExitChoice(budget=Budget(average_fraction=share)))
            for share in fractions
        ),
        *(Point("fixed exit", str(layer + 1), folder, ExitChoice(exit_layer=layer)) for layer in exits),
        *(
            Point(
                "static network",
                str(load_info(static).model.decoder.layers),
                static,
                ExitChoice(full_depth=True),
            )
            for static in statics
        ),
    ]


def measure(
    found: Iterable[Point],
    chains: int,
    seed: int,
    jobs: int | None,
    out: Path,
    on_progress: Callable[[str], None],
    phrasings: str = "training",
) -> list[dict]:
    """Returns the figures of every point, and runs the evaluations that have no file in `out` yet.

    chains: the number of chains. jobs: the number of processes; None: one per core. on_progress: gets a line
    of text before each evaluation. phrasings: "training", "held-out" or "both". Raises UserError as
    Evaluation.check and report_of do.
    """
    rows = []
    for point in found:
        wording = "" if phrasings == "training" else f"-{phrasings}"
        path = out / f"{point.name}-{chains}x{seed}{wording}.json"
        asked = Evaluation(point.folder, point.choice, chains, TableBenchmark(seed, phrasings), jobs=jobs)
        if not _is_there(path, asked.identity()):
            on_progress(f"{point.kind} {point.label}")
            asked.check()
            print(f"{point.folder}: {load_info(point.folder).weights}\n{report_text(report_of(asked, path))}")
        report = json.loads(path.read_text())
        kept = (
            "average_length",
            "average_length_ci",
            "lengths",
            "success_by_position",
            "llm_gmac_mean",
            "llm_gmac_static",
            "saved",
            "exit_shares",
            "steps_by_time",
        )
        fraction = report["llm_gmac_mean"] / report["llm_gmac_full"]
        rows.append(
            {
                "kind": point.kind,
                "label": point.label,
                "fraction": fraction,
                **{name: report[name] for name in kept},
            }
        )
    return rows


@dataclass(frozen=True)
class Comparison:
    """The comparison of a row `other` with the cheapest dynamic row of equal length (see `headline`).

    dynamic: that row; None if there is none. difference, difference_ci: by how much its chains are longer
    than the other's, mean and 95% interval over the chains [instructions]. saved: the other's MACs divided by
    those of the dynamic row.
    """

    other: dict[str, Any]
    dynamic: dict[str, Any] | None = None
    difference: float = math.nan
    difference_ci: tuple[float, float] = (math.nan, math.nan)
    saved: float = math.nan

    @property
    def name(self) -> str:
        return f"{self.other['kind']} {self.other['label']}"


def headline(rows: list[dict[str, Any]]) -> list[Comparison]:
    """Compares the dynamic network with the static one of STATIC_LAYERS layers, and with the best fixed exit.

    The best fixed exit is the cheapest one whose chains are as long as those of the static network. The
    result is empty if there is no such static network; it has one entry if no fixed exit is as long.

    A row is as long as another one if the 95% interval of the mean difference of their chain lengths stays
    above -EQUAL_WITHIN and its upper end is not below zero. All points run the same chains, so that the
    differences are taken chain by chain.
    """
    static = next(
        (r for r in rows if r["kind"] == "static network" and r["label"] == str(STATIC_LAYERS)), None
    )
    if static is None:
        return []
    fixed = _cheapest("fixed exit", rows, static)
    return [_compare(rows, other) for other in (static, fixed) if other is not None]


def _compare(rows: list[dict[str, Any]], other: dict[str, Any]) -> Comparison:
    dynamic = _cheapest("dynamic", rows, other)
    if dynamic is None:
        return Comparison(other)
    found = np.subtract(dynamic["lengths"], other["lengths"])
    return Comparison(
        other,
        dynamic,
        float(found.mean()),
        mean_interval(found),
        other["llm_gmac_mean"] / dynamic["llm_gmac_mean"],
    )


def _cheapest(kind: str, rows: list[dict[str, Any]], other: dict[str, Any]) -> dict[str, Any] | None:
    """The row of this kind with the fewest MACs among those that are as long as `other`, or None."""
    equal = (row for row in rows if row["kind"] == kind and _is_as_long(row, other))
    return min(equal, key=lambda row: row["llm_gmac_mean"], default=None)


def _is_as_long(row: dict[str, Any], other: dict[str, Any]) -> bool:
    low, high = mean_interval(np.subtract(row["lengths"], other["lengths"]))
    return low > -EQUAL_WITHIN and high >= 0


def draw(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Writes the plot of the rows' average lengths, with intervals, against their cost as an image file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(figsize=(8, 4.6), layout="constrained")
    for kind, colour in KINDS.items():
        own = sorted((row for row in rows if row["kind"] == kind), key=lambda row: row["llm_gmac_mean"])
        if not own:
            continue
        cost, length = [row["llm_gmac_mean"] * 1e3 for row in own], [row["average_length"] for row in own]
        spread = [
            [row["average_length"] - row["average_length_ci"][0] for row in own],
            [row["average_length_ci"][1] - row["average_length"] for row in own],
        ]
        axes.errorbar(
            cost,
            length,
            spread,
            label=kind,
            color=colour,
            marker="o",
            capsize=3,
            linestyle="-" if kind != "static network" else ":",
        )
        for x, y, row in zip(cost, length, own):
            below = kind == "fixed exit"
            axes.annotate(
                row["label"].replace("own thresholds", "own"),
                (x, y),
                textcoords="offset points",
                xytext=(4, -6) if below else (-4, 5),
                ha="left" if below else "right",
                va="top" if below else "bottom",
                fontsize=7,
                color=colour,
            )
    lowest = min((row["average_length_ci"][0] for row in rows), default=0.0)
    axes.set(
        xscale="log", xlabel="language part, MMAC per step (mean)", ylabel="average length of 5", title=title
    )
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.set_ylim(max(0.0, lowest - 0.5), 5.0)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    with whole_file(path) as scratch:
        figure.savefig(scratch, dpi=110)
    pyplot.close(figure)


def _is_there(path: Path, about: dict[str, Any]) -> bool:
    """Whether the file has the figures of this evaluation. about: everything that the figures depend on."""
    if not path.is_file():
        return False
    try:
        report = parse_json(path.read_bytes())
    except ValueError:
        return False
    return isinstance(report, dict) and all(
        report.get(name) == value for name, value in json.loads(json.dumps(about)).items()
    )
