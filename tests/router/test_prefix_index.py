"""What a worker was sent: the longest known beginning, never a middle without its beginning."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from router.script import Script, destination, prefilled, tokens

from nanopd.block_manager.manager import BlockSpaceManager
from nanopd.core import Request, Sequence
from nanopd.router.policies import AlwaysCollocated, AlwaysDisaggregated
from nanopd.router.prefix_index import PrefixIndex, hash_prompt

prompts = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=14), min_size=1, max_size=12)


@given(prompts, st.integers(1, 12))
def test_what_is_known_is_a_beginning_and_the_latest_prompt_is_known_as_far_as_it_fits(prompts, capacity):
    index = PrefixIndex(capacity)
    for prompt in prompts:
        hashes = hash_prompt(prompt, 2)
        index.add(hashes)
        assert len(index) <= capacity and index.match(hashes) == min(len(hashes), capacity)
        for other in prompts:
            known = [each in index._hashes for each in hash_prompt(other, 2)]
            assert index.match(hash_prompt(other, 2)) == sum(known) == (known + [False]).index(False)


def test_a_block_is_known_by_all_before_it():
    assert hash_prompt([1, 2, 3, 4, 5], 2) == hash_prompt([1, 2, 3, 4], 2)
    assert hash_prompt([1, 2, 3, 4], 2)[1] != hash_prompt([9, 2, 3, 4], 2)[1] and hash_prompt([1], 2) == []


def test_it_knows_as_much_as_a_worker_s_own_cache_finds():
    """Of what is computed, and not evicted."""
    manager, index = BlockSpaceManager(64, 4), PrefixIndex(64)
    for prompt in ([1] * 11, [1] * 8 + [2] * 8, [1] * 12 + [3] * 3):
        sequence = Sequence(prompt)
        manager.allocate(sequence)
        cached = sequence.num_computed
        assert min(index.match(hash_prompt(prompt, 4)) * 4, len(prompt) - 1) // 4 * 4 == cached
        manager.append_slot(sequence, len(prompt) - cached)
        sequence.num_computed = len(prompt)
        manager.commit(sequence)
        index.add(hash_prompt(prompt, 4))
        manager.free(sequence)


def cached_tokens(script, worker_id, hashes, prompt_len):
    num_blocks = script.central.fleet.workers[worker_id].book.prefixes.match(hashes)
    return script.central.books.cached_tokens(num_blocks, prompt_len)


def test_workers_are_remembered_by_what_they_were_sent():
    script = Script("C0 C1", "adaptive", router=AlwaysCollocated())
    prompt = [1, 2, 3, 4, 5, 6, 7, 8]
    hashes = hash_prompt(prompt, 4)
    assert cached_tokens(script, "C0", hashes, 8) == 0
    script.central.submit(Request("a", prompt))
    script.step()
    assert [cached_tokens(script, "C0", hashes, length) for length in (8, 9)] == [4, 8]  # the last token is always run
    assert cached_tokens(script, "C1", hashes, 8) == 0
    assert script.central.fleet.workers["C0"].book.total.queued == 8
    script.central.submit(Request("b", [*prompt, 9]), "collocated")  # to C1: the fixed modes look at nothing but the load
    script.central.submit(Request("c", [*prompt, 9]), "collocated")
    script.step()
    assert script.central.fleet.workers["C0"].book.pages["c"].queued == 1


def test_d_remembers_what_arrived():
    script = Script("P0 D0", "adaptive", router=AlwaysDisaggregated())
    script.central.submit(Request("a", [1, 2, 3, 4, 5]))
    script.step(script.grant("D0", "a"))
    hashes = hash_prompt([1, 2, 3, 4, 5], 4)
    assert [cached_tokens(script, worker_id, hashes, 5) for worker_id in ("P0", "D0")] == [4, 0]
    script.step(("P0", tokens("a")), ("P0", prefilled(destination(script, "a"), "a")))
    assert cached_tokens(script, "D0", hashes, 5) == 4


@pytest.mark.parametrize("options", [dict(mode="collocated"), dict(mode="adaptive", router=AlwaysCollocated(), prefix_caching=False)])
def test_nothing_is_hashed_where_nobody_asks_or_workers_keep_nothing(options):
    script = Script("C0", **options)
    script.central.submit(Request("a", [1, 2, 3, 4, 5, 6, 7, 8]))
    script.step()
    assert script.central._entries["a"].hashes == [] and len(script.central.fleet.workers["C0"].book.prefixes) == 0
