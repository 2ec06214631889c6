"""Files and folders that people give instead of a checkpoint folder: what each is, and what to do with it.

Nothing here needs torch, and no file is read beyond its first bytes.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

from deer_vla_ros.errors import UserError
from deer_vla_ros.untrusted import first_bytes, stand_in_of

PARTS = ("config.json", "model.safetensors", "tokenizer.json")
"""The files that every checkpoint folder has."""
OLD_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""The beginning of a file of `torch.save` before torch 1.6."""
TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".zst", ".xz")


def check_checkpoint_folder(folder: Path) -> None:
    """Raises a UserError that says what `folder` is, if it is no checkpoint folder."""
    if folder.is_file():
        raise UserError(f"checkpoint {folder} {_kind_of_file(folder)}")
    if snapshots := [each for each in sorted(folder.glob("snapshots/*")) if each.is_dir()]:
        raise UserError(
            f"checkpoint {folder} is a folder of Hugging Face's cache: give its snapshot {snapshots[-1]}"
        )
    for name in PARTS:
        part = folder / name
        if part.is_file():
            if stand_in := stand_in_of(part):
                raise UserError(f"checkpoint {folder}: {name} {stand_in}")
        elif part.is_symlink():
            raise UserError(
                f"checkpoint {folder}: {name} is a link to {part.readlink()}, which is not there: download "
                "the checkpoint again"
            )
        else:
            raise UserError(f"checkpoint {folder}: {name} is missing: {_remedy(folder)}")


def is_zip(path: Path) -> bool:
    """Whether a file ends as a zip archive of one part does. Raises OSError."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # of a file that says that it goes on in others
        return False


def is_torch_file(path: Path) -> bool:
    """Whether `torch.save` or TorchScript wrote a file."""
    if not is_zip(path):
        return first_bytes(path).startswith(OLD_TORCH)
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/data.pkl") for name in archive.namelist())
    except Exception:  # for arbitrary bytes, zipfile raises many kinds of exceptions
        return False


def _kind_of_file(path: Path) -> str:
    if stand_in := stand_in_of(path):
        return stand_in
    if path.suffix in TORCH_SUFFIXES or is_torch_file(path):
        return f"is a file of torch, not a checkpoint folder: {_conversion(path)}"
    if path.suffix in _ARCHIVES or is_zip(path):
        return "is an archive: unpack it, and give the folder"
    if path.name in PARTS:
        return f"is one file of a checkpoint: give its folder, {path.parent}"
    return f"is a file: {_remedy(path.parent)}"


def _remedy(folder: Path) -> str:
    if released := sorted(each for each in folder.glob("*") if each.suffix in TORCH_SUFFIXES):
        return f"{released[0].name} is there; {_conversion(released[0])}"
    return f"give a folder with {PARTS[0]}, {PARTS[1]} and {PARTS[2]}"


def _conversion(path: Path) -> str:
    return f"make one of it with `python -m deer_vla_ros convert --deer {path} ...`, and give that"
