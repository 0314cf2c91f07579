"""The block map tells what happened: its replay meets the manager's books at every moment, in both directions."""

from __future__ import annotations

import contextlib
from collections import Counter, deque
from copy import deepcopy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopd.block_manager import BlockSpaceManager, NoFreeBlocks
from nanopd.core import Sequence
from nanopd.widgets.block_map import MAX_TABLES, OUTLINE, POOL, TABLES, BlockMap
from nanopd.widgets.block_replay import PoolState, Replay, moves_of
from nanopd.widgets.strings import set_language


@pytest.fixture(autouse=True)
def english():
    set_language("en")
    yield
    set_language(None)


# ----------------------------------------------------------------------------------------------- the replay

OPERATIONS = ("allocate write write write fork free free lease adopt let_go let_go let_go reset share").split()
operations = st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 50), st.integers(1, 12)),
                      min_size=30, max_size=45)  # long enough to run out of blocks


class Player:
    """Performs operations on a manager and keeps the books after each of them."""

    def __init__(self, num_blocks: int, caching: bool) -> None:
        self.manager = BlockSpaceManager(num_blocks, block_size=2, enable_prefix_caching=caching)
        self.live: list[Sequence] = []
        self.books = {0: PoolState.of(self.manager)}

    def perform(self, name: str, pick: int, size: int) -> None:
        with contextlib.suppress(NoFreeBlocks):
            getattr(self, "do_" + name)(pick, size)
        self.books[len(self.manager.events)] = PoolState.of(self.manager)

    def do_allocate(self, pick: int, size: int) -> None:
        sequence = Sequence([0, 1, 1, 0, 1, 0, 0, 1, 1, 1, 0, 1][: size - 1] + [pick % 2])
        self.manager.allocate(sequence)
        self.live.append(sequence)

    def do_write(self, pick: int, size: int) -> None:
        if self.live:
            sequence = self.live[pick % len(self.live)]
            while sequence.num_remaining < size:
                sequence.append_token(pick % 2)
            self.manager.append_slot(sequence, size)
            sequence.num_computed += size
            self.manager.commit(sequence)

    def do_fork(self, pick: int, size: int) -> None:
        if self.live:
            self.live.append(self.manager.fork(self.live[pick % len(self.live)], num_tokens=None if pick % 2 else size - 1))

    def do_free(self, pick: int, size: int) -> None:
        if self.live:
            self.manager.free(self.live.pop(pick % len(self.live)))

    def do_lease(self, pick: int, size: int) -> None:
        self.manager.grant_lease([0, 1, 1, 0, 1, 0, 0, 1, 1, 1, 0, 1][:size])

    def do_adopt(self, pick: int, size: int) -> None:
        for lease in self.manager.leases:
            if "request" in lease.holders:
                self.live.append(Sequence([*lease.token_ids, 1]))
                self.manager.adopt(self.live[-1], lease)
                return

    def do_let_go(self, pick: int, size: int) -> None:
        if self.manager.leases:
            lease = self.manager.leases[pick % len(self.manager.leases)]
            self.manager.release_lease(lease, ("request", "writer")[size % 2])

    def do_reset(self, pick: int, size: int) -> None:
        if pick % 4 == 0:
            self.manager.reset_prefix_cache()

    def do_share(self, pick: int, size: int) -> None:
        """Two holders less and more, behind the tables' back, as a test of the pool would have it."""
        block = pick % self.manager.num_blocks
        if self.manager.ref_count(block):
            self.manager.pool.share(block)
            self.manager.pool.release(block)


def played(num_blocks, caching, moves) -> Player:
    player = Player(num_blocks, caching)
    for move in moves:
        player.perform(*move)
    return player


pools = st.integers(3, 24)


def test_the_replay_meets_the_books_after_every_operation_forwards_and_backwards():
    happened: Counter[str] = Counter()
    check_replay(happened)
    assert set(happened) == {"allocate", "evict", "hit", "share", "release", "free", "cache", "forget", "fork", "copy",
                             "lease", "adopt"}, "the operations have to cause every kind of event"


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(num_blocks=pools, caching=st.sampled_from([True, True, False]), moves=operations)
def check_replay(happened, num_blocks, caching, moves):
    player = played(num_blocks, caching, moves)
    replay = Replay(player.manager)
    happened.update(event.kind for event in replay.events)
    for position, books in player.books.items():
        assert replay.seek(position) == books
    forwards = [deepcopy(replay.seek(position)) for position in range(len(replay.events) + 1)]
    for position, state in reversed(list(enumerate(forwards))):
        assert replay.seek(position) == state
    replay.seek(len(replay.events))
    snapshot = player.manager.snapshot()
    assert replay.state.ref_counts == snapshot["ref_counts"]
    assert [found is not None for found in replay.state.hashes] == snapshot["cached"]
    assert replay.state.tables == {seq: table for seq, table in snapshot["tables"].items() if table}
    assert replay.state.unexplained() == []


@settings(max_examples=100, deadline=None, database=None, derandomize=True)
@given(num_blocks=pools, moves=operations, lost=st.integers(1, 100))
def test_a_log_without_its_beginning_is_worked_out_backwards(num_blocks, moves, lost):
    player = played(num_blocks, True, moves)
    log = player.manager.events
    kept = list(log)[lost:]
    if not kept:
        return
    player.manager.pool.events = deque(kept, maxlen=log.maxlen)
    replay = Replay(player.manager)
    assert replay.num_lost in (lost, lost + 1)
    for count, books in player.books.items():
        if count >= replay.num_lost:
            state = replay.seek(count - replay.num_lost)
            assert (state.ref_counts, state.tables) == (books.ref_counts, books.tables)
            assert (state.leases, state.holders) == (books.leases, books.holders)
            assert [found is None for found in state.hashes] == [found is None for found in books.hashes]


@settings(max_examples=40, deadline=None, database=None, derandomize=True)
@given(num_blocks=pools, moves=operations)
def test_moves_cover_the_log_and_books_balance_after_each(num_blocks, moves):
    replay = Replay(played(num_blocks, True, moves).manager)
    found = moves_of(replay)
    assert [move.start for move in found] == [0, *(move.end for move in found)][: len(found)]
    assert not found or found[-1].end == len(replay.events)
    for move in found:
        unexplained = replay.seek(move.end).unexplained()
        assert not unexplained or move.kind == "pool_take"


def test_a_log_that_begins_inside_a_copy_takes_nothing_for_granted():
    manager, answers = prompt_with_forks()
    writes(manager, answers[0])()
    log = manager.events
    assert [event.kind for event in log][-2:] == ["copy", "release"]
    manager.pool.events = deque(list(log)[-1:], maxlen=log.maxlen)
    assert Replay(manager).seek(0) == PoolState.of(manager)


def test_each_block_a_sequence_grows_by_is_a_move_of_its_own():
    manager = BlockSpaceManager(8, block_size=2, enable_prefix_caching=False)
    sequence = Sequence([1, 2])
    manager.allocate(sequence)
    panel = BlockMap(manager)
    panel.to_end()
    for _ in range(2):
        sequence.num_computed += 2
        manager.append_slot(sequence, 2)
    panel.refresh()
    assert (panel.position, [move.kind for move in panel.moves]) == (1, ["admit", "grow", "grow"])


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_kind_of_move_has_its_sentence(language):
    set_language(language)
    manager, kinds = two_pipelines()
    panel = BlockMap(manager)
    assert {move.kind for move in panel.moves} == kinds
    seen = set()
    while panel.position < panel.slider.max:
        panel.step()
        assert "None" not in panel.sentence and "{" not in panel.sentence
        seen.add(panel.sentence)
    assert len(seen) == len(panel.moves)


def two_pipelines() -> tuple[BlockSpaceManager, set[str]]:
    """A manager to whom everything has happened that it has a word for."""
    manager = BlockSpaceManager(12, block_size=4)
    parent = Sequence(range(10))
    manager.allocate(parent)
    parent.num_computed = 10
    manager.commit(parent)
    child = manager.fork(parent)
    child.append_token(1)
    manager.append_slot(child, 1)
    parent.append_token(2)
    manager.append_slot(parent, 3)
    lease = manager.grant_lease(list(range(100, 108)))
    sequence = Sequence([*lease.token_ids, 1])
    manager.adopt(sequence, lease)
    manager.release_lease(lease, "writer")
    refused = manager.grant_lease([1, 2, 3])
    manager.release_lease(refused, "writer")
    manager.free(child)
    child = manager.fork(parent, num_tokens=4)
    child.num_computed = 0
    manager.append_slot(child, 1)
    block = manager.pool.allocate()
    manager.pool.release(block)
    manager.reset_prefix_cache()
    return manager, {"admit", "cache", "fork", "copy", "grow", "lease", "adopt", "let_go", "free", "pool_take",
                     "pool_release", "forget"}


# ------------------------------------------------------------------------------------------------ the panel


def prompt_with_forks():
    manager = BlockSpaceManager(256, block_size=16)
    parent = Sequence(range(1000))
    manager.allocate(parent)
    parent.num_computed = 1000
    answers = [parent] + [manager.fork(parent) for _ in range(3)]
    return manager, answers


def writes(manager, sequence):
    def write():
        sequence.append_token(7)
        manager.append_slot(sequence)
    return write


def grid(panel, trace):
    return [list(line) for line in panel.figure.data[trace].text]


def test_the_section_on_forks_played_step_by_step():
    manager, answers = prompt_with_forks()
    panel = BlockMap(manager, watch=answers, actions=[("append", writes(manager, answer)) for answer in answers])
    assert (panel.position, panel.slider.max) == (0, 4) and "every block is free" in panel.message.value
    panel.step()
    assert "63 blocks handed out" in panel.message.value and grid(panel, POOL)[0] == ["1"] * 32
    panel.step()
    seq, parent = answers[1].seq_id, answers[0].seq_id
    assert f"Sequence {seq} forked from {parent}: nothing copied, 63 blocks shared, each now with 2 references." in panel.sentence
    panel.to_end()
    assert grid(panel, POOL)[1] == ["4"] * 31 + [""]
    panel.step()
    assert "block 62, which others still read: it gets a copy, block 63" in panel.message.value
    assert grid(panel, TABLES)[1][30] == "63" and grid(panel, TABLES)[3][30] == "62"
    assert len(panel.figure.layout.shapes) == 1
    for _ in range(2):
        panel.step()
    assert not panel.step_button.disabled
    panel.step()
    assert "No block changed hands" in panel.message.value and panel.step_button.disabled
    assert not panel.figure.data[OUTLINE].x and not panel.figure.layout.shapes
    assert (manager.num_used_blocks, panel.state.ref_counts[62]) == (66, 1)
    panel.back()
    assert panel.state.ref_counts[62:66] == [2, 1, 1, 0]


def test_the_slider_and_go_to_change_the_figure_in_place():
    manager, answers = prompt_with_forks()
    panel = BlockMap(manager, watch=answers)
    traces = [trace.uid for trace in panel.figure.data]
    height = panel.figure.layout.height
    panel.slider.value = 2
    assert grid(panel, POOL)[0][0] == "2" and panel.figure.data[OUTLINE].x
    panel.go_to(99)
    assert panel.position == 4 and panel.end_button.disabled
    panel.go_to(-1)
    assert panel.position == 0 and panel.back_button.disabled and not panel.figure.data[OUTLINE].x
    assert [trace.uid for trace in panel.figure.data] == traces
    assert panel.figure.layout.height == height


def test_the_buttons_do_what_the_methods_do():
    manager, answers = prompt_with_forks()
    panel = BlockMap(manager, watch=answers)
    assert "nanopd-step" in panel.step_button._dom_classes
    panel.step_button.click()
    assert panel.position == 1
    panel.end_button.click()
    panel.back_button.click()
    assert panel.position == 3


def test_refresh_takes_in_what_happened_since_and_stays_where_it_was():
    manager, answers = prompt_with_forks()
    panel = BlockMap(manager)
    panel.go_to(2)
    manager.free(answers[3])
    panel.refresh()
    assert (panel.position, panel.slider.max) == (2, 5)
    panel.to_end()
    assert "let go of 63 blocks: 0 free now" in panel.sentence
    manager.free(answers[2])
    panel.step()  # looks for news by itself
    assert panel.position == 6 and len(panel.state.tables) == 2


def test_a_truncated_log_says_so():
    manager, _ = prompt_with_forks()
    manager.pool.events = deque(manager.events, maxlen=100)
    panel = BlockMap(manager)
    assert "the first" in panel.sentence and panel.replay.num_lost > 100
    panel.to_end()
    assert panel.replay.seek(len(panel.replay.events)) == PoolState.of(manager)


def test_a_leak_is_pointed_out():
    manager, _ = prompt_with_forks()
    panel = BlockMap(manager)
    panel.to_end()
    assert "don't balance" not in panel.sentence
    manager.pool.blocks[5].ref_count += 1
    panel.refresh()
    assert "block 5 has a reference count" in panel.sentence


def test_what_an_action_raises_is_shown_and_raised():
    def refuse():
        raise NoFreeBlocks("1 block wanted, 0 of <4> are free")

    manager = BlockSpaceManager(4)
    panel = BlockMap(manager, actions=[("<b>try</b>", refuse), ("free", lambda: None)])
    with pytest.raises(NoFreeBlocks):
        panel.step()
    assert "free" in panel.step_button.description
    panel = BlockMap(manager, actions=[("try", refuse)])
    panel.step_button.click()  # outside a kernel ipywidgets logs the error
    assert "0 of &lt;4&gt; are free" in panel.message.value


def test_watched_sequences_may_come_later():
    manager = BlockSpaceManager(40)
    watched: list[Sequence] = []

    def admit():
        watched.append(Sequence(range(40)))
        manager.allocate(watched[-1])

    panel = BlockMap(manager, watch=watched, actions=[("admit", admit)])
    assert "every" not in panel.sentence or panel.slider.max == 0
    panel.step()
    assert grid(panel, TABLES)[0][:4] == ["0", "1", "2", ""]


def test_many_tables_and_a_large_pool_stay_drawable():
    manager = BlockSpaceManager(5000)
    sequences = [Sequence(range(i, 3000 + i)) for i in range(MAX_TABLES + 2)]
    for sequence in sequences:
        manager.allocate(sequence)
    panel = BlockMap(manager)
    panel.to_end()
    assert panel.figure.layout.height < 1600
    assert f"{MAX_TABLES} of {MAX_TABLES + 2}" in panel.figure.layout.annotations[1].text


def test_the_snapshot_is_static_and_says_what_it_shows():
    manager, answers = prompt_with_forks()
    panel = BlockMap(manager, watch=answers)
    panel.go_to(2)
    figure = panel.snapshot()
    assert type(figure).__name__ == "Figure" and "forked" in figure.layout.title.text
    panel.step()
    assert figure.data[POOL].text[0][0] == "2"


def test_the_figure_explains_its_numbers_and_its_legend_stays():
    manager, answers = prompt_with_forks()
    panel = BlockMap(manager, watch=answers)
    pool, tables = (note.text for note in panel.figure.layout.annotations[:2])
    assert "its reference count" in pool and "the block's number" in tables
    named = [trace.name for trace in panel.figure.data if trace.showlegend is not False and trace.name]
    assert named[:3] == ["this step", "found by hash", "free"]
    for trace in panel.figure.data:  # plotly leaves a trace without a point out of the legend
        assert trace.showlegend is False or trace.type == "heatmap" or list(trace.x) == [None]
    large = BlockMap(BlockSpaceManager(5000))
    assert "reference count" not in large.figure.layout.annotations[0].text


def test_a_live_manager_that_has_done_nothing_yet_has_all_blocks_free():
    panel = BlockMap(BlockSpaceManager(8), actions=[("nothing", lambda: None)])
    assert "every block is free" in panel.message.value
