"""Training recipes that take seconds, demonstrations for them, and a function that runs them."""

import argparse
import hashlib
import os
import subprocess
import sys

import numpy as np
import yaml

from deer_vla_ros.__main__ import main
from deer_vla_ros.commands import train_command
from deer_vla_ros.lab.training.frames import THINGS, ShardWriter
from deer_vla_ros.lab.training.trainer import read_log
from deer_vla_ros.model.checkpoint import load

PHRASINGS = {"lift": ["lift it", "pick it up now"], "push": ["push it away"], "wait": ["wait"]}
JOINT = {
    "stage": "joint",
    "data": ["demos"],
    "steps": 12,
    "batch": 8,
    "window": 1,
    "instructions": 2,
    "optimiser": {
        "learning_rate": 3e-3,
        "head_scale": 1.0,
        "clip_norm": 8.0,
        "train_vision": True,
        "train_decoder": True,
    },
    "warmup_steps": 2,
    "loss": {"huber_delta": 0.1, "pose": 30.0, "gripper": 0.1},
    "heatmap": 0.2,
    "point": 0.2,
    "turn": 0.2,
    "pool_padding": False,
}
EXIT = {
    "stage": "exit",
    "data": ["demos"],
    "steps": 24,
    "batch": 8,
    "window": 4,
    "optimiser": {"learning_rate": 1e-2, "clip_norm": 8.0},
    "warmup_steps": 2,
    "cache": True,
}


def write_demonstrations(folder):
    """Writes two shards of frames in which the image's brightness and the task decide the action."""
    random = np.random.default_rng(0)
    for shard in range(2):
        writer = ShardWriter(folder / f"shard-{shard:04d}", tuple(PHRASINGS), 64, {"phrasings": PHRASINGS})
        for _ in range(6):
            brightness = random.random()
            writer.add_episode(_frame(random, brightness) for _ in range(int(random.integers(3, 9))))
        writer.close()


def _frame(random, brightness):
    actions = np.zeros((3, 7), np.float32)
    actions[:, 0] = (brightness - 0.5) * np.array([1.0, -1.0, 0.0])
    actions[:, 6] = [1, -1, 1]
    return {
        "images": (brightness * 255 * random.uniform(0.9, 1.0, (2, 64, 64, 3))).astype(np.uint8),
        "tcp": np.array([0.4, 0.0, 0.2, 1.0, 0.0, 0.0, 0.0]),
        "task": random.integers(3),
        "actions": actions,
        "valid": np.array([True, True, random.random() < 0.5]),
        "points": random.uniform(0.2, 0.5, (THINGS, 3)),
        "yaws": random.uniform(-0.7, 0.7, THINGS),
        "pixels": random.uniform(-0.1, 1.1, (THINGS, 2, 2)),
    }


def recipe_file(folder, *steps, **changes):
    """Writes a recipe with these training steps. changes: other values of the recipe. Returns its path."""
    path = folder / "recipe.yaml"
    network = {"preset": "tabletop", "layers": 4, "dropout": 0.0}
    values = {
        "name": "small",
        "network": network,
        "save_every": 3,
        "log_every": 1,
        "steps": [{"train": s} for s in steps],
    }
    path.write_text(yaml.safe_dump({**values, **changes}))
    return path


def command(config, out, data, processes=1):
    """The words of the command that runs a training."""
    start = [sys.executable, "-m"]
    if processes > 1:
        port = str(20000 + os.getpid() % 20000)
        start += ["torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", port, "-m"]
    return [
        *start,
        "deer_vla_ros",
        "train",
        "--config",
        str(config),
        "--out",
        str(out),
        "--data",
        str(data),
        "--threads",
        "1",
    ]


def parsed(config, out, data):
    """The parsed arguments of that command."""
    parser = argparse.ArgumentParser()
    train_command.add_arguments(parser)
    return parser.parse_args(command(config, out, data)[4:])


def train(config, out, data, processes=1):
    """Runs a training to its end. Returns its log and weights. With `processes` 1 it runs in this process."""
    if processes == 1:
        assert main(command(config, out, data)[3:]) == 0
    else:
        done = subprocess.run(command(config, out, data, processes), capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return read_log(out / "small" / "log.jsonl"), load(out / "small" / "checkpoint").model.state_dict()


def sums(out):
    """The SHA-256 sum of every file of a training, by its path.

    TensorBoard's files are left out, because they hold times.
    """
    files = (path for path in sorted((out / "small").rglob("*")) if path.is_file())
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if "tensorboard" not in path.parts
    }


def curve(log):
    """The (stage, step, loss) of every line of a training log."""
    return [(line["stage"], line["step"], line["loss"]) for line in log]
