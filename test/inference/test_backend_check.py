"""Tests of the choice of a backend: it is used only if it decides as the eager operators do."""

import pytest
import torch
from small_model import INSTRUCTION, SMALL, observations, small_model, small_tokenizer

from deer_vla_ros.errors import UserError
from deer_vla_ros.inference import backend_check
from deer_vla_ros.inference.backend_check import choose
from deer_vla_ros.inference.backends import Captured
from deer_vla_ros.inference.exit_rule import ExitRule
from deer_vla_ros.inference.policy import DeerPolicy
from deer_vla_ros.ros.parameters import DECLARATIONS

RULE = ExitRule(SMALL.exits, (0.3, 0.3, 1e8))


class Replayed(Captured):
    """Captures a function by keeping it."""


class Wrong(Captured):
    """Returns results that are wrong by a little."""

    def compiled(self, function):
        return lambda *given: _raised(function(*given))


class FailingInAStep(Captured):
    """Fails when a step runs, as a compiler may that begins its work then."""

    def compiled(self, function):
        return lambda *given: 1 / 0


class Failing(Captured):
    def capture(self, run):
        raise RuntimeError("out of\nmemory")


def _raised(value):
    if isinstance(value, torch.Tensor):
        return value + 1e-2 if value.is_floating_point() else value
    return type(value)(map(_raised, value)) if type(value) is tuple else value


def chosen(monkeypatch, backend):
    monkeypatch.setitem(backend_check.BACKENDS, "compiled", backend)
    return choose("compiled", small_model(), small_tokenizer(), RULE)


def test_a_backend_that_decides_as_eager_is_used_and_the_report_has_figures(monkeypatch):
    found = chosen(monkeypatch, Replayed)
    assert (found.backend, found.is_refused) == ("compiled", False)
    assert "in 20 random observations" in found.report and "at most" in found.report
    assert found.policy.rule == RULE
    with pytest.raises(UserError, match="no instruction yet"):
        choose("eager", small_model(), small_tokenizer(), RULE).policy.step(observations(1)[0])


def test_a_backend_that_decides_otherwise_is_refused_in_one_line(monkeypatch):
    found = chosen(monkeypatch, Wrong)
    assert (found.backend, found.is_refused) == ("eager", True)
    assert "0.0001 is allowed: steps run eagerly" in found.report and "\n" not in found.report
    found.policy.reset(INSTRUCTION)
    assert found.policy.step(observations(1)[0]).action.is_finite


@pytest.mark.parametrize(
    ("backend", "reason"),
    [(Failing, "RuntimeError: out of memory"), (FailingInAStep, "ZeroDivisionError: division by zero")],
)
def test_a_backend_that_fails_is_refused_in_one_line(monkeypatch, backend, reason):
    found = chosen(monkeypatch, backend)
    assert (found.backend, found.is_refused) == ("eager", True)
    assert f"failed ({reason}): steps run eagerly" in found.report
    assert found.policy.rule == RULE


def test_an_error_during_the_comparison_leaves_the_rules_as_they_were(monkeypatch):
    policies = [DeerPolicy(small_model(), small_tokenizer(), RULE) for _ in range(2)]
    monkeypatch.setattr(policies[0], "step", lambda observation: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        backend_check.compare(*policies)
    assert [policy.rule for policy in policies] == [RULE, RULE]


def test_the_parameter_offers_these_backends():
    (declared,) = (each for each in DECLARATIONS if each.name == "model.backend")
    assert declared.choices == backend_check.NAMES


def test_on_a_cpu_auto_is_eager_and_graphs_are_an_error():
    found = choose("auto", small_model(), small_tokenizer(), RULE)
    assert (found.backend, found.is_refused, found.report) == ("eager", False, "")
    with pytest.raises(UserError, match="'graphs'.*the network is on cpu: use 'auto'"):
        choose("graphs", small_model(), small_tokenizer(), RULE)


@pytest.mark.long
def test_compiled_steps_decide_as_eager_ones_and_nothing_is_compiled_later(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    found = choose("compiled", small_model(), small_tokenizer(), RULE)
    assert found.backend == "compiled", found.report
    before = dict(torch._dynamo.utils.counters["stats"])
    for text in ("push", INSTRUCTION, "lift the blue block to the left"):
        found.policy.reset(text)
        for observation in observations(3):
            found.policy.step(observation)
    assert dict(torch._dynamo.utils.counters["stats"]) == before
    assert any((tmp_path / "deer_vla_ros").iterdir()), "the compiled functions are kept for the next start"
