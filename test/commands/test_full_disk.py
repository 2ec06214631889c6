"""Tests of the commands on a disk without room: one line with path and size, nothing half-made, and the same
command again finishes the work."""

import shutil

import pytest
from lerobot_sets import GRIPPER, STATIC, DatasetPlan, make
from paths import ROOT
from runs import JOINT, recipe_file, write_demonstrations
from small_disk import small_disk

from deer_vla_ros.__main__ import main
from deer_vla_ros.model.checkpoint import EMBEDDED

TABLE = str(ROOT / "test" / "data" / "table")
SEARCH = ("--fraction", "0.5", "--chains", "1", "--steps", "1", "--trials", "1", "--jobs", "1")
CALIBRATE = ("calibrate", "table", "--episodes", "5", "--steps", "45", "--checkpoint", "OUT")
COLUMNS = f"--static {STATIC} --gripper {GRIPPER} --state observation.state --gripper-range 1 0".split()
CASES = {
    # the words of the command; the most bytes of a file; the file or folder that is named; what there then is
    "budget": (("budget", "--plot", "OUT/budget.png"), 2**12, "budget.png", set()),
    "budget --json": (("budget", "--fraction", "0.5", "--json", "OUT/b.json"), 0, "b.json", set()),
    "convert-bag": (("convert-bag", TABLE, "--out", "OUT/data"), 2**12, "data/training", set()),
    "convert-bag lerobot": (("convert-bag", TABLE, "--format", "lerobot", "--out", "OUT/data"), 2**12,
                            "out/data", set()),
    "convert-bag lerobot-png": (("convert-bag", TABLE, "--format", "lerobot-png", "--out", "OUT/data"), 2**12,
                                "out/data", set()),
    "convert-lerobot": (("convert-lerobot", "DATA/lerobot", "--out", "OUT/data", *COLUMNS), 2**10,
                        "data/training", set()),
    "search": (("search", *SEARCH, "--study", "OUT/study"), 0, "study", set()),
    "train": (("train", "--config", "DATA/recipe.yaml", "--data", "DATA", "--out", "OUT/train"), 2**20,
              "state.safetensors", {"log.jsonl"}),
    "replay": (("replay", TABLE, "--out", "OUT/replay", "--duration", "1"), 2**15, "replay", set()),
    "calibrate": (CALIBRATE, 2**12, "calibration.safetensors", {path.name for path in EMBEDDED.iterdir()}),
    "sim": (("sim", "--record", "OUT/bag", "--show", "open the drawer", "--seed", "5"), 2**15, "bag", set()),
    "record-demos": (("record-demos", "--demos", "1", "--jobs", "1", "--out", "OUT/demos"), 2**12,
                     "demos/shard-0000", set()),
    "record-demos calvin": (("record-demos", "--demos", "1", "--jobs", "1", "--format", "calvin", "--out",
                             "OUT/demos"), 2**12, "demos/episode_0000000.npz", set()),
    "evaluate": (("evaluate", "--chains", "0", "--trials", "1", "--steps", "1", "--jobs", "1", "--json",
                  "OUT/e.json"), 0, "e.json.partial.jsonl", set()),
}  # fmt: skip
LEROBOT = ("convert-bag lerobot", "convert-lerobot")
CHEAP = ("budget", "budget --json", "convert-bag", *LEROBOT, "search", "train")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_demonstrations(folder / "demos")
    recipe_file(folder, {**JOINT, "steps": 2})
    make(folder / "lerobot", DatasetPlan(codec="image"))
    return folder


@pytest.mark.parametrize(
    "name", [name if name in CHEAP else pytest.param(name, marks=pytest.mark.long) for name in CASES]
)
def test_a_command_on_a_full_disk_says_so_and_can_be_repeated(name, data, tmp_path, capsys):
    words, most, named, left = CASES[name]
    out = tmp_path / "out"
    shutil.copytree(EMBEDDED, out) if name == "calibrate" else out.mkdir()
    before = {path: path.read_bytes() for path in out.iterdir()}
    arguments = [word.replace("OUT", str(out)).replace("DATA", str(data)) for word in words]
    with small_disk(most):
        assert main(arguments) == 1
    *_, error = capsys.readouterr().err.strip().splitlines()
    assert error.startswith("error: ") and f"{named}" in error.split(" cannot be written (File too large)")[0]
    assert " free there: make room or give another place" in error and "partial-" not in error
    assert not list(out.rglob(".*")), "no leftovers"
    files = {path for path in out.rglob("*") if path.is_file() and "tensorboard" not in path.parts}
    assert {path.name for path in files} == left and all(path.stat().st_size for path in files)
    assert all(path.read_bytes() == content for path, content in before.items())
    assert main(arguments) in (0, 1)  # 1: an evaluation of one step carries out nothing
    assert not list(out.rglob(".*"))
    assert any(named.partition("/")[0] in str(path) for path in out.rglob("*")) or name == "evaluate"
