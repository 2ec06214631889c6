"""Tests of imports between packages: the contracts of `.importlinter`, and a running node's modules."""

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

from paths import ROOT


def test_every_import_keeps_the_contracts():
    program = Path(sys.executable).parent / "lint-imports"
    done = subprocess.run([program, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_command_stands_in_the_contract_that_keeps_commands_apart():
    listed = (ROOT / ".importlinter").read_text()
    commands = [path.stem for path in (ROOT / "deer_vla_ros" / "commands").glob("*_command.py")]
    assert commands
    assert [name for name in commands if f"deer_vla_ros.commands.{name}\n" not in listed] == []


def test_the_node_with_its_network_loads_nothing_of_the_lab():
    code = """
import sys
from deer_vla_ros.commands import node_command
from deer_vla_ros.ros import loading, policy_node
heavy = ("av", "distributed", "mujoco", "optuna", "matplotlib", "pyarrow", "rich", "tensorboardX")
found = [name for name in sys.modules if name.startswith("deer_vla_ros.lab") or name.split(".")[0] in heavy]
sys.exit(f"loaded: {found}" if found else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_two_modules_or_classes_share_a_name():
    files = [path for path in (ROOT / "deer_vla_ros").rglob("*.py") if path.name != "__init__.py"]
    modules = Counter(path.name for path in files)
    classes = Counter(
        node.name
        for path in files
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef)
    )
    assert [name for name, count in modules.items() if count > 1] == ["types.py"]
    assert [name for name, count in classes.items() if count > 1] == []
