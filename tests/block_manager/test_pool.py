"""The pool's rules: reference counts, exact prefix lookup, eviction order, and a `check` that can fail."""

import pytest

from nanopd.block_manager import BlockPool, InvariantError, NoFreeBlocks, hash_block


def make_pool(num_blocks=4, block_size=2, **options):
    return BlockPool(num_blocks, block_size, **options)


def cached_free_block(pool, token_ids, parent=None):
    """A block that held `token_ids`, was registered and freed. Returns (block id, prefix)."""
    block_id = pool.allocate()
    prefix = pool.register(block_id, parent, token_ids)
    pool.release(block_id)
    return block_id, prefix


def kinds(pool):
    return [event.kind for event in pool.events]


# ------------------------------------------------------------------------------------------- ref counts


def test_a_block_is_free_again_when_its_last_holder_lets_go():
    pool = make_pool()
    block_id = pool.allocate()
    pool.share(block_id)
    assert (pool.ref_count(block_id), pool.num_used, pool.num_free) == (2, 1, 3)
    pool.release(block_id)
    assert (pool.ref_count(block_id), pool.num_used) == (1, 1)
    pool.release(block_id)
    assert (pool.ref_count(block_id), pool.num_used, pool.num_free) == (0, 0, 4)
    assert kinds(pool) == ["allocate", "share", "release", "free"]
    pool.check()


def test_every_block_is_handed_out_once_and_then_none():
    pool = make_pool(num_blocks=3)
    assert {pool.allocate() for _ in range(3)} == {0, 1, 2}
    with pytest.raises(NoFreeBlocks, match="1 block wanted, 0 of 3 are free"):
        pool.allocate()
    pool.check({0: 1, 1: 1, 2: 1})


def test_a_free_block_can_be_neither_released_nor_shared_nor_registered():
    pool = make_pool()
    for move in (pool.release, pool.share, lambda block_id: pool.register(block_id, None, (1, 2))):
        with pytest.raises(ValueError, match="block 0 is free"):
            move(0)
    for outside in (-1, 4):
        with pytest.raises(ValueError, match=f"no block {outside}"):
            pool.release(outside)
    pool.check({})


# ------------------------------------------------------------------------------------------ prefix cache


def test_a_registered_block_is_found_by_its_tokens_and_what_precedes_them():
    pool = make_pool()
    first, second = pool.allocate(), pool.allocate()
    prefix = pool.register(first, None, (1, 2))
    pool.register(second, prefix, (3, 4))
    assert pool.find(None, [1, 2]) == first
    assert pool.find(prefix, [3, 4]) == second
    assert pool.find(None, [3, 4]) is None, "the same tokens, but at the start of a prompt"
    assert pool.find(prefix, [3, 5]) is None
    block = pool.blocks[second]
    assert (block.token_ids, block.parent) == ((3, 4), prefix.hash)
    assert block.hash == hash_block(prefix.hash, (3, 4))


def test_the_first_of_two_equal_blocks_stays_the_one_found():
    pool = make_pool()
    first, second = pool.allocate(), pool.allocate()
    prefix = pool.register(first, None, (1, 2))
    assert pool.register(second, None, (1, 2)) is prefix, "children of either follow the same prefix"
    assert pool.find(None, (1, 2)) == first
    assert not pool.is_cached(second)
    assert pool.prefix_of(first) is prefix
    with pytest.raises(ValueError, match=f"block {second} is not cached"):
        pool.prefix_of(second)
    assert pool.register(first, None, (1, 2)) is prefix, "registering again changes nothing"
    pool.check({first: 1, second: 1})


def test_only_full_blocks_are_registered_and_only_once_as_one_thing():
    pool = make_pool()
    block_id = pool.allocate()
    with pytest.raises(ValueError, match="only a full block"):
        pool.register(block_id, None, (1,))
    pool.register(block_id, None, (1, 2))
    with pytest.raises(ValueError, match="forget it before overwriting it"):
        pool.register(block_id, None, (7, 7))
    pool.forget(block_id)
    pool.register(block_id, None, (7, 7))
    assert pool.find(None, (7, 7)) == block_id
    assert pool.find(None, (1, 2)) is None


def test_a_cached_free_block_is_revived_by_sharing_it():
    pool = make_pool()
    block_id, _ = cached_free_block(pool, (1, 2))
    assert pool.num_free == 4 and pool.find(None, (1, 2)) == block_id
    pool.share(block_id)
    assert (pool.ref_count(block_id), pool.num_free) == (1, 3)
    pool.check({block_id: 1})


def test_forgetting_a_free_cached_block_makes_it_blank():
    pool = make_pool()
    block_id, _ = cached_free_block(pool, (1, 2))
    pool.forget(block_id)
    pool.forget(block_id)
    assert pool.find(None, (1, 2)) is None and pool.num_free == 4
    assert {pool.allocate() for _ in range(4)} == {0, 1, 2, 3}
    assert pool.counters.evictions == 0
    pool.check()


def test_with_prefix_caching_off_nothing_is_ever_found():
    pool = make_pool(enable_prefix_caching=False)
    block_id, _ = cached_free_block(pool, (1, 2))
    assert pool.find(None, (1, 2)) is None and not pool.is_cached(block_id)
    pool.check()


# ----------------------------------------------------------------------------------------------- eviction


def test_blank_blocks_go_first_then_the_longest_free_cached_one():
    pool = make_pool(num_blocks=4)
    held = [pool.allocate() for _ in range(3)]
    for block_id in held:
        pool.register(block_id, None, (block_id, 0))
    for block_id in (held[1], held[2], held[0]):
        pool.release(block_id)
    assert pool.allocate() == 3, "never cached"
    assert [pool.allocate() for _ in range(3)] == [held[1], held[2], held[0]]
    assert pool.counters.evictions == 3 and kinds(pool).count("evict") == 3
    assert pool.find(None, (held[1], 0)) is None
    pool.check()


def test_use_puts_a_cached_block_at_the_end_of_the_queue():
    pool = make_pool(num_blocks=2)
    held = [pool.allocate(), pool.allocate()]
    for block_id in held:
        pool.register(block_id, None, (block_id, 0))
        pool.release(block_id)
    pool.share(held[0])
    pool.release(held[0])
    assert pool.allocate() == held[1]


# ------------------------------------------------------------------------------------- hashes, collisions


def test_the_hash_is_the_same_in_every_process_and_depends_on_the_parent():
    written_down_by_another_process = 12340372733252014964
    assert hash_block(hash_block(None, (1, 2)), (3, 4)) == written_down_by_another_process
    assert hash_block(None, (1, 2)) != hash_block(0, (1, 2)) != hash_block(1, (1, 2))
    assert 0 <= hash_block(None, (1, 2)) < 2**64


def test_a_collision_is_a_miss_and_the_first_keeps_its_place():
    pool = make_pool(hash_fn=lambda parent, token_ids: 0)
    first, second = pool.allocate(), pool.allocate()
    pool.register(first, None, (1, 2))
    assert pool.find(None, (3, 4)) is None
    pool.register(second, None, (3, 4))
    assert pool.find(None, (1, 2)) == first and pool.find(None, (3, 4)) is None
    pool.check({first: 1, second: 1})


def test_equal_tokens_after_colliding_parents_are_not_confused():
    """Both hashes and the last block's tokens agree; only the block before differs."""
    pool = make_pool(hash_fn=lambda parent, token_ids: 0)
    block_id = pool.allocate()
    ours = pool.register(block_id, None, (1, 2))
    pool.forget(block_id)
    theirs = pool.register(block_id, None, (3, 4))
    pool.forget(block_id)
    pool.register(block_id, ours, (5, 6))
    assert pool.find(theirs, (5, 6)) is None and ours.hash == theirs.hash
    assert pool.find(ours, (5, 6)) == block_id


def test_a_child_is_found_again_when_its_evicted_parent_is_computed_anew():
    pool = make_pool(num_blocks=3)
    parent, prefix = cached_free_block(pool, (1, 2))
    child = pool.allocate()
    pool.register(child, prefix, (3, 4))
    pool.forget(parent)
    assert pool.find(None, (1, 2)) is None
    anew = pool.register(parent_again := pool.allocate(), None, (1, 2))
    assert anew is not prefix and anew.same_as(prefix)
    assert pool.find(anew, (3, 4)) == child
    pool.check({child: 1, parent_again: 1})


def test_a_very_long_chain_is_compared_and_dropped_without_recursion():
    pool = make_pool(num_blocks=1, block_size=1, hash_fn=lambda parent, token_ids: 0)
    chains = []
    for _ in range(2):
        prefix = None
        block_id = pool.allocate()
        for _ in range(50_000):
            pool.forget(block_id)
            prefix = pool.register(block_id, prefix, (7,))
        pool.release(block_id)
        chains.append(prefix)
    assert chains[0].same_as(chains[1])
    del chains, prefix
    pool.forget_all()
    pool.check()


# ---------------------------------------------------------------------------------------- check can fail


def set_ref_count(value):
    def corrupt(pool):
        pool.blocks[0].ref_count = value
    return corrupt


def free_twice(pool):
    pool._blank.append(pool._blank[0])


def lose_a_free_block(pool):
    pool._blank.clear()


def lose_the_index_entry(pool):
    pool._findable.clear()


def point_the_index_elsewhere(pool):
    pool._findable[99] = 0


def drop_the_prefix_of_a_cached_free_block(pool):
    pool.blocks[2].prefix = None


@pytest.mark.parametrize(
    ("corrupt", "complaint"),
    [
        (set_ref_count(2), "block 0 has ref count 2, but 1 block tables and leases hold it"),
        (set_ref_count(-1), "block 0 has a negative ref count, -1"),
        (set_ref_count(0), "block 0 has ref count 0, but is not on the free list"),
        (free_twice, "block 3 is on the free list 2 times"),
        (lose_a_free_block, "block 3 has ref count 0, but is not on the free list"),
        (lose_the_index_entry, "block 1 is cached, but its hash does not find it"),
        (point_the_index_elsewhere, "hash 0000000000000063 finds block 0, which does not have it"),
        (drop_the_prefix_of_a_cached_free_block, "block 2 waits to be evicted, but is not cached"),
    ],
)
def test_check_names_what_is_wrong(corrupt, complaint):
    pool = make_pool()
    held = [pool.allocate() for _ in range(3)]
    pool.register(held[1], None, (1, 2))
    pool.register(held[2], None, (3, 4))
    pool.release(held[2])
    expected = {held[0]: 1, held[1]: 1}
    pool.check(expected)
    corrupt(pool)
    with pytest.raises(InvariantError) as caught:
        pool.check(expected)
    assert complaint in str(caught.value)


def test_check_lists_all_faults_at_once():
    pool = make_pool()
    pool.blocks[0].ref_count = 1
    pool.blocks[1].ref_count = -3
    with pytest.raises(InvariantError) as caught:
        pool.check({})
    assert "block 0 is on the free list with ref count 1" in str(caught.value)
    assert "block 1 has a negative ref count, -3" in str(caught.value)


# ---------------------------------------------------------------------------------------- events and cost


def test_events_are_numbered_and_bounded():
    pool = make_pool()
    for _ in range(3000):
        pool.release(pool.allocate(seq_id=5))
    assert len(pool.events) == 4096
    steps = [event.step for event in pool.events]
    assert steps == list(range(6000 - 4096, 6000))
    assert pool.events[-1].seq_id is None and pool.events[-2].seq_id == 5


def test_a_move_does_not_look_at_the_whole_pool():
    """Structures that would be scanned are replaced by ones that refuse."""

    class NoScan(list):
        def __iter__(self):
            raise AssertionError("scanned the pool")

        def remove(self, value):
            raise AssertionError("scanned the free list")

        __contains__ = index = remove

    pool = make_pool(num_blocks=50)
    pool.blocks, pool._blank = NoScan(pool.blocks), NoScan(pool._blank)
    for tokens in range(100):
        block_id, _ = cached_free_block(pool, (tokens, tokens))
        assert pool.find(None, (tokens, tokens)) == block_id
        pool.share(block_id)
        pool.release(block_id)
    assert pool.counters.evictions == 50
