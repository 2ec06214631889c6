"""A small network for the tests. It has every part, and a step takes about a millisecond.

Import it as `from small_model import ...`.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from deer_vla_ros.inference.types import Observation
from deer_vla_ros.model.action_space import CALVIN
from deer_vla_ros.model.checkpoint import CheckpointInfo
from deer_vla_ros.model.config import DecoderConfig, HeadConfig, ModelConfig, ResamplerConfig, VisionConfig
from deer_vla_ros.model.network import MultiExitVLA
from deer_vla_ros.model.text import END_OF_CHUNK, END_OF_TEXT, IMAGE, PAD, InstructionTokenizer

WORDS = ("push", "lift", "the", "red", "blue", "block", "to", "left")
INSTRUCTION = "push the red block"

SMALL = ModelConfig(
    vision=VisionConfig(image_size=16, patch_size=8, width=16, layers=1, heads=2),
    resampler=ResamplerConfig(depth=1, latents=4, heads=2, head_width=8, mlp_ratio=2),
    decoder=DecoderConfig(
        width=16,
        heads=2,
        layers=6,
        vocabulary=16,
        cross_attention_every=1,
        qk_norm=True,
        final_norm=False,
        mlp_ratio=2,
        cross_attention_heads=2,
        cross_attention_head_width=8,
        cross_attention_mlp_ratio=2,
        gate_init=0.7,
    ),
    head=HeadConfig(hidden=16, mlp_widths=(32,), lstm_layers=2),
    max_tokens=12,
)
"""Exits at layers 1, 3 and 5."""

INFO = CheckpointInfo(
    model=SMALL,
    action_space=CALVIN,
    weights="random",
    trained=False,
    delta="l2",
    thresholds=(0.01, 0.02, 1e8),
)


def with_decoder(config: ModelConfig, **changes) -> ModelConfig:
    """The configuration with these changes of its decoder."""
    return dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, **changes))


def small_model(config: ModelConfig = SMALL, seed: int = 1) -> MultiExitVLA:
    """A network with large random weights, so that its exits disagree differently in each step."""
    torch.manual_seed(seed)
    model = MultiExitVLA(config).eval().requires_grad_(False)
    for parameter in model.layers.parameters():
        if parameter.dim() > 1:
            parameter.mul_(3)
    for parameter in model.shared_head.parameters():
        parameter.mul_(2)
    return model


def small_tokenizer(max_tokens: int = SMALL.max_tokens) -> InstructionTokenizer:
    """A word-level tokenizer. A word that is not in WORDS becomes the end-of-text token."""
    vocabulary = {word: i for i, word in enumerate((END_OF_TEXT, END_OF_CHUNK, IMAGE, PAD, *WORDS))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=END_OF_TEXT))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True) for token in (END_OF_TEXT, END_OF_CHUNK, IMAGE, PAD)]
    )
    return InstructionTokenizer(tokenizer, max_tokens)


def observations(count: int, seed: int = 0) -> list[Observation]:
    """Observations of noise images in two sizes unlike the network's, and a gripper that points down."""
    random, tcp = np.random.default_rng(seed), np.array([0.4, 0.0, 0.2, 1.0, 0.0, 0.0, 0.0])
    sizes = (20, 24, 3), (12, 10, 3)
    return [
        Observation(*(random.integers(0, 256, size, dtype=np.uint8) for size in sizes), tcp)
        for _ in range(count)
    ]
