"""Tests that memory does not grow during an episode."""

import dataclasses
import gc
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from small_model import INSTRUCTION, SMALL, observations, small_model, small_tokenizer, with_decoder

from deer_vla_ros.budget.path import ALWAYS, NEVER
from deer_vla_ros.inference.exit_rule import ExitRule
from deer_vla_ros.inference.policy import DeerPolicy
from deer_vla_ros.model.config import HeadConfig

WARM_UP = 500


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def footprint() -> tuple[int, int, int]:
    """Objects that Python tracks, allocated blocks (with numbers), bytes of the process (with tensors)."""
    gc.collect()
    return len(gc.get_objects()), sys.getallocatedblocks(), resident_bytes()


@pytest.mark.parametrize("steps", [2_000, pytest.param(10_000, marks=pytest.mark.long)])
def test_a_long_episode_uses_no_more_memory_than_its_first_steps(steps):
    head = HeadConfig(hidden=16, mlp_widths=(), lstm_layers=1)
    config = dataclasses.replace(with_decoder(SMALL, layers=3, cross_attention_every=2), head=head)
    policy = DeerPolicy(small_model(config), small_tokenizer(), ExitRule(config.exits, (NEVER, ALWAYS)))
    policy.reset(INSTRUCTION)
    views = observations(50)
    median = float(np.median([policy.step(view).deltas[0] for view in views]))
    policy.rule = ExitRule(config.exits, (median, ALWAYS))
    depths = set()
    for i in range(steps):
        depths.add(policy.step(views[i % len(views)]).exit_layer)
        if i == WARM_UP:
            objects, blocks, resident = footprint()
    objects_after, blocks_after, resident_after = footprint()
    # One object, number or tensor kept per step would be as many as there are steps.
    assert objects_after - objects < 0.06 * steps
    assert blocks_after - blocks < 0.2 * steps
    assert resident_after - resident < 8 * 2**20
    assert depths == {1, 2}, "the episode took every exit"
