"""The action head: a recurrent network that makes an action from the feature of any exit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deer_vla_ros.model.config import HeadConfig


class HeadState(NamedTuple):
    """The LSTM state before the layer norms: hidden and cell, each (lstm layers, B, hidden)."""

    hidden: Tensor
    cell: Tensor

    def row(self, index: int) -> HeadState:
        """The state of one episode of the batch, as a batch of one."""
        return HeadState(self.hidden[:, index : index + 1], self.cell[:, index : index + 1])


class PreparedState(NamedTuple):
    """The part of one step of the LSTMs that does not depend on the feature, for each episode of a batch.

    gates: for each LSTM layer W_hh h + b_ih + b_hh, (lstm layers, B, 4 hidden). cell: (lstm layers, B,
    hidden).
    """

    gates: Tensor
    cell: Tensor

    @staticmethod
    def joined(states: Sequence[PreparedState]) -> PreparedState:
        """The states of several probes as one batch. If all are the same one, it is returned as it is, since
        `ActionHead.probe` uses one state for any number of features."""
        if all(state is states[0] for state in states):
            return states[0]
        return PreparedState(*(torch.cat(parts, 1) for parts in zip(*states)))


class HeadOutput(NamedTuple):
    """The output of the head for T steps.

    pose: (B, T, 6) in -1..1. gripper_logit: (B, T, 1). state: after the last step. feature: (B, T, width),
        the input.
    """

    pose: Tensor
    gripper_logit: Tensor
    state: HeadState
    feature: Tensor

    def rows(self, first: int) -> HeadOutput:
        """The outputs of the batch from number `first` on."""
        if first == 0:
            return self
        state = HeadState(self.state.hidden[:, first:], self.state.cell[:, first:])
        return HeadOutput(self.pose[first:], self.gripper_logit[first:], state, self.feature[first:])


def pool(hidden: Tensor) -> Tensor:
    """(..., S, width) -> (..., width): the maximum over all tokens, with padding, as in the reference."""
    return hidden.amax(dim=-2)


class MLP(nn.Module):
    """(Linear, LayerNorm, ReLU, dropout) for each of `mlp_widths`, then a Linear to `out` values."""

    def __init__(self, width: int, config: HeadConfig, out: int):
        super().__init__()
        widths = (width, *config.mlp_widths)
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, widths[1:]))
        self.norms = nn.ModuleList(nn.LayerNorm(b) for b in widths[1:])
        self.dropout = config.mlp_dropout
        self.out = nn.Linear(widths[-1], out)

    def forward(self, x: Tensor) -> Tensor:
        for linear, norm in zip(self.hidden, self.norms):
            x = F.dropout(F.relu(norm(linear(x))), self.dropout, self.training)
        return self.out(x)


class ActionHead(nn.Module):
    """LSTM layers, each followed by a layer norm, then an MLP for the pose and one for the gripper.

    Without LSTM layers it has no memory.
    """

    def __init__(self, width: int, config: HeadConfig):
        super().__init__()
        widths = (width, *(config.hidden for _ in range(config.lstm_layers)))
        self.lstms = nn.ModuleList(nn.LSTM(a, b, batch_first=True) for a, b in zip(widths, widths[1:]))
        self.norms = nn.ModuleList(nn.LayerNorm(config.hidden) for _ in range(config.lstm_layers))
        self.dropout = config.lstm_dropout
        self.pose = MLP(widths[-1], config, out=6)
        self.gripper = MLP(widths[-1], config, out=1)
        self.hidden = config.hidden

    def forward(self, feature: Tensor, state: HeadState) -> HeadOutput:
        """feature: (B, T, width), the pooled features of T successive steps. state: before the first step."""
        x, hiddens, cells = feature, [], []
        for i, (lstm, norm) in enumerate(zip(self.lstms, self.norms)):
            x, (hidden, cell) = lstm(x, (state.hidden[i : i + 1], state.cell[i : i + 1]))
            hiddens.append(hidden)
            cells.append(cell)
            x = norm(x)
            if i + 1 < len(self.lstms):
                x = F.dropout(x, self.dropout, self.training)
        after = HeadState(torch.cat(hiddens), torch.cat(cells)) if hiddens else state
        return HeadOutput(self.pose(x).tanh(), self.gripper(x), after, feature)

    def prepare(self, state: HeadState) -> PreparedState:
        """Computes what every probe of a step shares. It can be done before the step's feature is known."""
        gates = [
            F.linear(hidden, lstm.weight_hh_l0, lstm.bias_ih_l0 + lstm.bias_hh_l0)
            for lstm, hidden in zip(self.lstms, state.hidden)
        ]
        return PreparedState(torch.stack(gates) if gates else state.hidden, state.cell)

    def probe(self, feature: Tensor, prepared: PreparedState) -> HeadOutput:
        """The same as `forward` for one step, with plain linear maps in place of nn.LSTM.

        feature: (B, width). prepared: of B episodes, or of one episode whose step all B features belong to.
        nn.LSTM packs its weights again in every call, which takes most of a probe's time. There is no
        dropout.
        """
        x, hiddens, cells = feature, [], []
        for lstm, norm, gates, cell in zip(self.lstms, self.norms, prepared.gates, prepared.cell):
            entry, forget, new, out = (gates + F.linear(x, lstm.weight_ih_l0)).chunk(4, -1)
            cell = forget.sigmoid() * cell + entry.sigmoid() * new.tanh()
            hidden = out.sigmoid() * cell.tanh()
            hiddens.append(hidden)
            cells.append(cell)
            x = norm(hidden)
        if hiddens:
            after = HeadState(torch.stack(hiddens), torch.stack(cells))
        else:  # a head without memory has states of no layers
            after = HeadState(*(prepared.cell.expand(-1, len(x), -1) for _ in range(2)))
        return HeadOutput(self.pose(x).tanh()[:, None], self.gripper(x)[:, None], after, feature[:, None])

    def initial_state(self, batch: int = 1) -> HeadState:
        """The state at the start of an episode: zeros."""
        zeros = self.pose.out.weight.new_zeros(len(self.lstms), batch, self.hidden)
        return HeadState(zeros, zeros)
