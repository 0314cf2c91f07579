"""A sweep that nobody ran."""

from __future__ import annotations

import pytest
from benchmark.load.runs import record_of

from nanopd.benchmark.load.run import RunSettings
from nanopd.widgets.strings import set_language

TOPOLOGIES = {"collocated": "C:0 C:1", "disaggregated": "P:0 D:1", "adaptive": "C:0 C:1"}
TTFTS = {"collocated": 0.1, "disaggregated": 0.2, "adaptive": 0.12}


@pytest.fixture(autouse=True)
def english():
    set_language("en")
    yield
    set_language(None)


@pytest.fixture(scope="session")
def runs():
    """Three modes, two workloads, three rates, two seeds. TTFT grows with the rate; at 8/s disaggregated misses the SLO of 0.5 s."""
    return [record_of(RunSettings(model="made up", topology=TOPOLOGIES[mode], mode=mode, workload=workload, rate=rate, seed=seed,
                                  slo_ttft_ms=500.0, slo_tpot_ms=20.0, window=10.0, warmup=1.0),
                      ttft=TTFTS[mode] * rate / 2, mode="disaggregated" if (mode, rate) == ("adaptive", 8.0) else "",
                      failed=int(rate == 8.0), dropped=2 * int(rate == 8.0))
            for mode in TOPOLOGIES for workload in ("long", "short") for rate in (2.0, 4.0, 8.0) for seed in (0, 1)]
