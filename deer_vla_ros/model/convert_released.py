"""Makes a checkpoint folder from the released files: DeeR's `.pth`, CLIP's visual tower, a tokenizer, perhaps
MPT.

DeeR's file holds what was trained, and the frozen decoder blocks under their second name
(`old_decoder_blocks`). CLIP brings the vision tower. Only the 9B network needs a tensor of MPT, the final
norm.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor

from deer_vla_ros.errors import UserError
from deer_vla_ros.files import whole_folder, write_json, write_text
from deer_vla_ros.model.action_space import CALVIN
from deer_vla_ros.model.checkpoint import CONFIG, README, TOKENIZER, WEIGHTS, CheckpointInfo
from deer_vla_ros.model.config import (
    PRESETS,
    DecoderConfig,
    HeadConfig,
    ModelConfig,
    ResamplerConfig,
    VisionConfig,
)
from deer_vla_ros.model.network import HEADS_OF_TRAINING, state_shapes
from deer_vla_ros.model.reference import reference_names
from deer_vla_ros.model.released_files import DeerFile, is_from_transformers, open_clip, open_deer, open_mpt
from deer_vla_ros.model.tensor_writer import TensorWriter
from deer_vla_ros.model.text import END_OF_CHUNK, END_OF_TEXT, IMAGE, PAD, InstructionTokenizer
from deer_vla_ros.model.tokenizer_file import read_tokenizer_file

THRESHOLDS = {
    "d": (0.024131965307197703, 0.0034394217427938887, 0.00701889456063509, 0.009184207905083895)
    + (0.0045967466905420615, 1e5),
    "abc": (0.05618929907679558, 0.003506983596128319, 0.00584903010905957, 0.006535238670344992)
    + (0.005207180260029222, 1e5),
    "abcd": (0.03354664587378331, 0.002466938924360549, 0.006321195199122956, 0.005748750398084137)
    + (0.007737060680985451, 1e5),
}
"""The thresholds of the exits that the authors found online (README of github.com/yueyang130/DeeR-VLA,
section "Execute with Online Interaction Thresholds"), by the split of CALVIN on which the 3B network was
trained."""
REQUIRED = {"head_type": "deterministic", "pooling": "max", "mlp_layernorm": True, "lstm_layernorm": True}
"""Settings of DeeR's file that the network must have, with the only value that is supported."""
SPECIAL = (END_OF_CHUNK, IMAGE, PAD)
"""The tokens that OpenFlamingo adds to the tokenizer of the language model, in this order."""
HEAD_WIDTH_OF_CLIP, HEAD_WIDTH_OF_CROSS_ATTENTION = 64, 64
_SECOND_NAMES = "lang_encoder.gated_cross_attn_layers."
"""The prefix of second names of the cross-attention, which are the same tensors."""
_BLOCKS, _OLD_BLOCKS = "lang_encoder.transformer.blocks.", "lang_encoder.old_decoder_blocks."
LEAST_FREE = 64 * 2**20
"""Bytes that stay free on the disk beside the weights."""


@dataclass(frozen=True)
class ConvertedRelease:
    """What was written: the number of tensors, and their bytes. has_values: see DeerFile."""

    info: CheckpointInfo
    tensors: int
    size: int
    has_values: bool


def convert(
    deer: Path,
    clip: Path,
    tokenizer: Path,
    out: Path,
    *,
    mpt: Path | None = None,
    thresholds: str = "none",
    dtype: torch.dtype = torch.float16,
    for_training: bool = False,
    like: ModelConfig | None = None,
    on_progress: Callable[[int, int], None] = lambda done, of: None,
) -> ConvertedRelease:
    """Writes the checkpoint folder `out`: all of it, or nothing under that name.

    mpt: MPT's file or folder, for what DeeR's file lacks. thresholds: a key of THRESHOLDS, or none: every
    step goes to the last exit. for_training: also write the heads that never act. like: a network whose
    numbers of attention heads and other sizes that no tensor tells are used; None: those of the released
    networks. on_progress: gets the number of bytes written and of all bytes.

    Raises UserError that names the file, the fault and the remedy.
    """
    _check_place(out, [path for path in (deer, clip, tokenizer, mpt) if path])
    released, vision = open_deer(deer), open_clip(clip)
    sources = _Sources(released, vision, open_mpt(mpt) if mpt else {}, clip, mpt)
    config = network_config(released, vision, clip, sources.is_mpt, like)
    names = {
        own: reference
        for own, reference in reference_names(config, sources.is_mpt).items()
        if for_training or not own.startswith(HEADS_OF_TRAINING)
    }
    shapes = {own: shape for own, shape in state_shapes(config).items() if own in names}
    sources.check(names, shapes)
    words = read_tokenizer(tokenizer, config.decoder.vocabulary, config.max_tokens)
    info = CheckpointInfo(
        model=config,
        action_space=CALVIN,
        weights=f"DeeR, {deer.name}",
        trained=True,
        delta="l2",
        thresholds=_thresholds(thresholds, config),
    )
    size = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
    with whole_folder(out, size) as folder:
        _check_space(folder.parent, out, size)
        folder.mkdir()
        _write_weights(folder / WEIGHTS, sources, names, shapes, dtype, size, on_progress)
        write_json(folder / CONFIG, info.to_dict())
        words.save(folder / TOKENIZER)
        write_text(folder / README, _readme(deer, clip, mpt, thresholds, dtype, released))
    return ConvertedRelease(info, len(names), size, released.has_values)


class _Sources:
    """Finds each tensor of the network in the released files."""

    def __init__(
        self,
        deer: DeerFile,
        clip: Mapping[str, Tensor],
        mpt: Mapping[str, Tensor],
        clip_path: Path,
        mpt_path: Path | None,
    ):
        self._deer, self._clip, self._mpt = deer, clip, mpt
        self._clip_path, self._mpt_path = clip_path, mpt_path
        self.is_mpt = f"{_OLD_BLOCKS}0.norm_1.weight" in deer.tensors or (
            f"{_BLOCKS}0.decoder_layer.norm_1.weight" in mpt
        )

    def find(self, own: str, reference: str) -> Tensor | None:
        """Returns a tensor of the network; None if no file has it."""
        name, _, part = reference.partition("#")
        if own.startswith("vision."):
            if is_from_transformers(self._clip):
                return self._clip.get(own.replace("vision.clip.", "vision_model.", 1))
            name = name.removeprefix("vision_encoder.")
            tensor = self._clip.get(name)
        else:
            tensor = self._deer.tensors.get(_stored_name(name))
            tensor = self._mpt.get(name) if tensor is None else tensor
        return tensor if tensor is None or not part else tensor.chunk(3)["qkv".index(part)]

    def check(self, names: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raises UserError if a tensor is missing, unknown or of another shape."""
        missing: dict[str, list[str]] = {}
        for own, reference in names.items():
            tensor = self.find(own, reference)
            if tensor is None:
                missing.setdefault(self._brought_by(own), []).append(reference.partition("#")[0])
            elif tuple(tensor.shape) != shapes[own]:
                raise UserError(
                    f"convert: tensor {reference} has shape {tuple(tensor.shape)}, where {shapes[own]} is "
                    f"expected: {self._deer.path.name} and the other files are not of the same network"
                )
        if missing:
            parts = [
                f"{len(set(found))} of {source}: {', '.join(sorted(set(found)))}"
                for source, found in missing.items()
            ]
            raise UserError(
                f"convert: {sum(map(len, missing.values()))} tensors are missing. " + "; ".join(parts)
            )
        self._check_unknown(names)

    def _brought_by(self, own: str) -> str:
        if own.startswith("vision."):
            return f"CLIP's visual tower ({self._clip_path}; give ViT-L/14 as --clip)"
        if own.startswith(("layers.", "final_norm.")) and ".cross_attention." not in own:
            which = "mosaicml/mpt-7b" if self.is_mpt else "mosaicml/mpt-1b-redpajama-200b-dolly"
            return f"the language model (give {which} as --mpt)"
        return f"DeeR's file ({self._deer.path}; it is cut or of another version: download it again)"

    def _check_unknown(self, names: Mapping[str, str]) -> None:
        """Raises UserError if DeeR's file has tensors that no such network has."""
        config_names = {_stored_name(reference.partition("#")[0]) for reference in names.values()}
        known = ("lm_head.", "lm_exit_modules.", _SECOND_NAMES, _OLD_BLOCKS, _BLOCKS)
        unknown = [
            name for name in self._deer.tensors if name not in config_names and not name.startswith(known)
        ]
        if unknown:
            raise UserError(
                f"--deer {self._deer.path}: {len(unknown)} tensors are unknown: "
                f"{', '.join(sorted(unknown)[:20])}: "
                "this file is not of DeeR's released networks"
            )


def _stored_name(reference: str) -> str:
    """The name in DeeR's file of a tensor of the reference: decoder blocks have their second name there."""
    if reference.startswith(_BLOCKS) and ".decoder_layer." in reference:
        return reference.replace(_BLOCKS, _OLD_BLOCKS, 1).replace(".decoder_layer.", ".", 1)
    return reference


# --- The network


def network_config(
    deer: DeerFile, clip: Mapping[str, Tensor], clip_path: Path, is_mpt: bool, like: ModelConfig | None
) -> ModelConfig:
    """Finds all sizes of the network: from the tensors where they tell, otherwise from `like`.

    is_mpt: whether the language model's tensors have MPT's names (9B) or MosaicGPT's (3B).
    Raises UserError if a setting is not supported, or if the files do not fit together.
    """
    for name, value in REQUIRED.items():
        if deer.about.get(name, value) != value:
            raise UserError(
                f"--deer {deer.path}: {name} is {deer.about[name]!r}, only {value!r} is supported: give one "
                "of "
                "DeeR's released files"
            )
    tensors = deer.tensors
    base = like or PRESETS["openflamingo_9b" if is_mpt else "openflamingo_3b"]()
    width = _size(deer, "lang_encoder.transformer.wte.weight", 1)
    vision = _vision_config(clip, clip_path, base.vision, _size(deer, "perceiver.latents", 1))
    last = deer.about.get("early_exit_layer")
    interval = deer.about.get("exit_interval", base.exit_interval)
    if not (isinstance(last, int) and last > 0 and isinstance(interval, int) and interval > 1):
        raise UserError(
            f"--deer {deer.path}: early_exit_layer is {last!r} and exit_interval {interval!r}: this file "
            "says "
            "nothing of its exits; give one of DeeR's released files"
        )
    crossed = sorted(_numbers(tensors, f"{_BLOCKS}#.gated_cross_attn_layer.attn_gate"))
    if not crossed:
        raise UserError(f"--deer {deer.path}: it has no gated_cross_attn_layer: download the file again")
    gate = f"{_BLOCKS}{crossed[0]}.gated_cross_attn_layer."
    resampler_inner = _size(deer, "perceiver.layers.0.0.to_q.weight", 0)
    head_width = base.resampler.head_width
    return dataclasses.replace(
        base,
        vision=vision,
        resampler=ResamplerConfig(
            depth=len(_numbers(tensors, "perceiver.layers.#.0.to_q.weight")),
            latents=_size(deer, "perceiver.latents", 0),
            heads=resampler_inner // head_width,
            head_width=head_width,
            mlp_ratio=_size(deer, "perceiver.layers.0.1.1.weight", 0) // _size(deer, "perceiver.latents", 1),
        ),
        decoder=_decoder_config(deer, base.decoder, width, last + 1, crossed[0] + 1, gate),
        head=_head_config(deer, base.head),
        exit_interval=interval,
    )


def _decoder_config(
    deer: DeerFile, base: DecoderConfig, width: int, layers: int, every: int, gate: str
) -> DecoderConfig:
    return dataclasses.replace(
        base,
        width=width,
        layers=layers,
        vocabulary=_size(deer, "lang_encoder.transformer.wte.weight", 0),
        cross_attention_every=every,
        cross_attention_heads=_size(deer, f"{gate}attn.to_q.weight", 0) // base.cross_attention_head_width,
        cross_attention_mlp_ratio=_size(deer, f"{gate}ff.1.weight", 0) // width,
    )


def _head_config(deer: DeerFile, base: HeadConfig) -> HeadConfig:
    hidden = len(_numbers(deer.tensors, "extra_exit.actions.mlp.#.bias")) // 2
    return HeadConfig(
        hidden=_size(deer, "extra_exit.rnn.layers.0.weight_hh_l0", 1),
        mlp_widths=tuple(
            _size(deer, f"extra_exit.actions.mlp.{4 * index + 1}.weight", 0) for index in range(hidden)
        ),
        lstm_layers=len(_numbers(deer.tensors, "extra_exit.rnn.layers.#.weight_hh_l0")),
        lstm_dropout=float(deer.about.get("lstm_dropout", base.lstm_dropout)),
        mlp_dropout=float(deer.about.get("exit_dropout", base.mlp_dropout)),
    )


def _vision_config(clip: Mapping[str, Tensor], path: Path, base: VisionConfig, width: int) -> VisionConfig:
    """The sizes of CLIP's tower. width: the width that the resampler takes."""
    if is_from_transformers(clip):
        prefix, blocks = "vision_model.", "encoder.layers.#.layer_norm1.weight"
        token, patch = "embeddings.class_embedding", "embeddings.patch_embedding.weight"
        positions, up = "embeddings.position_embedding.weight", "encoder.layers.0.mlp.fc1.weight"
    else:
        prefix, blocks = "visual.", "transformer.resblocks.#.ln_1.weight"
        token, patch = "class_embedding", "conv1.weight"
        positions, up = "positional_embedding", "transformer.resblocks.0.mlp.c_fc.weight"
    missing = [name for name in (token, patch, positions, up) if prefix + name not in clip]
    if missing:
        raise UserError(f"--clip {path}: {prefix}{missing[0]} is missing: it is cut; download it again")
    found = clip[prefix + token].shape[-1]
    if found != width:
        raise UserError(
            f"--clip {path}: its tower has width {found}, the resampler takes {width}: give ViT-L/14, on "
            "which "
            "OpenFlamingo was trained"
        )
    patch_size = clip[prefix + patch].shape[-1]
    heads = base.heads if found == base.width else found // HEAD_WIDTH_OF_CLIP
    tower = VisionConfig(
        image_size=math.isqrt(clip[prefix + positions].shape[0] - 1) * patch_size,
        patch_size=patch_size,
        width=found,
        layers=len(_numbers(clip, prefix + blocks)),
        heads=heads,
        mlp_ratio=clip[prefix + up].shape[0] / found,
    )
    if tower != base:
        raise UserError(
            f"--clip {path}: it takes images of {tower.image_size} pixels in patches of {tower.patch_size}, "
            f"and has {tower.layers} layers; {base.image_size}, {base.patch_size} and {base.layers} are "
            "expected: give ViT-L/14, on which OpenFlamingo was trained"
        )
    return tower


def _numbers(names: Iterable[str], pattern: str) -> set[int]:
    """The numbers that stand for `#` in the names of a pattern."""
    before, after = pattern.split("#")
    found = (
        name[len(before) : -len(after)] for name in names if name.startswith(before) and name.endswith(after)
    )
    return {int(number) for number in found if number.isdecimal()}


def _size(deer: DeerFile, name: str, axis: int) -> int:
    if name not in deer.tensors:
        raise UserError(f"--deer {deer.path}: tensor {name} is missing: the file is cut; download it again")
    return deer.tensors[name].shape[axis]


def _thresholds(choice: str, config: ModelConfig) -> tuple[float, ...]:
    if choice == "none":
        return (*(-1e8 for _ in config.exits[:-1]), 1e8)
    found = THRESHOLDS[choice]
    if len(found) != len(config.exits):
        raise UserError(
            f"--thresholds {choice}: {len(found)} thresholds were published, this network has "
            f"{len(config.exits)} "
            "exits: give none, and run calibrate"
        )
    return found


# --- The tokenizer


def read_tokenizer(path: Path, rows: int, max_tokens: int) -> InstructionTokenizer:
    """Reads the language model's `tokenizer.json` and adds the tokens that OpenFlamingo adds.

    rows: of the network's token embedding. Raises UserError if the tokenizer does not give these ids.
    """
    if path.is_dir():
        path = path / TOKENIZER
    tokenizer = read_tokenizer_file(path, "give --tokenizer the tokenizer.json of EleutherAI/gpt-neox-20b")
    before = tokenizer.get_vocab_size(with_added_tokens=True)
    new = [token for token in SPECIAL if tokenizer.token_to_id(token) is None]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in new])
    if tokenizer.token_to_id(END_OF_TEXT) is None:
        raise UserError(
            f"--tokenizer {path}: it has no {END_OF_TEXT}: give tokenizer.json of EleutherAI/gpt-neox-20b"
        )
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    if size == rows - 1:
        raise UserError(
            f"--deer embeds {rows} tokens, one more than the tokenizer has: it was trained with a variant of "
            "OpenFlamingo that adds <action>, which is not supported: give one of DeeR's released files"
        )
    ids = [tokenizer.token_to_id(token) for token in SPECIAL]
    if size != rows or ids != list(range(rows - 3, rows)):
        raise UserError(
            f"--tokenizer {path}: {before} tokens, with {', '.join(SPECIAL)} {size}, but the network embeds "
            f"{rows}: "
            "give tokenizer.json of EleutherAI/gpt-neox-20b, which mpt-1b and mpt-7b use"
        )
    return InstructionTokenizer(tokenizer, max_tokens)


# --- Writing


def _check_place(out: Path, inputs: Sequence[Path]) -> None:
    """Raises UserError if a new folder `out` would take the place of something that is no checkpoint."""
    for path in inputs:
        if out.resolve() in (path.resolve(), *path.resolve().parents):
            raise UserError(f"--out {out}: it holds {path}, which would be lost: give a new folder")
    if out.is_mount():
        raise UserError(f"--out {out}: a mounted disk cannot be replaced: give a folder on it")
    if out.exists():
        parts = {CONFIG, WEIGHTS, TOKENIZER, README}
        others = sorted({part.name for part in out.iterdir()} - parts) if out.is_dir() else [out.name]
        if others:
            raise UserError(
                f"--out {out}: {len(others)} other files would be lost ({', '.join(others[:5])}): give a new "
                "folder"
            )


def _check_space(folder: Path, out: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size + LEAST_FREE:
        raise UserError(
            f"convert: {out} needs {size / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free: give another "
            "--out"
        )


def _write_weights(
    path: Path,
    sources: _Sources,
    names: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    size: int,
    on_progress: Callable[[int, int], None],
) -> None:
    done = 0
    with TensorWriter(path, shapes, dtype) as writer:
        for own in shapes:
            tensor = sources.find(own, names[own])
            written = tensor.to(dtype)
            if not bool(torch.isfinite(written).all()):
                fault = (
                    "is not finite"
                    if not bool(torch.isfinite(tensor).all())
                    else f"does not fit into {dtype}"
                )
                raise UserError(
                    f"convert: tensor {names[own]} {fault}: "
                    + ("download the file again" if "finite" in fault else "give --dtype bfloat16 or float32")
                )
            writer.write(own, written)
            done += written.nbytes
            on_progress(done, size)


def _readme(
    deer: Path, clip: Path, mpt: Path | None, thresholds: str, dtype: torch.dtype, released: DeerFile
) -> str:
    sources: list[Any] = [deer.name, clip.name, *([mpt.name] if mpt else [])]
    values = (
        "\nThe file's `values` (deltas without actions) are no calibration. " if released.has_values else "\n"
    )
    return (
        f"# {deer.stem}\n\nMade by `python -m deer_vla_ros convert` from {', '.join(sources)}; weights as "
        f"{dtype}.\n"
        f"Thresholds: {thresholds}.{values}"
        "For budgets, run `python -m deer_vla_ros calibrate RECORDING --checkpoint THIS_FOLDER`.\n"
    )
