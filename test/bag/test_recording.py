"""Tests of reading: every kind of rosbag2, from any start time; damaged ones are refused in one line."""

import random
import shutil

import pytest
from bags import INPUTS, STATIC, records, said, write
from rosbags.rosbag2 import CompressionMode, StoragePlugin

from deer_vla_ros.bag.recording import Recording, decode
from deer_vla_ros.errors import UserError

SQLITE, MCAP = StoragePlugin.SQLITE3, StoragePlugin.MCAP
KINDS = [
    (SQLITE, CompressionMode.NONE),
    (SQLITE, CompressionMode.FILE),
    (SQLITE, CompressionMode.MESSAGE),
    (MCAP, CompressionMode.NONE),
    (MCAP, CompressionMode.FILE),
    (MCAP, CompressionMode.MESSAGE),
    (MCAP, CompressionMode.STORAGE),
]


@pytest.mark.parametrize("storage,compression", KINDS, ids=lambda value: value.name.lower())
def test_every_storage_and_compression_gives_the_same_messages(tmp_path, storage, compression):
    written = records(INPUTS, seconds=2)
    path = write(tmp_path / "bag", written, storage, compression)
    assert records(INPUTS, path) == written
    (file,) = (file for file in path.iterdir() if file.name != "metadata.yaml")
    assert records(INPUTS, file) == written, "a file alone, without its metadata"


def test_a_part_is_read_without_what_lies_before(tmp_path):
    path = write(tmp_path / "bag", records(INPUTS), MCAP, CompressionMode.STORAGE)
    file = path / "bag.mcap"
    data = bytearray(file.read_bytes())
    with Recording(path) as recording:
        later = recording.start_ns + (recording.end_ns - recording.start_ns) * 2 // 3
        expected = list(recording.messages(set(INPUTS), later))
    data[200:2000] = bytes(1800)  # These bytes lie in the first chunk.
    file.write_bytes(data)
    with Recording(path) as recording:
        assert list(recording.messages(set(INPUTS), later)) == expected and expected[0].time_ns >= later
        with pytest.raises(UserError, match="damaged"):
            list(recording.messages(set(INPUTS)))


def test_the_types_are_those_that_the_installed_messages_have():
    import json
    from pathlib import Path

    import deer_vla_ros.msg

    from deer_vla_ros.bag.cdr import types

    prefix = next(
        parent
        for parent in Path(deer_vla_ros.msg.__file__).parents
        if (parent / "share" / "deer_vla_ros").is_dir()
    )
    for name in ("PolicyStep", "BudgetStatus"):
        found = json.loads((prefix / "share" / "deer_vla_ros" / "msg" / f"{name}.json").read_text())
        hashes = {each["type_name"]: each["hash_string"] for each in found["type_hashes"]}
        assert types().hash_rihs01(f"deer_vla_ros/msg/{name}") == hashes[f"deer_vla_ros/msg/{name}"]


# Files that are not recordings.


@pytest.mark.parametrize(
    "name,content,words",
    [
        ("nothing", None, "no such recording"),
        ("text.txt", b"hello", "not a recording"),
        ("empty.mcap", b"", "cannot be read"),
        ("noise.mcap", b"\x89MCAP0\r\n" + bytes(range(256)), "cannot be read"),
        ("noise.db3", bytes(range(256)) * 40, "cannot be read"),
        ("noise.mcap.zstd", b"\x28\xb5\x2f\xfd" + bytes(range(256)), "cannot be decompressed"),
        ("zeros.mcap", bytes(5000), "only zeros"),
        ("lfs.mcap", b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n", "git lfs pull"),
        ("one.bag", b"#ROSBAG V2.0\n" + bytes(50), "rosbags-convert --src"),
        ("bag.zip", b"PK\x03\x04" + bytes(50), "unpack it"),
        ("bag.tar", b"bag/".ljust(257, b"\0") + b"ustar\x0000", "unpack it"),
        ("bag.tar.gz", b"\x1f\x8b\x08" + bytes(50), "unpack it"),
        ("metadata.yaml", b"rosbag2_bagfile_information:\n  version: 9\n", "give the folder"),
    ],
)
def test_what_is_no_recording_is_refused_in_one_line(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words) as refused:
        Recording(tmp_path / name)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("storage", [SQLITE, MCAP], ids=lambda value: value.name.lower())
def test_an_empty_recording_says_so(tmp_path, storage):
    path = write(tmp_path / "bag", [], storage, topics={STATIC: "sensor_msgs/msg/Image"})
    with pytest.raises(UserError, match="is empty"):
        Recording(path)


def outcome(path) -> str:
    """'' if the whole recording is read, else the notes' or the error's text."""
    try:
        with Recording(path) as recording:
            for each in recording.messages(set(recording.topics)):
                try:
                    decode(each)
                except UserError:
                    pass  # Readers count such a message and leave it out.
            return "; ".join(recording.notes)
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("storage,compression", KINDS, ids=lambda value: value.name.lower())
def test_a_recording_that_was_cut_anywhere_says_so_in_one_line(tmp_path, storage, compression):
    whole = write(tmp_path / "whole", records(INPUTS, seconds=0.6), storage, compression)
    file = next(file for file in whole.iterdir() if file.name != "metadata.yaml")
    data, cut = file.read_bytes(), tmp_path / "cut"
    shutil.copytree(whole, cut)
    ends = [
        0,
        1,
        7,
        8,
        9,
        30,
        100,
        len(data) - 1,
        len(data) - 8,
        len(data) - 20,
        len(data) - 37,
        len(data) - 40,
        len(data) - 300,
    ]
    ends += [len(data) * part // 23 for part in range(1, 23)]
    for end in ends:
        (cut / file.name).write_bytes(data[:end])
        told = outcome(cut)
        assert "\n" not in told
        assert told, f"cut at {end} of {len(data)}"


@pytest.mark.parametrize("storage", [SQLITE, MCAP], ids=lambda value: value.name.lower())
def test_a_flipped_byte_is_never_a_traceback(tmp_path, storage):
    whole = write(tmp_path / "whole", records((*INPUTS[2:], "/joint_states"), seconds=3), storage)
    file = next(file for file in whole.iterdir() if file.name != "metadata.yaml")
    data, draw = file.read_bytes(), random.Random(0)
    for _ in range(150):
        damaged = bytearray(data)
        for _ in range(draw.choice((1, 1, 8))):
            damaged[draw.randrange(len(data))] = draw.randrange(256)
        file.write_bytes(damaged)
        assert "\n" not in outcome(whole)


def test_bytes_that_are_not_of_the_type_are_an_error_of_that_message_alone():
    whole = said("lift the red block", 1)
    assert decode(whole).data == "lift the red block"
    for cut in range(len(whole.data)):
        with pytest.raises(UserError, match="are no std_msgs/msg/String"):
            decode(type(whole)(whole.topic, whole.type, 1, whole.data[:cut]))
