"""Training of one stage: optimiser steps in one or more processes that can be killed and resumed.

The random draws of a step (batch, exits, dropout) depend only on the seed and the step's number, and a saved
state is never incomplete. A killed run therefore continues exactly as an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from deer_vla_ros.errors import UserError, cause, shown
from deer_vla_ros.files import whole_file, write_text, writing
from deer_vla_ros.inference.preprocess import normalised
from deer_vla_ros.lab.training.batches import Batch, BatchSource, Share, rng_of
from deer_vla_ros.lab.training.losses import (
    ExitDraws,
    draw_exits,
    features_of,
    heatmap_loss,
    multi_exit_loss,
    point_loss,
    turn_loss,
)
from deer_vla_ros.lab.training.optimisation import Optimiser, Stage
from deer_vla_ros.lab.training.recipe import Train
from deer_vla_ros.model.grounding import Found
from deer_vla_ros.model.network import MultiExitVLA
from deer_vla_ros.untrusted import parse_json


@dataclass(frozen=True)
class Progress:
    """The result of one optimiser step.

    step: its number, from 1. loss: before the update. parts: parts of the loss by name. waited: share of the
    step's time in which this process waited for a batch.
    """

    step: int
    loss: float
    parts: dict[str, float]
    gradient_norm: float
    learning_rate: float
    samples_per_second: float
    waited: float


TIMES = ("samples_per_second", "waited")
"""The values of a Progress that differ between two runs of the same recipe."""


class StageState:
    """The file of a stage's folder that keeps its tensors, its number of steps and its recipe."""

    def __init__(self, folder: Path, recipe: dict[str, Any]):
        """recipe: everything that the stage's result depends on. A state of another recipe is refused."""
        self._path, self._recipe = folder / "state.safetensors", json.loads(json.dumps(recipe))

    @property
    def is_there(self) -> bool:
        return self._path.is_file()

    def read(self) -> tuple[dict[str, Tensor], int]:
        """Returns the tensors and the number of completed steps; both are empty or 0 without a saved state.

        Raises UserError if the state belongs to another recipe or is damaged.
        """
        if not self.is_there:
            return {}, 0
        try:
            with safe_open(self._path, framework="pt") as file:
                saved = parse_json((file.metadata() or {}).get("about", "{}"))
                if not (isinstance(saved, dict) and isinstance(saved.get("recipe"), dict)):
                    raise ValueError("it does not say its recipe")
                if type(saved.get("steps")) is not int or not 0 <= saved["steps"] < 10**12:
                    raise ValueError("it does not say its steps")
                self._compare(saved["recipe"])
                return {name: file.get_tensor(name) for name in file.keys()}, saved["steps"]
        except (SafetensorError, OSError, ValueError) as error:
            raise self.damaged(cause(error)) from error

    def damaged(self, why: str) -> UserError:
        """The error for a state that cannot be used."""
        return UserError(
            f"{self._path} is damaged ({why}): remove {self._path.parent} to train this stage anew"
        )

    def check(self, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
        """Raises UserError unless `found` has the names, shapes and types of `expected`."""
        if others := found.keys() ^ expected.keys():
            raise self.damaged(f"{len(others)} tensors are missing or unknown, such as {min(others)[:100]}")
        for name, tensor in expected.items():
            if found[name].shape != tensor.shape or found[name].dtype != tensor.dtype:
                raise self.damaged(
                    f"{name} has shape {tuple(found[name].shape)} and type {found[name].dtype}, not "
                    f"{tuple(tensor.shape)} and {tensor.dtype}"
                )

    def write(self, tensors: dict[str, Tensor], steps: int) -> None:
        """Replaces the saved state in one step, and waits until it is on the disk."""
        about = json.dumps({"steps": steps, "recipe": self._recipe})
        with whole_file(self._path, sum(tensor.nbytes for tensor in tensors.values())) as scratch:
            # One entry only: safetensors writes several in a random order.
            save_file(tensors, scratch, {"about": about})
            with open(scratch, "rb") as file:
                os.fsync(file.fileno())

    def _compare(self, saved: dict[str, Any]) -> None:
        names = [
            name for name in self._recipe.keys() | saved.keys() if self._recipe.get(name) != saved.get(name)
        ]
        if names:
            name = min(names)
            raise UserError(
                f"{self._path.parent} was trained with {name[:100]} {_text(saved.get(name))}, "
                f"the recipe now says {_text(self._recipe.get(name))}: "
                f"give another --out, or remove {self._path.parents[1]} to train anew"
            )


def _text(value: Any) -> str:
    return " ".join(value.split())[:100] if isinstance(value, str) else shown(value)


class StageLoss(nn.Module):
    """The loss of a batch as one module; DistributedDataParallel needs a forward pass."""

    def __init__(self, model: MultiExitVLA, train: Train, image_token: int, compiled: bool):
        super().__init__()
        self.model, self._train, self._image_token = model, train, image_token
        self._features = torch.compile(features_of) if compiled else features_of

    def forward(self, batch: Batch, draws: ExitDraws) -> dict[str, Tensor]:
        """Returns scalars by name; training minimises `total`."""
        train, features, found = self._train, batch.features, None
        if features is None:
            with torch.set_grad_enabled(train.stage is Stage.JOINT):
                features, found = self._look(batch)
        loss = self._of_features(features, batch, draws)
        if train.is_guided and found is not None and batch.pixels is not None:
            loss["heatmap"] = heatmap_loss(found, batch.pixels)
            loss["point"] = point_loss(found, batch.points, batch.tcp)
            loss["turn"] = turn_loss(found, batch.yaws, batch.points, batch.tcp)
            guides = train.heatmap * loss["heatmap"] + train.point * loss["point"] + train.turn * loss["turn"]
            loss["total"] = loss["total"] + guides
        return loss

    def _look(self, batch: Batch) -> tuple[Tensor, Found | None]:
        images = normalised(batch.images, self.model.dtype)
        text = (batch.ids, batch.mask, self._image_token)
        features, found = self._features(self.model, images, *text, batch.tcp, self._train.pool_padding)
        return features.unflatten(1, batch.targets.gripper.shape), found

    def _of_features(self, features: Tensor, batch: Batch, draws: ExitDraws) -> dict[str, Tensor]:
        loss = multi_exit_loss(
            self.model,
            features,
            batch.targets,
            draws,
            self._train.loss,
            auxiliary_heads=self._train.auxiliary_heads,
            random_exits=self._train.random_exits,
        )
        scalars = {"total": loss.total}
        for name, part in loss.parts():
            scalars[f"{name}/pose"], scalars[f"{name}/gripper"] = part.pose, part.gripper
        return scalars


class Trainer:
    """Trains a network in place, for one stage of a recipe."""

    def __init__(
        self,
        model: MultiExitVLA,
        train: Train,
        source: BatchSource,
        image_token: int,
        seed: int,
        state: StageState,
        share: Share = Share(),
        compiled: bool = False,
    ):
        """state: the saved state of this stage, from which the training continues."""
        self._model, self._train, self._source, self._seed, self._share = (
            model.train(),
            train,
            source,
            seed,
            share,
        )
        self._optimiser = Optimiser(model, train.stage, train.optimiser, train.schedule_of())
        self._loss: nn.Module = StageLoss(model, train, image_token, compiled)
        if share.world > 1:
            self._loss = DistributedDataParallel(self._loss, find_unused_parameters=not train.auxiliary_heads)
        self._state = state
        if state.is_there:
            self._load()

    @property
    def steps_done(self) -> int:
        return self._optimiser.steps

    def run(self, save_every: int, on_step: Callable[[Progress], Any]) -> None:
        """Does all remaining steps. Saves the state after every `save_every` steps and after the last one."""
        while self.steps_done < self._train.steps:
            on_step(self.step())
            if self.steps_done % save_every == 0 or self.steps_done == self._train.steps:
                self.save()

    def step(self) -> Progress:
        """Does one optimiser step over all its micro-batches."""
        began, number, parts = time.perf_counter(), self.steps_done, {}
        micro_batches, samples, waited = self._train.accumulate, 0, 0.0
        for micro in range(micro_batches):
            asked = time.perf_counter()
            batch = self._source.batch(number, micro, self._share)
            waited += time.perf_counter() - asked
            batch = _on_device(batch, self._model.device)
            samples += batch.targets.gripper.numel() * self._share.world
            self._seed_dropout(number, micro)
            with self._without_exchange(micro + 1 < micro_batches), self._autocast():
                loss = self._loss(batch, self._draws(number, micro, batch))
                (loss["total"] / micro_batches).backward()
            for name, value in loss.items():
                parts[name] = parts.get(name, 0.0) + value.detach() / micro_batches
        rate = max(self._optimiser.rates)
        norm = self._optimiser.step()
        scalars = self._over_all(parts)
        seconds = time.perf_counter() - began
        return Progress(
            self.steps_done, scalars.pop("total"), scalars, norm, rate, samples / seconds, waited / seconds
        )

    def save(self) -> None:
        """Saves everything that a resumed run needs; only the first process does so."""
        if self._share.rank != 0:
            return
        tensors = {f"model.{name}": tensor.contiguous() for name, tensor in self._model.state_dict().items()}
        optimiser = self._optimiser.state_dict()
        for index, state in optimiser["adamw"]["state"].items():
            tensors |= {f"adamw.{index}.{name}": value.contiguous() for name, value in state.items()}
        self._state.write(tensors, optimiser["steps"])

    def _load(self) -> None:
        tensors, steps = self._state.read()
        self._state.check(network_of(tensors), self._model.state_dict())
        adamw = {name: tensor for name, tensor in tensors.items() if name.startswith("adamw.")}
        if len(adamw) + len(network_of(tensors)) != len(tensors):
            raise self._state.damaged("it has tensors of neither network nor optimiser")
        # Before the first step, and for parameters that were never reached, the optimiser keeps nothing.
        kept = {name.split(".")[1] for name in adamw}
        expected = {
            f"adamw.{index}.{field}": tensor
            for index, parameter in enumerate(self._optimiser.parameters())
            if str(index) in kept
            for field, tensor in (
                ("step", torch.zeros(())),
                ("exp_avg", parameter),
                ("exp_avg_sq", parameter),
            )
        }
        self._state.check(adamw, expected)
        self._model.load_state_dict(network_of(tensors))
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in adamw.items():
            _, index, field = name.split(".")
            state.setdefault(int(index), {})[field] = tensor
        groups = self._optimiser.state_dict()["adamw"]["param_groups"]
        self._optimiser.load_state_dict({"adamw": {"state": state, "param_groups": groups}, "steps": steps})

    def _draws(self, number: int, micro: int, batch: Batch) -> ExitDraws:
        """Draws exits for the whole batch and returns those of this process's rows."""
        rows, window = batch.targets.gripper.shape
        generator = torch.Generator().manual_seed(int(rng_of(self._seed, number, micro, 2).integers(2**62)))
        drawn = draw_exits(len(self._model.config.exits), rows * self._share.world, window, generator)
        mine = slice(self._share.rank * rows, (self._share.rank + 1) * rows)
        return ExitDraws(drawn.per_step[mine], drawn.per_segment[mine])

    def _seed_dropout(self, number: int, micro: int) -> None:
        torch.manual_seed(int(rng_of(self._seed, number, micro, 3, self._share.rank).integers(2**62)))

    def _without_exchange(self, wanted: bool) -> contextlib.AbstractContextManager:
        """Delays the exchange of gradients between processes to the last micro-batch of a step."""
        return self._loss.no_sync() if wanted and self._share.world > 1 else contextlib.nullcontext()

    def _autocast(self) -> contextlib.AbstractContextManager:
        """Uses bfloat16 products on a GPU. They are slower on CPUs."""
        if self._model.device.type == "cuda":
            return torch.autocast("cuda", dtype=torch.bfloat16)
        return contextlib.nullcontext()

    def _over_all(self, parts: dict[str, Tensor]) -> dict[str, float]:
        """Returns the means of the parts over all processes."""
        values = torch.stack([value.float() for value in parts.values()])
        if self._share.world > 1:
            dist.all_reduce(values)
            values /= self._share.world
        return dict(zip(parts, values.tolist()))


def network_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the network's state dict from the tensors of a stage."""
    return {
        name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")
    }


class TrainingLog:
    """The loss curve: one JSON object per logged step in `log.jsonl`, and the same values for TensorBoard.

    A resumed run removes the lines after the step from which it continues. How fast the steps were is only
    told to TensorBoard, so that `log.jsonl` is the same for every run of a recipe.
    """

    def __init__(self, folder: Path, stage: str, resumed_at: int):
        self._path, self._stage = folder / "log.jsonl", stage
        kept = [line for line in read_log(self._path) if line["stage"] != stage or line["step"] <= resumed_at]
        write_text(self._path, "".join(json.dumps(line) + "\n" for line in kept))
        self._board = _Board(folder / "tensorboard" / stage, resumed_at)

    def add(self, progress: Progress) -> None:
        line = {name: value for name, value in vars(progress).items() if name not in TIMES}
        with writing(self._path), self._path.open("a") as file:
            file.write(json.dumps({"stage": self._stage, **line}) + "\n")
        scalars = {**vars(progress), **progress.parts}
        self._board.add(
            progress.step, {name: scalars[name] for name in scalars if name not in ("step", "parts")}
        )

    def close(self) -> None:
        self._board.close()


class _Board:
    """Scalars for TensorBoard, in a new file of a folder.

    tensorboardX's SummaryWriter is not used: its thread ends when the disk is full, and the training then
    waits for that thread for ever.
    """

    def __init__(self, folder: Path, resumed_at: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import scalar

        self._folder, self._event, self._scalar = folder, Event, scalar
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._writer = EventsWriter(str(folder / "events"))
            # TensorBoard leaves out what an earlier file says of this step and of those after it.
            start = SessionLog(status=SessionLog.START)
            self._writer.write_event(Event(wall_time=time.time(), step=resumed_at + 1, session_log=start))

    def add(self, step: int, scalars: dict[str, float]) -> None:
        with writing(self._folder):
            for name, value in scalars.items():
                summary = self._scalar(name, value)
                self._writer.write_event(self._event(wall_time=time.time(), step=step, summary=summary))
            self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a log. A line that is none is left out: a killed run may leave one at the end."""
    lines = []
    with contextlib.suppress(FileNotFoundError):
        for line in path.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                values = parse_json(line)
                if isinstance(values, dict) and isinstance(values.get("stage"), str):
                    if type(values.get("step")) is int:
                        lines.append(values)
    return lines


def _on_device(batch: Batch, device: torch.device) -> Batch:
    if device.type == "cpu":
        return batch
    targets = batch.targets
    moved = {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in vars(targets).items()
    }
    rest = {
        name: value.to(device) if isinstance(value, Tensor) else value for name, value in vars(batch).items()
    }
    return Batch(**{**rest, "targets": type(targets)(**moved)})


@contextlib.contextmanager
def processes(device: str) -> Iterator[tuple[Share, torch.device]]:
    """Yields the share of this process and its device. Under torchrun it opens the process group meanwhile.

    device: `cpu`, or `cuda`, where each process of this machine uses its own GPU.
    """
    if "RANK" not in os.environ:
        yield Share(), torch.device(device)
        return
    own = torch.device(device, int(os.environ["LOCAL_RANK"])) if device == "cuda" else torch.device(device)
    # The other processes can wait for hours while the first one records demonstrations.
    dist.init_process_group("nccl" if own.type == "cuda" else "gloo", timeout=timedelta(days=7))
    try:
        yield Share(dist.get_rank(), dist.get_world_size()), own
    finally:
        dist.destroy_process_group()
