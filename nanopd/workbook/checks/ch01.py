"""Checks of chapter 01, the block manager."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

from nanopd.block_manager import BlockPool, BlockSpaceManager, InvariantError
from nanopd.core import Sequence
from nanopd.workbook.check import exercise, say

AppendSlot = Callable[[BlockPool, list[int], int], list[tuple[int, int]]]


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
