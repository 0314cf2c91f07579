"""A link that is timed, and workers cast in roles for a while."""

from __future__ import annotations

import pytest
from router.script import STOP, Script, lost, tokens

from nanopd.config import ConfigError
from nanopd.core import InvalidRequest
from nanopd.messages import Destination, Granted, LinkTimed, Refused, TransferFailed

PROMPT = [1, 2, 3, 4, 5]
SENDS = [(64, 0.5), (64, 0.25)]


def asked(script):
    """A link whose destination is granted. Returns the job and the destination."""
    job = script.central.time_link("P0", "D0", PROMPT)
    assert script.told() == [("D0", "Reserve", job)]
    destination = Destination("D0", 9, [7, 8], 0)
    script.step(("D0", Granted(job, destination)))
    assert script.told() == [("D0", "ReleaseLease", 9), ("P0", "TimeLink", job)]
    return job, destination


def test_blocks_are_leased_sent_to_and_given_back():
    script = Script("P0 D0")
    job, destination = asked(script)
    times = LinkTimed(job, destination, "peer", SENDS)
    script.step(("P0", times))
    assert script.told() == [("D0", "ReleaseLease", 9)]
    assert script.central.link_times == {job: times}
    script.assert_empty()


def test_a_refusal_is_told():
    script = Script("P0 D0")
    job = script.central.time_link("P0", "D0", PROMPT)
    script.step(("D0", Refused(job)))
    assert "D0 has no room" in script.central.link_times[job]
    script.assert_empty()


def test_a_link_that_fails_is_told_and_its_blocks_are_given_back():
    script = Script("P0 D0")
    job, destination = asked(script)
    script.step(("P0", TransferFailed(job, destination, "no way")))
    assert script.told() == [("D0", "ReleaseLease", 9)] and script.central.link_times == {job: "no way"}
    script.assert_empty()


@pytest.mark.parametrize("worker_id", ["P0", "D0"])
def test_a_worker_that_is_lost_before_the_grant_ends_it(worker_id):
    script = Script("P0 P1 D0 D1")
    job = script.central.time_link("P0", "D0", PROMPT)
    says = [lost(worker_id)]
    if worker_id == "P0":
        says.append(("D0", Granted(job, Destination("D0", 9, [7, 8], 0))))
    script.step(*says)
    told = [("D0", "Reserve", job)] + [("D0", "ReleaseLease", 9)] * 2 * (worker_id == "P0")
    assert script.told() == told
    assert worker_id in script.central.link_times[job]
    script.assert_empty()


def test_a_sender_that_is_lost_lets_go_of_the_blocks():
    script = Script("P0 P1 D0")
    job, _ = asked(script)
    script.step(lost("P0"))
    assert script.told() == [("D0", "ReleaseLease", 9)] and "P0 was lost" in script.central.link_times[job]
    script.assert_empty()


def test_a_worker_that_is_not_there():
    script = Script("P0 D0")
    with pytest.raises(ConfigError, match="no worker 'D7'; workers are P0, D0"):
        script.central.time_link("P0", "D7", PROMPT)
    with pytest.raises(ConfigError, match="no worker 'X0'"), script.central.fleet.cast({"X0": "C"}):
        pass
    assert script.told() == []


# ---------------------------------------------------------------------------------------------------- casting


def test_those_who_are_cast_get_requests_and_the_others_none():
    script = Script("P0 D0 D1")
    with pytest.raises(InvalidRequest, match="needs workers of role C"):
        script.submit("a", mode="collocated")
    with script.central.fleet.cast({"D1": "C"}):
        script.submit("a", "b", mode="collocated")
        script.step()
        assert script.told() == [("D1", "Serve", "a"), ("D1", "Serve", "b")]  # and nobody was told of a role
        with pytest.raises(InvalidRequest, match="needs workers of role D and P; this cluster has C$"):
            script.submit("c")
        script.step(("D1", tokens("a", 5, STOP)), ("D1", tokens("b", 5, STOP)))
    script.submit("c", "d")
    script.step()
    assert script.told() == [("D0", "Reserve", "c"), ("D1", "Reserve", "d")]
    with pytest.raises(InvalidRequest, match="needs workers of role C"):
        script.submit("e", mode="collocated")


def test_one_who_is_lost_while_cast_is_missed_in_its_own_role():
    script = Script("P0 D0")
    with script.central.fleet.cast({"D0": "C"}):
        script.step(lost("D0"))
    script.submit("a")
    event, = script.step()
    assert "no decode worker is left: D0 was lost" in event.error
