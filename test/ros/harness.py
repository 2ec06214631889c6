"""Helpers for tests with running nodes: processes to start and stop, a client, and waiting for events.

Import it as `from harness import Client, spawn, wait_until`. ROS_DOMAIN_ID comes from the environment:
test/conftest.py gives every test process its own, and child processes inherit it.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator

import preloaded
import rclpy
from lifecycle_msgs.msg import State, Transition
from lifecycle_msgs.srv import ChangeState, GetState
from processes import wait_until
from rclpy._rclpy_pybind11 import InvalidHandle
from rclpy.context import Context
from rclpy.executors import SingleThreadedExecutor
from rclpy.qos import QoSProfile
from rclpy.task import Future

START_TIMEOUT = 60.0
"""The most seconds until a node has started on a busy machine; it mostly imports torch."""
PATIENCE_S = 2.0
"""The time that a call waits for a response until it counts as lost."""
REACHES = {
    Transition.TRANSITION_CONFIGURE: State.PRIMARY_STATE_INACTIVE,
    Transition.TRANSITION_ACTIVATE: State.PRIMARY_STATE_ACTIVE,
    Transition.TRANSITION_DEACTIVATE: State.PRIMARY_STATE_INACTIVE,
    Transition.TRANSITION_CLEANUP: State.PRIMARY_STATE_UNCONFIGURED,
}
"""The lifecycle state after each transition."""


class Process:
    """A child process in its own process group. Its output (both streams) can be read at any time."""

    def __init__(self, arguments: tuple[str, ...], env: dict[str, str] | None = None, fresh: bool = False):
        """Runs `python ARGUMENTS...`. fresh: the process imports its modules itself (see `preloaded`)."""
        self._log = tempfile.NamedTemporaryFile("a")
        if fresh:
            self._popen = subprocess.Popen(
                (sys.executable, *arguments),
                stdout=self._log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=env,
            )
        else:
            self._popen = preloaded.start(arguments, self._log.name, env)

    @property
    def pid(self) -> int:
        return self._popen.pid

    def output(self) -> str:
        """Everything that the process has printed so far."""
        # The file is opened again, because the child shares the position of its own handle.
        with open(self._log.name, errors="replace") as log:
            return log.read()

    def running(self) -> bool:
        return self._popen.poll() is None

    def send(self, signal_number: int) -> None:
        self._popen.send_signal(signal_number)

    def wait(self, timeout: float = 10.0) -> int:
        """Waits for the end and returns the exit status. Fails with the output after `timeout` seconds."""
        try:
            return self._popen.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout:g} s; output:\n{self.output()}") from None

    def stop(self, signal_number: int = signal.SIGTERM, timeout: float = 10.0) -> int:
        """Sends the signal and returns the exit status."""
        self.send(signal_number)
        return self.wait(timeout)

    def close(self) -> None:
        """Kills all processes of the group that still run. It is for clean-up, not to test an exit."""
        if self.running():
            self._popen.kill()
            self._popen.wait()
        self._log.close()


PRELOADED = ("node", "sim")
"""The commands that start as a fork of a process with all modules; the others start their own processes."""


def spawn(*command: str, env: dict[str, str] | None = None) -> contextlib.AbstractContextManager[Process]:
    """Runs `python -m deer_vla_ros COMMAND...`.

    If the test fails, its output is printed. At the end it is killed.
    """
    fresh = env is not None or command[0] not in PRELOADED
    return spawn_python("-m", "deer_vla_ros", *command, env=env, fresh=fresh)


@contextlib.contextmanager
def spawn_python(*arguments: str, env: dict[str, str] | None = None, fresh: bool = True) -> Iterator[Process]:
    """Runs `python ARGUMENTS...`, as `spawn` does."""
    process = Process(arguments, env, fresh)
    try:
        yield process
    except BaseException:
        print(f"--- output of {' '.join(arguments)}\n{process.output()}---")
        raise
    finally:
        process.close()


class Client:
    """A ROS node of the test with its own context, spun in a thread. Use it as a context manager.

    `listen` keeps every message of a topic. `publisher` waits for a subscriber. `call` waits for a response,
    `change_state` and `await_active` wait for a lifecycle state. Relative topic names are in `namespace`;
    tests that run at the same time need different ones.
    """

    def __init__(self, name: str = "test_client", namespace: str = ""):
        self._context = Context()
        rclpy.init(context=self._context)
        self.node = rclpy.create_node(name, namespace=namespace, context=self._context)
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self.node)
        self._clients: dict = {}
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._spin, name=f"{name}_spin")

    def _spin(self) -> None:
        # This is not executor.spin(): if another thread ends that, objects on which it waits are destroyed.
        try:
            while not self._stop.is_set():
                # A test may destroy an entity while the executor collects the entities to wait for.
                with contextlib.suppress(InvalidHandle):
                    self._executor.spin_once(timeout_sec=0.1)
        except BaseException as error:
            self._failure = error

    def __enter__(self) -> Client:
        self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._stop.set()
        self._thread.join()
        self._executor.shutdown()
        self.node.destroy_node()
        rclpy.shutdown(context=self._context)
        if self._failure is not None:
            raise self._failure

    def listen(self, message_type, topic: str, qos: QoSProfile | int = 100) -> list:
        """A list that grows with every message received on `topic`."""
        received: list = []
        self.node.create_subscription(message_type, topic, received.append, qos)
        return received

    def publisher(self, message_type, topic: str, qos: QoSProfile | int = 10, timeout: float = 10.0):
        """Returns a publisher on `topic` as soon as a subscription has matched it."""
        publisher = self.node.create_publisher(message_type, topic, qos)
        wait_until(publisher.get_subscription_count, timeout, f"a subscription on {topic}")
        return publisher

    def call(self, service_type, name: str, request=None, timeout: float = START_TIMEOUT):
        """Returns the response of service `name` to `request` (default: an empty one), which may be sent
        several times.

        A server that has not discovered the client's reader within 100 ms (set by rmw) drops its response. A
        request without a response is therefore sent again.
        """
        sent: list[tuple[float, Future]] = []

        def answered() -> list[Future]:
            if not sent or time.monotonic() - sent[-1][0] > PATIENCE_S:
                sent.append((time.monotonic(), self._ask(service_type, name, request, timeout)))
            return [future for _, future in sent if future.done()]

        return wait_until(answered, timeout, f"the response of {name}")[0].result()

    def state(self, node: str) -> int:
        """The lifecycle state of `node`, by its name with namespace."""
        return self.call(GetState, f"{node}/get_state").current_state.id

    def change_state(self, node: str, transition: int) -> bool:
        """Requests a transition of `node` once.

        Returns whether it succeeded. If the response is lost, the state decides.
        """
        request = ChangeState.Request(transition=Transition(id=transition))
        future, sent = (
            self._ask(ChangeState, f"{node}/change_state", request, START_TIMEOUT),
            time.monotonic(),
        )

        def made() -> list[bool]:
            if future.done():
                return [future.result().success]
            lost = time.monotonic() - sent > PATIENCE_S and self.state(node) == REACHES[transition]
            return [True] if lost else []

        return wait_until(made, START_TIMEOUT, f"transition {transition} of {node}")[0]

    def await_active(self, process: Process, node: str) -> None:
        """Waits until `node`, which runs in `process`, is active."""

        def active() -> bool:
            assert process.running(), process.output()
            return self.state(node) == State.PRIMARY_STATE_ACTIVE

        wait_until(active, START_TIMEOUT, f"{node} to be active")

    def _ask(self, service_type, name: str, request, timeout: float) -> Future:
        # Every service has one client for all calls, because a server keeps memory for every client that it
        # has had.
        if name not in self._clients:
            self._clients[name] = self.node.create_client(service_type, name)
        wait_until(self._clients[name].service_is_ready, timeout, f"service {name}")
        return self._clients[name].call_async(request or service_type.Request())
