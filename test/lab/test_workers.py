"""Tests of worker processes: they share the work, report errors, and end with the process that started them.

This module has few imports, because every worker imports it.
"""

import os
import subprocess
import sys
import time

import pytest
from processes import gone, wait_until

from deer_vla_ros.errors import UserError
from deer_vla_ros.lab.workers import spread


def _squarer(power: int):
    """A setup for `spread`. Job 13 raises a UserError, job 14 ends its process, and job 15 takes an hour."""

    def work(job: int, on_progress):
        on_progress()
        if job == 13:
            raise UserError("13 is no job: give another")
        if job == 14:
            os._exit(3)
        if job == 15:
            time.sleep(3600)
        return job**power

    return work


def test_jobs_are_spread_over_processes_and_parts_are_told():
    told = []
    results = dict(spread(_squarer, (2,), list(range(7)), 2, lambda: told.append(1)))
    assert results == {job: job**2 for job in range(7)} == dict(spread(_squarer, (2,), list(range(7)), 1))
    assert len(told) == 7
    assert list(spread(_squarer, (2,), [], 2)) == []


@pytest.mark.parametrize(
    ("job", "says"), [(13, "13 is no job"), (14, "ended with exit code 3.* fewer --jobs")]
)
def test_what_goes_wrong_in_a_process_is_told_and_ends_the_others(job, says):
    with pytest.raises(UserError, match=says):
        list(spread(_squarer, (2,), [15, job], 2))


def _killed_at_birth():
    os._exit(4)


@pytest.mark.parametrize("size", [1, 10_000_000])
def test_a_process_that_dies_before_it_reads_its_job_is_told_as_well(size):
    with pytest.raises(UserError, match="ended with exit code 4.* fewer --jobs"):
        list(spread(_killed_at_birth, (), [b"x" * size, b"y"], 2))


def test_processes_end_in_the_middle_of_a_job_when_the_one_that_spreads_is_killed(tmp_path):
    script = tmp_path / "spreader.py"
    script.write_text(
        "import os, time\n"
        "from deer_vla_ros.lab.workers import spread\n"
        "def setup():\n"
        "    os.write(1, f'{os.getpid()}\\n'.encode())\n"
        "    return lambda job, on_progress: time.sleep(3600)\n"
        "if __name__ == '__main__':\n"
        "    list(spread(setup, (), list(range(10**6)), 2))\n"
    )
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    workers = [int(process.stdout.readline()) for _ in range(2)]
    process.kill()
    process.wait()
    wait_until(lambda: all(gone(worker) for worker in workers), 10, "the workers' end")
