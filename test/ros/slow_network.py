"""Checkpoints whose steps take as long as those of a large network, although their files are small.

Import it as `from slow_network import save_slow`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from deer_vla_ros.model.checkpoint import EMBEDDED, Checkpoint, load, save
from deer_vla_ros.model.network import MultiExitVLA


def save_slow(folder: Path, image_size: int, layers: int = 2) -> Path:
    """Writes a checkpoint whose vision tower looks at images of so many pixels, in patches of 4.

    A step takes about 0.6 s for 256 pixels, and about 3 s for 384. Returns the folder.
    """
    embedded = load(EMBEDDED)
    model = embedded.info.model
    config = dataclasses.replace(
        model,
        vision=dataclasses.replace(model.vision, image_size=image_size, patch_size=4),
        decoder=dataclasses.replace(model.decoder, layers=layers),
    )
    info = dataclasses.replace(embedded.info, model=config, thresholds=(1e8,) * len(config.exits))
    save(folder, Checkpoint(info, MultiExitVLA(config), embedded.tokenizer), "Too slow on purpose.")
    return folder
