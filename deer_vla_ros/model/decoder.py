"""The layers: a gated cross-attention to the visual tokens, then a decoder block of the language model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deer_vla_ros.model.config import DecoderConfig
from deer_vla_ros.model.quantisation import quantise_linear_maps
from deer_vla_ros.model.resampler import FeedForward, merge_heads, split_heads


@dataclass(frozen=True)
class TextContext:
    """An encoded instruction, computed once per episode.

    embedding: (B, S, width). attention_bias: (B, heads, S, S), is added to the attention scores.
    sees_image: (B, S, 1), is 0 before the token `<image>` and 1 from there on.
    """

    embedding: Tensor
    attention_bias: Tensor
    sees_image: Tensor

    @property
    def tokens(self) -> int:
        return self.embedding.shape[1]

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.embedding, self.attention_bias, self.sees_image))

    def rows(self, rows: list[int]) -> TextContext:
        """The texts of some rows of the batch."""
        return TextContext(*(part[rows] for part in self))


def alibi_slopes(heads: int, bias_max: int) -> Tensor:
    """(heads,) slopes 2^(-bias_max * h / heads), h = 1..heads.

    If `heads` is no power of two, the slopes of the next power of two are interleaved, as in MPT.
    """
    power = 2 ** math.ceil(math.log2(heads))
    slopes = 2.0 ** -(torch.arange(1, power + 1, dtype=torch.float32) * bias_max / power)
    if power != heads:
        slopes = torch.cat((slopes[1::2], slopes[::2]))[:heads]
    return slopes


def attention_bias(attention_mask: Tensor, config: DecoderConfig) -> Tensor:
    """(B, S) mask, 1 = real token -> (B, heads, S, S): ALiBi with the causal and the padding mask."""
    tokens = attention_mask.shape[1]
    slopes = alibi_slopes(config.heads, config.alibi_bias_max).to(attention_mask.device)
    positions = torch.arange(1 - tokens, 1, device=attention_mask.device, dtype=torch.float32)
    causal = torch.ones(tokens, tokens, dtype=torch.bool, device=attention_mask.device).tril()
    visible = causal & attention_mask.bool()[:, None, None, :]
    bias = slopes[:, None, None] * positions
    return torch.where(visible, bias, torch.finfo(torch.float32).min)


class CrossAttention(nn.Module):
    """The attention of the text tokens to the visual tokens."""

    def __init__(self, config: DecoderConfig, visual_width: int):
        super().__init__()
        inner = config.cross_attention_heads * config.cross_attention_head_width
        self.heads = config.cross_attention_heads
        self.norm = nn.LayerNorm(config.width)
        self.query = nn.Linear(config.width, inner, bias=False)
        self.key_value = nn.Linear(visual_width, 2 * inner, bias=False)
        self.out = nn.Linear(inner, config.width, bias=False)

    def forward(self, x: Tensor, visual: Tensor, sees_image: Tensor) -> Tensor:
        key, value = self.key_value(visual).chunk(2, dim=-1)
        query, key, value = (split_heads(part, self.heads) for part in (self.query(self.norm(x)), key, value))
        return self.out(merge_heads(F.scaled_dot_product_attention(query, key, value)) * sees_image)


class GatedCrossAttention(nn.Module):
    """`x += tanh(attention_gate) * CrossAttention(x, visual)`, then
    `x += tanh(feed_forward_gate) * FeedForward(x)`."""

    def __init__(self, config: DecoderConfig, visual_width: int):
        super().__init__()
        self.attention = CrossAttention(config, visual_width)
        self.attention_gate = nn.Parameter(torch.full((1,), config.gate_init))
        self.feed_forward = FeedForward(config.width, config.cross_attention_mlp_ratio)
        self.feed_forward_gate = nn.Parameter(torch.full((1,), config.gate_init))

    def forward(self, x: Tensor, visual: Tensor, sees_image: Tensor) -> Tensor:
        x = x + self.attention_gate.tanh() * self.attention(x, visual, sees_image)
        return x + self.feed_forward_gate.tanh() * self.feed_forward(x)


class DecoderBlock(nn.Module):
    """The pre-norm decoder block of MPT, with fused q, k, v, ALiBi, exact GELU and no biases.

    With `qk_norm`, q and k are normed over the full width.
    """

    def __init__(self, config: DecoderConfig):
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.norm_attention = nn.LayerNorm(width, bias=False)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.norm_query = nn.LayerNorm(width, bias=False) if config.qk_norm else nn.Identity()
        self.norm_key = nn.LayerNorm(width, bias=False) if config.qk_norm else nn.Identity()
        self.out = nn.Linear(width, width, bias=False)
        self.norm_mlp = nn.LayerNorm(width, bias=False)
        self.up = nn.Linear(width, config.mlp_ratio * width, bias=False)
        self.down = nn.Linear(config.mlp_ratio * width, width, bias=False)

    def forward(self, x: Tensor, attention_bias: Tensor) -> Tensor:
        query, key, value = self.query_key_value(self.norm_attention(x)).chunk(3, dim=-1)
        query, key, value = (
            split_heads(part, self.heads) for part in (self.norm_query(query), self.norm_key(key), value)
        )
        x = x + self.out(
            merge_heads(F.scaled_dot_product_attention(query, key, value, attn_mask=attention_bias))
        )
        return x + self.down(F.gelu(self.up(self.norm_mlp(x))))


class Layer(nn.Module):
    """One layer. Exits and budgets count these layers."""

    def __init__(self, config: DecoderConfig, index: int, visual_width: int, bits: int | None = None):
        """bits: of a weight in the matrices, 8 or 4; None: they have the number type of all weights."""
        super().__init__()
        self.cross_attention = (
            GatedCrossAttention(config, visual_width) if config.has_cross_attention(index) else None
        )
        self.block = DecoderBlock(config)
        if bits is not None:
            quantise_linear_maps(self, bits)

    def forward(self, x: Tensor, visual: Tensor, text: TextContext) -> Tensor:
        """(B, S, width) hidden state -> the next hidden state. visual: (B, visual tokens, visual width)."""
        if self.cross_attention is not None:
            x = self.cross_attention(x, visual, text.sees_image)
        return self.block(x, text.attention_bias)
