"""The files in which DeeR, CLIP and MPT were released: opened without reading all weights, with every fault
named.

The tensors of a torch file stay in the mapped file until they are used, so a file of 14 GB needs little
memory. No pickle is run: torch reads tensors and plain values only (`weights_only`).
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deer_vla_ros.errors import UserError, cause
from deer_vla_ros.model.foreign_files import OLD_TORCH, is_torch_file, is_zip
from deer_vla_ros.untrusted import first_bytes, stand_in_of

TORCHSCRIPT = "constants.pkl"
"""The member that a TorchScript archive has and a file of `torch.save` does not have."""
PREFIX = "module."
"""The prefix of every tensor's name in files that were saved from DistributedDataParallel, as DeeR's were."""


class LazyTensors(Mapping[str, Tensor]):
    """Tensors by name, each of which is read when it is asked for."""

    def __init__(self, readers: Mapping[str, Callable[[], Tensor]]):
        self._readers = dict(readers)

    def __getitem__(self, name: str) -> Tensor:
        return self._readers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


@dataclass(frozen=True)
class DeerFile:
    """A checkpoint of DeeR. about: its settings by name. tensors: by name, without the prefix `module.`.

    has_values: whether it holds the deltas of a calibration (`values`), which are no calibration of ours:
    they lack actions, deviations and the order of the steps.
    """

    path: Path
    about: dict[str, Any]
    tensors: Mapping[str, Tensor]
    has_values: bool


def open_deer(path: Path) -> DeerFile:
    """Opens DeeR's `.pth` file. Raises UserError that names the fault and the remedy."""
    content = _torch_file(path, "--deer")
    if not isinstance(content, dict) or "model_state_dict" not in content:
        found = sorted(map(str, content))[:3] if isinstance(content, dict) else type(content).__name__
        kind = _kind_of(content)
        raise UserError(
            f"--deer {path}: it has no model_state_dict (found: {found}): {kind}give DeeR's own file, "
            "stg=post_..._mpt_..._N.pth of Yang130/DeeR-VLA"
        )
    state = content["model_state_dict"]
    if not isinstance(state, Mapping) or not all(isinstance(each, Tensor) for each in state.values()):
        raise UserError(f"--deer {path}: its model_state_dict is no set of tensors: download the file again")
    about = {str(name): value for name, value in content.items() if not _is_heavy(value)}
    return DeerFile(path, about, _without_prefix(path, state), "values" in content)


def open_clip(path: Path) -> Mapping[str, Tensor]:
    """Opens CLIP's visual tower: OpenAI's TorchScript archive, open_clip's file, or transformers' file.

    Returns tensors by name; the names tell which of the three it is (`is_from_transformers`). Raises
    UserError.
    """
    _check_file(path, "--clip")
    if path.suffix == ".safetensors":
        found = _safetensors(path, "--clip")
    elif _is_torchscript(path):
        try:
            found = dict(torch.jit.load(path, map_location="cpu").state_dict())
        except RuntimeError as error:
            raise UserError(f"--clip {path}: damaged ({cause(error)}): download it again") from error
    else:
        found = _torch_file(path, "--clip")
        found = found.get("state_dict", found) if isinstance(found, dict) else {}
    named = {name.removeprefix(PREFIX): name for name in found}
    if not (_OPEN_CLIP_MARK in named or _TRANSFORMERS_MARK in named):
        raise UserError(
            f"--clip {path}: no CLIP: neither {_OPEN_CLIP_MARK} nor {_TRANSFORMERS_MARK} is in it (found: "
            f"{', '.join(sorted(named)[:3])}): give OpenAI's ViT-L-14.pt, open_clip's or transformers' "
            "weights "
            "of ViT-L/14"
        )
    return LazyTensors({short: (lambda name=name: found[name]) for short, name in named.items()})


_OPEN_CLIP_MARK = "visual.class_embedding"
_TRANSFORMERS_MARK = "vision_model.embeddings.class_embedding"


def is_from_transformers(clip: Mapping[str, Tensor]) -> bool:
    """Whether CLIP's tensors have the names of transformers, not those of OpenAI and open_clip."""
    return _TRANSFORMERS_MARK in clip


def open_mpt(path: Path) -> Mapping[str, Tensor]:
    """Opens MPT's weights: a file, or a folder with one or several shards (.safetensors or
    pytorch_model*.bin).

    Returns tensors by the names that they have in OpenFlamingo, `lang_encoder.transformer...`. Raises
    UserError.
    """
    if path.is_dir():
        files = sorted(path.glob("*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))
        if not files:
            raise UserError(
                f"--mpt {path}: no *.safetensors and no pytorch_model*.bin: give MPT's folder or file"
            )
    else:
        files = [path]
    readers: dict[str, Callable[[], Tensor]] = {}
    for file in files:
        _check_file(file, "--mpt")
        shard = _safetensors(file, "--mpt") if file.suffix == ".safetensors" else _torch_file(file, "--mpt")
        if not isinstance(shard, Mapping):
            raise UserError(f"--mpt {file}: no set of tensors: give MPT's folder or file")
        prefix = _prefix_of([str(name) for name in shard])
        for name in shard:
            own = _flamingo_name(str(name).removeprefix(prefix))
            readers[own] = lambda shard=shard, name=name: shard[name]
    return LazyTensors(readers)


def _flamingo_name(name: str) -> str:
    """The name in OpenFlamingo of a tensor of MPT or MosaicGPT."""
    name = name.removeprefix("model.").removeprefix("transformer.")
    first, _, rest = name.partition(".")
    number, _, inner = rest.partition(".")
    if first == "blocks" and number.isdecimal():
        name = f"blocks.{number}.decoder_layer.{inner}"
    return f"lang_encoder.transformer.{name}"


def _check_file(path: Path, option: str) -> None:
    """Raises UserError if the path is no file, or is a file that stands for another one."""
    if path.is_dir():
        raise UserError(f"{option} {path} is a folder: give the file in it")
    try:
        is_empty, stand_in = not first_bytes(path), stand_in_of(path)
    except OSError as error:
        raise UserError(
            f"{option} {path} cannot be read ({error.strerror}): give an existing file"
        ) from error
    if is_empty:
        raise UserError(f"{option} {path} is empty: download it again")
    if stand_in:
        raise UserError(f"{option} {path} {stand_in}")
    if "-of-" in path.stem and option != "--mpt":
        raise UserError(f"{option} {path} is one of several shards: give the file that holds all weights")


def _is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as file:
            return any(name.endswith(f"/{TORCHSCRIPT}") for name in file.namelist())
    except Exception:  # for arbitrary bytes, zipfile raises many kinds of exceptions; _torch_file says more
        return False


def _torch_file(path: Path, option: str) -> Any:
    """Reads a file of `torch.save`; its tensors stay in the mapped file."""
    _check_file(path, option)
    size = path.stat().st_size
    if not is_zip(path):
        begin = first_bytes(path)
        if begin.startswith(OLD_TORCH):
            raise UserError(
                f"{option} {path} was written in the format before torch 1.6: load it with torch.load(..., "
                "weights_only=True), and save it again with torch.save"
            )
        is_cut = begin.startswith(b"PK")
        raise UserError(
            f"{option} {path} ({size} bytes) was cut short: download it again"
            if is_cut
            else f"{option} {path} ({size} bytes) is no file that torch.save writes: give the released file, "
            "or load it with torch and save it again"
        )
    if not is_torch_file(path):
        raise UserError(f"{option} {path} is a zip archive: unpack it, and give the file that was in it")
    if _is_torchscript(path):
        raise UserError(f"{option} {path} is a TorchScript archive, such as CLIP's: give it as --clip")
    try:
        with zipfile.ZipFile(path) as file:
            for name in file.namelist():
                if name.endswith("/data.pkl"):
                    file.read(name)  # This compares its checksum, which torch does not.
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{option} {path} holds more than tensors and plain values ({cause(error)}): it is not loaded, "
            "because a pickle can run any program; save its tensors alone"
        ) from error
    except Exception as error:  # for arbitrary bytes, torch may raise anything
        raise UserError(f"{option} {path} is damaged ({cause(error)}): download it again") from error


def _safetensors(path: Path, option: str) -> Mapping[str, Tensor]:
    try:
        file = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{option} {path} is damaged ({cause(error)}): download it again") from error
    return LazyTensors({name: (lambda name=name: file.get_tensor(name)) for name in file.keys()})


def _prefix_of(names: Sequence[str]) -> str:
    """`module.`, as often as all names begin with it."""
    prefix = ""
    while names and all(name.startswith(prefix + PREFIX) for name in names):
        prefix += PREFIX
    return prefix


def _without_prefix(path: Path, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by name without `module.`. Raises UserError if only some names begin with it."""
    prefix = _prefix_of([*state])
    bare = [name for name in state if not name.startswith(prefix + PREFIX)]
    if len(bare) < len(state):
        raise UserError(
            f"--deer {path}: {len(bare)} of {len(state)} names do not begin with {prefix + PREFIX}, first "
            f"{bare[0]}: rename them so that all begin with it, or none"
        )
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def _kind_of(content: Any) -> str:
    """What a file that is not DeeR's seems to be, as the beginning of a sentence."""
    names = [str(name) for name in content] if isinstance(content, dict) else []
    if any(name.startswith(("perceiver.", "lang_encoder.")) for name in names):
        return "this seems to be OpenFlamingo's checkpoint; "
    if any(name.startswith(("transformer.blocks.", "visual.")) for name in names):
        return "this seems to be MPT or CLIP; "
    return ""


def _is_heavy(value: Any) -> bool:
    """Whether a value holds tensors: weights, an optimizer's state, cached deltas."""
    if isinstance(value, Mapping):
        return any(map(_is_heavy, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_is_heavy, value))
    return isinstance(value, Tensor)
