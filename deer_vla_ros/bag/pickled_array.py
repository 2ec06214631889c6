"""Reading of a .npy file that holds one Python object, without a pickle being run.

A pickle is a program: it calls the functions that it names. Even numpy's own constructors, given a forged
state, write to any address of memory. Here, the program is only read: its instructions are walked through
one by one, and those by which numpy writes arrays of numbers and text have their effect on plain data. Every
other instruction, name or state is refused.
"""

from __future__ import annotations

import math
import pickletools
import re
from pathlib import Path
from typing import Any

import numpy as np

from deer_vla_ros.errors import UserError, cause
from deer_vla_ros.files import whole_file
from deer_vla_ros.untrusted import read_bytes

MOST_BYTES = 192 * 2**20
"""The largest file. 23,000 annotations with their embeddings take 36 MB."""
MOST_INSTRUCTIONS = 4_000_000
"""The longest program. 23,000 annotations take 480,000. One instruction can make a list of 60 bytes."""
MOST_MADE = 64 * 2**20
"""The most bytes that arrays of objects and single numbers and texts take together. Each can be made from the
same bytes of the file again and again."""

_HEADER = "{'descr': '|O', 'fortran_order': False, 'shape': (), }"
"""The only header of such a file."""
_MULTIARRAY = ("numpy.core.multiarray", "numpy._core.multiarray")
"""The module of numpy's functions, in numpy 1 and 2."""
_NUMBERS = {"b1": "|", "u1": "|", "i4": "<", "i8": "<", "f4": "<", "f8": "<"}
"""The number types that are read, with their byte order."""
_TEXT = re.compile(r"U(\d{1,6})")


def read_pickled(path: Path) -> Any:
    """Reads a .npy file of one Python object of dicts, lists, tuples, text, numbers and numpy arrays of them.

    Raises UserError if it is missing, damaged, too large, or has other types.
    """
    content = read_bytes(path, MOST_BYTES, "copy it again")
    try:
        return _object(content)
    except Exception as error:  # damaged bytes can raise any exception of pickletools
        raise UserError(
            f"{path}: not a file of one pickled object of arrays and text ({cause(error)}): copy it again, "
            "or save it again with numpy.save(path, array, allow_pickle=True)"
        ) from error


def _object(content: bytes) -> Any:
    if content[:8] != b"\x93NUMPY\x01\x00":
        raise ValueError("it does not begin as numpy's files do")
    end = 10 + int.from_bytes(content[8:10], "little")
    if content[10:end].decode("ascii").rstrip() != _HEADER:
        raise ValueError("it holds other things than one object")
    array = _Reading().run(content[end:])
    if not isinstance(array, np.ndarray) or array.shape != () or array.dtype != object:
        raise ValueError("it holds other things than one object")
    return array[()]


class _Name:
    """A function or class of numpy that the program names. It is never called."""

    def __init__(self, module: str, name: str):
        known = (module == "numpy" and name in ("ndarray", "dtype")) or (
            module in _MULTIARRAY and name in ("_reconstruct", "scalar")
        )
        if not known:
            raise ValueError(f"it names {module}.{name}, which is neither array nor number nor text")
        self.name = name


class _Unfilled:
    """An array that the program has begun. memo: where the program keeps it."""

    memo: int | None = None


class _Kind:
    """A number type that the program has begun; `state` says the rest of it, which is always the same."""

    def __init__(self, code: str):
        text = _TEXT.fullmatch(code)
        if code == "O8":
            self.code, order, size, alignment, flags = "O", "|", -1, -1, 63
        elif text:
            self.code, order, size, alignment, flags = f"<{code}", "<", 4 * int(text[1]), 4, 8
        elif code in _NUMBERS:
            order = _NUMBERS[code]
            self.code, size, alignment, flags = order + code, -1, -1, 0
        else:
            raise ValueError(f"it has the number type {code!r}")
        self.state = (3, order, None, None, None, size, alignment, flags)
        self.is_whole = False


_MARK = object()


class _Reading:
    """The walk through one program: its stack, and what it keeps under numbers."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._made = 0

    def run(self, program: bytes) -> Any:
        """The value that the program ends with. Raises ValueError, or an error of pickletools."""
        for number, (code, given, _) in enumerate(pickletools.genops(program)):
            if number > MOST_INSTRUCTIONS:
                raise ValueError(f"over {MOST_INSTRUCTIONS} instructions")
            if code.name == "STOP":
                return self._pop()
            self._do(code.name, given)
        raise ValueError("cut short")

    def _do(self, name: str, given: Any) -> None:
        stack = self._stack
        if name == "PROTO" and given not in (3, 4):
            raise ValueError(f"its pickle protocol is {given}, and numpy.save writes 3 or 4")
        elif name in ("PROTO", "FRAME"):
            return
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _PLAIN:
            stack.append(given)
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name == "MARK":
            stack.append(_MARK)
        elif name == "TUPLE":
            stack.append(tuple(self._since_mark()))
        elif name in _TUPLES:
            stack.append(tuple(self._pop() for _ in range(_TUPLES[name]))[::-1])
        elif name in ("APPEND", "APPENDS"):
            items = self._since_mark() if name == "APPENDS" else [self._pop()]
            self._top(list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = self._since_mark() if name == "SETITEMS" else [self._pop(), self._pop()][::-1]
            if len(items) % 2 or not all(isinstance(key, str) for key in items[::2]):
                raise ValueError("a dict whose names are no text")
            self._top(dict).update(zip(items[::2], items[1::2]))
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self._keep(len(self._memo) if name == "MEMOIZE" else given)
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[given])
        elif name == "GLOBAL":
            stack.append(_Name(*given.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            function, module = self._pop(str), self._pop(str)
            stack.append(_Name(module, function))
        elif name == "REDUCE":
            arguments, function = self._pop(tuple), self._pop(_Name)
            if function.name == "scalar":
                self._count(len(arguments[1]))
            stack.append(_called(function.name, arguments))
        elif name == "BUILD":
            self._build(self._pop(tuple))
        else:
            raise ValueError(f"it has the instruction {name}, which numpy does not write")

    def _pop(self, kind: type = object) -> Any:
        value = self._stack.pop()
        if value is _MARK or not isinstance(value, kind):
            raise ValueError(f"a {type(value).__name__} where a {kind.__name__} belongs")
        return value

    def _top(self, kind: type) -> Any:
        value = self._stack[-1]
        if not isinstance(value, kind):
            raise ValueError(f"a {type(value).__name__} where a {kind.__name__} belongs")
        return value

    def _since_mark(self) -> list[Any]:
        at = len(self._stack) - 1
        while self._stack[at] is not _MARK:  # an IndexError if there is none
            at -= 1
        items = self._stack[at + 1 :]
        del self._stack[at:]
        return items

    def _keep(self, number: int) -> None:
        value = self._stack[-1]
        self._memo[number] = value
        if isinstance(value, _Unfilled):
            value.memo = number

    def _build(self, state: tuple) -> None:
        """Gives a number type or an array its content. An array is then found under its number, too."""
        if isinstance(self._stack[-1], _Kind):
            if self._stack[-1].state != state:
                raise ValueError("a number type with a state that numpy does not write")
            self._stack[-1].is_whole = True
            return
        unfilled = self._pop(_Unfilled)
        array = _array(*state)
        if array.dtype == object:
            self._count(array.nbytes)
        self._stack.append(array)
        if unfilled.memo is not None:
            self._memo[unfilled.memo] = array

    def _count(self, size: int) -> None:
        """Counts bytes that are made. Raises ValueError if they are over MOST_MADE."""
        self._made += size
        if self._made > MOST_MADE:
            raise ValueError(f"its arrays of objects and its single values take over {MOST_MADE} bytes")


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_PLAIN = (
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINBYTES", "SHORT_BINBYTES"),
)
_EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _called(name: str, arguments: tuple) -> Any:
    """What numpy's function of this name would have begun or made."""
    if name == "_reconstruct":
        array, shape, kind = arguments
        if isinstance(array, _Name) and array.name == "ndarray" and shape == (0,) and kind == b"b":
            return _Unfilled()
    if name == "dtype":
        code, align, copy = arguments
        if isinstance(code, str) and align is False and copy is True:
            return _Kind(code)
    if name == "scalar":
        kind, content = arguments
        return _array(1, (), kind, False, content)[()].item()
    raise ValueError(f"it calls numpy's {name} as numpy does not")


def _array(version: int, shape: Any, kind: Any, is_fortran: Any, content: Any) -> np.ndarray:
    """The array of a state as numpy writes it."""
    if version != 1 or not isinstance(kind, _Kind) or not kind.is_whole or not isinstance(is_fortran, bool):
        raise ValueError("an array with a state that numpy does not write")
    if not isinstance(shape, tuple) or len(shape) > 8 or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError("an array whose shape is no tuple of whole numbers")
    order, count = "F" if is_fortran else "C", math.prod(shape)
    if kind.code == "O":
        if not isinstance(content, list) or len(content) != count:
            raise ValueError("an array of objects whose number is not that of its shape")
        array = np.empty(count, object)
        for index, item in enumerate(content):
            array[index] = item
        return array.reshape(shape, order=order)
    size = np.dtype(kind.code).itemsize
    if not isinstance(content, bytes) or size == 0 or len(content) != count * size:
        raise ValueError("an array whose bytes are not those of its shape")
    return np.frombuffer(content, kind.code).reshape(shape, order=order)


def write_pickled(path: Path, value: Any) -> None:
    """Writes an object that `read_pickled` can read. The file is never incomplete."""
    array = np.empty((), object)
    array[()] = value
    with whole_file(path) as scratch, open(scratch, "wb") as file:
        np.save(file, array, allow_pickle=True)
