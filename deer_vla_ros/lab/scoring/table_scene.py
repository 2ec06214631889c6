"""The simulated table as a scene of chains (a chain_run.ChainScene)."""

from __future__ import annotations

import numpy as np

from deer_vla_ros.inference.types import Observation
from deer_vla_ros.lab.scoring.approach import Approach
from deer_vla_ros.lab.scoring.table_chains import TableStart, set_up
from deer_vla_ros.lab.sim.table import Table
from deer_vla_ros.lab.sim.tasks import BY_NAME


class TableScene:
    """A table and its arm, which acts in units of the TABLETOP action space. See chain_run.ChainScene."""

    def __init__(self) -> None:
        self.table = Table()

    def begin(self, start: TableStart) -> None:
        self._arm = set_up(start, self.table)

    def ask(self, task: str) -> bool:
        self._task, self._before = BY_NAME[task], self.table.state()
        self._approach = Approach(self._before)
        return self._task.possible(self._before)

    def observe(self) -> Observation:
        views = self.table.render()
        return Observation(views.static, views.gripper, self._arm.measured())

    def act(self, pose: np.ndarray, gripper_open: bool) -> None:
        self._arm.step(pose, gripper_open)

    def finish(self) -> bool:
        now = self.table.state()
        self._approach.see(now)
        return self._task.succeeded(self._before, now)

    def approached(self) -> bool | None:
        block = self._task.block
        return None if block is None else self._approach.block == block(self._before)
