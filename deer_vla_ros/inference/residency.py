"""Keeping only the first layers of a network in memory; the others can be loaded back from their file."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import threading
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deer_vla_ros.errors import UserError
from deer_vla_ros.inference.policy import DeerPolicy
from deer_vla_ros.inference.static_step import PreparedGroups
from deer_vla_ros.model.checkpoint import WEIGHTS
from deer_vla_ros.model.decoder import Layer
from deer_vla_ros.model.memory import own_memory
from deer_vla_ros.model.network import MultiExitVLA, state_shapes
from deer_vla_ros.model.quantisation import empty_tensors, is_quantised, quantise

PIECE_BYTES = 4 * 2**20
"""The size of the pieces in which weights are copied. A cancelled load ends after the current piece."""


class ResidentLayers:
    """Keeps the first layers of a network on its device. The other layers are on the meta device, without
    memory: to run one raises RuntimeError.

    `folder` is the checkpoint that the network was loaded from. Without it no layer could be loaded back, so
    all layers stay. This class is not thread-safe: only the thread that steps the policy may call it, between
    steps.
    """

    def __init__(self, model: MultiExitVLA, folder: Path | None, policy: DeerPolicy | None = None):
        """policy: the one that uses these layers."""
        self._model, self._policy = model, policy
        self._folder = folder
        self._identity = None if folder is None else _identity(folder / WEIGHTS)
        self._count = self._wanted = present_layers(model)
        self._load: _Load | None = None

    @property
    def count(self) -> int:
        """The number of layers that may run now."""
        return self._count

    @property
    def wanted(self) -> int:
        """The number of layers last asked for; it is more than `count` during a load."""
        return self._wanted

    def keep(self, count: int) -> None:
        """Asks for the first `count` layers. Drops the layers beyond them at once, or starts to load the
        missing ones in the background.

        Cancels a load in progress, but keeps the layers that it has read and that are still asked for.
        Raises UserError, and changes nothing, if `count` is below 2 or above the number of layers, or if the
        layers to drop could not be loaded back.
        """
        layers = self._model.layers
        if not 2 <= count <= len(layers):
            raise UserError(
                f"resident layers: {count} asked for: give 2 to {len(layers)}, as many as the network has"
            )
        if self._folder is None and count < len(layers):
            raise UserError(
                f"resident layers: {count} of {len(layers)} asked for, but this network has no checkpoint "
                f"folder that the others could come back from: keep {len(layers)}, or load it from a folder"
            )
        if count == self._wanted:
            return
        read = self._end_load()
        self._wanted = count
        if self._model.device.type == "cuda":
            torch.cuda.synchronize()  # a layer that was launched early may still run
        if self._policy is not None:
            self._policy.forget_layers(count)
        for index in range(count, self._count):
            layers[index] = _empty_layer(self._model, index)
        self._count = min(count, self._count)
        del read[count - self._count :]
        _give_back_memory(self._model.device)  # before a load begins, which may record CUDA graphs at once
        if count > self._count:
            assert self._folder is not None, "missing layers were dropped, which needs a folder"
            self._load = _Load(
                self._model,
                self._folder / WEIGHTS,
                self._identity,
                range(self._count, count),
                read,
                self._policy,
            )
            self._load.start()

    def absorb(self) -> bool:
        """Puts the loaded layers in place, once all are loaded. Never waits. Returns whether `count` changed.

        Raises the error of a load that failed, once. `wanted` is then `count`, and `keep` may try again.
        """
        if self._load is None or self._load.is_alive():
            return False
        load, self._load = self._load, None
        if load.error is not None:
            self._wanted = self._count
            _give_back_memory(self._model.device)
            raise load.error
        for index, layer in enumerate(load.layers, self._count):
            self._model.layers[index] = layer
        if self._policy is not None:
            self._policy.use_layers(load.prepared)
        self._count = self._wanted
        return True

    def wait(self) -> None:
        """Waits until the load in progress is complete or has failed."""
        if self._load is not None:
            self._load.join()

    def close(self) -> None:
        """Cancels a load in progress and waits for its thread. Layers in place stay."""
        self._end_load()
        self._wanted = self._count
        _give_back_memory(self._model.device)

    def _end_load(self) -> list[Layer]:
        """Cancels a load in progress, at the latest after one piece or one recorded function. Returns the
        layers that it has read."""
        load, self._load = self._load, None
        if load is None:
            return []
        load.cancelled.set()
        load.join()
        return load.layers


def present_layers(model: MultiExitVLA) -> int:
    """The number of a network's first layers that are on its device."""
    present = [not next(layer.parameters()).is_meta for layer in model.layers]
    return present.index(False) if False in present else len(present)


def bytes_held(device: torch.device) -> int:
    """The memory that this process holds on a device: on a GPU all that torch has reserved for it, on a CPU
    the process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


class _Load(threading.Thread):
    """Reads the layers `indices` into `layers`, which may hold the first already. A failure sets `error`."""

    def __init__(
        self,
        model: MultiExitVLA,
        path: Path,
        identity: tuple[int, ...],
        indices: range,
        layers: list[Layer],
        policy: DeerPolicy | None,
    ):
        super().__init__(name="load_layers", daemon=True)
        self._model, self._path, self._identity, self._indices = model, path, identity, indices
        self.layers, self._policy = layers, policy
        self.prepared: PreparedGroups = {}
        self.error: Exception | None = None
        self.cancelled = threading.Event()

    def run(self) -> None:
        try:
            if _identity(self._path) != self._identity:
                raise UserError(
                    "the file is another one than the network was loaded from: "
                    "configure the node again to use it"
                )
            with _copy_stream(self._model.device), safe_open(self._path, framework="pt") as file:
                for index in self._indices[len(self.layers) :]:
                    layer = self._read(file, index)
                    if layer is None:
                        return
                    self.layers.append(layer)
            if self._policy is not None:
                start, is_over = self._indices.start, self.cancelled.is_set
                self.prepared = self._policy.prepare_layers(start, self.layers, is_over)
        except (UserError, OSError, SafetensorError, RuntimeError) as error:  # RuntimeError: out of memory
            self.layers.clear()
            reason, first, last = " ".join(str(error).split()), self._indices[0], self._indices[-1]
            # The new error has no cause: the traceback would keep the mapped file and a tensor in memory.
            self.error = UserError(
                f"{self._path}: layers {first} to {last} cannot be loaded ({reason}): "
                "restore the file or free memory, then ask again"
            )
        except Exception as error:
            self.layers.clear()
            self.error = error

    def _read(self, file: safe_open, index: int) -> Layer | None:
        """Layer `index` on the network's device, in memory of its own; None if the load was cancelled."""
        prefix = f"layers.{index}."
        expected = {
            name.removeprefix(prefix): shape
            for name, shape in state_shapes(self._model.config, for_training=False).items()
            if name.startswith(prefix)
        }
        keys = [key for key in file.keys() if key.startswith(prefix)]
        found = {key.removeprefix(prefix): tuple(file.get_slice(key).get_shape()) for key in keys}
        for name in sorted(expected.keys() | found.keys()):
            if found.get(name) != expected.get(name):
                raise UserError(
                    f"tensor {prefix}{name}: shape is {found.get(name)}, the network's {expected.get(name)}"
                )
        device, dtype, bits = self._model.device, self._model.dtype, self._model.bits
        state: dict[str, Tensor] = {}
        for name, shape in expected.items():
            new = functools.partial(own_memory, device)
            own = empty_tensors(prefix + name, shape, dtype, bits, new)
            fill = quantise if is_quantised(prefix + name, shape, bits) else _copy
            for _ in fill(file.get_tensor(prefix + name), *own.values()):
                if self.cancelled.is_set():
                    return None
            state |= {key.removeprefix(prefix): tensor for key, tensor in own.items()}
        layer = _empty_layer(self._model, index)
        layer.load_state_dict(state, assign=True)
        return layer.eval().requires_grad_(False)


def _identity(path: Path) -> tuple[int, ...]:
    """A value that changes if the file is replaced or written."""
    status = path.stat()
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def _empty_layer(model: MultiExitVLA, index: int) -> Layer:
    """Layer `index` on the meta device, without memory."""
    with torch.device("meta"):
        return Layer(model.config.decoder, index, model.config.vision.width, model.bits)


def _copy(mapped: Tensor, own: Tensor) -> Iterator[None]:
    """Copies a tensor of a file. Yields after each piece."""
    rows = max(1, PIECE_BYTES * len(mapped) // mapped.nbytes)
    for to, piece in zip(own.split(rows), mapped.split(rows)):
        to.copy_(piece)
        yield


@contextlib.contextmanager
def _copy_stream(device: torch.device) -> Iterator[None]:
    """Copies to a GPU in a stream of their own, beside the steps. They are complete at the end."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        yield
        stream.synchronize()


def _give_back_memory(device: torch.device) -> None:
    """Returns freed memory from the allocator to the device, so that other processes can use it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc only
        trim(0)
