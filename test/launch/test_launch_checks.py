"""Tests of the checks of launch files before they start anything, and of their handling of exits."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import rclpy
import yaml
from paths import ROOT
from rclpy.context import Context

from deer_vla_ros.commands import launch_checks
from deer_vla_ros.errors import UserError

BAG = ROOT / "test" / "data" / "table"
GIVEN = {"ros__parameters": {"control.rate_hz": 5.0}}


def refusal(check, *arguments, **named) -> str:
    """The single line of the error with which a check refuses its arguments."""
    with pytest.raises(UserError) as caught:
        check(*arguments, **named)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def written(folder: Path, content) -> Path:
    file = folder / "my.yaml"
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return file


@pytest.mark.parametrize("file", ["config/deer_vla.yaml", "deer_vla_ros/lab/sim/assets/guard.yaml"])
@pytest.mark.parametrize("node", ["/deer_vla", "/left/deer_vla"])
def test_the_parameter_files_of_this_package_are_accepted_in_any_namespace(file, node):
    launch_checks.check_parameters(ROOT / file, node)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a: [", "not YAML"),
        ("", "no ros__parameters for the node /deer_vla, none at all"),
        ("just text", "none at all"),
        ({"deer_vla": {"control.rate_hz": 5.0}}, "none at all"),
        ({"deer_vla": {"ros__parameters": None}}, "none at all"),
        ({"camera": GIVEN}, "only for /camera: give them as config/deer_vla.yaml does"),
        ({"left": {"deer_vla": GIVEN}}, "only for /left/deer_vla"),
        ({"deer_vla": {"ros__parameters": {"control.rate": 5.0}}}, "no parameter control.rate"),
        ({"deer_vla": {"ros__parameters": {"control": {"rate_hz": 5000.0}}}}, "give 0.1 to 200"),
    ],
)
def test_a_parameter_file_that_says_nothing_right_to_the_node_is_refused(tmp_path, content, expected):
    file = written(tmp_path, content)
    text = refusal(launch_checks.check_parameters, file, "/deer_vla")
    assert expected in text and str(file) in text


def test_a_parameter_file_that_is_none_is_refused(tmp_path):
    missing = refusal(launch_checks.check_parameters, tmp_path / "my.yaml", "/deer_vla")
    assert f"{tmp_path / 'my.yaml'}: no such file: give a file such as config/deer_vla.yaml" in missing
    assert "not a file" in refusal(launch_checks.check_parameters, tmp_path, "/deer_vla")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in refusal(launch_checks.check_parameters, tmp_path / "binary.yaml", "/deer_vla")


KEYS = ["deer_vla", "/deer_vla", "/**", "**", "*", "/**/deer_vla", "left/deer_vla", "/*/deer_vla", "/left/**"]
KEYS += ["/left/*", "/**/*", "/right/deer_vla", "/a/**/deer_vla", "/camera"]


@pytest.mark.parametrize("namespace", ["", "/left", "/a/b"])
def test_a_file_is_for_the_node_where_the_node_itself_finds_it_so(tmp_path, namespace):
    node = f"{namespace}/deer_vla"
    for key in [*KEYS, "nested"]:
        tree = {key: GIVEN} if key != "nested" else {"/**": {"deer_vla": GIVEN}}
        file = written(tmp_path, tree)
        try:
            launch_checks.check_parameters(file, node)
            is_accepted = True
        except UserError:
            is_accepted = False
        assert is_accepted == ("control.rate_hz" in overrides(namespace or "/", file)), (key, node)


def overrides(namespace: str, file: Path) -> dict:
    """The parameters that rcl reads from the file for the node."""
    context = Context()
    rclpy.init(context=context)
    try:
        names = ["-r", "__node:=deer_vla", "-r", f"__ns:={namespace}"]
        arguments = ["--ros-args", *names, "--params-file", str(file)]
        node = rclpy.create_node(
            "named_by_launch",
            context=context,
            cli_args=arguments,
            automatically_declare_parameters_from_overrides=True,
        )
        found = {name: node.get_parameter(name).value for name in node.list_parameters([], 0).names}
        node.destroy_node()
        return found
    finally:
        rclpy.shutdown(context=context)


def test_a_recording_that_is_none_is_refused(tmp_path):
    launch_checks.check_recording(BAG)
    assert "no such recording" in refusal(launch_checks.check_recording, tmp_path / "nothing")
    assert "no metadata.yaml" in refusal(launch_checks.check_recording, tmp_path)
    (tmp_path / "cut.mcap").write_bytes(next(BAG.glob("*.mcap")).read_bytes()[:1000])
    assert "cannot be read" in refusal(launch_checks.check_recording, tmp_path / "cut.mcap")


def test_a_place_where_no_new_recording_can_be_made_is_refused(tmp_path):
    launch_checks.check_out(tmp_path / "new")
    assert f"{tmp_path}: it exists already: give a new folder" in refusal(launch_checks.check_out, tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert "it exists already" in refusal(launch_checks.check_out, tmp_path / "link")
    text = refusal(launch_checks.check_out, tmp_path / "no" / "new")
    assert f"there is no folder {tmp_path / 'no'}: make it" in text
    assert not (tmp_path / "new").exists() and not (tmp_path / "no").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    assert "is not writable: give another place" in refusal(launch_checks.check_out, tmp_path / "new")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"params": "/nope/my.yaml", "node": "/deer_vla"}, "params_file /nope/my.yaml: no such file"),
        ({"bag": "/nope", "out": "/tmp/deer_vla_never_made"}, "/nope: no such recording"),
        ({"bag": str(BAG), "out": "/tmp"}, "out /tmp: it exists already"),
        ({"bag": "", "out": "/tmp/deer_vla_never_made"}, "no metadata.yaml"),
    ],
)
def test_the_checks_that_a_launch_file_calls_say_the_same_in_one_line(given, expected):
    assert expected in refusal(launch_checks.check, **given)
    assert not Path("/tmp/deer_vla_never_made").exists()


def test_the_checks_that_a_launch_file_calls_accept_what_is_right(tmp_path):
    launch_checks.check(bag=str(BAG), out=str(tmp_path / "new"))
    launch_checks.check(params=str(ROOT / "config" / "deer_vla.yaml"), node="/left/deer_vla")


def test_checks_that_fail_themselves_do_not_pass(monkeypatch, tmp_path):
    broken = tmp_path / "python3"
    broken.write_text("#!/bin/sh\necho no such module >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert "the checks before the start failed (no such module)" in refusal(launch_checks.check, bag=str(BAG))


def test_what_ros2_launch_imports_is_light():
    code = "import deer_vla_ros.commands.launch_checks, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "rclpy", "numpy", "rosbags", "yaml"} & set(done.stdout.split())


def test_a_process_that_ends_by_itself_is_named_and_one_that_was_asked_to_is_not():
    text = launch_checks.early_end("table_node-2", 1, is_shutdown=False)
    assert text == "table_node-2 ended by itself (exit status 1): see its output above"
    assert launch_checks.early_end("table_node-2", -9, is_shutdown=True) == ""


def test_a_recorder_has_to_leave_a_complete_recording(tmp_path):
    out = str(tmp_path)
    assert "ended by itself" in launch_checks.recorder_end("recorder-2", 0, False, out)
    assert "left no complete recording" in launch_checks.recorder_end("recorder-2", 0, True, out)
    (tmp_path / "metadata.yaml").write_text("x")
    assert launch_checks.recorder_end("recorder-2", 0, True, out) == ""
    assert launch_checks.recorder_end("recorder-2", 2, True, out) == "", "ros2 bag's status after Ctrl-C"
    assert "exit status -9" in launch_checks.recorder_end("recorder-2", -9, True, out)
