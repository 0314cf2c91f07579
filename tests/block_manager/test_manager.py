"""The manager's rules: block tables, prefix hits, copy-on-write, leases, and a `check` that can fail."""

import copy
import time

import pytest

from nanopd.block_manager import BlockSpaceManager, InvariantError, NoFreeBlocks
from nanopd.config import CacheConfig, ConfigError
from nanopd.core import Sequence


def run_all(manager, sequence):
    """What an engine does: make room for all remaining tokens, run them, commit."""
    copies = manager.append_slot(sequence, sequence.num_remaining) if sequence.num_remaining else []
    sequence.num_computed = len(sequence)
    manager.commit(sequence)
    return copies


def admitted(manager, token_ids):
    """A sequence whose tokens are all computed."""
    sequence = Sequence(token_ids)
    manager.allocate(sequence)
    run_all(manager, sequence)
    return sequence


def cached(manager, token_ids):
    """Leave `token_ids` in the prefix cache with nobody using them. Returns the block table they had."""
    sequence = admitted(manager, token_ids)
    table = manager.block_table(sequence)
    manager.free(sequence)
    return table


def state(manager):
    """Everything that a refused call must leave alone."""
    prefixes = {seq_id: list(table.prefixes) for seq_id, table in manager._tables.items()}
    findable = dict(manager.pool._findable)
    order = (list(manager.pool._blank), list(manager.pool._evictable))
    return copy.deepcopy(manager.snapshot()), prefixes, findable, order, len(manager.events)


# ------------------------------------------------------------------------------------ allocate and prefixes


@pytest.mark.parametrize(("num_tokens", "blocks"), [(0, 0), (1, 1), (15, 1), (16, 1), (17, 2), (1000, 63)])
def test_blocks_needed_rounds_up(num_tokens, blocks):
    assert BlockSpaceManager(64).blocks_needed(num_tokens) == blocks


def test_settings_are_checked_and_taken_from_a_config():
    config = CacheConfig(num_blocks=20, block_size=8, enable_prefix_caching=False, watermark=0.1)
    assert BlockSpaceManager.from_config(config).config == config
    with pytest.raises(ConfigError, match="num_blocks"):
        BlockSpaceManager(0)
    with pytest.raises(ConfigError, match="watermark"):
        BlockSpaceManager(4, watermark=1.0)


def test_a_prompt_gets_a_block_table_and_free_gives_it_back():
    manager = BlockSpaceManager(8, block_size=4)
    sequence = Sequence(range(9))
    assert not manager.has_table(sequence)
    assert manager.allocate(sequence) == sequence.num_computed == 0
    assert len(manager.block_table(sequence)) == 3 and manager.num_used_blocks == 3
    manager.block_table(sequence).clear()
    assert len(manager.block_table(sequence)) == 3, "block_table returns a copy"
    manager.free(sequence)
    manager.free(sequence)
    assert not manager.has_table(sequence) and manager.num_free_blocks == 8
    manager.check()


def test_a_second_prompt_shares_the_blocks_of_its_cached_prefix():
    manager = BlockSpaceManager(16, block_size=4)
    first = admitted(manager, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    second = Sequence([1, 2, 3, 4, 5, 6, 7, 8, 10, 11])
    assert manager.cached_prefix(second.token_ids) == manager.block_table(first)[:2]
    assert manager.allocate(second) == second.num_computed == 8
    assert manager.block_table(second)[:2] == manager.block_table(first)[:2]
    assert [manager.ref_count(block) for block in manager.block_table(second)] == [2, 2, 1]
    assert manager.num_used_blocks == 4
    counters = manager.counters
    assert (counters.hits, counters.hit_tokens, counters.misses) == (2, 8, 2)  # the first prompt missed twice
    manager.check()


def test_at_least_one_token_is_left_to_compute():
    manager = BlockSpaceManager(8, block_size=4)
    table = cached(manager, range(8))
    assert manager.cached_prefix(range(8)) == table[:1]
    assert manager.cached_prefix(range(9)) == table
    assert manager.cached_prefix([]) == []
    sequence = Sequence(range(8))
    assert manager.allocate(sequence) == 4


def test_looking_up_a_prefix_changes_nothing():
    manager = BlockSpaceManager(8, block_size=4)
    cached(manager, range(8))
    before = state(manager)
    manager.cached_prefix(range(20))
    manager.can_allocate(Sequence(range(20)))
    assert state(manager) == before


def test_a_table_for_part_of_a_prompt_never_reaches_beyond_it():
    manager = BlockSpaceManager(16, block_size=4)
    cached(manager, range(12))
    sequence = Sequence(range(16))
    assert manager.allocate(sequence, num_tokens=6) == 4, "only half of the second block is wanted"
    assert len(manager.block_table(sequence)) == 2
    manager.free(sequence)
    assert manager.allocate(sequence, num_tokens=8) == 8
    run_all(manager, sequence)
    assert len(manager.block_table(sequence)) == 4
    manager.check()


def test_allocating_twice_or_for_tokens_that_are_not_there_is_an_error():
    manager = BlockSpaceManager(8, block_size=4)
    sequence = Sequence(range(4))
    for num_tokens in (0, 5):
        with pytest.raises(ValueError, match="from 1 to the sequence's 4"):
            manager.allocate(sequence, num_tokens)
    manager.allocate(sequence)
    with pytest.raises(ValueError, match="already has a block table"):
        manager.allocate(sequence)
    manager.check()


@pytest.mark.parametrize("call", ["block_table", "append_slot", "blocks_to_append", "commit", "fork"])
def test_a_sequence_without_a_table_is_an_error(call):
    with pytest.raises(ValueError, match="has no block table"):
        getattr(BlockSpaceManager(8), call)(Sequence([1]))


def test_without_prefix_caching_nothing_is_shared_or_counted():
    manager = BlockSpaceManager(8, block_size=4, enable_prefix_caching=False)
    cached(manager, range(8))
    sequence = Sequence(range(9))
    assert manager.allocate(sequence) == 0
    counters = manager.counters
    assert (counters.hits, counters.misses) == (0, 0)


# -------------------------------------------------------------------------- running out, and the watermark


def test_allocate_without_enough_blocks_changes_nothing():
    manager = BlockSpaceManager(4, block_size=4)
    cached(manager, range(8))
    holder = admitted(manager, [90, 91])
    before = state(manager)
    sequence = Sequence(range(17))
    with pytest.raises(NoFreeBlocks, match="5 blocks wanted, 3 of 4 are free"):  # 2 revived + 3 fresh
        manager.allocate(sequence)
    assert state(manager) == before and not manager.has_table(sequence)
    manager.free(holder)
    manager.check()


def test_reviving_a_cached_free_block_takes_a_free_block():
    manager = BlockSpaceManager(4, block_size=4)
    cached(manager, range(8))
    other = Sequence([90])
    manager.allocate(other)
    assert manager.num_free_blocks == 3
    assert manager.can_allocate(Sequence(range(12)))  # 2 revived + 1 fresh
    assert not manager.can_allocate(Sequence(range(13)))  # 2 revived + 2 fresh
    held = Sequence(range(12))
    manager.allocate(held)
    assert manager.num_free_blocks == 0
    assert not manager.can_allocate(Sequence(range(9))), "its 2 hits cost nothing now, but there is no third"
    manager.free(other)
    assert manager.can_allocate(Sequence(range(9)))


def test_hits_are_not_evicted_to_make_room_for_the_same_prompt():
    manager = BlockSpaceManager(3, block_size=4)
    table = cached(manager, range(8))
    cached(manager, range(50, 54))  # freed later, so the prompt's own blocks would be the first to go
    sequence = Sequence(range(12))
    manager.allocate(sequence)
    assert manager.block_table(sequence)[:2] == table and sequence.num_computed == 8
    manager.check()


def test_the_watermark_keeps_blocks_for_those_already_running():
    manager = BlockSpaceManager(10, block_size=4, watermark=0.2)
    whole_cache = Sequence(range(40))
    assert manager.can_allocate(whole_cache), "nothing is in use: there is nobody to keep blocks for"
    manager.allocate(Sequence([1]))
    assert manager.can_allocate(Sequence(range(28)))  # 7 of 9, leaves 2
    assert not manager.can_allocate(Sequence(range(29)))
    manager.allocate(Sequence(range(29)))  # allocate itself takes what there is
    assert manager.num_free_blocks == 1
    assert manager.grant_lease([1]) is None


# ------------------------------------------------------------------------------------------------- eviction


def test_a_freed_prompt_is_evicted_from_its_end():
    manager = BlockSpaceManager(4, block_size=4)
    cached(manager, range(16))
    manager.allocate(Sequence([90, 91]))
    assert len(manager.cached_prefix(range(17))) == 3
    manager.allocate(Sequence([92, 93]))
    assert len(manager.cached_prefix(range(17))) == 2
    assert manager.counters.evictions == 2


def test_the_prompt_used_last_is_evicted_last():
    manager = BlockSpaceManager(5, block_size=4)
    cached(manager, range(8))
    cached(manager, range(50, 58))
    manager.free(admitted(manager, range(9)))  # the first prompt again
    manager.allocate(Sequence(range(90, 99)))  # the blank block and two evictions
    assert len(manager.cached_prefix(range(9))) == 2
    assert manager.cached_prefix(range(50, 59)) == []


def test_reset_prefix_cache_forgets_held_and_free_blocks_alike():
    manager = BlockSpaceManager(8, block_size=4)
    held = admitted(manager, range(8))
    cached(manager, range(50, 58))
    manager.reset_prefix_cache()
    assert manager.cached_prefix(range(9)) == manager.cached_prefix(range(50, 59)) == []
    assert len(manager.block_table(held)) == 2
    manager.free(held)
    assert manager.num_free_blocks == 8 and manager.counters.evictions == 0
    manager.check()


# -------------------------------------------------------------------------- append, fork, copy-on-write


def test_append_slot_takes_a_block_only_when_the_last_one_is_full():
    manager = BlockSpaceManager(8, block_size=4)
    sequence = admitted(manager, range(3))
    assert manager.blocks_to_append(sequence) == 0
    assert manager.append_slot(sequence) == [] and len(manager.block_table(sequence)) == 1
    sequence.append_token(3)
    run_all(manager, sequence)
    assert manager.blocks_to_append(sequence) == 1
    assert manager.append_slot(sequence) == [] and len(manager.block_table(sequence)) == 2
    assert manager.blocks_to_append(sequence) == 0, "asking again for the same slot takes nothing"
    assert manager.blocks_to_append(sequence, num_new=9) == 2
    manager.check()
    with pytest.raises(ValueError, match="num_new must be at least 1"):
        manager.append_slot(sequence, 0)


def test_four_answers_share_63_blocks_and_then_need_66():
    """The workbook's section 1.4."""
    manager = BlockSpaceManager(num_blocks=256, block_size=16)
    parent = admitted(manager, range(1000))
    answers = [parent] + [manager.fork(parent) for _ in range(3)]
    assert manager.num_used_blocks == 63
    assert {manager.ref_count(block) for block in manager.block_table(parent)} == {4}
    last = manager.block_table(parent)[-1]
    copies = []
    for answer in answers:
        answer.append_token(7)
        copies.append(manager.append_slot(answer))
    assert manager.num_used_blocks == 66 and manager.counters.copies == 3
    assert [len(pairs) for pairs in copies] == [1, 1, 1, 0], "the fourth is alone and writes in place"
    assert [source for pairs in copies for source, _ in pairs] == [last] * 3
    destinations = [destination for pairs in copies for _, destination in pairs]
    assert [manager.block_table(answer)[-1] for answer in answers] == [*destinations, last]
    manager.check()
    for answer in answers:
        manager.free(answer)
    assert manager.num_free_blocks == 256


def test_copy_on_write_covers_every_shared_block_of_a_long_write():
    manager = BlockSpaceManager(16, block_size=4)
    parent = Sequence(range(14))
    manager.allocate(parent)
    parent.num_computed = 5
    child = manager.fork(parent)
    before = manager.block_table(parent)
    assert manager.blocks_to_append(child, num_new=9) == 3
    copies = manager.append_slot(child, num_new=9)
    assert [source for source, _ in copies] == before[1:4]
    assert manager.block_table(child)[:1] == before[:1] and manager.block_table(parent) == before
    assert manager.append_slot(parent, num_new=9) == []
    manager.check()


def test_append_slot_without_enough_blocks_changes_nothing():
    manager = BlockSpaceManager(4, block_size=4)
    parent = admitted(manager, range(10))
    child = manager.fork(parent)
    before = state(manager)
    with pytest.raises(NoFreeBlocks, match="2 blocks wanted, 1 of 4 are free"):  # a copy and a fresh one
        manager.append_slot(child, num_new=3)
    assert state(manager) == before
    assert len(manager.append_slot(child, num_new=2)) == 1
    manager.check()


def test_a_cached_block_is_forgotten_before_its_only_holder_overwrites_it():
    manager = BlockSpaceManager(8, block_size=4)
    sequence = admitted(manager, range(8))
    assert len(manager.cached_prefix(range(9))) == 2
    sequence.num_computed = 6  # the last two tokens are taken back
    sequence.token_ids[6:] = [60, 70]
    manager.append_slot(sequence, 2)
    assert len(manager.cached_prefix(range(9))) == 1
    run_all(manager, sequence)
    assert len(manager.cached_prefix([0, 1, 2, 3, 4, 5, 60, 70, 0])) == 2
    manager.check()


def test_a_cached_block_that_others_hold_is_copied_and_stays_cached():
    manager = BlockSpaceManager(8, block_size=4)
    parent = admitted(manager, range(8))
    child = manager.fork(parent)
    child.num_computed = 6
    child.token_ids[6:] = [60, 70]
    assert len(run_all(manager, child)) == 1
    assert manager.cached_prefix(range(9)) == manager.block_table(parent)
    assert manager.cached_prefix(child.token_ids + [0]) == manager.block_table(child)
    manager.check()


def test_a_fork_can_take_part_of_the_parent():
    manager = BlockSpaceManager(8, block_size=4)
    parent = admitted(manager, range(10))
    child = parent.fork(index=3)
    assert manager.fork(parent, child, num_tokens=6) is child
    assert manager.block_table(child) == manager.block_table(parent)[:2]
    assert child.num_computed == 6
    child.token_ids[6:] = [60, 70, 80]
    assert len(run_all(manager, child)) == 1
    assert manager.counters.forks == 1
    manager.check()


def test_a_fork_needs_a_parent_and_child_with_the_same_tokens():
    manager = BlockSpaceManager(8, block_size=4)
    parent = admitted(manager, range(6))
    with pytest.raises(ValueError, match="their first 6 tokens differ"):
        manager.fork(parent, Sequence([0, 1, 2, 3, 4, 99, 6]))
    child = manager.fork(parent)
    with pytest.raises(ValueError, match="already has a block table"):
        manager.fork(parent, child)
    manager.check()


def test_commit_hashes_each_block_once():
    manager = BlockSpaceManager(64, block_size=4)
    hashed = []
    original = manager.pool.hash_fn
    manager.pool.hash_fn = lambda parent, tokens: hashed.append(tuple(tokens)) or original(parent, tokens)
    sequence = Sequence(range(100))
    manager.allocate(sequence)
    assert len(hashed) == 1, "the lookup stops at the first miss"
    hashed.clear()
    while sequence.num_remaining:
        sequence.num_computed += 1
        manager.commit(sequence)
    assert hashed == [tuple(range(start, start + 4)) for start in range(0, 100, 4)]


def test_blocks_behind_a_lost_or_duplicate_block_can_still_be_found():
    """Two equal prompts at once: the first one's blocks are registered, the second goes on behind them."""
    manager = BlockSpaceManager(16, block_size=4)
    first, second = Sequence(range(8)), Sequence(range(12))
    manager.allocate(first)
    manager.allocate(second)
    run_all(manager, first)
    run_all(manager, second)
    found = manager.cached_prefix(range(13))
    assert found == manager.block_table(first) + manager.block_table(second)[2:]
    manager.check()


# --------------------------------------------------------------------------------------------------- leases


def test_a_lease_becomes_the_table_of_its_sequence():
    manager = BlockSpaceManager(8, block_size=4)
    cached(manager, range(4))
    lease = manager.grant_lease(range(10))
    assert (len(lease.block_ids), lease.num_cached, lease.holders) == (3, 4, {"request", "writer"})
    assert manager.leases == [lease] and manager.num_used_blocks == 3
    manager.check()
    manager.release_lease(lease, "writer")
    sequence = Sequence([*range(10), 77])
    manager.adopt(sequence, lease)
    assert manager.block_table(sequence) == lease.block_ids and sequence.num_computed == 10
    assert manager.leases == [] and {manager.ref_count(block) for block in lease.block_ids} == {1}
    assert run_all(manager, sequence) == [], "nobody else holds the last block: no copy"
    assert len(manager.cached_prefix(range(9))) == 2
    manager.free(sequence)
    assert manager.num_free_blocks == 8
    manager.check()


def test_a_cancelled_request_leaves_the_blocks_to_the_writer_until_it_is_done():
    manager = BlockSpaceManager(8, block_size=4)
    lease = manager.grant_lease(range(10))
    manager.release_lease(lease, "request")
    manager.release_lease(lease, "request")
    assert manager.num_used_blocks == 3 and manager.leases == [lease]
    with pytest.raises(ValueError, match="the request has let go"):
        manager.adopt(Sequence(range(10)), lease)
    manager.check()
    manager.release_lease(lease, "writer")
    manager.release_lease(lease, "writer")
    assert manager.num_used_blocks == 0 and manager.leases == []
    manager.check()


def test_a_sequence_freed_early_leaves_the_blocks_to_the_writer():
    manager = BlockSpaceManager(8, block_size=4)
    lease = manager.grant_lease(range(10))
    sequence = Sequence(range(10))
    manager.adopt(sequence, lease)
    assert {manager.ref_count(block) for block in lease.block_ids} == {2}
    manager.check()
    manager.free(sequence)
    assert manager.num_used_blocks == 3
    manager.release_lease(lease, "request")
    assert manager.num_used_blocks == 3, "adopting has discharged the request already"
    manager.release_lease(lease, "writer")
    assert manager.num_used_blocks == 0
    manager.check()


def test_a_block_the_writer_still_holds_is_copied_before_a_write():
    manager = BlockSpaceManager(8, block_size=4)
    lease = manager.grant_lease(range(10))
    sequence = Sequence(range(11))
    manager.adopt(sequence, lease)
    (source, destination), = manager.append_slot(sequence)
    assert source == lease.block_ids[-1] and destination not in lease.block_ids
    manager.check()


def test_a_lease_is_refused_when_blocks_are_short():
    manager = BlockSpaceManager(4, block_size=4, watermark=0.25)
    whole = manager.grant_lease(range(16))
    assert whole is not None, "nothing is in use: the watermark does not count"
    before = state(manager)
    assert manager.grant_lease([1]) is None
    assert state(manager) == before
    for holder in ("request", "writer"):
        manager.release_lease(whole, holder)
    manager.grant_lease([1])
    assert manager.grant_lease(range(12)) is None and manager.grant_lease(range(8)) is not None
    manager.check()


def test_a_lease_is_adopted_once_and_only_by_its_own_tokens():
    manager = BlockSpaceManager(8, block_size=4)
    lease = manager.grant_lease([1, 2, 3, 4, 5])
    with pytest.raises(ValueError, match="doesn't start with lease 0's tokens"):
        manager.adopt(Sequence([1, 2, 3, 4, 6]), lease)
    taken = admitted(manager, [9])
    with pytest.raises(ValueError, match="already has a block table"):
        manager.adopt(taken, lease)
    manager.adopt(Sequence([1, 2, 3, 4, 5]), lease)
    with pytest.raises(ValueError, match="the request has let go"):
        manager.adopt(Sequence([1, 2, 3, 4, 5]), lease)
    with pytest.raises(ValueError, match="not by 'reader'"):
        manager.release_lease(lease, "reader")
    with pytest.raises(ValueError, match="at least one token"):
        manager.grant_lease([])
    manager.check()


# ------------------------------------------------------------------------------------------- check can fail


def wrong_ref_count(manager, sequence, lease):
    manager.pool.blocks[manager.block_table(sequence)[0]].ref_count += 1
    return f"block {manager.block_table(sequence)[0]} has ref count 2, but 1 block tables and leases hold it"


def dropped_table(manager, sequence, lease):
    table = manager._tables.pop(sequence.seq_id)
    return f"block {table.block_ids[0]} has ref count 1, but 0 block tables and leases hold it"


def dropped_lease(manager, sequence, lease):
    del manager._leases[lease.lease_id]
    return f"block {lease.block_ids[0]} has ref count 1, but 0 block tables and leases hold it"


def lease_held_by_nobody(manager, sequence, lease):
    lease.holders.clear()
    return f"lease {lease.lease_id} is open, but nobody holds it"


def freed_while_held(manager, sequence, lease):
    block_id = manager.block_table(sequence)[0]
    manager.pool._blank.append(block_id)
    return f"block {block_id} is on the free list with ref count 1"


def duplicate_free_entry(manager, sequence, lease):
    manager.pool._blank.append(manager.pool._blank[0])
    return f"block {manager.pool._blank[0]} is on the free list 2 times"


def table_too_short(manager, sequence, lease):
    manager.pool.release(manager._tables[sequence.seq_id].block_ids.pop())
    return f"sequence {sequence.seq_id} has 10 computed tokens, but room for 8"


def block_twice_in_a_table(manager, sequence, lease):
    block_ids = manager._tables[sequence.seq_id].block_ids
    block_ids.append(block_ids[0])
    return f"sequence {sequence.seq_id} holds block {block_ids[0]} 2 times"


def no_such_block(manager, sequence, lease):
    manager._tables[sequence.seq_id].block_ids.append(99)
    return "block 99 is held, but there is no such block"


@pytest.mark.parametrize(
    "corrupt",
    [wrong_ref_count, dropped_table, dropped_lease, lease_held_by_nobody, freed_while_held,
     duplicate_free_entry, table_too_short, block_twice_in_a_table, no_such_block],
    ids=lambda corrupt: corrupt.__name__,
)
def test_check_names_what_is_wrong(corrupt):
    manager = BlockSpaceManager(16, block_size=4)
    sequence = admitted(manager, range(10))
    lease = manager.grant_lease(range(50, 60))
    manager.check()
    complaint = corrupt(manager, sequence, lease)
    with pytest.raises(InvariantError) as caught:
        manager.check()
    assert complaint in str(caught.value)


# --------------------------------------------------------------------------------------- pictures and costs


def test_a_snapshot_is_plain_data_and_does_not_follow_the_manager():
    manager = BlockSpaceManager(8, block_size=4)
    sequence = admitted(manager, range(5))
    lease = manager.grant_lease(range(6))
    snapshot = manager.snapshot()
    shared, own = manager.block_table(sequence)
    assert (snapshot["num_blocks"], snapshot["block_size"]) == (8, 4)
    assert snapshot["ref_counts"][shared] == 2 and snapshot["ref_counts"][own] == 1
    assert [block for block, is_cached in enumerate(snapshot["cached"]) if is_cached] == [shared]
    assert snapshot["tables"] == {sequence.seq_id: [shared, own]}
    assert snapshot["leases"] == {
        lease.lease_id: {"block_ids": lease.block_ids, "num_cached": 4, "holders": ["request", "writer"]}
    }
    assert snapshot["counters"]["hits"] == 1
    before = copy.deepcopy(snapshot)
    manager.free(sequence)
    manager.release_lease(lease, "request")
    assert snapshot == before


def test_every_kind_of_event_is_told():
    manager = BlockSpaceManager(5, block_size=4)
    first = admitted(manager, range(10))
    second = manager.fork(first)
    second.append_token(1)
    run_all(manager, second)
    manager.free(first)
    manager.free(second)
    lease = manager.grant_lease(range(20))
    manager.release_lease(lease, "writer")
    manager.adopt(Sequence(range(20)), lease)
    manager.reset_prefix_cache()
    kinds = {event.kind for event in manager.events}
    assert kinds == set("allocate hit share release free cache forget fork copy lease adopt".split())
    copied = next(event for event in manager.events if event.kind == "copy")
    assert copied.seq_id == second.seq_id and copied.other is not None
    others = {(event.kind, event.other) for event in manager.events if event.block is None}
    lease_id = lease.lease_id
    assert others == {("fork", first.seq_id), ("lease", lease_id), ("release", lease_id), ("adopt", lease_id)}


def test_a_step_costs_the_same_in_a_pool_of_100_000_blocks():
    """A ratio, not a time: the same moves in a pool 1,000 times as large, the best of several rounds."""

    def best_round(num_blocks):
        manager = BlockSpaceManager(num_blocks, block_size=4)
        best = float("inf")
        for round_number in range(12):
            start = time.perf_counter()
            for prompt in range(20):
                sequence = admitted(manager, [round_number, prompt, *range(30)])
                manager.free(manager.fork(sequence))
                manager.free(sequence)
            best = min(best, time.perf_counter() - start)
        return best

    assert best_round(100_000) < 10 * best_round(100)


def test_a_forgotten_sequence_is_found_no_more_and_keeps_its_table() -> None:
    manager = BlockSpaceManager(num_blocks=8, block_size=4)
    sequence = Sequence(range(10))
    manager.allocate(sequence)
    sequence.num_computed = 10
    manager.commit(sequence)
    assert len(manager.cached_prefix(range(10))) == 2
    manager.forget(sequence)
    assert manager.cached_prefix(range(10)) == []
    assert len(manager.block_table(sequence)) == 3
    manager.free(sequence)
    manager.forget(sequence)  # without a table: nothing happens
    manager.check()
    assert manager.num_used_blocks == 0
