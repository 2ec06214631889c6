"""Safe reading of pickled numpy objects: the unpickler accepts only arrays, numbers, text and containers."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from deer_vla_ros.errors import UserError
from deer_vla_ros.files import whole_file

_ALLOWED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
}
"""All names that occur in numpy's pickles of arrays and single numbers."""


def read_pickled(path: Path) -> Any:
    """Reads a .npy file of one Python object. Raises UserError if it is missing, damaged, or has other types.

    A pickle can call any function that it names. Therefore only numpy's own constructors are accepted.
    """
    try:
        with open(path, "rb") as file:
            version = np.lib.format.read_magic(file)
            read_header = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            shape, _, dtype = read_header(file)
            if shape or not dtype.hasobject:
                raise ValueError(f"an array of shape {shape} and type {dtype}")
            return _ArrayUnpickler(file).load().item()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): copy it again") from error
    except Exception as error:  # a damaged pickle can raise any exception of the constructors that it calls
        raise UserError(
            f"{path}: not a file of one pickled object of arrays and text ({error}): copy it again"
        ) from error


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy.core", "numpy._core")  # as numpy 1 called it
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(
                f"it names {module}.{name}, which is neither array nor number nor text"
            )
        return super().find_class(module, name)


def write_pickled(path: Path, value: Any) -> None:
    """Writes an object that `read_pickled` can read. The file is never incomplete."""
    array = np.empty((), object)
    array[()] = value
    with whole_file(path) as scratch, open(scratch, "wb") as file:
        np.save(file, array, allow_pickle=True)
