"""Predicts the time of a step on GPUs that nothing was measured on: `python scripts/predict_speed.py`.

For each GPU and each network it prints the roofline of a step (lab/benchmarks/roofline.py): at the paper's
mean depth and at static full depth, in float16, from the bytes of the weights, the MACs, and the published
rates below. No measurement enters. A real step takes longer; `python -m deer_vla_ros benchmark model` tells
how much.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from deer_vla_ros.budget.cost import cost_table
from deer_vla_ros.lab.benchmarks.roofline import FULL_DEPTH, Rates, StepWork, at_depth, mean_layers
from deer_vla_ros.model.config import PRESETS
from deer_vla_ros.model.network import state_shapes

TOKENS = 14
"""The instruction's length at which a layer of the 3B network takes 1.3 GMAC, as the paper counts it."""
FLOAT16_BYTES = 2
DEEPER = 8.5 / 31.2
"""Another mean depth, as a share of all layers: the paper's GFLOPs on D -> D with Bayesian optimisation,
where DeeR does more tasks than the static network (2.92 against 2.71 of five)."""


@dataclass(frozen=True)
class Gpu:
    """The published rates of a GPU: memory bandwidth [GB/s], dense float16 [TFLOPS; 2 FLOP are 1 MAC]."""

    name: str
    gb_per_s: float
    tflops: float

    @property
    def rates(self) -> Rates:
        return Rates(self.gb_per_s * 1e9, self.tflops * 1e12 / 2)


GPUS = (
    # NVIDIA Jetson AGX Orin Series Technical Brief v1.2: 204.8 GB/s; 170 TOPS of sparse INT8 on the GPU
    # alone, of which dense float16 is a quarter.
    Gpu("Jetson AGX Orin 64GB", 204.8, 170 / 4),
    # 273 GB/s; 2070 TFLOPS of sparse FP4, of which dense float16 is an eighth: without sparsity, in FP8 and
    # in float16 it is half each time.
    # https://developer.ridgerun.com/wiki/index.php/NVIDIA_Jetson_AGX_Thor/Introduction/SoM_Overview
    Gpu("Jetson AGX Thor (T5000)", 273.0, 2070 / 8),
    # NVIDIA Ada GPU Architecture, appendix A: 1008 GB/s; 165.2 TFLOPS of float16 that is summed in float32.
    # The same at https://waredb.com/processor/nvidia-geforce-rtx-4090
    Gpu("GeForce RTX 4090", 1008.0, 165.2),
    # NVIDIA H100 Tensor Core GPU datasheet, SXM: 3.35 TB/s; 1979 TFLOPS of float16 with sparsity, half of it
    # without. The same at https://archive-lib.hpctech.co.jp/gpuproduct/nvidia-h100.html
    Gpu("H100 SXM", 3350.0, 1979 / 2),
)


def predictions(preset: str, share: float | None = None) -> list[dict[str, object]]:
    """One row per GPU, for a preset of FULL_DEPTH: milliseconds, ratios and shares.

    share: the mean depth as a share of all layers; None: the paper's at equal success.
    """
    config = PRESETS[preset](FULL_DEPTH[preset])
    shapes = state_shapes(config, for_training=False)
    sizes = {name: math.prod(shape) * FLOAT16_BYTES for name, shape in shapes.items()}
    work, rows = StepWork(cost_table(config, TOKENS), sizes), []
    depth = mean_layers(config) if share is None else share * config.decoder.layers
    for gpu in GPUS:
        exits = {
            layer + 1: work.bound_ms(gpu.rates, layer + 1, index + 1, index + 2)
            for index, layer in enumerate(config.exits)
        }
        mean = {
            stage: at_depth(depth, {layers: bound[stage] for layers, bound in exits.items()})
            for stage in exits[config.decoder.layers]
        }
        static = work.bound_ms(gpu.rates, config.decoder.layers, 1, 1)
        mean_ms, static_ms = sum(mean.values()), sum(static.values())
        rows.append(
            {
                "gpu": gpu.name,
                "mean_layers": depth,
                "mean_ms": mean_ms,
                "static_ms": static_ms,
                "whole_step_ratio": static_ms / mean_ms,
                "language_ratio": static["language"] / mean["language"],
                "vision_share_mean": mean["vision"] / mean_ms,
                "vision_share_static": static["vision"] / static_ms,
            }
        )
    return rows


def main() -> None:
    print("PREDICTIONS from published rates, at the roofline, float16, no measurement:")
    for preset, full in FULL_DEPTH.items():
        rows, deeper = predictions(preset), predictions(preset, DEEPER)
        print(f"\n{preset}, {rows[0]['mean_layers']:.1f} of {full} layers on average against all {full}:\n")
        print(
            "| | ms, mean depth | ms, static | whole step | language part | vision, mean | vision, static "
            f"| whole step at {deeper[0]['mean_layers']:.1f} layers |"
        )
        print("| --- | --- | --- | --- | --- | --- | --- | --- |")
        for row, other in zip(rows, deeper):
            print(
                f"| {row['gpu']} | {row['mean_ms']:.2f} | {row['static_ms']:.2f} | "
                f"{row['whole_step_ratio']:.1f} x | {row['language_ratio']:.1f} x | "
                f"{row['vision_share_mean']:.0%} | {row['vision_share_static']:.0%} | "
                f"{other['whole_step_ratio']:.1f} x |"
            )


if __name__ == "__main__":
    main()
