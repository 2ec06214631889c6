"""Tests of `pip install .`: the same package as colcon's; without ROS, an error that names the remedy."""

import subprocess
import sys
import sysconfig

import pytest
from builds import USE_MESSAGES, clean_environment, copy_sources, run


@pytest.mark.long
def test_installed_package_works_from_elsewhere(tmp_path):
    # Given: a new environment that sees this one's packages. pip's default isolated build hides them.
    sources, prefix = copy_sources(tmp_path), tmp_path / "venv"
    environment = clean_environment()
    run(sys.executable, "-m", "venv", "--without-pip", prefix, cwd=tmp_path, env=environment)
    site = next(prefix.glob("lib/python3*/site-packages"))
    (site / "ros.pth").write_text(sysconfig.get_path("purelib"))
    python = prefix / "bin/python"
    # When
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "--no-deps", sources, cwd=tmp_path, env=environment)
    # Then: the messages can be used although none of our folders is in LD_LIBRARY_PATH.
    printed = run(python, "-c", USE_MESSAGES, cwd="/", env=environment)
    assert printed.splitlines()[-1] == str(site / "deer_vla_ros")
    assert "usage: python -m deer_vla_ros" in run(prefix / "bin/deer-vla", "--help", cwd="/", env=environment)
    assert (prefix / "share/ament_index/resource_index/packages/deer_vla_ros").is_file()
    assert (prefix / "lib/deer_vla_ros/deer_vla_node").stat().st_mode & 0o111
    missing = [
        path
        for path in (sources / "deer_vla_ros").rglob("*")
        if path.is_file() and not (site / path.relative_to(sources)).is_file()
    ]
    assert not missing


def test_without_ros_the_error_names_the_remedy(tmp_path):
    # Given: an interpreter whose prefix holds no ROS.
    environment = clean_environment()
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "empty", cwd=tmp_path, env=environment)
    environment.pop("AMENT_PREFIX_PATH")
    environment["PYTHONPATH"] = sysconfig.get_path("purelib")
    # When
    done = subprocess.run(
        [tmp_path / "empty/bin/python", "setup.py", "--quiet", "build"],
        cwd=copy_sources(tmp_path),
        env=environment,
        text=True,
        capture_output=True,
    )
    # Then
    assert done.returncode != 0
    assert "rosidl_default_generators not found" in done.stderr
    assert "pip install -r requirements-ros.txt" in done.stderr
