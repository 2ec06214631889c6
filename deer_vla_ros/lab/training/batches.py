"""Training batches. A batch depends only on seed and step number, so a resumed run draws the same batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from deer_vla_ros.errors import UserError
from deer_vla_ros.inference.preprocess import normalised
from deer_vla_ros.lab.training.augmentation import PAD_GRIPPER, PAD_STATIC, random_shift
from deer_vla_ros.lab.training.dataset import Windows, window_rows
from deer_vla_ros.lab.training.frames import Frames
from deer_vla_ros.lab.training.losses import ActionTargets, features_of
from deer_vla_ros.model.network import MultiExitVLA
from deer_vla_ros.model.text import InstructionTokenizer


@dataclass(frozen=True)
class Batch:
    """One process's share of a batch: N instruction-steps, N = B windows of T steps.

    targets: of (B, T) steps. images (F, cameras, 3, size, size) uint8 and tcp (F, 7) or None: of F moments.
    ids, mask (N, S): N / F instructions for each moment, ordered by moment. pixels (F, things, cameras, 2),
    points (F, things, 3) and yaws (F, things) or None: as in losses.heatmap_loss, point_loss and turn_loss.
    features (exits, B, T, width): replace images and texts if they were computed before.
    """

    targets: ActionTargets
    images: Tensor | None = None
    tcp: Tensor | None = None
    ids: Tensor | None = None
    mask: Tensor | None = None
    pixels: Tensor | None = None
    points: Tensor | None = None
    yaws: Tensor | None = None
    features: Tensor | None = None


@dataclass(frozen=True)
class Share:
    """The part of every batch that this process computes: number `rank` of `world`."""

    rank: int = 0
    world: int = 1

    def of(self, rows: np.ndarray) -> np.ndarray:
        """Returns this process's rows of a batch. Raises UserError if they do not divide evenly."""
        if len(rows) % self.world:
            raise UserError(
                f"training: a batch of {len(rows)} does not divide among {self.world} processes: "
                "change the recipe's batch"
            )
        return np.array_split(rows, self.world)[self.rank]


class BatchSource(Protocol):
    """Gives the batches of one stage of training."""

    def batch(self, step: int, micro: int, share: Share) -> Batch:
        """Returns micro-batch `micro` of optimiser step `step`; it is the same on every call."""


def rng_of(seed: int, *numbers: int) -> np.random.Generator:
    """Returns a generator that depends only on its arguments."""
    return np.random.default_rng([seed, *numbers])


class FrameBatches:
    """Single frames, each with several instructions and the expert's action for each of them.

    The first instruction is the one that was given. The others are counterfactual: possible in the frame, and
    drawn with a preference for tasks that are seldom possible.
    """

    def __init__(
        self, frames: Frames, tokenizer: InstructionTokenizer, count: int, instructions: int, seed: int
    ):
        self._frames, self._count, self._instructions, self._seed = frames, count, instructions, seed
        self._texts = _Texts(tokenizer, [frames.phrasings[task] for task in frames.tasks])
        self._how_often = frames.valid.mean(0)

    def batch(self, step: int, micro: int, share: Share) -> Batch:
        random = rng_of(self._seed, step, micro)
        rows = random.integers(0, len(self._frames), self._count)
        # Tasks are ranked by exponential random numbers whose mean is smaller for tasks that are seldom
        # possible. The first columns are then a weighted draw without replacement (Efraimidis and Spirakis
        # 2006). The given task comes first, impossible tasks come last.
        order = random.exponential(size=(self._count, len(self._frames.tasks))) * self._how_often
        order[~self._frames.valid[rows]] = np.inf
        order[np.arange(self._count), self._frames.task[rows]] = -1.0
        tasks = np.argsort(order, axis=1)[:, : self._instructions]
        sensible = self._frames.valid[rows].sum(1, keepdims=True)
        tasks = np.take_along_axis(
            tasks, np.arange(self._instructions)[None] % np.minimum(sensible, self._instructions), 1
        )
        phrases = self._texts.draw(tasks, random)
        rows, tasks, phrases = (share.of(part) for part in (rows, tasks, phrases))
        ids, mask = self._texts.encoded(phrases.ravel())
        actions = np.take_along_axis(self._frames.gather("actions", rows), tasks[..., None], 1)
        there = {
            name: torch.from_numpy(self._frames.gather(name, rows))
            for name in ("tcp", "pixels", "points", "yaws")
        }
        return Batch(
            images=_channels_first(self._frames.gather("images", rows)),
            ids=ids,
            mask=mask,
            targets=ActionTargets.from_actions(torch.from_numpy(actions).flatten(0, 1)[:, None]),
            **there,
        )


class WindowBatches:
    """Windows of consecutive steps of one instruction, as in the reference."""

    def __init__(
        self,
        windows: Windows,
        tokenizer: InstructionTokenizer,
        size: int,
        count: int,
        window: int,
        seed: int,
        shift: bool,
    ):
        self._windows, self._tokenizer, self._size = windows, tokenizer, size
        self._count, self._window, self._seed, self._shift = count, window, seed, shift

    def batch(self, step: int, micro: int, share: Share) -> Batch:
        random = rng_of(self._seed, step, micro)
        chosen = random.integers(0, len(self._windows), self._count)
        drawn = self._windows.batch(share.of(chosen), self._window, self._size, random)
        images = _channels_first(drawn.images)
        if self._shift:
            images = self._shifted(images, step, micro, share)
        ids, mask = self._tokenizer.encode(drawn.instructions)
        actions, valid = torch.from_numpy(drawn.actions).float(), torch.from_numpy(drawn.valid)
        count = float(self._windows.valid_steps(chosen, self._window)) / share.world
        return Batch(
            images=images.flatten(0, 1),
            tcp=None if drawn.tcp is None else torch.from_numpy(drawn.tcp).float().flatten(0, 1),
            ids=ids.repeat_interleave(self._window, 0),
            mask=mask.repeat_interleave(self._window, 0),
            targets=ActionTargets.from_actions(actions, valid, count),
        )

    def _shifted(self, images: Tensor, step: int, micro: int, share: Share) -> Tensor:
        generator = torch.Generator().manual_seed(
            int(rng_of(self._seed, step, micro, share.rank, 1).integers(2**62))
        )
        pads = (round(pad * self._size / 224) for pad in (PAD_STATIC, PAD_GRIPPER))
        return torch.stack([random_shift(images[:, :, i], pad, generator) for i, pad in enumerate(pads)], 2)


class _Texts:
    """The token ids of all phrasings of all tasks, encoded once."""

    def __init__(self, tokenizer: InstructionTokenizer, phrasings: list[list[str]]):
        self._ids, self._mask = tokenizer.encode([text for texts in phrasings for text in texts])
        self._starts = np.cumsum([0] + [len(texts) for texts in phrasings])

    def draw(self, tasks: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Draws the number of a phrasing for every task number."""
        return self._starts[tasks] + (random.random(tasks.shape) * np.diff(self._starts)[tasks]).astype(int)

    def encoded(self, phrases: np.ndarray) -> tuple[Tensor, Tensor]:
        """Returns ids and mask (N, S). S is that of the longest phrasing, so compiled code sees one shape."""
        return self._ids[phrases], self._mask[phrases]


def _channels_first(images: np.ndarray) -> Tensor:
    """(..., H, W, 3) -> (..., 3, H, W)."""
    return torch.from_numpy(images).movedim(-1, -3)


class CachedWindows:
    """Windows of features that were computed once, for an exit stage in which only the heads change."""

    def __init__(self, frames: Frames, features: Tensor, count: int, window: int, seed: int):
        """features (exits, frames, width): of every frame with the instruction of its episode."""
        self._features, self._count, self._window, self._seed = features, count, window, seed
        self._episode = frames.episode
        every = np.arange(len(frames))
        self._actions = np.concatenate(
            [
                frames.gather("actions", part)[np.arange(len(part)), frames.task[part]]
                for part in np.array_split(every, 1 + len(every) // 4096)
            ]
        )

    def batch(self, step: int, micro: int, share: Share) -> Batch:
        starts = rng_of(self._seed, step, micro).integers(0, len(self._episode), self._count)
        rows, valid = window_rows(self._episode, starts, self._window)
        count = valid.sum() / share.world
        rows, valid = share.of(rows), share.of(valid)
        actions = torch.from_numpy(self._actions[rows])
        return Batch(
            targets=ActionTargets.from_actions(actions, torch.from_numpy(valid), float(count)),
            features=self._features[:, torch.from_numpy(rows)].float(),
        )


@torch.no_grad()
def cached_features(
    model: MultiExitVLA,
    frames: Frames,
    tokenizer: InstructionTokenizer,
    seed: int,
    pool_padding: bool,
    share: Share = Share(),
    chunk: int = 256,
) -> Tensor:
    """Returns the features of all frames, (exits, frames, width) float16 on the CPU, without dropout.

    The phrasing of an instruction is drawn once per episode. Each process computes a part; then they exchange
    the parts.
    """
    texts = _Texts(tokenizer, [frames.phrasings[task] for task in frames.tasks])
    first = np.searchsorted(frames.episode, np.arange(frames.episodes))
    phrases = texts.draw(frames.task[first], rng_of(seed, 4))[frames.episode]
    was_training, results = model.training, []
    model.eval()
    parts = np.array_split(np.arange(len(frames)), share.world)
    for rows in np.array_split(parts[share.rank], 1 + len(parts[share.rank]) // chunk):
        ids, mask = (part.to(model.device) for part in texts.encoded(phrases[rows]))
        images = normalised(_channels_first(frames.gather("images", rows)).to(model.device), model.dtype)
        tcp = torch.from_numpy(frames.gather("tcp", rows)).to(model.device)
        features, _ = features_of(model, images, ids, mask, tokenizer.image_token, tcp, pool_padding)
        results.append(features.half().cpu())
    model.train(was_training)
    own = torch.cat(results, 1)
    if share.world == 1:
        return own
    every = [
        own if rank == share.rank else own.new_empty(len(own), len(part), own.shape[2])
        for rank, part in enumerate(parts)
    ]
    for rank, tensor in enumerate(every):
        exchanged = tensor.to(model.device)
        dist.broadcast(exchanged, rank)
        every[rank] = exchanged.cpu()
    return torch.cat(every, 1)
