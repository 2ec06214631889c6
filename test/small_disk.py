"""A disk that is full, for tests: this process can write no file that is larger than a given size."""

import contextlib
import resource
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def small_disk(most: int) -> Iterator[None]:
    """No file of this process can become larger than `most` bytes, as on a disk that is full then.

    Python would also cut the compiled files of modules that are imported inside, and every later process
    would fail to import them (python/cpython#126606, in 3.11 and in 3.12 before 3.12.8). Inside, none are
    written.
    """
    size, compiled = resource.getrlimit(resource.RLIMIT_FSIZE), sys.dont_write_bytecode
    sys.dont_write_bytecode = True
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, size[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, size)
        sys.dont_write_bytecode = compiled
