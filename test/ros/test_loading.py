"""Tests of what the parameters choose for a checkpoint: the number type, and the warnings about it."""

import logging
import re
from types import SimpleNamespace

import pytest
import torch

from deer_vla_ros.budget.latency import LatencyTable
from deer_vla_ros.errors import Cancelled, UserError
from deer_vla_ros.model.config import tabletop
from deer_vla_ros.model.network import layer_bytes
from deer_vla_ros.model.quantisation import types_of
from deer_vla_ros.ros import loading, parameters


def controller_with(caplog, **given):
    caplog.set_level(logging.INFO)
    values = parameters.with_defaults({f"model.{name}": value for name, value in given.items()}, "test")
    return loading.warm_controller(values, logging.getLogger("test"))


def test_on_a_cpu_auto_is_float32_and_the_log_says_so(caplog):
    controller_with(caplog, device="cpu")
    assert "on cpu as float32" in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_every_part_of_a_load_says_how_long_it_took(caplog):
    controller_with(caplog, device="cpu")
    number = r"\d+(\.\d+)?"
    for line in (
        rf"config and tokenizer: {number} MB in {number} s",
        rf"weights: {number} MB in {number} s, {number} MB/s; {number} MB in memory",
        rf"calibration: {number} MB; budgets made ready in {number} s",
        rf"warm-up: 18 steps in {number} s; {number} ms a step to the deepest exit",
        rf"configured in {number} s",
    ):
        assert any(re.fullmatch(line, record.message) for record in caplog.records), (line, caplog.text)
    assert "left out" not in caplog.text


def test_a_warm_up_without_time_says_what_it_left_out(caplog):
    controller_with(caplog, device="cpu", warm_up_s=0.0)
    assert "model.warm_up_s is over: 17 of 18 steps are left out" in caplog.text
    assert "exits that never ran: 1, 3, 5, 7, 9." in caplog.text


def test_a_load_ends_at_the_check_that_raises(caplog):
    values, checks = parameters.with_defaults({"model.device": "cpu"}, "test"), []

    def check() -> None:
        checks.append(None)
        if len(checks) == 5:
            raise Cancelled("enough")

    with pytest.raises(Cancelled, match="enough"):
        loading.warm_controller(values, logging.getLogger("test"), check=check)
    assert len(checks) == 5


def test_a_progress_line_tells_what_is_done_and_how_long_the_rest_takes(caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    now = [0.0]
    monkeypatch.setattr(loading, "time", SimpleNamespace(monotonic=lambda: now[0]))
    log = logging.getLogger("test")
    progress = loading._Progress("weights", "MB", 1e6, log, lambda: None)
    for now[0], done in ((0.0, 0), (1.0, 10), (4.0, 40), (5.0, 50), (10.0, 100)):
        progress(done * 10**6, 10**8)
    assert [record.message for record in caplog.records] == ["weights: 40 of 100 MB, about 6 s left"]


def test_a_step_that_is_older_than_a_frame_may_be_is_warned_of_with_both_numbers(caplog):
    table = LatencyTable(((100.0, 50.0, 10.0),), "made up")
    values = parameters.with_defaults({"model.device": "cpu"}, "test")
    controller = loading.warm_controller(values, logging.getLogger("test"), table)
    loading.warn_of_slow_steps(controller, logging.getLogger("test"))
    (warning,) = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert "takes 0.77 s on this device" in warning and "inputs.max_age_s is 0.3 s" in warning
    assert "smaller budget" in warning and "faster device" in warning and "older frames" in warning
    caplog.clear()
    small = parameters.with_defaults(values | {"budget.deadline_ms": 250.0}, "test")
    controller = loading.warm_controller(small, logging.getLogger("test"), table)
    loading.warn_of_slow_steps(controller, logging.getLogger("test"))
    assert "inputs.max_age_s" not in caplog.text


def test_on_a_gpu_auto_is_float16_and_a_named_type_is_that_type_anywhere():
    assert types_of("auto", "cuda") == (torch.float16, None)
    assert types_of("bfloat16", "cpu") == types_of("bfloat16", "cuda") == (torch.bfloat16, None)
    assert types_of("int8", "cpu") == (torch.float32, 8)
    assert types_of("int4", "cuda") == (torch.float16, 4)


def test_int8_layers_are_priced_and_told_as_they_are(caplog):
    sizes = layer_bytes(tabletop(), torch.float32, 8)
    caplog.set_level(logging.INFO)
    given = {"model.device": "cpu", "model.dtype": "int8", "budget.memory_gib": sum(sizes[:6]) / 2**30}
    values = parameters.with_defaults(given, "test")
    controller = loading.warm_controller(values, logging.getLogger("test"))
    assert "on cpu as float32, layers in 8 bits;" in caplog.text
    status = controller.policy.status
    assert status.resident_layers == 6 and status.resident_gib == sum(sizes[:6]) / 2**30


def test_bfloat16_with_small_thresholds_is_warned_of_with_both_numbers(caplog):
    controller_with(caplog, device="cpu", dtype="bfloat16")
    (warning,) = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert "deltas by 0.002" in warning and "smallest threshold is 0.0026" in warning
    assert "use float16 or float32" in warning


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(caplog):
    with pytest.raises(UserError, match="torch sees no GPU here: use 'cpu' or 'auto'"):
        controller_with(caplog, device="cuda")
