"""Small simulated clusters whose every time can be reckoned by hand."""

from __future__ import annotations

from workers.fake_cluster import assert_cluster_is_empty

from nanopd.config import CacheConfig, SchedulerConfig
from nanopd.cost_model.analytical import Shape
from nanopd.simulator import LinearCosts, Simulation

MODEL = Shape(num_layers=4, kv_bytes_per_token=512)
COSTS = LinearCosts(step=2e-3, prefill_token=1e-5, decode_row=1e-4, context_token=1e-7, latency=1e-4, transfer_token=4e-6)


def simulation(workers=None, mode="collocated", costs=COSTS, *, num_blocks=512, seqs=8, budget=128, max_model_len=8192,
               **options):
    cache = CacheConfig(num_blocks, block_size=16)
    scheduler = SchedulerConfig(seqs, budget, None, max_model_len)
    return Simulation(workers or {"C": 1}, mode, MODEL, costs, cache, scheduler, **options)


def lengths(random):
    """Of prompt and answer: from one token on, and some longer than a step's budget."""
    return random.randint(1, 300), random.randint(1, 60)


def times(result):
    return [(one.arrival, one.metrics.first_token_time, one.metrics.finish_time, one.path, one.timeline.marks)
            for one in result.requests]


def assert_all_is_over(sim, result, workload):
    """Every request has all its tokens, and nobody holds anything any more."""
    assert [one.num_tokens for one in result.requests] == [arrival.output_len for arrival in workload]
    assert_cluster_is_empty(sim.central, {worker_id: station.worker for worker_id, station in sim.stations.items()})
    assert not sim.executor.pending
