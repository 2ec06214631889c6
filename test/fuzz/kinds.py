"""The kinds of files that the package reads: how a small whole one is made, and everything that reads it.

To add a kind, write two functions of a folder and a line of KINDS. `make` fills an empty folder; `read` calls
the package's readers on it and uses what they return, as the commands do.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import deer_vla_ros.msg
import numpy as np
import torch
from bags import records, write
from lerobot_sets import GRIPPER, STATIC, DatasetPlan
from lerobot_sets import make as make_lerobot
from mutations import (
    Mutation,
    compressed,
    json_line,
    json_tree,
    npy_header,
    raw,
    safetensors_header,
    safetensors_json,
    text,
    yaml_tree,
    zip_member,
)
from paths import GOLDEN_COMPACT, ROOT
from rosbags.rosbag2 import CompressionMode, StoragePlugin
from runs import JOINT, recipe_file, write_demonstrations
from small_model import INFO, SMALL, small_model, small_tokenizer

from deer_vla_ros.bag.bag_folder import METADATA
from deer_vla_ros.bag.calvin_files import (
    ANNOTATIONS,
    IMAGES,
    RECORDINGS,
    SHAPES,
    Annotation,
    CalvinStep,
    read_action_space,
    read_annotations,
    read_step,
    write_action_space,
    write_annotations,
    write_step,
)
from deer_vla_ros.bag.cdr import from_cdr, to_cdr
from deer_vla_ros.bag.conversion import convert
from deer_vla_ros.bag.golden import compare
from deer_vla_ros.bag.golden import write as write_golden
from deer_vla_ros.bag.observed import Account, observed
from deer_vla_ros.bag.rows import STEP_TYPE, Row, row_of
from deer_vla_ros.budget.calibration import CALIBRATION, Calibration, Episode, measure
from deer_vla_ros.budget.latency import TABLE as LATENCIES
from deer_vla_ros.budget.latency import LatencyModel, LatencyTable
from deer_vla_ros.files import write_json
from deer_vla_ros.inference.types import Observation
from deer_vla_ros.lab.calvin import calvin_sequences
from deer_vla_ros.lab.calvin.calvin_sequences import TASK_RULES
from deer_vla_ros.lab.calvin.calvin_wordings import enriched
from deer_vla_ros.lab.demonstrations.record_store import CalvinStore, FrameStore
from deer_vla_ros.lab.lerobot.lerobot_columns import LerobotColumns
from deer_vla_ros.lab.lerobot.lerobot_folder import LerobotFolder
from deer_vla_ros.lab.lerobot.lerobot_reading import LerobotMoments
from deer_vla_ros.lab.parity.reference_tensors import read_arrays, read_json, recorded_network
from deer_vla_ros.lab.scoring.benchmark import Group
from deer_vla_ros.lab.scoring.chain_run import Attempt
from deer_vla_ros.lab.scoring.evaluation_run import _results_of
from deer_vla_ros.lab.scoring.resume_file import ResumeFile
from deer_vla_ros.lab.scoring.sentences import Sentence, read_sentences
from deer_vla_ros.lab.search.search import search
from deer_vla_ros.lab.search.search_task import Outcome
from deer_vla_ros.lab.training.frames import ARRAYS, Frames
from deer_vla_ros.lab.training.optimisation import Stage
from deer_vla_ros.lab.training.recipe import Recipe, Train
from deer_vla_ros.lab.training.trainer import StageState, Trainer, read_log
from deer_vla_ros.model.action_space import TABLETOP
from deer_vla_ros.model.checkpoint import CONFIG, EMBEDDED, TOKENIZER, WEIGHTS, Checkpoint, load, save
from deer_vla_ros.model.convert_released import read_tokenizer
from deer_vla_ros.model.released_files import open_clip, open_deer
from deer_vla_ros.model.text import InstructionTokenizer
from deer_vla_ros.ros import parameters

SECONDS = 0.35
"""The length of the recordings: four pairs of frames."""


@dataclass(frozen=True)
class Kind:
    """make: fills an empty folder. file: the path in it that is changed. read: reads the folder."""

    name: str
    file: str
    make: Callable[[Path], object]
    read: Callable[[Path], object]
    mutations: tuple[Mutation, ...]


# Recordings and parameters


def _bag(storage: StoragePlugin, compression: CompressionMode = CompressionMode.NONE):
    return lambda folder: write(folder / "bag", records(seconds=SECONDS), storage, compression)


@functools.cache
def _settings():
    given = parameters.from_file(None)
    return parameters.controller_settings(given), parameters.action_space(given, TABLETOP)


def _read_bag(folder: Path) -> None:
    """Makes a data set of it, which reads every topic that the package uses."""
    settings, space = _settings()
    seen = observed(folder / "bag", Account(), settings.rate_hz, settings.inputs, space.frame, {})
    convert([(folder / "bag", seen)], folder / "set", space, settings.rate_hz, "measured")
    shutil.rmtree(folder / "set")


def _read_parameters(folder: Path) -> None:
    given = parameters.from_file(folder / "params.yaml")
    parameters.controller_settings(given)
    parameters.action_space(given, TABLETOP)


# A checkpoint


def _checkpoint(folder: Path) -> None:
    save(folder, Checkpoint(INFO, small_model(), small_tokenizer()), "# Small\n")


def _read_checkpoint(folder: Path) -> None:
    load(folder).tokenizer.encode(["push the red block", "a" * 200 + "!"])


def _read_tokenizer(folder: Path) -> None:
    InstructionTokenizer.from_file(folder / TOKENIZER, 32).encode(
        ["lift the red block", "a" * 200 + "! 1", ""]
    )


def _calibration(folder: Path) -> None:
    _checkpoint(folder)
    random = np.random.default_rng(0)
    seen = [
        Observation(
            random.integers(256, size=(16, 16, 3), dtype=np.uint8),
            random.integers(256, size=(16, 16, 3), dtype=np.uint8),
        )
        for _ in range(20)
    ]
    measure(load(folder), [Episode("push the red block", seen)], {"steps": "20"}).save(folder)


def _read_calibration(folder: Path) -> None:
    found = Calibration.load(folder)
    found.check(SMALL.exits, "l2")
    for count in range(1, len(SMALL.exits) + 1):
        found.path(count)
    assert found.deviations.shape == found.deltas.shape
    [str(value) for value in found.provenance.values()]


def _read_latencies(folder: Path) -> None:
    model = LatencyModel([1.0] * SMALL.decoder.layers)
    model.use(LatencyTable.load(folder / LATENCIES))
    model.expected(2, 1), model.high(6, 3)


def _released(folder: Path) -> None:
    from test_convert_released import Files

    Files(folder, "3b")


def _deer(folder: Path) -> None:
    tensors = {f"lang_encoder.blocks.{number}.weight": torch.ones(number, 99) for number in range(1, 20)}
    torch.save({"epoch": 3, "model_state_dict": tensors}, folder / "deer.pth")


def _read_deer(folder: Path) -> None:
    for tensor in open_deer(folder / "deer.pth").tensors.values():
        tensor.sum()


def _read_clip(folder: Path) -> None:
    for tensor in open_clip(folder / "clip.pt").values():
        tensor.sum()


def _read_released_tokenizer(folder: Path) -> None:
    rows = json.loads((GOLDEN_COMPACT / "3b_keys.json").read_bytes())["len_tokenizer"]
    read_tokenizer(folder / "tokenizer.json", rows, 32)


# Data for training


def _calvin(folder: Path) -> None:
    images = [np.arange(size * size * 3, dtype=np.uint8).reshape(size, size, 3) for size in (200, 84)]
    write_step(folder, 7, CalvinStep(*images, *(np.linspace(0, 1, *shape) for shape in SHAPES.values())))
    write_annotations(folder, [Annotation(7, 8, "lift", "lift it"), Annotation(9, 12, "push", "push it")])
    write_action_space(folder, TABLETOP, rate_hz=10.0)


def _calvin_of_numpy_1(folder: Path) -> None:
    """Annotations as CALVIN's own are: numpy's numbers, an embedding, and the names of numpy 1."""
    found = {
        "language": {"ann": ["lift it"], "task": ["lift"], "emb": np.ones((1, 1, 384), np.float32)},
        "info": {"indx": [(np.int64(7), np.int64(71))], "episodes": []},
    }
    path = folder / ANNOTATIONS
    path.parent.mkdir()
    np.save(path, np.array(found, object), allow_pickle=True)


def _read_shards(folder: Path) -> None:
    frames = Frames([folder / "demos"])
    frames.all_phrasings()
    numbers = np.arange(min(len(frames), 100))
    for name in ARRAYS:
        frames.gather(name, numbers)
    assert frames.episodes >= 0
    FrameStore(folder / "demos", 64).found()


def _calvin_shards(folder: Path) -> None:
    about = {"seed": 3, "tasks": ["lift"], "policy": None, "phrasings": {"lift": ["lift it"]}}
    annotations = [[0, 20, "lift", "lift it"], [20, 35, "lift", "lift it"]]
    write_json(folder / "shard-0000.json", {**about, "episodes": 2, "annotations": annotations})


def _read_calvin_shards(folder: Path) -> None:
    store = CalvinStore(folder)
    store.found()
    store.finish()
    (folder / RECORDINGS).unlink()
    shutil.rmtree(folder / ANNOTATIONS.parent)
    (folder / "ep_start_end_ids.npy").unlink()


TRAIN = Train(Stage.EXIT, ("demos",), 9, 8, cache=True)


_model = functools.cache(small_model)


def _trainer(folder: Path) -> Trainer:
    model = _model().requires_grad_(True)
    state = StageState(folder / "stage-1-exit", {"seed": 0, "network layers": 6})
    return Trainer(model, TRAIN, None, 2, 0, state)


def _train_state(folder: Path) -> None:
    trainer = _trainer(folder)
    for parameter in trainer._optimiser.parameters():
        parameter.grad = torch.ones_like(parameter)
    trainer._optimiser.step()
    trainer.save()


def _train_log(folder: Path) -> None:
    lines = [{"stage": "stage-1-joint", "step": step, "loss": 1.5, "parts": {}} for step in (1, 2, 3)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _read_recipe(folder: Path) -> None:
    recipe = Recipe.read(folder / "recipe.yaml")
    recipe.network.config()


def _lerobot(version: str, codec: str):
    return lambda folder: make_lerobot(folder / "lerobot", DatasetPlan(version, (12, 9), codec))


def _read_lerobot(folder: Path) -> None:
    columns = LerobotColumns(STATIC, GRIPPER, ("observation.state",), gripper_open=0.0, gripper_closed=1.0)
    moments = LerobotMoments(LerobotFolder(folder / "lerobot"), columns, TABLETOP, 10.0)
    convert(moments.recordings(moments.episodes()), folder / "set", TABLETOP, 10.0, "measured")
    shutil.rmtree(folder / "set")


# Scoring, search, parity


ARGUMENTS = {"seed": 1, "budget": {"exit": 3}, "dtype": "float32"}
ATTEMPT = Attempt("lift", "lift it", "training", 0, True, True, 12, None, 6, {1: 3, 5: 9})


def _resume(folder: Path) -> None:
    file = ResumeFile(folder / "report.json.partial.jsonl", ARGUMENTS)
    for key in ("chains 0", "lift 0"):
        file.add(key, [[dataclasses.asdict(ATTEMPT)], []])


def _read_resume(folder: Path) -> None:
    file = ResumeFile(folder / "report.json.partial.jsonl", ARGUMENTS)
    for group in (Group(None, (0, 1)), Group(Sentence("lift", "", ""), (0, 1))):
        if group.key in file.done:
            _results_of(group, file.done[group.key])


def _wordings(folder: Path) -> None:
    (folder / "plain.json").write_text(json.dumps({"lift": ["lift it", "grasp it"], "push": ["push it"]}))


def _read_wordings(folder: Path) -> None:
    assert all(
        each.text and each.wording == "plain"
        for each in read_sentences([folder / "plain.json"], ["lift", "push"])
    )


@functools.cache
def _sequences() -> tuple[calvin_sequences.CalvinSequence, ...]:
    return calvin_sequences.generate(4)


def _calvin_sequences(folder: Path) -> None:
    chains = [[dataclasses.asdict(each.state), each.tasks] for each in _sequences()]
    (folder / "eval_sequences.json").write_text(json.dumps(chains))


def _read_calvin_sequences(folder: Path) -> None:
    for sequence in calvin_sequences.read(folder / "eval_sequences.json", TASK_RULES):
        robot, scene = calvin_sequences.start_of(sequence.state)
        assert (robot.shape, scene.shape, len(sequence.tasks)) == ((15,), (24,), 5)


def _enriched_by_chain(folder: Path) -> None:
    texts = [[f"please {task}.\n\nNow" for task in sequence.tasks] for sequence in _sequences()]
    (folder / "words.json").write_text(json.dumps(texts))


def _enriched_by_task(folder: Path) -> None:
    texts = {task: [f"please {task}", f"{task} now.\n\nNow"] for task in TASK_RULES}
    (folder / "words.json").write_text(json.dumps(texts))


def _read_enriched(folder: Path) -> None:
    for sequence, five in zip(_sequences(), enriched(folder / "words.json", _sequences()), strict=True):
        assert tuple(each.task for each in five) == sequence.tasks
        [each.text.encode() for each in five]


def _search(folder: Path, score: Callable) -> None:
    candidates = [np.linspace(0.1, 1, 10)] * 2
    search(score, (0.5, 0.5, 1e8), 2.0, candidates, 3, folder / "study.journal")


def _rows() -> list[Row]:
    message = deer_vla_ros.msg.PolicyStep()
    message.header.stamp.sec = 3
    rows = [row_of(from_cdr(to_cdr(message), STEP_TYPE)) for _ in range(3)]
    return [{**row, "stamp": row["stamp"] + number} for number, row in enumerate(rows)]


@functools.cache
def _stored() -> dict[str, torch.Tensor]:
    arrays = read_arrays(GOLDEN_COMPACT / "3b_weights.npz")
    return {name: torch.from_numpy(array).float() for name, array in arrays.items()}


def _read_keys(folder: Path) -> None:
    path = folder / "3b_keys.json"
    recorded_network(read_json(path), _stored(), path)


KINDS = {
    kind.name: kind
    for kind in (
        *(
            Kind(f"bag-{name}", f"bag/bag{suffix}", _bag(storage, how), _read_bag, (raw, *inner))
            for name, suffix, storage, how, inner in (
                ("mcap", ".mcap", StoragePlugin.MCAP, CompressionMode.NONE, ()),
                ("mcap-chunks", ".mcap", StoragePlugin.MCAP, CompressionMode.STORAGE, ()),
                ("mcap-messages", ".mcap", StoragePlugin.MCAP, CompressionMode.MESSAGE, ()),
                ("mcap-file", ".mcap.zstd", StoragePlugin.MCAP, CompressionMode.FILE, (compressed(raw),)),
                ("sqlite", ".db3", StoragePlugin.SQLITE3, CompressionMode.NONE, ()),
                ("sqlite-messages", ".db3", StoragePlugin.SQLITE3, CompressionMode.MESSAGE, ()),
                ("sqlite-file", ".db3.zstd", StoragePlugin.SQLITE3, CompressionMode.FILE, (compressed(raw),)),
            )
        ),
        Kind("bag-metadata", f"bag/{METADATA}", _bag(StoragePlugin.MCAP), _read_bag, (raw, text, yaml_tree)),
        Kind(
            "params",
            "params.yaml",
            lambda folder: shutil.copy(ROOT / "config" / "deer_vla.yaml", folder / "params.yaml"),
            _read_parameters,
            (raw, text, yaml_tree),
        ),
        Kind("config", CONFIG, _checkpoint, _read_checkpoint, (raw, text, json_tree, json_tree)),
        Kind("weights", WEIGHTS, _checkpoint, _read_checkpoint, (raw, safetensors_header)),
        Kind(
            "tokenizer",
            TOKENIZER,
            lambda folder: shutil.copy(EMBEDDED / TOKENIZER, folder),
            _read_tokenizer,
            (raw, text, json_tree, json_tree),
        ),
        Kind("tokenizer-words", TOKENIZER, _checkpoint, _read_tokenizer, (raw, text, json_tree, json_tree)),
        Kind(
            "calibration",
            CALIBRATION,
            _calibration,
            _read_calibration,
            (raw, safetensors_header, safetensors_json("about")),
        ),
        Kind(
            "latency",
            LATENCIES,
            lambda folder: write_json(folder / LATENCIES, {"parts": [[9.0, 1.0, 0.2]] * 4, "about": "here"}),
            _read_latencies,
            (raw, text, json_tree),
        ),
        Kind("released-deer", "deer.pth", _deer, _read_deer, (raw, zip_member(raw))),
        Kind("released-clip", "clip.pt", _released, _read_clip, (raw, zip_member(raw))),
        Kind(
            "released-tokenizer",
            "tokenizer.json",
            _released,
            _read_released_tokenizer,
            (raw, text, json_tree),
        ),
        Kind("calvin-annotations", str(ANNOTATIONS), _calvin, read_annotations, (raw, npy_header)),
        Kind("calvin-numpy-1", str(ANNOTATIONS), _calvin_of_numpy_1, read_annotations, (raw, npy_header)),
        Kind(
            "calvin-step",
            "episode_0000007.npz",
            _calvin,
            lambda folder: read_step(folder, 7, (*IMAGES, *SHAPES)),
            (raw, zip_member(raw), zip_member(npy_header)),
        ),
        Kind("recordings", RECORDINGS, _calvin, read_action_space, (raw, text, json_tree)),
        *(
            Kind(
                f"shard-{Path(file).stem}",
                f"demos/shard-0000/{file}",
                lambda folder: write_demonstrations(folder / "demos"),
                _read_shards,
                (raw, npy_header) if file.endswith(".npy") else (raw, text, json_tree),
            )
            for file in ("meta.json", "images.npy", "episode.npy", "valid.npy")
        ),
        *(
            Kind(f"lerobot-{name}", f"lerobot/{file}", _lerobot(version, codec), _read_lerobot, (raw, *inner))
            for name, file, version, codec, inner in (
                ("info", "meta/info.json", "v3.0", "h264", (text, json_tree)),
                ("episodes-lines", "meta/episodes.jsonl", "v2.1", "h264", (text, json_line)),
                ("tasks-lines", "meta/tasks.jsonl", "v2.1", "h264", (text, json_line)),
                ("episodes", "meta/episodes/chunk-000/file-000.parquet", "v3.0", "h264", ()),
                ("tasks", "meta/tasks.parquet", "v3.0", "h264", ()),
                ("rows", "data/chunk-000/file-000.parquet", "v3.0", "image", ()),
                ("h264", f"videos/chunk-000/{STATIC}/episode_000000.mp4", "v2.1", "h264", ()),
                ("av1", f"videos/{STATIC}/chunk-000/file-000.mp4", "v3.0", "av1", ()),
            )
        ),
        Kind("shard-calvin", "shard-0000.json", _calvin_shards, _read_calvin_shards, (raw, text, json_tree)),
        Kind(
            "train-state",
            "stage-1-exit/state.safetensors",
            _train_state,
            _trainer,
            (raw, safetensors_header, safetensors_json("about")),
        ),
        Kind(
            "train-log",
            "log.jsonl",
            _train_log,
            lambda folder: [(line["stage"], line["step"]) for line in read_log(folder / "log.jsonl")],
            (raw, text, json_line),
        ),
        Kind(
            "recipe",
            "recipe.yaml",
            lambda folder: recipe_file(folder, JOINT),
            _read_recipe,
            (raw, text, yaml_tree),
        ),
        Kind(
            "calvin-sequences",
            "eval_sequences.json",
            _calvin_sequences,
            _read_calvin_sequences,
            (raw, text, json_tree),
        ),
        *(
            Kind(f"calvin-enriched-{by}", "words.json", make, _read_enriched, (raw, text, json_tree))
            for by, make in (("chain", _enriched_by_chain), ("task", _enriched_by_task))
        ),
        Kind("wordings", "plain.json", _wordings, _read_wordings, (raw, text, json_tree)),
        Kind("resume", "report.json.partial.jsonl", _resume, _read_resume, (raw, text, json_line)),
        Kind(
            "search-study",
            "study.journal",
            lambda folder: _search(folder, lambda thresholds: Outcome(1.0, 1.0)),
            lambda folder: _search(folder, lambda thresholds: Outcome(1.0, 1.0)),
            (raw, text, json_line),
        ),
        Kind(
            "golden",
            "golden.csv",
            lambda folder: write_golden(_rows(), folder / "golden.csv"),
            lambda folder: compare(_rows(), folder / "golden.csv", 0.0),
            (raw, text),
        ),
        Kind(
            "parity-keys",
            "3b_keys.json",
            lambda folder: shutil.copy(GOLDEN_COMPACT / "3b_keys.json", folder),
            _read_keys,
            (raw, text, json_tree),
        ),
        Kind(
            "parity-arrays",
            "window.npz",
            lambda folder: np.savez(
                folder / "window.npz", **{f"a{n}": np.ones((n, 9)) for n in range(1, 20)}
            ),
            lambda folder: read_arrays(folder / "window.npz"),
            (raw, zip_member(raw), zip_member(npy_header)),
        ),
    )
}
