"""The vision tower: the vision transformer of CLIP (Radford et al., 2021) without its final layer norm.

It is written here because the library `transformers` takes four seconds to import, during which a node that
was killed does not control its arm. The tensors have the names of transformers' CLIPVisionModel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deer_vla_ros.model.config import VisionConfig

INITIAL_STD = 0.02
"""Standard deviation of the initial patch and position embeddings."""


class VisionTower(nn.Module):
    """A ViT with QuickGELU. It outputs the patch tokens, without the class token and the final norm."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.clip = _Transformer(config)

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, size, size) normalised images -> (N, tokens, width) patch tokens."""
        return self.clip(images)[:, 1:]


class _Transformer(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.embeddings = _Embeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.width)  # The missing letter is part of CLIP's name.
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(_Layer(config) for _ in range(config.layers))})

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.pre_layrnorm(self.embeddings(images))
        for layer in self.encoder["layers"]:
            hidden = layer(hidden)
        return hidden


class _Embeddings(nn.Module):
    """One token for the class and one for each patch, each with its position's embedding."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.empty(config.width))
        self.patch_embedding = nn.Conv2d(3, config.width, config.patch_size, config.patch_size, bias=False)
        self.position_embedding = nn.Embedding(config.tokens + 1, config.width)
        nn.init.normal_(self.class_embedding, std=config.width**-0.5)
        nn.init.normal_(self.patch_embedding.weight, std=INITIAL_STD)
        nn.init.normal_(self.position_embedding.weight, std=INITIAL_STD)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embedding(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_embedding.expand(len(images), 1, -1), patches], 1)
        return tokens + self.position_embedding.weight


class _Layer(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.width)
        self.self_attn = _Attention(config)
        self.layer_norm2 = nn.LayerNorm(config.width)
        self.mlp = _FeedForward(config)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.self_attn(self.layer_norm1(hidden))
        return hidden + self.mlp(self.layer_norm2(hidden))


class _Attention(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.heads = config.heads
        self.k_proj, self.v_proj, self.q_proj = (
            _linear(config.width, config.width, std=(2 * config.width * config.layers) ** -0.5)
            for _ in range(3)
        )
        self.out_proj = _linear(config.width, config.width, std=config.width**-0.5)

    def forward(self, hidden: Tensor) -> Tensor:
        query, key, value = (
            projection(hidden).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        found = F.scaled_dot_product_attention(query, key, value)
        return self.out_proj(found.transpose(1, 2).flatten(2))


class _FeedForward(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        inner = int(config.width * config.mlp_ratio)
        self.fc1 = _linear(config.width, inner, std=(2 * config.width) ** -0.5)
        self.fc2 = _linear(inner, config.width, std=(2 * config.width * config.layers) ** -0.5)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.fc1(hidden)
        return self.fc2(hidden * torch.sigmoid(1.702 * hidden))  # QuickGELU


def _linear(width: int, out: int, std: float) -> nn.Linear:
    """A linear map with CLIP's initial values: weights with this standard deviation, no bias."""
    linear = nn.Linear(width, out)
    nn.init.normal_(linear.weight, std=std)
    nn.init.zeros_(linear.bias)
    return linear
