"""Measures a step of the network on one device: every exit, static full depth, and the plain way.

The steps of all rows are measured in turns, so that a change of the machine's load or clock meets every row
alike and the ratios between rows hold.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deer_vla_ros.budget.cost import GIB, cost_table
from deer_vla_ros.errors import UserError
from deer_vla_ros.files import whole_file
from deer_vla_ros.inference.backend_check import EAGER, choose
from deer_vla_ros.inference.exit_rule import ExitRule
from deer_vla_ros.inference.policy import DeerPolicy
from deer_vla_ros.inference.types import Observation, StageTimes
from deer_vla_ros.lab.benchmarks.device_memory import PeakMemory, free_bytes
from deer_vla_ros.lab.benchmarks.latency_benchmark import INSTRUCTION
from deer_vla_ros.lab.benchmarks.plain_policy import PlainPolicy
from deer_vla_ros.lab.benchmarks.roofline import (
    FULL_DEPTH,
    Rates,
    StepWork,
    at_depth,
    mean_layers,
    measured_rates,
)
from deer_vla_ros.lab.benchmarks.step_counts import StepCounts, counted
from deer_vla_ros.lab.percentiles import percentiles
from deer_vla_ros.model.checkpoint import EMBEDDED, TOKENIZER, load, load_info
from deer_vla_ros.model.config import PRESETS, ModelConfig
from deer_vla_ros.model.network import MultiExitVLA, build, layer_bytes, state_shapes
from deer_vla_ros.model.quantisation import empty_tensors, is_quantised, quantise
from deer_vla_ros.model.text import InstructionTokenizer

WARM_UP = {"cuda": 2, "cpu": 0}
"""Steps of a row before it is counted and timed. On a CPU the counted step is enough."""
FEWEST_STEPS = 3
"""The steps of a row that are always measured; a row that has no time for them is left out."""
STAGES = ("preprocess", "vision", "language", "head")
NEVER = -1.0
"""A threshold that no delta is below: the step goes on to the deepest exit of its rule."""
ONLY_ONCE = 2**62
"""`steps_per_stage` of a rule that probes the exits in the first step of an episode and never again."""
MARGIN = 1.1
"""Free memory that a network needs, as a multiple of its weights."""


@dataclass(frozen=True)
class Subject:
    """The network that is measured, its instruction tokenizer, the name of its delta, and its origin."""

    model: MultiExitVLA
    tokenizer: InstructionTokenizer
    delta: str
    about: str


def random_subject(
    preset: str,
    layers: int | None,
    device: torch.device,
    dtype: torch.dtype,
    seed: int = 0,
    bits: int | None = None,
) -> Subject:
    """A network of a preset with random weights, made on the device in its number type, tensor by tensor.

    layers: the number of layers; None: as many as the static network of that size has. bits: of the layers'
    matrices, as in `load`. Its instructions are encoded by the embedded checkpoint's tokenizer. Raises
    UserError for an unknown preset, a wrong number of layers, and a network that does not fit into the free
    memory.
    """
    if preset not in PRESETS:
        raise UserError(f"unknown preset '{preset}': use one of {', '.join(PRESETS)}")
    layers = FULL_DEPTH.get(preset) if layers is None else layers
    config = PRESETS[preset]() if layers is None else PRESETS[preset](layers)
    shapes = state_shapes(config, for_training=False)
    others = sum(math.prod(shape) for name, shape in shapes.items() if not name.startswith("layers."))
    needed = others * dtype.itemsize + sum(layer_bytes(config, dtype, bits))
    if needed * MARGIN > free_bytes(device):
        raise UserError(
            f"{preset} with {config.decoder.layers} layers needs {needed / GIB:.1f} GiB in {dtype}, "
            f"and {free_bytes(device) / GIB:.1f} GiB are free: give fewer --layers or a smaller --dtype"
        )
    generator = torch.Generator(device).manual_seed(seed)
    state: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        values = _random_values(name, torch.empty(shape, dtype=dtype, device=device), generator)
        if is_quantised(name, shape, bits):
            own = empty_tensors(name, shape, dtype, bits, functools.partial(torch.empty, device=device))
            for _ in quantise(values, *own.values()):
                pass
            state |= own
        else:
            state[name] = values
    tokenizer = InstructionTokenizer.from_file(EMBEDDED / TOKENIZER, config.max_tokens)
    about = f"{preset}, {config.decoder.layers} layers, random weights"
    return Subject(build(config, state, bits), tokenizer, "l2", about)


def checkpoint_subject(
    folder: Path, device: torch.device, dtype: torch.dtype, bits: int | None = None
) -> Subject:
    """The network of a checkpoint folder. Raises UserError as `load` does."""
    checkpoint = load(folder, device, dtype, bits=bits)
    info = load_info(folder)
    return Subject(checkpoint.model, checkpoint.tokenizer, info.delta, f"{folder}: {info.weights}")


def _random_values(name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Fills a tensor so that values neither grow nor vanish on their way through the network."""
    if tensor.dim() > 1:
        return tensor.normal_(std=math.prod(tensor.shape[1:]) ** -0.5, generator=generator)
    return tensor.fill_(0.5 if "gate" in name else 1.0 if name.endswith("weight") else 0.0)


@dataclass
class _Row:
    """One way to do a step, and what was measured of it.

    kind: "exit", "static" or "plain". layers: how many run. readings: of the head, one after another.
    probes: features that the head gets. step: does one step and returns the times of its stages.
    """

    kind: str
    layers: int
    readings: int
    probes: int
    step: Callable[[Observation], StageTimes]
    counts: StepCounts | None = None
    last_s: float = 0.0
    whole_ms: list[float] = field(default_factory=list)
    stages: list[StageTimes] = field(default_factory=list)

    @property
    def name(self) -> str:
        return {
            "exit": f"exit after {self.layers} layers",
            "static": f"static, all {self.layers} layers",
            "plain": f"the plain way, static, all {self.layers} layers",
        }[self.kind]

    def prepare(self, device: torch.device, observation: Observation) -> None:
        """Warms up, and counts what a step asks of the device."""
        for _ in range(WARM_UP[device.type]):
            self.timed(observation)
        self.counts = counted(device, lambda: self.timed(observation))

    def measure(self, observation: Observation) -> None:
        """Adds the times of one step."""
        self.stages.append(self.timed(observation))
        self.whole_ms.append(self.last_s * 1e3)

    def timed(self, observation: Observation) -> StageTimes:
        """Does one step. `last_s` is how long the caller waited for it."""
        begin = time.perf_counter()
        times = self.step(observation)
        self.last_s = time.perf_counter() - begin
        return times

    def ms(self, stage: str) -> float:
        """The median of the whole step ("step") or of one stage [ms]."""
        return float(np.median(self._all(stage)))

    def percentiles_ms(self) -> dict[str, dict[str, float | None]]:
        return {stage: percentiles(self._all(stage)) for stage in ("step", *STAGES)}

    def _all(self, stage: str) -> list[float]:
        return self.whole_ms if stage == "step" else [getattr(times, stage) for times in self.stages]


def measure(
    make: Callable[[torch.device, torch.dtype], Subject],
    device: torch.device,
    dtype: torch.dtype,
    minutes: float,
    on_progress: Callable[[str, float], None] = lambda what, share: None,
    backend: str = EAGER,
) -> dict[str, Any]:
    """Measures all rows in about `minutes`, and returns the report.

    The static row always gets FEWEST_STEPS steps; other rows that have no time for as many are named in
    `skipped`. make: returns the network on a device in a number type. on_progress: gets what is being done,
    and the share of the time that is over, 0..1. backend: what our steps run with, as in
    `backend_check.choose`.
    """
    begin = time.monotonic()
    until = begin + minutes * 60

    def tell(what: str) -> None:
        on_progress(what, min(1.0, (time.monotonic() - begin) / (minutes * 60)))

    kept, skipped, seen = [], [], _observations()

    def prepare(row: _Row) -> None:
        """Keeps a row if there is time for it and for the rows before."""
        slowest = max((each.last_s for each in kept), default=0.0)
        rest = FEWEST_STEPS * (sum(each.last_s for each in kept) + slowest)
        rest += (WARM_UP[device.type] + 2) * slowest
        if kept and time.monotonic() + rest > until:
            skipped.append(f"{row.name}: no time in {minutes:g} minutes")
            return
        tell(f"warming up: {row.name}")
        row.prepare(device, next(seen))
        kept.append(row)

    tell("making the network")
    with PeakMemory(device) as memory:
        subject = make(device, dtype)
        every_exit = _rule(subject, len(subject.model.config.exits))
        chosen = choose(backend, subject.model, subject.tokenizer, every_exit)
        policy = chosen.policy
        tokens, rows = policy.reset(INSTRUCTION), _rows(policy, subject)
        policy.rule = every_exit
        policy.step(next(seen))  # the first step of an episode, which the static row would probe in
        for row in rows[:2]:
            prepare(row)
    tell("measuring the device")
    rates = measured_rates(device, dtype)
    plain, about_plain = _plain(subject, device)
    if plain is None:
        skipped.append(f"the plain way: {about_plain}")
    for row in (() if plain is None else (plain,)) + tuple(rows[2:]):
        prepare(row)
    rounds = 0
    while rounds < FEWEST_STEPS or time.monotonic() + sum(row.last_s for row in kept) < until:
        for row in sorted(kept, key=_in_report):  # a static step keeps the depth of the deepest exit's step
            tell(f"measuring {len(kept)} rows in turns")
            row.measure(next(seen))
        rounds += 1
    rates = rates.best(measured_rates(device, dtype))
    sizes = {name: tensor.nbytes for name, tensor in subject.model.state_dict().items()}
    work = StepWork(cost_table(subject.model.config, tokens), sizes)
    return {
        **_headline(kept, work, rates, subject.model.config),
        "peak_memory_ratio": round(memory.bytes / sum(sizes.values()), 3),
        "peak_memory_bytes": memory.bytes,
        "weight_bytes": sum(sizes.values()),
        "network": subject.about,
        "backend": chosen.backend,
        "backend_report": chosen.report,
        "tokens": tokens,
        "device": _name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "layers_bits": subject.model.bits,
        "layers_bytes": sum(subject.model.layer_bytes),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": date.today().isoformat(),
        "minutes": minutes,
        "measured_minutes": round((time.monotonic() - begin) / 60, 2),
        "rates": dataclasses.asdict(rates),
        "plain": about_plain,
        "skipped": skipped,
        "rows": [_figures(row, work, rates) for row in sorted(kept, key=_in_report)],
    }


def _rows(policy: DeerPolicy, subject: Subject) -> list[_Row]:
    """The rows of DeerPolicy, the most important ones first: static full depth, the deepest exit, the exits
    around the paper's mean depth, the others."""
    config = subject.model.config
    exits, mean = config.exits, mean_layers(config)

    def through(rule: ExitRule) -> Callable[[Observation], StageTimes]:
        def step(observation: Observation) -> StageTimes:
            policy.rule = rule
            return policy.step(observation).times

        return step

    rows = [
        _Row("exit", layer + 1, index + 1, index + 2, through(_rule(subject, index + 1)))
        for index, layer in enumerate(exits)
    ]
    beside = [row for row in rows if row.layers <= mean][-1:] + [row for row in rows if row.layers > mean][:1]
    rest = [row for row in reversed(rows[:-1]) if row not in beside]
    never = dataclasses.replace(_rule(subject, len(exits)), steps_per_stage=ONLY_ONCE)
    static = _Row("static", config.decoder.layers, 1, 1, through(never))
    return [static, rows[-1], *(row for row in beside if row is not rows[-1]), *rest]


def _rule(subject: Subject, count: int) -> ExitRule:
    """The rule that reads the first `count` exits and stops at the last of them."""
    return ExitRule(subject.model.config.exits[:count], (NEVER,) * count, subject.delta)


def _plain(subject: Subject, device: torch.device) -> tuple[_Row | None, str]:
    """The row of the plain way and how it computes; or None and why it is left out."""
    model = subject.model
    if model.bits is not None:
        return None, "it has no quantised weights"
    if model.dtype != torch.float32:
        needed = sum(tensor.numel() * 4 for tensor in model.state_dict().values())
        if needed * MARGIN > free_bytes(device):
            return None, (
                f"its float32 weights need {needed / GIB:.1f} GiB, "
                f"and {free_bytes(device) / GIB:.1f} GiB are free"
            )
        model = build(model.config, {name: tensor.float() for name, tensor in model.state_dict().items()})
    autocast, about = _autocast(model, subject.model.dtype)
    policy = PlainPolicy(model, subject.tokenizer, None, autocast)
    policy.reset(INSTRUCTION)
    layers = model.config.decoder.layers
    return _Row("plain", layers, 1, 1, lambda observation: policy.step(observation).times), about


@torch.inference_mode()
def _autocast(model: MultiExitVLA, dtype: torch.dtype) -> tuple[torch.dtype | None, str]:
    """The number type of the plain way's autocast, and the reason.

    On a GPU it is that of the network; a float32 network has none. On a CPU it is bfloat16 if that is faster.
    """
    if model.device.type == "cuda":
        wanted = None if dtype == torch.float32 else dtype
        return wanted, "float32 weights, " + ("no autocast" if wanted is None else f"autocast to {wanted}")
    linear = model.vision.clip.encoder["layers"][0].self_attn.out_proj
    images = torch.zeros(1, model.config.vision.tokens + 1, model.config.vision.width)

    def best_ms(enabled: bool) -> float:
        found = math.inf
        for _ in range(3):
            begin = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                linear(images)
            found = min(found, (time.perf_counter() - begin) * 1e3)
        return found

    without, with_autocast = best_ms(False), best_ms(True)
    faster = with_autocast < without
    return torch.bfloat16 if faster else None, (
        f"float32 weights, {'autocast to bfloat16' if faster else 'no autocast'} (one linear map of the "
        f"vision transformer: {without:.2f} ms without autocast, {with_autocast:.2f} ms with bfloat16)"
    )


def _observations() -> Iterator[Observation]:
    """Random images, 200 x 200 and 84 x 84 pixels, as CALVIN's cameras, again and again."""
    random, pose = np.random.default_rng(0), np.array([0.4, 0.0, 0.3, 1.0, 0.0, 0.0, 0.0])
    found = [
        Observation(*(random.integers(0, 256, (side, side, 3), dtype=np.uint8) for side in (200, 84)), pose)
        for _ in range(8)
    ]
    while True:
        yield from found


def _headline(rows: list[_Row], work: StepWork, rates: Rates, config: ModelConfig) -> dict[str, Any]:
    """The figures of a step at the paper's mean depth, and its ratios to full depth.

    A figure is None where the rows that it needs were not measured.
    """
    depth = mean_layers(config)
    exits = [row for row in rows if row.kind == "exit"]
    static, plain = (next((row for row in rows if row.kind == kind), None) for kind in ("static", "plain"))
    complete = any(row.layers <= max(depth, config.exits[0] + 1) for row in exits)

    def mean(figure: Callable[[_Row], float | None]) -> float | None:
        values = {row.layers: figure(row) for row in exits}
        return None if not complete or None in values.values() else at_depth(depth, values)

    def ratio(row: _Row | None, stage: str) -> float | None:
        at_mean = mean(lambda each: each.ms(stage))
        return None if row is None or at_mean is None else _rounded(row.ms(stage) / at_mean)

    bound = mean(lambda row: _bound_ms(row, work, rates))
    step = mean(lambda row: row.ms("step"))
    return {
        "mean_layers": _rounded(depth),
        "mean_step_ms": _rounded(step),
        "whole_step_ratio": ratio(plain, "step"),
        "language_ratio": ratio(plain, "language"),
        "whole_step_ratio_to_own_static": ratio(static, "step"),
        "language_ratio_to_own_static": ratio(static, "language"),
        "roofline_share": None if bound is None else _rounded(bound / step),
        "host_waits": _rounded(mean(lambda row: row.counts.host_waits)),
        "launches": _rounded(mean(lambda row: row.counts.launches)),
        "idle_share": _rounded(mean(_idle_share)),
    }


def _figures(row: _Row, work: StepWork, rates: Rates) -> dict[str, Any]:
    """The figures of one row."""
    weights, gmac = work.weight_bytes(row.layers, row.readings), work.gmac(row.layers, row.probes)
    bound = work.bound_ms(rates, row.layers, row.readings, row.probes)
    return {
        "name": row.name,
        "kind": row.kind,
        "layers": row.layers,
        "steps": len(row.whole_ms),
        "gmac": {stage: round(value, 6) for stage, value in gmac.items()},
        "weight_bytes": weights,
        "ms": row.percentiles_ms(),
        "host_waits": row.counts.host_waits,
        "launches": row.counts.launches,
        "reads": row.counts.reads,
        "bound_ms": {stage: _rounded(value) for stage, value in bound.items()},
        "roofline_share": _rounded(sum(bound.values()) / row.ms("step")),
        "idle_share": _rounded(_idle_share(row)),
    }


def _bound_ms(row: _Row, work: StepWork, rates: Rates) -> float:
    return sum(work.bound_ms(rates, row.layers, row.readings, row.probes).values())


def _idle_share(row: _Row) -> float | None:
    """The share of a step in which the device did nothing: its busy time in a profile, and the median time
    without a profiler, which slows the host down. None on a CPU."""
    return None if row.counts.busy_ms is None else 1 - row.counts.busy_ms / row.ms("step")


def _in_report(row: _Row) -> tuple[int, int]:
    return ("exit", "static", "plain").index(row.kind), row.layers


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def text(report: dict[str, Any]) -> list[str]:
    """The report as lines for a terminal."""

    def times(ratio: float | None) -> str:
        return "not measured" if ratio is None else f"{ratio:.2f} x"

    rates = report["rates"]
    bits = f", layers in {report['layers_bits']} bits" if report["layers_bits"] else ""
    head = "".join(f"{title:>11}" for title in ("ms p50", "p95", *STAGES, "waits", "launches", "roofline"))
    lines = [
        f"{report['network']}; {report['device']}, {report['dtype']}{bits}, {report['threads']} threads; "
        f"{report['tokens']} tokens; backend {report['backend']}",
        *([report["backend_report"]] if report["backend_report"] else []),
        f"device: {rates['bytes_per_s'] / 1e9:.1f} GB/s, {rates['macs_per_s'] / 1e9:.1f} GMAC/s (measured); "
        f"peak memory: {report['peak_memory_ratio']:.2f} x the weights",
        f"{'':42}{head}",
    ]
    for row in report["rows"]:
        step, stages = row["ms"]["step"], (row["ms"][stage]["p50"] for stage in STAGES)
        figures = "".join(f"{value:11.2f}" for value in (step["p50"], step["p95"], *stages))
        share = f"{row['roofline_share']:.1%}"
        lines.append(f"{row['name']:42}{figures}{row['host_waits']:11}{row['launches']:11}{share:>11}")
    lines += [f"skipped: {each}" for each in report["skipped"]]
    return [
        *lines,
        f"the plain way: {report['plain']}",
        f"a step at the paper's mean depth, {report['mean_layers']:.1f} layers, is faster than the plain way "
        f"at static depth {max(row['layers'] for row in report['rows'])}: "
        f"whole step {times(report['whole_step_ratio'])}, language part {times(report['language_ratio'])}",
        "than its own static full depth: "
        f"whole step {times(report['whole_step_ratio_to_own_static'])}, "
        f"language part {times(report['language_ratio_to_own_static'])}",
    ]


def draw(report: dict[str, Any], path: Path) -> None:
    """Writes the plot as an image file: the stages of a step in every row, with its roofline."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows, places = report["rows"], range(len(report["rows"]))
    figure, axes = pyplot.subplots(figsize=(8, 4.6), layout="constrained")
    below = np.zeros(len(rows))
    for stage, colour in zip(STAGES, ("#94a3b8", "#7c3aed", "#0d9488", "#d97706")):
        heights = np.array([row["ms"][stage]["p50"] for row in rows])
        axes.bar(places, heights, bottom=below, color=colour, label=stage, width=0.75)
        below += heights
    bounds = [sum(row["bound_ms"].values()) for row in rows]
    axes.scatter(places, bounds, marker="_", s=300, color="black", label="roofline", zorder=3)
    names = {"exit": "{}", "static": "{}\nstatic", "plain": "{}\nplain"}
    axes.set_xticks(places, [names[row["kind"]].format(row["layers"]) for row in rows])
    axes.set(
        xlabel="layers run",
        ylabel="ms per step (median)",
        title=f"{report['network']}\n{report['device']}, {report['dtype']}, {report['date']}",
    )
    axes.title.set_fontsize(9)
    axes.grid(alpha=0.3, axis="y")
    figure.legend(loc="outside lower center", ncols=len(STAGES) + 1, frameon=False)
    with whole_file(path) as scratch:
        figure.savefig(scratch, dpi=110)
    pyplot.close(figure)
