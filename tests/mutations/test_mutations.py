"""Tests of the tests: each fault, put in on purpose, turns a check red that the rest of the suite relies on.

The checks are those tests' own: `assert_tokens_equal_reference` and `assert_nothing_leaked` of tests/workers, the state
machine of tests/scheduler, and the block manager's `check`. Every one is seen to pass before the fault and to fail
with it. The faults are undone by monkeypatch.
"""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch.nn.functional as F
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from scheduler.test_scheduler_state_machine import EngineMachine
from workers.serving import MIX, assert_nothing_leaked, assert_tokens_equal_reference, serve_mix

from nanopd.block_manager.cache import KVCache
from nanopd.block_manager.manager import BlockSpaceManager
from nanopd.block_manager.pool import BlockPool
from nanopd.engine.scheduler import Scheduler
from nanopd.models import layers
from nanopd.workers.transfer import Arrived, LocalTransport, Transfer


def check_tokens(reference, mode):
    """What test_cluster_inline.py::test_both_pipelines_give_the_references_tokens asserts."""
    with reference.cluster(mode, prefill_chunk_size=7) as cluster:
        for worker in cluster.workers.values():  # whose memory may still hold the same keys from an earlier cluster
            worker.cache.poison(range(worker.manager.num_blocks))
        assert_tokens_equal_reference(serve_mix(cluster), MIX, reference)


def check_leaks(reference, mode):
    """What every test of test_cluster_inline.py asserts at its end."""
    with reference.cluster(mode, prefill_chunk_size=7) as cluster:
        serve_mix(cluster)
        assert_nothing_leaked(cluster)


def check_engine():
    """test_scheduler_state_machine.py's machine, without the search for a shorter example."""
    run_state_machine_as_test(EngineMachine, settings=settings(
        max_examples=150, stateful_step_count=40, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
        report_multiple_bugs=False))


def in_both_modes(check, mode):
    return lambda reference: check(reference, mode)


CHECKS = {
    "tokens, collocated": in_both_modes(check_tokens, "collocated"),
    "tokens, disaggregated": in_both_modes(check_tokens, "disaggregated"),
    "leaks, collocated": in_both_modes(check_leaks, "collocated"),
    "leaks, disaggregated": in_both_modes(check_leaks, "disaggregated"),
    "state machine": lambda reference: check_engine(),
}


# ----------------------------------------------------------------------------------------------- the faults


def drop_copies(monkeypatch):
    """Copy-on-write without the copy, in the tensors."""
    monkeypatch.setattr(KVCache, "copy_blocks", lambda self, pairs: None)


def forget_to_plan_copies(monkeypatch):
    """Copy-on-write without the copy, in the plan."""
    append_slot = BlockSpaceManager.append_slot
    monkeypatch.setattr(BlockSpaceManager, "append_slot",
                        lambda self, sequence, num_new=1: append_slot(self, sequence, num_new) and [])


def see_only_the_chunk(monkeypatch):
    """A chunk of several tokens after the first does not see what is in the cache. Decodes and first chunks are right."""
    attention = layers.paged_attention

    def blind(query, key_cache, value_cache, batch, scale):
        output = attention(query, key_cache, value_cache, batch, scale)
        starts = [0, *accumulate(batch.query_lens)]
        for start, new, context in zip(starts, batch.query_lens, batch.context_lens):
            if 1 < new < context:
                own = batch.slot_mapping[start : start + new]
                keys, values = (cache.flatten(0, 1)[own].transpose(0, 1) for cache in (key_cache, value_cache))
                chunk = F.scaled_dot_product_attention(query[start : start + new].transpose(0, 1), keys, values,
                                                       is_causal=True, scale=scale, enable_gqa=True)
                output[start : start + new] = chunk.transpose(0, 1)
        return output

    monkeypatch.setattr(layers, "paged_attention", blind)


def leak_a_reference(monkeypatch):
    """One block in ten is never released."""
    release = BlockPool.release
    monkeypatch.setattr(BlockPool, "release",
                        lambda self, block_id, seq_id=None: block_id % 10 == 2 or release(self, block_id, seq_id))


def free_all_blocks_but_one(monkeypatch):
    """Whoever lets go of several blocks keeps the first."""
    release = BlockSpaceManager._release
    monkeypatch.setattr(BlockSpaceManager, "_release",
                        lambda self, block_ids, seq_id=None: release(self, block_ids[1:] or block_ids, seq_id))


def forget_to_free_a_sequence(monkeypatch):
    """The books balance, but the tables of long answers stay behind."""
    finish = Scheduler.finish
    monkeypatch.setattr(Scheduler, "finish", lambda self, sequence, reason: (
        finish(self, sequence, reason) if sequence.num_output < 12 else sequence.finish(reason)))


def skip_a_layer(monkeypatch):
    """One layer of the KV does not travel."""
    send = LocalTransport.send

    def send_others(self, layers, *blocks):
        for layer in set(layers) - {1}:
            send(self, range(layer, layer + 1), *blocks)
        return Arrived()

    monkeypatch.setattr(LocalTransport, "send", send_others)


def send_half_full_blocks_once(monkeypatch):
    """A block that a chunk leaves half full is not sent again when it is full."""
    def blocks_to_send(self, row):
        computed, size = row.num_cached + row.num_new, self._block_size
        return range(-(-self.num_sent // size), -(-computed // size))

    monkeypatch.setattr(Transfer, "_blocks_to_send", blocks_to_send)


def hold_the_writers_lease(monkeypatch):
    """The prefill worker never lets go of the blocks it has written to."""
    release_lease = BlockSpaceManager.release_lease
    monkeypatch.setattr(BlockSpaceManager, "release_lease",
                        lambda self, lease, holder: holder == "writer" or release_lease(self, lease, holder))


CAUGHT_BY = [
    (drop_copies, "tokens, collocated"),
    (drop_copies, "tokens, disaggregated"),
    (forget_to_plan_copies, "tokens, collocated"),
    (forget_to_plan_copies, "state machine"),
    (see_only_the_chunk, "tokens, collocated"),
    (see_only_the_chunk, "tokens, disaggregated"),
    (leak_a_reference, "leaks, collocated"),
    (leak_a_reference, "leaks, disaggregated"),
    (leak_a_reference, "state machine"),
    (free_all_blocks_but_one, "leaks, collocated"),
    (free_all_blocks_but_one, "leaks, disaggregated"),
    (forget_to_free_a_sequence, "leaks, collocated"),
    (forget_to_free_a_sequence, "leaks, disaggregated"),
    (forget_to_free_a_sequence, "state machine"),
    (skip_a_layer, "tokens, disaggregated"),
    (send_half_full_blocks_once, "tokens, disaggregated"),
    (hold_the_writers_lease, "leaks, disaggregated"),
]


# The machine runs in test_scheduler_state_machine.py, just as here.
@pytest.mark.parametrize("check", [pytest.param(check, marks=pytest.mark.nightly) if check == "state machine" else check
                                   for check in CHECKS])
def test_without_a_fault_every_check_is_green(reference, check):
    CHECKS[check](reference)


@pytest.mark.parametrize(("fault", "check"), CAUGHT_BY, ids=lambda value: getattr(value, "__name__", value))
def test_a_fault_turns_its_check_red(reference, monkeypatch, fault, check):
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        CHECKS[check](reference)
