"""Ctrl-C while something is noted down, and while it is not."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from nanopd.interrupts import interruptible, uninterrupted


def ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(autouse=True)
def as_before():
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(KeyboardInterrupt):
        ctrl_c()


def test_it_waits_for_the_end_of_the_block():
    reached = []
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        ctrl_c()
        with uninterrupted():
            ctrl_c()
        reached.append("the end")
    assert reached == ["the end"]


def test_it_comes_through_where_it_may():
    reached = []
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        with interruptible():
            ctrl_c()
            reached.append("too far")
    assert not reached


def test_one_that_was_held_back_comes_as_soon_as_it_may():
    reached = []
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        ctrl_c()
        reached.append("the first part")
        with interruptible():
            reached.append("too far")
    assert reached == ["the first part"]


def test_after_an_interruptible_part_it_is_held_back_again():
    reached = []
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        with interruptible():
            pass
        ctrl_c()
        reached.append("the end")
    assert reached == ["the end"]


def test_one_that_was_caught_is_not_raised_twice():
    with uninterrupted():
        with pytest.raises(KeyboardInterrupt), interruptible():
            ctrl_c()


def test_an_error_is_not_held_back():
    with pytest.raises(ValueError), uninterrupted(), interruptible():
        raise ValueError


def test_other_threads_neither_hold_it_back_nor_let_it_through():
    def elsewhere():
        with uninterrupted(), interruptible():
            reached.append(signal.getsignal(signal.SIGINT))

    reached = []
    with uninterrupted():
        held_back = signal.getsignal(signal.SIGINT)
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert reached == [held_back] != [signal.default_int_handler]
