"""The configuration of the network. Networks of all sizes differ only in their `ModelConfig`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from deer_vla_ros.errors import UserError
from deer_vla_ros.model.from_json import from_json

CAMERAS = 2
"""The static and the gripper camera."""


@dataclass(frozen=True)
class VisionConfig:
    """The vision transformer of CLIP. `image_size` and `patch_size` are in pixels, `width` is in channels."""

    image_size: int
    patch_size: int
    width: int
    layers: int
    heads: int
    mlp_ratio: float = 4.0

    @property
    def tokens(self) -> int:
        """The number of patch tokens of one image, without the class token."""
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class ResamplerConfig:
    """The Perceiver resampler, which turns the patch tokens of one camera into `latents` visual tokens."""

    depth: int = 6
    latents: int = 64
    heads: int = 8
    head_width: int = 64
    mlp_ratio: int = 4


@dataclass(frozen=True)
class DecoderConfig:
    """The layers: each has a decoder block, every `cross_attention_every`-th also a gated cross-attention."""

    width: int
    heads: int
    layers: int
    vocabulary: int
    cross_attention_every: int
    qk_norm: bool
    final_norm: bool
    mlp_ratio: int = 4
    alibi_bias_max: int = 8
    cross_attention_heads: int = 8
    cross_attention_head_width: int = 64
    cross_attention_mlp_ratio: int = 4
    gate_init: float = 0.0

    def has_cross_attention(self, layer: int) -> bool:
        """Whether `layer` (from 0) has a gated cross-attention."""
        return (layer + 1) % self.cross_attention_every == 0


@dataclass(frozen=True)
class HeadConfig:
    """The action head: `lstm_layers` LSTMs of `hidden` (0: no memory), then two MLPs of `mlp_widths`."""

    hidden: int
    mlp_widths: tuple[int, ...]
    lstm_layers: int = 4
    lstm_dropout: float = 0.3
    mlp_dropout: float = 0.4


@dataclass(frozen=True)
class GroundingConfig:
    """The search for a fixed set of `things` (grounding.py): `queries` per camera look at a feature map of
    `channels`. Each thing has an equal share of the queries."""

    channels: int = 32
    queries: int = 4
    things: int = 1


@dataclass(frozen=True)
class ProprioceptionConfig:
    """The measured TCP pose as an input. The position is relative to `centre` [m, action frame], in units of
    `reach` [m]. The rotation is relative to a gripper that points straight down, in units of `turn` [rad]."""

    centre: tuple[float, ...]
    reach: float
    turn: float


@dataclass(frozen=True)
class ModelConfig:
    """All sizes of a `MultiExitVLA`.

    Layers count from 0. The exits are at layers interval-1, 2*interval-1, ... and at the last layer. In the
    released networks, grounding and proprioception are None.
    """

    vision: VisionConfig
    resampler: ResamplerConfig
    decoder: DecoderConfig
    head: HeadConfig
    exit_interval: int = 2
    max_tokens: int = 32
    grounding: GroundingConfig | None = None
    proprioception: ProprioceptionConfig | None = None

    def __post_init__(self) -> None:
        for part in ("vision", "resampler", "decoder", "head", "grounding", "proprioception"):
            if getattr(self, part) is not None:
                _check_sizes(part, getattr(self, part))
        if not 1 <= self.max_tokens <= MOST["max_tokens"]:
            raise UserError(f"model config: max_tokens is {self.max_tokens}: give 1 to {MOST['max_tokens']}")
        if self.decoder.layers < 2:
            raise UserError(
                f"model config: decoder.layers is {self.decoder.layers}, "
                "but an exit is compared with the layer before it: give 2 or more"
            )
        if self.vision.patch_size > self.vision.image_size:
            raise UserError(
                f"model config: vision.patch_size {self.vision.patch_size} is larger than "
                f"vision.image_size {self.vision.image_size}: change one of them"
            )
        if self.grounding is not None:
            if self.grounding.queries % self.grounding.things:
                raise UserError(
                    f"model config: grounding.queries {self.grounding.queries} is not a multiple of "
                    f"grounding.things {self.grounding.things}: change one of them"
                )
            if self.vision.image_size % 4:
                raise UserError(
                    f"model config: vision.image_size {self.vision.image_size} is not a multiple of 4, "
                    "which grounding needs: change it"
                )
        pose = self.proprioception
        if pose is not None and (len(pose.centre) != 3 or not pose.reach > 0 or not pose.turn > 0):
            raise UserError(
                f"model config: proprioception is {pose}: "
                "give a centre of 3 numbers, a reach and a turn above 0"
            )
        if not 2 <= self.exit_interval <= MOST_OTHERS:
            raise UserError(
                f"model config: exit_interval is {self.exit_interval}, "
                f"but the first exit is compared with the layer before it: set it to 2 to {MOST_OTHERS}"
            )
        for name, width, heads in (
            ("vision", self.vision.width, self.vision.heads),
            ("decoder", self.decoder.width, self.decoder.heads),
        ):
            if width % heads:
                raise UserError(
                    f"model config: {name}.width {width} is not a multiple of {name}.heads {heads}: "
                    "change one of them"
                )

    @property
    def exits(self) -> tuple[int, ...]:
        """The layers at which an action can be read, ascending. The last layer is always an exit."""
        last = self.decoder.layers - 1
        return (*range(self.exit_interval - 1, last, self.exit_interval), last)

    @property
    def visual_tokens(self) -> int:
        """The number of tokens that the cross-attention of a layer reads."""
        found = self.grounding.things if self.grounding else 0
        return CAMERAS * self.resampler.latents + found + (1 if self.proprioception else 0)

    def to_dict(self) -> dict[str, Any]:
        """The JSON values that `config.json` of a checkpoint folder stores."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """Inverse of `to_dict`. Raises a UserError that names an unknown or missing key or a wrong type."""
        return from_json(cls, values, "config.json: model")


MOST = {
    "image_size": 2048,
    "patch_size": 2048,
    "depth": 64,
    "layers": 128,
    "lstm_layers": 8,
    "heads": 1024,
    "cross_attention_heads": 1024,
    "head_width": 1024,
    "cross_attention_head_width": 1024,
    "mlp_ratio": 64,
    "cross_attention_mlp_ratio": 64,
    "alibi_bias_max": 1024,
    "vocabulary": 2**20,
    "max_tokens": 2**16,
    "lstm_dropout": 1,
    "mlp_dropout": 1,
}
"""The largest value of each size and count; that of all others is MOST_OTHERS. A network is laid out before
its weights are read, which takes seconds for the largest."""
MOST_OTHERS = 2**15
MOST_WIDTHS = 8
"""The most layers of the head's MLPs."""


def _check_sizes(part: str, config: Any) -> None:
    """Raises UserError for a number that is too small, too large or not finite."""
    for name, value in vars(config).items():
        if isinstance(value, tuple) and len(value) > MOST_WIDTHS:
            raise UserError(f"model config: {part}.{name} has {len(value)} items: give {MOST_WIDTHS} or less")
        for size in value if isinstance(value, tuple) else (value,):
            if type(size) is not bool and not _least(name, size) <= size <= _most(name):  # NaN is neither
                raise UserError(
                    f"model config: {part}.{name} is {size}: give {_least(name, size)} to {_most(name)}"
                )


def _least(name: str, size: int | float) -> int:
    if name in ("centre", "gate_init"):
        return -MOST_OTHERS
    return 1 if type(size) is int and name != "lstm_layers" else 0


def _most(name: str) -> int:
    return MOST.get(name, MOST_OTHERS)


def openflamingo_3b(layers: int = 12) -> ModelConfig:
    """OpenFlamingo-3B (MPT-1B), with cross-attention on every layer. DeeR uses 12 of its 24 layers."""
    return ModelConfig(
        vision=VisionConfig(image_size=224, patch_size=14, width=1024, layers=24, heads=16),
        resampler=ResamplerConfig(),
        decoder=DecoderConfig(
            width=2048,
            heads=16,
            layers=layers,
            vocabulary=50280,
            cross_attention_every=1,
            qk_norm=True,
            final_norm=False,
        ),
        head=HeadConfig(hidden=1024, mlp_widths=(1024, 512)),
    )


def openflamingo_9b(layers: int = 16) -> ModelConfig:
    """OpenFlamingo-9B (MPT-7B), with cross-attention on every fourth layer. DeeR uses 16 of its 32 layers."""
    return ModelConfig(
        vision=VisionConfig(image_size=224, patch_size=14, width=1024, layers=24, heads=16),
        resampler=ResamplerConfig(),
        decoder=DecoderConfig(
            width=4096,
            heads=32,
            layers=layers,
            vocabulary=50280,
            cross_attention_every=4,
            qk_norm=False,
            final_norm=True,
        ),
        head=HeadConfig(hidden=1024, mlp_widths=(1024, 512)),
    )


def tabletop(layers: int = 12) -> ModelConfig:
    """The embedded network for the simulated table, small enough for a laptop without a GPU.

    The gates start open: a network that is trained from random weights with closed gates would not see.
    """
    return ModelConfig(
        vision=VisionConfig(image_size=64, patch_size=8, width=64, layers=2, heads=4, mlp_ratio=2.0),
        resampler=ResamplerConfig(depth=1, latents=8, heads=4, head_width=16, mlp_ratio=2),
        decoder=DecoderConfig(
            width=32,
            heads=4,
            layers=layers,
            vocabulary=512,
            cross_attention_every=1,
            qk_norm=True,
            final_norm=False,
            mlp_ratio=2,
            cross_attention_heads=4,
            cross_attention_head_width=16,
            cross_attention_mlp_ratio=2,
            gate_init=0.5,
        ),
        head=HeadConfig(hidden=32, mlp_widths=(32,), lstm_layers=1, lstm_dropout=0.0, mlp_dropout=0.0),
        grounding=GroundingConfig(queries=14, things=7),
        proprioception=ProprioceptionConfig(centre=(0.45, 0.0, 0.15), reach=0.2, turn=0.25),
    )


PRESETS = {"openflamingo_3b": openflamingo_3b, "openflamingo_9b": openflamingo_9b, "tabletop": tabletop}
