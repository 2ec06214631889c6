"""Measures what the embedded network still does when its command reaches the arm some time after the image.

    . scripts/env.sh; python test/evaluation/measure_command_delay.py

On a robot, and in `make demo`, the command reaches the arm tens of milliseconds after the image. In training
and in `evaluate` the arm waits for the command instead. The program prints two tables by delay: the demo's
instructions on the demo's arrangement, and "open the drawer" on the first arrangements with a closed drawer.
"""

from deer_vla_ros.control.budgeted_policy import BudgetedPolicy
from deer_vla_ros.control.guard import guard
from deer_vla_ros.control.motion import motion_of
from deer_vla_ros.control.types import Pose
from deer_vla_ros.evaluation.table_arm import LIMITS, STEP_S
from deer_vla_ros.inference.types import Observation
from deer_vla_ros.model.action_space import TABLETOP
from deer_vla_ros.model.checkpoint import EMBEDDED, load
from deer_vla_ros.ros.demo_command import INSTRUCTIONS, SEED
from deer_vla_ros.sim.referee import Referee
from deer_vla_ros.sim.table import Table

DELAYS_S = (0.0, 0.02, 0.04, 0.06, 0.08)
STEP_LIMIT = 80  # of an instruction, as `evaluate` has it
ARRANGEMENTS = 20


def steps_needed(policy: BudgetedPolicy, table: Table, instruction: str, delay_s: float) -> int | None:
    """Steps until the instruction is done; None where STEP_LIMIT is too few."""
    referee, last_target = Referee(), None
    if problem := referee.begin(instruction, table.state()):
        raise ValueError(problem)
    policy.reset(instruction)
    for step in range(1, STEP_LIMIT + 1):
        views, seen = table.render(), table.tcp_pose()
        measured = Pose(seen.position, seen.quaternion)
        action = policy.step(Observation(views.static, views.gripper, measured.as_array())).policy.action
        last_target = guard(LIMITS, last_target or measured, measured, *motion_of(action.pose, TABLETOP)).target
        table.advance(delay_s)
        table.set_gripper(TABLETOP.gripper_open if action.gripper > 0 else TABLETOP.gripper_closed)
        table.set_target(last_target.position, last_target.quaternion)
        table.advance(STEP_S - delay_s)
        if referee.succeeded(table.state()):
            return step
    return None


def main() -> None:
    policy = BudgetedPolicy(load(EMBEDDED))
    policy.begin()
    table = Table(SEED)
    print(f"the demo's instructions, seed {SEED}, steps for each (None: not within {STEP_LIMIT})")
    for delay_s in DELAYS_S:
        table.reset(SEED)
        counts = [steps_needed(policy, table, text, delay_s) for text in INSTRUCTIONS]
        print(f"{1000 * delay_s:3.0f} ms  {counts}")
    print(f"open the drawer, first {ARRANGEMENTS} arrangements with a closed one: done, mean steps of those")
    closed = []
    for seed in range(1000):
        table.reset(seed)
        if table.state().drawer < 0.01 and len(closed) < ARRANGEMENTS:
            closed.append(seed)
    for delay_s in DELAYS_S:
        counts = []
        for seed in closed:
            table.reset(seed)
            counts.append(steps_needed(policy, table, "open the drawer", delay_s))
        done = [count for count in counts if count is not None]
        mean = sum(done) / len(done) if done else float("nan")
        print(f"{1000 * delay_s:3.0f} ms  {len(done)} of {len(counts)}, {mean:.0f} steps", flush=True)
    table.close()


if __name__ == "__main__":
    main()
