"""Any order of moves, against a model of the memory which the block tables describe.

The model cache is a dict: block -> what each of its slots holds. A slot holds the tokens from the sequence's
first up to its own, because a key depends on all of them; so a block that is right in itself, but in the
wrong prompt, is caught too. Garbage is None. The rules do what an engine does (plan rows, carry out all
copies as one snapshot, write, commit), and what befalls one: preemption, rejected drafts, cancelled
transfers, late writers.

After every rule: `check()`, every sequence reads its own tokens back through its block table, and every block
that the prefix cache can find holds exactly what it would be found as.
"""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from nanopd.block_manager import BlockSpaceManager, NoFreeBlocks, hash_block
from nanopd.core import Sequence

HASHES = {
    "real": hash_block,
    "all collide": lambda parent, token_ids: 0,
    "many collide": lambda parent, token_ids: hash_block(parent, token_ids) % 3,
}
MAX_TOKENS = 24
moves = Counter()  # how often each rule ran: the tests below ask that enough of them did

picks = st.integers(0, 10**6)
tokens = st.lists(st.integers(0, 1), min_size=1, max_size=6)


@st.composite
def prompts(draw):
    """Prompts that often begin alike, and sometimes end alike after a different start."""
    start = draw(st.sampled_from(([0], [1], [0, 1, 1], [])))
    return start + [0, 1, 1, 0, 1, 0, 0, 1][: draw(st.integers(0, 8))] + draw(tokens)


def slots(token_ids, start, end):
    """What the slots of positions [start, end) must hold."""
    return [tuple(token_ids[: position + 1]) for position in range(start, end)]


class BlockMachine(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.integers(6, 40),
        block_size=st.integers(1, 4),
        hashes=st.sampled_from(sorted(HASHES)),
        caching=st.sampled_from([True, True, True, False]),
        watermark=st.sampled_from([0.0, 0.0, 0.2]),
    )
    def set_up(self, num_blocks, block_size, hashes, caching, watermark):
        self.manager = BlockSpaceManager(num_blocks, block_size, caching, watermark)
        self.manager.pool.hash_fn = HASHES[hashes]
        self.cache = {block: [None] * block_size for block in range(num_blocks)}
        self.live = []  # sequences with a table
        self.leases = {}  # lease id -> lease
        self.holders = {}  # lease id -> who has not let go yet
        self.written = set()  # ids of leases whose writer has written everything

    # ---------------------------------------------------------------------------------- the model's memory

    def write(self, block_ids, token_ids, start, end, values=None):
        for position, value in zip(range(start, end), values or slots(token_ids, start, end)):
            block, offset = divmod(position, self.manager.block_size)
            self.cache[block_ids[block]][offset] = value

    def read(self, block_ids, num_tokens):
        size = self.manager.block_size
        return [self.cache[block_ids[position // size]][position % size] for position in range(num_tokens)]

    def carry_out(self, copies):
        """All sources are read before any destination is written, as StepPlan promises."""
        read = [(destination, list(self.cache[source])) for source, destination in copies]
        for destination, content in read:
            self.cache[destination] = content

    def frozen(self):
        manager = self.manager
        prefixes = {seq_id: list(table.prefixes) for seq_id, table in manager._tables.items()}
        computed = [sequence.num_computed for sequence in self.live]
        return manager.snapshot(), prefixes, computed, dict(manager.pool._findable), manager.pool._blank[:]

    def pick(self, choices, index):
        return choices[index % len(choices)]

    def drop(self, sequence):
        self.live.remove(sequence)
        self.manager.free(sequence)

    # -------------------------------------------------------------------------------------------- sequences

    @rule(token_ids=prompts(), part=st.one_of(st.none(), st.integers(1, 14)))
    def allocate(self, token_ids, part):
        moves["allocate"] += 1
        self.allocate_for(token_ids, part)

    def allocate_for(self, token_ids, part):
        sequence = Sequence(token_ids)
        part = None if part is None else min(part, len(sequence))
        before = self.frozen()
        admitted = self.manager.can_allocate(sequence, part)
        assert self.frozen() == before
        try:
            num_cached = self.manager.allocate(sequence, part)
        except NoFreeBlocks:
            moves["allocate refused"] += 1
            assert not admitted and self.frozen() == before and not self.manager.has_table(sequence)
            return
        self.live.append(sequence)
        table = self.manager.block_table(sequence)
        wanted = len(sequence) if part is None else part
        assert len(table) == self.manager.blocks_needed(wanted) and num_cached < len(sequence)
        assert num_cached % self.manager.block_size == 0 and num_cached == sequence.num_computed
        assert self.read(table, num_cached) == slots(sequence.token_ids, 0, num_cached), "a wrong prefix hit"
        moves["hit"] += num_cached > 0

    @rule(token_ids=prompts(), finish=st.booleans())
    def serve(self, token_ids, finish):
        """Compute a prompt in one go; if it is finished, only the prefix cache remembers it."""
        moves["serve"] += 1
        live = len(self.live)
        self.allocate_for(token_ids, None)
        if len(self.live) > live:
            self.run_step([(live, MAX_TOKENS, 0)], 0)
            if finish:
                self.drop(self.live[live])

    @precondition(lambda self: self.live)
    @rule(
        rows=st.lists(st.tuples(picks, st.integers(1, 6), st.integers(0, 1)), min_size=1, max_size=4),
        victim=picks,
    )
    def step(self, rows, victim):
        moves["step"] += 1
        self.run_step(rows, victim)

    @precondition(lambda self: self.live)
    @rule(token=st.integers(0, 1), victim=picks)
    def step_with_everybody(self, token, victim):
        moves["step with everybody"] += 1
        self.run_step([(index, MAX_TOKENS, token) for index in range(len(self.live))], victim)

    def run_step(self, rows, victim):
        """One step of an engine: plan rows (preempting where blocks run out), copy, write, commit."""
        plan, copies = {}, []
        for index, num_new, token in rows:
            if not self.live or (sequence := self.pick(self.live, index)) in plan:
                continue
            if not sequence.num_remaining:
                sequence.append_token(token)
            num_new = min(num_new, sequence.num_remaining)
            row_copies = self.make_room(sequence, num_new, victim, plan)
            if row_copies is not None:
                copies += row_copies
                plan[sequence] = num_new
        self.carry_out(copies)
        for sequence, num_new in plan.items():
            start, end = sequence.num_computed, sequence.num_computed + num_new
            self.write(self.manager.block_table(sequence), sequence.token_ids, start, end)
        for sequence, num_new in plan.items():
            sequence.num_computed += num_new
            self.manager.commit(sequence)
            if len(sequence) > MAX_TOKENS:
                self.drop(sequence)

    def make_room(self, sequence, num_new, victim, plan):
        """append_slot, freeing others until it fits. None if it never does: the sequence goes itself."""
        while True:
            before, takes = self.frozen(), self.manager.blocks_to_append(sequence, num_new)
            free = self.manager.num_free_blocks
            try:
                copies = self.manager.append_slot(sequence, num_new)
            except NoFreeBlocks:
                assert takes > free and self.frozen() == before
                moves["preempt"] += 1
                others = [other for other in self.live if other is not sequence and other not in plan]
                self.drop(self.pick(others, victim) if others else sequence)
                if not others:
                    return None
            else:
                assert takes == free - self.manager.num_free_blocks
                moves["copy"] += len(copies)
                return copies

    @precondition(lambda self: self.live)
    @rule(index=picks, drafts=st.lists(st.integers(0, 1), min_size=1, max_size=5), accepted=st.integers(0, 5))
    def verify_drafts(self, index, drafts, accepted):
        """Speculative decoding: all drafts are written, some accepted, the rest left behind as garbage."""
        moves["verify drafts"] += 1
        sequence = self.pick(self.live, index)
        if sequence.num_remaining or len(sequence) > MAX_TOKENS:
            return
        try:
            copies = self.manager.append_slot(sequence, len(drafts))
        except NoFreeBlocks:
            return
        self.carry_out(copies)
        start = sequence.num_computed
        self.write(self.manager.block_table(sequence), None, start, start + len(drafts), [None] * len(drafts))
        for token in drafts[:accepted]:
            sequence.append_token(token)
        self.write(self.manager.block_table(sequence), sequence.token_ids, start, len(sequence))
        sequence.num_computed = len(sequence)
        self.manager.commit(sequence)

    @precondition(lambda self: self.live)
    @rule(index=picks, drafts=st.lists(st.integers(0, 1), min_size=1, max_size=5), accepted=st.integers(0, 5), dropped=st.booleans())
    def verify_drafts_in_a_fork(self, index, drafts, accepted, dropped):
        """The same in blocks of their own: what was there before stays as it was until the fork is accepted."""
        moves["verify drafts in a fork"] += 1
        sequence = self.pick(self.live, index)
        if sequence.num_remaining or len(sequence) > MAX_TOKENS:
            return
        fork, before = sequence.fork(0), self.frozen()
        try:
            self.carry_out(self.manager.draft(sequence, fork, len(drafts)))
        except NoFreeBlocks:
            assert self.frozen() == before
            return
        table, start = self.manager.block_table(fork), sequence.num_computed
        self.write(table, None, start, start + len(drafts), [None] * len(drafts))
        self.manager.check()
        self.every_sequence_reads_its_own_tokens()
        self.every_cached_block_holds_what_it_is_found_by()
        if dropped:
            self.manager.free(fork)
            return
        for token in drafts[:accepted]:
            sequence.append_token(token)
        self.write(table, sequence.token_ids, start, len(sequence))
        self.manager.accept(sequence, fork, len(sequence))
        assert self.manager.block_table(sequence) == table[: self.manager.blocks_needed(len(sequence))]
        sequence.num_computed = len(sequence)
        self.manager.commit(sequence)

    @precondition(lambda self: self.live)
    @rule(index=picks, keep=st.integers(0, 14), new=tokens)
    def rewind(self, index, keep, new):
        """Take tokens back and go on with others: what was written in their place must be written over."""
        moves["rewind"] += 1
        sequence = self.pick(self.live, index)
        sequence.token_ids[keep:] = new
        sequence.num_computed = min(sequence.num_computed, keep)

    @precondition(lambda self: self.live)
    @rule(index=picks, part=st.one_of(st.none(), st.integers(0, 20)))
    def fork(self, index, part):
        moves["fork"] += 1
        parent = self.pick(self.live, index)
        if len(self.live) < 8:
            used = self.manager.num_used_blocks
            self.live.append(self.manager.fork(parent, num_tokens=part))
            assert self.manager.num_used_blocks == used, "a fork takes no blocks"

    @precondition(lambda self: self.live)
    @rule(index=picks)
    def free(self, index):
        moves["free"] += 1
        self.drop(self.pick(self.live, index))

    @precondition(lambda self: self.manager.counters.hits)
    @rule()
    def reset_prefix_cache(self):
        moves["reset"] += 1
        self.manager.reset_prefix_cache()

    # ----------------------------------------------------------------------------------------------- leases

    @rule(token_ids=prompts())
    def grant_lease(self, token_ids):
        moves["grant lease"] += 1
        before = self.frozen()
        lease = self.manager.grant_lease(token_ids)
        if lease is None:
            assert self.frozen() == before
            return
        self.leases[lease.lease_id], self.holders[lease.lease_id] = lease, {"request", "writer"}
        assert self.read(lease.block_ids, lease.num_cached) == slots(token_ids, 0, lease.num_cached)

    def held_by(self, holder):
        return [lease for lease in self.leases.values() if holder in self.holders[lease.lease_id]]

    def adoptable(self):
        can_arrive = {lease.lease_id for lease in self.held_by("writer")} | self.written
        return [lease for lease in self.held_by("request") if lease.lease_id in can_arrive]

    def let_go(self, lease, holder):
        self.manager.release_lease(lease, holder)
        self.discharge(lease, holder)

    def discharge(self, lease, holder):
        self.holders[lease.lease_id].remove(holder)
        if not self.holders[lease.lease_id]:
            del self.leases[lease.lease_id]

    def write_lease(self, lease):
        self.write(lease.block_ids, lease.token_ids, lease.num_cached, len(lease.token_ids))
        self.written.add(lease.lease_id)

    @precondition(lambda self: self.held_by("writer"))
    @rule(index=picks)
    def writer_writes(self, index):
        """At any time until it lets go, and again: whether the request still lives or not."""
        moves["writer writes"] += 1
        self.write_lease(self.pick(self.held_by("writer"), index))

    @precondition(lambda self: self.held_by("writer"))
    @rule(index=picks)
    def writer_lets_go(self, index):
        moves["writer lets go"] += 1
        self.let_go(self.pick(self.held_by("writer"), index), "writer")

    @precondition(lambda self: self.held_by("request"))
    @rule(index=picks)
    def cancel(self, index):
        moves["cancel"] += 1
        self.let_go(self.pick(self.held_by("request"), index), "request")

    @precondition(lambda self: self.adoptable())
    @rule(index=picks, first_token=st.integers(0, 1))
    def adopt(self, index, first_token):
        moves["adopt"] += 1
        lease = self.pick(self.adoptable(), index)
        if lease.lease_id not in self.written:
            self.write_lease(lease)
        sequence = Sequence([*lease.token_ids, first_token])
        self.manager.adopt(sequence, lease)
        self.discharge(lease, "request")
        self.manager.commit(sequence)
        self.live.append(sequence)

    # ------------------------------------------------------------------------------------------- invariants

    @invariant()
    def the_books_balance(self):
        moves["checked"] += 1
        self.manager.check()
        assert {lease.lease_id: lease.holders for lease in self.manager.leases} == {
            lease_id: self.holders[lease_id] for lease_id in self.leases
        }

    @invariant()
    def every_sequence_reads_its_own_tokens(self):
        for sequence in self.live:
            held = self.read(self.manager.block_table(sequence), sequence.num_computed)
            assert held == slots(sequence.token_ids, 0, sequence.num_computed)

    @invariant()
    def every_cached_block_holds_what_it_is_found_by(self):
        for block in self.manager.pool.blocks:
            if block.prefix is not None:
                token_ids, prefix = [], block.prefix
                while prefix is not None:
                    token_ids, prefix = [*prefix.token_ids, *token_ids], prefix.parent
                end = len(token_ids)
                assert self.cache[block.block_id] == slots(token_ids, end - self.manager.block_size, end)

    def teardown(self):
        if not hasattr(self, "manager"):
            return
        for sequence in self.live:
            self.manager.free(sequence)
        for lease in self.leases.values():
            self.manager.release_lease(lease, "request")
            self.manager.release_lease(lease, "writer")
        assert self.manager.num_free_blocks == self.manager.num_blocks and self.manager.leases == []
        self.manager.check()


EVERY_MOVE = {
    "allocate", "allocate refused", "hit", "serve", "step", "step with everybody", "preempt", "copy", "fork",
    "free", "verify drafts", "verify drafts in a fork", "rewind", "reset", "grant lease", "writer writes", "writer lets go", "cancel",
    "adopt",
}


def run_machine(examples, **options):
    """Returns how often each move was made, over `examples` runs of 50 moves."""
    moves.clear()
    run_state_machine_as_test(
        BlockMachine,
        settings=settings(
            max_examples=examples, stateful_step_count=50, deadline=None, database=None, **options
        ),
    )
    return Counter(moves)


def test_any_order_of_moves_keeps_every_promise():
    made = run_machine(100, derandomize=True)
    assert made["checked"] >= 500


@pytest.mark.nightly
def test_ten_thousand_moves_keep_every_promise():
    made = run_machine(400, print_blob=True)
    assert made["checked"] >= 10_000
    assert EVERY_MOVE <= set(made), f"never happened: {EVERY_MOVE - set(made)}"
