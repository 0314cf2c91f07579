"""The runner's block tables: whatever happens between steps, the device's copy is the plan's."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopd.core import PlanRow, Request, Sequence, StepPlan
from nanopd.engine.cuda_runner import BlockTables, batch_sizes

WIDTH = 12


def make_row(sequence: Sequence, num_cached: int, num_new: int, table: list[int], copies=()) -> PlanRow:
    return PlanRow(sequence, Request(sequence.request_id, [1]), num_new, num_cached, list(table), list(copies))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_the_device_has_every_rows_blocks(data) -> None:
    """Sequences come, grow, have blocks replaced by copy-on-write, are preempted and come back, change places, go."""
    tables = BlockTables(4, WIDTH, torch.device("cpu"))
    fresh = iter(range(1, 10_000))
    running: list[tuple[Sequence, list[int]]] = []
    for _ in range(data.draw(st.integers(1, 12))):
        preempted = []
        if len(running) < 4 and data.draw(st.booleans()):
            running.append((Sequence([1]), []))
        if running and data.draw(st.integers(0, 4)) == 0:
            running.pop(data.draw(st.integers(0, len(running) - 1)))
        if len(running) > 1 and data.draw(st.integers(0, 4)) == 0:
            running.reverse()
        rows = []
        for sequence, table in running:
            if table and data.draw(st.integers(0, 6)) == 0:  # preempted, and back with other blocks
                preempted.append(sequence.request_id)
                kept = data.draw(st.integers(0, sequence.num_computed))
                table[:] = [next(fresh) for _ in range(kept)]
                sequence.num_computed = kept
            num_new = data.draw(st.integers(1, max(1, WIDTH - sequence.num_computed)))
            num_new = min(num_new, WIDTH - sequence.num_computed)
            if num_new == 0:
                continue
            copies = []
            if table and data.draw(st.integers(0, 3)) == 0:
                index = data.draw(st.integers(0, len(table) - 1))
                copies, table[index] = [(table[index], next(fresh))], next(fresh)
            table += [next(fresh) for _ in range(sequence.num_computed + num_new - len(table))]
            rows.append(make_row(sequence, sequence.num_computed, num_new, table, copies))
            sequence.num_computed += num_new
        plan = StepPlan(rows, preempted)
        tables.update(plan)
        for row, on_device in zip(rows, tables.rows(len(rows)).tolist(), strict=True):
            assert on_device[: len(row.block_table)] == row.block_table


def test_an_unchanged_table_sends_nothing(monkeypatch) -> None:
    sent: list[int] = []
    from nanopd.engine import cuda_runner

    def spy(values, device, dtype=torch.int64):
        sent.append(len(values))
        return torch.tensor(values, dtype=dtype)

    monkeypatch.setattr(cuda_runner, "upload", spy)
    tables, sequence = BlockTables(2, WIDTH, torch.device("cpu")), Sequence([1])
    for num_cached, table in ((0, [5]), (1, [5]), (2, [5, 6]), (3, [5, 6])):
        tables.update(StepPlan([make_row(sequence, num_cached, 1, table)]))
    assert sent == [1, 1, 1, 1]  # place and block, at the first step and as the second block came


def test_batch_sizes_waste_little() -> None:
    sizes = batch_sizes(256)
    assert sizes == sorted(set(sizes)) and sizes[-1] == 256
    for rows in range(1, 257):
        size = next(size for size in sizes if size >= rows)
        assert size - rows <= max(7, rows // 4)
    assert batch_sizes(1) == [1] and batch_sizes(5) == [1, 2, 4, 5]
