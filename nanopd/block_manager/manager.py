"""Block tables: which blocks hold a sequence's tokens, and what must be copied before it may write.

A block table is a list: position `p` of its sequence lives in block `table[p // block_size]`. Sequences share
blocks in two ways. A new prompt takes over the cached blocks of an equal prefix; a fork takes over all of its
parent's. A shared block is never written: `append_slot` first swaps in a copy of it. Pure Python, no torch.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from collections.abc import Sequence as SequenceABC
from dataclasses import asdict, dataclass, field
from itertools import count
from typing import Any

from nanopd.block_manager.pool import (
    EVENTS_KEPT,
    BlockEvent,
    BlockPool,
    InvariantError,
    NoFreeBlocks,
    PoolCounters,
    Prefix,
)
from nanopd.config import CacheConfig
from nanopd.core import Sequence

LEASE_HOLDERS = frozenset({"request", "writer"})


@dataclass
class Lease:
    """Blocks set aside for the KV of a prompt that another worker computes.

    `block_ids` is the whole block table for the prompt. Its first `num_cached` tokens (a multiple of the
    block size) are in the prefix cache already, so the writer sends only the rest.

    The lease holds every block, in its own right, until both the request and the writer have let go: a
    cancelled request must not free blocks into which another GPU is still writing.
    """

    lease_id: int
    token_ids: list[int]
    block_ids: list[int]
    num_cached: int
    holders: set[str] = field(default_factory=lambda: set(LEASE_HOLDERS))


@dataclass
class BlockTable:
    """A sequence's blocks, and the prefixes under which `commit` has registered the first of them.

    Positions from `own_from` up to `own_to` are known to be in blocks that nobody shares and nobody can find, so that
    `append_slot` need not look. A fork that drafts does not hold its first `num_borrowed` blocks: it reads them in the
    table of the sequence that it drafts for.
    """

    sequence: Sequence
    block_ids: list[int]
    prefixes: list[Prefix] = field(default_factory=list)
    own_from: int = 0
    own_to: int = 0
    num_borrowed: int = 0

    @property
    def held(self) -> list[int]:
        return self.block_ids[self.num_borrowed :]


class _Tables(dict[int, BlockTable]):
    """By sequence id."""

    def __missing__(self, seq_id: int) -> BlockTable:
        raise ValueError(f"sequence {seq_id} has no block table")


class BlockSpaceManager:
    """The block tables of one worker's cache of `num_blocks` blocks with `block_size` tokens each.

    `watermark` is the share of the blocks (0 up to, not including, 1) that admission leaves free, so that
    those already running have room to grow. The last `events_kept` moves of blocks are there to look at.

    Raises:
        ConfigError: a setting is out of range.
    """

    def __init__(self, num_blocks: int, block_size: int = 16, enable_prefix_caching: bool = True,
                 watermark: float = 0.0, events_kept: int = EVENTS_KEPT) -> None:
        self.config = CacheConfig(num_blocks, block_size, enable_prefix_caching, watermark)
        self.pool = BlockPool(num_blocks, block_size, enable_prefix_caching, events_kept=events_kept)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._tables = _Tables()
        self._leases: dict[int, Lease] = {}  # the open ones
        self._lease_ids = count()

    @classmethod
    def from_config(cls, config: CacheConfig, events_kept: int = EVENTS_KEPT) -> BlockSpaceManager:
        return cls(config.num_blocks, config.block_size, config.enable_prefix_caching, config.watermark, events_kept)

    @property
    def num_free_blocks(self) -> int:
        """Blocks that could be handed out now, those that only the prefix cache remembers included."""
        return self.pool.num_free

    @property
    def num_used_blocks(self) -> int:
        return self.pool.num_used

    @property
    def counters(self) -> PoolCounters:
        return self.pool.counters

    @property
    def events(self) -> deque[BlockEvent]:
        return self.pool.events

    @property
    def leases(self) -> list[Lease]:
        """Those that at least one holder has not let go of."""
        return list(self._leases.values())

    def has_table(self, sequence: Sequence) -> bool:
        return sequence.seq_id in self._tables

    def block_table(self, sequence: Sequence) -> list[int]:
        """A copy. Raises ValueError for a sequence without a table."""
        return self._tables[sequence.seq_id].block_ids.copy()

    def live_table(self, sequence: Sequence) -> list[int]:
        """The block table itself, to be read at once: it changes as the sequence grows. A copy would cost a step more
        the longer its sequences are."""
        return self._tables[sequence.seq_id].block_ids

    def ref_count(self, block_id: int) -> int:
        return self.pool.ref_count(block_id)

    def blocks_needed(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    # ------------------------------------------------------------------------------------------- admission

    def cached_prefix(self, token_ids: SequenceABC[int]) -> list[int]:
        """The longest run of cached full blocks that `token_ids` starts with. Changes nothing.

        Never covers the last token: it has to be run, or there would be no logits to sample from.
        """
        block_ids: list[int] = []
        prefix = None
        for index in range(self._cacheable_blocks(token_ids)):
            block_id = self.pool.find(prefix, self._block_tokens(token_ids, index))
            if block_id is None:
                break
            block_ids.append(block_id)
            prefix = self.pool.prefix_of(block_id)
        return block_ids

    def can_allocate(self, sequence: Sequence, num_tokens: int | None = None) -> bool:
        """Whether `allocate` would succeed and leave the watermark's blocks free.

        When nothing is in use the watermark does not count: there is nobody to leave room for, and a prompt
        that needs the whole cache would wait for ever.
        """
        num_tokens = self._checked_num_tokens(sequence, num_tokens)
        return self._admits(sequence.token_ids, num_tokens)

    def allocate(self, sequence: Sequence, num_tokens: int | None = None) -> int:
        """Give `sequence` a block table for its first `num_tokens` tokens (default: all of them).

        Cached prefix blocks are shared, the rest is fresh. Sets `sequence.num_computed` to the number of
        cached tokens and returns it.

        Raises:
            NoFreeBlocks: nothing was changed. The watermark isn't looked at; that is `can_allocate`'s affair.
            ValueError: it already has a table, or `num_tokens` is not from 1 to its length.
        """
        num_tokens = self._checked_num_tokens(sequence, num_tokens)
        self._require_no_table(sequence)
        block_ids, num_hits = self._take(sequence.token_ids, num_tokens, sequence.seq_id)
        prefixes = [self.pool.prefix_of(hit) for hit in block_ids[:num_hits]]
        self._tables[sequence.seq_id] = BlockTable(sequence, block_ids, prefixes)
        sequence.num_computed = num_hits * self.block_size
        return sequence.num_computed

    # --------------------------------------------------------------------------------------------- growing

    def blocks_to_append(self, sequence: Sequence, num_new: int = 1) -> int:
        """How many free blocks `append_slot` would take: copies of shared blocks, and blocks at the end."""
        block_ids = self._tables[sequence.seq_id].block_ids
        first, end = self._written_blocks(sequence, num_new)
        shared = sum(self.pool.ref_count(block_id) > 1 for block_id in block_ids[first:end])
        return shared + max(0, end - len(block_ids))

    def append_slot(self, sequence: Sequence, num_new: int = 1) -> list[tuple[int, int]]:
        """Make positions [num_computed, num_computed + num_new) writable.

        Returns the (source, destination) blocks that the engine must copy before the sequence writes; the
        table holds the destinations already. All sources must be read before any destination is written.

        Raises:
            NoFreeBlocks: nothing was changed.
            ValueError: no table, or `num_new` below 1.
        """
        table = self._tables[sequence.seq_id]
        start = sequence.num_computed
        if table.own_from <= start < start + num_new <= table.own_to:
            return []  # nearly always
        first, end = self._written_blocks(sequence, num_new)
        self._require_free(self.blocks_to_append(sequence, num_new))
        copies = []
        for index in range(first, min(end, len(table.block_ids))):
            if self.pool.ref_count(table.block_ids[index]) > 1:
                copies.append(self._copy_on_write(table, index))
            else:
                self.pool.forget(table.block_ids[index])
        while len(table.block_ids) < end:
            table.block_ids.append(self.pool.allocate(sequence.seq_id))
        del table.prefixes[first:]  # what is about to be overwritten has to be registered again
        table.own_from, table.own_to = first * self.block_size, end * self.block_size
        return copies

    def commit(self, sequence: Sequence) -> None:
        """Call after a step has run: blocks that `sequence.num_computed` now covers in full become findable.

        Raises ValueError for a sequence without a table.
        """
        table = self._tables[sequence.seq_id]
        num_full = sequence.num_computed // self.block_size
        if num_full == len(table.prefixes) or not self.pool.enable_prefix_caching:
            return
        for index in range(len(table.prefixes), num_full):
            parent = table.prefixes[-1] if table.prefixes else None
            tokens = self._block_tokens(sequence.token_ids, index)
            table.prefixes.append(self.pool.register(table.block_ids[index], parent, tokens))
        table.own_from = num_full * self.block_size

    # ------------------------------------------------------------------------------- sharing and letting go

    def fork(self, parent: Sequence, child: Sequence | None = None,
             num_tokens: int | None = None) -> Sequence:
        """Let `child` share the parent's blocks for `num_tokens` tokens (default: all). Copies nothing.

        Without a child, forks the parent's tokens too. The child's `num_computed` becomes the parent's, or
        `num_tokens` if that is less. Returns the child.

        Raises ValueError if the parent has no table, the child has one, or their computed tokens differ.
        """
        table = self._tables[parent.seq_id]
        child = parent.fork(parent.index) if child is None else child
        self._require_no_table(child)
        num_blocks = len(table.block_ids) if num_tokens is None else self.blocks_needed(num_tokens)
        num_computed = parent.num_computed if num_tokens is None else min(parent.num_computed, num_tokens)
        if child.token_ids[:num_computed] != parent.token_ids[:num_computed]:
            raise ValueError(f"sequence {child.seq_id} can't share the KV of sequence {parent.seq_id}: "
                             f"their first {num_computed} tokens differ")
        shared = BlockTable(child, table.block_ids[:num_blocks], table.prefixes[:num_blocks])
        for block_id in shared.block_ids:
            self.pool.share(block_id, child.seq_id)
        table.own_to = 0
        self._tables[child.seq_id] = shared
        child.num_computed = num_computed
        self.counters.forks += 1
        self.pool.log("fork", other=parent.seq_id, seq_id=child.seq_id, detail=f"of sequence {parent.seq_id}")
        return child

    def free(self, sequence: Sequence) -> None:
        """Drop the sequence's table. No effect on a sequence without one; `num_computed` stays as it is."""
        table = self._tables.pop(sequence.seq_id, None)
        if table is not None:
            self._release(table.held, sequence.seq_id)

    def forget(self, sequence: Sequence) -> None:
        """Let the prefix cache find the sequence's blocks no more. No effect on a sequence without a table."""
        table = self._tables.get(sequence.seq_id)
        for block_id in table.block_ids if table else ():
            self.pool.forget(block_id)

    def reset_prefix_cache(self) -> None:
        """Forget all cached blocks. Sequences keep theirs, but nobody else finds them any more."""
        self.pool.forget_all()

    # ---------------------------------------------------------------------------------------------- drafts

    def draft(self, sequence: Sequence, fork: Sequence, num_new: int) -> list[tuple[int, int]]:
        """Let `fork` write the `num_new` tokens that follow what `sequence` has computed, some of them mere guesses.

        It writes to blocks of its own, the first a copy where that block is half full, and reads all before them in the
        sequence's, without holding them: a step's forks must not cost more the longer their sequences are. So it
        has to go, by `accept` or `free`, before the sequence's table changes.

        Returns the blocks to copy, as `append_slot` does.

        Raises:
            NoFreeBlocks: nothing was changed.
            ValueError: `sequence` has no table, `fork` has one, or `num_new` is below 1.
        """
        self._require_no_table(fork)
        first, end = self._written_blocks(sequence, num_new)
        self._require_free(end - first)
        shared = self._tables[sequence.seq_id].block_ids[: self.blocks_needed(sequence.num_computed)]
        table = self._tables[fork.seq_id] = BlockTable(fork, shared, num_borrowed=first)
        fork.num_computed = sequence.num_computed
        self.counters.forks += 1
        self.pool.log("fork", other=sequence.seq_id, seq_id=fork.seq_id, detail=f"of sequence {sequence.seq_id}")
        for block_id in table.held:
            self.pool.share(block_id, fork.seq_id)
        return self.append_slot(fork, num_new)

    def accept(self, sequence: Sequence, fork: Sequence, num_tokens: int) -> None:
        """The first `num_tokens` tokens of a fork that drafted were right: `sequence` takes over the blocks that hold
        them, instead of its own. The others go, and the fork's table with them."""
        table, drafted = self._tables[sequence.seq_id], self._tables[fork.seq_id]
        first = drafted.num_borrowed
        right = drafted.block_ids[first : self.blocks_needed(num_tokens)]
        for block_id in right:
            self.pool.share(block_id, sequence.seq_id)
        self._release(table.block_ids[first:], sequence.seq_id)
        table.block_ids[first:] = right
        table.own_to = 0
        del table.prefixes[first:]
        self.free(fork)

    # ---------------------------------------------------------------------------------------------- leases

    def grant_lease(self, token_ids: SequenceABC[int]) -> Lease | None:
        """Set blocks aside for the KV of the prompt `token_ids`, which another worker will write.

        None is a refusal: too few blocks are free (as in `can_allocate`).

        Raises ValueError for an empty prompt.
        """
        if not token_ids:
            raise ValueError("a lease needs a prompt of at least one token")
        if not self._admits(token_ids, len(token_ids)):
            return None
        block_ids, num_hits = self._take(token_ids, len(token_ids))
        lease = Lease(next(self._lease_ids), list(token_ids), block_ids, num_hits * self.block_size)
        self._leases[lease.lease_id] = lease
        self._log_lease("lease", lease, f"{len(block_ids)} blocks, {num_hits} of them cached")
        return lease

    def adopt(self, sequence: Sequence, lease: Lease) -> None:
        """The KV has arrived: `sequence` takes the lease's blocks as its table.

        Discharges the "request" holder. Sets `sequence.num_computed` to the length of the prompt. While the
        writer has not let go, its blocks count as shared, and a write to the last one copies it first.

        Raises ValueError if the request has let go of the lease already, if the sequence has a table, or if
        it does not start with the lease's tokens.
        """
        self._require_no_table(sequence)
        if lease.lease_id not in self._leases or "request" not in lease.holders:
            raise ValueError(f"lease {lease.lease_id} can't be adopted: the request has let go of it")
        if sequence.token_ids[: len(lease.token_ids)] != lease.token_ids:
            raise ValueError(f"sequence {sequence.seq_id} doesn't start with lease {lease.lease_id}'s tokens")
        for block_id in lease.block_ids:
            self.pool.share(block_id, sequence.seq_id)
        self._tables[sequence.seq_id] = BlockTable(sequence, list(lease.block_ids))
        sequence.num_computed = len(lease.token_ids)
        self._log_lease("adopt", lease, "the sequence has its table", sequence.seq_id)
        self.release_lease(lease, "request")

    def release_lease(self, lease: Lease, holder: str) -> None:
        """`holder` ("request" or "writer") lets go; once both have, so does the lease. Once is enough.

        Raises ValueError for any other holder.
        """
        if holder not in LEASE_HOLDERS:
            raise ValueError(f"a lease is held by 'request' and 'writer', not by {holder!r}")
        if holder not in lease.holders:
            return
        lease.holders.remove(holder)
        self._log_lease("release", lease, f"{holder} lets go")
        if not lease.holders:
            del self._leases[lease.lease_id]
            self._release(lease.block_ids)

    # ------------------------------------------------------------------------------------ proof and picture

    def check(self) -> None:
        """Prove that every block's ref count equals the number of tables and leases that hold it.

        Also that tables are long enough, and that the pool's own books balance. Looks at every block: for
        tests and idle moments. Raises InvariantError, which lists all faults.
        """
        holders = Counter(block_id for _, block_ids in self._holders() for block_id in block_ids)
        faults = [*self._holder_faults(), *self.pool.faults(holders)]
        if faults:
            raise InvariantError("; ".join(faults))

    def snapshot(self) -> dict[str, Any]:
        """The state as plain lists and dicts, for panels. Tables by sequence id, leases by lease id."""
        return {
            "num_blocks": self.num_blocks,
            "block_size": self.block_size,
            "ref_counts": [block.ref_count for block in self.pool.blocks],
            "cached": [block.prefix is not None for block in self.pool.blocks],
            "tables": {seq_id: table.held for seq_id, table in self._tables.items()},
            "leases": {
                lease.lease_id: {"block_ids": list(lease.block_ids), "num_cached": lease.num_cached,
                                 "holders": sorted(lease.holders)}
                for lease in self._leases.values()
            },
            "counters": asdict(self.counters),
        }

    def _holders(self) -> Iterator[tuple[str, list[int]]]:
        for seq_id, table in self._tables.items():
            yield f"sequence {seq_id}", table.held
        for lease_id, lease in self._leases.items():
            yield f"lease {lease_id}", lease.block_ids

    def _holder_faults(self) -> Iterator[str]:
        for name, block_ids in self._holders():
            for block_id, times in Counter(block_ids).items():
                if times > 1:
                    yield f"{name} holds block {block_id} {times} times"
        for seq_id, table in self._tables.items():
            room = len(table.block_ids) * self.block_size
            if room < table.sequence.num_computed:
                computed = table.sequence.num_computed
                yield f"sequence {seq_id} has {computed} computed tokens, but room for {room}"
            for block_id in table.block_ids[: table.num_borrowed]:
                if self.pool.ref_count(block_id) == 0:
                    yield f"sequence {seq_id} borrows block {block_id}, which nobody holds"
        for lease_id, lease in self._leases.items():
            if not lease.holders:
                yield f"lease {lease_id} is open, but nobody holds it"

    # ----------------------------------------------------------------------------------------------- parts

    def _admits(self, token_ids: SequenceABC[int], num_tokens: int) -> bool:
        keep = self.config.watermark_blocks if self.num_used_blocks else 0
        takes = self._free_blocks_taken(self._hits(token_ids, num_tokens), num_tokens)
        return takes + keep <= self.num_free_blocks

    def _hits(self, token_ids: SequenceABC[int], num_tokens: int) -> list[int]:
        return self.cached_prefix(token_ids)[: num_tokens // self.block_size]

    def _free_blocks_taken(self, hits: list[int], num_tokens: int) -> int:
        """A hit costs a free block too if nobody holds it at the moment: it is brought back to life."""
        revived = sum(self.pool.ref_count(hit) == 0 for hit in hits)
        return revived + self.blocks_needed(num_tokens) - len(hits)

    def _take(self, token_ids: SequenceABC[int], num_tokens: int,
              seq_id: int | None = None) -> tuple[list[int], int]:
        """Blocks for the first `num_tokens` tokens, and how many of them are prefix hits. Or NoFreeBlocks."""
        hits = self._hits(token_ids, num_tokens)
        self._require_free(self._free_blocks_taken(hits, num_tokens))
        for hit in hits:  # before anything is allocated, which might evict them
            self.pool.log("hit", hit, seq_id=seq_id)
            self.pool.share(hit, seq_id)
        fresh = [self.pool.allocate(seq_id) for _ in range(self.blocks_needed(num_tokens) - len(hits))]
        self._count_hits(len(hits), min(self._cacheable_blocks(token_ids), num_tokens // self.block_size))
        return hits + fresh, len(hits)

    def _count_hits(self, num_hits: int, num_looked_up: int) -> None:
        if self.pool.enable_prefix_caching:
            self.counters.hits += num_hits
            self.counters.hit_tokens += num_hits * self.block_size
            self.counters.misses += num_looked_up - num_hits

    def _copy_on_write(self, table: BlockTable, index: int) -> tuple[int, int]:
        seq_id = table.sequence.seq_id
        source, copy = table.block_ids[index], self.pool.allocate(seq_id)
        table.block_ids[index] = copy
        self.counters.copies += 1
        self.pool.log("copy", source, other=copy, seq_id=seq_id)
        self.pool.release(source, seq_id)
        return source, copy

    def _release(self, block_ids: list[int], seq_id: int | None = None) -> None:
        """Last block first: what is freed first is evicted first, and a prompt's start is worth the most."""
        for block_id in reversed(block_ids):
            self.pool.release(block_id, seq_id)

    def _written_blocks(self, sequence: Sequence, num_new: int) -> tuple[int, int]:
        """First and end index, in the block table, of the blocks that the next `num_new` tokens go to."""
        if num_new < 1:
            raise ValueError(f"num_new must be at least 1, got {num_new}")
        return sequence.num_computed // self.block_size, self.blocks_needed(sequence.num_computed + num_new)

    def _cacheable_blocks(self, token_ids: SequenceABC[int]) -> int:
        return (len(token_ids) - 1) // self.block_size

    def _block_tokens(self, token_ids: SequenceABC[int], index: int) -> SequenceABC[int]:
        return token_ids[index * self.block_size : (index + 1) * self.block_size]

    def _require_no_table(self, sequence: Sequence) -> None:
        if sequence.seq_id in self._tables:
            raise ValueError(f"sequence {sequence.seq_id} already has a block table")

    def _checked_num_tokens(self, sequence: Sequence, num_tokens: int | None) -> int:
        num_tokens = len(sequence) if num_tokens is None else num_tokens
        if not 1 <= num_tokens <= len(sequence):
            raise ValueError(f"num_tokens must be from 1 to the sequence's {len(sequence)}, got {num_tokens}")
        return num_tokens

    def _require_free(self, wanted: int) -> None:
        if wanted > self.num_free_blocks:
            free = f"{self.num_free_blocks} of {self.num_blocks}"
            raise NoFreeBlocks(f"{wanted} blocks wanted, {free} are free")

    def _log_lease(self, kind: str, lease: Lease, detail: str, seq_id: int | None = None) -> None:
        self.pool.log(kind, other=lease.lease_id, seq_id=seq_id, detail=f"lease {lease.lease_id}: {detail}")
