"""The recordings of the reference implementation: folders of tensors and settings, and functions that read
them.

The format is that of `shared/golden`, whose MANIFEST.md describes every array. Each model has the files
`*_keys.json`, `*_weights.npz`, `*_rollout.npz`, `*_window.npz`, `*_info.json`, `*_train.json` and, for
float64, `*_train_fp64.json` and `*_train_fp64.npz`. All models share `preproc.npz`, `text.json`,
`thresholds.json`, `thresholds.npz` and `tolerances.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from deer_vla_ros.errors import UserError, cause, one_line
from deer_vla_ros.model.config import DecoderConfig, HeadConfig, ModelConfig, ResamplerConfig, VisionConfig
from deer_vla_ros.model.network import MultiExitVLA
from deer_vla_ros.model.reference import from_reference
from deer_vla_ros.model.text import END_OF_CHUNK, END_OF_TEXT, IMAGE, PAD, InstructionTokenizer
from deer_vla_ros.untrusted import read_json as read_json_file
from deer_vla_ros.untrusted import read_npz

MLP_WIDTHS = (1024, 512, 256)
REFERENCE_HEAD_WIDTH = 64


@dataclass(frozen=True)
class ModelRecording:
    """One recorded model: its network with the recorded weights, and the values that the reference computed
    with it.

    reference_names: the reference's name of each parameter, by our name, without parameters that are only a
    part of one of the reference's. rollout, window: arrays by name, of whole episodes and of training
    batches.
    """

    name: str
    model: MultiExitVLA
    reference_names: dict[str, str]
    tokenizer: InstructionTokenizer
    info: dict[str, Any]
    rollout: dict[str, np.ndarray]
    window: dict[str, np.ndarray]


@dataclass(frozen=True)
class TrainingRecording:
    """A recorded training of one model.

    settings: learning rates and weight decay. warmup: the number of warm-up steps, by stage. stages: for each
    stage its recorded steps, and how far each parameter moved. groups: the optimiser's parameter groups, by
    stage. values: selected parameters after each stage; empty if they were not recorded.
    """

    settings: dict[str, Any]
    warmup: dict[str, int]
    stages: list[dict[str, Any]]
    groups: dict[str, list[dict[str, Any]]]
    values: dict[str, np.ndarray]


def read_model(folder: Path, name: str) -> ModelRecording:
    """Reads the recording of a model, by its name ("3b" or "9b").

    Raises UserError if a file is missing or damaged.
    """
    keys = read_json(folder / f"{name}_keys.json")
    stored = {
        key: torch.from_numpy(array).float()
        for key, array in read_arrays(folder / f"{name}_weights.npz").items()
    }
    model, named, tokenizer = recorded_network(keys, stored, folder / f"{name}_keys.json")
    return ModelRecording(
        name=name,
        model=model,
        reference_names=_same_tensors(dict(model.named_parameters()), named),
        tokenizer=tokenizer,
        info=read_json(folder / f"{name}_info.json"),
        rollout=read_arrays(folder / f"{name}_rollout.npz"),
        window=read_arrays(folder / f"{name}_window.npz"),
    )


def recorded_network(
    keys: dict[str, Any], stored: Mapping[str, torch.Tensor], where: Path
) -> tuple[MultiExitVLA, dict[str, torch.Tensor], InstructionTokenizer]:
    """The network that `keys`, the content of the file `where`, makes of stored tensors.

    Returns it, its parameters by the reference's names, and its tokenizer. Raises UserError if `keys` does
    not describe such a network.
    """
    try:
        tensors = {entry["key"]: stored[entry["stored_as"]] for entry in keys["keys"]}
        config = model_config(keys, tensors)
        model = from_reference(tensors, config)
        named = {
            entry["key"]: tensors[entry["key"]]
            for entry in keys["keys"]
            if entry["listed_by_named_parameters"]
        }
        return model, named, toy_tokenizer(keys["tokenizer_vocab"], config.max_tokens)
    except UserError:
        raise
    except Exception as error:  # the file may say anything of a network that it lists
        raise UserError(
            f"{where} does not describe the tensors beside it ({one_line(error)}): copy the recording again"
        ) from error


def read_training(folder: Path, name: str, precision: str = "") -> TrainingRecording:
    """Reads the recorded training of a model. Raises UserError if a file is missing or damaged.

    precision: "" for float32; "_fp64" for float64, which includes the parameters after each stage.
    """
    record = read_json(folder / f"{name}_train{precision}.json")
    return TrainingRecording(
        settings=record["args"],
        warmup=record["warmup"],
        stages=record["stages"],
        groups={stage["stage"]: record[f"{stage['stage']}_groups"] for stage in record["stages"]},
        values=read_arrays(folder / f"{name}_train{precision}.npz") if precision else {},
    )


def _same_tensors(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """{our name: their name} of the tensors that share their memory and have the same shape."""
    names = {(tensor.data_ptr(), tensor.shape): name for name, tensor in theirs.items()}
    found = {name: names.get((tensor.data_ptr(), tensor.shape)) for name, tensor in ours.items()}
    return {name: reference for name, reference in found.items() if reference is not None}


def model_config(keys: dict[str, Any], tensors: dict[str, torch.Tensor]) -> ModelConfig:
    """The configuration of a recorded model, from its recorded config and otherwise from its tensors."""
    config = keys["config"]
    language, clip, head = config["llm"]["config"], config["clip"], config["head"]
    is_mpt = config["llm"]["kind"] == "mpt"
    latents = tensors["perceiver.latents"]
    resampler_inner = tensors["perceiver.layers.0.0.to_q.weight"].shape[0]
    cross = next(key for key in tensors if key.endswith("gated_cross_attn_layer.attn.to_q.weight"))
    return ModelConfig(
        vision=VisionConfig(
            image_size=clip["image_size"],
            patch_size=clip["patch_size"],
            width=clip["width"],
            layers=clip["layers"],
            heads=clip["width"] // clip["head_width"],
            mlp_ratio=clip["mlp_ratio"],
        ),
        resampler=ResamplerConfig(
            depth=sum(key.startswith("perceiver.layers.") and key.endswith("to_q.weight") for key in tensors),
            latents=latents.shape[0],
            heads=resampler_inner // REFERENCE_HEAD_WIDTH,
            head_width=REFERENCE_HEAD_WIDTH,
            mlp_ratio=tensors["perceiver.layers.0.1.1.weight"].shape[0] // latents.shape[1],
        ),
        decoder=DecoderConfig(
            width=language["d_model"],
            heads=language["n_heads"],
            layers=config["early_exit_layer"] + 1,
            vocabulary=tensors["lang_encoder.transformer.wte.weight"].shape[0],
            cross_attention_every=config["cross_attn_every_n_layers"],
            qk_norm=language["attn_config"]["qk_ln"] if is_mpt else language["attn_qk_ln"],
            final_norm=is_mpt,
            mlp_ratio=language["expansion_ratio"] if is_mpt else language["mlp_ratio"],
            alibi_bias_max=(language["attn_config"] if is_mpt else language)["alibi_bias_max"],
            cross_attention_heads=tensors[cross].shape[0] // REFERENCE_HEAD_WIDTH,
            cross_attention_head_width=REFERENCE_HEAD_WIDTH,
            cross_attention_mlp_ratio=tensors[cross.replace("attn.to_q", "ff.1")].shape[0]
            // language["d_model"],
        ),
        head=HeadConfig(
            hidden=head["hidden_size"],
            mlp_widths=MLP_WIDTHS[: head["mlp_num_hidden_layers"]],
            lstm_layers=head["lstm_num_layers"],
            lstm_dropout=head["lstm_dropout"],
            mlp_dropout=head["exit_dropout"],
        ),
        exit_interval=config["exit_interval"],
    )


def toy_tokenizer(vocabulary: dict[str, int], max_tokens: int) -> InstructionTokenizer:
    """The word-level tokenizer of the recordings. It maps an unknown word to the end-of-text token."""
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=END_OF_TEXT))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True) for token in (END_OF_TEXT, END_OF_CHUNK, IMAGE, PAD)]
    )
    return InstructionTokenizer(tokenizer, max_tokens)


def read_json(path: Path) -> Any:
    """Reads a JSON file of a recording. Raises UserError if it is missing or malformed."""
    if not path.is_file():
        raise UserError(f"{path} is missing: give a folder of recorded tensors like shared/golden")
    return read_json_file(path, "copy the recording again")


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Reads all arrays of a recording file; pickled ones are refused.

    Raises UserError if it is missing or malformed.
    """
    try:
        return read_npz(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: give a folder of recorded tensors like shared/golden") from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: not a readable npz file ({cause(error)}): copy the recording again"
        ) from error
