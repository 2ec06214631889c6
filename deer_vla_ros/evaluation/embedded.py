"""Where does the checkpoint in `deer_vla_ros/embedded` come from? Made here, from a seed, until trained weights exist.

Run as `python -m deer_vla_ros.evaluation.embedded`; it writes the folder anew.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from deer_vla_ros.evaluation.table_episodes import INSTRUCTIONS, instruction_of, table_observations
from deer_vla_ros.inference.exit_rule import ExitRule
from deer_vla_ros.inference.policy import DeerPolicy
from deer_vla_ros.inference.types import Observation, PolicyStep
from deer_vla_ros.model.action_space import TABLETOP
from deer_vla_ros.model.checkpoint import EMBEDDED, Checkpoint, CheckpointInfo, save
from deer_vla_ros.model.config import ModelConfig, tabletop
from deer_vla_ros.model.network import MultiExitVLA
from deer_vla_ros.model.text import END_OF_CHUNK, END_OF_TEXT, IMAGE, PAD, InstructionTokenizer

OUTPUT_GAIN = 0.25
"""What a freshly initialised pose output is multiplied by, as is usual for policies."""


def train_tokenizer(config: ModelConfig) -> InstructionTokenizer:
    """A byte-level BPE that keeps the table's words whole, and takes any other text too, in more tokens; deterministic."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = [AddedToken(token, special=True) for token in (END_OF_TEXT, END_OF_CHUNK, IMAGE, PAD)]
    trainer = trainers.BpeTrainer(
        vocab_size=config.decoder.vocabulary,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(INSTRUCTIONS, trainer)
    return InstructionTokenizer(tokenizer, config.max_tokens)


def full_depth_steps(model: MultiExitVLA, tokenizer: InstructionTokenizer, episodes: list[list[Observation]]) -> list[PolicyStep]:
    """The decisions of a policy that never stops early, one instruction per episode."""
    exits = model.config.exits
    policy = DeerPolicy(model, tokenizer, ExitRule(exits, (-1.0,) * len(exits)))
    steps = []
    for index, episode in enumerate(episodes):
        policy.reset(instruction_of(index))
        steps += [policy.step(observation) for observation in episode]
    return steps


def calm_poses(model: MultiExitVLA, steps: list[PolicyStep]) -> None:
    """Makes motions small and takes their mean out: an untrained arm then dithers instead of winding itself up."""
    mean = np.mean([np.arctanh(step.action.pose) for step in steps], axis=0)
    out = model.shared_head.pose.out
    out.bias -= torch.from_numpy(mean)
    out.weight *= OUTPUT_GAIN
    out.bias *= OUTPUT_GAIN


def equal_share_thresholds(deltas: np.ndarray) -> tuple[float, ...]:
    """Thresholds under which each exit takes the same share of the samples (N, exits); the last takes what is left."""
    left, thresholds = deltas, []
    for index in range(deltas.shape[1] - 1):
        threshold = float(np.quantile(left[:, index], 1 / (deltas.shape[1] - index)))
        thresholds.append(threshold)
        left = left[left[:, index] > threshold]
    return (*thresholds, 1e8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=EMBEDDED)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.environ.setdefault("MUJOCO_GL", "egl")
    torch.manual_seed(args.seed)
    config = tabletop()
    model = MultiExitVLA(config).eval().requires_grad_(False)
    tokenizer = train_tokenizer(config)
    seeds, steps = range(8), 25
    episodes = [table_observations(seed, steps) for seed in seeds]
    calm_poses(model, full_depth_steps(model, tokenizer, episodes))
    deltas = np.array([step.deltas for step in full_depth_steps(model, tokenizer, episodes)])
    info = CheckpointInfo(
        model=config,
        action_space=TABLETOP,
        weights=f"random initialisation, seed {args.seed}: not trained, the arm does not follow instructions",
        trained=False,
        delta="l2",
        thresholds=equal_share_thresholds(deltas),
    )
    readme = f"""# Embedded checkpoint

The `tabletop` network, **randomly initialised** (torch seed {args.seed}) and not trained: it shows the whole path at work, images
matter and exits vary, but the arm does not do what the instruction says. Trained weights will replace it.

On the same steps of the simulated table, motions were scaled to a quarter and their mean taken out of the head's bias, so
that the arm dithers rather than winds itself up. The thresholds give each of the {len(config.exits)} exits an equal share of {len(deltas)} steps on the simulated table (seeds {seeds.start}
to {seeds.stop - 1}, {steps} steps each, arm moved at random).

Made by `python -m deer_vla_ros.evaluation.embedded --seed {args.seed}`; weights are stored as float16. Its calibration is made by
`python -m deer_vla_ros calibrate table`.
"""
    save(args.out, Checkpoint(info, model, tokenizer), readme, torch.float16)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{args.out}: {parameters / 1e6:.2f} M parameters, thresholds {[round(t, 4) for t in info.thresholds]}")


if __name__ == "__main__":
    main()
