"""Makes a checkpoint folder from DeeR's released weights.

Example: the 3B network that was trained on CALVIN's split ABC:

    python -m deer_vla_ros convert --deer DeeR_task_ABC_D-exit-strategy/FILE.pth --clip ViT-L-14.pt \\
        --tokenizer tokenizer.json --thresholds abc --out ~/checkpoints/deer_3b_abc

--deer is DeeR's own file (huggingface.co/Yang130/DeeR-VLA). OpenFlamingo's and MPT-1B's files are not needed.
The 9B network also needs the final norm of mosaicml/mpt-7b (--mpt). --clip is ViT-L/14 as OpenAI's
TorchScript archive, as open_clip's file of the same weights (others have the same names), or as transformers'
file. --tokenizer is tokenizer.json of EleutherAI/gpt-neox-20b.

No pickle is run, and the weights never lie in memory at once. The folder appears as a whole or not at all.
docs/how-to/use-released-weights.md goes on from here.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from deer_vla_ros.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--deer", type=_path, required=True, metavar="FILE", help="DeeR's .pth file")
    parser.add_argument("--clip", type=_path, required=True, metavar="FILE", help="CLIP ViT-L/14")
    parser.add_argument(
        "--tokenizer", type=_path, required=True, metavar="FILE", help="tokenizer.json of the language model"
    )
    parser.add_argument(
        "--mpt",
        type=_path,
        metavar="FILE_OR_DIR",
        help="weights of the language model, for tensors that DeeR's file lacks; the 9B needs mpt-7b",
    )
    parser.add_argument(
        "--thresholds",
        choices=("d", "abc", "abcd", "none"),
        default="none",
        help="the thresholds that the authors published for the 3B of this split; none: full depth, until a "
        "budget is set (default: %(default)s)",
    )
    parser.add_argument("--out", type=_path, required=True, metavar="DIR", help="the checkpoint folder")
    parser.add_argument(
        "--dtype",
        choices=("float16", "bfloat16", "float32"),
        default="float16",
        help="number type of the weights in the folder (default: %(default)s)",
    )
    parser.add_argument(
        "--training", action="store_true", help="also write the heads that only training uses"
    )
    parser.add_argument(
        "--like",
        type=_path,
        metavar="CONFIG",
        help="config.json of a network whose numbers of attention heads are used, for networks that do not "
        "have the released sizes",
    )


def _path(text: str) -> Path:
    """A path in which the shell has not replaced `~`, as in --deer=~/FILE."""
    return Path(text).expanduser()


def run(args: argparse.Namespace) -> int:
    """Returns 0. Raises UserError if nothing could be converted; then there is no new folder."""
    import torch
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    from deer_vla_ros.model.convert_released import convert

    like = _network(args.like) if args.like else None
    with Progress(BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn()) as bar:
        task = bar.add_task("converting", total=None)
        done = convert(
            args.deer,
            args.clip,
            args.tokenizer,
            args.out,
            mpt=args.mpt,
            thresholds=args.thresholds,
            dtype=getattr(torch, args.dtype),
            for_training=args.training,
            like=like,
            on_progress=lambda written, of: bar.update(task, completed=written, total=of),
        )
    layers = done.info.model.decoder.layers
    print(
        f"{args.out}: {done.tensors} tensors, {done.size / 2**30:.2f} GiB, {layers} layers, exits after "
        f"{', '.join(str(layer + 1) for layer in done.info.model.exits)}"
    )
    if done.has_values:
        print("  the file's `values` hold deltas without actions: they are no calibration")
    print(f"  for budgets: python -m deer_vla_ros calibrate RECORDING --checkpoint {args.out}")
    return 0


def _network(path: Path):
    """The network of a checkpoint's config.json."""
    from deer_vla_ros.model.config import ModelConfig

    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--like {path} cannot be read ({error}): give a checkpoint's config.json") from error
    values = values.get("model", values) if isinstance(values, dict) else {}
    if not isinstance(values, dict):
        raise UserError(f"--like {path}: `model` is no mapping: give a checkpoint's config.json")
    return ModelConfig.from_dict(values)
