"""The block map: the pool as a grid of cells, the block tables beneath, replayed from the event log."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html import escape

import plotly.graph_objects as go

from nanopd.block_manager.manager import BlockSpaceManager
from nanopd.block_manager.pool import BlockEvent
from nanopd.core import Sequence
from nanopd.widgets.block_replay import (
    PoolState,
    Replay,
    describe,
    list_blocks,
    mover_of,
    moves_of,
    references,
)
from nanopd.widgets.player import FAINT, FONT, INK, PAPER, Player
from nanopd.widgets.strings import t

Action = tuple[str, Callable[[], object]]

# Colour-blind safe: pale grey and sand are free, blues deepen with the reference count, purple is leased.
COLOURS = ["#eceff3", "#f6e2a0", "#c3dcf0", "#74b0da", "#2f7bbd", "#0b3c78", "#cc79a7"]
LEGEND = ["free", "cached", "held_1", "held_2", "held_3", "held_4", "leased"]
FREE, CACHED, HELD, LEASED = 0, 1, 2, 6
TOUCHED = "#d55e00"
LINE_PX, MAX_TABLES, MAX_LINES = 25, 8, 4
POOL, TABLES, OUTLINE, FINDABLE = range(4)  # the figure's traces; the rest is its legend


@dataclass(frozen=True)
class Cell:
    """A place in the figure's grid, one unit wide and high."""

    x: float
    y: float
    block: int


class BlockMap(Player):
    """A manager's blocks and block tables, replayed from its event log.

    Args:
        manager: whose books to show.
        watch: the sequences whose tables are drawn; read anew each time, so it may grow. None: all there are.
        actions: (label, callable) pairs. Once the log has been played, Step calls the next one on the live
            manager and plays what it did.
    """

    def __init__(self, manager: BlockSpaceManager, watch: list[Sequence] | None = None,
                 actions: list[Action] | None = None) -> None:
        self.manager = manager
        self.watch = watch
        self._actions = list(actions or ())
        self._labels: list[tuple[int, int, str]] = []  # who made events [start, end)
        self._cuts: set[int] = set()  # numbers of events that begin a move
        self.columns = _columns(manager.num_blocks)
        self._pool_lines = -(-manager.num_blocks // self.columns)
        super().__init__(self._bare_figure(), "nanopd-block-map")
        self._load(-1)

    # Playing

    def step(self) -> None:
        """Play the next move. After the last one, perform the next action and play its first."""
        if self.position == self.slider.max:
            self.refresh()
        if self.position == self.slider.max and self._actions:
            self._act(*self._actions.pop(0))
        else:
            super().step()

    def refresh(self) -> None:
        """The manager has changed: take in the new events. Shows what it showed; Step plays on from there."""
        events = self._move_events
        self._load(events[-1].step if events else -1)

    def _act(self, label: str, action: Callable[[], object]) -> None:
        start = self._next_event
        try:
            action()
        finally:
            self._labels.append((start, self._next_event, label))
            self._load(start - 1)
        if self._next_event > start:
            super().step()
        else:
            self._unmark()
            self.message.value = t("blockmap.did_nothing", label=escape(label))

    def _unmark(self) -> None:
        """Take the marks of the last move off the figure."""
        with self.figure.batch_update():
            self.figure.data[OUTLINE].update(x=[], y=[])
            self.figure.layout.shapes = []
            self.figure.layout.annotations = self.figure.layout.annotations[:2]  # the headings, without the arrows

    @property
    def _next_event(self) -> int:
        return self.manager.events[-1].step + 1 if self.manager.events else 0

    def _load(self, last_shown: int) -> None:
        """Read the log, and show the state after the event numbered `last_shown`."""
        self.replay = Replay(self.manager)
        self._present = PoolState.of(self.manager)
        self.moves = moves_of(self.replay, self._cuts)
        self._cuts.add(self._next_event)  # what comes later is another move
        self._table_lines = max(self._lines_needed(), 1)
        ends = (self.replay.events[move.end - 1].step for move in self.moves)
        self._set_length(len(self.moves), sum(end <= last_shown for end in ends))

    def _redraw(self) -> None:
        super()._redraw()
        at_end = self.position == self.slider.max
        label = self._actions[0][0] if at_end and self._actions else ""
        self.step_button.disabled = at_end and not self._actions
        self.step_button.description = t("player.step_action", label=label) if label else t("player.step")

    # What is shown

    @property
    def state(self) -> PoolState:
        """The books at the current position. At the end they are the manager's, whatever the log says."""
        if self.position == self.slider.max:
            return self._present
        return self.replay.seek(self.moves[self.position - 1].end if self.position else 0)

    @property
    def sentence(self) -> str:
        progress = f"<b>{self.position}/{self.slider.max}</b> · "
        if not self.position:
            lost = self.replay.num_lost
            return progress + (t("blockmap.truncated", n=lost) if lost else
                               t("blockmap.start") if self.slider.max or not self.manager.num_used_blocks else
                               t("blockmap.no_events"))
        events, state = self._move_events, self.state
        label = next((text for start, end, text in self._labels if start <= events[0].step < end), "")
        faults = state.unexplained() if self.position == self.slider.max else []
        return (progress + (f"<b>{escape(label)}</b> · " if label else "")
                + describe(self.moves[self.position - 1].kind, events, state)
                + (t("blockmap.unexplained", block=list_blocks(faults)) if faults else ""))

    @property
    def _move_events(self) -> list[BlockEvent]:
        """The events of the move that led to what is shown."""
        if not self.position:
            return []
        move = self.moves[self.position - 1]
        return self.replay.events[move.start : move.end]

    def _shown_tables(self, state: PoolState) -> list[tuple[int, list[int]]]:
        if self.watch is None:
            return list(state.tables.items())[:MAX_TABLES]
        return [(sequence.seq_id, state.tables.get(sequence.seq_id, [])) for sequence in self.watch]

    def _lines_needed(self) -> int:
        """The most lines that the tables will ever take, so that the figure doesn't jump while it plays."""
        stops = [0, *(move.end for move in self.moves)]
        return max(len(self._line_owners(self.replay.seek(stop))) for stop in stops)

    def _lines(self, table: list[int]) -> Iterator[tuple[int, list[int]]]:
        """The table in lines of the grid, with the index each begins at. Of a very long one, the ends."""
        lines = [(start, table[start : start + self.columns]) for start in range(0, len(table), self.columns)]
        if len(lines) > MAX_LINES:
            lines = [lines[0], *lines[1 - MAX_LINES :]]
        yield from lines or [(0, [])]

    # Drawing

    def _draw(self) -> None:
        state = self.state
        codes, holders = _codes(state), state.holders_of()
        blocks = range(self.manager.num_blocks)
        pool = [Cell(block % self.columns, block // self.columns, block) for block in blocks]
        rows, labels = self._table_cells(state)
        hovers = [_hover(block, state, holders) for block in blocks]
        counts = [str(count or "") for count in state.ref_counts]
        numbers = [str(block) for block in blocks]
        self._draw_cells(POOL, pool, 0, self._pool_lines, (codes, counts, hovers))
        self._draw_cells(TABLES, rows, self._tables_top, self._table_lines, (codes, numbers, hovers))
        self._draw_outlines(state, pool, rows)
        size = 5 if self.columns <= 32 else 3
        findable = [cell for cell in pool
                    if state.hashes[cell.block] is not None and state.ref_counts[cell.block]]
        self.figure.data[FINDABLE].update(x=[cell.x + 0.34 for cell in findable],
                                          y=[cell.y + 0.3 for cell in findable], marker_size=size)
        self._draw_frame(state, labels)

    def _table_cells(self, state: PoolState) -> tuple[list[Cell], dict[float, str]]:
        """The tables' cells, and what stands before each of their lines."""
        cells, labels = [], {}
        y = self._tables_top
        for seq_id, table in self._shown_tables(state):
            for start, line in self._lines(table):
                labels[y] = str(start) if start else f"<b>{t('blockmap.sequence', seq=seq_id)}</b>"
                cells += [Cell(x, y, block) for x, block in enumerate(line)]
                y += 1
        return cells, labels

    @property
    def _tables_top(self) -> float:
        return self._pool_lines + 1.4

    def _draw_cells(self, trace: int, cells: list[Cell], top: float, num_lines: int,
                    values: tuple[list[int], list[str], list[str]]) -> None:
        """`values`: each block's colour, text and hover. Places without a cell stay empty."""
        grids: list[list[list[int | str | None]]] = [
            [[nothing] * self.columns for _ in range(num_lines)] for nothing in (None, "", "")]
        for cell in cells:
            for grid, of_block in zip(grids, values):
                grid[round(cell.y - top)][int(cell.x)] = of_block[cell.block]
        z, text, hovertext = grids
        self.figure.data[trace].update(x0=0, dx=1, y0=top, dy=1, z=z, text=text, hovertext=hovertext)

    def _draw_outlines(self, state: PoolState, pool: list[Cell], rows: list[Cell]) -> None:
        """Frames around what the move touched: its blocks in the pool, and in the mover's own table."""
        events = self._move_events
        touched = {event.block for event in events}
        mover = mover_of(events)
        own = {y for y, seq_id in self._line_owners(state) if seq_id == mover and mover is not None}
        path_x: list[float | None] = []
        path_y: list[float | None] = []
        for cell in (*pool, *(cell for cell in rows if cell.y in own)):
            if cell.block not in touched:
                continue
            path_x += [cell.x + dx * 0.47 for dx in (-1, 1, 1, -1, -1)] + [None]
            path_y += [cell.y + dy * 0.45 for dy in (-1, -1, 1, 1, -1)] + [None]
        self.figure.data[OUTLINE].update(x=path_x, y=path_y)

    def _line_owners(self, state: PoolState) -> list[tuple[float, int]]:
        owners = [seq_id for seq_id, table in self._shown_tables(state) for _ in self._lines(table)]
        return [(self._tables_top + line, seq_id) for line, seq_id in enumerate(owners)]

    def _draw_arrows(self, state: PoolState) -> list[dict[str, object]]:
        """From a copy's source to the copy, from a parent's table to its fork's. Returns the heads."""
        heads, arcs = [], []
        first_lines = {seq_id: y for y, seq_id in reversed(self._line_owners(state))}
        for event in self._move_events:
            if event.kind == "copy":
                (ay, ax), (y, x) = divmod(event.block, self.columns), divmod(event.other, self.columns)
                bend_x, bend_y, x_end, y_end = (ax + x) / 2, max(ay, y) + 1.5, x, y + 0.5
                arcs.append({"type": "path", "line": {"color": TOUCHED, "width": 2},
                             "path": f"M {ax},{ay + 0.45} Q {bend_x},{bend_y} {x_end},{y_end}"})
                heads.append(_arrow(x_end, y_end, 0.8 * x_end + 0.2 * bend_x, 0.8 * y_end + 0.2 * bend_y))
            elif event.kind == "fork" and {event.other, event.seq_id} <= set(first_lines):
                heads.append(_arrow(-0.85, first_lines[event.seq_id], -0.85, first_lines[event.other]))
        self.figure.layout.shapes = arcs
        return heads

    def _draw_frame(self, state: PoolState, labels: dict[float, str]) -> None:
        num_free = state.ref_counts.count(0)
        num_cached = sum(count == 0 and h is not None for count, h in zip(state.ref_counts, state.hashes))
        shown, total = len(self._shown_tables(state)), len(state.tables)
        heads = [
            (-1, t("blockmap.pool", n=self.manager.num_blocks, size=self.manager.block_size, free=num_free,
                   cached=num_cached, held=self.manager.num_blocks - num_free) + self._note("pool_numbers")),
            (self._tables_top - 1, (t("blockmap.tables") if shown >= total else
             t("blockmap.some_tables", n=shown, total=total)) + self._note("table_numbers"))]
        pool_labels = {line: str(line * self.columns) for line in range(self._pool_lines)}
        ticks = {**_thinned(pool_labels), **labels}
        bottom = self._tables_top + self._table_lines - 0.4
        layout = self.figure.layout
        layout.annotations = [_heading(y, text) for y, text in heads] + self._draw_arrows(state)
        layout.yaxis.update(tickvals=list(ticks), ticktext=list(ticks.values()), range=[bottom, -1.5])
        layout.height = round(self._line_px * (bottom + 1.5)) + layout.margin.t + layout.margin.b

    def _note(self, name: str) -> str:
        """What the numbers in the cells are, if they are shown."""
        return f'  <span style="color:{FAINT}">{t(f"blockmap.{name}")}</span>' if self._has_numbers else ""

    @property
    def _has_numbers(self) -> bool:
        return self.columns <= 32

    @property
    def _line_px(self) -> int:
        return LINE_PX if self._pool_lines <= 24 else max(4, 600 // self._pool_lines)

    def _bare_figure(self) -> go.Figure:
        gap = 2 if self.columns <= 64 else 0
        scale = [(edge / len(COLOURS), colour) for i, colour in enumerate(COLOURS) for edge in (i, i + 1)]
        cells = {
            "colorscale": scale, "zmin": -0.5, "zmax": len(COLOURS) - 0.5, "showscale": False, "xgap": gap,
            "ygap": gap, "hoverongaps": False, "hovertemplate": "%{hovertext}<extra></extra>",
            "texttemplate": "%{text}" if self._has_numbers else "", "textfont": {"size": 11, "family": FONT}}
        drawn = [
            go.Heatmap(**cells), go.Heatmap(**cells),
            go.Scatter(mode="lines", hoverinfo="skip", showlegend=False, line={"color": TOUCHED, "width": 2.5}),
            go.Scatter(mode="markers", hoverinfo="skip", showlegend=False,
                       marker={"color": INK, "line": {"color": PAPER, "width": 1}})]
        keys = [go.Scatter(x=[None], y=[None], mode="lines", name=t("blockmap.touched"), hoverinfo="skip",
                           line={"color": TOUCHED, "width": 2.5}),
                go.Scatter(x=[None], y=[None], mode="markers", name=t("blockmap.findable"), hoverinfo="skip",
                           marker={"color": INK, "size": 6})]
        keys += [go.Scatter(x=[None], y=[None], mode="markers", name=t(f"blockmap.{name}"), hoverinfo="skip",
                            marker={"symbol": "square", "size": 13, "color": colour,
                                    "line": {"color": "#9ca3af", "width": 1}})
                 for name, colour in zip(LEGEND, COLOURS)]
        figure = go.Figure(drawn + keys)
        figure.update_layout(
            autosize=True, paper_bgcolor=PAPER, plot_bgcolor=PAPER,
            font={"family": FONT, "size": 12, "color": INK},
            margin={"l": 70, "r": 14, "t": 6, "b": 44}, hoverlabel={"font_family": FONT, "align": "left"},
            legend={"orientation": "h", "y": 0, "yref": "container", "yanchor": "bottom", "x": 0,
                    "xref": "container", "font_size": 11,
                    "itemclick": False, "itemdoubleclick": False},
            dragmode=False,
            xaxis={"range": [-1.2, self.columns - 0.4], "visible": False, "fixedrange": True},
            yaxis={"showgrid": False, "zeroline": False, "fixedrange": True, "tickfont_color": FAINT})
        return figure


def _columns(num_blocks: int) -> int:
    """Cells in a line: few enough to read a number in each, unless the pool is a real one."""
    for columns, limit in ((16, 32), (20, 64), (32, 512), (64, 2048)):
        if num_blocks <= limit:
            return columns
    return 128


def _codes(state: PoolState) -> list[int]:
    """Which colour each block has."""
    codes = [HELD + min(count, 4) - 1 if count else FREE if block_hash is None else CACHED
             for count, block_hash in zip(state.ref_counts, state.hashes)]
    for block_ids in state.leases.values():
        for block in block_ids:
            codes[block] = LEASED
    return codes


def _hover(block: int, state: PoolState, holders: dict[int, list[tuple[str, int]]]) -> str:
    block_hash = state.hashes[block]
    names = [t(f"blockmap.{kind}", seq=holder) for kind, holder in holders.get(block, ())]
    lines = [f"<b>{t('blockmap.block', block=block)}</b>", references(state.ref_counts[block])]
    lines += [t("blockmap.separator").join(names)] if names else []
    lines.append(t("blockmap.no_hash") if block_hash is None else
                 t("blockmap.hash", hash=block_hash[:8] or "?"))
    return "<br>".join(lines)


def _heading(y: float, text: str) -> dict[str, object]:
    return {"x": -0.5, "y": y, "text": text, "showarrow": False, "xanchor": "left", "yanchor": "middle",
            "font_size": 13}


def _arrow(x: float, y: float, ax: float, ay: float) -> dict[str, object]:
    return {"x": x, "y": y, "ax": ax, "ay": ay, "xref": "x", "yref": "y", "axref": "x", "ayref": "y",
            "text": "", "showarrow": True, "arrowhead": 2, "arrowwidth": 2, "arrowcolor": TOUCHED}


def _thinned(labels: dict[int, str]) -> dict[float, str]:
    """At most some 16 of them, evenly spaced."""
    every = -(-len(labels) // 16)
    return {line: text for line, text in labels.items() if line % every == 0}
