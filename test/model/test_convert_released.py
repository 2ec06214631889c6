"""Tests of the conversion of released files: exact, whole or not at all, and every fault named."""

import math
import re
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from full_size import write_full_size
from paths import GOLDEN_COMPACT
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from deer_vla_ros.errors import UserError
from deer_vla_ros.lab.parity.reference_tensors import model_config, read_arrays, read_json, read_model
from deer_vla_ros.model.checkpoint import load, load_info
from deer_vla_ros.model.config import PRESETS
from deer_vla_ros.model.convert_released import THRESHOLDS, convert
from deer_vla_ros.model.released_files import open_deer, open_mpt
from deer_vla_ros.model.text import END_OF_CHUNK, IMAGE, PAD


class Files:
    """The released files of one recorded network, as their authors would have saved them."""

    def __init__(self, folder: Path, name: str):
        self.folder, self.name = folder, name
        self.keys = read_json(GOLDEN_COMPACT / f"{name}_keys.json")
        stored = {
            key: torch.from_numpy(array).float()
            for key, array in read_arrays(GOLDEN_COMPACT / f"{name}_weights.npz").items()
        }
        self.weights = {entry["key"]: stored[entry["stored_as"]] for entry in self.keys["keys"]}
        names = [key.removeprefix("module.") for key in self.keys["checkpoint_keys"]]
        self.state = {f"module.{key}": self.weights[key] for key in names if key in self.weights}
        self.like = model_config(self.keys, self.weights)
        self.deer, self.clip = folder / "deer.pth", folder / "clip.pt"
        self.tokenizer, self.mpt = folder / "tokenizer.json", folder / "mpt.bin"
        self.write_deer()
        torch.save(self.visual(), self.clip)
        self.write_tokenizer(self.keys["len_tokenizer"] - 3)
        norm = {
            key.removeprefix("lang_encoder.").replace(".decoder_layer", ""): tensor
            for key, tensor in self.weights.items()
            if key.startswith("lang_encoder.transformer.norm_f")
        }
        torch.save(norm, self.mpt)

    def visual(self) -> dict[str, torch.Tensor]:
        """CLIP's visual tower by open_clip's names."""
        prefix = "vision_encoder."
        return {
            key.removeprefix(prefix): tensor
            for key, tensor in self.weights.items()
            if key.startswith(f"{prefix}visual.")
        }

    def write_deer(self, state: dict | None = None, **changes) -> None:
        content = {
            **self.keys["checkpoint_metadata"],
            "model_state_dict": self.state if state is None else state,
        }
        content |= {
            "optimizer_state_dict": {"state": {0: {"exp_avg": torch.zeros(3)}}},
            "values": torch.zeros(4, 9),
        }
        torch.save({**content, **changes}, self.deer)

    def write_tokenizer(self, size: int) -> None:
        words = {**{f"unused{number}": number for number in range(size)}}
        vocabulary = {number: word for word, number in words.items()}
        vocabulary |= {number: word for word, number in self.keys["tokenizer_vocab"].items() if number < size}
        tokenizer = Tokenizer(
            WordLevel({word: number for number, word in vocabulary.items()}, unk_token="<|endoftext|>")
        )
        tokenizer.pre_tokenizer = Whitespace()
        tokenizer.save(str(self.tokenizer))

    def convert(self, **how):
        given = {"like": self.like, "dtype": torch.float32, "mpt": self.mpt if self.name == "9b" else None}
        return convert(self.deer, self.clip, self.tokenizer, self.folder / "out", **{**given, **how})


@pytest.fixture(params=["3b", "9b"])
def files(request, tmp_path) -> Files:
    return Files(tmp_path, request.param)


@pytest.fixture
def small(tmp_path) -> Files:
    return Files(tmp_path, "3b")


def test_the_folder_has_the_very_weights_of_the_reference(files):
    done = files.convert(for_training=True)
    found = load(files.folder / "out", for_training=True)
    expected = read_model(GOLDEN_COMPACT, files.name).model
    assert found.info.model == expected.config == done.info.model
    ours = found.model.state_dict()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(ours[name], tensor), name
    words = found.tokenizer
    ids = [words._tokenizer.token_to_id(token) for token in (END_OF_CHUNK, IMAGE, PAD)]
    assert ids == [files.keys["eoc_token_id"], files.keys["media_token_id"], files.keys["pad_token_id"]]


def test_without_training_the_heads_that_never_act_stay_out_and_the_policy_is_the_same(files):
    files.convert()
    found = load(files.folder / "out")
    expected = read_model(GOLDEN_COMPACT, files.name).model.state_dict()
    ours = found.model.state_dict()
    left = {name for name in expected if name.startswith(("last_head.", "auxiliary_heads."))}
    assert left and ours.keys() == expected.keys() - left
    assert all(torch.equal(ours[name], expected[name]) for name in ours)
    with pytest.raises(UserError, match="heads.*convert --training"):
        load(files.folder / "out", for_training=True)


def transformers_names(files: Files) -> dict[str, torch.Tensor]:
    """CLIP's visual tower by the names of transformers, with separate q, k and v."""
    from deer_vla_ros.model.reference import reference_names

    found = {}
    for own, reference in reference_names(files.like, files.name == "9b").items():
        if own.startswith("vision.clip."):
            name, _, part = reference.partition("#")
            tensor = files.weights[name]
            tensor = tensor.chunk(3)["qkv".index(part)].contiguous() if part else tensor
            found[own.replace("vision.clip.", "vision_model.")] = tensor
    return found


class Tower(torch.nn.Module):
    """A module with CLIP's names, to be saved as TorchScript as OpenAI did."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        super().__init__()
        for name, tensor in tensors.items():
            module = self
            *path, last = name.split(".")
            for part in path:
                if part not in dict(module.named_children()):
                    module.add_module(part, torch.nn.Module())
                module = getattr(module, part)
            module.register_parameter(last, torch.nn.Parameter(tensor, requires_grad=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.parametrize(
    "kind", ["torchscript", "open_clip safetensors", "transformers safetensors", "transformers bin"]
)
def test_every_form_in_which_clip_is_published_gives_the_same_tower(small, kind):
    small.convert()
    first = load(small.folder / "out").model.state_dict()
    if kind == "torchscript":
        torch.jit.script(Tower(small.visual())).save(str(small.clip))
    elif kind == "open_clip safetensors":
        small.clip = small.folder / "open_clip.safetensors"
        save_file({name: tensor.clone() for name, tensor in small.visual().items()}, small.clip)
    elif kind == "transformers safetensors":
        small.clip = small.folder / "model.safetensors"
        save_file({name: tensor.clone() for name, tensor in transformers_names(small).items()}, small.clip)
    else:
        torch.save(transformers_names(small), small.clip)
    small.convert()
    second = load(small.folder / "out").model.state_dict()
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_published_thresholds_and_their_absence(small):
    with pytest.raises(
        UserError, match="--thresholds abc: 6 thresholds were published, this network has 3 exits"
    ):
        small.convert(thresholds="abc")
    assert all(len(found) == 6 for found in THRESHOLDS.values())
    assert small.convert().info.thresholds == (-1e8, -1e8, 1e8)
    assert "are no calibration" in (small.folder / "out" / "README.md").read_text()


# --- Faults: each is named with its remedy, and nothing is left under the final name.


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5000])


def damaged(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        name = next(each for each in archive.namelist() if each.endswith("data.pkl"))
        offset = archive.getinfo(name).header_offset
    data = bytearray(path.read_bytes())
    data[offset + 200 : offset + 400] = bytes(200)
    path.write_bytes(data)


def without(files: Files, *parts: str) -> None:
    files.write_deer(
        {name: tensor for name, tensor in files.state.items() if not any(part in name for part in parts)}
    )


def renamed(files: Files, change) -> None:
    files.write_deer({change(name): tensor for name, tensor in files.state.items()})


def with_nan(files: Files) -> None:
    state = dict(files.state)
    name = "module.perceiver.latents"
    state[name] = state[name].clone()
    state[name][0, 0] = math.nan
    files.write_deer(state)


def with_large_value(files: Files) -> None:
    state = dict(files.state)
    name = "module.perceiver.latents"
    state[name] = state[name].clone()
    state[name][0, 0] = 1e6
    files.write_deer(state)


def of_nine(files: Files) -> None:
    """DeeR's file of the 9B beside the tokenizer of the 3B. CLIP is the same for both released networks."""
    other = Files(files.folder / "nine", "9b") if (files.folder / "nine").mkdir() is None else None
    files.deer.write_bytes(other.deer.read_bytes())
    files.like, files.clip = other.like, other.clip


def wide_clip(files: Files) -> None:
    tower = files.visual()
    tower["visual.class_embedding"] = torch.zeros(768)
    torch.save(tower, files.clip)


class Program:
    """What a pickle may run when it is loaded."""

    def __reduce__(self):
        return (print, ("the pickle ran",))


def clip_for_larger_images(files: Files) -> None:
    """As ViT-L/14@336px: the tensors of ViT-L/14, but for more patches."""
    visual, name = files.visual(), "visual.positional_embedding"
    side = math.isqrt(len(visual[name]) - 1) + 2
    torch.save({**visual, name: torch.zeros(side**2 + 1, visual[name].shape[1])}, files.clip)


@pytest.mark.parametrize("prefix", ["", "module.", "module.module."])
def test_names_may_begin_with_the_prefix_of_distributed_data_parallel_or_not(prefix, tmp_path):
    state = {f"{prefix}perceiver.latents": torch.zeros(2), f"{prefix}lang_encoder.bias": torch.ones(3)}
    torch.save({"model_state_dict": state}, tmp_path / "deer.pth")
    torch.save({f"{prefix}transformer.wte.weight": torch.ones(3)}, tmp_path / "mpt.bin")
    assert set(open_deer(tmp_path / "deer.pth").tensors) == {"perceiver.latents", "lang_encoder.bias"}
    assert set(open_mpt(tmp_path / "mpt.bin")) == {"lang_encoder.transformer.wte.weight"}


FAULTS = {
    "a truncated download": (lambda f: cut(f.deer), "was cut short: download it again"),
    "a damaged file": (lambda f: damaged(f.deer), "download it again"),
    "a Git LFS pointer": (
        lambda f: f.deer.write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5990000000\n"
        ),
        "pointer of Git LFS.*git lfs pull",
    ),
    "a web page": (
        lambda f: f.deer.write_text("<!DOCTYPE html><html>404</html>"),
        "web page.*download the file itself",
    ),
    "an empty file": (lambda f: f.deer.write_bytes(b""), "is empty: download it again"),
    "no file": (lambda f: f.deer.unlink(), "cannot be read .*give an existing file"),
    "a folder": (lambda f: (f.deer.unlink(), f.deer.mkdir()), "is a folder: give the file in it"),
    "no torch file": (
        lambda f: f.deer.write_bytes(b"\x80\x02}q\x00." * 100),
        "no file that torch.save writes",
    ),
    "a program in the pickle": (
        lambda f: torch.save({"model_state_dict": f.state, "extra": Program()}, f.deer),
        "more than tensors and plain values.*not loaded",
    ),
    "OpenFlamingo's file": (
        lambda f: torch.save({name.removeprefix("module."): t for name, t in f.state.items()}, f.deer),
        "no model_state_dict.*OpenFlamingo's checkpoint; give DeeR's own file",
    ),
    "a name without the prefix of the others": (
        lambda f: f.write_deer({**f.state, "perceiver.latents": f.state["module.perceiver.latents"]}),
        "1 of .* names do not begin with module., first perceiver.latents",
    ),
    "a file of an old torch": (
        lambda f: torch.save({}, f.deer, _use_new_zipfile_serialization=False),
        "in the format before torch 1.6: load it with torch.load",
    ),
    "an archive": (
        lambda f: zipfile.ZipFile(f.deer, "w").close(),
        "is a zip archive: unpack it, and give the file that was in it",
    ),
    "missing tensors": (
        lambda f: without(f, "perceiver.norm.bias", "extra_exit.rnn.layers.1.weight"),
        "tensors are missing.*extra_exit.rnn.layers.1.weight, perceiver.norm.bias",
    ),
    "no decoder blocks": (
        lambda f: without(f, "old_decoder_blocks"),
        "the language model .give mosaicml/mpt-1b-redpajama-200b-dolly as --mpt",
    ),
    "extra tensors": (
        lambda f: f.write_deer({**f.state, "module.value_net.weight": torch.zeros(2)}),
        "1 tensors are unknown: value_net.weight",
    ),
    "a shape of another network": (
        lambda f: f.write_deer({**f.state, "module.perceiver.norm.bias": torch.zeros(5)}),
        "tensor perceiver.norm.bias has shape .5,.* not of the same network",
    ),
    "a value that is no number": (
        with_nan,
        "tensor perceiver.latents is not finite: download the file again",
    ),
    "a 9B file for the 3B": (of_nine, "final norm|norm_f|mosaicml/mpt-7b"),
    "settings that are not supported": (
        lambda f: f.write_deer(pooling="sampling"),
        "pooling is 'sampling', only 'max'",
    ),
    "no settings": (lambda f: f.write_deer(early_exit_layer=None), "early_exit_layer is None"),
    "a wrong CLIP": (wide_clip, "tower has width 768, the resampler takes 32: give ViT-L/14"),
    "a CLIP for larger images": (clip_for_larger_images, "takes images of .* give ViT-L/14"),
    "no CLIP": (
        lambda f: torch.save({"layer.weight": torch.zeros(2)}, f.clip),
        "no CLIP: .*give OpenAI's ViT-L-14.pt",
    ),
    "CLIP given as DeeR's file": (
        lambda f: torch.jit.script(Tower(f.visual())).save(str(f.deer)),
        "TorchScript archive.*give it as --clip",
    ),
    "a wrong tokenizer": (lambda f: f.write_tokenizer(300), "300 tokens.*but the network embeds 500"),
    "no tokenizer": (lambda f: f.tokenizer.write_text("{}"), "no tokenizer"),
    "a tokenizer with <action>": (lambda f: f.write_tokenizer(496), "adds <action>"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_named_with_the_remedy_and_leaves_nothing(small, fault, capfd):
    make, says = FAULTS[fault]
    make(small)
    with pytest.raises(UserError, match=says) as refusal:
        small.convert()
    assert "\n" not in str(refusal.value)
    assert not (small.folder / "out").exists() and not list(small.folder.glob(".out*"))
    assert "the pickle ran" not in capfd.readouterr().out


def test_one_of_several_shards_is_named(small):
    shard = small.folder / "model-00001-of-00002.safetensors"
    save_file({"a": torch.zeros(1)}, shard)
    small.clip = shard
    with pytest.raises(UserError, match="one of several shards"):
        small.convert()


def test_a_value_too_large_for_the_number_type_is_named(small):
    with_large_value(small)
    with pytest.raises(UserError, match="does not fit into torch.float16: give --dtype bfloat16 or float32"):
        small.convert(dtype=torch.float16)


def test_a_folder_that_is_no_checkpoint_is_never_replaced(small):
    out = small.folder / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="1 other files would be lost .thesis.tex."):
        small.convert()
    assert (out / "thesis.tex").read_text() == "years of work"
    (out / "thesis.tex").unlink()
    small.convert()  # an empty folder is replaced,
    small.convert(thresholds="none")  # and so is a checkpoint,
    small.deer = small.deer.rename(out / "deer.pth")  # but not with an input in it
    with pytest.raises(UserError, match="it holds .*deer.pth, which would be lost"):
        small.convert()
    assert small.deer.is_file() and load_info(out)


def test_a_9b_without_second_names_takes_its_blocks_from_mpt(tmp_path):
    nine = Files(tmp_path, "9b")
    whole = nine.convert()
    blocks = {
        key.removeprefix("lang_encoder.").replace(".decoder_layer", ""): tensor
        for key, tensor in nine.weights.items()
        if ".decoder_layer." in key or "norm_f" in key
    }
    torch.save(blocks, nine.mpt)
    without(nine, "old_decoder_blocks.", ".decoder_layer.")
    assert nine.convert().info.model == whole.info.model


def test_a_full_disk_is_named(small, monkeypatch):
    import shutil
    from types import SimpleNamespace

    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match="GiB are free: give another --out"):
        small.convert()


def test_the_9b_names_the_final_norm_that_only_mpt_brings(tmp_path):
    nine = Files(tmp_path, "9b")
    with pytest.raises(
        UserError, match="give mosaicml/mpt-7b as --mpt.: lang_encoder.transformer.norm_f.weight"
    ):
        nine.convert(mpt=None)
    folder = tmp_path / "mpt-7b"
    folder.mkdir()
    nine.mpt.rename(folder / "pytorch_model-00002-of-00002.bin")
    torch.save({"transformer.wte.weight": torch.zeros(2, 2)}, folder / "pytorch_model-00001-of-00002.bin")
    assert nine.convert(mpt=folder).tensors > 0


@pytest.mark.long  # It writes 14 GB.
def test_a_network_of_the_full_size_needs_little_memory(tmp_path):
    deer, clip, tokenizer = write_full_size(tmp_path)
    arguments = ("--deer", deer, "--clip", clip, "--tokenizer", tokenizer, "--out", tmp_path / "out")
    running = subprocess.Popen([sys.executable, "-m", "deer_vla_ros", "convert", *map(str, arguments)])
    peak = 0
    while running.poll() is None:
        # The pages of mapped files do not count: Linux drops them when it needs the memory.
        found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{running.pid}/status").read_text())
        peak = max(peak, int(found[1]) * 1024 if found else 0)
        time.sleep(0.01)
    assert running.returncode == 0
    assert load_info(tmp_path / "out").model == PRESETS["openflamingo_3b"]()
    assert 0 < peak < 1.5 * 2**30
    for path in (deer, clip, tmp_path / "out" / "model.safetensors"):
        path.unlink()  # pytest would keep them
