"""Which files a recording consists of, and what its metadata.yaml says about them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from deer_vla_ros.bag.folder_kinds import LEROBOT, LEROBOT_REMEDY
from deer_vla_ros.bag.inflation import ZSTD_MAGIC
from deer_vla_ros.errors import UserError, cause
from deer_vla_ros.untrusted import check_fetched, read_yaml, stand_in_of

METADATA = "metadata.yaml"
STORAGES = (".mcap", ".db3", ".mcap.zstd", ".db3.zstd")
NAME = re.compile(r"(?P<first>\d+)_(?P<rest>.*)_\d{4}(_\d\d){2}-\d\d(_\d\d){2}|(?P<name>.*)_(?P<number>\d+)")
"""Names of split files without their ending: NAME_0, or 0_NAME_2026_01_31-12_00_00 since Lyrical."""
MCAP, SQLITE, ZSTD = "mcap", "sqlite3", "zstd"
BEGINNINGS = {
    b"\x89MCAP0\r\n": MCAP,
    b"SQLite format 3\0": SQLITE,
    ZSTD_MAGIC: ZSTD,
}
ARCHIVE = "an archive, not a recording: unpack it, and give the folder that was in it"
OTHERS = {
    b"#ROSBAG": "a ROS 1 bag: convert it with `rosbags-convert --src FILE --dst FOLDER`, and give FOLDER",
    b"PK\x03\x04": ARCHIVE,
    b"\x1f\x8b": ARCHIVE,
    b"BZh": ARCHIVE,
    b"\xfd7zXZ\0": ARCHIVE,
    b"7z\xbc\xaf\x27\x1c": ARCHIVE,
    b"rosbag2_bagfile_information": "the description of a recording: give the folder that it is in",
}
"""What people give in place of a recording, by its first bytes, and what to do then."""


@dataclass(frozen=True)
class Promise:
    """What metadata.yaml says about a topic of one type. qos: not parsed."""

    count: int
    qos: Any
    digest: str


@dataclass
class BagFolder:
    """The files of a recording in their order. promises: by topic and type.

    is_message_compressed: whether each message is compressed for itself. notes: what a person should know.
    """

    files: list[Path]
    promises: dict[tuple[str, str], Promise] = field(default_factory=dict)
    is_message_compressed: bool = False
    notes: list[str] = field(default_factory=list)


def bag_folder(path: Path) -> BagFolder:
    """The recording that a person named: a folder, or one of its files. Raises UserError if it is none."""
    if not path.exists():
        raise UserError(f"{path}: no such recording: give a rosbag2 folder, or a .mcap or .db3 file")
    if not path.is_dir():
        return BagFolder([path])
    there = sorted(each for each in path.iterdir() if each.name.endswith(STORAGES))
    if (path / METADATA).is_file():
        return _described(path, there)
    return _undescribed(path, there)


def kind_of(path: Path, name: Path | None = None) -> str:
    """MCAP, SQLITE or ZSTD, by the file's first bytes. Raises UserError for any other file.

    name: the file's name in errors, if it is another one.
    """
    name = name or path
    if not path.is_file():
        raise UserError(f"{name}: not a recording: give a rosbag2 folder, or a .mcap or .db3 file")
    if stand_in := stand_in_of(path):
        raise UserError(f"{name} {stand_in}")
    with open(path, "rb") as file:
        head = file.read(512)
    for beginning, kind in BEGINNINGS.items():
        if head.startswith(beginning):
            return kind
    for beginning, what in OTHERS.items():
        if head.startswith(beginning):
            raise UserError(f"{name}: {what.replace('FILE', str(name))}")
    if head[257:262] == b"ustar":
        raise UserError(f"{name}: {ARCHIVE}")
    if not any(head):
        what = "it holds only zeros" if head else "it is empty"
        raise UserError(
            f"{name}: cannot be read ({what}): its recorder or a copy was interrupted: copy it again, or "
            "record it again"
        )
    if name.name.endswith(STORAGES):
        raise UserError(
            f"{name}: cannot be read (its first bytes are not those of MCAP, sqlite3 or zstd): copy it again"
        )
    raise UserError(f"{name}: not a recording: give a rosbag2 folder, or a .mcap or .db3 file")


def _described(path: Path, there: list[Path]) -> BagFolder:
    """The files that metadata.yaml names."""
    source = path / METADATA
    check_fetched(source)
    advice = f"remove {source}, and the files beside it are read without it, or run `ros2 bag reindex {path}`"
    try:
        tree = read_yaml(source, "one that `ros2 bag reindex` writes")
        if not isinstance(tree, dict) or not isinstance(tree.get("rosbag2_bagfile_information"), dict):
            raise ValueError("it has no rosbag2_bagfile_information")
        found = tree["rosbag2_bagfile_information"]
        names = [PurePath(_of(str, each)).name for each in _of(list, found.get("relative_file_paths") or [])]
        if not names:
            raise ValueError("it names no file in relative_file_paths")
        form = _of(str, found.get("compression_format") or "")
        mode = _of(str, found.get("compression_mode") or "none").lower()
        if mode != "none" and form != "zstd":
            raise ValueError(f"its compression_format is {form[:40]!r}; only zstd is read")
        promises = _promises(found)
    except UserError as error:
        raise UserError(f"{error}, or {advice}") from error
    except Exception as error:  # for an arbitrary tree, any lookup may fail
        raise UserError(f"{source} cannot be read ({cause(error)}): {advice}") from error
    if missing := [name for name in names if not (path / name).is_file()]:
        have = ", ".join(each.name for each in there) or "none"
        raise UserError(
            f"{path}: {METADATA} names {', '.join(missing)[:200]}, which is not in the folder; its recording "
            f"files are: {have[:200]}: give the files their names again, or {advice}"
        )
    files, notes = _begun([path / name for name in names], path)
    folder = BagFolder(files, promises, mode == "message", notes)
    if unnamed := [each.name for each in there if each.name not in names]:
        folder.notes.append(
            f"{path}: {', '.join(unnamed)[:200]} not read, because {METADATA} does not name it: `ros2 bag "
            f"reindex {path}` would add it"
        )
    return folder


def _begun(files: list[Path], path: Path) -> tuple[list[Path], list[str]]:
    """The files without empty ones, which a recorder leaves that is killed while it begins a file, and a line
    that names those. All files, if all are empty."""
    empty = [each for each in files if not _has_content(each)]
    if not empty or len(empty) == len(files):
        return files, []
    names = ", ".join(each.name for each in empty)[:200]
    note = f"{path}: {names}: empty, as when a recorder is killed while it begins a file: read without it"
    return [each for each in files if each not in empty], [note]


def _has_content(path: Path) -> bool:
    """Whether a byte at the file's beginning is not zero. A power failure leaves zeros."""
    with open(path, "rb") as file:
        return any(file.read(512))


def _promises(found: dict[str, Any]) -> dict[tuple[str, str], Promise]:
    promises: dict[tuple[str, str], Promise] = {}
    for each in _of(list, found.get("topics_with_message_count") or []):
        topic = _of(dict, _of(dict, each)["topic_metadata"])
        key = _of(str, topic["name"]), _of(str, topic["type"])
        before = promises.get(key)
        promises[key] = Promise(
            _of(int, each["message_count"]) + (before.count if before else 0),
            topic.get("offered_qos_profiles") or [],
            _of(str, topic.get("type_description_hash") or ""),
        )
    return promises


def _of(kind: type, value: Any) -> Any:
    """The value. Raises ValueError if it is of another type."""
    if not isinstance(value, kind):
        raise ValueError(f"a {type(value).__name__} stands where a {kind.__name__} belongs")
    return value


def _undescribed(path: Path, there: list[Path]) -> BagFolder:
    """The files of a folder without metadata.yaml, as a killed recorder leaves it, by their numbers."""
    if not there:
        if (path / LEROBOT).is_file():
            raise UserError(f"{path}: {LEROBOT_REMEDY.format(path)}")
        inner = sorted(each.parent.name for each in path.glob(f"*/{METADATA}"))
        if inner:
            raise UserError(
                f"{path}: a folder of {len(inner)} recordings, not one: give one of them, such as "
                f"{path / inner[0]}"
            )
        for each in sorted(path.glob("*.bag")):
            kind_of(each)  # It says that this is a ROS 1 bag.
        raise UserError(
            f"{path}: no {METADATA} and no .mcap or .db3 file in it: give a rosbag2 folder, or such a file"
        )
    names = {each: NAME.fullmatch(each.name.partition(".")[0]) for each in there}
    if len(there) > 1:
        beginnings = {match and (match["name"] or match["rest"]) for match in names.values()}
        endings = {each.name.partition(".")[2] for each in there}
        if None in beginnings or len(beginnings) > 1 or len(endings) > 1:
            raise UserError(
                f"{path}: no {METADATA} in it, and its files do not have the names of one recording, such as "
                f"NAME_0 and NAME_1 ({', '.join(each.name for each in there)[:200]}): give one of them, or "
                f"run `ros2 bag reindex {path}`"
            )
        there.sort(key=lambda each: int(names[each]["number"] or names[each]["first"]))
    there, notes = _begun(there, path)
    return BagFolder(
        there,
        notes=[
            *notes,
            f"{path}: no {METADATA}, which a recorder writes when it ends: its "
            f"{'file is' if len(there) == 1 else f'{len(there)} files are'} read without it",
        ],
    )
