"""Tests of work in a thread: its result, its error, and what is left when it is given up."""

import threading
import weakref

import pytest

from deer_vla_ros.errors import Cancelled, UserError
from deer_vla_ros.ros.cancellable import Work


class Large:
    """Stands for the weights of a network."""


def test_the_result_is_given_once_and_not_kept():
    work = Work("test", lambda check: Large())
    work.start()
    work.join()
    made = weakref.ref(work.take_result())
    assert made() is None and work.take_result() is None


def test_an_error_is_raised_where_the_result_is_taken_and_keeps_nothing_in_memory():
    made = []

    def fail(check):
        large = Large()
        made.append(weakref.ref(large))
        raise UserError("no such file")

    work = Work("test", fail)
    work.start()
    work.join()
    with pytest.raises(UserError, match="no such file"):
        work.take_result()
    assert made[0]() is None


@pytest.mark.parametrize("asks_in_time", [True, False])
def test_work_that_is_given_up_ends_at_its_next_check_and_leaves_nothing(asks_in_time):
    begun, given_up, made, seen = threading.Event(), threading.Event(), [], []

    def do(check):
        large = Large()
        made.append(weakref.ref(large))
        begun.set()
        given_up.wait()
        if asks_in_time:
            try:
                check()
            except Cancelled as cancelled:
                seen.append(str(cancelled))
                raise
        return large

    work = Work("test", do)
    work.start()
    begun.wait()
    work.give_up("the process ends")
    given_up.set()
    work.join()
    assert seen == (["the process ends"] if asks_in_time else [])
    assert made[0]() is None
