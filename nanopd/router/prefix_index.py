"""Which beginnings of prompts a worker has probably kept: those that it was sent last."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from nanopd.block_manager.pool import hash_block


def hash_prompt(token_ids: Sequence[int], block_size: int) -> list[int]:
    """The hashes of a prompt's full blocks, by which workers know them too. Each stands for all tokens up to its block's end."""
    hashes: list[int] = []
    parent = None
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        parent = hash_block(parent, token_ids[start : start + block_size])
        hashes.append(parent)
    return hashes


class PrefixIndex:
    """The blocks that a worker was sent last, as many as its cache holds.

    A block is never forgotten before those that go on from it: so what is known of a prompt is a beginning of it.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._hashes: OrderedDict[int, None] = OrderedDict()  # that which was sent last is last

    def __len__(self) -> int:
        return len(self._hashes)

    def add(self, hashes: Sequence[int]) -> None:
        """A prompt's blocks, in its order."""
        known = self._hashes
        for each in reversed(hashes):
            known[each] = None
            known.move_to_end(each)
        while len(known) > self.num_blocks:
            known.popitem(last=False)

    def match(self, hashes: Sequence[int]) -> int:
        """How many of a prompt's blocks are known."""
        known = self._hashes
        if not hashes or hashes[0] not in known:
            return 0
        low, high = 1, len(hashes)  # the first so many are known; more than that many are not
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if hashes[middle - 1] in known else (low, middle - 1)
        return low
