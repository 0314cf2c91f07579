"""What a client saw of one request."""

from __future__ import annotations

from nanopd.benchmark.load import ClientRecord


def test_times_of_one_request():
    one = ClientRecord(10.0, 5, 3, sent=10.5, tokens=[11.0, 11.5, 13.0])
    assert (one.lateness, one.num_tokens, one.ttft, one.tpot, one.e2e) == (0.5, 3, 1.0, 1.0, 3.0)
    assert ClientRecord(10.0, 5, 1, sent=10.0, tokens=[11.0]).tpot is None
