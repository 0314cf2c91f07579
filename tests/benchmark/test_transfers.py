"""`nanopd bench transfer` between two processes on the CPU: what it does, not how fast."""

from __future__ import annotations

from dataclasses import replace

import pytest
from workers.processes import what_is_held

from nanopd.benchmark import command, transfers
from nanopd.benchmark.results import load
from nanopd.workers.relay import PinnedRelayTransport
from nanopd.workers.transfer import TransferError

SMALL = replace(transfers.CASES["cpu"], num_blocks=128, counts=(1, 20), least_bytes=2**18)


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(transfers, "TURNS", 1)
    monkeypatch.setattr(transfers, "LATENCIES", 3)
    monkeypatch.setattr(transfers, "LARGE_BYTES", 1e6)
    monkeypatch.setitem(transfers.CASES, "cpu", SMALL)


def test_every_transport_is_measured_and_nothing_is_left(tmp_path):
    before = what_is_held()[0]
    assert command.main(["transfer", "--device", "cpu", "--out", str(tmp_path)]) == 0
    assert what_is_held()[0] == before
    report = load("transfer", folder=tmp_path)
    assert report.device["kind"] == "cpu" and report.ceilings["peer_copy_gb_s"] > 0
    assert [(row["transport"], row["pieces"], row["blocks"]) for row in report.rows] == [
        (transport, pieces, count) for transport in transfers.TRANSPORTS for pieces in ("whole", "layers") for count in (1, 20)]
    for row in report.rows:
        assert row["mb"] == row["blocks"] * 5 * 2 * 16 * 2 * 64 * 4 / 1e6  # the embedded model's layers, and so on
        assert row["gb_s"] == pytest.approx(row["mb"] / row["ms"], rel=1e-3)
        assert row["share"] == pytest.approx(row["gb_s"] / row["copy_gb_s"], rel=1e-3)
    peer_whole = report.rows[1]
    assert report.summary["peer_share_of_copy"] == peer_whole["share"]
    assert set(report.summary["latency_us"]) == set(transfers.TRANSPORTS) and "not_possible" not in report.summary


def test_a_transport_that_can_not_be_had_is_named(monkeypatch):
    def refuse(*args):
        raise TransferError("no shared memory here")

    monkeypatch.setattr(PinnedRelayTransport, "__init__", refuse)
    _, rows, summary = transfers.run(SMALL)
    assert {row["transport"] for row in rows} == {"peer", "collective"}
    assert "no shared memory here" in summary["not_possible"]["relay"]


def test_bytes_that_do_not_arrive_are_no_result(monkeypatch):
    monkeypatch.setattr(transfers, "checksum", lambda *args: 1)
    before = what_is_held()[0]
    with pytest.raises(RuntimeError, match="peer: what arrived is not what was sent"):
        transfers.run(SMALL)
    assert what_is_held()[0] == before
