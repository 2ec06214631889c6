"""The Perceiver resampler, which turns the patch tokens of one camera into few visual tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deer_vla_ros.model.config import ResamplerConfig


def merge_heads(x: Tensor) -> Tensor:
    """(B, heads, S, head width) -> (B, S, heads * head width)."""
    return x.transpose(1, 2).flatten(2)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, S, heads * head width) -> (B, heads, S, head width)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class FeedForward(nn.Module):
    """LayerNorm, Linear, exact GELU, Linear. The linear layers have no biases."""

    def __init__(self, width: int, ratio: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, width * ratio, bias=False)
        self.down = nn.Linear(width * ratio, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(self.norm(x))))


class LatentAttention(nn.Module):
    """The attention of the latents to the image tokens and to themselves, both normed."""

    def __init__(self, width: int, config: ResamplerConfig):
        super().__init__()
        inner = config.heads * config.head_width
        self.heads = config.heads
        self.norm_image = nn.LayerNorm(width)
        self.norm_latents = nn.LayerNorm(width)
        self.query = nn.Linear(width, inner, bias=False)
        self.key_value = nn.Linear(width, 2 * inner, bias=False)
        self.out = nn.Linear(inner, width, bias=False)

    def forward(self, latents: Tensor, image: Tensor) -> Tensor:
        latents = self.norm_latents(latents)
        key, value = self.key_value(torch.cat((self.norm_image(image), latents), dim=1)).chunk(2, dim=-1)
        query, key, value = (split_heads(x, self.heads) for x in (self.query(latents), key, value))
        return self.out(merge_heads(F.scaled_dot_product_attention(query, key, value)))


class ResamplerLayer(nn.Module):
    """`x += Attention(x, image)`, `x += FeedForward(x)`."""

    def __init__(self, width: int, config: ResamplerConfig):
        super().__init__()
        self.attention = LatentAttention(width, config)
        self.feed_forward = FeedForward(width, config.mlp_ratio)

    def forward(self, latents: Tensor, image: Tensor) -> Tensor:
        latents = latents + self.attention(latents, image)
        return latents + self.feed_forward(latents)


class PerceiverResampler(nn.Module):
    """Turns the patch tokens of one camera into visual tokens. Both cameras use the same weights."""

    def __init__(self, width: int, config: ResamplerConfig):
        super().__init__()
        self.latents = nn.Parameter(nn.init.normal_(torch.empty(config.latents, width)))
        self.layers = nn.ModuleList(ResamplerLayer(width, config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, image: Tensor) -> Tensor:
        """(N, tokens, width) patch tokens -> (N, latents, width) visual tokens."""
        latents = self.latents.expand(image.shape[0], -1, -1)
        for layer in self.layers:
            latents = layer(latents, image)
        return self.norm(latents)
