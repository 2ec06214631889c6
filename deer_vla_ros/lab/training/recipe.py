"""Training recipes: YAML files that list every step from no data and no weights to a checkpoint.

A recipe may take its values from another recipe: `base: FILE`, relative to its own folder. It then states
only what differs. Mappings are merged key by key; other values replace those of the base. `steps` may be a
mapping from the number of a step in the base to the changes of that step, or to null, which removes the step.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deer_vla_ros.errors import UserError, shown
from deer_vla_ros.lab.training.losses import LossWeights
from deer_vla_ros.lab.training.optimisation import OptimiserSettings, Schedule, Stage
from deer_vla_ros.model.config import PRESETS, ModelConfig
from deer_vla_ros.model.from_json import from_json
from deer_vla_ros.untrusted import read_yaml

FORMATS = ("frames", "calvin")
EXAMPLE = "config/training/tabletop.yaml"


@dataclass(frozen=True)
class Network:
    """The network that a recipe trains.

    preset: one of model.config.PRESETS. layers: number of decoder layers. exits: False makes a network that
    always runs all layers. from_checkpoint: a folder of weights of exactly this shape to start from; empty
    for random weights.
    dropout: of the heads, instead of that of the preset or of from_checkpoint. memory: False makes heads
    without LSTM, which decide from the current step only.
    """

    preset: str
    layers: int
    exits: bool = True
    from_checkpoint: str = ""
    dropout: float = -1.0
    memory: bool = True

    def config(self) -> ModelConfig:
        """Returns the network's shape. Raises UserError for an unknown preset."""
        if self.preset not in PRESETS:
            raise UserError(
                f"recipe: network.preset is {shown(self.preset)}: use one of {', '.join(PRESETS)}"
            )
        config = PRESETS[self.preset](self.layers)
        head = config.head
        if self.dropout >= 0:
            head = dataclasses.replace(head, lstm_dropout=self.dropout, mlp_dropout=self.dropout)
        if not self.memory:
            head = dataclasses.replace(head, lstm_layers=0)
        return dataclasses.replace(
            config, head=head, exit_interval=config.exit_interval if self.exits else self.layers
        )

    def check(self, found: ModelConfig) -> None:
        """Raises UserError with the first field in which `found`, the shape of the start weights, differs."""
        wanted = self.config()
        if self.dropout < 0:
            own = {name: getattr(found.head, name) for name in ("lstm_dropout", "mlp_dropout")}
            wanted = dataclasses.replace(wanted, head=dataclasses.replace(wanted.head, **own))
        of_found = dict(_leaves(dataclasses.asdict(found)))
        for name, value in _leaves(dataclasses.asdict(wanted)):
            if of_found.get(name) != value:
                raise UserError(
                    f"recipe: network has {name} {value}, {self.from_checkpoint} has {of_found.get(name)}: "
                    "give the network that the folder holds"
                )


@dataclass(frozen=True)
class RecordStep:
    """Demonstrations to make unless they exist: `record-demos --demos N --out FOLDER --seed S`.

    with_policy: the network as trained by the earlier steps acts first (DAgger).
    """

    folder: str
    demos: int
    seed: int
    with_policy: bool = False


@dataclass(frozen=True)
class Train:
    """One stage of training.

    data: folders, relative to the recipe's data folder or absolute. format: one of FORMATS. steps: optimiser
    steps.
    batch: number of windows of `window` steps, over all processes. If `instructions` is above 0, a batch has
    single frames with that many instructions each. accumulate: number of micro-batches in one step.
    heatmap, point, turn: weights of losses.heatmap_loss, point_loss and turn_loss.
    auxiliary_heads, random_exits: as in losses.multi_exit_loss. shift: random shift augmentation (up to 10
    and 4 pixels at an image size of 224). pool_padding: whether the padding of a shorter instruction counts
    in the pooled features, as in the reference; there is no padding at inference. cache: compute the features
    of every step only once; this needs the exit stage and no augmentation.
    """

    stage: Stage
    data: tuple[str, ...]
    steps: int
    batch: int
    format: str = "frames"
    window: int = 12
    instructions: int = 0
    accumulate: int = 1
    optimiser: OptimiserSettings = field(default_factory=OptimiserSettings)
    schedule: str = "constant"
    warmup_steps: int = 2500
    loss: LossWeights = field(default_factory=LossWeights)
    heatmap: float = 0.0
    point: float = 0.0
    turn: float = 0.0
    auxiliary_heads: bool = True
    random_exits: bool = True
    pool_padding: bool = True
    shift: bool = False
    cache: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "window", "accumulate"):
            if getattr(self, name) < 1:
                raise UserError(f"recipe: {name} is {getattr(self, name)}: give 1 or more")
        if self.batch % self.accumulate:
            raise UserError(
                f"recipe: batch {self.batch} does not divide into {self.accumulate} micro-batches: "
                "change one of them"
            )
        if self.format not in FORMATS:
            raise UserError(f"recipe: format is {shown(self.format)}: use one of {', '.join(FORMATS)}")
        if self.instructions and (self.window != 1 or self.format != "frames"):
            raise UserError(
                "recipe: several instructions per frame need window 1 and format frames: "
                "their labels are of single frames"
            )
        if self.cache and (self.stage is not Stage.EXIT or self.shift):
            raise UserError("recipe: cache needs the exit stage and no shift: features must not change")
        self.schedule_of()

    @property
    def is_guided(self) -> bool:
        """Whether a loss of the grounding (heatmap, point or turn) has any weight."""
        return any((self.heatmap, self.point, self.turn))

    def schedule_of(self) -> Schedule:
        """Returns the learning rate schedule. Raises UserError if it does not fit the steps."""
        return Schedule(self.schedule, self.warmup_steps, self.steps)


@dataclass(frozen=True)
class Recipe:
    """The steps that make one network.

    steps: RecordStep and Train, in their order. seed: of all random draws. compile: whether torch.compile
    makes the layers faster (needs a C++ compiler). dtype: of the weights in the checkpoint folder, float32 or
    float16. log_every, save_every, evaluate_every: optimiser steps between two log lines, two saved states,
    and two evaluations in the simulator (0: no evaluations).
    """

    name: str
    network: Network
    steps: tuple[RecordStep | Train, ...]
    seed: int = 0
    compile: bool = False
    dtype: str = "float32"
    log_every: int = 50
    save_every: int = 500
    evaluate_every: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "float16"):
            raise UserError(f"recipe: dtype is {shown(self.dtype)}: use float32 or float16")
        for name, least in (("log_every", 1), ("save_every", 1), ("evaluate_every", 0)):
            if getattr(self, name) < least:
                raise UserError(f"recipe: {name} is {getattr(self, name)}: give {least} or more")
        untrained = itertools.takewhile(lambda step: isinstance(step, RecordStep), self.steps)
        if any(step.with_policy for step in untrained):
            raise UserError(
                "recipe: with_policy before anything is trained: there is no policy yet; "
                "put a `train:` step before it"
            )

    def processes_within(self, most: int) -> int:
        """Returns the largest number of processes, up to `most`, that divides the batch of every step."""
        sizes = [step.batch // step.accumulate for step in self.steps if isinstance(step, Train)]
        return max(count for count in range(1, most + 1) if not any(size % count for size in sizes))

    @classmethod
    def read(cls, path: Path) -> Recipe:
        """Reads a recipe file and its bases. Raises UserError for unknown keys and wrong values."""
        values = read_values(path)
        if not isinstance(values.get("steps"), list):
            raise UserError(f"{path}: no list of steps: compare with {EXAMPLE}")
        steps = tuple(
            _step(step, f"{path.name} step {i}") for i, step in enumerate(values.pop("steps"), start=1)
        )
        return dataclasses.replace(from_json(cls, {**values, "steps": []}, path.name), steps=steps)


def read_values(path: Path, derived: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Returns the values of a recipe file, completed with those of its base.

    derived: the files whose bases led to this one. Raises UserError if a file is missing or is not a recipe,
    or if the bases make a circle.
    """
    if path.resolve() in derived:
        chain = " -> ".join(each.name for each in (*derived, path))
        raise UserError(f"{path}: the recipes' bases make a circle ({chain}): remove one `base:`")
    values = read_yaml(path, EXAMPLE)
    if not isinstance(values, dict):
        raise UserError(f"{path}: no list of steps: compare with {EXAMPLE}")
    if "base" not in values:
        return values
    name = values.pop("base")
    base = path.parent / str(name)
    if not isinstance(name, str) or not base.is_file():
        raise UserError(
            f"{path}: its base {shown(name)} is no file: name a recipe, relative to {path.parent}"
        )
    based_on = read_values(base, (*derived, path.resolve()))
    steps = values.pop("steps", {})
    merged = _merged(based_on, values)
    merged["steps"] = _changed(based_on.get("steps"), steps, path) if isinstance(steps, dict) else steps
    return merged


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    both = {
        name: _merged(base[name], value)
        for name, value in changes.items()
        if isinstance(value, dict) and isinstance(base.get(name), dict)
    }
    return {**base, **changes, **both}


def _changed(steps: Any, changes: dict[Any, Any], path: Path) -> list[Any]:
    """Returns the base's list of steps after its changes, which are given by the step's number from 1."""
    numbered = dict(enumerate(steps if isinstance(steps, list) else [], start=1))
    for number, change in changes.items():
        if number not in numbered or not isinstance(change, dict | None):
            raise UserError(
                f"{path}: steps has {shown(number)}: {shown(change)}: give the number of a step of the base, "
                f"1 to {len(numbered)}, and its changes or null"
            )
        numbered[number] = None if change is None else _merged(numbered[number], change)
    return [step for step in numbered.values() if step is not None]


def _leaves(values: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Yields every value of nested dicts with its dotted name."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{before}{name}.")
        else:
            yield before + name, value


def _step(values: Any, where: str) -> RecordStep | Train:
    kinds = {"record": RecordStep, "train": Train}
    if not isinstance(values, dict) or len(values) != 1 or next(iter(values)) not in kinds:
        raise UserError(f"{where}: {shown(values)}: give one of `record:` and `train:`")
    kind, fields = next(iter(values.items()))
    return from_json(kinds[kind], fields, where)
