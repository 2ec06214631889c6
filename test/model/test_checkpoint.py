"""Tests of checkpoint folders: saving, loading, and messages for damaged folders."""

import dataclasses
import json
import pickle
import re
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_model import INFO, INSTRUCTION, SMALL, observations, small_model, small_tokenizer, with_decoder
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from deer_vla_ros.errors import Cancelled, UserError
from deer_vla_ros.inference.exit_rule import ExitRule
from deer_vla_ros.inference.policy import DeerPolicy
from deer_vla_ros.model.checkpoint import (
    CONFIG,
    EMBEDDED,
    README,
    TOKENIZER,
    WEIGHTS,
    Checkpoint,
    folder_of,
    load,
    save,
)
from deer_vla_ros.model.config import tabletop
from deer_vla_ros.model.network import state_shapes


@pytest.fixture
def folder(tmp_path) -> Path:
    save(tmp_path, Checkpoint(INFO, small_model(), small_tokenizer()), "made by a test\n")
    return tmp_path


@pytest.fixture(scope="module")
def large_folder(tmp_path_factory) -> Path:
    """A checkpoint of about 170 MB, as float16."""
    folder = tmp_path_factory.mktemp("large")
    config = with_decoder(
        dataclasses.replace(SMALL, vision=dataclasses.replace(SMALL.vision, width=32)),
        width=1024,
        heads=8,
        mlp_ratio=4,
        cross_attention_head_width=16,
    )
    save(folder, Checkpoint(INFO, small_model(), small_tokenizer()), "made by a test\n")
    change_config(folder, lambda values: values.update(model=config.to_dict()))
    shapes = state_shapes(config, for_training=False)
    save_file(
        {name: torch.zeros(shape, dtype=torch.float16) for name, shape in shapes.items()}, folder / WEIGHTS
    )
    return folder


def poses(checkpoint: Checkpoint) -> list[list[float]]:
    """What a policy with these weights does on four observations."""
    policy = DeerPolicy(
        checkpoint.model, checkpoint.tokenizer, ExitRule(SMALL.exits, checkpoint.info.thresholds)
    )
    policy.reset(INSTRUCTION)
    return [policy.step(observation).action.pose.tolist() for observation in observations(4)]


def test_what_was_saved_is_what_is_loaded(folder):
    saved, loaded = Checkpoint(INFO, small_model(), small_tokenizer()), load(folder, for_training=True)
    assert loaded.info == INFO
    before, after = saved.model.state_dict(), loaded.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    # Not to the bit: the tensors of the file have another alignment, and kernels then add in another order.
    np.testing.assert_allclose(poses(loaded), poses(saved), rtol=0, atol=1e-6)
    assert (folder / README).read_text() == "made by a test\n"


def test_a_loaded_network_is_ready_for_inference(folder):
    model = load(folder).model
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def test_weights_may_rest_in_half_precision(folder):
    save(folder, Checkpoint(INFO, small_model(), small_tokenizer()), "", dtype=torch.float16)
    assert {tensor.dtype for tensor in load_file(folder / WEIGHTS).values()} == {torch.float16}
    assert load(folder).model.dtype == torch.float32
    assert load(folder, dtype=torch.bfloat16).model.dtype == torch.bfloat16


def test_an_empty_path_names_the_embedded_checkpoint_which_can_be_loaded():
    assert folder_of("") == EMBEDDED
    checkpoint = load(EMBEDDED)
    assert checkpoint.info.model == tabletop()
    assert checkpoint.info.trained or "not trained" in checkpoint.info.weights
    assert "initialis" in (EMBEDDED / README).read_text() or checkpoint.info.trained


def test_a_user_may_name_a_folder_from_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert folder_of("~/weights") == tmp_path / "weights"


def refusal_of(folder: Path) -> str:
    """The one line with which `load` refuses."""
    with pytest.raises(UserError) as refusal:
        load(folder)
    message = str(refusal.value)
    assert "\n" not in message
    assert len(message) < 500
    return message


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, TOKENIZER])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    assert f"{name} is missing" in refusal_of(folder)


def test_a_missing_folder_is_named(tmp_path):
    assert str(tmp_path / "nowhere") in refusal_of(tmp_path / "nowhere")


def change_tensors(folder: Path, change: Callable[[dict], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def change_config(folder: Path, change: Callable[[dict], object]) -> None:
    values = json.loads((folder / CONFIG).read_text())
    change(values)
    (folder / CONFIG).write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda tensors: tensors.pop("resampler.latents"), "1 tensors are missing, first resampler.latents"),
        (lambda tensors: tensors.update(colour=torch.zeros(1)), "1 tensors are unknown, first colour"),
        (
            lambda tensors: tensors.update({"resampler.latents": torch.zeros(4, 8)}),
            "resampler.latents has shape (4, 8)",
        ),
        (lambda tensors: tensors.clear(), "tensors are missing"),
        (
            lambda tensors: tensors.update(
                {"resampler.latents": tensors["resampler.latents"].half().view(torch.int16)}
            ),
            "resampler.latents has the number type I16",
        ),
    ],
)
def test_weights_of_another_network_are_refused_by_the_tensors_name(folder, change, complaint):
    change_tensors(folder, change)
    message = refusal_of(folder)
    assert complaint in message and str(folder / WEIGHTS) in message


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda values: values.pop("delta"), "lacks ['delta']"),
        (lambda values: values.update(colour="red"), "unknown keys ['colour']"),
        (lambda values: values["model"]["decoder"].pop("width"), "model.decoder"),
        (lambda values: values["model"]["decoder"].update(layers=4), "3 thresholds for the 2 exits"),
        (lambda values: values["model"]["decoder"].update(width=32), "has shape"),
        (lambda values: values["action_space"].pop("frame"), "action_space"),
        (lambda values: values["action_space"].update(translation_m=0), "translation_m is 0"),
        (lambda values: values["action_space"].update(rate_hz="fast"), "action_space.rate_hz is 'fast'"),
        (lambda values: values["action_space"].update(frame=""), "frame is empty"),
        (lambda values: values.update(action_space=None), "action_space is None"),
        (lambda values: values.update(thresholds=[0.1]), "1 thresholds for the 3 exits"),
        (lambda values: values.update(thresholds=[0.1, "b", 1]), "thresholds[1] is 'b'"),
        (lambda values: values.update(thresholds=None), "thresholds is None"),
        (lambda values: values.update(trained="yes"), "trained is 'yes'"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_by_name(folder, change, complaint):
    change_config(folder, change)
    assert complaint in refusal_of(folder)


@pytest.mark.parametrize("content", [b"{", b"", b"null", b"[1, 2]", b"\xff\xfe\x00", b"42"])
def test_a_broken_config_is_refused_with_its_path_or_name(folder, content):
    (folder / CONFIG).write_bytes(content)
    assert CONFIG in refusal_of(folder)


@pytest.mark.parametrize("damage", ["empty", "truncated", "header", "text"])
def test_a_broken_weights_file_is_refused_with_its_path(folder, damage):
    path = folder / WEIGHTS
    whole = path.read_bytes()
    path.write_bytes(
        {"empty": b"", "truncated": whole[:-100], "header": whole[:30], "text": b"not a checkpoint " * 10}[
            damage
        ]
    )
    assert str(path) in refusal_of(folder)


@pytest.mark.parametrize(
    "content", [b"{", b"", b"{}", b"\x80\x04", b'{"version": "1.0", "model": {"type": "Telepathy"}}']
)
def test_a_broken_tokenizer_is_refused_with_its_path(folder, content):
    (folder / TOKENIZER).write_bytes(content)
    assert str(folder / TOKENIZER) in refusal_of(folder)


def test_a_tokenizer_without_the_special_tokens_is_refused(folder):
    Tokenizer(WordLevel({"<|endoftext|>": 0}, unk_token="<|endoftext|>")).save(str(folder / TOKENIZER))
    assert "special tokens ['<image>'" in refusal_of(folder)


def test_a_tokenizer_with_more_tokens_than_the_network_embeds_is_refused(folder):
    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
    tokenizer.add_tokens([f"word{i}" for i in range(20)])
    tokenizer.save(str(folder / TOKENIZER))
    assert "has token ids up to 31, the network embeds 16" in refusal_of(folder)


class Bomb:
    """A pickle that leaves a trace when it is loaded."""

    def __init__(self, trace: Path):
        self._trace = trace

    def __reduce__(self):
        return Path.touch, (self._trace,)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, TOKENIZER])
@pytest.mark.parametrize(
    "write",
    [lambda path, bomb: path.write_bytes(pickle.dumps(bomb)), lambda path, bomb: torch.save(bomb, path)],
)
def test_a_pickle_is_never_loaded(folder, name, write):
    trace = folder / "pickle_was_loaded"
    write(folder / name, Bomb(trace))
    refusal_of(folder)
    assert not trace.exists()


def test_a_load_tells_its_bytes_and_ends_where_it_is_told_to(folder):
    told = []
    load(folder, on_progress=lambda done, total: told.append((done, total)))
    (total,) = {total for _, total in told}
    heads = ("last_head.", "auxiliary_heads.")
    stored = {name: t for name, t in load_file(folder / WEIGHTS).items() if not name.startswith(heads)}
    assert total == sum(tensor.nbytes for tensor in stored.values())
    assert len(told) == len(stored) + 1 and told[0][0] == 0 and told[-1][0] == total
    assert told == sorted(told)

    def end(done: int, total: int) -> None:
        if done:
            raise Cancelled("enough")

    with pytest.raises(Cancelled, match="enough"):
        load(folder, on_progress=end)
    assert "read_ahead" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8", "int4"])
def test_a_load_needs_no_more_memory_than_the_loaded_weights(large_folder, dtype):
    measured = subprocess.run(
        [sys.executable, Path(__file__).with_name("measure_load.py"), large_folder, dtype],
        capture_output=True,
        text=True,
        check=True,
    )
    figures = json.loads(measured.stdout)
    assert figures["weights_mib"] > {"int8": 75, "int4": 45}.get(dtype, 150)
    assert figures["peak_over_weights"] <= 1.1, figures


def test_a_refused_checkpoint_can_be_repaired(folder):
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:-100])
    refusal_of(folder)
    (folder / WEIGHTS).write_bytes(whole)
    load(folder)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5990000000\n"


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, TOKENIZER])
def test_a_pointer_of_git_lfs_is_called_that(folder, name):
    (folder / name).write_bytes(LFS)
    assert re.search(f"{name} is a pointer of Git LFS.*run `git lfs pull`", refusal_of(folder))


def test_weights_that_were_saved_from_distributed_data_parallel_are_called_that(folder):
    change_tensors(
        folder, lambda tensors: [tensors.update({f"module.{n}": tensors.pop(n)}) for n in [*tensors]]
    )
    assert re.search(r"all \d+ names begin with module.: .* DistributedDataParallel", refusal_of(folder))


@pytest.mark.parametrize(
    ("name", "write", "told"),
    [
        ("deer.pth", lambda path: torch.save({}, path), "is a file of torch.*convert --deer .*deer.pth"),
        ("deer", lambda path: torch.save({}, path), "is a file of torch.*convert --deer"),
        (
            "pytorch_model.bin",
            lambda path: torch.save({}, path, _use_new_zipfile_serialization=False),
            "is a file of torch.*convert --deer",
        ),
        ("deer.pth", lambda path: path.write_bytes(LFS), "is a pointer of Git LFS.*git lfs pull"),
        ("model.zip", lambda path: zipfile.ZipFile(path, "w").close(), "is an archive: unpack it"),
        ("model.safetensors", lambda path: path.touch(), "is one file of a checkpoint: give its folder, /"),
        ("notes.txt", lambda path: path.touch(), "is a file: give a folder with config.json"),
    ],
)
def test_a_file_instead_of_a_folder_is_called_what_it_is(tmp_path, name, write, told):
    write(tmp_path / name)
    message = refusal_of(tmp_path / name)
    assert re.search(told, message) and str(tmp_path / name) in message


def test_released_files_without_a_checkpoint_are_named_with_the_command_that_makes_one(tmp_path):
    torch.save({}, tmp_path / "stg=post_5.pth")
    assert re.search(
        r"config.json is missing: stg=post_5.pth is there; .* convert --deer", refusal_of(tmp_path)
    )


def test_the_folders_of_hugging_faces_cache_lead_to_the_checkpoint(folder, tmp_path):
    cache = tmp_path / "models--me--arm"
    snapshot = cache / "snapshots" / "0123"
    (cache / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for name in (CONFIG, WEIGHTS, TOKENIZER):
        (cache / "blobs" / name).write_bytes((folder / name).read_bytes())
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    assert f"Hugging Face's cache: give its snapshot {snapshot}" in refusal_of(cache)
    load(snapshot)
    for blob in (cache / "blobs").iterdir():
        blob.unlink()
    assert "config.json is a link to ../../blobs/" in refusal_of(snapshot)
