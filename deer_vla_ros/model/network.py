"""The whole network: the inputs are two images and an instruction, and every exit gives an action."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from deer_vla_ros.errors import UserError
from deer_vla_ros.model.config import CAMERAS, ModelConfig
from deer_vla_ros.model.decoder import Layer, TextContext, attention_bias
from deer_vla_ros.model.grounding import POSE_VALUES, Found, Grounding, Proprioception, cell_centres
from deer_vla_ros.model.head import ActionHead
from deer_vla_ros.model.resampler import PerceiverResampler
from deer_vla_ros.model.vision import VisionTower


@dataclass(frozen=True)
class Sight:
    """What the network sees, independent of the instruction.

    visual: (B, config.visual_tokens, vision width), the input of the layers. found: the result of the
        grounding, if the network has one.
    """

    visual: Tensor
    found: Found | None


HEADS_OF_TRAINING = ("last_head.", "auxiliary_heads.")
"""The beginnings of the names of tensors that only training uses."""


class MultiExitVLA(nn.Module):
    """The network of DeeR-VLA (Yue et al., NeurIPS 2024, arXiv 2411.02359), at any size.

    The shared head gives an action at any exit. In addition, each exit has its own head, which is only used
    to train the layers: the auxiliary heads and, at the last layer, `last_head`.
    """

    def __init__(self, config: ModelConfig, for_training: bool = True, bits: int | None = None):
        """for_training: False leaves out the heads that only training uses. bits: as in Layer."""
        super().__init__()
        self.config, self.bits = config, bits
        decoder, visual_width = config.decoder, config.vision.width
        self.vision = VisionTower(config.vision)
        self.resampler = PerceiverResampler(visual_width, config.resampler)
        self.proprioception = (
            Proprioception(config.proprioception, visual_width) if config.proprioception else None
        )
        self.grounding = (
            Grounding(config.grounding, config.vision.image_size, visual_width, CAMERAS)
            if config.grounding
            else None
        )
        self.token_embedding = nn.Embedding(decoder.vocabulary, decoder.width)
        self.layers = nn.ModuleList(Layer(decoder, i, visual_width, bits) for i in range(decoder.layers))
        self.final_norm = nn.LayerNorm(decoder.width, bias=False) if decoder.final_norm else None
        self.shared_head = ActionHead(decoder.width, config.head)
        if for_training:
            self.last_head = ActionHead(decoder.width, config.head)
            self.auxiliary_heads = nn.ModuleDict(
                {str(exit_layer): ActionHead(decoder.width, config.head) for exit_layer in config.exits[:-1]}
            )

    @property
    def device(self) -> torch.device:
        return self.token_embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.token_embedding.weight.dtype

    @property
    def layer_bytes(self) -> tuple[int, ...]:
        """The bytes of all tensors of each layer, also of one that is not on the device now."""
        return layer_bytes(self.config, self.dtype, self.bits)

    def encode_images(self, images: Tensor) -> Tensor:
        """(B, cameras, 3, size, size) normalised images -> (B, cameras * latents, vision width) tokens.

        The tower processes all cameras as one batch. Their visual tokens then count as one image.
        """
        batch, cameras = images.shape[:2]
        visual = self.resampler(self.vision(images.flatten(0, 1)))
        return visual.unflatten(0, (batch, cameras)).flatten(1, 2)

    def see(self, images: Tensor, tcp: Tensor | None = None) -> Sight:
        """Makes the input of the layers. images: as in `encode_images`. tcp: (B, 7), as in Observation.

        Raises UserError if the network needs a measured pose and `tcp` is None.
        """
        return self.see_from(images, self.pose_values(tcp, len(images)))

    def pose_values(self, tcp: Tensor | None, batch: int) -> Tensor:
        """(B, POSE_VALUES) from `tcp` as in `see`, on the device of `tcp`; zeros for a network that does not
        use the pose. Raises UserError as `see` does."""
        if self.proprioception is None:
            return torch.zeros(batch, POSE_VALUES, dtype=self.dtype, device=self.device)
        if tcp is None:
            raise UserError(
                "this network takes the measured TCP pose as an input, and the observation has none: "
                "give Observation.tcp"
            )
        return self.proprioception.values(tcp.float()).to(self.dtype)

    def see_from(self, images: Tensor, pose: Tensor) -> Sight:
        """As `see`, from the values (B, POSE_VALUES) of the measured pose."""
        visual = self.encode_images(images)
        if self.proprioception is not None:
            visual = torch.cat([visual, self.proprioception(pose)], 1)
        if self.grounding is None:
            return Sight(visual, None)
        found = self.grounding(images, pose)
        return Sight(torch.cat([visual, found.tokens], 1), found)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor, image_token: int) -> TextContext:
        """(B, S) token ids and mask (1 = real token) -> the input of the layers."""
        return TextContext(
            embedding=self.token_embedding(input_ids),
            attention_bias=attention_bias(attention_mask, self.config.decoder).to(self.dtype),
            sees_image=((input_ids == image_token).cumsum(1) > 0)[..., None].to(self.dtype),
        )

    def hidden_states(self, visual: Tensor, text: TextContext) -> Iterator[Tensor]:
        """The output (B, S, width) of each layer in turn. A layer runs when the iterator reaches it."""
        hidden = text.embedding
        for layer in self.layers:
            hidden = layer(hidden, visual, text)
            yield hidden


def build(config: ModelConfig, state: Mapping[str, Tensor], bits: int | None = None) -> MultiExitVLA:
    """A network that uses the tensors of `state` without a copy and is ready for inference.

    bits: as in Layer. Raises RuntimeError if a name or shape does not fit. `check_shapes` tells the user so
    in a clear message.
    """
    model = _without_values(config, has_heads_of_training(state), bits)
    model.load_state_dict(state, strict=True, assign=True)
    restore_buffers(model)
    return model.eval().requires_grad_(False)


def has_heads_of_training(names: Iterable[str]) -> bool:
    """Whether the names of a network's tensors include those of the heads that only training uses."""
    return any(name.startswith(HEADS_OF_TRAINING) for name in names)


@functools.cache
def state_shapes(config: ModelConfig, for_training: bool = True) -> Mapping[str, tuple[int, ...]]:
    """The shape of each tensor of a network of this config, by name."""
    tensors = _without_values(config, for_training).state_dict()
    return MappingProxyType({name: tuple(tensor.shape) for name, tensor in tensors.items()})


@functools.cache
def layer_bytes(config: ModelConfig, dtype: torch.dtype, bits: int | None = None) -> tuple[int, ...]:
    """The bytes of all tensors of each layer. Raises UserError if the layers cannot have these `bits`."""
    found: dict[bool, int] = {}  # layers differ only in whether they have a cross-attention
    kinds = [config.decoder.has_cross_attention(index) for index in range(config.decoder.layers)]
    for kind in set(kinds):
        with torch.device("meta"), _NoRandomValues():
            layer = Layer(config.decoder, kinds.index(kind), config.vision.width, bits)
        found[kind] = sum(parameter.numel() * dtype.itemsize for parameter in layer.parameters())
        found[kind] += sum(buffer.nbytes for buffer in layer.buffers())
    return tuple(found[kind] for kind in kinds)


def _without_values(config: ModelConfig, for_training: bool, bits: int | None = None) -> MultiExitVLA:
    """A network on the meta device, without memory."""
    with torch.device("meta"), _NoRandomValues():
        return MultiExitVLA(config, for_training, bits)


class _NoRandomValues(TorchFunctionMode):
    """Leaves out the random initial values of parameters. For them, tensors on the meta device would import a
    part of torch that takes two seconds."""

    RANDOM = (Tensor.uniform_, Tensor.normal_, nn.init.uniform_, nn.init.normal_, nn.init.kaiming_uniform_)

    def __torch_function__(self, function, types, arguments=(), named=None):
        if function in self.RANDOM:
            return arguments[0] if arguments else named["tensor"]
        return function(*arguments, **(named or {}))


def check_shapes(config: ModelConfig, found: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raises UserError unless `found` has exactly the names and shapes of a network of this config, with all
    heads of training or with none of them.

    Messages begin with `where`.
    """
    expected = state_shapes(config, has_heads_of_training(found))
    for kind, names in (
        ("missing", expected.keys() - found.keys()),
        ("unknown", found.keys() - expected.keys()),
    ):
        if names:
            first = ", ".join(sorted(names)[:3])
            raise UserError(
                f"{where}: {len(names)} tensors are {kind}, first {first}: "
                "weights and config are not of the same model"
            )
    for name, shape in expected.items():
        if found[name] != shape:
            raise UserError(
                f"{where}: tensor {name} has shape {found[name]}, the config asks for {shape}: "
                "they are not of the same model"
            )


def restore_buffers(model: MultiExitVLA) -> None:
    """Fills the buffers that a state dict does not contain: the positions in the feature maps.

    They have no values in a network that was made on the meta device.
    """
    if model.grounding is not None:
        model.grounding.cells = cell_centres(model.grounding.positions)
