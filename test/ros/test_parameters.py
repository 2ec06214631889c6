"""Tests that parameters follow their declarations: in YAML, at the start, set live, dumped and loaded."""

import contextlib
from pathlib import Path

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


SECTION = "  ros__parameters:\n    guard.leash_m: {}\n"


@pytest.mark.parametrize("name", ["/deer_vla", "/left/deer_vla"])
@pytest.mark.parametrize(
    "keys",
    [
        ["/deer_vla"],
        ["deer_vla"],
        ["left/deer_vla", "/deer_vla"],
        ["/left/deer_vla", "/**"],
        ["/**", "/left/deer_vla", "/deer_vla"],
        ["/*", "/*/deer_vla"],
        ["/**/deer_vla", "/left/*"],
        ["/*/*", "/**", "/right/deer_vla"],
        ["/left/**", "/**/deer_vla/**"],
    ],
    ids=" ".join,
)
def test_sections_of_a_file_apply_as_to_a_node_of_that_name(tmp_path, keys, name):
    """In their order, the last one wins: compared with what rcl gives to the node."""
    file = tmp_path / "cell.yaml"
    file.write_text(
        "".join(f"'{key}':\n{SECTION.format(number / 10)}" for number, key in enumerate(keys, start=2))
    )
    namespace = name.rpartition("/")[0] or "/"
    with node("--params-file", str(file), "-r", f"__ns:={namespace}") as made:
        live = made.get_parameter("guard.leash_m").value
    try:
        assert parameters.from_file(file, name)["guard.leash_m"] == live
    except UserError as error:
        assert "no ros__parameters for the node" in str(error) and live == 0.15


def test_a_file_for_several_nodes_or_another_one_names_them_and_what_to_do(tmp_path):
    file = tmp_path / "two.yaml"
    left, right = (f"/{arm}/deer_vla:\n" for arm in ("left", "right"))
    file.write_text(left + SECTION.format(0.2) + right + SECTION.format(0.3))
    with pytest.raises(UserError, match="for the nodes /left/deer_vla, /right/deer_vla: choose .* --node"):
        parameters.from_file(file)
    assert parameters.from_file(file, "/right/deer_vla")["guard.leash_m"] == 0.3
    assert parameters.from_file(file, "left/deer_vla")["guard.leash_m"] == 0.2
    with pytest.raises(UserError, match="for the node /middle/deer_vla of my_bag, only for /left/.* --node"):
        parameters.from_file(file, "/middle/deer_vla", Path("my_bag"))
    file.write_text(left + SECTION.format(0.2) + right + SECTION.format(0.2))
    assert parameters.from_file(file)["guard.leash_m"] == 0.2, "the same for both"
    file.write_text("/**:\n" + SECTION.format(0.3) + left + SECTION.format(0.2))
    assert parameters.from_file(file)["guard.leash_m"] == 0.2
    file.write_text("/left/arm_policy:\n" + SECTION.format(0.2))
    with pytest.raises(UserError, match="only for /left/arm_policy: .*or name the policy node with --node"):
        parameters.from_file(file)
    assert parameters.from_file(file, "/left/arm_policy")["guard.leash_m"] == 0.2
    with pytest.raises(UserError, match="--node is 'a b': give the full name"):
        parameters.from_file(file, "a b")


BOMB = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10))


@pytest.mark.parametrize(
    "text,words",
    [
        ("- 1\n- 2\n", "none at all"),
        ("guard.leash_m: 0.1\n", "none at all"),
        ("/deer_vla:\n  ros__parameters: [1]\n", r"ros__parameters is \[1\]"),
        ("/le*/deer_vla:\n" + SECTION.format(0.1), "'/le\\*/deer_vla' is no name of a node"),
        (BOMB, "line 6: more than 100000 values, aliases included"),
        ("a: &a [*a]", "line 1: the alias \\*a stands in its own value"),
        ("[" * 5000, "nested deeper than 32"),
        ("a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 50)), "nested deeper"),
        ("a: 1\na: 2\n", "line 2: 'a' stands twice"),
        ("a: 2001-99-99", "not YAML .month must be in 1..12"),
        ("a: !!python/object/apply:os.getcwd []", "not YAML"),
        ("a: !!timestamp x", "not YAML"),
        ("a: \0", "not YAML"),
        ("#" * 1_000_001, "longer than 1000000 bytes"),
        ("/**:\n  ros__parameters: {null: 1}\n", "no parameter None"),
        ('/**:\n  ros__parameters: {"a\\nb": 1}\n', r"no parameter 'a\\nb'"),
        ("/**:\n  ros__parameters: {guard.leash_m: 2001-01-01}\n", "give a float"),
        (
            "/**:\n  ros__parameters: {guard.leash_m: 0x" + "f" * 6000 + "}\n",
            "int of too many digits: give a float",
        ),
        ("/**:\n  ros__parameters: {guard.leash_m: .nan}\n", "guard.leash_m is nan: give"),
        ("/**:\n  ros__parameters: {guard.workspace_min: !!set {1, 2, 3}}\n", "give a list"),
        ("/**:\n  ros__parameters: {guard.workspace_min: [1, 2]}\n", "give 3 numbers"),
        ('/**:\n  ros__parameters: {model.path: "a\\0"}\n', "without control characters"),
        (
            "/**:\n  ros__parameters: {guard.workspace_min: [1, 1, 1], guard.workspace_max: [0, 0, 0]}",
            "guard",
        ),
    ],
)
def test_a_file_that_no_node_could_take_is_refused_in_one_line_that_names_it(tmp_path, text, words):
    file = tmp_path / "my.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        parameters.from_file(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 600
