"""Files and folders that a command writes: whole or not at all, and with errors of one line.

A new file or folder is made in a scratch folder beside its final name, `.NAME.partial-XXXXXXXX/new/NAME`,
and takes that name in one step. Where the final name is a symbolic link, this happens where the link leads.
A process holds a lock on its scratch folders; the kernel releases it however the process ends. A scratch
folder without a lock was left by a killed process, and the next writer of NAME removes it. On a file system
without locks on folders (NFS) it stays, and can be deleted by hand.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deer_vla_ros.errors import UserError, cause

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""The errors of a disk that has no room, of a quota, and of a limit on a file's size."""
_PARTIAL = re.compile(r"\.(.+)\.partial-[a-z0-9_]{8}", re.DOTALL)
"""The name of a scratch folder; the letters at the end are those of tempfile.mkdtemp."""
_LONGEST = 200
"""The most bytes of a final name that its scratch folder's name repeats: 255 bytes are the most of any."""
_NEW, _OLD = "new", "old"
"""What a scratch folder holds: folders with what is made, and with what had the final name before."""
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # fcntl.h, linux/fs.h
_NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)
_LIBC = ctypes.CDLL(None, use_errno=True)


def write_json(path: Path, report: Any) -> None:
    """Writes `report` as `write_text` writes a text."""
    write_text(path, json.dumps(report, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes `text` in one piece, and makes the folders that lead to it.

    An older file stays as it was when this is interrupted. Devices and pipes (/dev/stdout) are written to,
    they are not replaced. Raises UserError where it cannot be written.
    """
    try:
        content = text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{path} cannot be written ({cause(error)}): correct this text") from error
    with writing(path):
        if path.exists() and not path.is_file():
            path.write_bytes(content)
            return
    with whole_file(path, len(content)) as scratch:
        scratch.write_bytes(content)


@contextlib.contextmanager
def whole_file(path: Path, size: int = 0) -> Iterator[Path]:
    """Yields another path of the same name, to write the file to. At the end that file takes the place of
    `path` in one step, readable by everybody; after an exception `path` is as it was.

    Makes the folders that lead to `path`. size: the bytes that are needed, if known, for the error. Raises
    UserError where the disk refuses.
    """
    with _scratch(path) as (scratch, place), writing(path, scratch, size):
        yield scratch
        scratch.chmod(0o644)  # safetensors makes files that only the owner can read
        scratch.replace(place)


@contextlib.contextmanager
def whole_folder(path: Path, size: int = 0) -> Iterator[Path]:
    """Yields a path of the same name that does not exist yet. The folder that is made there takes the place
    of `path` at the end; after an exception nothing is left.

    An older folder and the new one change places in one step, so `path` is complete at every instant. Some
    file systems cannot do this, NFS and SMB among them (RENAME_EXCHANGE in the manual page rename(2)). There
    `path` is missing for a moment, and if the process is killed in that moment, the next writer of `path`
    puts the older folder back.

    Makes the folders that lead to `path`. size: the bytes that are needed, if known, for the error. Raises
    UserError where the disk refuses.
    """
    with _scratch(path) as (scratch, place), writing(path, scratch, size):
        yield scratch
        _replace(place, scratch)


@contextlib.contextmanager
def writing(path: Path, scratch: Path | None = None, size: int = 0) -> Iterator[None]:
    """Raises a UserError that names `path` and its size where the disk refuses to write it.

    scratch: the path at which it is made, if that is another one; an error then names `path` instead.
    size: the bytes that are needed, if known.
    """
    place = path if scratch is None else scratch
    try:
        yield
    except UserError as error:
        if scratch is None or str(scratch) not in str(error):
            raise
        raise UserError(str(error).replace(str(scratch), str(path))) from error
    except Exception as error:
        if (code := _code_of(error)) in FULL or (code and _names(error, place)):
            raise _cannot_write(path, code, size, _size_of(place) if code in FULL else 0) from error
        raise


def refusal(error: Exception) -> UserError | None:
    """What the person at the terminal is told where the operating system refused a file and no `writing` was
    there to say so; None for any other error."""
    code, name = _code_of(error), getattr(error, "filename", None)
    path = Path(os.fsdecode(name)) if isinstance(name, (str, bytes)) else None
    if code in (*FULL, errno.EROFS):
        return _cannot_write(path, code)
    if path and isinstance(error, PermissionError):
        return UserError(f"{path}: {error.strerror}: give another place, or the right to use this one")
    return None


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Removes what killed processes left in `folder` while they wrote `name`; None: while they wrote any.

    What a living process writes is not touched.
    """
    for entry in os.scandir(folder) if folder.is_dir() else ():
        partial = _PARTIAL.fullmatch(entry.name)
        if not partial or (name is not None and partial[1] != _shortened(name)):
            continue
        with contextlib.suppress(OSError):
            if entry.is_dir(follow_symlinks=False) and entry.stat().st_uid == os.geteuid():
                with _locked(Path(entry.path)):
                    if set(os.listdir(entry.path)) <= {_NEW, _OLD}:
                        for old in Path(entry.path).glob(f"{_OLD}/*"):
                            if not (folder / old.name).exists():
                                old.rename(folder / old.name)
                        shutil.rmtree(entry.path, ignore_errors=True)


@contextlib.contextmanager
def _scratch(path: Path) -> Iterator[tuple[Path, Path]]:
    """Yields a path of the same name in a new locked folder, and the final place: where `path` leads, if it
    is a link. Before, it removes what killed processes left there."""
    with contextlib.ExitStack() as stack:
        try:
            place = Path(os.path.realpath(path)) if path.is_symlink() else path
            place.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(place.parent, place.name)
            folder = None
            while folder is None:
                prefix = f".{_shortened(place.name)}.partial-"
                folder = Path(tempfile.mkdtemp(prefix=prefix, dir=place.parent))
                try:
                    stack.enter_context(_locked(folder))
                except (BlockingIOError, FileNotFoundError):  # another process took it for a leftover
                    folder = None
                except OSError:  # a file system without locks on folders
                    pass
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            (folder / _NEW).mkdir()
        except OSError as error:
            raise _cannot_write(path, error.errno) from error
        except ValueError as error:  # zero bytes or half of a letter in the name
            raise UserError(f"{str(path)!a} cannot be written ({error}): give another place") from error
        yield folder / _NEW / path.name, place


def _shortened(name: str) -> str:
    """The beginning of a final name as the name of its scratch folder repeats it."""
    return os.fsencode(name)[:_LONGEST].decode(errors="ignore")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the lock on a folder.

    Raises BlockingIOError if another process holds it, FileNotFoundError if the folder is gone, and another
    OSError where there are no such locks.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(handle), os.stat(folder, follow_symlinks=False)):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
        yield
    finally:
        os.close(handle)


def _replace(path: Path, new: Path) -> None:
    """Gives the new folder its final name; what had that name goes to the scratch folder."""
    if not os.path.lexists(path):
        new.rename(path)
    elif not _exchange(new, path):
        before = new.parent.with_name(_OLD) / path.name
        before.parent.mkdir()
        path.rename(before)
        try:
            new.rename(path)
        except OSError:
            before.rename(path)
            raise


def _exchange(new: Path, path: Path) -> bool:
    """Lets the two change places in one step. Returns whether this file system can do so."""
    names = os.fsencode(new), os.fsencode(path)
    if _LIBC.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return True
    if (code := ctypes.get_errno()) not in _NO_EXCHANGE:
        raise OSError(code, os.strerror(code), str(new))
    return False


def _code_of(error: Exception) -> int | None:
    """The number of the operating system's error behind an exception, if there is one."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    if isinstance(error, OSError) and re.fullmatch(r"\d+ requested and \d+ written", str(error)):
        return errno.ENOSPC  # numpy does not say more
    rust = re.search(r"\(os error (\d+)\)", str(error))  # safetensors, tokenizers
    return int(rust[1]) if rust else None


def _names(error: Exception, place: Path) -> bool:
    """Whether an error says that it is about `place`, something in it, or a folder that leads to it."""
    name = getattr(error, "filename", None)
    if not isinstance(name, (str, bytes)):
        return False
    path = Path(os.fsdecode(name))
    return path.is_relative_to(place) or place.is_relative_to(path)


def _cannot_write(path: Path | None, code: int | None, size: int = 0, written: int = 0) -> UserError:
    """size, written: the bytes that are needed, and those that were written; 0: not known."""
    what = f"{path or 'a file'} cannot be written ({os.strerror(code or errno.EIO)})"
    if code not in FULL:
        return UserError(f"{what}: give another place")
    figures = [f"{_amount(size)} are needed"] if size else []
    figures += [f"{_amount(written)} were written"] if written else []
    if path is not None:
        with contextlib.suppress(OSError):
            place = next(each for each in (path, *path.absolute().parents) if each.exists())
            figures.append(f"{_amount(shutil.disk_usage(place).free)} are free there")
    told = f": {', '.join(figures)}" if figures else ""
    return UserError(f"{what}{told}: make room or give another place, then run the same command again")


def _amount(size: int) -> str:
    power = min(3, max(0, size.bit_length() - 1) // 10)
    return f"{size / 2 ** (10 * power):.4g} {('B', 'KiB', 'MiB', 'GiB')[power]}"


def _size_of(place: Path) -> int:
    """The bytes of a file, or of all files in a folder."""
    files = [place] if place.is_file() else place.rglob("*") if place.is_dir() else []
    return sum(each.stat().st_size for each in files if each.is_file())
