"""Tests with files that somebody forged: each is refused by one line, at once and in little memory."""

import io
import json
import pickle
import struct
import zipfile

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from deer_vla_ros import untrusted
from deer_vla_ros.bag import pickled_array
from deer_vla_ros.bag.calvin_files import (
    ANNOTATIONS,
    Annotation,
    read_annotations,
    read_step,
    write_annotations,
)
from deer_vla_ros.bag.pickled_array import read_pickled
from deer_vla_ros.budget.calibration import CALIBRATION, Calibration
from deer_vla_ros.budget.latency import TABLE, LatencyTable
from deer_vla_ros.errors import UserError
from deer_vla_ros.lab.training.frames import Frames
from deer_vla_ros.model.checkpoint import CONFIG, EMBEDDED, TOKENIZER, WEIGHTS, load_info
from deer_vla_ros.model.text import InstructionTokenizer

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


def refused(call, *arguments) -> str:
    with pytest.raises(UserError) as refusal:
        call(*arguments)
    assert len(str(refusal.value).splitlines()) == 1
    return str(refusal.value)


# The annotations, which are a pickle


def pickled(path, program: bytes) -> None:
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": ()})
        file.write(program)


@pytest.fixture
def whole(tmp_path) -> bytes:
    """The bytes of a whole file."""
    np.save(tmp_path / "whole.npy", np.array({"emb": np.ones((2, 3), np.float32)}, object), allow_pickle=True)
    return (tmp_path / "whole.npy").read_bytes()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        # The state of a number type: numpy itself believes the size and the flags.
        (b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00t", b"J\x00\x00\x00\x7fJ\xff\xff\xff\xffK\x00t"),
        (b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00t", b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x3ft"),
        # The shape of an array, the kind of object, and the beginning of numpy's arrays.
        (b"K\x02K\x03\x86", b"K\x02K\x04\x86"),
        (b"\x8c\x02f4", b"\x8c\x02O8"),
        (b"K\x00\x85", b"K\x09\x85"),
    ],
)
def test_a_forged_state_of_a_number_type_or_an_array_is_refused(tmp_path, whole, old, new):
    path = tmp_path / "forged.npy"
    path.write_bytes(whole)
    assert read_pickled(path)["emb"].tolist() == [[1.0] * 3] * 2
    assert whole.count(old)
    path.write_bytes(whole.replace(old, new))
    assert "not a file of one pickled object" in refused(read_pickled, path)


@pytest.mark.parametrize(
    "program",
    [
        b"\x80\x04Nr\xff\xff\xff\x7f.",  # a number under which an unpickler would make room for 2 billion
        b"\x80\x04" + b"]" * 5_000 + b".",
        b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b".",
        b"\x80\x04(h\x00.",
    ],
)
def test_a_program_that_would_take_much_memory_is_refused(tmp_path, program, monkeypatch):
    monkeypatch.setattr(pickled_array, "MOST_INSTRUCTIONS", 4_000)
    pickled(tmp_path / "forged.npy", program)
    refused(read_pickled, tmp_path / "forged.npy")


def saved(folder, **changes):
    """Writes annotations with numpy itself. changes: of `language` and `info`."""
    values = {"language": {"ann": ["lift it"], "task": ["lift"]}, "info": {"indx": [(0, 5)]}}
    array = np.empty((), object)
    array[()] = {**values, **changes}
    (folder / ANNOTATIONS).parent.mkdir(exist_ok=True)
    np.save(folder / ANNOTATIONS, array, allow_pickle=True)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<i", len(value)) + value.encode()


def number_type(code: str, rest: bytes) -> bytes:
    return b"cnumpy\ndtype\n" + text(code) + b"\x89\x88\x87R(K\x03" + rest + b"tb"


ARRAY = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R"
OBJECTS = number_type("O8", text("|") + b"NNN" + b"J\xff\xff\xff\xff" * 2 + b"K\x3f")
DOUBLED = b"K\x01" + b"".join(b"q%ch%c\x86" % (number, number) for number in range(60))
"""A tuple of two tuples that are the same, and so on: 2**60 numbers."""
DEEP = b"K\x01" + b"\x85" * 100_000


@pytest.mark.parametrize(
    "value",
    [DOUBLED, DEEP, b"K\x01" + DOUBLED + b"\x86", b"K\x01" + DEEP + b"\x86"],
    ids=["doubled", "deep", "doubled bound", "deep bound"],
)
@pytest.mark.parametrize("name", ["indx", "task", "ann"])
def test_an_endless_value_is_refused_at_once(tmp_path, name, value):
    values = {"indx": b"K\x00K\x05\x86", "task": text("t"), "ann": text("t")} | {name: value}
    entries = {each: text(each) + b"]" + content + b"as" for each, content in values.items()}
    language = text("language") + b"}" + entries["ann"] + entries["task"] + b"s"
    content = b"}" + language + text("info") + b"}" + entries["indx"] + b"s"
    (tmp_path / ANNOTATIONS).parent.mkdir()
    pickled(tmp_path / ANNOTATIONS, b"\x80\x03" + ARRAY + b"(K\x01)" + OBJECTS + b"\x89]" + content + b"atb.")
    assert "not CALVIN's annotations" in refused(read_annotations, tmp_path)


@pytest.mark.parametrize(
    "changes", [{"language": np.zeros(2)}, {"language": {"ann": 1}}, {"info": {"indx": np.zeros((1, 2))}}]
)
def test_annotations_of_other_types_are_refused(tmp_path, changes):
    saved(tmp_path, **changes)
    assert "not CALVIN's annotations" in refused(read_annotations, tmp_path)


def test_intervals_may_be_an_array(tmp_path):
    saved(tmp_path, info={"indx": np.array([[0, 5]])})
    assert read_annotations(tmp_path) == [Annotation(0, 5, "lift", "lift it")]


@pytest.mark.parametrize("protocol", [0, 1, 2, 5])
def test_another_pickle_protocol_is_told_how_to_be_saved_again(tmp_path, protocol):
    array = np.empty((), object)
    array[()] = {"emb": np.ones((2, 3), np.float32)}
    pickled(tmp_path / "other.npy", pickle.dumps(array, protocol))
    assert "numpy.save(path, array, allow_pickle=True)" in refused(read_pickled, tmp_path / "other.npy")


TEXTS = number_type("U20000", text("<") + b"NNNJ" + struct.pack("<i", 80_000) + b"K\x04K\x08")
SHARED_LIST = b"](" + b"N" * 20_000 + b"eq\x00" + OBJECTS + b"q\x01"
SHARED_TEXT = b"B" + struct.pack("<i", 80_000) + bytes(80_000) + b"q\x00" + TEXTS + b"q\x01"


@pytest.mark.parametrize(
    ("shared", "again"),
    [
        (SHARED_LIST, ARRAY + b"(K\x01M\x20\x4e\x85h\x01\x89h\x00tb"),
        (SHARED_TEXT, b"cnumpy.core.multiarray\nscalar\nh\x01h\x00\x86R"),
    ],
    ids=["arrays", "texts"],
)
def test_many_values_that_are_made_from_the_same_bytes_are_refused(tmp_path, shared, again):
    pickled(tmp_path / "forged.npy", b"\x80\x03" + shared + again * 2000 + b".")
    assert "take over" in refused(read_pickled, tmp_path / "forged.npy")


def test_what_this_package_writes_is_read(tmp_path):
    written = [Annotation(0, 5, "lift", "lift it"), Annotation(7, 9, "push", "schieb es, 推")]
    write_annotations(tmp_path, written)
    assert read_annotations(tmp_path) == written


# CALVIN's steps and folders


def test_a_step_that_declares_gigabytes_is_refused_before_they_are_reserved(tmp_path):
    for shape, kind in (((1_000_000_000,), "|u1"), ((60_000, 60_000, 3), "|u1"), ((7,), "|O")):
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": kind, "fortran_order": False, "shape": shape})
        with zipfile.ZipFile(tmp_path / "episode_0000007.npz", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("rgb_static.npy", header.getvalue() + bytes(1000))
        assert "not a step of CALVIN's format" in refused(read_step, tmp_path, 7, ["rgb_static"])


def test_the_folder_that_was_meant_is_named(tmp_path):
    assert "there is no such folder" in refused(read_annotations, tmp_path / "nowhere")
    write_annotations(tmp_path / "task_D_D" / "training", [Annotation(0, 5, "lift", "lift it")])
    assert f"give {tmp_path / 'task_D_D' / 'training'}" in refused(read_annotations, tmp_path / "task_D_D")
    training = tmp_path / "task_D_D" / "training"
    (training / ANNOTATIONS.parent).rename(training / "lang_all-mpnet-base-v2")
    assert "there are lang_all-mpnet-base-v2" in refused(read_annotations, training)
    lerobot = tmp_path / "lerobot"
    (lerobot / "meta").mkdir(parents=True)
    (lerobot / "meta" / "info.json").write_text("{}")
    assert f"convert-lerobot {lerobot}" in refused(read_annotations, lerobot)
    assert f"convert-lerobot {lerobot}" in refused(Frames, [lerobot])


def test_a_pointer_of_git_lfs_is_called_that(tmp_path):
    for name in ("config.json", "model.safetensors", "tokenizer.json", "episode_0000007.npz"):
        (tmp_path / name).write_bytes(LFS)
    (tmp_path / ANNOTATIONS).parent.mkdir()
    (tmp_path / ANNOTATIONS).write_bytes(LFS)
    assert "git lfs pull" in refused(load_info, tmp_path)
    assert "git lfs pull" in refused(read_annotations, tmp_path)
    assert "git lfs pull" in refused(read_step, tmp_path, 7, ["rgb_static"])
    assert "git lfs pull" in refused(InstructionTokenizer.from_file, tmp_path / TOKENIZER, 8)


# Checkpoints


@pytest.mark.parametrize(
    ("part", "name"),
    [
        (part, name)
        for part, names in json.loads((EMBEDDED / CONFIG).read_bytes())["model"].items()
        if isinstance(names, dict)
        for name, value in names.items()
        if type(value) in (int, float)
    ],
)
def test_every_number_of_a_config_has_a_limit(tmp_path, part, name):
    values = json.loads((EMBEDDED / CONFIG).read_bytes())
    (tmp_path / WEIGHTS).touch(), (tmp_path / TOKENIZER).touch()
    for huge in (10**9, float("inf"), float("nan")):
        if type(values["model"][part][name]) is int or huge != 10**9:
            values["model"][part][name] = huge
            (tmp_path / CONFIG).write_text(json.dumps(values))
            assert f"{part}.{name}" in refused(load_info, tmp_path)


def tokenizer(path, **changes):
    values = json.loads((EMBEDDED / TOKENIZER).read_bytes())
    path.write_text(json.dumps({**values, **changes}))
    return path


SPLIT = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
REPLACE = {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""}
GROW = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 200}


@pytest.mark.parametrize(
    "changes",
    [
        {"pre_tokenizer": SPLIT},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [SPLIT]}},
        {"normalizer": REPLACE},
        {"normalizer": {"type": "Sequence", "normalizers": [GROW] * 4}},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        {"decoder": REPLACE},
        {"model": {"type": "Unigram", "unk_id": 0, "vocab": [["a", 0.0]]}},
        {"model": {"type": "BPE", "vocab": {"a": 0, "b": 2**40}, "merges": []}},
        {"added_tokens": [{"id": 2**31, "content": "x", "special": True}]},
    ],
)
def test_a_tokenizer_with_other_parts_is_refused_before_the_library_sees_it(tmp_path, changes):
    refused(InstructionTokenizer.from_file, tokenizer(tmp_path / TOKENIZER, **changes), 8)


def test_the_forms_of_released_tokenizers_are_read(tmp_path):
    own = json.loads((EMBEDDED / TOKENIZER).read_bytes())
    like_neox = tokenizer(
        tmp_path / "neox.json",
        truncation=None,
        padding=None,
        normalizer={"type": "NFC"},
        pre_tokenizer={"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
        post_processor={"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
        decoder={"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
        # Merges were written as one text before version 0.20 of the library.
        model={**own["model"], "merges": [" ".join(merge) for merge in own["model"]["merges"]]},
    )
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    template = {
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    }
    like_llama = tokenizer(
        tmp_path / "llama.json",
        normalizer={"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, space]},
        pre_tokenizer=None,
        post_processor={
            "type": "TemplateProcessing",
            **template,
            "pair": template["single"],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        decoder={
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
    )
    expected = InstructionTokenizer.from_file(EMBEDDED / TOKENIZER, 32).encode(["lift the red block"])[0]
    assert InstructionTokenizer.from_file(like_neox, 32).encode(["lift the red block"])[0].equal(expected)
    InstructionTokenizer.from_file(like_llama, 32)


def test_files_of_many_objects_are_refused_before_they_are_parsed(tmp_path, monkeypatch):
    monkeypatch.setattr(untrusted.json, "loads", lambda content: pytest.fail("it was parsed"))
    (tmp_path / WEIGHTS).touch()
    (tmp_path / TOKENIZER).touch()
    for name in (CONFIG, TABLE):
        (tmp_path / name).write_bytes(b"[" + b'{"":0},' * 200_000)
    assert "are the most that is read" in refused(load_info, tmp_path)
    assert "are the most that is read" in refused(LatencyTable.load, tmp_path / TABLE)
    for objects in (b'{"":0},' * 100_000, b"[]," * 1_100_000):
        (tmp_path / TOKENIZER).write_bytes(b"[" + objects)
        assert "objects or" in refused(InstructionTokenizer.from_file, tmp_path / TOKENIZER, 8)


# Calibrations


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("path.3.levels", lambda levels: levels * 0 + 5, "levels and shares from 0 to 1"),
        ("path.3.levels", lambda levels: levels - 1, "levels and shares from 0 to 1"),
        ("path.3.levels", lambda levels: levels[::-1], "rising"),
        ("path.3.levels", lambda levels: levels.astype(bool), "has the type bool"),
        ("path.3.shares", lambda shares: shares * np.nan, "levels and shares from 0 to 1"),
        ("path.3.shares", lambda shares: shares / 2, "sum is not 1"),
        ("path.3.shares", lambda shares: shares.astype(np.complex64), "has the type complex64"),
        ("deltas", lambda deltas: deltas.astype(np.complex64), "has the type complex64"),
        ("steps", lambda steps: steps.astype(np.float32), "has the type float32"),
        ("gripper", lambda gripper: gripper * np.nan, "probabilities"),
        ("gripper", lambda gripper: gripper + 1, "probabilities"),
        ("window_deltas", lambda deltas: deltas * np.nan, "not finite"),
    ],
)
def test_a_calibration_of_values_that_cannot_be_is_refused(tmp_path, name, change, told):
    with safe_open(EMBEDDED / CALIBRATION, "np") as file:
        arrays = {each: file.get_tensor(each) for each in file.keys()}
        about = file.metadata()
    arrays[name] = np.ascontiguousarray(change(arrays[name]))
    save_file(arrays, tmp_path / CALIBRATION, about)
    assert told in refused(Calibration.load, tmp_path)
