"""A program that speaks the protocol of calvin_simulator.py without CALVIN, and can go wrong on purpose.

The TCP moves by 0.02 m per unit of the action, the images depend on the state, and nothing else happens. The
task with the number n in TASKS is done when the sum, since it was asked, of the actions' component n % 3 has
reached GOAL (for even n) or -GOAL (for odd n): for "open_drawer", number 14, by moving in +z.

Two environment variables make it go wrong:
    STAND_IN_FAULT       KIND:N, where N is the number of the step, from 1 in each process, at which it does
                         so. KIND is crash, hang, garbage, error (an error of the simulator), shape (a view
                         of other shapes). Or KIND alone: version, no_start, hung_start, garbage_start, loud,
                         warning (one line on stderr before it speaks).
    STAND_IN_FAULT_ONCE  a file that is made with the fault; where it exists, there is no fault
"""

import os
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[3] / "deer_vla_ros/lab/calvin"))
import calvin_simulator

BLOCKS = ("red", "blue", "pink")
TASKS = [
    *(f"rotate_{block}_block_{side}" for block in BLOCKS for side in ("right", "left")),
    *(f"push_{block}_block_{side}" for block in BLOCKS for side in ("right", "left")),
    *("move_slider_left", "move_slider_right", "open_drawer", "close_drawer"),
    *(f"lift_{block}_block_{place}" for block in BLOCKS for place in ("table", "slider", "drawer")),
    *("place_in_slider", "place_in_drawer", "stack_block", "unstack_block"),
    *("turn_on_lightbulb", "turn_off_lightbulb", "turn_on_led", "turn_off_led", "push_into_drawer"),
]
"""The tasks of CALVIN's oracle, in its order."""
GOAL = 2.0


class StandIn:
    """What stands in for CalvinSimulator."""

    def __init__(self):
        self._steps = 0
        self._fault("no_start", "hung_start", "garbage_start", "loud", "warning")

    def about(self):
        """The versions of what runs here, and the tasks' names."""
        if self._fault("version"):
            calvin_simulator.PROTOCOL = 99
        return {
            "python": "3",
            "numpy": np.__version__,
            "pybullet": "stand-in",
            "calvin_env": "",
            "sources": os.environ.get("STAND_IN_SOURCES", "as published"),
            "tasks": TASKS,
        }

    def begin(self, robot_obs, scene_obs):
        """Sets the state and returns the view."""
        self._robot, self._scene = robot_obs.copy(), scene_obs.copy()
        return self._view()

    def ask(self, task):
        """Begins the task."""
        self._number, self._moved = TASKS.index(task), np.zeros(3)

    def step(self, action):
        """Moves the TCP. Returns the view, and whether the task is done."""
        self._steps += 1
        self._fault("crash", "hang", "garbage", "error")
        self._robot[:6] += action[:6] * ([0.02] * 3 + [0.05] * 3)
        self._robot[14] = action[6]
        self._moved += action[:3]
        sign = -1 if self._number % 2 else 1
        view = self._view()
        if self._fault("shape"):
            view["static"] = view["gripper"]
        return view, sign * self._moved[self._number % 3] >= GOAL

    def _view(self):
        shade = np.abs(self._robot[:3] * 1000).astype(np.uint8)  # one millimetre changes one colour by 1
        static = np.add.outer(np.arange(200, dtype=np.uint8), shade)[None].repeat(200, 0)
        static[:100] += np.uint8(abs(self._scene.sum()) * 100)
        gripper = np.full((84, 84, 3), shade)
        return {"static": static, "gripper": gripper, "robot_obs": self._robot, "scene_obs": self._scene}

    def _fault(self, *kinds):
        """Goes wrong, if that is asked for now. Returns whether it is."""
        kind, _, step = os.environ.get("STAND_IN_FAULT", "").partition(":")
        if kind not in kinds or int(step or 0) != self._steps:
            return False
        if once := os.environ.get("STAND_IN_FAULT_ONCE"):
            try:
                Path(once).touch(exist_ok=False)
            except FileExistsError:
                return False
        if kind == "crash":
            print("the arm fell off", file=sys.stderr, flush=True)
            os._exit(3)
        if kind in ("hang", "hung_start"):
            time.sleep(3600)
        if kind in ("garbage", "garbage_start"):
            calvin_simulator.encode = lambda *_: b"pybullet build time: Jan 29 2025\n"
        if kind == "error":
            raise KeyError("no such\nlink")
        if kind == "no_start":
            raise ModuleNotFoundError("No module named 'pybullet'")
        if kind == "warning":
            print("UserWarning: old", file=sys.stderr, flush=True)
        if kind == "loud":
            for stream in (sys.stdout, sys.stderr):
                stream.write("loud\n" * 1_000_000)
                stream.flush()
        return True


def main():
    options = calvin_simulator.parser().parse_args()
    if options.missing:
        print(calvin_simulator.MARK)
        return 0
    return calvin_simulator.serve(StandIn)


if __name__ == "__main__":
    sys.exit(main())
