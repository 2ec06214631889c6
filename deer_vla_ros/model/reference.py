"""Where does a tensor of the reference implementation go? Lookup of foreign names, by the class that owns the weight."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from deer_vla_ros.errors import UserError


class ReferenceWeights:
    """A state dict of the reference, read below a prefix; a missing tensor is named in full."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str = ""):
        self._tensors = tensors
        self._prefix = prefix

    def below(self, prefix: str) -> ReferenceWeights:
        """The same weights with `prefix` prepended to every name asked for."""
        return ReferenceWeights(self._tensors, self._prefix + prefix)

    def __contains__(self, name: str) -> bool:
        return self._prefix + name in self._tensors

    def __getitem__(self, name: str) -> Tensor:
        key = self._prefix + name
        if key not in self._tensors:
            raise UserError(
                f"reference weights: tensor '{key}' is missing: is this file complete, and of this model?"
            )
        return self._tensors[key]

    def renamed(self, names: Mapping[str, str]) -> dict[str, Tensor]:
        """{own name: tensor} for a table {own name: reference name}."""
        return {own: self[reference] for own, reference in names.items()}


def placed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A part's state dict as its owner names it: every key gets `prefix.`."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}
