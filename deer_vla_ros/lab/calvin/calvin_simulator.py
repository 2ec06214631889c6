"""The program that runs CALVIN's simulator under a Python of its own, and the protocol that it speaks.

It is started as `PYTHON calvin_simulator.py --root DIR --scene NAME --renderer NAME`, with a Python of 3.8 or
newer. This package is not installed there: the file imports the standard library and numpy, and CALVIN's
packages only when it runs. `calvin_process.py` is its client.

The protocol: requests come on stdin, and every request gets one reply on stdout. A message is the length of
its header (4 bytes, big-endian), the header (a JSON object), and then the bytes of the arrays that the header
lists under "arrays". There is no pickle. The simulator speaks first, with a line of its own (HELLO) before
its first message, since a script that starts this Python may print something:

    hello                                  protocol, versions, tasks
    begin (robot_obs, scene_obs)        -> view
    ask "task"                          -> asked: the state is kept, with which the task begins
    step (action)                       -> view, "done": whether the asked task is done
    any of these                        -> error "message": one line

A view has static (200, 200, 3) uint8, gripper (84, 84, 3) uint8, robot_obs (15,) and scene_obs (24,) float64.
An action has 7 numbers of float64 or float16.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import select
import signal
import struct
import sys
import threading
from importlib import metadata, util
from types import SimpleNamespace

import numpy as np

PROTOCOL = 1
HELLO = b"calvin_simulator speaks:\n"
"""What comes before the first message."""
MARK = "calvin_simulator:"
"""What comes before an answer on stdout that is no message, on the same line."""
HEADER_BYTES = 1 << 16
"""The longest header."""
BODY_BYTES = 1 << 20
"""The most bytes of all arrays of a message."""
VIEW = {
    "static": ("uint8", (200, 200, 3)),
    "gripper": ("uint8", (84, 84, 3)),
    "robot_obs": ("float64", (15,)),
    "scene_obs": ("float64", (24,)),
}
"""The types and shapes of a view's arrays."""
RENDERERS = ("tiny", "egl")
NEEDED = ("scipy", "pybullet", "gym", "hydra", "hydra_plugins.hydra_colorlog", "omegaconf", "quaternion")
NEEDED += ("cv2", "git")
"""The modules that calvin_env imports."""

SOURCES = (".py", ".yaml", ".urdf", ".obj", ".mtl", ".stl", ".STL", ".png", ".jpg")
"""The endings of the files that decide what is simulated and shown."""

_TYPES = {"uint8": np.uint8, "float16": np.float16, "float64": np.float64}
TASKS = "calvin_models/conf/callbacks/rollout/tasks/new_playtable_tasks.yaml"


# --- The protocol.


class NotAMessage(ValueError):
    """What came is no message of this protocol. The text says why."""


def encode(header, arrays=None):
    """The bytes of a message. arrays: {name: uint8, float16 or float64 array}."""
    arrays = {name: np.ascontiguousarray(array) for name, array in (arrays or {}).items()}
    listed = {name: [str(array.dtype), list(array.shape)] for name, array in arrays.items()}
    text = json.dumps(dict(header, arrays=listed)).encode()
    return struct.pack(">I", len(text)) + text + b"".join(array.tobytes() for array in arrays.values())


def decode(read):
    """Reads a message and returns its header (dict) and its arrays ({name: array}).

    read: read(count) returns exactly `count` bytes. Raises NotAMessage, and what `read` raises.
    """
    (length,) = struct.unpack(">I", read(4))
    if length > HEADER_BYTES:
        raise NotAMessage("a header of %d bytes, of at most %d" % (length, HEADER_BYTES))
    try:
        header = json.loads(bytes(read(length)).decode())
        listed = [(name, _TYPES[kind], tuple(shape)) for name, (kind, shape) in header.pop("arrays").items()]
        sizes = [_size(kind, shape) for _, kind, shape in listed]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise NotAMessage("a header that cannot be read: %s" % one_line(error)) from None
    if sum(sizes) > BODY_BYTES:
        raise NotAMessage("arrays of %d bytes, of at most %d" % (sum(sizes), BODY_BYTES))
    arrays = {
        name: np.frombuffer(bytearray(read(size)), kind).reshape(shape)
        for (name, kind, shape), size in zip(listed, sizes)
    }
    return header, arrays


def _size(kind, shape):
    if len(shape) > 4 or any(type(length) is not int or length < 0 for length in shape):
        raise ValueError("no shape: %r" % (shape,))
    size = np.dtype(kind).itemsize
    for length in shape:
        size *= length
    return size


def one_line(error):
    """One line for an error: its type and the first 300 characters of its message."""
    return ("%s: %s" % (type(error).__name__, " ".join(str(error).split())[:300])).rstrip(": ")


class Channel:
    """Messages over this process's stdin and stdout, which nothing else can use afterwards.

    What the process prints goes to stderr. The process ends when the client's end of stdin is closed.
    """

    def __init__(self):
        self._input, self._output = os.dup(0), os.dup(1)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
        os.dup2(2, 1)
        threading.Thread(target=self._end_with_client, daemon=True).start()

    def _end_with_client(self):
        hang_up = select.poll()
        hang_up.register(self._input, 0)  # Only the end of the other side is reported.
        hang_up.poll()
        os._exit(0)

    def receive(self):
        return decode(self._read)

    def send(self, message):
        while message:
            message = message[os.write(self._output, message) :]

    def _read(self, count):
        found = b""
        while len(found) < count:
            part = os.read(self._input, count - len(found))
            if not part:
                raise EOFError
            found += part
        return found


def serve(make_simulator):
    """Makes a simulator and answers requests until the client ends. Returns the exit status.

    make_simulator() returns an object with the methods of CalvinSimulator.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The client alone handles Ctrl-C.
    _end_with_parent()
    channel = Channel()
    try:
        simulator = make_simulator()
        hello = dict(simulator.about(), kind="hello", protocol=PROTOCOL)
    except Exception as error:
        channel.send(HELLO + encode({"kind": "error", "protocol": PROTOCOL, "message": one_line(error)}))
        return 1
    channel.send(HELLO + encode(hello))
    while True:
        try:
            header, arrays = channel.receive()
        except EOFError:
            return 0
        try:
            reply = _reply_to(simulator, header, arrays)
        except Exception as error:
            reply = encode({"kind": "error", "message": one_line(error)})
        channel.send(reply)


def _end_with_parent():
    """Lets Linux kill this process when the thread that started it ends, even while it is stopped."""
    try:
        import ctypes

        ctypes.CDLL(None).prctl(1, ctypes.c_ulong(signal.SIGKILL))  # 1 is PR_SET_PDEATHSIG.
    except (ImportError, OSError, AttributeError, TypeError):
        pass  # Another system, or a Python without ctypes. The end of stdin ends the process, too.


def _reply_to(simulator, header, arrays):
    kind = header.get("kind")
    if kind == "begin":
        return encode({"kind": "view"}, simulator.begin(arrays["robot_obs"], arrays["scene_obs"]))
    if kind == "ask":
        simulator.ask(header["task"])
        return encode({"kind": "asked"})
    if kind == "step":
        view, done = simulator.step(arrays["action"])
        return encode({"kind": "view", "done": bool(done)}, view)
    raise ValueError("no such request: %r" % (kind,))


# --- The simulator.


class CalvinSimulator:
    """CALVIN's environment and task oracle, from a clone of mees/calvin with calvin_env."""

    def __init__(self, root, scene, renderer):
        os.environ["GIT_PYTHON_REFRESH"] = "quiet"  # GitPython is imported without a git program, too.
        package = os.path.join(os.path.abspath(root), "calvin_env")
        sys.path.insert(0, package)
        # calvin_env's commit 1431a46, which is the submodule of mees/calvin, imports rich for its tracebacks.
        sys.modules["rich.traceback"] = SimpleNamespace(install=lambda **options: None)
        import hydra
        from calvin_env.utils import utils
        from omegaconf import OmegaConf

        self._commit = _commit(package)
        # The environment logs its commit and raises an error in a folder that is no git checkout.
        utils.get_git_commit_hash = lambda path: self._commit
        with hydra.initialize_config_dir(config_dir=os.path.join(package, "conf"), version_base="1.1"):
            config = hydra.compose(
                "config_data_collection",
                overrides=[
                    "cameras=static_and_gripper",
                    "robot=panda_longer_finger",
                    "scene=" + scene,
                    "use_vr=false",
                    "env.show_gui=false",
                    "env.use_scene_info=true",
                    "env.use_egl=" + str(renderer == "egl").lower(),
                ],
            )
        try:
            self._environment = hydra.utils.instantiate(config.env)
        except SystemExit:  # calvin_env's way to say that the plug-in of EGL cannot be loaded
            raise RuntimeError("pybullet has no EGL here: use the renderer tiny") from None
        self._environment.get_camera_obs()  # EGL draws its very first image without shadows.
        oracle = os.path.join(root, TASKS)
        self._oracle = hydra.utils.instantiate(OmegaConf.load(oracle))
        parts = [os.path.join(package, part) for part in ("calvin_env", "conf", "data")]
        self._sources = sources_sha256([oracle] + parts)
        self._task = self._before = None

    def about(self):
        """The versions of what runs here, and the names of the oracle's tasks."""
        return {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "pybullet": metadata.version("pybullet"),
            "calvin_env": self._commit,
            "sources": self._sources,
            "tasks": list(self._oracle.tasks),
        }

    def begin(self, robot_obs, scene_obs):
        """Sets the state of arm and scene and returns the view.

        The same state gives the same bits, whatever was simulated before: the world is loaded again, because
        calvin_env's reset() keeps contacts and the last gripper action.
        """
        _check(robot_obs, "robot_obs", (15,))
        _check(scene_obs, "scene_obs", (24,))
        environment = self._environment
        self._task = None
        environment.seed(0)
        environment.scene.np_random = environment.np_random
        environment.load()
        environment.robot.gripper_action = int(robot_obs[14])
        return _view(environment.reset(robot_obs=robot_obs, scene_obs=scene_obs))

    def ask(self, task):
        """Keeps the state in which an instruction is given: the oracle compares later states with it."""
        if task not in self._oracle.tasks:
            raise ValueError("no such task: %r" % (task,))
        self._task, self._before = task, self._environment.get_info()

    def step(self, action):
        """Applies an action for 1/30 s, computed in its own number type.

        Returns the view, and whether the asked task is done.
        """
        _check(action, "action", (7,), (np.float16, np.float64))
        if self._task is None:
            raise ValueError("a step before a task was asked")
        obs, _, _, now = self._environment.step(action)
        return _view(obs), self._oracle.get_task_info_for_set(self._before, now, {self._task})


def _check(array, name, shape, types=(np.float64,)):
    if array.shape != shape or array.dtype not in types or not np.isfinite(array).all():
        raise ValueError("%s has to be %r finite numbers of %s" % (name, shape, types[-1].__name__))


def _view(obs):
    images = obs["rgb_obs"]
    found = dict(obs, static=images["rgb_static"], gripper=images["rgb_gripper"])
    return {name: np.asarray(found[name], kind) for name, (kind, _) in VIEW.items()}


def _commit(package):
    """The commit of calvin_env, or an empty text where the folder is no git checkout."""
    import git

    try:
        return git.Repo(package).head.commit.hexsha
    except Exception:
        return ""


def sources_sha256(places):
    """The SHA-256 sum of these files, and of all programs, settings and models in these folders."""
    digest = hashlib.sha256()
    for place in places:
        found = [place] if os.path.isfile(place) else []
        for folder, _, names in os.walk(place):
            found += [os.path.join(folder, name) for name in names if name.endswith(SOURCES)]
        for path in sorted(found):
            if not os.path.isfile(path):  # such as a link to nothing
                continue
            with open(path, "rb") as file:
                digest.update(os.fsencode(os.path.relpath(path, place)) + b"\0" + file.read() + b"\0")
    return digest.hexdigest()


def missing():
    """The modules of NEEDED that this Python does not have."""
    found = []
    for name in NEEDED:
        try:
            if util.find_spec(name) is None:
                found.append(name)
        except ImportError:  # The package above the module is missing.
            found.append(name)
    return found


def parser():
    arguments = argparse.ArgumentParser(description="CALVIN's simulator, for calvin_process.py")
    arguments.add_argument("--missing", action="store_true", help="print the modules that this Python lacks")
    arguments.add_argument("--root", help="clone of mees/calvin")
    arguments.add_argument("--scene")
    arguments.add_argument("--renderer", choices=RENDERERS)
    return arguments


def main():
    options = parser().parse_args()
    if options.missing:
        print(MARK, *missing())
        return 0
    sys.path[:] = [folder for folder in sys.path if folder != os.path.dirname(os.path.abspath(__file__))]
    return serve(lambda: CalvinSimulator(options.root, options.scene, options.renderer))


if __name__ == "__main__":
    sys.exit(main())
