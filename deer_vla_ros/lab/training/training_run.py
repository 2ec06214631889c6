"""One training by a recipe: its steps in order, its folder, and the checkpoint at the end."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from deer_vla_ros.bag.calvin_files import read_action_space
from deer_vla_ros.errors import UserError
from deer_vla_ros.files import remove_leftovers
from deer_vla_ros.lab.training.batches import (
    BatchSource,
    CachedWindows,
    FrameBatches,
    Share,
    WindowBatches,
    cached_features,
)
from deer_vla_ros.lab.training.calvin import CalvinWindows
from deer_vla_ros.lab.training.dataset import FrameWindows, Windows
from deer_vla_ros.lab.training.frames import Frames
from deer_vla_ros.lab.training.prefetch import Prefetched
from deer_vla_ros.lab.training.recipe import Recipe, RecordStep, Train
from deer_vla_ros.lab.training.tokenizer import train_tokenizer
from deer_vla_ros.lab.training.trainer import StageState, Trainer, TrainingLog, network_of
from deer_vla_ros.model.action_space import CALVIN, TABLETOP, ActionSpace
from deer_vla_ros.model.checkpoint import README, Checkpoint, CheckpointInfo, folder_of, load, load_info, save
from deer_vla_ros.model.network import MultiExitVLA
from deer_vla_ros.model.text import InstructionTokenizer
from deer_vla_ros.processes import run_python

CHECKPOINT = "checkpoint"


class TrainingRun:
    """A run of a recipe in a folder."""

    def __init__(self, recipe: Recipe, folder: Path, data: Path, device: torch.device, share: Share):
        self._recipe, self._folder, self._data, self._device, self._share = (
            recipe,
            folder,
            data,
            device,
            share,
        )
        for each in (folder, *folder.rglob("*")):
            remove_leftovers(each)
        torch.manual_seed(recipe.seed)
        self._tokenizer: InstructionTokenizer | None = None
        self._model: MultiExitVLA | None = None
        self._action_space = self._declared_action_space()
        self._trained = False

    def finish(self) -> None:
        """Carries out every step that is not done yet, and writes the checkpoint."""
        number, identity = 0, {"seed": self._recipe.seed, **_flat("network", self._recipe.network)}
        for index, step in enumerate(self._recipe.steps, start=1):
            identity |= _flat(f"step {index}", step)
            if isinstance(step, RecordStep):
                self._record(step)
            else:
                number += 1
                self._train(number, step, identity)
        if self._share.rank == 0:
            self._finish_checkpoint(self._folder / CHECKPOINT)

    def _finish_checkpoint(self, checkpoint: Path) -> None:
        """Writes the checkpoint, unless it exists and nothing was trained: it may be calibrated already."""
        if (checkpoint / README).is_file() and not self._trained:
            print(f"{checkpoint}: is there, and nothing was left to train")
            return
        self._save(checkpoint)
        print(
            f"{checkpoint}: calibrate it next: python -m deer_vla_ros calibrate table --checkpoint "
            f"{checkpoint}"
        )

    def _record(self, step: RecordStep) -> None:
        """Records demonstrations in another process, because training needs no simulator."""
        command = [
            "record-demos",
            "--demos",
            step.demos,
            "--seed",
            step.seed,
            "--out",
            self._data / step.folder,
        ]
        if step.with_policy and self._share.rank == 0:
            policy = self._folder / f"policy_for_{step.folder}"
            if self._trained or not (policy / README).is_file():
                self._save(policy)
            command += ["--policy", policy]
        if self._share.rank == 0:
            self._other_command(command)
        if self._share.world > 1:
            torch.distributed.barrier()

    def _train(self, number: int, step: Train, identity: dict[str, Any]) -> None:
        folder = self._folder / f"stage-{number}-{step.stage.value}"
        self._prepare_network(step)
        state = StageState(folder, identity)
        tensors, steps_done = state.read()
        if steps_done and self._trained:
            raise UserError(
                f"{folder} came of an older training of the stage before it: "
                f"remove it and what follows it in {self._folder} to train anew"
            )
        if tensors:
            state.check(network_of(tensors), self._model.state_dict())
            self._model.load_state_dict(network_of(tensors))
        if steps_done >= step.steps:
            return
        self._trained = True
        source = self._source(step)
        trainer = Trainer(
            self._model,
            step,
            source,
            self._tokenizer.image_token,
            self._recipe.seed + number,
            state,
            self._share,
            self._recipe.compile and not step.cache,
        )
        log = TrainingLog(self._folder, folder.name, trainer.steps_done) if self._share.rank == 0 else None
        with _progress_bar(self._share.rank == 0) as bar:
            task = bar.add_task(folder.name, total=step.steps, completed=trainer.steps_done, detail="")

            def on_step(progress) -> None:
                bar.update(
                    task,
                    completed=progress.step,
                    detail=f"loss {progress.loss:.4f}, {progress.samples_per_second:.0f} samples/s",
                )
                if log and (progress.step % self._recipe.log_every == 0 or progress.step in (1, step.steps)):
                    log.add(progress)
                if (
                    self._recipe.evaluate_every
                    and progress.step % self._recipe.evaluate_every == 0
                    and self._share.rank == 0
                ):
                    self._evaluate(folder, progress.step)

            trainer.run(self._recipe.save_every, on_step)
        if log:
            log.close()

    def _prepare_network(self, step: Train) -> None:
        """Makes or loads the network and its tokenizer, if that is not done yet."""
        if self._model is not None:
            return
        network = self._recipe.network
        if network.from_checkpoint:
            network.check(load_info(folder_of(network.from_checkpoint)).model)
            checkpoint = load(folder_of(network.from_checkpoint), self._device, for_training=True)
            self._model, self._tokenizer = checkpoint.model, checkpoint.tokenizer
            return
        config = network.config()
        self._tokenizer = train_tokenizer(self._windows(step).texts, config)
        self._model = MultiExitVLA(config).to(self._device)

    def _declared_action_space(self) -> ActionSpace:
        """The action space of the data, if they declare one; else that of the first weights, else the
        preset's."""
        network = self._recipe.network
        folders = {
            self._data / name for step in self._recipe.steps if isinstance(step, Train) for name in step.data
        }
        declared = {folder: space for folder in sorted(folders) if (space := read_action_space(folder))}
        if len(set(declared.values())) > 1:
            raise UserError(
                f"{' and '.join(map(str, declared))} say different things of what an action means: "
                "convert them with one --params"
            )
        if declared:
            return next(iter(declared.values()))
        if network.from_checkpoint:
            return load_info(folder_of(network.from_checkpoint)).action_space
        return TABLETOP if network.preset == "tabletop" else CALVIN

    def _source(self, step: Train) -> BatchSource:
        seed, micro = self._recipe.seed, step.batch // step.accumulate
        if step.cache:
            frames = self._frames(step)
            features = cached_features(
                self._model, frames, self._tokenizer, seed, step.pool_padding, self._share
            )
            return CachedWindows(frames, features, micro, step.window, seed)
        if step.instructions:
            return FrameBatches(self._frames(step), self._tokenizer, micro, step.instructions, seed)
        size = self._model.config.vision.image_size
        source = WindowBatches(
            self._windows(step), self._tokenizer, size, micro, step.window, seed, step.shift
        )
        return Prefetched(source, step.accumulate)

    def _windows(self, step: Train) -> Windows:
        if step.format == "calvin":
            return CalvinWindows([self._data / name for name in step.data])
        return FrameWindows(self._frames(step))

    def _frames(self, step: Train) -> Frames:
        return Frames(self._data / name for name in step.data)

    def _evaluate(self, folder: Path, step: int) -> None:
        """Evaluates the present network in another process: two trials of every task at full depth."""
        policy = folder / f"checkpoint-{step}"
        self._save(policy)
        result = folder / f"evaluation-{step}.json"
        self._other_command(
            [
                "evaluate",
                "--checkpoint",
                policy,
                "--full-depth",
                "--chains",
                0,
                "--trials",
                2,
                "--seed",
                99,
                "--json",
                result,
            ]
        )

    def _save(self, folder: Path) -> None:
        recipe, exits = self._recipe, self._model.config.exits
        info = CheckpointInfo(
            model=self._model.config,
            action_space=self._action_space,
            weights=f"trained by the recipe {recipe.name}, seed {recipe.seed}",
            trained=True,
            delta="l2",
            thresholds=(-1.0,) * len(exits),
        )
        readme = (
            f"# {recipe.name}\n\nTrained by `python -m deer_vla_ros train`, recipe `{recipe.name}`. "
            "Not calibrated: it runs to the end.\n"
        )
        save(folder, Checkpoint(info, self._model, self._tokenizer), readme, getattr(torch, recipe.dtype))

    def _other_command(self, arguments: list) -> None:
        """Runs another command of this program. Raises UserError if it fails."""
        environment = {
            name: value
            for name, value in os.environ.items()
            if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        }
        run_python(["-m", "deer_vla_ros", *arguments], environment, "the recipe's")


def _flat(name: str, settings: Any) -> dict[str, Any]:
    """The values of a dataclass, by `NAME FIELD`."""
    return {f"{name} {field}": value for field, value in dataclasses.asdict(settings).items()}


def _progress_bar(visible: bool) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[detail]}"),
    )
    return Progress(*columns, disable=not visible)
