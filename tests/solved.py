"""A right answer to exercise 01.4, for the tests of the workbook's machinery."""

from __future__ import annotations

import inspect

from nanopd.block_manager import BlockPool


def append_slot(pool: BlockPool, table: list[int], num_computed: int) -> list[tuple[int, int]]:
    if num_computed == len(table) * pool.block_size:
        table.append(pool.allocate())
        return []
    last = table[-1]
    if pool.ref_count(last) == 1:
        return []
    table[-1] = pool.allocate()
    pool.release(last)
    return [(last, table[-1])]


_, BODY = inspect.getsource(append_slot).split("\n", 1)
APPEND_SLOT_CELL = f"""\
def append_slot(pool, table, num_computed):
    ### BEGIN SOLUTION
{BODY.rstrip()}
    ### END SOLUTION
"""
