"""Makes the compact recording of the reference: a subset that is small enough to commit.

Example: python test/golden_compact/record.py ../shared/golden

Every array is copied as the reference recorded it, or left out; nothing is computed. `python -m deer_vla_ros
parity` reads the result like the whole recording. README.md lists what it contains.
"""

from __future__ import annotations

import argparse
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

MODELS = ("3b", "9b")
CLIP_TEXT_TOWER = (
    "vision_encoder.positional_embedding",
    "vision_encoder.text_projection",
    "vision_encoder.logit_scale",
    "vision_encoder.transformer.",
    "vision_encoder.token_embedding.",
    "vision_encoder.ln_final.",
)
DROPPED_RUNS = (
    "fixed_exit_5",
    "layerwise_exit_3",
    "layerwise_exit_5",
    "dyn_B",
    "dyn_C",
    "dyn_probe_mean",
    "dyn_probe_max",
    "dyn_probe_cosine",
    "dyn_maxlayer5",
)
HIDDEN_STATE_STEPS = 3
DROPPED_FORWARDS = ("fwd0/",)  # batch1 has the longer texts; training takes both batches.
# In float32 the rounding errors of these values grow from step to step.
DROPPED_FROM_TRAINING = ("grad_norm_per_param", "param_delta_l2")
KEPT_PREPROCESSING = ("gripper/", "shift4/")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="the whole recording (shared/golden)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    source, out = args.source, args.out
    shutil.copyfile(source / "tolerances.json", out / "tolerances.json")
    for name in ("text.json", "thresholds.json", "thresholds.npz"):
        shutil.copyfile(source / name, out / name)
    for model in MODELS:
        copy_json(source, out, f"{model}_keys.json", without_text_tower)
        copy_json(source, out, f"{model}_info.json", without_dropped_runs)
        copy_json(source, out, f"{model}_train.json", without_gradients)
        copy_json(source, out, f"{model}_train_fp64.json", lambda record: record)
        copy_arrays(source, out, f"{model}_train_fp64.npz", lambda name: True)
        copy_arrays(source, out, f"{model}_weights.npz", lambda name: not name.startswith(CLIP_TEXT_TOWER))
        copy_arrays(source, out, f"{model}_rollout.npz", lambda name: name.split("/")[0] not in DROPPED_RUNS)
        copy_arrays(source, out, f"{model}_window.npz", lambda name: not name.startswith(DROPPED_FORWARDS))
    copy_arrays(source, out, "preproc.npz", lambda name: name.startswith(KEPT_PREPROCESSING))
    size = sum(path.stat().st_size for path in out.iterdir() if path.suffix in (".npz", ".json"))
    print(f"{out}: {size / 1e6:.2f} MB")


def without_text_tower(keys: dict) -> dict:
    """The list of keys without the tensors that are left out of the weights."""
    return {
        **keys,
        "keys": [entry for entry in keys["keys"] if not entry["stored_as"].startswith(CLIP_TEXT_TOWER)],
    }


def without_dropped_runs(info: dict) -> dict:
    """The settings of the runs that are kept."""
    return {
        **info,
        "dynamic": {tag: settings for tag, settings in info["dynamic"].items() if tag not in DROPPED_RUNS},
    }


def without_gradients(record: dict) -> dict:
    """The training record without the values of single parameters."""
    stages = [
        {**kept_of(stage), "steps": [kept_of(step) for step in stage["steps"]]} for stage in record["stages"]
    ]
    return {**record, "stages": stages}


def kept_of(values: dict) -> dict:
    return {name: value for name, value in values.items() if name not in DROPPED_FROM_TRAINING}


def copy_json(source: Path, out: Path, name: str, subset: Callable[[dict], dict]) -> None:
    (out / name).write_text(
        json.dumps(subset(json.loads((source / name).read_text())), separators=(",", ":")) + "\n"
    )


def copy_arrays(source: Path, out: Path, name: str, keep: Callable[[str], bool]) -> None:
    """Copies the arrays for whose names `keep` is true. Hidden states of whole runs are cut to their first
    steps.

    The same input gives the same bytes.
    """
    with (
        np.load(source / name) as arrays,
        zipfile.ZipFile(out / name, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as file,
    ):
        for key in filter(keep, arrays.files):
            array = arrays[key][:HIDDEN_STATE_STEPS] if key.endswith("/hidden_states") else arrays[key]
            entry = zipfile.ZipInfo(f"{key}.npy")  # Its date is always 1980: a new run gives the same bytes.
            entry.compress_type = zipfile.ZIP_DEFLATED
            with file.open(entry, "w") as member:
                np.lib.format.write_array(
                    member, np.ascontiguousarray(array) if array.ndim else array, allow_pickle=False
                )


if __name__ == "__main__":
    main()
