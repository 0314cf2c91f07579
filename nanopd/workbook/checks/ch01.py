"""Checks of chapter 01: slots, reference counts, copy-on-write, and the prefix cache."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

from nanopd.block_manager import BlockPool, BlockSpaceManager, InvariantError
from nanopd.core import PlanRow, Request, Sequence, StepPlan
from nanopd.workbook.check import exercise, say

SlotMapping = Callable[[list[int], int, int, int], list[int]]
WrongBlocks = Callable[[list[int], list[list[int]]], list[int]]
AppendSlot = Callable[[BlockPool, list[int], int], list[tuple[int, int]]]
LongestCachedPrefix = Callable[[BlockPool, list[int]], list[int]]


# ------------------------------------------------------------------------------------------ 01.2, slot mapping


def _slots_of_the_engine(table: list[int], block_size: int, start: int, num_new: int) -> list[int]:
    """What the runner tells the kernel for one row. Imported here: the other exercises do without torch."""
    import torch

    from nanopd.engine.runner import build_batch

    sequence = Sequence([0] * (start + num_new))
    row = PlanRow(sequence, Request("0", sequence.token_ids), num_new, start, table)
    return build_batch(StepPlan([row]), block_size, torch.device("cpu"))[2].slot_mapping.tolist()


@exercise("01.2", hint_en="position // block_size is the entry in the table, position % block_size the offset in its block; "
                          "a slot is block * block_size + offset.",
          hint_zh="position // block_size 是块表里的第几项，position % block_size 是块内偏移；"
                  "槽位 = 块号 * block_size + 偏移。")
def check_slots_equal_the_engines(theirs: SlotMapping) -> None:
    for table, size, start, num_new in (([7, 2, 9], 4, 9, 1), ([7, 2, 9], 4, 0, 12), ([3, 0], 16, 14, 5), ([5], 1, 0, 1)):
        expected = _slots_of_the_engine(table, size, start, num_new)
        got = theirs(list(table), size, start, num_new)
        assert got is not None and list(got) == expected, say(
            f"table {table}, blocks of {size}, {num_new} tokens from position {start}: the engine writes to {expected}, "
            f"you say {got}",
            f"块表 {table}、块大小 {size}、从位置 {start} 起 {num_new} 个 token：引擎写到 {expected}，你的结果是 {got}")


# -------------------------------------------------------------------------------------- 01.3, reference counts


@exercise("01.3", hint_en="Count in how many tables each block occurs, and compare with its reference count.",
          hint_zh="数一数每个块在几张块表里出现，再和它的引用计数比较。")
def check_sound_books_have_no_fault(theirs: WrongBlocks) -> None:
    for counts, tables in (([1, 2, 1, 0], [[0, 1], [1, 2]]), ([0, 0], []), ([3], [[0], [0], [0]])):
        got = theirs(list(counts), [list(table) for table in tables])
        assert got == [], say(f"counts {counts} and tables {tables} agree, but you name {got}",
                              f"计数 {counts} 与块表 {tables} 相符，你却报了 {got}")


@exercise("01.3", hint_en="A count may be too high (a leak), too low (somebody reads a block that others may write), and a "
                          "block in no table at all must have 0.",
          hint_zh="计数可能偏高（泄漏），也可能偏低（有人在读，别人却能写）；不在任何块表里的块，计数必须是 0。")
def check_wrong_counts_are_named(theirs: WrongBlocks) -> None:
    cases: list[tuple[list[int], list[list[int]], list[int]]] = [
        ([1, 1, 0, 1], [[0, 1], [1]], [1, 3]),  # one too low, one leaked
        ([0, 2, 1, 0], [[0, 1, 2], [1]], [0]),
        ([2, 1, 0], [[0, 1]], [0]),
    ]
    for counts, tables, expected in cases:
        got = theirs(list(counts), [list(table) for table in tables])
        assert got is not None and list(got) == expected, say(
            f"counts {counts}, tables {tables}: blocks {expected} are wrong, you name {got}",
            f"计数 {counts}、块表 {tables}：对不上的是块 {expected}，你报的是 {got}")


@exercise("01.3", hint_en="The real `check()` names the same blocks: run it on the manager and compare.",
          hint_zh="真正的 `check()` 报的就是这些块：在管理器上跑一遍，对照着看。")
def check_faults_equal_the_pools(theirs: WrongBlocks) -> None:
    """Random books with random slips, beside the engine's own proof."""
    rng = random.Random(13)
    for _ in range(50):
        manager = BlockSpaceManager(num_blocks=24, block_size=2)
        parent = Sequence(range(rng.randrange(1, 16)))
        manager.allocate(parent)
        tables = [manager.block_table(child) for child in (parent, manager.fork(parent), manager.fork(parent))]
        for block in rng.sample(range(24), rng.randrange(4)):
            manager.pool.blocks[block].ref_count += rng.choice((-1, 1, 2))
        counts = [block.ref_count for block in manager.pool.blocks]
        holders = Counter(block for table in tables for block in table)
        named = [block for block in range(24) if _pool_complains(manager.pool, block, holders)]
        got = theirs(counts, tables)
        assert got is not None and list(got) == named, say(
            f"counts {counts}, tables {tables}: the engine's check names {named}, you name {got}",
            f"计数 {counts}、块表 {tables}：引擎的 check 报的是 {named}，你报的是 {got}")


def _pool_complains(pool: BlockPool, block: int, holders: Counter[int]) -> bool:
    return any(fault.startswith(f"block {block} has ref count") and "block tables" in fault for fault in pool.faults(holders))


# --------------------------------------------------------------------------------------- 01.4, copy-on-write


class Bench:
    """Sequences whose last block the learner's `append_slot` makes writable, over the engine's own pool.

    The cache's contents are played by a dict, so that a block written while shared shows as a wrong token.
    """

    def __init__(self, append_slot: AppendSlot, block_size: int = 4) -> None:
        self.append_slot = append_slot
        self.pool = BlockPool(num_blocks=256, block_size=block_size, enable_prefix_caching=False)
        self.tables: list[list[int]] = []
        self.tokens: list[list[int]] = []
        self.memory: dict[tuple[int, int], int] = {}  # (block, offset) -> token

    def start(self, prompt: list[int]) -> int:
        """A new sequence with `prompt` computed. Returns its index."""
        self.tables.append([self.pool.allocate() for _ in range(-(-len(prompt) // self.pool.block_size))])
        self.tokens.append(list(prompt))
        for position, token in enumerate(prompt):
            self.memory[self._place(-1, position)] = token
        return len(self.tables) - 1

    def fork(self, parent: int) -> int:
        for block in self.tables[parent]:
            self.pool.share(block)
        self.tables.append(list(self.tables[parent]))
        self.tokens.append(list(self.tokens[parent]))
        return len(self.tables) - 1

    def append(self, index: int, token: int) -> list[tuple[int, int]]:
        """One decode step: the learner's function, the copies it asks for, then the write. Returns the copies."""
        position = len(self.tokens[index])
        copies = self.append_slot(self.pool, self.tables[index], position)
        assert _is_pairs(copies), say(
            f"return a list of (source, destination) pairs, empty where nothing is copied; got {copies!r}",
            f"应返回由 (源块, 目标块) 组成的列表，不需要复制时返回空列表；实际得到 {copies!r}")
        assert position < len(self.tables[index]) * self.pool.block_size, say(
            f"the table has no room for position {position}: a full last block needs a fresh one after it",
            f"块表里放不下位置 {position}：最后一块已经写满，后面要接一个新块")
        for source, destination in copies:
            for offset in range(self.pool.block_size):
                if (source, offset) in self.memory:
                    self.memory[destination, offset] = self.memory[source, offset]
        self.memory[self._place(index, position)] = token
        self.tokens[index].append(token)
        return copies

    def read(self, index: int) -> list[int | None]:
        return [self.memory.get(self._place(index, position)) for position in range(len(self.tokens[index]))]

    def assert_books_balance(self) -> None:
        try:
            self.pool.check(Counter(block for table in self.tables for block in table))
        except InvariantError as error:
            raise AssertionError(say(f"the books don't balance: {error}", f"账对不上：{error}")) from None

    def _place(self, index: int, position: int) -> tuple[int, int]:
        size = self.pool.block_size
        return self.tables[index][position // size], position % size


def _is_pairs(copies: object) -> bool:
    return isinstance(copies, list) and all(isinstance(pair, tuple) and len(pair) == 2 for pair in copies)


@exercise("01.4", hint_en="Nobody else reads the last block (reference count 1): write in place, copy nothing.",
          hint_zh="最后一块没有别人在读（引用计数为 1）：就地写入，什么都不用复制。")
def check_alone_writes_in_place(theirs: AppendSlot) -> None:
    bench = Bench(theirs)
    bench.start([1, 2])
    before = list(bench.tables[0])
    copies = bench.append(0, 3)
    assert not copies, say(f"a block nobody shares was copied: {copies}", f"没有人共享的块被复制了：{copies}")
    assert bench.tables[0] == before, say(
        f"the table changed from {before} to {bench.tables[0]}, though there was room",
        f"明明还有空位，块表却从 {before} 变成了 {bench.tables[0]}")


@exercise("01.4", hint_en="num_computed == len(table) * pool.block_size means that all blocks are full: add a fresh "
                          "one. The full ones are only read, so sharing them is harmless.",
          hint_zh="num_computed == len(table) * pool.block_size 说明所有块都写满了：接一个新块。"
                  "写满的块只读不写，共享无妨。")
def check_full_block_is_followed_by_a_fresh_one(theirs: AppendSlot) -> None:
    bench = Bench(theirs)
    bench.start([1, 2, 3, 4])
    bench.fork(0)
    shared = bench.tables[0][0]
    copies = bench.append(0, 5)
    assert not copies, say(f"a full block is only read, it needs no copy: {copies}",
                           f"写满的块只读不写，不必复制：{copies}")
    assert bench.tables[0][0] == shared and len(bench.tables[0]) == 2, say(
        f"the table should be [{shared}, a fresh block], and is {bench.tables[0]}",
        f"块表应为 [{shared}, 新块]，实际是 {bench.tables[0]}")
    bench.assert_books_balance()


@exercise("01.4", hint_en="The last block has other readers (reference count above 1): allocate a block, put it in the "
                          "table in place of the shared one, release the shared one, return the pair.",
          hint_zh="最后一块还有别人在读（引用计数大于 1）：申请一个新块，在块表里换下共享的那块，"
                  "再释放它，最后返回这一对块号。")
def check_shared_block_is_copied(theirs: AppendSlot) -> None:
    bench = Bench(theirs)
    bench.start([1, 2, 3, 4, 5, 6])
    for _ in range(3):
        bench.fork(0)
    shared = bench.tables[0][-1]
    per_answer = [bench.append(index, 100 + index) for index in range(4)]
    counts = [len(copies) for copies in per_answer]
    assert counts == [1, 1, 1, 0], say(
        f"four sequences share a block and each writes once: copies should number 1, 1, 1, 0, and number {counts}",
        f"四条序列共享一个块、各写一次：复制次数应依次为 1、1、1、0，实际是 {counts}")
    expected = [[(shared, bench.tables[index][-1])] for index in range(3)]
    assert per_answer[:3] == expected, say(
        f"each pair should be (shared block, the sequence's new block): expected {expected}, got {per_answer[:3]}",
        f"每一对应为（共享块, 该序列的新块）：应为 {expected}，实际是 {per_answer[:3]}")
    bench.assert_books_balance()


@exercise("01.4", hint_en="Whoever leaves a block releases it, whoever takes one allocates it: ref_count is the number "
                          "of tables that hold the block.",
          hint_zh="离开一个块就要释放，拿到一个块就要申请：引用计数 == 持有该块的块表数。")
def check_no_token_lost_and_no_block_leaked(theirs: AppendSlot) -> None:
    """A few hundred random forks and appends, beside the engine's own manager carrying out the same."""
    bench, rng = Bench(theirs), random.Random(14)
    manager = BlockSpaceManager(num_blocks=256, block_size=4, enable_prefix_caching=False)
    sequences = [Sequence(range(1, 7))]
    bench.start(list(range(1, 7)))
    manager.allocate(sequences[0])
    sequences[0].num_computed = 6
    for token in range(100, 300):
        index = rng.randrange(len(sequences))
        if len(sequences) < 8 and rng.random() < 0.1:
            sequences.append(manager.fork(sequences[index]))
            index = bench.fork(index)
        sequences[index].append_token(token)
        wanted = len(manager.append_slot(sequences[index]))
        sequences[index].num_computed += 1
        copies = bench.append(index, token)
        assert len(copies) == wanted, say(f"copies asked for: {len(copies)}; the engine makes {wanted} here",
                                          f"引擎在这里复制 {wanted} 次，你的实现复制了 {len(copies)} 次")
    for index, tokens in enumerate(bench.tokens):
        assert bench.read(index) == tokens, say(
            f"sequence {index} reads back {bench.read(index)[-6:]} where it wrote {tokens[-6:]}: it was written over",
            f"序列 {index} 写入的是 {tokens[-6:]}，读回来却是 {bench.read(index)[-6:]}：被别人覆盖了")
    bench.assert_books_balance()
    for table in bench.tables:
        for block in table:
            bench.pool.release(block)
    assert bench.pool.num_used == 0, say(f"{bench.pool.num_used} blocks leaked", f"泄漏了 {bench.pool.num_used} 个块")


# ------------------------------------------------------------------------------- 01.5, the longest cached prefix


def _cached_pool(prompt: list[int], *, collide: bool = False) -> BlockPool:
    """A pool of blocks of 4 in which the full blocks of `prompt` are cached, from block 0 on."""
    pool = BlockPool(32, 4, hash_fn=lambda *_: 0) if collide else BlockPool(32, 4)
    parent = None
    for start in range(0, len(prompt) - 3, 4):
        parent = pool.register(pool.allocate(), parent, prompt[start : start + 4])
    return pool


def _assert_found(theirs: LongestCachedPrefix, pool: BlockPool, token_ids: list[int], expected: list[int]) -> None:
    before = [block.ref_count for block in pool.blocks]
    got = theirs(pool, list(token_ids))
    assert got is not None and list(got) == expected, say(
        f"prompt {token_ids}: blocks {expected} hold its cached beginning, you say {got}",
        f"提示 {token_ids}：开头已缓存的块是 {expected}，你的结果是 {got}")
    assert before == [block.ref_count for block in pool.blocks], say(
        "looking up must change nothing, and a reference count has changed", "查找不应改变任何东西，引用计数却变了")


@exercise("01.5", hint_en="Walk from the front, one full block at a time, handing each block's prefix on as the next one's "
                          "`parent`; stop at the first miss.",
          hint_zh="从头往后，一次查一整块，把每块的前缀作为查下一块的 `parent`；第一次没查到就停。")
def check_run_is_followed_to_the_first_miss(theirs: LongestCachedPrefix) -> None:
    pool = _cached_pool(list(range(12)))
    _assert_found(theirs, pool, [*range(12), 99], [0, 1, 2])
    _assert_found(theirs, pool, [*range(8), 77, *range(9, 14)], [0, 1])
    _assert_found(theirs, pool, [50, *range(12)], [])
    pool.forget(1)
    _assert_found(theirs, pool, [*range(12), 99], [0])


@exercise("01.5", hint_en="(len(token_ids) - 1) // block_size blocks at most: the last token has to be run for there to be "
                          "logits.",
          hint_zh="最多查 (len(token_ids) - 1) // block_size 块：最后一个 token 必须现算，才有 logits 可采样。")
def check_last_token_is_left_to_compute(theirs: LongestCachedPrefix) -> None:
    pool = _cached_pool(list(range(12)))
    _assert_found(theirs, pool, list(range(12)), [0, 1])
    _assert_found(theirs, pool, list(range(9)), [0, 1])
    _assert_found(theirs, pool, list(range(4)), [])
    _assert_found(theirs, pool, [0], [])


@exercise("01.5", hint_en="The same tokens after other tokens are another block: pass the `parent`.",
          hint_zh="同样的 token 接在别的内容后面，就是另一个块：要把 `parent` 传进去。")
def check_block_counts_only_behind_its_own_beginning(theirs: LongestCachedPrefix) -> None:
    pool = _cached_pool([1, 2, 3, 4, 5, 6, 7, 8])
    _assert_found(theirs, pool, [5, 6, 7, 8, 9], [])
    _assert_found(theirs, pool, [1, 2, 3, 4, 1, 2, 3, 4, 9], [0])
    _assert_found(theirs, _cached_pool([1, 2, 3, 4], collide=True), [5, 6, 7, 8, 9], [])


@exercise("01.5", hint_en="Compare with the engine's own `cached_prefix` on your case.",
          hint_zh="拿你的结果和引擎自己的 `cached_prefix` 对照。")
def check_same_as_the_engines(theirs: LongestCachedPrefix) -> None:
    """Prompts over two tokens, so that beginnings often agree and often nearly do."""
    rng = random.Random(15)
    manager = BlockSpaceManager(num_blocks=24, block_size=3)
    for _ in range(200):
        sequence = Sequence([rng.randrange(2) for _ in range(rng.randrange(1, 20))])
        _assert_found(theirs, manager.pool, sequence.token_ids, manager.cached_prefix(sequence.token_ids))
        manager.allocate(sequence)
        sequence.num_computed = len(sequence)
        manager.commit(sequence)
        manager.free(sequence)
