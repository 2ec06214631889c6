"""The overlay picture: cameras, instruction, exit ladder, and the reason why the arm holds."""

from __future__ import annotations

import bisect
import functools
import math
import unicodedata

import numpy as np
from PIL import Image as Picture
from PIL import ImageDraw, ImageFont

from deer_vla_ros.budget.types import UNITS, BudgetStatus
from deer_vla_ros.control.types import Decision, HoldReason

WIDTH, HEIGHT = 640, 480
PAD = 8
HEADER, BAND = 58, 50
"""Heights [pixels] of the two lines on top and of the state at the bottom. Cameras and ladder are between."""
MIDDLE = HEIGHT - HEADER - BAND - PAD
STATIC_WIDTH, GRIPPER_HEIGHT = 404, 124
SIDE = STATIC_WIDTH + 2 * PAD
"""Left edge of the gripper camera and of the ladder."""

GROUND, TROUGH, INK, FAINT = "#14181d", "#2b323b", "#f1f5f9", "#94a3b8"
AGREED, ABOVE, TAKEN = "#2dd4bf", "#f59e0b", "#17424a"
"""Colours: of a delta up to its threshold, of a delta above it, and behind the exit taken."""
MOVING, LIMITED, HOLDING, WAITING = "#14532d", "#854d0e", "#b91c1c", "#334155"
"""Colours of the band. They make the state visible from a distance."""

BAR_LEFT, BAR_RIGHT, DELTA_RIGHT, LIMIT_RIGHT = SIDE + 26, SIDE + 98, SIDE + 148, WIDTH - PAD
LONGEST_ROW, LADDER_HEAD = 24, 18
MANY = 1e6
"""A threshold with a larger magnitude is not a measure but an order: always stop here, or never."""


def draw(
    static: np.ndarray,
    gripper: np.ndarray,
    instruction: str,
    decision: Decision | None,
    holds: tuple[HoldReason, ...],
    budget: BudgetStatus | None = None,
) -> np.ndarray:
    """The overlay, (480, 640, 3) uint8 RGB.

    static, gripper: (H, W, 3) uint8 RGB of any size; an image without pixels is shown as a missing frame.
    decision: the newest one, also while the arm holds; None before the first step. holds: empty while it
    moves. budget: requested and achieved cost; None: not shown.
    """
    canvas = Picture.new("RGB", (WIDTH, HEIGHT), GROUND)
    pen = ImageDraw.Draw(canvas)
    _place(canvas, pen, static, (PAD, HEADER, STATIC_WIDTH, MIDDLE), "static camera")
    _place(canvas, pen, gripper, (SIDE, HEADER, WIDTH - PAD - SIDE, GRIPPER_HEIGHT), "gripper camera")
    _write(pen, (PAD, 5), _fit(_plain(instruction) or "no instruction", 22), 22)
    _write(pen, (PAD, 34), _figures(decision), 16, FAINT)
    if decision is not None:
        _draw_ladder(pen, decision)
    _draw_band(pen, decision, holds)
    if budget is not None and budget.achieved.steps:
        _write(pen, (WIDTH - PAD, HEIGHT - BAND + 6), _spent(budget), 15, INK, "ra")
    return np.asarray(canvas)


def _place(
    canvas: Picture.Image,
    pen: ImageDraw.ImageDraw,
    image: np.ndarray,
    box: tuple[int, int, int, int],
    name: str,
) -> None:
    """Fits the image into the upper part of `box` (left, top, width, height), and keeps its proportions."""
    left, top, width, height = box
    if image.size == 0:
        pen.rectangle((left, top, left + width - 1, top + height - 1), fill=TROUGH)
        _write(pen, (left + width // 2, top + height // 2), f"no frame of the {name}", 15, FAINT, "mm")
        return
    rows, columns, _ = image.shape
    scale = min(width / columns, height / rows)
    size = max(1, round(columns * scale)), max(1, round(rows * scale))
    stride = max(1, int(0.5 / scale))  # reading all pixels of a large frame is slow
    picture = Picture.fromarray(np.ascontiguousarray(image[::stride, ::stride]))
    canvas.paste(picture.resize(size, Picture.Resampling.BILINEAR), (left + (width - size[0]) // 2, top))


def _figures(decision: Decision | None) -> str:
    if decision is None:
        return "no step yet"
    policy, cost = decision.policy, decision.cost
    return (
        f"step {decision.step}:  {policy.layers_run} of {policy.exits[-1] + 1} layers,  "
        f"{cost.language_gmac:.4g} of {cost.language_gmac_full:.4g} GMAC,  {policy.times.total:.1f} ms"
    )


def _draw_ladder(pen: ImageDraw.ImageDraw, decision: Decision) -> None:
    """One row per exit, shallow exits first. A bar beyond its middle is a delta above its threshold."""
    policy = decision.policy
    head = HEADER + GRIPPER_HEIGHT + PAD
    for right, title in ((DELTA_RIGHT, "delta"), (LIMIT_RIGHT, "threshold")):
        _write(pen, (right, head), title, 12, FAINT, "ra")
    _write(pen, (SIDE, head), "layers", 12, FAINT)
    top = head + LADDER_HEAD
    pitch = min(LONGEST_ROW, (HEIGHT - BAND - 2 - top) // len(policy.exits))
    size = min(14, pitch - 1)
    middle = (BAR_LEFT + BAR_RIGHT) // 2
    for index, (layer, delta, threshold) in enumerate(
        zip(policy.exits, policy.deltas, policy.thresholds, strict=True)
    ):
        line = top + pitch * index + pitch // 2
        up, down = line - pitch // 2, line - pitch // 2 + pitch - 2
        taken, probed = index == policy.exit_index, not math.isnan(delta)
        if taken:
            pen.rectangle((SIDE - 4, up - 1, WIDTH - 5, down + 1), fill=TAKEN, outline=AGREED)
        ink = INK if taken or probed else FAINT
        _write(pen, (SIDE + 19, line), str(layer + 1), size, ink, "rm")
        pen.rectangle((BAR_LEFT, up + 3, BAR_RIGHT, down - 3), fill=TROUGH)
        if probed:
            end = BAR_LEFT + round((BAR_RIGHT - BAR_LEFT) * _share(delta, threshold))
            pen.rectangle((BAR_LEFT, up + 3, end, down - 3), fill=ABOVE if delta > threshold else AGREED)
        pen.line((middle, up + 2, middle, down - 2), fill=ink)
        _write(pen, (DELTA_RIGHT, line), _number(delta), size, ink, "rm")
        _write(pen, (LIMIT_RIGHT, line), _limit(threshold), size, ink, "rm")


def _share(delta: float, threshold: float) -> float:
    """Length of a bar, 0..1: 0.5 is a delta equal to its threshold, 1 is twice the threshold or more."""
    if not delta > threshold:
        return 0.5 * delta / threshold if 0 < threshold < math.inf and delta > 0 else 0.0
    return min(0.5 * delta / threshold, 1.0) if threshold > 0 and math.isfinite(delta) else 1.0


def _number(value: float) -> str:
    """The number in about five characters."""
    if math.isnan(value):
        return "-"
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.{4 - len(str(int(abs(value))))}f}"
    return f"{value:.0e}" if math.isfinite(value) else str(value)


def _limit(threshold: float) -> str:
    return _number(threshold) if not abs(threshold) >= MANY else "always" if threshold > 0 else "never"


def _draw_band(pen: ImageDraw.ImageDraw, decision: Decision | None, holds: tuple[HoldReason, ...]) -> None:
    """The state at the bottom, as colour and text. Only the first reason is written out, in one line."""
    if holds:
        further = f"  (+{len(holds) - 1} more)" if len(holds) > 1 else ""
        colour, title, text = HOLDING, "HOLDING" + further, holds[0].value
    elif decision is None:
        colour, title, text = WAITING, "WAITING", "for the first step"
    elif decision.limits:
        colour, title, text = (
            LIMITED,
            "MOVING, LIMITED",
            "by " + ", ".join(limit.value for limit in decision.limits),
        )
    else:
        colour, title, text = MOVING, "MOVING", _depth(decision)
    top = HEIGHT - BAND
    pen.rectangle((0, top, WIDTH, HEIGHT), fill=colour)
    _write(pen, (PAD, top + 3), title, 20)
    _write(pen, (PAD, top + 28), _fit(text, 15), 15)


def _spent(budget: BudgetStatus) -> str:
    """The achieved mean cost, and the requested one if an average budget is binding."""
    name = budget.binding or "average_gmac"
    achieved = {
        "average_gmac": budget.achieved.gmac,
        "average_fraction": budget.achieved.fraction,
        "average_ms": budget.achieved.ms,
    }[name]
    asked = f" of {getattr(budget.requested, name):.3g}" if budget.binding else ""
    return f"mean {achieved:.3g}{asked} {'' if name == 'average_fraction' else UNITS[name]}".strip()


def _depth(decision: Decision) -> str:
    policy = decision.policy
    return f"exit {policy.exit_index + 1} of {len(policy.exits)}: {policy.stop.value}"


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def _write(
    pen: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    text: str,
    size: int,
    colour: str = INK,
    anchor: str = "la",
) -> None:
    pen.text(corner, text, fill=colour, font=_font(size), anchor=anchor)


@functools.lru_cache(maxsize=4)
def _plain(text: str) -> str:
    """One line without accents, which the built-in font lacks. Scripts that it lacks become boxes."""
    letters = (
        letter for letter in unicodedata.normalize("NFKD", text[:WIDTH]) if not unicodedata.combining(letter)
    )
    return " ".join("".join(letter if letter.isprintable() else " " for letter in letters).split())


@functools.lru_cache(maxsize=16)
def _fit(text: str, size: int) -> str:
    """The text, or its beginning with an ellipsis if it does not fit into a line."""
    font, width = _font(size), WIDTH - 2 * PAD
    if font.getlength(text) <= width:
        return text
    fits = bisect.bisect(range(len(text)), width, key=lambda end: font.getlength(text[:end] + "…")) - 1
    return text[: max(fits, 0)].rstrip() + "…"
