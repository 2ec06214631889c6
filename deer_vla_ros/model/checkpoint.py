"""Checkpoints: folders of plain files that hold a network. No file is a pickle."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import mmap
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from deer_vla_ros.errors import UserError, cause
from deer_vla_ros.files import whole_file, write_json, write_text
from deer_vla_ros.model.action_space import ActionSpace
from deer_vla_ros.model.config import ModelConfig
from deer_vla_ros.model.foreign_files import PARTS, check_checkpoint_folder
from deer_vla_ros.model.from_json import from_json
from deer_vla_ros.model.network import (
    HEADS_OF_TRAINING,
    MultiExitVLA,
    build,
    check_shapes,
    has_heads_of_training,
)
from deer_vla_ros.model.quantisation import empty_tensors, is_quantised, quantise, types_of
from deer_vla_ros.model.text import InstructionTokenizer
from deer_vla_ros.untrusted import check_fetched, read_json

(CONFIG, WEIGHTS, TOKENIZER), README = PARTS, "README.md"
EMBEDDED = Path(__file__).resolve().parent.parent / "embedded"
"""The checkpoint that ships with the package."""
FLOATS = ("F64", "F32", "F16", "BF16")
"""The number types of weights, as a safetensors file names them."""
BLOCK_BYTES = 4 * 2**20
"""How much of a file is read ahead at once."""


@dataclass(frozen=True)
class CheckpointInfo:
    """The content of `config.json`.

    weights: the origin of the weights, in one line. trained: whether they were trained at all.
    delta, thresholds: the initial exit rule, with one threshold per exit of the model.
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
                f"config.json: {len(self.thresholds)} thresholds for the {len(exits)} exits {exits}: "
                "give one each"
            )

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "thresholds": list(self.thresholds)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CheckpointInfo:
        """Inverse of `to_dict`. Raises a UserError that names an unknown or missing key or a wrong type."""
        return from_json(cls, values, "config.json: checkpoint")


@dataclass(frozen=True)
class Checkpoint:
    """A network ready for inference, with its tokenizer and its description.

    folder: the folder that it was loaded from; None if it was made in memory.
    """

    info: CheckpointInfo
    model: MultiExitVLA
    tokenizer: InstructionTokenizer
    folder: Path | None = None


def folder_of(path: str) -> Path:
    """The checkpoint folder at a path from the user. An empty path means the embedded checkpoint."""
    return Path(path).expanduser() if path else EMBEDDED


def load_info(folder: Path) -> CheckpointInfo:
    """Reads `config.json` of a folder. Raises a UserError that names a missing or malformed file."""
    check_checkpoint_folder(folder)
    return CheckpointInfo.from_dict(read_json(folder / CONFIG, "restore the file from the checkpoint"))


def load(
    folder: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    layers: int | None = None,
    for_training: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    bits: int | None = None,
) -> Checkpoint:
    """Reads a checkpoint folder onto `device` and casts the weights to `dtype`.

    It needs memory for the cast weights, and for one tensor of the file in addition.

    layers: the number of decoder layers to load; the others are on the meta device, without memory. None
        loads all layers.
    for_training: also load the heads that only training uses.
    on_progress: called before each tensor and after the last one, with the bytes of the weights that were
        read and those that will be read in all. What it raises ends the load.
    bits: of a weight in the layers' matrices, 8 or 4; each is quantised while it is read. None: as `dtype`.

    Raises a UserError that names a missing file, a missing or unknown tensor, a tensor of a wrong shape, or a
    matrix that cannot have these `bits`.
    """
    info = load_info(folder)
    tokenizer = InstructionTokenizer.from_file(folder / TOKENIZER, info.model.max_tokens)
    if tokenizer.size > info.model.decoder.vocabulary:
        raise UserError(
            f"checkpoint {folder}: {TOKENIZER} has token ids up to {tokenizer.size - 1}, "
            f"the network embeds {info.model.decoder.vocabulary}: they are not of the same model"
        )
    wanted = _Wanted(info.model, torch.device(device), dtype, layers, for_training, bits)
    state = _read_weights(folder / WEIGHTS, wanted, on_progress)
    return Checkpoint(info, build(info.model, state, bits), tokenizer, folder)


def load_as(number_type: str, folder: Path, device: str = "cpu") -> Checkpoint:
    """As `load`, for a value of the parameter `model.dtype`."""
    dtype, bits = types_of(number_type, device)
    return load(folder, device, dtype, bits=bits)


def set_thresholds(folder: Path, thresholds: tuple[float, ...]) -> None:
    """Stores the thresholds, one per exit, that the checkpoint uses when no budget is set.

    If this is interrupted, the old thresholds stay.
    """
    write_json(folder / CONFIG, dataclasses.replace(load_info(folder), thresholds=thresholds).to_dict())


def save(folder: Path, checkpoint: Checkpoint, readme: str, dtype: torch.dtype = torch.float32) -> None:
    """Writes a checkpoint folder. `readme` describes the origin of the weights and their measured results.

    The readme is written last: a folder that has one is complete.
    """
    assert checkpoint.model.bits is None, "a checkpoint folder has weights in full precision"
    (folder / README).unlink(missing_ok=True)
    tensors = {
        name: tensor.detach().to("cpu", dtype).contiguous()
        for name, tensor in checkpoint.model.state_dict().items()
    }
    with whole_file(folder / WEIGHTS, sum(tensor.nbytes for tensor in tensors.values())) as scratch:
        save_file(tensors, scratch)
    write_json(folder / CONFIG, checkpoint.info.to_dict())
    checkpoint.tokenizer.save(folder / TOKENIZER)
    write_text(folder / README, readme)


@dataclass(frozen=True)
class _Wanted:
    """Which weights of a file are wanted, and where. See `load`."""

    config: ModelConfig
    device: torch.device
    dtype: torch.dtype
    layers: int | None
    for_training: bool
    bits: int | None

    def empty(self, name: str, shape: tuple[int, ...], device: torch.device) -> dict[str, torch.Tensor]:
        """The network's tensors, without values, for the tensor `name` of the file."""
        return empty_tensors(
            name, shape, self.dtype, self.bits, functools.partial(torch.empty, device=device)
        )

    def copy(self, name: str, mapped: torch.Tensor) -> dict[str, torch.Tensor]:
        """The same in memory of their own, with the values of a tensor of the file."""
        if not is_quantised(name, mapped.shape, self.bits):
            return {name: _own_copy(mapped, self.device, self.dtype)}
        own = self.empty(name, mapped.shape, self.device)
        for _ in quantise(mapped, *own.values()):
            pass
        return own


def _read_weights(
    path: Path, wanted: _Wanted, on_progress: Callable[[int, int], None]
) -> dict[str, torch.Tensor]:
    """All tensors of the network. Names and shapes are checked before the first tensor is loaded.

    Each tensor is copied to its own memory, so that it can be freed alone: safetensors returns views of one
    mapped file.
    """
    layers = wanted.config.decoder.layers
    absent = tuple(
        f"layers.{index}." for index in range(layers if wanted.layers is None else wanted.layers, layers)
    )
    check_fetched(path)
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.offset_keys()}
            if shapes and all(name.startswith("module.") for name in shapes):
                raise UserError(
                    f"{path}: all {len(shapes)} names begin with module.: these weights were saved from "
                    "DistributedDataParallel; save those of its `.module` instead"
                )
            check_shapes(wanted.config, shapes, str(path))
            for name in shapes:
                if (kind := file.get_slice(name).get_dtype()) not in FLOATS:
                    raise UserError(
                        f"{path}: {name} has the number type {kind}, and weights have one of "
                        f"{', '.join(FLOATS)}: copy the checkpoint again"
                    )
            if wanted.for_training and not has_heads_of_training(shapes):
                raise UserError(
                    f"{path}: it has no heads for training: make the checkpoint with `convert --training`"
                )
            left_out = () if wanted.for_training else HEADS_OF_TRAINING
            names = [name for name in shapes if not name.startswith(left_out)]
            state: dict[str, torch.Tensor] = {}
            for name in names:
                if name.startswith(absent):
                    state |= wanted.empty(name, shapes[name], torch.device("meta"))
            mapped = {name: file.get_tensor(name) for name in names if not name.startswith(absent)}
            done, total = 0, sum(tensor.nbytes for tensor in mapped.values())
            with _read_ahead(path):
                for name, tensor in mapped.items():
                    on_progress(done, total)
                    state |= wanted.copy(name, tensor)
                    done += tensor.nbytes
            on_progress(done, total)
            return state
    except SafetensorError as error:
        raise UserError(
            f"{path}: not a safetensors file ({cause(error)}): copy the checkpoint again"
        ) from error


def _own_copy(mapped: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """A copy in memory of its own. A GPU gets the bytes as they are in the file, and casts them itself."""
    if device.type == "cpu":
        return mapped.to(dtype, copy=True)
    return mapped.to(device).to(dtype)


@contextlib.contextmanager
def _read_ahead(path: Path) -> Iterator[None]:
    """Reads the file in large blocks in another thread, so that its bytes are in the page cache when a mapped
    tensor needs them. A mapped file alone is read in small pieces, at about half of the disk's rate."""
    over = threading.Event()

    def read() -> None:
        # An error of the file shows up where its bytes are used.
        with contextlib.suppress(OSError), path.open("rb", buffering=0) as file:
            with mmap.mmap(-1, BLOCK_BYTES) as block:  # not malloc, which would keep it
                while not over.is_set() and file.readinto(block):
                    pass

    thread = threading.Thread(target=read, name="read_ahead", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
