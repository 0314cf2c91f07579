"""Blocks: who holds them, what they can be found by, and which is given away next. Pure Python, no torch.

A block is in one of three states:

    held              ref_count > 0: block tables or leases point at it
    free, cached      ref_count == 0, but its tokens can still be found: a prefix hit brings it back to life
    free, blank       ref_count == 0, nothing worth keeping

`allocate` hands out blank blocks first, then evicts the cached one that has been free for the longest time.

The invariant of this package: ref_count == number of block tables and leases that hold the block.
The pool counts; the manager, which knows the tables and leases, proves the count in `check`.
"""

from __future__ import annotations

import hashlib
import struct
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple

EVENTS_KEPT = 4096


class NoFreeBlocks(RuntimeError):
    """The cache is full; nothing was changed. The message says how many blocks were wanted and are free."""


class InvariantError(AssertionError):
    """The books don't balance. The message lists every fault that `check` found."""


class BlockEvent(NamedTuple):
    """One move, for the block map to show. `kind` is one of:

    allocate, evict      a free block is handed out; before that, the tokens it cached are dropped
    hit                  a prompt's block was found in the prefix cache (the `share` follows)
    share, release       ref_count + 1; ref_count - 1, still held. With no block: a holder let go of a lease
    free                 ref_count reached 0
    cache, forget        the block's tokens can be found from now on; no longer
    fork, copy           a table was shared; `block` was copied to `other` before a write
    lease, adopt         blocks were set aside for an incoming transfer; a sequence took them over

    `other` is the copy's block for `copy`, the parent's sequence id for `fork`, and the lease's id for
    `lease`, `adopt` and the `release` of a lease. From these the whole state can be replayed, both ways.
    """

    step: int
    kind: str
    block: int | None = None
    other: int | None = None
    seq_id: int | None = None
    detail: str = ""


@dataclass
class PoolCounters:
    """Totals since the start. Counted in blocks, apart from `hit_tokens` (tokens) and `forks` (sequences).

    `misses` are full prompt blocks that were looked up, or lay behind one that was, and had to be computed.
    """

    hits: int = 0
    hit_tokens: int = 0
    misses: int = 0
    forks: int = 0
    copies: int = 0
    evictions: int = 0
    allocations: int = 0


# -------------------------------------------------------------------------------------------- prefix hashes


def hash_block(parent_hash: int | None, token_ids: SequenceABC[int]) -> int:
    """64-bit hash of a full block and, through `parent_hash`, of everything before it.

    The same in every process (Python's own `hash` need not be), so that workers can compare what they hold.
    """
    start = b"" if parent_hash is None else struct.pack("<Q", parent_hash)
    tokens = struct.pack(f"<{len(token_ids)}q", *token_ids)
    return int.from_bytes(hashlib.blake2b(start + tokens, digest_size=8).digest(), "little")


@dataclass(frozen=True, slots=True, eq=False)
class Prefix:
    """A run of full blocks from a prompt's first token on: the last one's tokens, and the run before it."""

    hash: int
    token_ids: tuple[int, ...]
    parent: Prefix | None = field(default=None, repr=False)

    def same_as(self, other: Prefix) -> bool:
        """True if both stand for the same tokens from the first on, whatever their hashes say.

        A key or value depends on all tokens before it, so equal last blocks are not enough. Chains that were
        looked up in the same pool share their ancestors: the walk nearly always ends after one step.
        """
        mine: Prefix | None = self
        theirs: Prefix | None = other
        while mine is not theirs:
            if mine is None or theirs is None or mine.token_ids != theirs.token_ids:
                return False
            mine, theirs = mine.parent, theirs.parent
        return True


# ------------------------------------------------------------------------------------------- blocks and pool


@dataclass(slots=True)
class Block:
    """One block's entry in the books. `prefix` is set while the prefix cache can find it."""

    block_id: int
    ref_count: int = 0
    prefix: Prefix | None = None

    @property
    def hash(self) -> int | None:
        return self.prefix.hash if self.prefix else None

    @property
    def token_ids(self) -> tuple[int, ...] | None:
        return self.prefix.token_ids if self.prefix else None

    @property
    def parent(self) -> int | None:
        """The hash of the block before this one; None for a prompt's first."""
        return self.prefix.parent.hash if self.prefix and self.prefix.parent else None


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens. Only `check` and `forget_all` slow down as it grows."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        enable_prefix_caching: bool = True,
        hash_fn: Callable[[int | None, SequenceABC[int]], int] = hash_block,
        events_kept: int = EVENTS_KEPT,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.hash_fn = hash_fn
        self.blocks = [Block(block_id) for block_id in range(num_blocks)]
        self.counters = PoolCounters()
        self.events: deque[BlockEvent] = deque(maxlen=events_kept)
        self._steps = count()
        self._blank = list(reversed(range(num_blocks)))  # a stack: block 0 goes out first
        self._evictable: OrderedDict[int, None] = OrderedDict()  # free and cached, longest free first
        self._findable: dict[int, int] = {}  # hash -> block id

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` could hand out: blank ones, and those only the prefix cache remembers."""
        return len(self._blank) + len(self._evictable)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    def log(self, kind: str, block: int | None = None, *, other: int | None = None,
            seq_id: int | None = None, detail: str = "") -> None:
        if self.events.maxlen:  # a simulation of many workers keeps none
            self.events.append(BlockEvent(next(self._steps), kind, block, other, seq_id, detail))

    # Who holds a block

    def allocate(self, seq_id: int | None = None) -> int:
        """A free block, now with ref_count 1. `seq_id`, here and below, is only for the event.

        Raises NoFreeBlocks.
        """
        if self._blank:
            block_id = self._blank.pop()
        elif self._evictable:
            block_id = self._evict()
        else:
            raise NoFreeBlocks(f"1 block wanted, 0 of {self.num_blocks} are free")
        self.blocks[block_id].ref_count = 1
        self.counters.allocations += 1
        self.log("allocate", block_id, seq_id=seq_id)
        return block_id

    def share(self, block_id: int, seq_id: int | None = None) -> None:
        """One more holder. A free block that the prefix cache remembers is brought back to life.

        Raises ValueError for any other free block.
        """
        if block_id in self._evictable:
            del self._evictable[block_id]
        else:
            self._require_held(block_id)
        self.blocks[block_id].ref_count += 1
        self.log("share", block_id, seq_id=seq_id)

    def release(self, block_id: int, seq_id: int | None = None) -> None:
        """One holder fewer; the last one out frees the block, which stays cached until it is evicted.

        Raises ValueError if nobody holds it.
        """
        block = self._require_held(block_id)
        block.ref_count -= 1
        if block.ref_count > 0:
            self.log("release", block_id, seq_id=seq_id)
            return
        if block.prefix is None:
            self._blank.append(block_id)
        else:
            self._evictable[block_id] = None
        self.log("free", block_id, seq_id=seq_id)

    def ref_count(self, block_id: int) -> int:
        return self.blocks[block_id].ref_count

    # What a block can be found by

    def register(self, block_id: int, parent: Prefix | None, token_ids: SequenceABC[int]) -> Prefix:
        """Make a full block findable as `token_ids` after `parent` (None: they begin the prompt).

        Returns the prefix to chain the next block to. The first block to claim a hash keeps it: a second
        block with the same tokens stays private, and so does one whose hash collides.

        Raises ValueError if nobody holds the block, if it isn't full, or if it is findable as something else.
        """
        block = self._require_held(block_id)
        if len(token_ids) != self.block_size:
            raise ValueError(f"only a full block ({self.block_size} tokens) is cached, got {len(token_ids)}")
        prefix = self._prefix(parent, token_ids)
        if block.prefix is not None and not block.prefix.same_as(prefix):
            raise ValueError(f"block {block_id} is cached with other tokens: forget it before overwriting it")
        first = self._registered(prefix)
        if first is not None:
            return first
        if self.enable_prefix_caching and prefix.hash not in self._findable:
            block.prefix = prefix
            self._findable[prefix.hash] = block_id
            self.log("cache", block_id, detail=f"hash {prefix.hash:016x}")
        return prefix

    def find(self, parent: Prefix | None, token_ids: SequenceABC[int]) -> int | None:
        """The block, held or free, with exactly `token_ids` after exactly `parent`. A collision is a miss."""
        if not self.enable_prefix_caching:
            return None
        prefix = self._prefix(parent, token_ids)
        return None if self._registered(prefix) is None else self._findable[prefix.hash]

    def forget(self, block_id: int) -> None:
        """The block can no longer be found: it is about to be overwritten. No effect if it isn't cached."""
        block = self.blocks[block_id]
        if block.prefix is None:
            return
        del self._findable[block.prefix.hash]
        block.prefix = None
        if block_id in self._evictable:
            del self._evictable[block_id]
            self._blank.append(block_id)
        self.log("forget", block_id)

    def forget_all(self) -> None:
        for block_id in list(self._findable.values()):
            self.forget(block_id)

    def is_cached(self, block_id: int) -> bool:
        return self.blocks[block_id].prefix is not None

    def prefix_of(self, block_id: int) -> Prefix:
        """What `find` knows the block by, and the `parent` of the block after it.

        Raises ValueError if the block isn't cached.
        """
        prefix = self.blocks[block_id].prefix
        if prefix is None:
            raise ValueError(f"block {block_id} is not cached")
        return prefix

    # Proof

    def check(self, expected_refs: Mapping[int, int] | None = None) -> None:
        """Prove that the books balance, against the holders of each block where given (absent means 0).

        Raises InvariantError, which lists all faults. Looks at every block: for tests and idle moments.
        """
        faults = list(self.faults(expected_refs))
        if faults:
            raise InvariantError("; ".join(faults))

    def faults(self, expected_refs: Mapping[int, int] | None = None) -> Iterator[str]:
        """What `check` would complain about, one sentence each."""
        yield from self._free_list_faults()
        yield from self._index_faults()
        if expected_refs is None:
            return
        for block in self.blocks:
            holders = expected_refs.get(block.block_id, 0)
            if block.ref_count != holders:
                yield (f"block {block.block_id} has ref count {block.ref_count}, "
                       f"but {holders} block tables and leases hold it")
        for block_id in expected_refs:
            if not 0 <= block_id < self.num_blocks:
                yield f"block {block_id} is held, but there is no such block"

    def _free_list_faults(self) -> Iterator[str]:
        times_free = [0] * self.num_blocks
        for block_id in (*self._blank, *self._evictable):
            times_free[block_id] += 1
        for block, times in zip(self.blocks, times_free):
            if block.ref_count < 0:
                yield f"block {block.block_id} has a negative ref count, {block.ref_count}"
            if times > 1:
                yield f"block {block.block_id} is on the free list {times} times"
            if times and block.ref_count > 0:
                yield f"block {block.block_id} is on the free list with ref count {block.ref_count}"
            if not times and block.ref_count == 0:
                yield f"block {block.block_id} has ref count 0, but is not on the free list"

    def _index_faults(self) -> Iterator[str]:
        for prefix_hash, block_id in self._findable.items():
            if self.blocks[block_id].hash != prefix_hash:
                yield f"hash {prefix_hash:016x} finds block {block_id}, which does not have it"
        for block in self.blocks:
            if block.prefix is not None and self._findable.get(block.prefix.hash) != block.block_id:
                yield f"block {block.block_id} is cached, but its hash does not find it"
            if block.prefix is not None and len(block.prefix.token_ids) != self.block_size:
                yield f"block {block.block_id} is cached with {len(block.prefix.token_ids)} tokens, not full"
        for block_id in self._evictable:
            if self.blocks[block_id].prefix is None:
                yield f"block {block_id} waits to be evicted, but is not cached"
        for block_id in self._blank:
            if self.blocks[block_id].prefix is not None:
                yield f"block {block_id} is cached, but given away as blank"

    # Parts

    def _evict(self) -> int:
        block_id, _ = self._evictable.popitem(last=False)
        block = self.blocks[block_id]
        assert block.prefix is not None
        del self._findable[block.prefix.hash]
        block.prefix = None
        self.counters.evictions += 1
        self.log("evict", block_id)
        return block_id

    def _prefix(self, parent: Prefix | None, token_ids: SequenceABC[int]) -> Prefix:
        parent_hash = None if parent is None else parent.hash
        return Prefix(self.hash_fn(parent_hash, token_ids), tuple(token_ids), parent)

    def _registered(self, prefix: Prefix) -> Prefix | None:
        """The same prefix as the index holds it, if it does. The hash is a hint, the tokens decide."""
        block_id = self._findable.get(prefix.hash)
        found = None if block_id is None else self.blocks[block_id].prefix
        return found if found is not None and found.same_as(prefix) else None

    def _require_held(self, block_id: int) -> Block:
        if not 0 <= block_id < self.num_blocks:
            raise ValueError(f"there is no block {block_id}: the pool has {self.num_blocks}")
        block = self.blocks[block_id]
        if block.ref_count < 1:
            raise ValueError(f"block {block_id} is free: nobody holds it")
        return block
