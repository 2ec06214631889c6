"""How surely does the scripted expert do each task? Not a test: run it by hand, `python test/lab/sim/measure_expert.py --trials 100`.

Asks for every task that often, with and without the bursts of noise of `record-demos`, in sessions without a reset as those of the demonstrations
(seeds from 800,000 on: no recording's, no calibration's), and prints the rates.
"""

import argparse
from collections import Counter

import numpy as np

from deer_vla_ros.lab.demonstrations.demonstrations import BURSTS, SESSION_TASKS, STEP_LIMIT, Disturbance
from deer_vla_ros.lab.sim.expert import act
from deer_vla_ros.lab.sim.table import Table
from deer_vla_ros.lab.sim.table_arm import TableArm
from deer_vla_ros.lab.sim.tasks import TASKS, Task

FIRST_SEED = 800_000


def does(table: Table, task: Task, disturbance: Disturbance) -> bool:
    arm, before = TableArm(table), table.state()
    for _ in range(STEP_LIMIT):
        intent = act(task.name, table.state())
        arm.step(np.clip(intent.pose + disturbance.draw(), -1, 1), intent.open)
        if task.succeeded(before, table.state()):
            return True
    return False


def measure(trials: int, bursts: float) -> tuple[Counter, Counter]:
    """Done and asked for, by task."""
    done, asked, seed = Counter(), Counter(), FIRST_SEED
    with Table() as table:
        while min(asked[task.name] for task in TASKS) < trials:
            random = np.random.default_rng(seed)
            table.reset(seed, varied=True)
            seed += 1
            for _ in range(SESSION_TASKS):
                possible = [task for task in TASKS if task.possible(table.state())]
                fewest = min(asked[task.name] for task in possible)
                task = possible[
                    random.choice([i for i, each in enumerate(possible) if asked[each.name] == fewest])
                ]
                asked[task.name] += 1
                if not does(table, task, Disturbance(random, bursts)):
                    break
                done[task.name] += 1
    return done, asked


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=100, help="of each task (default: %(default)s)")
    trials = parser.parse_args().trials
    for name, bursts in (("undisturbed", 0.0), ("disturbed", BURSTS)):
        done, asked = measure(trials, bursts)
        lowest = min(TASKS, key=lambda task: done[task.name] / asked[task.name]).name
        print(
            f"{name}: {sum(done.values())} of {sum(asked.values())}; lowest {lowest}, {done[lowest]} of {asked[lowest]}"
        )
        print(
            "  failed:",
            ", ".join(
                f"{task} {asked[task] - done[task]} of {asked[task]}"
                for task in sorted(asked)
                if asked[task] > done[task]
            )
            or "none",
        )
