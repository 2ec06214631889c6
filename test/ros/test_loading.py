"""Tests of what the parameters choose for a checkpoint: the number type, and the warnings about it."""

import logging

import pytest
import torch

from deer_vla_ros.errors import UserError
from deer_vla_ros.ros import loading, parameters


def controller_with(caplog, **given):
    caplog.set_level(logging.INFO)
    values = parameters.with_defaults({f"model.{name}": value for name, value in given.items()}, "test")
    return loading.warm_controller(values, logging.getLogger("test"))


def test_on_a_cpu_auto_is_float32_and_the_log_says_so(caplog):
    controller_with(caplog, device="cpu")
    assert "on cpu as float32" in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_on_a_gpu_auto_is_float16_and_a_named_type_is_that_type_anywhere():
    assert loading._dtype("auto", "cuda") is torch.float16
    assert loading._dtype("bfloat16", "cpu") is loading._dtype("bfloat16", "cuda") is torch.bfloat16


def test_bfloat16_with_small_thresholds_is_warned_of_with_both_numbers(caplog):
    controller_with(caplog, device="cpu", dtype="bfloat16")
    (warning,) = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert "deltas by 0.002" in warning and "smallest threshold is 0.0026" in warning
    assert "use float16 or float32" in warning


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(caplog):
    with pytest.raises(UserError, match="torch sees no GPU here: use 'cpu' or 'auto'"):
        controller_with(caplog, device="cuda")
