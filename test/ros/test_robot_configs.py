"""Tests of config/robots: the node accepts the files, the arm starts held and slow, sources are named."""

import re

import pytest
import yaml

from deer_vla_ros.commands.reference_pages import ROOT
from deer_vla_ros.ros import parameters

FILES = sorted((ROOT / "config" / "robots").glob("*.yaml"))
ALL = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
SLOWER = (
    "guard.max_translation_m",
    "guard.max_rotation_rad",
    "guard.leash_m",
    "guard.leash_rad",
    "guard.max_linear_speed_m_s",
    "guard.max_angular_speed_rad_s",
)
"""Limits that must be below the node's defaults and not switched off."""
BOX = ("guard.workspace_min", "guard.workspace_max")
OWN = ("control.start_held", "action.mode", "action.frame", *BOX, *SLOWER)
"""The parameters that every file must set, even if the defaults were the same."""
DEFAULTS = parameters.with_defaults({}, "defaults")


def given(path) -> dict:
    return yaml.safe_load(path.read_text())["/**"]["deer_vla"]["ros__parameters"]


def test_the_robots_are_those_that_the_guide_names():
    guide = (ROOT / "docs" / "how-to" / "connect-your-arm.md").read_text()
    assert FILES and all(f"config/robots/{path.name}" in guide for path in FILES)


@ALL
def test_the_node_accepts_the_file(path):
    parameters.from_file(path)


@ALL
def test_the_arm_starts_held_in_a_box_of_its_own(path):
    values, file = parameters.from_file(path), given(path)
    assert not set(OWN) - set(file)
    assert values["control.start_held"] is True
    assert values["control.rehearsal"] is False and values["control.allow_other_commanders"] is False
    assert values["action.frame"], "the frame of the robot, not that of the checkpoint"
    box, default = ([each[corner] for corner in BOX] for each in (values, DEFAULTS))
    assert box != default
    assert all(high - low < wide for low, high, wide in zip(*box, [b - a for a, b in zip(*default)]))


@ALL
def test_the_arm_starts_slowly(path):
    values = parameters.from_file(path)
    for name in SLOWER:
        assert 0 < values[name] < DEFAULTS[name], name
    for name in ("max_linear_acceleration_m_s2", "max_angular_acceleration_rad_s2", "follow_timeout_s"):
        assert values[f"guard.{name}"] > 0, name
    assert values["guard.ramp_in_steps"] >= DEFAULTS["guard.ramp_in_steps"]
    pairs = (("max_translation_m", "max_linear_speed_m_s"), ("max_rotation_rad", "max_angular_speed_rad_s"))
    for step, speed in pairs:
        per_second = values[f"guard.{step}"] * values["control.rate_hz"]
        assert per_second == pytest.approx(values[f"guard.{speed}"]), "the files say that both are the same"


@ALL
def test_the_file_says_where_its_names_are_from_and_what_was_not_tried(path):
    comments = re.sub(r"\s*\n#\s*", " ", path.read_text())
    assert "Not tried on hardware." in comments
    assert re.search(r"looked up on \d{4}-\d\d-\d\d", comments)
    assert re.search(r"https://\S+", comments)
    for remap in ("ee_pose:=", "target_pose:="):
        assert remap in comments
    assert all(len(line) <= 110 for line in path.read_text().splitlines())
