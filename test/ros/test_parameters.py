"""Tests that parameters follow their declarations: in YAML, at the start, set live, dumped and loaded."""

import contextlib

import pytest
import rclpy
import yaml
from paths import ROOT
from rclpy.context import Context
from rclpy.node import Node
from rclpy.parameter import Parameter

from deer_vla_ros.errors import UserError
from deer_vla_ros.ros import parameters
from deer_vla_ros.ros.parameters import DECLARATIONS, NODE_NAME

CONFIG = ROOT / "config" / "deer_vla.yaml"


@contextlib.contextmanager
def node(*arguments: str):
    """A plain node with the declared parameters and these ROS arguments."""
    context = Context()
    rclpy.init(context=context)
    made = Node(
        NODE_NAME,
        context=context,
        cli_args=["--ros-args", *arguments],
        automatically_declare_parameters_from_overrides=True,
    )
    try:
        parameters.declare(made)
        yield made
    finally:
        made.destroy_node()
        rclpy.shutdown(context=context)


def test_the_config_file_holds_every_parameter_at_its_default():
    given = yaml.safe_load(CONFIG.read_text())["/**"][NODE_NAME]["ros__parameters"]
    assert given == {declaration.name: declaration.default for declaration in DECLARATIONS}


def test_every_number_has_a_range_and_every_parameter_a_sentence():
    for declaration in DECLARATIONS:
        assert declaration.description.endswith(".")
        if isinstance(declaration.default, (int, float)) and not isinstance(declaration.default, bool):
            assert declaration.low <= declaration.default <= declaration.high


def test_whole_numbers_given_at_start_are_the_doubles_that_they_mean(tmp_path):
    file = tmp_path / "cell.yaml"
    file.write_text(
        "/**:\n  deer_vla:\n    ros__parameters:\n"
        "      guard.leash_m: 1\n      guard.workspace_min: [-1, -1, 0]\n"
    )
    with node("-p", "control.rate_hz:=20", "--params-file", str(file)) as made:
        assert made.get_parameter("control.rate_hz").value == 20.0
        assert made.get_parameter("guard.leash_m").value == 1.0
        assert list(made.get_parameter("guard.workspace_min").value) == [-1.0, -1.0, 0.0]
        assert made.describe_parameter("control.rate_hz").type == Parameter.Type.DOUBLE.value
        assert made.describe_parameter("control.rate_hz").read_only
    assert parameters.from_file(file)["guard.workspace_min"] == [-1.0, -1.0, 0.0]


def test_whole_numbers_set_live_are_numbers_too_and_words_are_not():
    with node() as made:
        one = Parameter("budget.average_fraction", value=1)
        box = Parameter("guard.workspace_max", value=[1, 1, 2])
        assert all(result.successful for result in made.set_parameters([one, box]))
        assert made.get_parameter("budget.average_fraction").value == 1.0
        assert list(made.get_parameter("guard.workspace_max").value) == [1.0, 1.0, 2.0]
        (refused,) = made.set_parameters([Parameter("guard.leash_m", value="far")])
        assert not refused.successful


@pytest.mark.parametrize(
    "wrong", ["control.rate_hz:=fast", "guard.leash_m:=5", "guard.workspace_min:=[a, b, c]"]
)
def test_a_value_that_no_number_is_or_that_is_out_of_range_is_refused_by_name(wrong):
    name = wrong.partition(":")[0]
    with pytest.raises(Exception, match=name), node("-p", wrong):
        pass


def test_what_ros2_param_dump_writes_is_a_valid_file_for_the_node_and_for_replay(tmp_path):
    with node("-p", "guard.leash_m:=0.12") as made:
        names = [name for name in made.list_parameters([], 0).names]
        values = {name: made.get_parameter(name).value for name in names}
    assert {"use_sim_time", "start_type_description_service"} <= set(values), "rclpy's own are in a dump"
    plain = {name: list(value) if hasattr(value, "tolist") else value for name, value in values.items()}
    dump = tmp_path / "deer_vla.yaml"
    dump.write_text(yaml.safe_dump({"/deer_vla": {"ros__parameters": plain}}))
    with node("--params-file", str(dump)) as again:
        assert parameters.unknown(again) == []
        assert again.get_parameter("guard.leash_m").value == 0.12
    assert parameters.from_file(dump)["guard.leash_m"] == 0.12


def test_a_name_that_no_parameter_has_is_still_told(tmp_path):
    file = tmp_path / "typo.yaml"
    file.write_text("/**:\n  deer_vla:\n    ros__parameters:\n      guard.leash: 0.1\n")
    with node("--params-file", str(file)) as made:
        assert parameters.unknown(made) == ["guard.leash"]
    with pytest.raises(UserError, match="no parameter guard.leash"):
        parameters.from_file(file)
