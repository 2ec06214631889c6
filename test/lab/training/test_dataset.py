"""Tests that both formats of the same demonstrations give the same windows, without a simulator."""

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from paths import ROOT

from deer_vla_ros.bag.calvin_files import read_action_space
from deer_vla_ros.errors import UserError
from deer_vla_ros.lab.demonstrations.demonstrations import demonstrations
from deer_vla_ros.lab.demonstrations.record_run import DemoRequest
from deer_vla_ros.lab.demonstrations.record_store import CalvinStore, FrameStore
from deer_vla_ros.lab.sim.tasks import BY_NAME
from deer_vla_ros.lab.training.batches import Share
from deer_vla_ros.lab.training.calvin import CalvinWindows
from deer_vla_ros.lab.training.dataset import FrameWindows
from deer_vla_ros.lab.training.frames import Frames
from deer_vla_ros.lab.training.prefetch import Prefetched
from deer_vla_ros.model.action_space import TABLETOP

SIZE = 24
SEED = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The same two demonstrations of the table in both formats."""
    folder = tmp_path_factory.mktemp("demos")
    episodes = tuple(demonstrations(2, SEED))
    settings = {"seed": SEED, **DemoRequest(folder, 2, 0, SIZE).settings()}
    for store in (FrameStore(folder, SIZE), CalvinStore(folder)):
        store.write(0, settings, episodes)
        store.finish()
    return folder


@pytest.fixture
def frames(folder) -> Frames:
    return Frames([folder])


@pytest.fixture
def both(folder, frames) -> tuple[FrameWindows, CalvinWindows]:
    return FrameWindows(frames), CalvinWindows([folder])


def draw(windows, indices, window=6, seed=0):
    return windows.batch(np.asarray(indices), window, SIZE, np.random.default_rng(seed))


def test_the_table_s_demonstrations_are_the_same_through_calvin_s_format_as_through_ours(folder, both):
    ours, calvins = both
    assert len(ours) == len(calvins) > 10 and read_action_space(folder) == TABLETOP
    every = np.arange(len(ours))
    a, b = draw(ours, every), draw(calvins, every)
    assert np.array_equal(a.images, b.images)
    assert np.array_equal(a.actions, b.actions)
    assert np.array_equal(a.valid, b.valid) and not a.valid.all()
    assert np.allclose(a.tcp[..., :3], b.tcp[..., :3], atol=1e-6)
    assert np.allclose(np.abs((a.tcp[..., 3:] * b.tcp[..., 3:]).sum(-1)), 1, atol=1e-5), (
        "q and -q are one rotation"
    )
    assert ours.valid_steps(every, 6) == calvins.valid_steps(every, 6) == a.valid.sum()


def test_the_instruction_is_one_of_the_task_s_own_training_phrasings(both, frames):
    ours, calvins = both
    every = np.arange(len(ours))
    for windows in both:
        for index, text in zip(every, draw(windows, every).instructions, strict=True):
            assert text in BY_NAME[frames.tasks[frames.task[index]]].phrasings
    assert set(calvins.texts) <= set(ours.texts)


def test_words_are_drawn_anew_and_processes_that_share_a_batch_agree_on_them(both):
    ours, _ = both
    every = np.arange(len(ours))
    whole = draw(ours, every).instructions
    assert whole == draw(ours, every).instructions
    assert whole != draw(ours, every, seed=1).instructions
    assert whole == draw(ours, every[:7]).instructions + draw(ours, every[7:]).instructions


def test_a_window_over_the_end_of_a_demonstration_is_padded_with_its_last_step(both, frames):
    ours, _ = both
    last = int(np.flatnonzero(np.diff(frames.episode))[0])  # the next frame is of the next demonstration
    batch = draw(ours, [last - 1], 4)
    assert batch.valid.tolist() == [[True, True, False, False]]
    assert (batch.images[0, 1:] == batch.images[0, 1]).all() and (
        batch.actions[0, 1:] == batch.actions[0, 1]
    ).all()


def test_frames_of_another_size_than_the_network_s_are_refused(both):
    with pytest.raises(UserError, match="takes images of 32 pixels, the demonstrations have 24"):
        both[0].batch(np.array([0]), 2, 32, np.random.default_rng(0))


def test_training_imports_neither_ros_nor_the_simulator():
    modules = [
        path.stem for path in (ROOT / "deer_vla_ros/lab/training").glob("*.py") if path.stem != "__init__"
    ]
    program = "import sys\n" + "".join(f"import deer_vla_ros.lab.training.{name}\n" for name in modules)
    program += "unwanted = ('rclpy', 'mujoco', 'deer_vla_ros.lab.sim', 'deer_vla_ros.lab.scoring')\n"
    program += "print([name for name in unwanted if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


class Announcing:
    """A source that says when it has made a batch."""

    def __init__(self):
        self.asked, self.made = [], threading.Semaphore(0)

    def batch(self, step, micro, share):
        if step == 9:
            raise UserError("no such step")
        self.asked.append((step, micro))
        self.made.release()
        return f"batch {step} {micro}"


def test_the_next_batches_are_made_before_they_are_asked_for():
    source = Announcing()
    batches = Prefetched(source, micro_batches=2, ahead=2)
    assert batches.batch(4, 1, Share()) == "batch 4 1"
    assert all(source.made.acquire(timeout=30) for _ in range(3)), "nobody has asked for the last two"
    assert source.asked == [(4, 1), (5, 0), (5, 1)]
    assert batches.batch(5, 0, Share()) == "batch 5 0"
    assert batches.batch(7, 1, Share()) == "batch 7 1", "out of order, it is made when it is asked for"
    with pytest.raises(UserError, match="no such step"):
        batches.batch(9, 0, Share())
