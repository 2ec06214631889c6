"""Tests of `colcon build`: the installed code, messages and executables work in any folder."""

from pathlib import Path

import pytest
from builds import ROOT, USE_MESSAGES, clean_environment, copy_sources, run, run_sourced
from shared import made_once


@pytest.fixture(scope="module", params=[[], ["--symlink-install"]], ids=["copied", "linked"])
def workspace(request, tmp_path_factory):
    """The folder of an installation, its sources, and whether it was installed as links.

    It is built once for all tests.
    """

    def make(folder: Path) -> None:
        copy_sources(folder)
        run("colcon", "build", *request.param, cwd=folder, env=clean_environment())

    folder = made_once(tmp_path_factory, "workspace" + "".join(request.param), make)
    return folder / "install", folder / "deer_vla_ros", bool(request.param)


@pytest.mark.long
def test_messages_and_code_are_importable_from_elsewhere(workspace, tmp_path):
    folder, sources, _ = workspace
    package = run_sourced(
        folder / "setup.bash", "python3", "-c", USE_MESSAGES, cwd=tmp_path, env=clean_environment()
    ).splitlines()[-1]
    assert package.startswith(str(folder)), "the installation is used, not the sources"


@pytest.mark.long
def test_messages_are_importable_beside_the_live_sources(workspace):
    folder, sources, _ = workspace
    package = run_sourced(
        folder / "setup.bash", "python3", "-c", USE_MESSAGES, cwd=sources, env=clean_environment()
    ).splitlines()[-1]
    assert package == str(sources / "deer_vla_ros")


@pytest.mark.long
@pytest.mark.parametrize("executable", ["deer_vla_node", "table_node"])
def test_executables_of_ros2_run_start(workspace, executable, tmp_path):
    folder, _, _ = workspace
    path = folder / "deer_vla_ros/lib/deer_vla_ros" / executable
    text = run_sourced(folder / "setup.bash", path, "--help", cwd=tmp_path, env=clean_environment())
    assert "usage: python -m deer_vla_ros" in text


@pytest.mark.long
def test_every_source_file_is_installed_and_links_are_live(workspace):
    folder, sources, as_links = workspace
    installed = next(folder.glob("**/*-packages/deer_vla_ros"))
    expected = [
        p.relative_to(sources)
        for p in (sources / "deer_vla_ros").rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    ]
    assert len(expected) > 10
    for path in expected:
        target = installed.parent / path
        assert target.is_file(), f"{path} is not installed"
        assert target.is_symlink() == as_links, path
    share = folder / "deer_vla_ros/share/deer_vla_ros"
    for source in [*(sources / "launch").glob("*.py"), *(sources / "config").glob("*.yaml")]:
        assert (share / source.relative_to(sources)).is_file()


def test_colcon_takes_the_package_for_an_ament_cmake_package():
    # With an invalid e-mail in package.xml, or with setup.py alone, colcon would take it for a plain Python
    # package, and build no messages, without a warning.
    listed = run("colcon", "list", cwd=ROOT, env=clean_environment())
    assert listed.split() == ["deer_vla_ros", ".", "(ros.ament_cmake)"]
