"""What does the policy see? CLIP's vision transformer, read before its final norm."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from deer_vla_ros.model.config import VisionConfig
from deer_vla_ros.model.reference import ReferenceWeights


class VisionTower(nn.Module):
    """ViT with QuickGELU. The patch tokens leave it without the class token and before the final layer norm."""

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
        self.clip.post_layernorm = (
            nn.Identity()
        )  # only the pooled class token would pass it, and nobody reads that

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, size, size) normalised images -> (N, tokens, width) patch tokens."""
        return self.clip(pixel_values=images).last_hidden_state[:, 1:]

    @staticmethod
    def from_reference(weights: ReferenceWeights, layers: int) -> dict[str, Tensor]:
        """State dict from open_clip names (`visual.*`); open_clip keeps q, k and v in one matrix."""
        state = weights.renamed(
            {
                "clip.embeddings.class_embedding": "class_embedding",
                "clip.embeddings.patch_embedding.weight": "conv1.weight",
                "clip.embeddings.position_embedding.weight": "positional_embedding",
                "clip.pre_layrnorm.weight": "ln_pre.weight",
                "clip.pre_layrnorm.bias": "ln_pre.bias",
            }
        )
        names = {
            "layer_norm1": "ln_1",
            "layer_norm2": "ln_2",
            "self_attn.out_proj": "attn.out_proj",
            "mlp.fc1": "mlp.c_fc",
            "mlp.fc2": "mlp.c_proj",
        }
        for layer in range(layers):
            block = weights.below(f"transformer.resblocks.{layer}.")
            own = f"clip.encoder.layers.{layer}."
            for kind in ("weight", "bias"):
                state.update(
                    block.renamed(
                        {f"{own}{ours}.{kind}": f"{theirs}.{kind}" for ours, theirs in names.items()}
                    )
                )
                for part, tensor in zip("qkv", block[f"attn.in_proj_{kind}"].chunk(3)):
                    state[f"{own}self_attn.{part}_proj.{kind}"] = tensor
        return state
