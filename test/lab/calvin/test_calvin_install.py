"""Tests of what is missing in an installation of CALVIN: each is one line with the command that brings it."""

import errno
import os
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from stand_ins import script, stand_in_calvin

from deer_vla_ros.errors import UserError
from deer_vla_ros.lab.calvin import calvin_process
from deer_vla_ros.lab.calvin.calvin_simulator import MARK
from deer_vla_ros.lab.soak.part import command_of, wait_until


@pytest.fixture
def install(tmp_path):
    return stand_in_calvin(tmp_path)


def refusal(install) -> str:
    with pytest.raises(UserError) as caught:
        install.check()
    text = str(caught.value)
    assert "\n" not in text
    return text


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


def answering(folder, version: str, missing: str) -> str:
    """A Python of this version that runs the shell command `missing` where it is asked what it lacks."""
    return script(folder, f'case "$2" in -c) echo "{MARK} {version}";; *) {missing};; esac')


def test_a_python_that_is_too_old(install, tmp_path):
    text = refusal(replace(install, python=answering(tmp_path, "3.7", "exit 1")))
    assert "Python 3.7" in text and "3.8 or newer" in text


@pytest.mark.parametrize("command", ["echo hello", f'echo "{MARK} hello"'])
def test_a_program_that_is_no_python(install, tmp_path, command):
    assert "no Python: it answers 'hello'" in refusal(replace(install, python=script(tmp_path, command)))


def test_a_python_without_the_packages(install, tmp_path):
    python = answering(tmp_path, "3.10", f'echo "{MARK} pybullet hydra"; echo Bye')
    text = refusal(replace(install, python=python))
    assert "lacks pybullet, hydra:" in text and "pip install pybullet==" in text


def test_a_python_without_numpy(install, tmp_path):
    python = answering(tmp_path, "3.10", 'echo "No module named numpy" >&2; exit 1')
    text = refusal(replace(install, python=python))
    assert "No module named numpy" in text and calvin_process.PACKAGES in text


def test_what_a_script_prints_before_and_after_an_answer_is_no_answer(install, tmp_path):
    noisy = f'echo Activating env; printf "wait... "; {shlex.quote(install.python)} "$@"; echo Bye'
    replace(install, python=script(tmp_path, noisy)).check()


def test_this_shell_s_python_path_does_not_reach_the_other_python(install, tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text("raise SystemExit('a module for another Python')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    install.check()


def test_a_python_that_does_not_answer_is_killed_with_what_it_started(install, tmp_path, monkeypatch):
    monkeypatch.setattr(calvin_process, "PROBE_S", 0.3)
    child = tmp_path / "child"
    child.write_text("sleep 600 & wait\n")
    text = refusal(replace(install, python=script(tmp_path, f"sh {shlex.quote(str(child))}; echo late")))
    assert "another python did not answer within 0.3 s and was killed" in text
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    assert wait_until(lambda: not any(str(child) in command_of(pid) for pid in pids), 60)


@pytest.mark.parametrize(
    "code, words",
    [
        (errno.EMFILE, r"may open only \d+ files: use fewer --lanes, or .*`ulimit -n`"),
        (errno.EAGAIN, r"Resource temporarily unavailable\): use fewer --lanes"),
        (errno.ENOMEM, r"Cannot allocate memory\): use fewer --lanes"),
    ],
)
def test_a_machine_that_runs_out_is_not_blamed_on_the_python(install, monkeypatch, code, words):
    def refuse(*_, **__):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(calvin_process.subprocess, "Popen", refuse)
    assert re.search(words, refusal(install))
    with pytest.raises(UserError, match=words):
        calvin_process.CalvinProcess(install)
