"""Tests of what is missing in an installation of CALVIN: each is one line with the command that brings it."""

import shutil
from dataclasses import replace

import pytest
from stand_ins import stand_in_calvin

from deer_vla_ros.errors import UserError
from deer_vla_ros.lab.calvin import calvin_process


@pytest.fixture
def install(tmp_path):
    return stand_in_calvin(tmp_path)


def refusal(install) -> str:
    with pytest.raises(UserError) as caught:
        install.check()
    text = str(caught.value)
    assert "\n" not in text
    return text


def script(folder, text: str) -> str:
    path = folder / "another python"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_a_complete_installation_is_accepted(install):
    install.check()


def test_a_root_that_is_missing(install, tmp_path):
    text = refusal(replace(install, root=tmp_path / "nowhere"))
    assert "nowhere" in text and "git clone --recurse-submodules" in text


def test_a_folder_that_is_no_calvin(install, tmp_path):
    assert "no clone of mees/calvin" in refusal(replace(install, root=tmp_path))


def test_submodules_that_were_not_cloned(install):
    shutil.rmtree(install.root / "calvin_env")
    (install.root / "calvin_env").mkdir()
    assert f"git -C {install.root} submodule update --init" in refusal(install)


def test_a_scene_that_does_not_exist(install):
    text = refusal(replace(install, scene="calvin_scene_E"))
    assert "calvin_scene_E" in text and "calvin_scene_A, calvin_scene_B" in text


def test_a_renderer_that_does_not_exist(install):
    assert "tiny, egl" in refusal(replace(install, renderer="vulkan"))


def test_a_python_that_does_not_exist(install):
    text = refusal(replace(install, python="/no/such/python"))
    assert "/no/such/python" in text and "cannot be run" in text


def test_a_python_that_is_too_old(install, tmp_path):
    text = refusal(replace(install, python=script(tmp_path, "echo 3.7")))
    assert "Python 3.7" in text and "3.8 or newer" in text


def test_a_program_that_is_no_python(install, tmp_path):
    assert "no Python" in refusal(replace(install, python=script(tmp_path, "echo hello")))


def test_a_python_without_the_packages(install, tmp_path):
    lacking = 'case "$1" in -c) echo 3.10;; *) echo pybullet hydra;; esac'
    text = refusal(replace(install, python=script(tmp_path, lacking)))
    assert "lacks pybullet, hydra" in text and "pip install pybullet==" in text


def test_a_python_without_numpy(install, tmp_path):
    failing = 'case "$1" in -c) echo 3.10;; *) echo "No module named numpy" >&2; exit 1;; esac'
    text = refusal(replace(install, python=script(tmp_path, failing)))
    assert "No module named numpy" in text and calvin_process.PACKAGES in text
