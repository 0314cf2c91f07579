"""KV on its way in virtual time."""

from __future__ import annotations

import pytest

from nanopd.simulator import VirtualClock
from nanopd.simulator.cost_runner import LinkCosts
from nanopd.simulator.link import TimedLink


def make_link():
    clock = VirtualClock(10.0)
    return clock, TimedLink(LinkCosts(latency=1.0, token=0.25), clock, block_size=4, num_layers=2)


def test_sends_follow_one_another():
    """A block of 4 tokens takes 1 s in all layers, and another second later it is there."""
    clock, link = make_link()
    whole, half = link.send(range(2), [0], [5]), link.send(range(1), [0, 1], [5, 6])
    assert (whole.arrives, half.arrives) == (12.0, 13.0)
    clock.now = 20.0
    assert link.send(range(1, 2), [0], [5]).arrives == 21.5


def test_whoever_waits_spends_the_time_but_no_more_than_it_takes():
    clock, link = make_link()
    ticket = link.send(range(2), [0], [5])
    assert not ticket.wait(0.5) and clock.now == 10.5
    assert ticket.wait(5.0) and clock.now == 12.0
    assert ticket.wait(5.0) and ticket.wait() and clock.now == 12.0


def test_without_a_limit_it_waits_until_it_is_there():
    clock, link = make_link()
    assert link.send(range(2), [0], [5]).wait() and clock.now == 12.0


@pytest.mark.parametrize("now, following", [(10.0, 12.0), (12.0, 13.0), (12.5, 13.0), (13.0, None)])
def test_the_next_arrival(now, following):
    _, link = make_link()
    link.send(range(2), [0], [5])
    link.send(range(2), [0], [5])
    assert link.next_arrival(now) == following
