"""The vision tower: the vision transformer of CLIP without its final layer norm."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from deer_vla_ros.model.config import VisionConfig


class VisionTower(nn.Module):
    """A ViT with QuickGELU. It outputs the patch tokens, without the class token and the final norm."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.clip = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=config.width,
                intermediate_size=int(config.width * config.mlp_ratio),
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                image_size=config.image_size,
                patch_size=config.patch_size,
                hidden_act="quick_gelu",
                attn_implementation="sdpa",
            )
        )
        self.clip.post_layernorm = nn.Identity()  # it applies only to the class token, which is not used

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, size, size) normalised images -> (N, tokens, width) patch tokens."""
        return self.clip(pixel_values=images).last_hidden_state[:, 1:]
