"""The weight names of the reference implementation, and the network that is built from such weights.

The tables map the names in the state dict of the reference to ours. In these patterns, `{kind}` is the last
part of a name (weight, bias, ...) and `{i}` is a number. `{3i+1}` and similar terms are computed from `{i}`:
the reference also counts modules without weights. `n` is the number of hidden layers of an MLP. `name#q`,
`name#k` and `name#v` are the first, second and third part of the rows of one tensor.

The network does not use `vision_encoder.visual.proj` and `vision_encoder.visual.ln_post.*`, which belong to
the pooled output of CLIP. `lang_encoder.old_decoder_blocks.*` and `lang_encoder.gated_cross_attn_layers.*`
are second names for the weights of `lang_encoder.transformer.blocks.*`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from types import MappingProxyType

from torch import Tensor

from deer_vla_ros.errors import UserError
from deer_vla_ros.model.config import ModelConfig
from deer_vla_ros.model.network import MultiExitVLA, build, check_shapes, state_shapes

# The vision tower: names of open_clip to names of transformers.
_VISION = {
    "class_embedding": "embeddings.class_embedding",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_pre.{kind}": "pre_layrnorm.{kind}",
    "transformer.resblocks.{i}.ln_1.{kind}": "encoder.layers.{i}.layer_norm1.{kind}",
    "transformer.resblocks.{i}.attn.in_proj_{kind}#q": "encoder.layers.{i}.self_attn.q_proj.{kind}",
    "transformer.resblocks.{i}.attn.in_proj_{kind}#k": "encoder.layers.{i}.self_attn.k_proj.{kind}",
    "transformer.resblocks.{i}.attn.in_proj_{kind}#v": "encoder.layers.{i}.self_attn.v_proj.{kind}",
    "transformer.resblocks.{i}.attn.out_proj.{kind}": "encoder.layers.{i}.self_attn.out_proj.{kind}",
    "transformer.resblocks.{i}.ln_2.{kind}": "encoder.layers.{i}.layer_norm2.{kind}",
    "transformer.resblocks.{i}.mlp.c_fc.{kind}": "encoder.layers.{i}.mlp.fc1.{kind}",
    "transformer.resblocks.{i}.mlp.c_proj.{kind}": "encoder.layers.{i}.mlp.fc2.{kind}",
}

# The Perceiver resampler. In each of its layers, 0 is the attention and 1 the feed-forward part.
_RESAMPLER = {
    "latents": "latents",
    "layers.{i}.0.norm_media.{kind}": "layers.{i}.attention.norm_image.{kind}",
    "layers.{i}.0.norm_latents.{kind}": "layers.{i}.attention.norm_latents.{kind}",
    "layers.{i}.0.to_q.{kind}": "layers.{i}.attention.query.{kind}",
    "layers.{i}.0.to_kv.{kind}": "layers.{i}.attention.key_value.{kind}",
    "layers.{i}.0.to_out.{kind}": "layers.{i}.attention.out.{kind}",
    "layers.{i}.1.0.{kind}": "layers.{i}.feed_forward.norm.{kind}",
    "layers.{i}.1.1.{kind}": "layers.{i}.feed_forward.up.{kind}",
    "layers.{i}.1.3.{kind}": "layers.{i}.feed_forward.down.{kind}",
    "norm.{kind}": "norm.{kind}",
}

# The language model outside its layers.
_LANGUAGE = {"wte.{kind}": "token_embedding.{kind}", "norm_f.{kind}": "final_norm.{kind}"}

# The gated cross-attention of a layer.
_CROSS_ATTENTION = {
    "attn_gate": "attention_gate",
    "attn.norm.{kind}": "attention.norm.{kind}",
    "attn.to_q.{kind}": "attention.query.{kind}",
    "attn.to_kv.{kind}": "attention.key_value.{kind}",
    "attn.to_out.{kind}": "attention.out.{kind}",
    "ff_gate": "feed_forward_gate",
    "ff.0.{kind}": "feed_forward.norm.{kind}",
    "ff.1.{kind}": "feed_forward.up.{kind}",
    "ff.3.{kind}": "feed_forward.down.{kind}",
}

# The decoder block of a layer in OpenFlamingo-3B, whose language model is MosaicGPT.
_BLOCK_MOSAIC_GPT = {
    "ln_1.{kind}": "norm_attention.{kind}",
    "attn.Wqkv.{kind}": "query_key_value.{kind}",
    "attn.q_ln.{kind}": "norm_query.{kind}",
    "attn.k_ln.{kind}": "norm_key.{kind}",
    "attn.out_proj.{kind}": "out.{kind}",
    "ln_2.{kind}": "norm_mlp.{kind}",
    "mlp.mlp_up.{kind}": "up.{kind}",
    "mlp.mlp_down.{kind}": "down.{kind}",
}

# The decoder block of a layer in OpenFlamingo-9B, whose language model is MPT.
_BLOCK_MPT = {
    "norm_1.{kind}": "norm_attention.{kind}",
    "attn.Wqkv.{kind}": "query_key_value.{kind}",
    "attn.out_proj.{kind}": "out.{kind}",
    "norm_2.{kind}": "norm_mlp.{kind}",
    "ffn.up_proj.{kind}": "up.{kind}",
    "ffn.down_proj.{kind}": "down.{kind}",
}

# An action head: LSTM layers, then an MLP for the pose and one for the gripper.
_HEAD = {
    "rnn.layers.{3i}.{kind}": "lstms.{i}.{kind}",
    "rnn.layers.{3i+1}.{kind}": "norms.{i}.{kind}",
    "actions.mlp.{4i+1}.{kind}": "pose.hidden.{i}.{kind}",
    "actions.mlp.{4i+2}.{kind}": "pose.norms.{i}.{kind}",
    "actions.mlp.{4n+1}.{kind}": "pose.out.{kind}",
    "gripper.mlp.{4i+1}.{kind}": "gripper.hidden.{i}.{kind}",
    "gripper.mlp.{4i+2}.{kind}": "gripper.norms.{i}.{kind}",
    "gripper.mlp.{4n+1}.{kind}": "gripper.out.{kind}",
}

# Each part: its prefix in the reference, its prefix in our network, and the names below these prefixes. The
# name of an auxiliary head has its `{number}` in the reference, but the layer of its `{exit}` in our network.
_PARTS = (
    ("vision_encoder.visual.", "vision.clip.", _VISION),
    ("perceiver.", "resampler.", _RESAMPLER),
    ("lang_encoder.transformer.", "", _LANGUAGE),
    (
        "lang_encoder.transformer.blocks.{i}.gated_cross_attn_layer.",
        "layers.{i}.cross_attention.",
        _CROSS_ATTENTION,
    ),
    ("extra_exit.", "shared_head.", _HEAD),
    ("lm_head.", "last_head.", _HEAD),
    ("lm_exit_modules.{number}.", "auxiliary_heads.{exit}.", _HEAD),
)
_BLOCK_PREFIXES = ("lang_encoder.transformer.blocks.{i}.decoder_layer.", "layers.{i}.block.")
_ONLY_IN_MPT = ".decoder_layer.norm_1.weight"


def from_reference(tensors: Mapping[str, Tensor], config: ModelConfig) -> MultiExitVLA:
    """Builds the network from a full state dict of the reference, whose names have no `module.` prefix.

    Raises UserError if a tensor is missing or has a wrong shape.
    """
    is_mpt = any(name.endswith(_ONLY_IN_MPT) for name in tensors)
    state = {}
    for own, reference in reference_names(config, is_mpt).items():
        name, _, part = reference.partition("#")
        if name not in tensors:
            raise UserError(
                f"reference weights: tensor '{name}' is missing: is this file complete, and of this model?"
            )
        tensor = tensors[name]
        state[own] = tensor.chunk(3)["qkv".index(part)] if part else tensor
    check_shapes(config, {name: tuple(tensor.shape) for name, tensor in state.items()}, "reference weights")
    return build(config, state)


@functools.cache
def reference_names(config: ModelConfig, is_mpt: bool) -> Mapping[str, str]:
    """{our name: reference name} of every tensor of a network, except parts that the reference does not have.

    is_mpt: the language model is MPT, not MosaicGPT. A reference name may end with `#q`, `#k` or `#v`.
    """
    block = (*_BLOCK_PREFIXES, _BLOCK_MPT if is_mpt else _BLOCK_MOSAIC_GPT)
    patterns = [
        (_expression(our_prefix + ours), their_prefix + theirs)
        for their_prefix, our_prefix, names in (*_PARTS, block)
        for theirs, ours in names.items()
    ]
    found = {}
    for own in state_shapes(config):
        for expression, theirs in patterns:
            if match := expression.fullmatch(own):
                found[own] = theirs.format_map(_values(match, config))
    return MappingProxyType(found)


def _expression(pattern: str) -> re.Pattern:
    """Matches our names of a pattern; its groups are the placeholders."""
    return re.compile(
        re.escape(pattern)
        .replace(r"\{kind\}", r"(?P<kind>\w+)")
        .replace(r"\{i\}", r"(?P<i>\d+)")
        .replace(r"\{exit\}", r"(?P<exit>\d+)")
    )


def _values(match: re.Match, config: ModelConfig) -> dict[str, str | int]:
    """The value of each placeholder in the reference's name, for our name that matched."""
    values: dict[str, str | int] = {**match.groupdict(), "4n+1": 4 * len(config.head.mlp_widths) + 1}
    if "i" in values:
        i = int(values["i"])
        values |= {"3i": 3 * i, "3i+1": 3 * i + 1, "4i+1": 4 * i + 1, "4i+2": 4 * i + 2}
    if "exit" in values:
        values["number"] = config.exits.index(int(values["exit"]))
    return values
