"""Two optional inputs of small networks: where the things on the table are, and where the arm is.

A small network that is trained from random weights does not learn by itself where a block is in an image.
Therefore learnt queries, one set per thing, search the feature map of each camera (a spatial soft-argmax,
Finn et al. 2016, arXiv 1509.06113). The layers receive the result as additional visual tokens. The things are
the same for every instruction; the layers must find out which thing an instruction means. The released
networks do not use these inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deer_vla_ros.model.config import GroundingConfig, ProprioceptionConfig

STRIDE = 4
"""The width and height of a cell of the feature map, in pixels."""

POINT_UNIT = 0.1  # m
NEARBY = 4.0
"""The factor by which the token of a thing magnifies small values: a grasp depends on centimetres."""

POSE_VALUES = 6
RELATE_WIDTH = 128
NEAR_VALUES = 14
"""The number of values in a token besides the hidden ones: the position (coarse and fine), the turn, and the
rotation of the TCP (coarse and fine)."""
WHICH_SCALE = 0.5
"""The initial standard deviation of the part of a token that identifies its thing; the other values have a
standard deviation of 1. With this scale the text can address a thing from the first training step."""


@dataclass(frozen=True)
class Found:
    """The result of a search.

    logits: (B, cameras, queries, cells), how much each query attends to each cell, before the softmax. The
        cells are row by row.
    point: (B, things, 3), the position of each thing relative to the TCP, in units of POINT_UNIT [m], along
        the axes of the action frame.
    turn: (B, things, 2), the cosine and sine of four times the yaw of each thing relative to the fingers; the
        factor is four because a cube looks the same after a quarter turn.
    tokens: (B, things, visual width), encode `point`, `turn` and the rotation of the TCP.
    """

    logits: Tensor
    point: Tensor
    turn: Tensor
    tokens: Tensor


class Grounding(nn.Module):
    """Locates each thing with its own queries only. Relations between things (for example which one is
    nearest) are left to the layers."""

    def __init__(self, config: GroundingConfig, image_size: int, visual_width: int, cameras: int):
        super().__init__()
        self.things, each = config.things, config.queries // config.things
        side = image_size // STRIDE
        self.stems = nn.ModuleList(_stem(config.channels) for _ in range(cameras))
        self.positions = nn.Parameter(torch.zeros(cameras, config.channels, side * side))
        self.queries = nn.Parameter(nn.init.normal_(torch.empty(config.queries, config.channels)))
        self.seen = nn.Linear(cameras * each * (config.channels + 2) + POSE_VALUES, RELATE_WIDTH)
        self.which_seen = nn.Parameter(torch.zeros(config.things, RELATE_WIDTH))
        self.relate = nn.Sequential(nn.GELU(), nn.Linear(RELATE_WIDTH, RELATE_WIDTH), nn.GELU())
        self.point = nn.Linear(RELATE_WIDTH, 3)
        self.turn = nn.Linear(RELATE_WIDTH, 2)
        self.point_token = nn.Linear(RELATE_WIDTH + NEAR_VALUES, visual_width)
        self.norm_point = nn.LayerNorm(visual_width)
        self.which = nn.Parameter(nn.init.normal_(torch.empty(config.things, visual_width), std=WHICH_SCALE))
        self.register_buffer("cells", cell_centres(self.positions), persistent=False)

    def forward(self, images: Tensor, pose: Tensor) -> Found:
        """images: (B, cameras, 3, size, size), normalised. pose: (B, POSE_VALUES), the TCP's pose as
        Proprioception.values returns it, or zeros if it is not known."""
        maps = (
            torch.stack([stem(images[:, camera]).flatten(2) for camera, stem in enumerate(self.stems)], 1)
            + self.positions
        )
        logits = torch.einsum("qc,bvcn->bvqn", self.queries, maps) * self.queries.shape[1] ** -0.5
        weights = logits.softmax(-1)
        attended = torch.einsum("bvqn,bvcn->bvqc", weights, maps)
        seen = torch.cat([attended, weights @ self.cells], -1)
        own = seen.unflatten(2, (self.things, -1)).transpose(1, 2).flatten(2)  # (B, things, values)
        pose = pose[:, None].expand(-1, self.things, -1)
        related = self.relate(self.seen(torch.cat([own, pose], -1)) + self.which_seen)
        point, turn, rotation = self.point(related), self.turn(related), pose[..., 3:]
        near = torch.cat(
            [related, point, torch.tanh(point * NEARBY), turn, rotation, torch.tanh(rotation * NEARBY)], -1
        )
        return Found(logits, point, turn, self.norm_point(self.point_token(near)) + self.which)


def cell_centres(positions: Tensor) -> Tensor:
    """(cells, 2) x and y of each cell of a square feature map, row by row, -1..1.

    positions: (..., cells) defines the number of cells, the device and the dtype.
    """
    side = round(positions.shape[-1] ** 0.5)
    # On the CPU, because arithmetic on the meta device would import a part of torch that takes two seconds.
    grid = (torch.arange(side, device="cpu") + 0.5) / side * 2 - 1
    rows, columns = torch.meshgrid(grid, grid, indexing="ij")
    return torch.stack([columns, rows], -1).flatten(0, 1).to(positions)


class Proprioception(nn.Module):
    """Makes one visual token from the measured pose of the TCP."""

    def __init__(self, config: ProprioceptionConfig, visual_width: int):
        super().__init__()
        self.config = config
        self.up = nn.Linear(POSE_VALUES, 2 * visual_width)
        self.out = nn.Linear(2 * visual_width, visual_width)

    def forward(self, values: Tensor) -> Tensor:
        """(B, POSE_VALUES) -> (B, 1, visual width)."""
        return self.out(F.gelu(self.up(values)))[:, None]

    def values(self, tcp: Tensor) -> Tensor:
        """(B, 7) position [m] and quaternion xyzw in the action frame -> (B, POSE_VALUES): the position
        relative to `centre` and the rotation relative to straight down, in units of `reach` and `turn`."""
        position = (tcp[:, :3] - tcp.new_tensor(self.config.centre)) / self.config.reach
        return torch.cat([position, turn_from_down(tcp[:, 3:]) / self.config.turn], -1)


def turn_from_down(quaternion: Tensor) -> Tensor:
    """(B, 4) unit quaternions xyzw of a TCP -> (B, 3) rotation vectors [rad] along the axes of the reference
    frame. Each turns a TCP whose z points straight down (half a turn about x) to the given rotation. The
    result is the same for q and -q."""
    x, y, z, w = quaternion.unbind(-1)
    axis, cosine = torch.stack([-w, -z, y], -1), x  # quaternion * (1, 0, 0, 0) inverted
    axis = torch.where(cosine[:, None] < 0, -axis, axis)
    sine = torch.linalg.vector_norm(axis, dim=-1, keepdim=True).clamp(min=1e-9)
    return axis / sine * (2 * torch.atan2(sine, cosine.abs()[:, None]))


def _stem(channels: int) -> nn.Sequential:
    """Three convolutions, which reduce the resolution to a quarter."""
    return nn.Sequential(
        nn.Conv2d(3, channels // 2, 5, stride=2, padding=2),
        nn.GELU(),
        nn.Conv2d(channels // 2, channels, 3, stride=2, padding=1),
        nn.GELU(),
        nn.Conv2d(channels, channels, 3, padding=1),
    )
