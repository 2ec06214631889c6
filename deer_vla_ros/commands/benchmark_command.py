"""Times the node and the network, checks that budgets are kept, and shows what depth buys in closed loop.

Example: the commands behind the figures of the documentation, and two quick ones:

    python -m deer_vla_ros benchmark node --json out/node-latency.json
    python -m deer_vla_ros benchmark node --seconds 5
    python -m deer_vla_ros benchmark budgets --json out/budgets.json
    python -m deer_vla_ros benchmark budgets --episodes 20
    python -m deer_vla_ros benchmark latency --json out/latency.json
    python -m deer_vla_ros benchmark model --preset openflamingo_3b --random-weights --device cuda \\
        --json out/model.json --plot out/model.png
    python -m deer_vla_ros benchmark model --minutes 1
    python -m deer_vla_ros benchmark quantisation --episodes 20 --json out/quantisation.json
    python -m deer_vla_ros benchmark curve --chains 500 --static out/train/static_24/checkpoint \\
        --plot docs/images/curve.png
    python -m deer_vla_ros benchmark ablations --chains 200 --data out/train/data --json out/ablations.json

node: measures the time from a camera's stamp to the command. The policy node and a bare rclpy relay run side
by side, with two 640x480 rgb8 cameras at 30 Hz, as processes over DDS. The cameras show a demonstration at
the simulated table, or noise with --noise. The overhead is the node's stamp-to-command time without the
policy's own compute time; the ratio is the overhead divided by the relay's stamp-to-pose time. It is measured
on an idle machine and with every core loaded, with model.cpu_threads 1 and 0 (torch's choice). p50_ratio and
p99_ratio in the JSON are from the idle machine with 1. Logs of all processes are in `--out`.

budgets: compares requested and achieved means for `--budgets` averages across the feasible range, with the
governor off, over `--episodes` of 50 steps of the simulated table that the calibration did not use. It does
the same in a changed world, and reports the worst window of 200 steps with and without the governor. It also
checks that no step passes a peak.

latency: measures the milliseconds of every stage of a step on this machine, over 200 steps or for
`--minutes`. --json writes them as the table that `replay --latency-table` reads.

model: measures a step of one network on one device, at every exit and at static full depth: MACs, bytes of
weights, milliseconds of every stage, waits of the host, launches, memory, and the share of the roofline that
the same run measures. It compares the step at the paper's mean depth with the plain way to run all layers
(float32 weights under autocast, one pass of the vision transformer per camera, eager). --random-weights makes
a network of a `--preset` in memory; without it, the network is that of --checkpoint. `--minutes` bounds the
run; static full depth is always measured, and rows that found no time are named.

quantisation: loads one network with each number type of the weights, and shows all of them the same
`--episodes` of 50 steps of the simulated table. It compares the bytes of the layers; the milliseconds of the
language part and of a step through all layers; how far poses (at the same exit) and deltas are from those in
full precision; and how many steps take the same exit with the checkpoint's thresholds.

curve: average length of `--chains` chains over the MACs of the language part: the dynamic network with its
own thresholds, with several budgets and at each fixed exit, and every `--static` network at its full depth,
in the wordings of training or in others. Each point is a run of `evaluate`; it is kept in `--out` and not
repeated.

ablations: trains the `--recipe` with all parts of the method and without each part, calibrates, and scores
`--chains` chains at one average budget. Criteria and thresholds are compared on the network with all parts.
With --checkpoint they are compared on that network, and nothing is trained. After an interruption the same
command goes on.

`camera`, `relay`, `listener` and `load` are the processes that `node` starts. Without ROS_DOMAIN_ID it takes
a random domain. Without FASTRTPS_DEFAULT_PROFILES_FILE it sets up a shared memory segment that is large
enough for such images; the default segment of Fast DDS loses most of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import signal
import sys
import tempfile
import time
from pathlib import Path

from deer_vla_ros.commands.arguments import DTYPES, PHRASINGS, positive
from deer_vla_ros.errors import UserError
from deer_vla_ros.files import write_json
from deer_vla_ros.processes import keep_off_other_robots

STEPS = 50
"""Steps of an episode of the table."""
SHIFTED_EPISODES = 12
"""The fewest episodes for the settling time and two windows."""
FIRST_SEED = 500_000
"""The first seed of the episodes. It is far from the calibration's seeds."""
PARTS = ("camera", "relay", "listener", "load")
ENOUGH_SAMPLES = 300
"""With fewer samples, the 99th percentile depends on two or three of them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what",
        choices=("node", "budgets", "latency", "model", "quantisation", "curve", "ablations", *PARTS),
        metavar="WHAT",
        help=f"node, budgets, latency, model, quantisation, curve, ablations; {', '.join(PARTS)}: see above",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures as JSON")
    parser.add_argument(
        "--seconds", type=positive, default=15.0, help="node: time of each condition (default: %(default)s)"
    )
    parser.add_argument(
        "--goal",
        action="store_true",
        help="node: end with 1 if the overhead, idle with 1 thread, is above 2 x the relay's time at p50 or "
        "3 x at p99, or if there are fewer steps than frames",
    )
    parser.add_argument(
        "--noise",
        action="store_true",
        help="node, camera: the cameras show noise, so that every step takes the deepest exit",
    )
    parser.add_argument(
        "--checkpoint",
        default="",
        metavar="DIR",
        help="all but ablations: checkpoint folder (default: embedded); ablations: see above",
    )
    parser.add_argument(
        "--episodes",
        type=int,
        default=200,
        help="budgets, quantisation: episodes of 50 steps (default: %(default)s)",
    )
    parser.add_argument("--budgets", type=int, default=12, help="budgets: how many (default: %(default)s)")
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count(), help="budgets, curve: workers (default: all cores)"
    )
    parser.add_argument(
        "--chains",
        type=int,
        default=500,
        help="curve, ablations: chains of every point (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="curve, ablations: which set of chains (default: %(default)s)"
    )
    parser.add_argument(
        "--static",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="curve: checkpoint of a network without exits; repeat",
    )
    parser.add_argument(
        "--phrasings",
        choices=PHRASINGS,
        default="training",
        help="curve: wordings of the instructions, both: half and half (default: %(default)s)",
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="latency, model, quantisation: default %(default)s",
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="latency, model: number type of the weights, as model.dtype (default: %(default)s)",
    )
    parser.add_argument(
        "--backend",
        choices=("auto", "eager", "compiled", "graphs"),
        default="auto",
        help="model: what our steps run with, as the parameter model.backend (default: %(default)s)",
    )
    parser.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="latency, model, quantisation: of torch on a CPU (default: model all cores, others 1)",
    )
    parser.add_argument(
        "--preset", metavar="NAME", help="model: openflamingo_3b, openflamingo_9b or tabletop; see above"
    )
    parser.add_argument(
        "--random-weights", action="store_true", help="model: make the preset's network in memory"
    )
    parser.add_argument(
        "--layers",
        type=int,
        metavar="N",
        help="model: layers of the preset's network (default: all that the paper's static one has, 24 or 32)",
    )
    parser.add_argument(
        "--minutes",
        type=positive,
        default=10.0,
        metavar="M",
        help="latency: the most time; with fewer than 20 timed steps there is no result. model: the time of "
        "the run (default: %(default)s)",
    )
    parser.add_argument(
        "--recipe",
        type=Path,
        default=Path("config/training/ablation.yaml"),
        help="ablations: default %(default)s",
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=Path("out/train/data"),
        help="ablations: the recipe's data (default: %(default)s)",
    )
    parser.add_argument(
        "--fraction", type=float, default=0.35, help="ablations: of full depth (default: %(default)s)"
    )
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="PNG",
        help="curve, model: the plot's file (default: curve out/curve.png, model none)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("out/benchmark"),
        metavar="DIR",
        help="folder of logs (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Returns 0 after all measurements, and 1 if `--goal` asks for a goal that is missed. UserError
    otherwise. It ends all its processes."""
    if args.what in PARTS:
        # A late import: the process that starts the others must not have a thread of rclpy when it forks.
        from deer_vla_ros.lab.benchmarks import node_parts as benchmark_parts

        if args.what == "camera":
            benchmark_parts.camera(args.noise)
        else:
            getattr(benchmark_parts, args.what)()
        return 0
    started = time.monotonic()
    report = {
        "ablations": _ablations,
        "budgets": _budgets,
        "curve": _curve,
        "latency": _latency,
        "model": _model,
        "node": _node,
        "quantisation": _quantisation,
    }[args.what](args)
    if args.json:
        write_json(args.json, report)
    print(f"measured in {time.monotonic() - started:.0f} s")
    missed = report.get("missed_goals", []) if args.goal else []
    for goal in missed:
        print(f"missed: {goal}")
    return 1 if missed else 0


def _node(args: argparse.Namespace) -> dict[str, object]:
    """Measures the latency of the policy node."""
    from deer_vla_ros.lab.benchmarks.node_figures import missed_goals
    from deer_vla_ros.lab.benchmarks.node_run import measure

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C: the processes in order
    args.out.mkdir(parents=True, exist_ok=True)
    keep_off_other_robots()
    rows = measure(args.seconds, args.out, args.checkpoint, args.noise)
    quiet = rows[0]
    report = {
        "p50_ratio": quiet.p50_ratio,
        "p99_ratio": quiet.p99_ratio,
        "missed_goals": missed_goals(quiet),
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    print(
        f"idle: the node's overhead is {quiet.p50_ratio:.2f} x the relay beside it at p50, "
        f"{quiet.p99_ratio:.2f} x at p99; {quiet.p50_ratio_alone:.2f} x and {quiet.p99_ratio_alone:.2f} x "
        "the relay alone"
    )
    if min(row.samples for row in rows) < ENOUGH_SAMPLES:
        print(f"fewer than {ENOUGH_SAMPLES} samples in a condition: take p99 as a hint, or measure longer")
    return report


def _budgets(args: argparse.Namespace) -> dict[str, object]:
    """Compares requested and achieved means."""
    from deer_vla_ros.lab.benchmarks import budget_benchmark
    from deer_vla_ros.model.checkpoint import folder_of

    if args.budgets < 2:
        raise UserError(f"benchmark: --budgets is {args.budgets}: give 2 or more, for both ends of the range")
    if args.episodes < SHIFTED_EPISODES:
        raise UserError(
            f"benchmark: --episodes is {args.episodes}: give {SHIFTED_EPISODES} or more, for a window of 200 "
            "steps"
        )
    seeds = range(FIRST_SEED, FIRST_SEED + args.episodes)
    others = range(seeds.stop, seeds.stop + max(SHIFTED_EPISODES, args.episodes // 8))
    with tempfile.TemporaryDirectory() as scratch:
        rows, violations = budget_benchmark.measure(
            folder_of(args.checkpoint),
            seeds,
            STEPS,
            others,
            args.budgets,
            Path(scratch),
            args.processes,
            lambda line: print(line, flush=True),
        )
    named = {
        "held_out": f"{seeds.start} to {seeds.stop - 1}",
        "shifted": f"{others.start} to {others.stop - 1}",
    }
    report = budget_benchmark.report(rows, violations, named)
    print(
        f"worst error of a mean over {args.episodes * STEPS} steps: {report['worst_relative_error']:.1%}; "
        f"worst window in another world ({report['shift']}): "
        f"{report['worst_relative_error_shifted_governed']:.1%} with governor, "
        f"{report['worst_relative_error_shifted_ungoverned']:.1%} without; peaks passed: {violations}"
    )
    return report


def _latency(args: argparse.Namespace) -> dict[str, object]:
    """Measures a latency table."""
    import torch

    from deer_vla_ros.lab.benchmarks.latency_benchmark import measure
    from deer_vla_ros.lab.workers import progress_bar
    from deer_vla_ros.model.checkpoint import folder_of

    _check_device(args.device)
    torch.set_num_threads(max(1, args.threads or 1))
    with progress_bar() as bar:
        task = bar.add_task("measuring", total=None)
        table = measure(
            folder_of(args.checkpoint),
            args.device,
            args.dtype,
            args.minutes * 60,
            lambda done, total: bar.update(task, completed=done, total=total),
        )
    before, layer, probe = (sum(parts) / len(table.parts) for parts in zip(*table.parts))
    print(
        f"{table.about}: {before:.2f} ms before the layers, {layer:.3f} ms per layer, "
        f"{probe:.3f} ms per probe of the head"
    )
    return {"about": table.about, "parts": table.parts}


def _model(args: argparse.Namespace) -> dict[str, object]:
    """Measures a step of the network at every depth."""
    import torch
    from rich.progress import Progress

    from deer_vla_ros.lab.benchmarks import model_benchmark
    from deer_vla_ros.model.checkpoint import folder_of
    from deer_vla_ros.model.quantisation import types_of

    if args.random_weights and args.checkpoint:
        raise UserError("benchmark: --random-weights and --checkpoint were both given: give one of them")
    if not args.random_weights and (args.preset or args.layers):
        raise UserError(
            "benchmark: --preset and --layers describe a network without a file: add --random-weights"
        )
    _check_device(args.device)
    if args.threads:
        torch.set_num_threads(max(1, args.threads))

    dtype, bits = types_of(args.dtype, args.device)

    def make(device: torch.device, dtype: torch.dtype) -> model_benchmark.Subject:
        if args.random_weights:
            return model_benchmark.random_subject(
                args.preset or "openflamingo_3b", args.layers, device, dtype, bits=bits
            )
        return model_benchmark.checkpoint_subject(folder_of(args.checkpoint), device, dtype, bits)

    with Progress() as bar:
        task = bar.add_task("", total=1.0)

        def on_progress(what: str, share: float) -> None:
            if what != bar.tasks[task].description:  # also where there is no terminal for the bar
                print(f"{share:4.0%} of {args.minutes:g} minutes: {what}", flush=True)
            bar.update(task, completed=share, description=what)

        device = torch.device(args.device)
        report = model_benchmark.measure(make, device, dtype, args.minutes, on_progress, args.backend)
    report["command"] = shlex.join(["python", "-m", "deer_vla_ros", *sys.argv[1:]])
    print("\n".join(model_benchmark.text(report)))
    if args.plot:
        model_benchmark.draw(report, args.plot)
        print(f"plot: {args.plot}")
    return report


def _quantisation(args: argparse.Namespace) -> dict[str, object]:
    """Compares the number types of the weights."""
    import torch

    from deer_vla_ros.lab.benchmarks import quantisation_benchmark
    from deer_vla_ros.lab.scoring.table_episodes import table_episodes
    from deer_vla_ros.lab.workers import progress_bar
    from deer_vla_ros.model.checkpoint import folder_of

    if args.episodes < 1:
        raise UserError(f"benchmark: --episodes is {args.episodes}: give 1 or more")
    _check_device(args.device)
    torch.set_num_threads(max(1, args.threads or 1))
    seeds = range(FIRST_SEED, FIRST_SEED + args.episodes)
    number_types = (("float16",) if args.device == "cuda" else ("float32", "bfloat16")) + ("int8", "int4")
    with progress_bar() as bar:
        task = bar.add_task("steps", total=args.episodes * STEPS)
        rows = quantisation_benchmark.measure(
            folder_of(args.checkpoint),
            args.device,
            table_episodes(seeds, STEPS),
            number_types,
            lambda: bar.advance(task),
        )
    print("\n".join(quantisation_benchmark.text(rows)))
    return {"rows": rows, "seeds": [seeds.start, seeds.stop - 1], "torch": torch.__version__}


def _check_device(device: str) -> None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("benchmark: --device is cuda, but torch sees no GPU here: give cpu")


def _curve(args: argparse.Namespace) -> dict[str, object]:
    """Measures the average length of chains over cost."""
    from deer_vla_ros.lab.benchmarks import depth_curve
    from deer_vla_ros.model.checkpoint import folder_of, load_info

    folder, plot = folder_of(args.checkpoint), args.plot or Path("out/curve.png")
    found = depth_curve.points(folder, args.static)
    rows = depth_curve.measure(
        found,
        args.chains,
        args.seed,
        args.processes,
        args.out / "curve",
        lambda line: print(f"\n--- {line}", flush=True),
        args.phrasings,
    )
    wording = "" if args.phrasings == "training" else f", {args.phrasings} wordings"
    depth_curve.draw(rows, f"{args.chains} chains of five{wording}, {load_info(folder).weights[:60]}", plot)
    print(f"\n{'':32}length   95%            MMAC per step")
    for row in rows:
        low, high = row["average_length_ci"]
        name = f"{row['kind']} {row['label']}"
        print(
            f"{name:32}{row['average_length']:.2f}     {low:.2f} to {high:.2f}   "
            f"{row['llm_gmac_mean'] * 1e3:.2f}"
        )
    comparisons = depth_curve.headline(rows)
    for each in comparisons:
        if each.dynamic is None:
            print(f"no dynamic point is as long as {each.name}")
            continue
        low, high = each.difference_ci
        print(
            f"against {each.name}: dynamic, {each.dynamic['label']}, takes {each.saved:.2f} times fewer "
            "MACs; "
            f"its chains are longer by {each.difference:+.3f} (95%, chain by chain: {low:+.3f} to "
            f"{high:+.3f})"
        )
    print(f"plot: {plot}")
    return {"rows": rows, "headline": [dataclasses.asdict(each) for each in comparisons if each.dynamic]}


def _ablations(args: argparse.Namespace) -> dict[str, object]:
    """Measures what each part of the method contributes."""
    from deer_vla_ros.lab.benchmarks import ablations, depth_curve

    def on_progress(line: str) -> None:
        print(f"\n--- {line}", flush=True)

    def score(found: list[depth_curve.Point]) -> list[dict]:
        return depth_curve.measure(
            found, args.chains, args.seed, args.processes, args.out / "ablations", on_progress
        )

    setting = ablations.Setting(args.recipe, args.data, args.out / "ablations", args.processes, args.fraction)
    folders = (
        {ablations.ALL_PARTS: Path(args.checkpoint)}
        if args.checkpoint
        else ablations.networks(setting, on_progress)
    )
    rows = score(ablations.points(setting, folders, score, on_progress))
    print(f"\n{'':32}length   95%            share of the language part's full depth")
    for row in rows:
        low, high = row["average_length_ci"]
        print(
            f"{row['label']:32}{row['average_length']:.2f}     {low:.2f} to {high:.2f}   "
            f"{row['fraction']:.3f}"
        )
    return {"rows": rows, "recipe": str(args.recipe), "fraction": args.fraction}
