"""How does a network rest on disk? A folder of plain files; no pickle is ever loaded."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from deer_vla_ros.errors import UserError
from deer_vla_ros.files import write_json, write_text
from deer_vla_ros.model.action_space import ActionSpace
from deer_vla_ros.model.config import ModelConfig
from deer_vla_ros.model.from_json import from_json
from deer_vla_ros.model.network import MultiExitVLA, build, check_shapes
from deer_vla_ros.model.text import InstructionTokenizer

CONFIG, WEIGHTS, TOKENIZER, README = "config.json", "model.safetensors", "tokenizer.json", "README.md"
EMBEDDED = Path(__file__).resolve().parent.parent / "embedded"
"""The checkpoint that ships with the package."""


@dataclass(frozen=True)
class CheckpointInfo:
    """What `config.json` says.

    weights: where the weights come from, in one line; trained: whether they were trained at all.
    delta, thresholds: the exit rule to start with, one threshold per exit of the model.
    """

    model: ModelConfig
    action_space: ActionSpace
    weights: str
    trained: bool
    delta: str
    thresholds: tuple[float, ...]

    def __post_init__(self) -> None:
        exits = self.model.exits
        if len(self.thresholds) != len(exits):
            raise UserError(
                f"config.json: {len(self.thresholds)} thresholds for the {len(exits)} exits {exits}: give one each"
            )

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "thresholds": list(self.thresholds)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CheckpointInfo:
        """Inverse of `to_dict`; unknown or missing keys and values of another type raise UserError by name."""
        return from_json(cls, values, "config.json: checkpoint")


@dataclass(frozen=True)
class Checkpoint:
    """A network ready for inference, and what is needed to use it.

    folder: where it was loaded from; None where it was made in memory.
    """

    info: CheckpointInfo
    model: MultiExitVLA
    tokenizer: InstructionTokenizer
    folder: Path | None = None


def folder_of(path: str) -> Path:
    """The checkpoint folder that a user names; an empty path is the embedded one."""
    return Path(path).expanduser() if path else EMBEDDED


def load_info(folder: Path) -> CheckpointInfo:
    """What a checkpoint folder says of itself, without its weights; a missing or malformed file raises UserError by name."""
    for name in (CONFIG, WEIGHTS, TOKENIZER):
        if not (folder / name).is_file():
            raise UserError(
                f"checkpoint {folder}: {name} is missing: give a folder with {CONFIG}, {WEIGHTS} and {TOKENIZER}"
            )
    try:
        return CheckpointInfo.from_dict(json.loads((folder / CONFIG).read_text()))
    except ValueError as error:  # of bytes that are no text, and of text that is no JSON
        raise UserError(
            f"{folder / CONFIG}: not JSON ({error}): restore the file from the checkpoint"
        ) from error


def load(
    folder: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    layers: int | None = None,
) -> Checkpoint:
    """Reads a checkpoint folder onto `device`, weights cast to `dtype`.

    layers: only so many decoder layers, the others stay without memory (on the meta device); None: all.
    A missing file, a missing or unknown tensor, or one of the wrong shape raises UserError by name; nothing is half loaded.
    """
    info = load_info(folder)
    tokenizer = InstructionTokenizer.from_file(folder / TOKENIZER, info.model.max_tokens)
    if tokenizer.size > info.model.decoder.vocabulary:
        raise UserError(
            f"checkpoint {folder}: {TOKENIZER} has {tokenizer.size} tokens, the network embeds {info.model.decoder.vocabulary}: "
            "they are not of the same model"
        )
    return Checkpoint(
        info,
        build(info.model, _read_weights(folder / WEIGHTS, info.model, device, dtype, layers)),
        tokenizer,
        folder,
    )


def set_thresholds(folder: Path, thresholds: tuple[float, ...]) -> None:
    """Makes these, one per exit, the folder's own: what the checkpoint does where no budget is asked for. Interrupted, the old ones stay."""
    write_json(folder / CONFIG, dataclasses.replace(load_info(folder), thresholds=thresholds).to_dict())


def save(folder: Path, checkpoint: Checkpoint, readme: str, dtype: torch.dtype = torch.float32) -> None:
    """Writes a checkpoint folder; `readme` says where the weights come from and what they were measured to do.

    The readme is the last to be there: a folder with it is whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / README).unlink(missing_ok=True)
    tensors = {
        name: tensor.detach().to("cpu", dtype).contiguous()
        for name, tensor in checkpoint.model.state_dict().items()
    }
    partial = folder / f".{WEIGHTS}.new"
    save_file(tensors, partial)
    partial.chmod(0o644)  # safetensors writes it readable by its owner alone
    partial.replace(folder / WEIGHTS)
    write_json(folder / CONFIG, checkpoint.info.to_dict())
    checkpoint.tokenizer.save(folder / TOKENIZER)
    write_text(folder / README, readme)


def _read_weights(
    path: Path, config: ModelConfig, device: torch.device | str, dtype: torch.dtype, layers: int | None
) -> dict[str, torch.Tensor]:
    """Every tensor of the network, checked by name and shape before the first is loaded.

    Each gets memory of its own, so that it can be freed on its own: safetensors hands out views of the one mapped file.
    """
    absent = tuple(
        f"layers.{index}."
        for index in range(config.decoder.layers if layers is None else layers, config.decoder.layers)
    )
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
            check_shapes(config, shapes, str(path))
            return {
                name: torch.empty(shape, dtype=dtype, device="meta")
                if name.startswith(absent)
                else file.get_tensor(name).to(device, dtype, copy=True)
                for name, shape in shapes.items()
            }
    except SafetensorError as error:
        raise UserError(f"{path}: not a safetensors file ({error}): copy the checkpoint again") from error
