"""Tests of a configure that takes long: over real DDS, a signal or a request ends it at once."""

import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from harness import START_TIMEOUT, Client, Process, spawn, wait_until
from lifecycle_msgs.msg import State, Transition
from slow_network import save_slow

SLOW = ("--ros-args", "-p", "model.cpu_threads:=1")


@pytest.fixture(scope="module")
def client():
    with Client("configure_test") as client:
        yield client


@pytest.fixture(scope="module")
def slow_checkpoint(tmp_path_factory) -> Path:
    """A checkpoint of which one step takes about three seconds."""
    return save_slow(tmp_path_factory.mktemp("slow"), 384)


def await_warm_up(process: Process, count: int = 1) -> None:
    """Waits until the first step of the warm-up runs, in the `count`-th configure."""
    wait_until(
        lambda: process.output().count("warm-up: at most") >= count, START_TIMEOUT, "the warm-up to begin"
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_configure_at_once_and_in_order(client, slow_checkpoint, number):
    with spawn("node", *SLOW, "-p", f"model.path:={slow_checkpoint}") as process:
        await_warm_up(process)
        assert process.stop(number) == 0
        output = process.output()
        assert "configure is cancelled: the process ends" in output, "it did not wait for the step"
        assert "Traceback" not in output and "most recent call" not in output


def test_a_request_ends_a_configure_at_once_and_the_node_lives_on(client, slow_checkpoint):
    node, arguments = "cancelled/deer_vla", ("-r", "__ns:=/cancelled", "-p", "autostart:=false")
    with (
        spawn("node", *SLOW, *arguments, "-p", f"model.path:={slow_checkpoint}") as process,
        ThreadPoolExecutor() as pool,
    ):
        for count, (transition, reached) in enumerate(
            [
                (Transition.TRANSITION_CLEANUP, State.PRIMARY_STATE_UNCONFIGURED),
                (Transition.TRANSITION_INACTIVE_SHUTDOWN, State.PRIMARY_STATE_FINALIZED),
            ]
        ):
            configured = pool.submit(client.change_state, node, Transition.TRANSITION_CONFIGURE)
            await_warm_up(process, count + 1)
            accepted = client.change_state(node, transition)
            assert not configured.result()
            assert client.state(node) == reached
            assert accepted == (reached == State.PRIMARY_STATE_FINALIZED), (
                "an unconfigured node has no cleanup"
            )
        output = process.output()
        assert "configure is cancelled: cleanup was requested" in output
        assert "configure is cancelled: shutdown was requested" in output
        assert process.stop() == 0
