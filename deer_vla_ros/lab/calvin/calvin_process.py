"""The client of CALVIN's simulator: it starts `calvin_simulator.py` with another Python."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np

from deer_vla_ros.errors import UserError, cause, shown
from deer_vla_ros.lab.calvin import calvin_simulator
from deer_vla_ros.lab.calvin.calvin_simulator import (
    HELLO,
    MARK,
    PROTOCOL,
    RENDERERS,
    VIEW,
    NotAMessage,
    decode,
    encode,
)

START_S = 300.0
"""The most time from a process's start to its first message."""
ANSWER_S = 120.0
"""The most time for an answer; after it the process counts as hung and is killed."""
END_S = 5.0
"""The most time from the end of a process's output to its end."""
PROBE_S = 120.0
"""The most time in which a Python says its version and what it lacks."""
OLDEST_PYTHON = (3, 8)
PACKAGES = (
    "pybullet==3.2.7 gym==0.26.2 hydra-core==1.3.8 hydra-colorlog omegaconf numpy-quaternion "
    'opencv-python-headless gitpython scipy cloudpickle "setuptools<81"'
)
"""What --calvin-python needs, as arguments of pip."""
_CLONE = "git clone --recurse-submodules https://github.com/mees/calvin.git"
_VERSION = f"import sys; print('{MARK} %d.%d' % sys.version_info[:2])"
_NOISE_BYTES = 1 << 16
"""The most that is printed on stdout before the simulator speaks."""
_TAIL_BYTES = 4096
"""How much of the end of the process's stderr is read."""


class SimulatorLost(UserError):
    """A simulator's process ended before it was to, did not answer in time, or sent what is no message."""


@dataclass(frozen=True)
class CalvinView:
    """What CALVIN's cameras and state show: static (200, 200, 3) and gripper (84, 84, 3) uint8 RGB.

    robot_obs (15,) float64: TCP position [m] and Euler angles [rad] in the world frame, gripper's opening
    [m], 7 joint angles [rad], last gripper action (-1 or 1). scene_obs (24,) float64: slider, drawer [m],
    button, switch, lightbulb and led (0 or 1), and per block (red, blue, pink) position [m] and Euler angles
    [rad].
    """

    static: np.ndarray
    gripper: np.ndarray
    robot_obs: np.ndarray
    scene_obs: np.ndarray


@dataclass(frozen=True)
class CalvinAbout:
    """What a simulator says about itself: versions, calvin_env's commit ("" if unknown), the SHA-256 sum of
    its files and of the oracle's, and the tasks' names."""

    python: str
    numpy: str
    pybullet: str
    calvin_env: str
    sources: str
    tasks: tuple[str, ...]


@dataclass(frozen=True)
class CalvinInstall:
    """Where CALVIN is: a clone of mees/calvin, a Python that has its packages, a scene and a renderer.

    renderer: "tiny" (pybullet's own, on the CPU) or "egl" (OpenGL without a display). Their images differ.
    """

    root: Path
    python: str = sys.executable
    scene: str = "calvin_scene_D"
    renderer: str = "tiny"

    def check(self) -> None:
        """Raises UserError for the first thing that is missing, with the command that brings it."""
        if not self.root.is_dir():
            raise UserError(f"CALVIN's root {self.root} is no folder: {_CLONE} {self.root}")
        if not (self.root / calvin_simulator.TASKS).is_file():
            raise UserError(
                f"CALVIN's root {self.root} has no {calvin_simulator.TASKS}, so it is no clone of "
                f"mees/calvin: {_CLONE} DIR"
            )
        if not (self.root / "calvin_env/calvin_env").is_dir():
            raise UserError(
                f"{self.root / 'calvin_env'} is empty, because the submodules were not cloned: "
                f"git -C {self.root} submodule update --init calvin_env"
            )
        scenes = sorted(path.stem for path in self.root.glob("calvin_env/conf/scene/calvin_scene_*.yaml"))
        if self.scene not in scenes:
            raise UserError(f"CALVIN has no scene {shown(self.scene)}: choose one of {', '.join(scenes)}")
        if self.renderer not in RENDERERS:
            raise UserError(f"no renderer {shown(self.renderer)}: choose one of {', '.join(RENDERERS)}")
        self._check_python()

    def program(self, *options: str) -> list[str]:
        """The arguments of `python` that run the simulator's program with these options.

        -E: variables such as PYTHONPATH would lead the other Python to the packages of this one.
        """
        return ["-E", calvin_simulator.__file__, *options]

    def _check_python(self) -> None:
        pip = f"{self.python} -m pip install {PACKAGES}"
        version = self._probe("-E", "-c", _VERSION, remedy="give a Python")
        try:
            numbers = tuple(map(int, version.split(".")))
        except ValueError:
            raise self._no_python(version) from None
        if numbers < OLDEST_PYTHON:
            oldest = ".".join(map(str, OLDEST_PYTHON))
            raise UserError(f"{self.python} is Python {version}: CALVIN's simulator needs {oldest} or newer")
        if lacking := self._probe(*self.program("--missing"), remedy=pip).split():
            raise UserError(f"{self.python} lacks {', '.join(lacking)}: {pip}")

    def _probe(self, *arguments: str, remedy: str) -> str:
        """What the other Python prints after MARK, on the same line; a script that starts it may print more.

        Raises UserError if it cannot be run, fails, or does not answer.
        """
        try:
            popen = subprocess.Popen(
                [self.python, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,  # so that the processes which it starts can be killed with it
            )
        except (OSError, ValueError) as error:
            raise _not_started(self.python, error) from None
        with popen:
            try:
                output, errors = popen.communicate(timeout=PROBE_S)
            except subprocess.TimeoutExpired:
                raise UserError(
                    f"{self.python} did not answer within {PROBE_S:g} s and was killed: {remedy}"
                ) from None
            finally:
                _kill(popen)
        if popen.returncode:
            raise UserError(
                f"{self.python} ends with {_told(popen.returncode)}: {_last_line(errors)}: {remedy}"
            )
        _, mark, answer = output.rpartition(MARK)
        if not mark:
            raise self._no_python(output)
        return answer.split("\n")[0].strip()

    def _no_python(self, answer: str) -> UserError:
        return UserError(f"{self.python} is no Python: it answers {shown(answer.strip())}")


class CalvinProcess:
    """A simulator in a process of its own.

    The calls follow this order: `begin` an episode; `ask` a task; then `send` an action and `receive` the
    view after it, as often as needed; then `ask` the next task or `begin` again. Any other order raises
    RuntimeError. `send` returns at once, so several simulators can work at the same time.

    Every method raises SimulatorLost if the process is lost, and UserError if the simulator reports an
    error; after it only `begin` is possible.
    """

    def __init__(self, install: CalvinInstall, start_s: float = START_S, answer_s: float = ANSWER_S):
        """Starts the process and returns at once.

        start_s, answer_s: the most seconds until its first message, and until an answer; after them it is
        killed. Raises UserError if it cannot be started.

        The thread that calls this has to live as long as the simulator: Linux kills it with the thread.
        """
        self._start_s, self._answer_s = start_s, answer_s
        self._state = "ready"  # then "begun", "asked", "sent"; "waiting" for a reply; "closed" at last
        self._about: CalvinAbout | None = None
        self._start_bytes = 0  # the bytes on stderr that were printed before the first message
        options = ("--root", str(install.root), "--scene", install.scene, "--renderer", install.renderer)
        with contextlib.ExitStack() as stack:
            try:
                self._errors: BinaryIO = stack.enter_context(tempfile.TemporaryFile())
                self._popen = subprocess.Popen(
                    [install.python, *install.program(*options)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=self._errors,
                    bufsize=0,
                    start_new_session=True,  # Ctrl-C at the terminal does not reach it.
                )
            except (OSError, ValueError) as error:
                raise _not_started(install.python, error) from None
            stack.pop_all()
        self._started = time.monotonic()
        self._end = weakref.finalize(self, _end, self._popen, self._errors)

    @property
    def about(self) -> CalvinAbout:
        """What the simulator says about itself. Waits until it has started.

        Raises UserError if it speaks another version of the protocol.
        """
        if self._about is None:
            self._about = self._hello()
        return self._about

    def begin(self, robot_obs: np.ndarray, scene_obs: np.ndarray) -> CalvinView:
        """Sets the state of arm (15,) and scene (24,), see CalvinView, and returns the view of it.

        The same state gives the same view bit for bit, whatever was simulated before. The simulator takes one
        step of 1/240 s in the new state: a block's pose can settle by some 0.0001 m and 0.003 rad.
        """
        self._expect("ready", "begun", "asked")
        arrays = {"robot_obs": _numbers(robot_obs, (15,)), "scene_obs": _numbers(scene_obs, (24,))}
        self._about = self.about  # waits for the start
        self._say({"kind": "begin"}, arrays)
        view, _ = self._view()
        self._state = "begun"
        return view

    def ask(self, task: str) -> None:
        """Keeps the present state as that in which the task's instruction is given.

        Raises UserError for a task that the oracle does not know.
        """
        self._expect("begun", "asked")
        if task not in self.about.tasks:
            raise UserError(f"CALVIN has no task {shown(task)}: choose one of {', '.join(self.about.tasks)}")
        self._say({"kind": "ask", "task": task})
        self._reply("asked")
        self._state = "asked"

    def send(self, action: np.ndarray) -> None:
        """Sends an action (7,) and returns at once; `receive` gives what comes of it.

        action: relative position and Euler angles in CALVIN's units, from -1 to 1 (1 is 0.02 m and 0.05 rad),
        and the gripper (-1 closes, 1 opens). CALVIN computes with float16 if the action has this number type,
        and else with float64. Raises UserError for any other numbers; nothing is sent then.
        """
        self._expect("asked")
        numbers = np.asarray(action)
        if numbers.dtype != np.float16:
            numbers = numbers.astype(np.float64)
        if numbers.shape != (7,):
            raise ValueError(f"an action has 7 numbers, not the shape {numbers.shape}")
        if not (np.abs(numbers[:6]) <= 1).all():  # NaN, too
            raise UserError(
                f"an action for CALVIN has the relative pose {numbers[:6].tolist()}, not within -1 to 1: "
                "limit the policy's output, or use a checkpoint that was trained on CALVIN"
            )
        if numbers[6] not in (-1, 1):
            raise UserError(
                f"an action for CALVIN has the gripper value {numbers[6]:g}: it has to be -1 or 1"
            )
        self._say({"kind": "step"}, {"action": numbers})
        self._state = "sent"

    def receive(self) -> tuple[CalvinView, bool]:
        """The view after the action sent, and whether the asked task is done now."""
        self._expect("sent")
        answer = self._view()
        self._state = "asked"
        return answer

    def close(self) -> None:
        """Kills the process, which has nothing to save. It can be called again."""
        self._state = "closed"
        self._end()

    def __enter__(self) -> CalvinProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- Messages.

    def _expect(self, *states: str) -> None:
        if self._state not in states:
            raise RuntimeError(f"a call in the state {self._state!r} of the simulator, not in {states}")

    def _say(self, header: dict[str, Any], arrays: Mapping[str, np.ndarray] | None = None) -> None:
        """Writes a message. It fits into the pipe, since the process has answered everything before it."""
        try:
            os.write(self._popen.stdin.fileno(), encode(header, arrays))
        except OSError:
            self._raise_lost()

    def _hello(self) -> CalvinAbout:
        self._expect("ready")
        self._state = "waiting"
        header, _ = self._message(self._started + self._start_s, self._start_s, is_first=True)
        self._start_bytes = os.fstat(self._errors.fileno()).st_size
        if header.get("kind") == "error" or header.get("protocol") != PROTOCOL:
            self.close()
        if header.get("protocol") != PROTOCOL:
            raise UserError(
                f"the CALVIN simulator speaks version {shown(header.get('protocol'))} of the protocol, this "
                f"package version {PROTOCOL}: use the calvin_simulator.py of this package"
            )
        self._check_kind(header, "hello")
        versions = [header.get(name) for name in ("python", "numpy", "pybullet", "calvin_env", "sources")]
        tasks = header.get("tasks")
        if not isinstance(tasks, list) or not all(isinstance(text, str) for text in [*versions, *tasks]):
            self._raise_lost("sent a first message without versions and tasks")
        self._state = "ready"
        return CalvinAbout(*versions, tuple(tasks))

    def _view(self) -> tuple[CalvinView, bool]:
        header, arrays = self._reply("view")
        if {name: (str(array.dtype), array.shape) for name, array in arrays.items()} != VIEW:
            self._raise_lost("sent a view of other types or shapes")
        return CalvinView(**arrays), header.get("done") is True

    def _reply(self, kind: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        self._state = "waiting"
        header, arrays = self._message(time.monotonic() + self._answer_s, self._answer_s)
        self._state = "ready"  # where the reply is an error
        self._check_kind(header, kind)
        return header, arrays

    def _check_kind(self, header: dict[str, Any], kind: str) -> None:
        if header.get("kind") == "error":
            raise UserError(f"the CALVIN simulator failed: {cause(Exception(header.get('message')))}")
        if header.get("kind") != kind:
            self._raise_lost(f"sent {shown(header.get('kind'))} in place of {kind!r}")

    def _message(
        self, deadline: float, seconds: float, is_first: bool = False
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        try:
            if is_first:
                self._skip_noise(deadline)
            return decode(lambda count: self._read(count, deadline))
        except TimeoutError:
            self._raise_lost(f"did not answer within {seconds:g} s and was killed")
        except EOFError:
            self._raise_lost()
        except NotAMessage as error:
            self._raise_lost(f"sent what is no message ({error})")

    def _skip_noise(self, deadline: float) -> None:
        """Reads up to the end of HELLO."""
        found = bytearray()
        while not found.endswith(HELLO):
            if len(found) > _NOISE_BYTES:
                raise NotAMessage(f"over {_NOISE_BYTES} bytes before its first message")
            found += self._read(1, deadline)

    def _read(self, count: int, deadline: float) -> bytearray:
        pipe = self._popen.stdout.fileno()
        ready = select.poll()
        ready.register(pipe, select.POLLIN)
        found = bytearray(count)
        filled = 0
        while filled < count:
            if not ready.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise TimeoutError
            part = os.readv(pipe, [memoryview(found)[filled:]])
            if not part:
                raise EOFError
            filled += part
        return found

    def _raise_lost(self, what: str | None = None) -> NoReturn:
        """Raises SimulatorLost. what: what the process did; None if it ended by itself."""
        if what is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._popen.wait(END_S)
            status = self._popen.returncode
            what = "closed its pipe" if status is None else f"ended with {_told(status)}"
            if status in (-signal.SIGKILL, 128 + signal.SIGKILL):  # the latter if a shell started it
                self.close()
                raise SimulatorLost(
                    f"the CALVIN simulator {what}, as when memory runs out: use fewer --lanes"
                )
        begin = max(self._start_bytes, os.fstat(self._errors.fileno()).st_size - _TAIL_BYTES)
        last = _last_line(os.pread(self._errors.fileno(), _TAIL_BYTES, begin).decode(errors="replace"))
        self.close()
        raise SimulatorLost(f"the CALVIN simulator {what}: {last}")


def _not_started(python: str, error: Exception) -> UserError:
    """The error for a process that could not be started."""
    code = getattr(error, "errno", None)
    if code == errno.EMFILE:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return UserError(
            f"a simulator of CALVIN cannot be started: this process may open only {limit} files: "
            "use fewer --lanes, or raise the limit with `ulimit -n`"
        )
    if code in (errno.ENFILE, errno.EAGAIN, errno.ENOMEM):
        return UserError(
            f"a simulator of CALVIN cannot be started, because the machine's processes, memory or files run "
            f"out ({os.strerror(code)}): use fewer --lanes, or raise the limits that `ulimit -a` shows"
        )
    return UserError(f"the Python {shown(python)} cannot be run: {cause(error)}")


def _kill(popen: subprocess.Popen) -> None:
    """Kills a process that leads a session, and those that it started, unless it has ended."""
    if popen.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(popen.pid, signal.SIGKILL)
        popen.wait()


def _end(popen: subprocess.Popen, errors: BinaryIO) -> None:
    _kill(popen)
    for file in (popen.stdin, popen.stdout, errors):
        file.close()


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return " ".join(lines[-1].split())[:200] if lines else "it printed nothing on stderr"


def _told(status: int) -> str:
    if status >= 0:
        return f"exit code {status}"
    names = {each.value: each.name for each in signal.Signals}  # Most real-time signals have no name.
    return f"signal {names.get(-status, -status)}"


def _numbers(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    numbers = np.asarray(array, np.float64)
    if numbers.shape != shape or not np.isfinite(numbers).all():
        raise ValueError(f"a state has to be finite numbers of the shape {shape}, not {shown(array)}")
    return numbers
