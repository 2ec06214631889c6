"""The commands that a person runs, one module each, and their table.

A command is a module with a docstring (its help, with an example), `add_arguments(parser)` and `run(args)`,
which returns the exit status. It imports what it needs when it runs, so `--help` answers at once. No other
module imports a command. `arguments`, `launch_checks` and `reference_pages` are not commands.
"""

from dataclasses import dataclass

PROGRAM = "python -m deer_vla_ros"


@dataclass(frozen=True)
class CommandEntry:
    """A command: its module, its line in `--help`, and whether it takes `--ros-args`."""

    module: str
    summary: str
    takes_ros_args: bool = False


COMMANDS = {
    "node": CommandEntry("deer_vla_ros.commands.node_command", "the policy node", takes_ros_args=True),
    "sim": CommandEntry(
        "deer_vla_ros.commands.sim_command", "the simulated table as a ROS 2 node", takes_ros_args=True
    ),
    "demo": CommandEntry(
        "deer_vla_ros.commands.demo_command",
        "table and policy in closed loop: prints and plots what happened",
    ),
    "benchmark": CommandEntry(
        "deer_vla_ros.commands.benchmark_command", "times the node, checks budgets, shows what depth buys"
    ),
    "replay": CommandEntry(
        "deer_vla_ros.commands.replay_command", "runs the policy over a recording in lock step"
    ),
    "budget": CommandEntry(
        "deer_vla_ros.commands.budget_command", "cost against deviation: what a budget buys"
    ),
    "calibrate": CommandEntry(
        "deer_vla_ros.commands.calibrate_command",
        "measures the deltas of all exits for a checkpoint's budgets",
    ),
    "record-demos": CommandEntry(
        "deer_vla_ros.commands.record_demos_command", "demonstrations on the simulated table, for training"
    ),
    "convert": CommandEntry(
        "deer_vla_ros.commands.convert_command", "DeeR's released weights as a checkpoint folder"
    ),
    "convert-bag": CommandEntry(
        "deer_vla_ros.commands.convert_bag_command", "recordings of a robot as a training dataset"
    ),
    "convert-lerobot": CommandEntry(
        "deer_vla_ros.commands.convert_lerobot_command", "a LeRobotDataset as a training dataset"
    ),
    "train": CommandEntry(
        "deer_vla_ros.commands.train_command",
        "makes a network by a recipe, from demonstrations to a checkpoint",
    ),
    "evaluate": CommandEntry(
        "deer_vla_ros.commands.evaluate_command", "scores chains of instructions on the simulated table"
    ),
    "search": CommandEntry(
        "deer_vla_ros.commands.search_command", "Bayesian optimisation of thresholds in closed loop"
    ),
    "soak": CommandEntry(
        "deer_vla_ros.commands.soak_command", "attacks the running node with random faults and judges it"
    ),
    "parity": CommandEntry(
        "deer_vla_ros.commands.parity_command", "checks the network against recorded reference tensors"
    ),
}
