"""The parity check of the network: the reference's recorded tensors against those of our code."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deer_vla_ros.budget.calibration import columns, window_deltas
from deer_vla_ros.budget.families import target_shares, thresholds_for_shares
from deer_vla_ros.errors import UserError
from deer_vla_ros.inference.exit_rule import ExitRule
from deer_vla_ros.inference.policy import DeerPolicy
from deer_vla_ros.inference.preprocess import ImagePreprocessor, resize_and_crop
from deer_vla_ros.inference.types import Observation, PolicyStep
from deer_vla_ros.lab.parity.comparison import EXACT, Difference, Verdict, compare, judge
from deer_vla_ros.lab.parity.parity_training import (
    SHIFT_KINDS,
    TRAINING64_KINDS,
    TRAINING_KINDS,
    check_random_shift,
    check_training,
    check_training64,
)
from deer_vla_ros.lab.parity.reference_tensors import (
    ModelRecording,
    read_arrays,
    read_json,
    read_model,
    toy_tokenizer,
)
from deer_vla_ros.lab.training.losses import segments
from deer_vla_ros.model.decoder import TextContext
from deer_vla_ros.model.head import HeadOutput, HeadState, pool
from deer_vla_ros.model.network import MultiExitVLA
from deer_vla_ros.model.text import prompt

ALWAYS = 1e8
MODEL_KINDS = (
    "images",
    "input_ids",
    "vit_tokens",
    "resampler",
    "token_embedding",
    "hidden_states",
    "pooled",
    "pose",
    "gripper_logit",
    "gripper_prob",
    "deltas",
    "exits",
    "action_fp16",
    "lstm_h",
    "lstm_c",
    "values",
)
"""The kinds of array that every recorded model must contain. A kind that is missing has not passed."""


def check_folder(folder: Path, train64: bool = False) -> Iterator[Verdict]:
    """Yields a verdict for each recording in a folder and each kind of array, as soon as it is computed.

    train64: also check the training in float64. Raises UserError if the folder has no recordings or lacks an
    array.
    """
    tolerances = read_json(folder / "tolerances.json")
    tolerances |= tolerances.get("train64", {})
    names = sorted(path.name.removesuffix("_keys.json") for path in folder.glob("*_keys.json"))
    if not names:
        raise UserError(f"{folder}: no *_keys.json: give a folder of recorded tensors like shared/golden")
    recordings = [
        *((name, partial(_check_model, name=name), MODEL_KINDS) for name in names),
        ("text", check_text, ("template", "input_ids")),
        ("preproc", check_preprocessing, ("preprocess_uint8_levels", "preprocess_float")),
        ("shift", check_random_shift, SHIFT_KINDS),
        ("budget", check_thresholds, ("thresholds_relative",)),
        *((f"{name}_train", partial(check_training, name=name), TRAINING_KINDS) for name in names),
    ]
    if train64:
        recordings += [
            (f"{name}_fp64", partial(check_training64, name=name), TRAINING64_KINDS) for name in names
        ]
    for name, check, kinds in recordings:
        try:
            yield from judge(name, check(folder), kinds, tolerances)
        except KeyError as error:
            raise UserError(
                f"{folder}: recording '{name}' lacks {error}: copy the recording again"
            ) from error


@torch.inference_mode()
def _check_model(folder: Path, name: str) -> list[Difference]:
    """Makes all comparisons of one recorded model."""
    recording = read_model(folder, name)
    return [*check_rollout(recording), *check_window(recording)]


def check_rollout(recording: ModelRecording) -> Iterator[Difference]:
    """Compares whole episodes of the reference's step function with `DeerPolicy` on the same raw images."""
    model, arrays = recording.model, recording.rollout
    observations = [
        Observation(static, gripper) for static, gripper in zip(arrays["raw_static"], arrays["raw_gripper"])
    ]
    preprocess = ImagePreprocessor(model.config.vision.image_size, model.device, torch.float32)
    images = torch.cat(
        [preprocess((observation.static, observation.gripper)) for observation in observations]
    )
    for camera, name in enumerate(("vision_x", "vision_gripper")):
        yield compare("images", name, arrays[name][:, 0, 0, 0], images[:, camera])
    ids, mask = recording.tokenizer.encode([recording.info["instruction"]])
    yield compare("input_ids", "input_ids", arrays["input_ids"], ids)
    yield compare("input_ids", "attention_mask", arrays["attention_mask"], mask)
    text = model.encode_text(ids, mask, recording.tokenizer.image_token)
    yield from _check_moments(arrays, model, images, text)

    # (T, L, S, width): computed step by step, as the policy runs.
    hidden = torch.stack(
        [torch.cat(list(model.hidden_states(model.encode_images(image[None]), text))) for image in images]
    )
    features = pool(hidden)
    for name in sorted(name for name in arrays if name.endswith("/pose")):
        tag = name.removesuffix("/pose")
        if f"{tag}/hidden_states" in arrays:
            recorded = arrays[f"{tag}/hidden_states"]
            yield compare(
                "hidden_states",
                f"{tag}/hidden_states",
                recorded,
                hidden[: recorded.shape[0], : recorded.shape[1]],
            )
        if tag.startswith("layerwise_exit_"):
            yield from _check_own_head(tag, arrays, model, features)
        else:
            rule, columns = _recorded_rule(tag, recording)
            yield from _check_policy(tag, recording, rule, columns, observations, features)


def _check_moments(
    arrays: dict, model: MultiExitVLA, images: Tensor, text: TextContext
) -> Iterator[Difference]:
    """Compares tensors of single steps: patch tokens, visual tokens, token embedding."""
    for name in arrays:
        moment = re.fullmatch(r"t(\d+)/(vit_tokens|perceiver|token_embedding)(?:_(static|gripper))?", name)
        if not moment:
            continue
        if moment[2] == "token_embedding":
            yield compare("token_embedding", name, arrays[name], text.embedding[0])
            continue
        tokens = model.vision(images[int(moment[1])])
        camera = ("static", "gripper").index(moment[3])
        if moment[2] == "vit_tokens":
            yield compare("vit_tokens", name, arrays[name], tokens[camera])
        else:
            yield compare("resampler", name, arrays[name], model.resampler(tokens)[camera])


def _recorded_rule(tag: str, recording: ModelRecording) -> tuple[ExitRule, list[int]]:
    """The exit rule of a recorded run, and the exit layer of each column of its `deltas`."""
    if tag.startswith("fixed_exit_"):
        exit_layer = int(tag.removeprefix("fixed_exit_"))
        return ExitRule((exit_layer,), (ALWAYS,)), [exit_layer]
    settings = recording.info["dynamic"][tag]
    thresholds = {int(layer): value for layer, value in settings["thresholds"].items()}
    rule = ExitRule(
        exits=tuple(sorted(thresholds)),
        thresholds=tuple(thresholds[layer] for layer in sorted(thresholds)),
        delta=settings.get("ttype", "l2"),
        steps_per_stage=settings.get("steps_per_stage", 1),
        ensemble=settings["ensemble"],
    )
    return rule, settings["exit_id_list"]


def _check_policy(
    tag: str,
    recording: ModelRecording,
    rule: ExitRule,
    columns: list[int],
    observations: list[Observation],
    features: Tensor,
) -> Iterator[Difference]:
    """Compares one run of `DeerPolicy` over the recorded images.

    With `ensemble`, a second run without it gives the output of the chosen exit's head alone, which the
    reference recorded.
    """
    arrays = recording.rollout
    steps, state = _run_policy(recording, rule, observations)
    exits = np.array([step.exit_layer for step in steps])
    yield compare("exits", f"{tag}/exit_layer", arrays[f"{tag}/exit_layer"], exits)
    grippers = np.array([[step.action.gripper] for step in steps])
    emitted = _as_half(np.stack([step.action.pose for step in steps]), grippers)
    yield compare("action_fp16", f"{tag}/action_fp16", arrays[f"{tag}/action_fp16"], emitted)
    alone = (
        _run_policy(recording, dataclasses.replace(rule, ensemble=False), observations)[0]
        if rule.ensemble
        else steps
    )
    yield compare(
        "pose", f"{tag}/pose", arrays[f"{tag}/pose"], np.stack([step.action.pose for step in alone])
    )
    probabilities = np.array([step.action.gripper_probability for step in alone])
    yield compare("gripper_prob", f"{tag}/gripper_prob", arrays[f"{tag}/gripper_prob"], probabilities)
    yield compare("pooled", f"{tag}/pooled", arrays[f"{tag}/pooled"], features[range(len(steps)), exits])
    yield from _check_state(tag, arrays, state)
    if f"{tag}/deltas" in arrays:
        measured = [dict(zip(step.exits, step.deltas)) for step in steps]
        ours = np.array([[deltas.get(layer, np.nan) for layer in columns] for deltas in measured])
        yield compare("deltas", f"{tag}/deltas", arrays[f"{tag}/deltas"], ours)


def _run_policy(
    recording: ModelRecording, rule: ExitRule, observations: list[Observation]
) -> tuple[list[PolicyStep], HeadState]:
    """Runs one episode of the policy. Returns its decisions, and the head's state after the last one."""
    policy = DeerPolicy(recording.model, recording.tokenizer, rule)
    policy.reset(recording.info["instruction"])
    return [policy.step(observation) for observation in observations], policy.state


def _check_own_head(tag: str, arrays: dict, model: MultiExitVLA, features: Tensor) -> Iterator[Difference]:
    """Compares one run that reads a layer with the head that was trained for this layer alone."""
    layer = int(tag.removeprefix("layerwise_exit_"))
    head = model.auxiliary_heads[str(layer)] if str(layer) in model.auxiliary_heads else model.last_head
    output = head(features[None, :, layer], head.initial_state())
    poses, probabilities = output.pose[0], output.gripper_logit[0, :, 0].sigmoid()
    grippers = np.where(probabilities.numpy() > 0.5, 1, -1)[:, None]
    yield compare("exits", f"{tag}/exit_layer", arrays[f"{tag}/exit_layer"], np.full(len(poses), layer))
    yield compare("pose", f"{tag}/pose", arrays[f"{tag}/pose"], poses)
    yield compare("gripper_prob", f"{tag}/gripper_prob", arrays[f"{tag}/gripper_prob"], probabilities)
    yield compare(
        "action_fp16", f"{tag}/action_fp16", arrays[f"{tag}/action_fp16"], _as_half(poses.numpy(), grippers)
    )
    yield compare("pooled", f"{tag}/pooled", arrays[f"{tag}/pooled"], features[:, layer])
    yield from _check_state(tag, arrays, output.state)


def _check_state(tag: str, arrays: dict, state: HeadState) -> Iterator[Difference]:
    yield compare("lstm_h", f"{tag}/h_final", arrays[f"{tag}/h_final"], state.hidden)
    yield compare("lstm_c", f"{tag}/c_final", arrays[f"{tag}/c_final"], state.cell)


def _as_half(poses: np.ndarray, grippers: np.ndarray) -> np.ndarray:
    """(T, 7) float16: the actions in the precision in which the reference returns them."""
    return np.concatenate((poses, grippers), axis=1).astype(np.float16)


def check_window(recording: ModelRecording) -> Iterator[Difference]:
    """Compares batches of whole windows, as in training: all hidden states and the outputs of every head."""
    arrays = recording.window
    for name in sorted(name for name in arrays if re.fullmatch(r"fwd\d+/pooled", name)):
        forward = name.removesuffix("/pooled")
        yield from _check_batch(forward.replace("fwd", "batch"), forward, recording)


def _check_batch(batch: str, forward: str, recording: ModelRecording) -> Iterator[Difference]:
    model, arrays = recording.model, recording.window
    exits = model.config.exits
    images = torch.from_numpy(
        np.stack((arrays[f"{batch}/rgb_static"], arrays[f"{batch}/rgb_gripper"]), axis=2)
    )
    samples, window = images.shape[:2]
    ids, mask = (
        torch.from_numpy(arrays[f"{batch}/{name}"]).repeat_interleave(window, 0)
        for name in ("input_ids", "attention_mask")
    )
    text = model.encode_text(ids, mask, recording.tokenizer.image_token)
    hidden = list(model.hidden_states(model.encode_images(images.flatten(0, 1)), text))
    # In training every layer runs. The final norm then gives one more hidden state, for the last head.
    if model.final_norm is not None:
        hidden.append(model.final_norm(hidden[-1]))
    states = torch.stack(hidden, dim=1).unflatten(0, (samples, window))  # (B, W, L, S, width)
    features = pool(states)
    yield compare(
        "hidden_states", f"{forward}/hidden_states_t0", arrays[f"{forward}/hidden_states_t0"], states[:, 0]
    )
    yield compare("pooled", f"{forward}/pooled", arrays[f"{forward}/pooled"], features.permute(2, 0, 1, 3))
    for exit_layer, head in model.auxiliary_heads.items():
        output = head(features[:, :, int(exit_layer)], head.initial_state(samples))
        yield from _check_head(f"{forward}/aux_exit_{exit_layer}", arrays, output)
    head = model.last_head
    yield from _check_head(
        f"{forward}/last_head", arrays, head(features[:, :, -1], head.initial_state(samples))
    )
    number = int(batch.removeprefix("batch"))
    drawn = torch.from_numpy(arrays[f"values/strategy1_idx_{batch}"])
    values = window_deltas(model.shared_head, columns(features, exits), drawn)
    recorded = arrays["values/values"][:, number * len(values) : (number + 1) * len(values)]
    yield compare("values", f"values/values of {batch}", recorded, values.T)
    for strategy in (1, 2):
        layers = torch.tensor(exits)[_drawn_exits(arrays, forward, strategy, window)]
        drawn = features.gather(2, layers[..., None, None].expand(-1, -1, 1, features.shape[-1]))[:, :, 0]
        output = model.shared_head(drawn, model.shared_head.initial_state(samples))
        yield from _check_head(f"{forward}/extra_strategy{strategy}", arrays, output)


def _drawn_exits(arrays: dict, forward: str, strategy: int, window: int) -> Tensor:
    """(B, W) Indices of the random exits that the reference drew.

    strategy: 1, an exit per step; 2, an exit per segment, with the same segments in all samples.
    """
    drawn = torch.from_numpy(arrays[f"{forward}/strategy{strategy}_idx"])
    if strategy == 1:
        return drawn
    return segments(drawn, int(arrays[f"{forward}/strategy2_prev_len"]), window)


def _check_head(tag: str, arrays: dict, output: HeadOutput) -> Iterator[Difference]:
    yield compare("pose", f"{tag}/pose", arrays[f"{tag}/pose"], output.pose)
    yield compare(
        "gripper_logit", f"{tag}/gripper_logit", arrays[f"{tag}/gripper_logit"], output.gripper_logit
    )
    yield compare(
        "gripper_prob", f"{tag}/gripper_prob", arrays[f"{tag}/gripper_prob"], output.gripper_logit.sigmoid()
    )


def check_text(folder: Path) -> Iterator[Difference]:
    """Compares the prompt template, the padding to the longest text, and the truncation."""
    recorded = read_json(folder / "text.json")
    for text, expected in zip(recorded["texts"], recorded["strings"], strict=True):
        yield Difference("template", repr(text), EXACT if prompt(text) == expected else float("inf"))
    truncated = recorded["truncation_case"]
    for where, texts, case in (
        ("texts", recorded["texts"], recorded),
        ("truncation_case", [truncated["text"]], truncated),
    ):
        longest = len(case["input_ids"][0])
        ids, mask = toy_tokenizer(recorded["vocab"], longest).encode(texts)
        yield compare("input_ids", f"{where}/input_ids", np.array(case["input_ids"]), ids)
        yield compare("input_ids", f"{where}/attention_mask", np.array(case["attention_mask"]), mask)


def check_preprocessing(folder: Path) -> Iterator[Difference]:
    """Compares resized, cropped and normalised images, which must be equal to the bit."""
    arrays = read_arrays(folder / "preproc.npz")
    for name in sorted(name for name in arrays if name.endswith("/raw_hwc_uint8")):
        camera, raw = name.removesuffix("/raw_hwc_uint8"), arrays[name]
        recorded = arrays[f"{camera}/resized_cropped_chw_uint8"]
        size = recorded.shape[-1]
        pixels = resize_and_crop(raw, size).transpose(2, 0, 1)
        yield compare("preprocess_uint8_levels", f"{camera}/resized_cropped_chw_uint8", recorded, pixels)
        normalised = ImagePreprocessor(size, torch.device("cpu"), torch.float32)([raw])[0, 0]
        yield compare(
            "preprocess_float",
            f"{camera}/out_sub16",
            arrays[f"{camera}/out_sub16"],
            normalised[:, ::16, ::16],
        )


def check_thresholds(folder: Path) -> Iterator[Difference]:
    """Compares every recorded case of the reference's threshold solver, by the ratio of the thresholds."""
    matrices = read_arrays(folder / "thresholds.npz")
    for number, case in enumerate(read_json(folder / "thresholds.json")):
        allowed = [index for index, layer in enumerate(case["exit_ids"]) if layer < case["max_layer"]]
        deltas = matrices[case["values"]].T[:, allowed]
        shares = target_shares(
            case["exit_dist"], case["exit_ratio"], len(allowed), skip_first=case["llm_name"] == "mpt_9b"
        )
        recorded = np.array(list(case["thresholds"].values()))
        ours = np.array(thresholds_for_shares(deltas, shares))
        where = (
            f"case {number}: {case['values']} {case['exit_dist']} {case['exit_ratio']:g} "
            f"max_layer {case['max_layer']}"
        )
        yield compare("thresholds_relative", where, np.ones_like(recorded), ours / recorded)
