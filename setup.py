"""Builds the package with its messages for `pip install .`, in a Python environment that has ROS 2.

ROS 2 may come from wheels or from a sourced Jazzy of apt. The messages need rosidl. This file therefore runs
the
same CMake as colcon, installs into a scratch prefix, and packs the result: pip and colcon install the same
files.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
VERSION = re.search(r"<version>(.+)</version>", (ROOT / "package.xml").read_text())[1]


def ros_prefixes() -> list[Path]:
    """The prefixes with ROS 2: those of a sourced setup.bash, and this interpreter's own (wheels).

    Raises SystemExit if none of them has the generators of messages.
    """
    candidates = [Path(p) for p in os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep) if p]
    candidates.append(Path(sys.prefix))
    found = [p for p in candidates if p.is_dir()]
    if not any((p / "share/rosidl_default_generators").is_dir() for p in found):
        raise SystemExit(
            "error: rosidl_default_generators not found, so the messages cannot be generated. "
            "With ROS 2 from apt: `source /opt/ros/jazzy/setup.bash` first; "
            "without: `pip install -r requirements-ros.txt` into this environment first."
        )
    return found


class BuildWithCMake(build_ext):
    """Builds and installs with CMake, and then packs the installed files into the wheel."""

    def run(self):
        """Builds the package into `build_lib`. Raises SystemExit for an editable install."""
        if self.editable_mode or self.inplace:
            raise SystemExit(
                "error: an editable install has no place for generated messages; use `make build` and "
                "`. scripts/env.sh`, or `colcon build --symlink-install`"
            )
        prefix = self.install_with_cmake(Path(self.build_temp).resolve())
        source = next(prefix.glob("**/*-packages/deer_vla_ros"))
        package = Path(self.build_lib).resolve() / "deer_vla_ros"
        shutil.rmtree(package, ignore_errors=True)
        shutil.copytree(source, package, ignore=shutil.ignore_patterns("*.c", "__pycache__"))
        (package / "lib").mkdir()
        for library in prefix.glob("lib/*.so"):
            shutil.copy2(library, package / "lib")
        self.distribution.data_files = list(data_files(prefix))

    def install_with_cmake(self, scratch: Path) -> Path:
        """Builds and installs into a scratch prefix, and returns it.

        pip's isolated build replaces PYTHONPATH and so hides the environment's packages, among them the
        generators of messages. This method sets it again from the ROS prefixes. Raises SystemExit if there is
        no cmake.
        """
        shutil.rmtree(scratch, ignore_errors=True)
        prefixes = ros_prefixes()
        joined = os.pathsep.join(map(str, prefixes))
        python_path = [
            str(p)
            for prefix in prefixes
            for lib in ("lib", "local/lib")
            for p in prefix.glob(f"{lib}/python3*/*-packages")
        ]
        environment = {**os.environ, "AMENT_PREFIX_PATH": joined, "PYTHONPATH": os.pathsep.join(python_path)}
        cmake = shutil.which("cmake") or shutil.which("cmake", path=str(Path(sys.executable).parent))
        if cmake is None:
            raise SystemExit("error: cmake not found; `pip install cmake` or `apt-get install cmake` first")
        for arguments in (
            [
                "-S",
                ROOT,
                "-B",
                scratch / "cmake",
                f"-DCMAKE_INSTALL_PREFIX={scratch / 'prefix'}",
                f"-DCMAKE_PREFIX_PATH={joined.replace(os.pathsep, ';')}",
                f"-DPython3_EXECUTABLE={sys.executable}",
                "-DCMAKE_INSTALL_RPATH=$ORIGIN;$ORIGIN/lib",
                "-DBUILD_TESTING=OFF",
            ],
            ["--build", scratch / "cmake", "--parallel", str(os.cpu_count())],
            ["--install", scratch / "cmake"],
        ):
            subprocess.run([cmake, *map(str, arguments)], check=True, env=environment)
        return scratch / "prefix"


def data_files(prefix: Path):
    """Yields the files that `ros2` needs, with their folders under the environment's prefix.

    The files of CMake and colcon are left out: they describe headers and libraries in the folders of colcon.
    """
    share = prefix / "share/deer_vla_ros"
    for folder in (
        prefix / "share/ament_index",
        share / "msg",
        share / "launch",
        share / "config",
        prefix / "lib/deer_vla_ros",
    ):
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                yield str(path.parent.relative_to(prefix)), [str(path)]
    yield str(share.relative_to(prefix)), [str(share / "package.xml")]


setup(
    name="deer_vla_ros",
    version=VERSION,
    description="Multi-exit vision-language-action policy for ROS 2",
    license="Apache-2.0",
    python_requires=">=3.10,<3.13",
    packages=["deer_vla_ros"],
    ext_modules=[Extension("deer_vla_ros.msg", sources=[])],
    cmdclass={"build_ext": BuildWithCMake},
    install_requires=[
        "numpy>=1.26,<3",
        "pillow>=10.1",
        "pyyaml",
        "safetensors>=0.6.2",
        "scipy>=1.11",
        "tokenizers",
        "torch>=2.4",
    ],
    extras_require={
        # Without greenlet Optuna warns, and proposes trials more slowly.
        "search": ["greenlet", "optuna>=5"],
        "cluster": ["distributed>=2026.8", "mujoco>=3.10", "rich"],
        "lerobot": ["av>=14", "pyarrow>=15", "rich"],
        "sim": ["mujoco>=3.10"],
        "replay": ["apsw", "backports.zstd", "lz4", "mcap>=1.2", "rich", "rosbags>=0.11"],
        "demo": ["matplotlib", "mujoco>=3.10", "rich"],
        "train": ["rich", "tensorboardX"],
        "test": [
            "apsw",
            "av>=14",
            "backports.zstd",
            "distributed>=2026.8",
            "greenlet",
            "hypothesis",
            "import-linter",
            "lz4",
            "matplotlib",
            "mcap>=1.2",
            "mujoco>=3.10",
            "optuna>=5",
            "pyarrow>=15",
            "pytest",
            "pytest-xdist",
            "rich",
            "rosbags>=0.11",
            "tensorboardX",
        ],
    },
    entry_points={"console_scripts": ["deer-vla = deer_vla_ros.__main__:main"]},
    zip_safe=False,
)
