"""Loads the checkpoint that the parameters name, as a controller that is warmed up and keeps its budget."""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch

from deer_vla_ros.budget.cost import layers_within
from deer_vla_ros.budget.latency import LatencyTable
from deer_vla_ros.control.controller import Controller
from deer_vla_ros.errors import UserError
from deer_vla_ros.model import checkpoint
from deer_vla_ros.ros import parameters

LEAST_OF_BFLOAT16 = 0.01
"""Thresholds below this are changed too much by the rounding of bfloat16: measured on the released sizes, it
changes deltas by 0.002 in the median and by 0.017 at worst; float16 by 0.0002 and 0.0014."""


class Log(Protocol):
    """What the loggers of ROS nodes and of Python have in common."""

    def info(self, message: str) -> object: ...
    def warning(self, message: str) -> object: ...


def warm_controller(given: dict[str, Any], log: Log, latencies: LatencyTable | None = None) -> Controller:
    """A warmed-up controller for the parameter values `given`. Logs what was loaded, and raises UserError.

    latencies: replace the measured latencies, as in Controller.
    """
    if given["model.cpu_threads"] > 0:
        torch.set_num_threads(given["model.cpu_threads"])
    device = _device(given["model.device"])
    folder, dtype = checkpoint.folder_of(given["model.path"]), _dtype(given["model.dtype"], device)
    budget = parameters.budget(given)
    budget.check()
    resident = layers_within(checkpoint.load_info(folder).model, dtype.itemsize, budget.memory_gib)
    loaded = checkpoint.load(folder, device, dtype, resident)
    space = parameters.action_space(given, loaded.info.action_space)
    settings = parameters.controller_settings(given)
    controller = Controller(loaded, settings, space, latencies, given["model.backend"])
    chosen = controller.policy.chosen
    if chosen.report:
        (log.warning if chosen.is_refused else log.info)(chosen.report)
    controller.warm_up()
    controller.policy.check(budget)
    controller.policy.set(budget)
    log.info(
        f"weights: {loaded.info.weights}; on {device} as {str(dtype).removeprefix('torch.')}; {space}; "
        f"{controller.settings.guard}"
    )
    least = min(loaded.info.thresholds[:-1], default=math.inf)
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


def _dtype(wanted: str, device: str) -> torch.dtype:
    """The number type of a parameter value; `auto` depends on the device."""
    if wanted == "auto":
        return torch.float16 if device == "cuda" else torch.float32
    return getattr(torch, wanted)


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
