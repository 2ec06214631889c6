"""Writes released files of the full size, filled with zeros: `python test/model/full_size.py FOLDER [3b|9b]`.

They have the names, shapes and number types of the real files, and none of their values. The tensors lie in
sparse files while they are written, so this needs little memory; the result takes the size of the real files
(3B: 8.3 GB, with the optimizer's state of the trained tensors).
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from deer_vla_ros.model.config import PRESETS, ModelConfig
from deer_vla_ros.model.convert_released import _stored_name
from deer_vla_ros.model.network import state_shapes
from deer_vla_ros.model.reference import reference_names
from deer_vla_ros.model.text import END_OF_TEXT

PRESET_OF = {"3b": ("openflamingo_3b", False), "9b": ("openflamingo_9b", True)}
SETTINGS = {
    "head_type": "deterministic",
    "pooling": "max",
    "mlp_layernorm": True,
    "lstm_layernorm": True,
    "multi_exit": True,
    "share_exit": False,
    "exit_interval": 2,
    "precision": "fp32",
}


def write_full_size(folder: Path, name: str = "3b") -> tuple[Path, Path, Path]:
    """Returns the paths of DeeR's file, CLIP's file and the tokenizer."""
    preset, is_mpt = PRESET_OF[name]
    config: ModelConfig = PRESETS[preset]()
    zeros = _SparseZeros(folder)
    shapes = state_shapes(config)
    state, visual = {}, {}
    for own, reference in reference_names(config, is_mpt).items():
        reference, _, part = reference.partition("#")
        shape = (3 * shapes[own][0], *shapes[own][1:]) if part else shapes[own]
        if own.startswith("vision."):
            visual.setdefault(reference.removeprefix("vision_encoder."), zeros.tensor(shape))
        elif not (is_mpt and own.startswith("final_norm")):
            state.setdefault(f"module.{_stored_name(reference)}", zeros.tensor(shape))
    trained = [tensor for key, tensor in state.items() if "old_decoder_blocks" not in key]
    moments = {i: {"exp_avg": zeros.tensor(tensor.shape)} for i, tensor in enumerate(trained)}
    deer, clip, tokenizer = folder / "deer.pth", folder / "clip.pt", folder / "tokenizer.json"
    settings = {**SETTINGS, "early_exit_layer": config.decoder.layers - 1}
    torch.save({**settings, "model_state_dict": state, "optimizer_state_dict": {"state": moments}}, deer)
    torch.save(visual, clip)
    zeros.remove()
    words = {END_OF_TEXT: 0, **{f"w{i}": i for i in range(1, config.decoder.vocabulary - 3)}}
    made = Tokenizer(WordLevel(words, unk_token=END_OF_TEXT))
    made.pre_tokenizer = Whitespace()
    made.save(str(tokenizer))
    return deer, clip, tokenizer


class _SparseZeros:
    """Tensors of zeros that lie in sparse files, which take no space on the disk."""

    def __init__(self, folder: Path):
        self._folder, self._files = folder, []

    def tensor(self, shape: tuple[int, ...]) -> torch.Tensor:
        path, size = self._folder / f"zeros_{len(self._files)}", math.prod(shape)
        with path.open("wb") as file:
            file.truncate(4 * size)
        self._files.append(path)
        return torch.from_file(str(path), shared=True, size=size, dtype=torch.float32).view(shape)

    def remove(self) -> None:
        for path in self._files:
            path.unlink()


if __name__ == "__main__":
    print(*write_full_size(Path(sys.argv[1]), *sys.argv[2:]), sep="\n")
