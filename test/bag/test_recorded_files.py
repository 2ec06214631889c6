"""Tests of recordings as people have them: split, reindexed, cut, compressed, edited, by other tools."""

import dataclasses
import itertools
import sqlite3
import struct
import tempfile
import time
import tracemalloc
from pathlib import Path

import pytest
from backports import zstd
from bags import (
    INPUTS,
    INSTRUCTION,
    POSE,
    STATIC,
    TABLE,
    metadata,
    record,
    records,
    said,
    set_metadata,
    write,
    write_split,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mcap.opcode import Opcode
from mcap.writer import CompressionType, IndexType
from mcap.writer import Writer as McapWriter
from rcl_interfaces.msg import Parameter, ParameterEvent
from rosbags.rosbag2 import CompressionMode, StoragePlugin

from deer_vla_ros.bag import inflation, mcap_storage, offered_qos
from deer_vla_ros.bag.bag_file import BagFile
from deer_vla_ros.bag.cdr import types
from deer_vla_ros.bag.input_topics import PARAMETERS, Tally, find_topics, messages
from deer_vla_ros.bag.mcap_storage import RECORD
from deer_vla_ros.bag.offered_qos import parsed_qos
from deer_vla_ros.bag.recording import Record, Recording
from deer_vla_ros.errors import UserError

SQLITE, MCAP = StoragePlugin.SQLITE3, StoragePlugin.MCAP
STORAGES = pytest.mark.parametrize("storage", [SQLITE, MCAP], ids=lambda value: value.name.lower())


def read(path: Path) -> tuple[list[Record], list[str]]:
    """All messages of a recording, and what it says about itself."""
    with Recording(path) as recording:
        return list(recording.messages(set(recording.topics))), recording.notes


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as refused:
        read(path)
    text = str(refused.value)
    assert "\n" not in text and len(text) < 2000
    return text


def mcap(path: Path, found: list[Record], profile="ros2", encoding="cdr", finish=True, **options) -> Path:
    """Writes an MCAP file with another writer than rosbags'."""
    with open(path, "wb") as file:
        writer = McapWriter(file, **options)
        writer.start(profile=profile, library="test")
        channels = {}
        for each in found:
            if each.topic not in channels:
                text = types().generate_msgdef(each.type, ros_version=2)[0]
                schema = writer.register_schema(each.type, "ros2msg", text.encode())
                channels[each.topic] = writer.register_channel(each.topic, encoding, schema)
            writer.add_message(channels[each.topic], each.time_ns, each.data, each.time_ns)
        if finish:
            writer.finish()
    return path


# Files that overlap in time, and files out of order.


DRAWN = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 2), st.integers(0, 2)), min_size=1)


@settings(max_examples=20)
@given(drawn=DRAWN, storage=st.just(MCAP))
@example(drawn=[(7 * i % 13, i % 3, i % 2) for i in range(40)], storage=SQLITE)
@example(drawn=[(3, 0, 1), (3, 1, 0), (3, 0, 0)], storage=SQLITE)
def test_any_split_gives_the_messages_in_order_of_time(storage, drawn):
    """Messages of one time come in the order of the files, and of their places in a file."""
    found = [
        (Record(f"/topic_{topic}", "std_msgs/msg/String", 1000 + time_ns, said(str(place), 0).data), part)
        for place, (time_ns, topic, part) in enumerate(drawn)
    ]
    parts = [[each for each, part in found if part == number] for number in range(3)]
    expected = sorted(itertools.chain(*parts), key=lambda each: each.time_ns)
    with tempfile.TemporaryDirectory() as scratch:
        path = write_split(Path(scratch) / "bag", [part for part in parts if part], storage)
        assert read(path) == (expected, [])
        with Recording(path) as recording:
            assert list(recording.messages({"/topic_0"}, 1003, 1009)) == [
                each for each in expected if each.topic == "/topic_0" and 1003 <= each.time_ns < 1009
            ]
            assert recording.start_ns == expected[0].time_ns
            assert recording.end_ns == expected[-1].time_ns + 1


@STORAGES
def test_a_split_recording_is_the_unsplit_one(tmp_path, storage):
    found = records(INPUTS, seconds=4)
    middle = found[len(found) // 2].time_ns
    late = [each for each in found if each.topic == POSE and middle - 150_000_000 <= each.time_ns < middle]
    first = [each for each in found if each.time_ns < middle and each not in late]
    second = [*late, *(each for each in found if each.time_ns >= middle)]
    cameras = [each for each in found if each.topic.startswith("/camera")]
    rest = [each for each in found if not each.topic.startswith("/camera")]
    for name, parts in (("late", (first, second)), ("two", (cameras, rest)), ("swapped", (second, first))):
        assert read(write_split(tmp_path / name, parts, storage)) == (found, [])


@pytest.mark.parametrize(
    "options",
    [
        {"chunk_size": 30_000},
        {"chunk_size": 30_000, "compression": CompressionType.LZ4},
        {"chunk_size": 30_000, "compression": CompressionType.NONE},
        {"chunk_size": 30_000, "index_types": IndexType.NONE},
        {"chunk_size": 30_000, "index_types": IndexType.CHUNK},
        {"chunk_size": 30_000, "repeat_channels": False, "repeat_schemas": False},
        {"chunk_size": 30_000, "use_statistics": False},
        {"use_chunking": False},
        {"use_chunking": False, "use_statistics": False, "use_summary_offsets": False},
    ],
    ids=str,
)
def test_files_of_another_writer_with_and_without_an_index(tmp_path, options):
    found = records(INPUTS, seconds=2)
    mixed = found[1::2] + found[::2]
    assert read(mcap(tmp_path / "bag.mcap", mixed, **options)) == (found, [])
    with Recording(tmp_path / "bag.mcap") as recording:
        middle = found[len(found) // 2].time_ns
        assert list(recording.messages({POSE}, middle)) == [
            each for each in found if each.topic == POSE and each.time_ns >= middle
        ]


def test_many_files_do_not_need_as_many_chunks_in_memory(tmp_path):
    """Only the file whose time it is is read."""
    found = records([STATIC], seconds=1)
    path = write_split(tmp_path / "bag", [[each] for each in found])
    files = sorted(path.glob("*.mcap"), key=lambda file: int(file.stem.rpartition("_")[2]))
    with Recording(path) as recording:
        stream = recording.messages({STATIC})
        assert next(stream) == found[0]
        files[-1].write_bytes(b"")
        assert next(stream) == found[1]
        with pytest.raises(UserError, match="damaged, 0.9 s from its beginning"):
            list(stream)


# What metadata.yaml says.


@STORAGES
def test_quality_of_service_has_nothing_to_do_with_reading(tmp_path, storage):
    found = records(INPUTS, seconds=1)
    path = write(tmp_path / "bag", found, storage)
    profile = metadata(TABLE)["topics_with_message_count"][-3:]
    qos = next(each["topic_metadata"]["offered_qos_profiles"] for each in profile if each["topic_metadata"])
    for profiles in (qos, [dict(depth=3)], "- history: 1\n  depth: 9", "&a [*a]", 3, [3], {"a": 1}):
        edited = metadata(path)
        for each in edited["topics_with_message_count"]:
            each["topic_metadata"]["offered_qos_profiles"] = profiles
        set_metadata(path, edited)
        assert read(path) == (found, [])


def test_promised_messages_that_are_not_there_are_said_in_one_line(tmp_path):
    found = records(INPUTS, seconds=1)
    path = write(tmp_path / "bag", found)
    edited = metadata(path)
    edited["topics_with_message_count"][0]["message_count"] += 5
    other = edited["topics_with_message_count"][1]["topic_metadata"]
    edited["topics_with_message_count"].append(
        {"message_count": 7, "topic_metadata": other | {"name": "/gone", "type": "std_msgs/msg/Empty"}}
    )
    set_metadata(path, edited)
    topic = edited["topics_with_message_count"][0]["topic_metadata"]["name"]
    count = sum(each.topic == topic for each in found)
    messages, (note,) = read(path)
    assert messages == found
    assert f"{count + 5} of {topic}, and {count} are found; 7 of /gone, and 0 are found" in note


@STORAGES
def test_a_topic_without_messages_is_not_taken_for_one_with_messages(tmp_path, storage):
    """metadata.yaml and recorders also list topics of other arms that were silent."""
    found = [dataclasses.replace(each, topic=f"/left{each.topic}") for each in records(INPUTS, seconds=1)]
    kinds = {each.topic: each.type for each in found}
    silent = {
        topic.replace("/left", space): kind for topic, kind in kinds.items() for space in ("/right", "")
    }
    listed = write(tmp_path / "listed", found, storage, topics=kinds | silent)
    promised = write(tmp_path / "promised", found, storage)
    set_metadata(
        promised,
        metadata(promised) | {"topics_with_message_count": metadata(listed)["topics_with_message_count"]},
    )
    for path in (listed, promised):
        with Recording(path) as recording:
            topics = find_topics(recording, {}, (INSTRUCTION[1:],), Tally())
            assert set(topics.values()) == set(kinds)
            chosen = find_topics(
                recording, {INSTRUCTION[1:]: "/right/instruction"}, (INSTRUCTION[1:],), Tally()
            )
            assert chosen[POSE[1:]] == "/right/ee_pose"  # as the person asked


def test_a_topic_of_two_types_keeps_the_one_with_the_most_messages(tmp_path):
    found = records(INPUTS, seconds=1)
    wrong = [Record(POSE, "std_msgs/msg/String", each.time_ns, said("", 0).data) for each in found[:3]]
    messages, (note,) = read(write_split(tmp_path / "bag", [wrong, found]))
    assert messages == found and "3 messages of type std_msgs/msg/String left out" in note


def test_a_reindexed_recording_is_read(tmp_path):
    """`ros2 bag reindex` writes `files: []`, adds up the durations of the files without the gaps between
    them, and in some versions leaves the storage identifier empty."""
    found = records(INPUTS, seconds=4)
    path = write_split(tmp_path / "bag", [found[:20], found[-20:]])
    set_metadata(
        path,
        metadata(path)
        | {"files": [], "storage_identifier": "", "duration": {"nanoseconds": 1}, "custom_data": None},
    )
    assert read(path) == (found[:20] + found[-20:], [])
    with Recording(path) as recording:
        assert (recording.start_ns, recording.end_ns) == (found[0].time_ns, found[-1].time_ns + 1)


def test_files_that_metadata_names_or_does_not_name(tmp_path):
    found = records(INPUTS, seconds=1)
    path = write_split(tmp_path / "bag", [found[:20], found[20:]])
    set_metadata(path, metadata(path) | {"relative_file_paths": ["old/prefix/bag_0.mcap"]})
    messages, notes = read(path)
    assert messages == found[:20] and "bag_1.mcap not read" in notes[0]
    set_metadata(path, metadata(path) | {"relative_file_paths": ["a.mcap", "bag_0.mcap"]})
    told = refusal(path)
    assert "names a.mcap, which is not in the folder" in told and "bag_0.mcap, bag_1.mcap" in told


INFORMATION = "rosbag2_bagfile_information:\n  "


@pytest.mark.parametrize(
    "text",
    [
        "",
        "- a\n- b",
        "{",
        "\0",
        "a: &a [*a]",
        "[" * 100_000,
        INFORMATION + "3",
        INFORMATION + "version: 99",
        INFORMATION + "relative_file_paths: bag.mcap",
        INFORMATION + "relative_file_paths: [[bag.mcap]]",
        INFORMATION + "relative_file_paths: [.]",
        INFORMATION + "relative_file_paths: ['']",
        INFORMATION + "relative_file_paths: [bag.mcap]\n  topics_with_message_count: 3",
        INFORMATION + "relative_file_paths: [bag.mcap]\n  topics_with_message_count: [3]",
        INFORMATION + "relative_file_paths: [bag.mcap]\n  topics_with_message_count: [{message_count: 1}]",
        INFORMATION + "relative_file_paths: [bag.mcap]\n  compression_mode: file\n  compression_format: xz",
    ],
    ids=range(16),
)
def test_a_broken_metadata_file_is_named_with_the_cause_and_a_remedy(tmp_path, text):
    path = write(tmp_path / "bag", records(INPUTS, seconds=0.3))
    (path / "metadata.yaml").write_text(text)
    assert "metadata.yaml" in refusal(path)


def test_a_bomb_of_aliases_in_metadata_costs_no_time(tmp_path):
    path = write(tmp_path / "bag", records(INPUTS, seconds=0.3))
    rows = ["  a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    rows += [f"  a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    text = "\n".join(["rosbag2_bagfile_information:", *rows])
    topic = "topics_with_message_count: [{message_count: 1, topic_metadata: {name: a, type: b, "
    for bomb in (
        "relative_file_paths: *a11",
        "relative_file_paths: [bag.mcap]\n  topics_with_message_count: *a11",
        "relative_file_paths: [bag.mcap]\n  compression_mode: *a11",
        "relative_file_paths: [bag.mcap]\n  compression_format: *a11",
        "relative_file_paths: [bag.mcap]\n  <<: [*a11, *a11]",
        f"relative_file_paths: [bag.mcap]\n  {topic}type_description_hash: *a11}}}}]",
    ):
        (path / "metadata.yaml").write_text(f"{text}\n  {bomb}\n")
        began = time.process_time()
        assert str(path / "metadata.yaml") in refusal(path)
        assert time.process_time() - began < 10
    (path / "metadata.yaml").write_text(" " * 2**21)
    assert "longer than 1000000 bytes" in refusal(path)


# Recorders that were killed, and folders without metadata.yaml.


@pytest.mark.parametrize("compression", [CompressionType.ZSTD, CompressionType.NONE], ids=str)
@pytest.mark.parametrize("is_chunked", [True, False])
def test_a_cut_mcap_file_is_read_up_to_its_last_whole_chunk(tmp_path, compression, is_chunked):
    found = records(INPUTS, seconds=3)
    options = {"use_chunking": is_chunked, "chunk_size": 20_000, "compression": compression}
    data = mcap(tmp_path / "whole.mcap", found, **options).read_bytes()
    counts = []
    for end in range(1000, len(data), len(data) // 12):
        (tmp_path / "cut.mcap").write_bytes(data[:end])
        try:
            messages, (note,) = read(tmp_path / "cut.mcap")
        except UserError as error:
            assert "no whole chunk" in str(error) and not counts
            continue
        assert messages == found[: len(messages)]
        assert f"the {len(messages)} messages before that are read; `ros2 bag reindex`" in note
        counts.append(len(messages))
    assert counts == sorted(counts) and counts[0] < 20 and counts[-1] > len(found) - 20


def test_the_zeros_of_a_power_failure_end_a_file(tmp_path):
    found = records(INPUTS, seconds=1)
    data = mcap(tmp_path / "whole.mcap", found, chunk_size=20_000).read_bytes()
    (tmp_path / "cut.mcap").write_bytes(data[: len(data) // 2].ljust(len(data), b"\0"))
    messages, (note,) = read(tmp_path / "cut.mcap")
    assert 0 < len(messages) < len(found) and messages == found[: len(messages)] and "missing" in note


def test_a_folder_without_metadata_is_read_by_the_numbers_of_its_files(tmp_path):
    found = records(INPUTS, seconds=2)
    path = write_split(tmp_path / "bag", [found[i : i + 6] for i in range(0, len(found), 6)])
    (path / "metadata.yaml").unlink()
    assert len(list(path.glob("*.mcap"))) > 10
    messages, (note,) = read(path)
    assert messages == found and "no metadata.yaml" in note
    (path / f"bag_{len(list(path.iterdir()))}.mcap").write_bytes(b"")  # the next file, just begun
    messages, notes = read(path)
    assert (
        messages == found
        and len(notes) == 2
        and f"bag_{len(list(path.iterdir())) - 1}.mcap: empty" in notes[0]
    )
    for file in list(path.iterdir()):  # the names of newer recorders
        number = file.stem.rpartition("_")[2]
        file.rename(path / f"{number}_bag_2026_01_31-12_00_{int(number):02}.mcap")
    assert read(path)[0] == found


@STORAGES
@pytest.mark.parametrize("content", [b"", bytes(4096)], ids=["empty", "zeros"])
@pytest.mark.parametrize("is_described", [True, False], ids=["described", "undescribed"])
def test_a_file_that_a_killed_recorder_just_began_is_named_and_left_out(
    tmp_path, storage, content, is_described
):
    found = records(INPUTS, seconds=1)
    path = write_split(tmp_path / "bag", [found[:20], found[20:]], storage)
    begun = max(path.glob("bag_1.*"))
    begun.write_bytes(content)
    if not is_described:
        (path / "metadata.yaml").unlink()
    messages, notes = read(path)
    assert messages == found[:20] and f"{begun.name}: empty, as when" in notes[0]
    max(path.glob("bag_0.*")).write_bytes(content)
    assert "copy it again" in refusal(path)


def test_folders_of_several_recordings_are_refused(tmp_path):
    found = records(INPUTS, seconds=0.3)
    assert "no metadata.yaml" in refusal(tmp_path)
    one, two = write(tmp_path / "one", found), write(tmp_path / "two", found)
    assert f"a folder of 2 recordings, not one: give one of them, such as {one}" in refusal(tmp_path)
    (one / "metadata.yaml").unlink()
    (two / "two.mcap").rename(one / "two.mcap")
    assert "do not have the names of one recording" in refusal(one)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "a.bag").write_bytes(b"#ROSBAG V2.0\n")
    assert "rosbags-convert" in refusal(tmp_path / "old")
    (tmp_path / "lerobot" / "meta").mkdir(parents=True)
    (tmp_path / "lerobot" / "meta" / "info.json").write_text("{}")
    assert "convert-lerobot" in refusal(tmp_path / "lerobot")


def test_git_lfs_pointers_inside_a_folder(tmp_path):
    path = write(tmp_path / "bag", records(INPUTS, seconds=0.3))
    for name in ("bag.mcap", "metadata.yaml"):
        (path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n")
        assert f"{name} is a pointer of Git LFS" in refusal(path) and "git lfs pull" in refusal(path)


def test_what_a_killed_recorder_left_in_the_wal_file_is_read(tmp_path):
    found = records(INPUTS, seconds=1)
    path = write(tmp_path / "bag", found, SQLITE)
    with sqlite3.connect(path / "bag.db3") as database:
        assert database.execute("PRAGMA journal_mode=wal").fetchone() == ("wal",)
    database = sqlite3.connect(path / "bag.db3")
    later = [(100 + i, 1, found[-1].time_ns + i, found[0].data) for i in range(5)]
    database.executemany("INSERT INTO messages VALUES (?, ?, ?, ?)", later)
    database.commit()
    copy = tmp_path / "killed"
    copy.mkdir()
    for name in ("bag.db3", "bag.db3-wal"):
        (copy / name).write_bytes((path / name).read_bytes())
    database.close()
    assert len(read(copy)[0]) == len(found) + 5


# Other writers, other middlewares, other compressions.


def test_an_mcap_file_is_judged_by_its_encodings_if_it_names_no_profile(tmp_path):
    found = records(INPUTS, seconds=1)
    assert read(mcap(tmp_path / "empty.mcap", found, profile="")) == (found, [])
    assert "rosbags-convert" in refusal(mcap(tmp_path / "one.mcap", found, profile="ros1"))
    assert "'px4'" in refusal(mcap(tmp_path / "px4.mcap", found, profile="px4"))
    assert "encoded as protobuf" in refusal(mcap(tmp_path / "p.mcap", found, "", encoding="protobuf"))
    many = [dataclasses.replace(found[0], topic=f"/t{number}") for number in range(100)]
    assert "encoded as protobuf" in refusal(mcap(tmp_path / "m.mcap", many, "", encoding="protobuf"))


def test_a_type_without_msg_in_its_name_is_the_ros_2_type(tmp_path):
    whole = said("lift", 1)
    with open(tmp_path / "bag.mcap", "wb") as file:
        writer = McapWriter(file)
        writer.start(profile="ros2", library="test")
        schema = writer.register_schema("std_msgs/String", "ros2msg", b"string data")
        writer.add_message(writer.register_channel(whole.topic, "cdr", schema), 1, whole.data, 1)
        writer.finish()
    assert read(tmp_path / "bag.mcap") == ([whole], [])


@STORAGES
def test_a_compressed_file_alone_is_read_and_its_copy_removed(tmp_path, storage, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    found = records(INPUTS, seconds=1)
    path = write(tmp_path / "bag", found, storage, CompressionMode.FILE)
    (file,) = path.glob("*.zstd")
    assert read(file) == (found, [])
    whole = zstd.decompress(file.read_bytes())
    file.write_bytes(zstd.compress(whole[: 8 if storage is MCAP else 40].ljust(len(whole), b"\0")))
    tool = "mcap recover" if storage is MCAP else "sqlite3"
    assert f"`zstd -d {file}` and `{tool} {file.with_suffix('')} " in refusal(file)
    file.write_bytes(zstd.compress(whole)[:-100])
    assert "cannot be decompressed" in refusal(file)
    file.write_bytes(zstd.compress(b"something else"))
    assert f"{file}: cannot be read (its first bytes" in refusal(file)
    assert list(tmp_path.iterdir()) == [path]


# Small files that would grow.


@pytest.mark.parametrize("is_declared", [True, False])
def test_a_compressed_file_cannot_fill_the_disk(tmp_path, monkeypatch, is_declared):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(inflation, "LARGEST", 2**20)
    bomb, size = tmp_path / "bag.mcap.zstd", 2**28
    if is_declared:
        bomb.write_bytes(zstd.compress(bytes(size)))
    else:
        with zstd.open(bomb, "wb") as file:
            for _ in range(size // 2**20):
                file.write(bytes(2**20))
    sizes, check = [], inflation._check

    def watch(path, size, *limits):
        sizes.append(size)
        check(path, size, *limits)

    monkeypatch.setattr(inflation, "_check", watch)
    assert "1000 times its size" in refusal(bomb)
    limit = bomb.stat().st_size * inflation.FILE_RATIO
    assert sizes == [size] if is_declared else sizes[-1] <= limit + inflation.BLOCK
    assert list(tmp_path.iterdir()) == [bomb]


def test_a_full_disk_is_said_before_it_is_filled(tmp_path, monkeypatch):
    path = write(tmp_path / "bag", records(INPUTS, seconds=1), MCAP, CompressionMode.FILE)
    monkeypatch.setattr(inflation, "RESERVE", 2**62)
    assert "no room" in refusal(path) and "TMPDIR" in refusal(path)


@STORAGES
def test_a_compressed_message_cannot_fill_the_memory(tmp_path, storage, monkeypatch):
    bomb = zstd.compress(bytes(2**27))
    path = write(tmp_path / "bag", [Record(STATIC, "sensor_msgs/msg/Image", 1, bomb)], storage)
    set_metadata(path, metadata(path) | {"compression_mode": "message", "compression_format": "zstd"})
    monkeypatch.setattr(inflation, "LARGEST", 2**20)
    tracemalloc.start()
    assert "more than the 1048576 bytes" in refusal(path)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_a_chunk_that_declares_a_huge_size_is_refused(tmp_path):
    data = bytearray(mcap(tmp_path / "bag.mcap", records(INPUTS, seconds=1)).read_bytes())
    at = data.index(b"zstd") - 16  # the chunk's decompressed size, before its checksum and compression
    data[at : at + 8] = (2**40).to_bytes(8, "little")
    (tmp_path / "bag.mcap").write_bytes(data)
    assert f"a chunk of {2**40} bytes, decompressed; the limit is" in refusal(tmp_path / "bag.mcap")


def mcap_record(kind: int, content: bytes) -> bytes:
    return struct.pack("<BQ", kind, len(content)) + content


def mcap_text(text: str) -> bytes:
    return struct.pack("<I", len(text)) + text.encode()


def mcap_channel(number: int, topic: str, qos: str = "") -> bytes:
    qos = mcap_text("offered_qos_profiles") + mcap_text(qos)
    return mcap_record(
        4, struct.pack("<HH", number, 1) + mcap_text(topic) + mcap_text("cdr") + mcap_text("") + qos
    )


def mcap_message(time_ns: int, data: bytes = b"") -> bytes:
    return mcap_record(5, struct.pack("<HIQQ", 1, 0, time_ns, time_ns) + data)


def chunks(path: Path, *contents: bytes) -> Path:
    """Writes an MCAP file without an index, of compressed chunks of these records."""
    schema = struct.pack("<H", 1) + mcap_text("std_msgs/msg/Empty") + mcap_text("ros2msg") + mcap_text("")
    parts = [
        b"\x89MCAP0\r\n",
        mcap_record(1, mcap_text("ros2") + mcap_text("")),
        mcap_record(3, schema),
        mcap_channel(1, "/ee_pose"),
    ]
    for content in contents:
        packed = zstd.compress(content)
        head = struct.pack("<QQQI", 0, 0, len(content), 0) + mcap_text("zstd")
        parts.append(mcap_record(6, head + struct.pack("<Q", len(packed)) + packed))
    path.write_bytes(b"".join([*parts, mcap_record(15, bytes(4))]))
    return path


def test_an_index_that_names_a_chunk_many_times_is_not_used(tmp_path):
    found = records(INPUTS, seconds=1)
    data = mcap(tmp_path / "bag.mcap", found, enable_crcs=False, chunk_size=2**22).read_bytes()
    at = data.rindex(struct.pack("<B", Opcode.CHUNK_INDEX), 0, data.rindex(b"zstd"))
    length = RECORD.size + struct.unpack_from("<Q", data, at + 1)[0]
    entry = data[at : at + length]
    (tmp_path / "bag.mcap").write_bytes(data[:at] + entry * 100 + data[at:])
    messages, (note,) = read(tmp_path / "bag.mcap")
    assert messages == found and "made anew" in note


@pytest.mark.parametrize("record", [mcap_record(0x80, b""), mcap_message(1)], ids=["unknown", "messages"])
def test_a_small_chunk_of_very_many_records_is_refused(tmp_path, record):
    path = chunks(tmp_path / "bag.mcap", mcap_message(1) * 1000, record * 2**18)
    tracemalloc.start()
    messages, (note,) = read(path)
    assert tracemalloc.get_traced_memory()[1] < 2**25
    tracemalloc.stop()
    assert len(messages) == 1000 and "more records in " in note


def test_chunks_that_overlap_are_bounded_together(tmp_path, monkeypatch):
    monkeypatch.setattr(mcap_storage, "MOST_WAITING", 2**22)
    large = [mcap_message(5 + place, bytes(2**20)) for place in range(24)]
    assert len(read(chunks(tmp_path / "long.mcap", *large))[0]) == 24  # only the messages' times count
    repeated = chunks(tmp_path / "bag.mcap.zstd", *[mcap_message(1) + each for each in large])
    repeated.write_bytes(zstd.compress(repeated.read_bytes()))
    assert f"`zstd -d {repeated}` and `mcap sort {tmp_path / 'bag.mcap'} -o" in refusal(repeated)
    overlapping = [mcap_message(1) + each for each in large]
    tracemalloc.start()
    told = refusal(chunks(tmp_path / "bag.mcap", *overlapping))
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()
    assert (
        "4 chunks with 8 messages" in told
        and "overlap in time; the limits are" in told
        and "`mcap sort" in told
    )


def test_a_message_that_is_no_image_and_decompresses_to_over_a_megabyte_is_counted(tmp_path):
    many = ParameterEvent(node="/deer_vla", changed_parameters=[Parameter(name="a" * 1000)] * 1100)
    event = record("/parameter_events", many, 1)
    path = write(tmp_path / "bag", [dataclasses.replace(event, data=zstd.compress(event.data))])
    assert (path / "bag.mcap").stat().st_size < 20_000
    tally = Tally()
    with Recording(path) as recording:
        assert list(messages(recording, {PARAMETERS: event.topic}, tally)) == []
    assert f"{len(event.data)} bytes are more than the 1048576 that" in tally.lines()[0]


def test_long_texts_of_quality_of_service_cost_no_time(tmp_path, monkeypatch):
    """They are parsed only where a topic is copied, and the bytes of all topics' descriptions are bounded."""
    monkeypatch.setattr(offered_qos, "parse_yaml", lambda *_: pytest.fail("it was parsed"))
    text = "".join(f"- {{history: 3, depth: {number}}}\n" for number in range(2000))
    channels = [mcap_channel(number, f"/t{number}", text) for number in range(2, 300)]
    path = chunks(tmp_path / "bag.mcap", mcap_message(1) + b"".join(channels))
    assert len(read(path)[0]) == 1
    (note,) = read(chunks(tmp_path / "bag.mcap", mcap_message(1), b"".join(channels) * 2))[1]
    assert "made anew from its messages" in note  # a file may repeat the descriptions of its topics
    channels = [mcap_channel(number, f"/t{number}", text) for number in range(2, 600)]
    messages, (note,) = read(chunks(tmp_path / "bag.mcap", mcap_message(1), b"".join(channels)))
    assert len(messages) == 1 and "bytes of their descriptions" in note


def test_profiles_of_quality_of_service_are_those_of_the_text():
    never = "{sec: 9223372036, nsec: 854775807}"
    text = (
        "- history: 1\n  depth: 9\n  reliability: 1\n  durability: 2\n  liveliness: 1\n"
        f"  deadline: {never}\n  lifespan: {never}\n  liveliness_lease_duration: {never}\n"
        "  avoid_ros_namespace_conventions: false\n"
    )
    assert [each.depth for each in parsed_qos(text)] == [9]
    assert parsed_qos(text * 1000) == parsed_qos("- &a 1") == parsed_qos("[" * 10_000) == []


# Names.


def test_a_written_file_has_the_number_that_reindex_looks_for(tmp_path):
    file = BagFile(tmp_path / "bag")
    file.declare("/instruction", "std_msgs/msg/String")
    file.write("/instruction", said("lift", 1).data, 1)
    file.close()
    assert sorted(each.name for each in (tmp_path / "bag").iterdir()) == ["bag_0.mcap", "metadata.yaml"]
    assert metadata(tmp_path / "bag")["relative_file_paths"] == ["bag_0.mcap"]
    assert read(tmp_path / "bag") == ([said("lift", 1)], [])
    assert [each.name for each in TABLE.glob("*.mcap")] == ["table_0.mcap"]
