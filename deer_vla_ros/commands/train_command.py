"""Trains a network by a recipe: demonstrations, stages of training, a checkpoint folder.

Example: the recipe of the embedded network, and the released network on eight GPUs:

    python -m deer_vla_ros train --config config/training/tabletop.yaml --out out/train
    torchrun --nproc-per-node 8 -m deer_vla_ros train --config config/training/deer_3b_d.yaml \\
        --data /data/calvin/task_D_D

The folder OUT/NAME gets log.jsonl and tensorboard/ (the loss curve), a folder with the state of each stage,
and checkpoint/. After a run was killed, the same command goes on from the last saved state.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, required=True, help="the recipe, a YAML file")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("out/train"),
        help="where the run's folder is made (default: %(default)s)",
    )
    parser.add_argument(
        "--data", type=Path, help="where the recipe's data folders lie or are made (default: OUT/data)"
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto takes a GPU where there is one (default: %(default)s)",
    )
    parser.add_argument(
        "--threads", type=int, default=0, help="torch threads of each process (default: torch's own)"
    )


def run(args: argparse.Namespace) -> int:
    """Returns 0 when the checkpoint is written. Raises UserError for a wrong recipe or wrong data."""
    import torch

    from deer_vla_ros.lab.training.recipe import Recipe
    from deer_vla_ros.lab.training.trainer import processes
    from deer_vla_ros.lab.training.training_run import TrainingRun

    recipe = Recipe.read(args.config)
    if args.threads:
        torch.set_num_threads(args.threads)
    gpu = torch.cuda.is_available()
    with processes(args.device if args.device != "auto" else "cuda" if gpu else "cpu") as (share, device):
        TrainingRun(recipe, args.out / recipe.name, args.data or args.out / "data", device, share).finish()
    return 0
