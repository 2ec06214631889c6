"""Measures the success rate of the scripted expert in each task. It is not a test; run it by hand:

    python test/lab/sim/measure_expert.py --trials 100

It asks for every task that often, with and without the bursts of noise of `record-demos`, and prints the
rates.
As in the demonstrations, the table is not reset within a session. The seeds, from 800,000 on, belong neither
to
recordings nor to calibrations.
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
    """Returns how often each task was done, and how often it was asked for."""
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
            f"{name}: {sum(done.values())} of {sum(asked.values())}; "
            f"lowest {lowest}, {done[lowest]} of {asked[lowest]}"
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
