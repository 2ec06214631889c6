"""The chart of a replay in its HTML report: camera frames, instructions, depth, deviation, time of each step.

The chart is HTML and SVG without scripts. A small script, once in the page, shows the values of the step that
is nearest to the pointer, from data that is embedded beside the chart.
"""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image as Picture

if TYPE_CHECKING:  # the demo takes the colours from here, without torch
    from deer_vla_ros.bag.run import Result, Step

INSTRUCTION_COLOURS = ("#c2410c", "#0f766e", "#6d28d9", "#a16207", "#be185d", "#1d4ed8")
WIDTH = 2000
"""Units of a plot along the time axis; a plot is 100 units high. The page stretches both."""
FRAME_PIXELS = 120
"""Width of a camera frame in the page."""
TICKS_S = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600)


def instruction_colours(texts: Iterable[str]) -> dict[str, str]:
    """A colour for each instruction, in the order in which they first appear."""
    return {
        text: INSTRUCTION_COLOURS[index % len(INSTRUCTION_COLOURS)]
        for index, text in enumerate(dict.fromkeys(texts))
    }


def chart(result: Result, away: Sequence[float | None]) -> str:
    """The chart of a run. away: how far each step's action is from the one at full depth; None: not known."""
    steps, span = result.steps, max(result.seconds, result.steps[-1].seconds, 1e-9)
    at = [step.seconds for step in steps]
    colours = instruction_colours(step.instruction for step in steps)
    bands = [(text, list(group)) for text, group in groupby(steps, key=lambda each: each.instruction)]
    begins = [band[0].seconds for _, band in bands]
    ends = [*begins[1:], span]
    layers = result.exits[-1] + 1
    long = 2.5 * float(np.median(np.diff(at))) if len(at) > 1 else span
    depth = "".join(
        f'<path fill="{colours[text]}" d="{_bars(band, span, long, layers)}"/>' for text, band in bands
    )
    rows = [
        _frames(result, span),
        _bands(bands, begins, ends, span, colours),
        _plot(
            "layers run; red: the arm is held",
            _held(result, span) + depth,
            [(layer + 1, f"{layer + 1}") for layer in result.exits],
            layers,
            "tall",
        ),
        _line("distance from the action at full depth", at, away, span, long),
        _line("time of the tick [ms]", at, [step.wall_ms for step in steps], span, long),
        _axis(span),
    ]
    legend = "".join(
        f'<li style="--c:{colours[text]}">{_text(text)} <small>{begin:.1f} to {end:.1f} s</small></li>'
        for (text, _), begin, end in zip(bands, begins, ends)
    )
    return (
        f'<div class="run" tabindex="0" aria-label="steps over time"><div class="area">{"".join(rows)}'
        '<div class="cursor" hidden></div></div><div class="tip" hidden></div>'
        f'<script type="application/json">{_embedded(_data(result, away, span))}</script></div>'
        f'<ol class="said">{legend}</ol>'
    )


def _text(instruction: str) -> str:
    return html.escape(instruction) or "(no instruction)"


def _embedded(data: dict[str, Any]) -> str:
    """JSON in which no text can end the script element."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("&", "\\u0026")


def _data(result: Result, away: Sequence[float | None], span: float) -> dict[str, Any]:
    """What the script shows: one list for each value, with one item for each step."""
    texts = list(dict.fromkeys(step.instruction for step in result.steps))
    reasons: list[str] = []

    def number_of(held: Iterable[Any]) -> int:
        text = "; ".join(f"{reason.name}: {reason.value}" for reason in held)
        if text and text not in reasons:
            reasons.append(text)
        return reasons.index(text) if text else -1

    place = {text: index for index, text in enumerate(texts)}
    return {
        "span": round(span, 3),
        "depth": result.exits[-1] + 1,
        "s": [round(step.seconds, 3) for step in result.steps],
        "layers": [step.exit_layer + 1 for step in result.steps],
        "gmac": [float(f"{step.language_gmac:.4g}") for step in result.steps],
        "ms": [round(step.wall_ms, 1) for step in result.steps],
        "away": [None if value is None else float(f"{value:.3g}") for value in away],
        "text": [place[step.instruction] for step in result.steps],
        "held": [number_of(step.held_for) for step in result.steps],
        "holds": [
            [round(begin, 3), round(end, 3), number_of(why)]
            for (begin, why), end in zip(result.holds, hold_ends(result, span))
        ],
        "texts": texts,
        "reasons": reasons,
    }


def hold_ends(result: Result, span: float) -> list[float]:
    """When each hold ended [s]: at the next hold, or at the next step that moved the arm."""
    moving = np.array([step.seconds for step in result.steps if not step.held_for])
    begins = [begin for begin, _ in result.holds]
    ends = []
    for begin, following in zip(begins, [*begins[1:], span]):
        later = moving[moving > begin]
        ends.append(min(following, float(later[0]) if len(later) else span))
    return ends


def _frames(result: Result, span: float) -> str:
    """The static camera's frames at their times, in a row of `--n` frames of the aspect ratio `--a`."""
    if not result.thumbnails:
        return ""
    height, width = result.thumbnails[0][1].shape[:2]
    images = []
    for seconds, image in result.thumbnails:
        picture = Picture.fromarray(image)
        picture.thumbnail((FRAME_PIXELS, FRAME_PIXELS))
        file = io.BytesIO()
        picture.save(file, "jpeg", quality=80)
        data = base64.b64encode(file.getvalue()).decode()
        images.append(
            f'<img alt="static camera at {seconds:.1f} s" style="left:{_percent(seconds, span)}" '
            f'src="data:image/jpeg;base64,{data}">'
        )
    style = f"--n:{len(images)};--a:{width / height:.3f}"
    return f'<div class="frames" style="{style}">{"".join(images)}</div>'


def _bands(
    bands: list[tuple[str, list[Step]]],
    begins: list[float],
    ends: list[float],
    span: float,
    colours: dict[str, str],
) -> str:
    spans = "".join(
        f'<span style="left:{_percent(begin, span)};width:{_percent(end - begin, span)};--c:{colours[text]}">'
        f"{number}. {_text(text)}</span>"
        for number, ((text, _), begin, end) in enumerate(zip(bands, begins, ends), start=1)
    )
    return f'<div class="bands">{spans}</div>'


def _held(result: Result, span: float) -> str:
    return "".join(
        f'<rect class="held" x="{_x(begin, span)}" width="{_x(end - begin, span)}" height="100"/>'
        for (begin, _), end in zip(result.holds, hold_ends(result, span))
    )


def _bars(steps: list[Step], span: float, long: float, layers: int) -> str:
    """The path of one bar for each step, which ends at the next step, or earlier if that is far away."""
    nexts = [step.seconds for step in steps[1:]] + [steps[-1].seconds + long / 2.5]
    return "".join(
        f"M{_x(step.seconds, span)} 100V{_y(step.exit_layer + 1, layers)}"
        f"H{_x(min(following, step.seconds + long, span), span)}V100z"
        for step, following in zip(steps, nexts)
    )


def _line(title: str, at: list[float], values: Sequence[float | None], span: float, long: float) -> str:
    """A plot of one value over time, with a break where a value or a step is missing."""
    known = [value for value in values if value is not None]
    if not known:
        return f'<p class="title">{html.escape(title)}: not measured</p>'
    top = max(known) or 1.0
    parts, last = [], None
    for seconds, value in zip(at, values):
        if value is None:
            last = None
            continue
        begin = "M" if last is None or seconds - last > long else "L"
        parts.append(f"{begin}{_x(seconds, span)} {_y(value, top)}")
        last = seconds
    return _plot(title, f'<path class="line" d="{"".join(parts)}"/>', [(top, f"{top:.3g}")], top, "low")


def _plot(title: str, drawing: str, marks: list[tuple[float, str]], top: float, kind: str) -> str:
    """A plot with its title and marks at some values; the rest of the page gives its size."""
    lines = "".join(f'<path class="grid" d="M0 {_y(value, top)}H{WIDTH}"/>' for value, _ in marks)
    labels = "".join(f'<b style="top:{_y(value, top)}%">{text}</b>' for value, text in marks)
    return (
        f'<p class="title">{html.escape(title)}</p><div class="plot {kind}">'
        f'<svg viewBox="0 0 {WIDTH} 100" preserveAspectRatio="none">{lines}{drawing}</svg>{labels}</div>'
    )


def _axis(span: float) -> str:
    step = next((each for each in TICKS_S if span / each <= 8), TICKS_S[-1])
    ticks = [index * step for index in range(int(span / step) + 1)]
    marks = "".join(f'<i style="left:{_percent(tick, span)}">{tick:g}</i>' for tick in ticks)
    return f'<div class="axis">{marks}</div><p class="unit">seconds from the start of the replayed part</p>'


def _x(seconds: float, span: float) -> str:
    return f"{WIDTH * seconds / span:.1f}".removesuffix(".0")


def _y(value: float, top: float) -> str:
    """From 4 at the top of the plot to 100 at its bottom."""
    return f"{100 - 96 * value / top:.1f}".removesuffix(".0")


def _percent(seconds: float, span: float) -> str:
    return f"{100 * seconds / span:.2f}%"


STYLE = """
.run{position:relative;outline-offset:4px}
.area{position:relative;margin-left:2.8em;touch-action:pan-y;cursor:crosshair}
.frames{position:relative;overflow:hidden;aspect-ratio:calc(var(--n)*var(--a)/.92)}
.frames img{position:absolute;width:calc(92%/var(--n))}
.bands{position:relative;height:1.7em;margin:.3em 0}
.bands span{position:absolute;box-sizing:border-box;height:100%;padding:0 .3em;overflow:hidden;color:#fff;
background:var(--c);font-size:.85em;line-height:2em;white-space:nowrap;text-overflow:ellipsis;
border-right:1px solid #fff}
.title,.unit{margin:.5em 0 .1em;font-size:.85em;color:#4b5563}
.plot{position:relative}.plot svg{display:block;width:100%;height:100%;background:#f9fafb}
.tall{height:9em}.low{height:4.5em}
.plot b{position:absolute;right:100%;margin:-.7em .4em 0 0;font:.75em/1.4 system-ui,sans-serif;color:#4b5563}
.line,.grid{fill:none;vector-effect:non-scaling-stroke}.line{stroke:#1f2937;stroke-width:1.2}
.grid{stroke:#d1d5db}.held{fill:#fca5a5;opacity:.55}
.axis{position:relative;height:1.3em}.unit{margin:0;text-align:center}
.axis i{position:absolute;transform:translateX(-50%);font:.8em/1.5 system-ui,sans-serif;color:#4b5563}
.cursor{position:absolute;top:0;bottom:0;width:1px;background:#111827;pointer-events:none}
.tip{position:fixed;z-index:1;bottom:.5em;box-sizing:border-box;max-width:min(30em,92vw);padding:.5em .7em;
border-radius:.4em;color:#fff;background:#111827ee;font-size:.85em;line-height:1.4;pointer-events:none;
white-space:pre-line;
overflow-wrap:anywhere}
.said{padding:0;list-style:none;counter-reset:said}
.said li{display:inline-block;margin:0 1.2em .3em 0;padding-left:.5em;border-left:.7em solid var(--c);
counter-increment:said;overflow-wrap:anywhere}.said li:before{content:counter(said) ". "}
"""

SCRIPT = """
for (const run of document.querySelectorAll(".run")) {
  const data = JSON.parse(run.querySelector("script").textContent);
  const [area, cursor, tip] = [".area", ".cursor", ".tip"].map(name => run.querySelector(name));
  let shown = -1;
  const nearest = seconds => {
    let low = 0, high = data.s.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (data.s[middle] < seconds) low = middle + 1; else high = middle;
    }
    return low > 0 && seconds - data.s[low - 1] < data.s[low] - seconds ? low - 1 : low;
  };
  const show = (step, seconds) => {
    shown = step;
    const hold = data.holds.find(([begin, end]) => begin <= seconds && seconds < end);
    const away = data.away[step];
    tip.textContent = [
      `step ${step}, ${data.s[step].toFixed(2)} s`,
      data.texts[data.text[step]],
      `${data.layers[step]} of ${data.depth} layers, ${data.gmac[step]} GMAC`,
      `tick ${data.ms[step]} ms` + (away === null ? "" : `, ${away} from full depth`),
      data.held[step] < 0 ? "" : `held: ${data.reasons[data.held[step]]}`,
      hold ? `at ${seconds.toFixed(2)} s held: ${data.reasons[hold[2]]}` : "",
    ].filter(line => line).join("\\n");
    cursor.hidden = tip.hidden = false;
    const x = area.clientWidth * data.s[step] / data.span;
    cursor.style.left = `${x}px`;
    const free = document.documentElement.clientWidth - tip.offsetWidth - 8;
    const left = area.getBoundingClientRect().left + x - tip.offsetWidth / 2;
    tip.style.left = `${Math.max(8, Math.min(left, free))}px`;
  };
  const at = event => {
    const box = area.getBoundingClientRect();
    const seconds = data.span * (event.clientX - box.left) / box.width;
    show(nearest(seconds), seconds);
  };
  const hide = () => { cursor.hidden = tip.hidden = true; };
  area.addEventListener("pointermove", at);
  area.addEventListener("pointerdown", at);
  area.addEventListener("pointerleave", event => { if (event.pointerType === "mouse") hide(); });
  run.addEventListener("blur", hide);
  run.addEventListener("keydown", event => {
    const move = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (!move) return;
    event.preventDefault();
    const step = Math.max(0, Math.min(data.s.length - 1, shown + move));
    show(step, data.s[step]);
  });
}
"""
