"""The cost of a step in closed form: multiply-accumulates (MACs) and bytes of each part of the network.

1 GMAC = 10^9 multiply-accumulates; the paper prints it as 1 GFLOPs. Norms, activations and element-wise
operations are not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deer_vla_ros.model.config import (
    CAMERAS,
    DecoderConfig,
    HeadConfig,
    ModelConfig,
    ResamplerConfig,
    VisionConfig,
)
from deer_vla_ros.model.grounding import NEAR_VALUES, POSE_VALUES, RELATE_WIDTH, STRIDE

GIGA = 1e9
GIB = 2**30


@dataclass(frozen=True)
class CostTable:
    """GMAC of the parts of one step at one instruction length.

    tokens: of the instruction. vision: tower, resampler and grounding of all cameras, and proprioception.
    layers: each decoder layer. head: one probe of the action head.
    """

    tokens: int
    vision: float
    layers: tuple[float, ...]
    head: float

    def language(self, layers_run: int) -> float:
        """GMAC of the first `layers_run` layers. Budgets count this language part."""
        return sum(self.layers[:layers_run])

    def total(self, layers_run: int, head_probes: int) -> float:
        """GMAC of a whole step."""
        return self.vision + self.language(layers_run) + head_probes * self.head


def cost_table(config: ModelConfig, tokens: int) -> CostTable:
    """The costs of a step whose instruction has `tokens` tokens, special tokens included."""
    camera = vision_macs(config.vision) + resampler_macs(config.resampler, config.vision)
    layers = (
        layer_macs(config.decoder, i, tokens, config.visual_tokens, config.vision.width)
        for i in range(config.decoder.layers)
    )
    return CostTable(
        tokens=tokens,
        vision=(CAMERAS * camera + grounding_macs(config) + proprioception_macs(config)) / GIGA,
        layers=tuple(macs / GIGA for macs in layers),
        head=head_macs(config.head, config.decoder.width) / GIGA,
    )


def attention_macs(queries: int, keys: int, width: int) -> int:
    """MACs of the scores and the weighted sum of an attention; `width`: channels of all heads."""
    return 2 * queries * keys * width


def vision_macs(config: VisionConfig) -> int:
    """MACs of one image in the vision tower."""
    tokens = config.tokens + 1
    patches = config.tokens * 3 * config.patch_size**2 * config.width
    mlp = int(config.width * config.mlp_ratio)
    block = tokens * (4 * config.width**2 + 2 * config.width * mlp) + attention_macs(
        tokens, tokens, config.width
    )
    return patches + config.layers * block


def resampler_macs(config: ResamplerConfig, vision: VisionConfig) -> int:
    """MACs of one camera's patch tokens in the resampler."""
    width, inner, latents = vision.width, config.heads * config.head_width, config.latents
    keys = vision.tokens + latents
    projections = 2 * latents * width * inner + keys * width * 2 * inner
    feed_forward = 2 * latents * width * config.mlp_ratio * width
    return config.depth * (projections + attention_macs(latents, keys, inner) + feed_forward)


def grounding_macs(config: ModelConfig) -> int:
    """MACs of both images in the grounding: convolutions and queries. 0 if the network has no grounding."""
    if config.grounding is None:
        return 0
    channels, queries, width = config.grounding.channels, config.grounding.queries, config.vision.width
    cells = (config.vision.image_size // STRIDE) ** 2
    stem = (
        4 * cells * 3 * 25 * (channels // 2)
        + cells * 9 * (channels // 2) * channels
        + cells * 9 * channels**2
    )
    search = attention_macs(queries, cells, channels) + queries * cells * 2
    things = config.grounding.things
    seen = CAMERAS * (queries // things) * (channels + 2) + POSE_VALUES
    relate = (seen + RELATE_WIDTH + 5) * RELATE_WIDTH + (RELATE_WIDTH + NEAR_VALUES) * width
    return CAMERAS * (stem + search) + things * relate


def proprioception_macs(config: ModelConfig) -> int:
    """MACs of the token of the measured pose. 0 if the network does not use the pose."""
    return 2 * config.vision.width * (POSE_VALUES + config.vision.width) if config.proprioception else 0


def layer_macs(config: DecoderConfig, layer: int, tokens: int, visual_tokens: int, visual_width: int) -> int:
    """MACs of one layer: its cross-attention, if it has one, and its decoder block."""
    width = config.width
    block = tokens * _block_weights(config) + attention_macs(tokens, tokens, width)
    if not config.has_cross_attention(layer):
        return block
    inner = config.cross_attention_heads * config.cross_attention_head_width
    text_side = tokens * (2 * width * inner + 2 * config.cross_attention_mlp_ratio * width**2)
    visual_side = visual_tokens * visual_width * 2 * inner
    return block + text_side + visual_side + attention_macs(tokens, visual_tokens, inner)


def exit_fractions(config: ModelConfig, tokens: int) -> np.ndarray:
    """(exits,) The language part of a step to each exit, as a share of full depth."""
    layers = np.cumsum(cost_table(config, tokens).layers)
    return layers[list(config.exits)] / layers[-1]


def head_macs(config: HeadConfig, width: int) -> int:
    """MACs of one probe of the action head."""
    widths = (width, *(config.hidden for _ in range(config.lstm_layers)))
    recurrent = sum(4 * b * (a + b) for a, b in zip(widths, widths[1:]))
    mlp = (widths[-1], *config.mlp_widths)
    hidden = sum(a * b for a, b in zip(mlp, mlp[1:]))
    return recurrent + 2 * hidden + mlp[-1] * (6 + 1)


def cumulated_gib(layer_bytes: Sequence[int]) -> np.ndarray:
    """(layers,) GiB of each layer and all layers before it. layer_bytes: as `network.layer_bytes`."""
    return np.cumsum(layer_bytes) / GIB


def layers_within(config: ModelConfig, layer_bytes: Sequence[int], memory_gib: float) -> int:
    """Number of layers that a memory budget keeps on the device: up to the deepest exit that fits.

    At least the first exit stays. 0 GiB means no limit. layer_bytes: as `network.layer_bytes`.
    """
    if memory_gib == 0:
        return config.decoder.layers
    gib = cumulated_gib(layer_bytes)
    return max((layer for layer in config.exits if gib[layer] <= memory_gib), default=config.exits[0]) + 1


def _block_weights(config: DecoderConfig) -> int:
    """Number of weights in a decoder block's matrices (q, k, v, out, up, down). Each is one MAC per token."""
    return (4 + 2 * config.mlp_ratio) * config.width**2
