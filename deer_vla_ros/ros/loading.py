"""Loads the checkpoint that the parameters name, as a controller that is warmed up and keeps its budget."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from deer_vla_ros.budget.calibration import CALIBRATION
from deer_vla_ros.budget.cost import layers_within
from deer_vla_ros.budget.latency import LatencyTable
from deer_vla_ros.control.controller import Controller
from deer_vla_ros.errors import UserError
from deer_vla_ros.model import checkpoint
from deer_vla_ros.model.action_space import ActionSpace
from deer_vla_ros.model.network import layer_bytes
from deer_vla_ros.model.quantisation import types_of
from deer_vla_ros.ros import parameters

LEAST_OF_BFLOAT16 = 0.01
"""Thresholds below this are changed too much by the rounding of bfloat16: measured on the released sizes, it
changes deltas by 0.002 in the median and by 0.017 at worst; float16 by 0.0002 and 0.0014."""
TELL_S = 3.0
"""A part of the load that takes longer than this says every so many seconds how far it is."""
MB = 1e6


class Log(Protocol):
    """What the loggers of ROS nodes and of Python have in common."""

    def info(self, message: str) -> object: ...
    def warning(self, message: str) -> object: ...


def warm_controller(
    given: dict[str, Any],
    log: Log,
    latencies: LatencyTable | None = None,
    check: Callable[[], None] = lambda: None,
) -> Controller:
    """A warmed-up controller for the parameter values `given`. Raises UserError.

    Logs what was loaded, and for each part of the work how long it took.
    latencies: replace the measured latencies, as in Controller. check: called between tensors and between
        steps of the warm-up. What it raises ends the work.
    """
    begin = time.monotonic()
    if given["model.cpu_threads"] > 0:
        torch.set_num_threads(given["model.cpu_threads"])
    device = _device(given["model.device"])
    folder = checkpoint.folder_of(given["model.path"])
    dtype, bits = types_of(given["model.dtype"], device)
    budget = parameters.budget(given)
    budget.check()
    model = checkpoint.load_info(folder).model
    resident = layers_within(model, layer_bytes(model, dtype, bits), budget.memory_gib)
    loaded = _load(folder, device, dtype, resident, bits, log, check)
    space = parameters.action_space(given, loaded.info.action_space)
    controller = _controller(loaded, given, space, latencies, log)
    _warm_up(controller, given["model.warm_up_s"], log, check)
    controller.policy.check(budget)
    controller.policy.set(budget)
    log.info(f"configured in {time.monotonic() - begin:.1f} s")
    log.info(
        f"weights: {loaded.info.weights}; on {device} as {str(dtype).removeprefix('torch.')}"
        f"{f', layers in {bits} bits' if bits else ''}; {space}; "
        f"{controller.settings.guard}"
    )
    least = min((each for each in loaded.info.thresholds[:-1] if each > 0), default=math.inf)
    if dtype is torch.bfloat16 and least < LEAST_OF_BFLOAT16:
        log.warning(
            f"model.dtype is bfloat16, whose rounding changes the deltas by 0.002 in the median, and the "
            f"checkpoint's smallest threshold is {least:.2g}: use float16 or float32"
        )
    if not loaded.info.trained:
        log.warning(
            "the weights are not trained: the arm will not do what it is told "
            f"(model.path is '{given['model.path']}')"
        )
    if given["control.rate_hz"] > space.rate_hz:
        log.warning(
            f"control.rate_hz is {given['control.rate_hz']:g}, "
            f"the checkpoint was made for {space.rate_hz:g}: with cameras as fast, "
            f"the arm moves {given['control.rate_hz'] / space.rate_hz:.1f} times as fast as it was trained to"
        )
    return controller


def warn_of_slow_steps(controller: Controller, log: Log) -> None:
    """Warns if a step takes longer, by the latencies that were measured, than a camera frame may be old."""
    step_s, max_age_s = controller.policy.longest_ms / 1e3, controller.settings.inputs.max_age_ns / 1e9
    if step_s > max_age_s:
        log.warning(
            f"a step to the deepest exit that the budget allows takes {step_s:.3g} s on this device, and "
            f"inputs.max_age_s is {max_age_s:g} s: the arm holds after every such step: ask for a smaller "
            "budget (budget.deadline_ms, budget.peak_gmac), use a faster device, or allow older frames"
        )


def _load(
    folder: Path,
    device: str,
    dtype: torch.dtype,
    layers: int,
    bits: int | None,
    log: Log,
    check: Callable[[], None],
) -> checkpoint.Checkpoint:
    """The checkpoint's network and tokenizer. Logs the time of config and tokenizer, and that of the weights.

    layers, bits: as in checkpoint.load."""
    begin = time.monotonic()
    progress = _Progress("weights", "MB", MB, log, check)
    loaded = checkpoint.load(folder, device, dtype, layers, on_progress=progress, bits=bits)
    files_mb = sum((folder / name).stat().st_size for name in (checkpoint.CONFIG, checkpoint.TOKENIZER)) / MB
    log.info(f"config and tokenizer: {files_mb:.1f} MB in {progress.begin - begin:.1f} s")
    read_mb, seconds = progress.total / MB, time.monotonic() - progress.begin
    own = sum(each.nbytes for each in loaded.model.state_dict().values() if not each.is_meta)
    log.info(
        f"weights: {read_mb:.0f} MB in {seconds:.1f} s, {read_mb / seconds:.0f} MB/s; "
        f"{own / MB:.0f} MB in memory"
    )
    return loaded


def _controller(
    loaded: checkpoint.Checkpoint,
    given: dict[str, Any],
    space: ActionSpace,
    latencies: LatencyTable | None,
    log: Log,
) -> Controller:
    """The controller. Logs the time that it took, most of which is the calibration's."""
    begin = time.monotonic()
    settings = parameters.controller_settings(given)
    controller = Controller(loaded, settings, space, latencies, given["model.backend"])
    chosen = controller.policy.chosen
    if chosen.report:
        (log.warning if chosen.is_refused else log.info)(chosen.report)
    path = loaded.folder / CALIBRATION
    size = f"{path.stat().st_size / MB:.1f} MB" if path.is_file() else "none"
    log.info(f"calibration: {size}; budgets made ready in {time.monotonic() - begin:.1f} s")
    return controller


def _warm_up(controller: Controller, limit_s: float, log: Log, check: Callable[[], None]) -> None:
    """Runs every exit, and logs for how long and what did not fit into `limit_s` [s]."""
    progress = _Progress("warm-up", "steps", 1, log, check, limit_s)
    log.info(f"warm-up: at most {limit_s:g} s (model.warm_up_s), longer only for a step that has begun")
    done = controller.warm_up(limit_s, progress)
    log.info(
        f"warm-up: {done.steps} steps in {time.monotonic() - progress.begin:.1f} s; "
        f"{done.deepest_ms:.1f} ms a step to the deepest exit"
    )
    if done.steps < progress.total:
        layers = ", ".join(map(str, done.skipped)) or "none"
        log.info(
            f"warm-up: model.warm_up_s is over: {progress.total - done.steps} of {progress.total} steps are "
            f"left out; exits that never ran: {layers}. Their times are computed from those of deeper exits"
        )


class _Progress:
    """Is called with what is done and what there is in all; logs that every TELL_S, with the time left.

    begin: time [s] of the first call, by time.monotonic. total: of the newest call.
    """

    def __init__(
        self,
        what: str,
        unit: str,
        scale: float,
        log: Log,
        check: Callable[[], None],
        limit_s: float = math.inf,
    ):
        """scale: how much of what is counted makes one `unit`. limit_s: after this time the work ends."""
        self._what, self._unit, self._scale, self._log, self._check = what, unit, scale, log, check
        self._limit_s = limit_s
        self.begin, self.total = math.nan, 0

    def __call__(self, done: int, total: int) -> None:
        self._check()
        now = time.monotonic()
        if math.isnan(self.begin):
            self.begin = self._told = now
        self.total = total
        if 0 < done < total and now - self._told >= TELL_S:
            self._told, passed = now, now - self.begin
            left = max(0.0, min(passed / done * (total - done), self._limit_s - passed))
            self._log.info(
                f"{self._what}: {done / self._scale:.0f} of {total / self._scale:.0f} {self._unit}, "
                f"about {left:.0f} s left"
            )


def _device(wanted: str) -> str:
    """cpu or cuda. Raises UserError if a GPU is requested but torch finds none."""
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "model.device is 'cuda', but torch sees no GPU here: use 'cpu' or 'auto', "
            "or install a CUDA build of torch"
        )
    return wanted
