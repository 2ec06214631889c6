"""The process of the operator: it gives the instruction and calls the policy node's services.

The soak command starts it. A request on stdin names one of ACTIONS ("do") and its arguments ("with"). The
answer is a line with the request's id, the begin and end of the work [ns, wall clock], and the action's
result.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import rclpy
from lifecycle_msgs.msg import State, Transition
from lifecycle_msgs.srv import ChangeState, GetState
from rcl_interfaces.msg import Parameter, ParameterType, ParameterValue
from rcl_interfaces.srv import SetParametersAtomically
from rclpy.client import Client
from rclpy.executors import SingleThreadedExecutor
from rclpy.task import Future
from std_msgs.msg import String
from std_srvs.srv import SetBool, Trigger

from deer_vla_ros.lab.soak import jsonlines
from deer_vla_ros.ros.process import ros_process
from deer_vla_ros.ros.qos import LATCHED

NODE = "deer_vla"
IN_FLIGHT = 8
"""The most requests that wait for an answer at the same time: a service's queue holds ten and drops more."""
PATIENCE_S = 10.0
"""The most time for an answer, which may have to wait for an inference or for a lock."""
CLIENTS = 4
"""The number of clients that set parameters at the same time."""
PARAMETERS: tuple[tuple[str, float], ...] = (
    ("budget.average_fraction", 0.7),
    ("budget.average_fraction", -1.0),
    ("budget.average_fraction", 0.0),
    ("inputs.max_skew_s", 0.05),
    ("inputs.max_age_s", 1e9),
    ("guard.leash_m", -1.0),
    ("no.such_parameter", 1.0),
    ("budget.peak_gmac", float("nan")),
    ("action.gripper_hysteresis", 0.05),
)
"""Parameters that a flood sets in turn. Valid values leave the node as it is; the node must refuse the
others."""


class Caller:
    """The operator's node.

    It has the same clients all the time: a server keeps memory for every client it has had.
    """

    def __init__(self) -> None:
        self.node = rclpy.create_node("soak_operator")
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(self.node)
        self._instruction = self.node.create_publisher(String, "instruction", LATCHED)
        self._hold = self.node.create_client(SetBool, f"{NODE}/hold")
        self._reset = self.node.create_client(Trigger, f"{NODE}/reset")
        self._change = self.node.create_client(ChangeState, f"{NODE}/change_state")
        self._state = self.node.create_client(GetState, f"{NODE}/get_state")
        name = f"{NODE}/set_parameters_atomically"
        self._parameters = [self.node.create_client(SetParametersAtomically, name) for _ in range(CLIENTS)]

    def close(self) -> None:
        """Destroys the node."""
        self._executor.shutdown()
        self.node.destroy_node()

    def spin(self, seconds: float) -> None:
        """Handles one event, waiting for it at most `seconds`."""
        self._executor.spin_once(timeout_sec=seconds)

    # --- Actions. Their arguments come from the request.

    def instruct(self, text: str, repeat: int = 1) -> dict[str, Any]:
        """Publishes an instruction: `text`, repeated `repeat` times within one message."""
        self._instruction.publish(String(data=text * repeat))
        return {}

    def instruction_flood(self, rate_hz: float, seconds: float) -> dict[str, Any]:
        """Publishes instructions at `rate_hz` for `seconds`, with another text every time."""
        end = time.monotonic() + seconds
        count = 0
        while (now := time.monotonic()) < end:
            self._instruction.publish(String(data=f"lift block number {count}"))
            count += 1
            self.spin(max(0.0, min(1 / rate_hz, end - now)))
        return {"sent": count}

    def hold(self, value: bool) -> dict[str, Any]:
        """Calls ~/hold, up to three times: a server that has just started may lose the first request."""
        for _ in range(3):
            answers = self._call_all([(self._hold, SetBool.Request(data=value))], PATIENCE_S / 3)
            if answers and answers[0].success:
                return {"ok": True}
        return {"ok": False}

    def hold_flood(self, count: int) -> dict[str, Any]:
        """Calls ~/hold with true and false in turn; the last call, with false, lets the arm move again."""
        requests = [(self._hold, SetBool.Request(data=index % 2 == 0)) for index in range(2 * (count // 2))]
        return {"sent": len(requests), "answered": len(self._call_all(requests))}

    def hold_both(self, count: int) -> dict[str, Any]:
        """Calls ~/hold with true and false at the same time, `count` times."""
        answered = 0
        for _ in range(count):
            requests = [(self._hold, SetBool.Request(data=value)) for value in (True, False)]
            answered += len(self._call_all(requests))
        return {"sent": 2 * count, "answered": answered}

    def reset_flood(self, count: int) -> dict[str, Any]:
        """Calls ~/reset `count` times without a pause."""
        answers = self._call_all([(self._reset, Trigger.Request())] * count)
        return {"sent": count, "answered": len(answers)}

    def parameter_flood(self, count: int) -> dict[str, Any]:
        """Sets valid and invalid parameters from all clients at the same time."""
        wanted = (PARAMETERS[index % len(PARAMETERS)] for index in range(count))
        requests = [
            (self._parameters[index % CLIENTS], _request({name: value}))
            for index, (name, value) in enumerate(wanted)
        ]
        answers = self._call_all(requests, 30.0)
        accepted = sum(answer.result.successful for answer in answers)
        return {"sent": count, "answered": len(answers), "accepted": accepted}

    def set_parameters(self, values: dict[str, float]) -> dict[str, Any]:
        """Sets all values in one atomic request.

        The result says whether they were accepted, and if not, why.
        """
        answers = self._call_all([(self._parameters[0], _request(values))])
        accepted = bool(answers) and answers[0].result.successful
        reason = answers[0].result.reason if answers else "no answer"
        return {"accepted": accepted, "reason": reason, "answered": len(answers)}

    def transitions(self, ids: list[int]) -> dict[str, Any]:
        """Requests lifecycle transitions one after another. made: whether each succeeded.

        An entry None means that no answer came; later transitions are not requested then.
        """
        made: list[bool | None] = []
        for number in ids:
            request = ChangeState.Request(transition=Transition(id=number))
            answers = self._call_all([(self._change, request)])
            made.append(answers[0].success if answers else None)
            if not answers:
                break
        return {"made": made}

    def is_active(self) -> dict[str, Any]:
        """Asks for the node's lifecycle state. ok: whether it is active."""
        answers = self._call_all([(self._state, GetState.Request())], 2.0)
        return {"ok": bool(answers) and answers[0].current_state.id == State.PRIMARY_STATE_ACTIVE}

    # --- Calls.

    def _call_all(self, requests: Iterable[tuple[Client, Any]], patience_s: float = PATIENCE_S) -> list[Any]:
        """Sends all requests, at most IN_FLIGHT at a time. Returns the answers that came in time."""
        answers: list[Any] = []
        waiting: list[Future] = []
        todo = list(requests)
        deadline = time.monotonic() + patience_s
        while (todo or waiting) and time.monotonic() < deadline:
            while todo and len(waiting) < IN_FLIGHT and todo[0][0].service_is_ready():
                client, request = todo.pop(0)
                waiting.append(client.call_async(request))
            self.spin(0.05)
            answers += [future.result() for future in waiting if future.done()]
            waiting = [future for future in waiting if not future.done()]
        for future in waiting:
            future.cancel()
        return answers


def _request(values: dict[str, Any]) -> SetParametersAtomically.Request:
    parameters = []
    for name, value in values.items():
        if isinstance(value, list):
            kind = ParameterValue(type=ParameterType.PARAMETER_DOUBLE_ARRAY, double_array_value=value)
        else:
            kind = ParameterValue(type=ParameterType.PARAMETER_DOUBLE, double_value=float(value))
        parameters.append(Parameter(name=name, value=kind))
    return SetParametersAtomically.Request(parameters=parameters)


ACTIONS: dict[str, Callable[..., dict[str, Any]]] = {
    action.__name__: action
    for action in (
        Caller.instruct,
        Caller.instruction_flood,
        Caller.hold,
        Caller.hold_flood,
        Caller.hold_both,
        Caller.reset_flood,
        Caller.parameter_flood,
        Caller.set_parameters,
        Caller.transitions,
        Caller.is_active,
    )
}


def main() -> None:
    """Runs the operator until its stdin ends or a signal comes."""
    lines = jsonlines.requests()
    with ros_process([]) as stop:
        caller = Caller()
        jsonlines.tell(ready=True)
        while not stop.is_set():
            caller.spin(0.05)
            requests = jsonlines.waiting(lines)
            if jsonlines.ENDED in requests:
                break
            for request in requests:
                begin_ns = time.time_ns()
                answer = ACTIONS[request["do"]](caller, **request.get("with", {}))
                jsonlines.tell(id=request["id"], begin=begin_ns, at=time.time_ns(), **answer)
        caller.close()


if __name__ == "__main__":
    main()
