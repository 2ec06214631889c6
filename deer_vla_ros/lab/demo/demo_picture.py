"""The picture of a demo, `cameras.png`: images of both cameras, and how many layers the policy ran."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.patches import Patch

from deer_vla_ros.bag.timeline import instruction_colours
from deer_vla_ros.files import whole_file
from deer_vla_ros.lab.demo.demo_report import PictureMoment, depth_of, seconds_of

COLUMNS = 6
"""Moments per band: at the width of a README, six images in a row can still be recognised."""
DPI = 110
BAND_HEIGHT, CAPTION_HEIGHT = 4.3, 0.8
"""The height of a band, which has two rows of square images, and of the captions in it [inch]."""
INSTRUCTION_WIDTH = 25
"""The number of characters that fit under an image; a longer text continues on a second line."""
INK, FAINT = "#1f2933", "#7b8794"


def draw(
    rows: list[dict[str, Any]], moments: list[PictureMoment], weights: dict[str, Any], path: Path
) -> None:
    """Writes the picture: bands of moments, with the static camera above the gripper camera, then the depth
    of every step.

    rows: all steps, at least one (see demo_report). weights: the content of the checkpoint's `config.json`.
    path: the PNG file.
    """
    colours = instruction_colours(row["instruction"] for row in rows)
    began_s = seconds_of(rows[0]["header"]["stamp"])
    moments = whole_bands(moments)
    bands = -(-len(moments) // COLUMNS)
    heights = [BAND_HEIGHT] * bands + [1.5]
    figure = Figure(figsize=(11.6, sum(heights) + 0.75), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    total = sum(heights) + 0.75
    figure.text(0.055, 1 - 0.3 / total, _title(rows), fontsize=13, color=INK, weight="bold", va="center")
    figure.text(
        0.055, 1 - 0.54 / total, f"weights: {weights['weights']}", fontsize=9, color=FAINT, va="center"
    )
    top = 1 - 0.75 / total
    for band in range(bands):
        bottom = top - heights[band] / total
        grid = GridSpec(
            2,
            COLUMNS,
            figure,
            left=0.055,
            right=0.985,
            top=top,
            bottom=bottom + CAPTION_HEIGHT / total,
            hspace=0.03,
            wspace=0.05,
        )
        for column, moment in enumerate(moments[band * COLUMNS : (band + 1) * COLUMNS]):
            _draw_moment(figure, grid, column, moment, began_s, colours[moment.row["instruction"]])
        top = bottom
    _draw_depth(figure.add_axes((0.055, 0.45 / total, 0.93, 0.95 / total)), rows, moments, began_s, colours)
    with whole_file(path) as scratch:
        figure.savefig(scratch, dpi=DPI)


def whole_bands(moments: list[PictureMoment]) -> list[PictureMoment]:
    """Selects moments that fill whole bands, with the first and the last; all if fewer than a band."""
    kept = len(moments) // COLUMNS * COLUMNS or len(moments)
    return [moments[round(place)] for place in np.linspace(0, len(moments) - 1, kept)]


def _title(rows: list[dict[str, Any]]) -> str:
    share = sum(row["language_gmac"] for row in rows) / sum(row["language_gmac_full"] for row in rows)
    return f"{len(rows)} steps of closed-loop control, {share:.0%} of the full-depth language MACs"


def _draw_moment(
    figure: Figure, grid: GridSpec, column: int, moment: PictureMoment, began_s: float, colour: str
) -> None:
    row = moment.row
    for line, (image, name) in enumerate(
        ((moment.static, "static camera"), (moment.gripper, "gripper camera"))
    ):
        axes = figure.add_subplot(grid[line, column])
        axes.imshow(image, interpolation="lanczos", aspect="equal")
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set(color=colour, linewidth=2)
        if column == 0:
            axes.set_ylabel(name, fontsize=9, color=FAINT)
    depth = row["exit_layers"][-1] + 1
    below = dict(transform=axes.transAxes, ha="center", va="top")
    axes.text(
        0.5,
        -0.03,
        f"exit {row['exit_index'] + 1}: {row['layers_run']} of {depth} layers",
        fontsize=10,
        color=INK,
        **below,
    )
    seconds = seconds_of(row["header"]["stamp"]) - began_s
    axes.text(
        0.5,
        -0.13,
        f"step {row['step']}, {seconds:.1f} s, {row['total_ms']:.0f} ms",
        fontsize=8,
        color=FAINT,
        **below,
    )
    instruction = "\n".join(
        textwrap.wrap(row["instruction"], INSTRUCTION_WIDTH, max_lines=2, placeholder=" …")
    )
    axes.text(0.5, -0.22, instruction, fontsize=8, color=colour, weight="bold", linespacing=1.1, **below)


def _draw_depth(
    axes: Any,
    rows: list[dict[str, Any]],
    moments: list[PictureMoment],
    began_s: float,
    colours: dict[str, str],
) -> None:
    """Draws the depth of every step over time, with a ring for each moment above."""
    for row in rows:
        seconds = seconds_of(row["header"]["stamp"]) - began_s
        axes.bar(seconds, depth_of(row) + 1, width=0.075, color=colours[row["instruction"]], alpha=0.75)
    ringed = [moment.row for moment in moments]
    axes.scatter(
        [seconds_of(row["header"]["stamp"]) - began_s for row in ringed],
        [depth_of(row) + 1 for row in ringed],
        s=22,
        facecolor="white",
        edgecolor=INK,
        zorder=3,
    )
    layers = [layer + 1 for layer in rows[0]["exit_layers"]]
    axes.set(
        yticks=layers,
        ylim=(0, layers[-1] + 1),
        xlim=(-0.15, seconds_of(rows[-1]["header"]["stamp"]) - began_s + 0.15),
    )
    axes.set_ylabel("layers run", fontsize=9, color=FAINT)
    axes.set_xlabel("seconds since the first step", fontsize=9, color=FAINT, labelpad=1)
    axes.tick_params(labelsize=8, colors=FAINT, length=2)
    axes.grid(axis="y", color="#e4e7eb", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    handles = [Patch(color=colour, label=text) for text, colour in colours.items()]
    axes.legend(
        handles=handles,
        loc="lower right",
        bbox_to_anchor=(1, 1),
        ncols=len(handles),
        fontsize=8,
        frameon=False,
        borderaxespad=0,
    )
