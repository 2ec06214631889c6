"""What is done, in which order, to make a network? A recipe: one YAML file, from no data and no weights to a checkpoint."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deer_vla_ros.errors import UserError
from deer_vla_ros.files import read_yaml
from deer_vla_ros.lab.training.losses import LossWeights
from deer_vla_ros.lab.training.optimisation import OptimiserSettings, Schedule, Stage
from deer_vla_ros.model.config import PRESETS, ModelConfig
from deer_vla_ros.model.from_json import from_json

FORMATS = ("frames", "calvin")


@dataclass(frozen=True)
class Network:
    """preset: one of model.config.PRESETS; layers: of its decoder. exits: False makes a network that always runs to the end.

    from_checkpoint: folder of weights to start from, of just this shape, empty for random ones. dropout: of the heads, in place of the preset's
    (or of the one that from_checkpoint has).
    memory: False makes heads without LSTM, which decide from the present step alone.
    """

    preset: str
    layers: int
    exits: bool = True
    from_checkpoint: str = ""
    dropout: float = -1.0
    memory: bool = True

    def config(self) -> ModelConfig:
        """The network's shape; UserError for an unknown preset."""
        if self.preset not in PRESETS:
            raise UserError(f"recipe: network.preset is {self.preset!r}: use one of {', '.join(PRESETS)}")
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
        """Raises UserError, with the first field that differs, unless weights of this shape are what the recipe starts from."""
        wanted = self.config()
        if self.dropout < 0:
            own = {name: getattr(found.head, name) for name in ("lstm_dropout", "mlp_dropout")}
            wanted = dataclasses.replace(wanted, head=dataclasses.replace(wanted.head, **own))
        of_found = dict(_leaves(dataclasses.asdict(found)))
        for name, value in _leaves(dataclasses.asdict(wanted)):
            if of_found.get(name) != value:
                raise UserError(
                    f"recipe: network has {name} {value}, {self.from_checkpoint} has {of_found.get(name)}: give the network that the folder holds"
                )


@dataclass(frozen=True)
class Record:
    """Demonstrations to make, unless they are there: `record-demos --demos N --out FOLDER --seed S`.

    with_policy: the network as it is by then acts first (DAgger).
    """

    folder: str
    demos: int
    seed: int
    with_policy: bool = False


@dataclass(frozen=True)
class Train:
    """One stage of training.

    data: folders, below the recipe's data folder unless absolute; format: of FORMATS. steps: optimiser steps.
    batch: windows of `window` steps, or where `instructions` is above 0 single frames, each with so many instructions; over all
    processes. accumulate: micro-batches that one step is made of. heatmap, point, turn: weights of losses.heatmap_loss, point_loss, turn_loss.
    auxiliary_heads, random_exits: as losses.multi_exit_loss. shift: random shift augmentation (pad 10 and 4 pixels at 224).
    pool_padding: whether a shorter instruction's padding counts in the pooled features, as the reference lets it; at inference there
    is none. cache: in the exit stage, compute every step's features once (no augmentation then).
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
                f"recipe: batch {self.batch} does not divide into {self.accumulate} micro-batches: change one of them"
            )
        if self.format not in FORMATS:
            raise UserError(f"recipe: format is {self.format!r}: use one of {', '.join(FORMATS)}")
        if self.instructions and (self.window != 1 or self.format != "frames"):
            raise UserError(
                "recipe: several instructions per frame need window 1 and format frames: their labels are of single frames"
            )
        if self.cache and (self.stage is not Stage.EXIT or self.shift):
            raise UserError("recipe: cache needs the exit stage and no shift: features must not change")
        self.schedule_of()

    @property
    def is_guided(self) -> bool:
        """Whether a grounding's guides have any weight in the loss."""
        return any((self.heatmap, self.point, self.turn))

    def schedule_of(self) -> Schedule:
        return Schedule(self.schedule, self.warmup_steps, self.steps)


@dataclass(frozen=True)
class Recipe:
    """steps: Record and Train in the order in which they are done. seed: of everything that is drawn.

    compile: whether torch.compile makes the layers faster (needs a C++ compiler). dtype: of the weights in the checkpoint folder,
    float32 or float16. evaluate_every: optimiser steps between
    evaluations in the simulator, 0 for none.
    """

    name: str
    network: Network
    steps: tuple[Record | Train, ...]
    seed: int = 0
    compile: bool = False
    dtype: str = "float32"
    log_every: int = 50
    save_every: int = 500
    evaluate_every: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "float16"):
            raise UserError(f"recipe: dtype is {self.dtype!r}: use float32 or float16")
        for name, least in (("log_every", 1), ("save_every", 1), ("evaluate_every", 0)):
            if getattr(self, name) < least:
                raise UserError(f"recipe: {name} is {getattr(self, name)}: give {least} or more")
        untrained = itertools.takewhile(lambda step: isinstance(step, Record), self.steps)
        if any(step.with_policy for step in untrained):
            raise UserError(
                "recipe: with_policy before anything is trained: there is no policy yet; put a `train:` step before it"
            )

    def processes_within(self, most: int) -> int:
        """How many processes, up to `most`, every step's batch divides among."""
        sizes = [step.batch // step.accumulate for step in self.steps if isinstance(step, Train)]
        return max(count for count in range(1, most + 1) if not any(size % count for size in sizes))

    @classmethod
    def read(cls, path: Path) -> Recipe:
        """From YAML; whatever is not understood raises UserError by name."""
        values = read_yaml(path, "config/training/tabletop.yaml")
        if not isinstance(values, dict) or not isinstance(values.get("steps"), list):
            raise UserError(f"{path}: no list of steps: compare with config/training/tabletop.yaml")
        steps = tuple(
            _step(step, f"{path.name} step {i}") for i, step in enumerate(values.pop("steps"), start=1)
        )
        return dataclasses.replace(from_json(cls, {**values, "steps": []}, path.name), steps=steps)


def _leaves(values: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of nested dicts under its dotted name."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{before}{name}.")
        else:
            yield before + name, value


def _step(values: Any, where: str) -> Record | Train:
    kinds = {"record": Record, "train": Train}
    if not isinstance(values, dict) or len(values) != 1 or next(iter(values)) not in kinds:
        raise UserError(f"{where}: {values!r}: give one of `record:` and `train:`")
    kind, fields = next(iter(values.items()))
    return from_json(kinds[kind], fields, where)
