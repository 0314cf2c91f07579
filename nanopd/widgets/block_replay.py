"""The block manager's event log, played forwards and backwards, and put into words. No plotly in here.

`Replay` knows the books after any number of events. A `Move` is a run of events that belong together, such as
all the `share`s of one fork; `describe` says what a move did.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Set as SetABC
from dataclasses import dataclass, field

from nanopd.block_manager.manager import BlockSpaceManager
from nanopd.block_manager.pool import BlockEvent
from nanopd.widgets.strings import t


@dataclass
class PoolState:
    """The books at one moment.

    A block's hash is None if it can't be found, and "" if the log has lost it. `holders` counts those of each
    lease (request, writer). `loose` are references outside tables and leases: of a lease that is about to be
    logged or has just been closed, or of somebody who went to the pool directly.
    Tables without blocks are left out.
    """

    ref_counts: list[int]
    hashes: list[str | None]
    tables: dict[int, list[int]] = field(default_factory=dict)
    leases: dict[int, list[int]] = field(default_factory=dict)
    holders: dict[int, int] = field(default_factory=dict)
    loose: list[int] = field(default_factory=list)

    @classmethod
    def blank(cls, num_blocks: int) -> PoolState:
        return cls([0] * num_blocks, [None] * num_blocks)

    @classmethod
    def of(cls, manager: BlockSpaceManager) -> PoolState:
        """The books as they are now."""
        now = manager.snapshot()
        hashes = [None if block.hash is None else f"{block.hash:016x}" for block in manager.pool.blocks]
        return cls(
            now["ref_counts"], hashes, {seq_id: table for seq_id, table in now["tables"].items() if table},
            {lease_id: lease["block_ids"] for lease_id, lease in now["leases"].items()},
            {lease_id: len(lease["holders"]) for lease_id, lease in now["leases"].items()})

    def holders_of(self) -> dict[int, list[tuple[str, int]]]:
        """Who holds each block: ("sequence" or "lease", its id)."""
        found: dict[int, list[tuple[str, int]]] = defaultdict(list)
        for kind, lists in (("sequence", self.tables), ("lease", self.leases)):
            for holder_id, block_ids in lists.items():
                for block_id in block_ids:
                    found[block_id].append((kind, holder_id))
        return found

    def unexplained(self) -> list[int]:
        """Blocks whose reference count is not the number of tables and leases that hold them."""
        holders = self.holders_of()
        return [block for block, count in enumerate(self.ref_counts) if count != len(holders.get(block, ()))]


class Replay:
    """The state after any number of events of the log, which it walks in both directions.

    The log is bounded. Where its beginning is lost, its first state is worked out backwards from now.
    """

    def __init__(self, manager: BlockSpaceManager) -> None:
        self.events = list(manager.events)
        self.num_lost = self.events[0].step if self.events else 0
        if self.num_lost and self.events[0].kind == "release":  # of a lost `copy`, or not?
            del self.events[0]
            self.num_lost += 1
        self._lost_hashes = self._hashes_dropped()
        if self.events and not self.num_lost:
            self.state, self.position = PoolState.blank(manager.num_blocks), 0
        else:
            self.state, self.position = PoolState.of(manager), len(self.events)
            self.seek(0)

    def seek(self, position: int) -> PoolState:
        """The state after the first `position` events. It changes with the next call."""
        while self.position < position:
            self._apply(self.position)
            self.position += 1
        while self.position > position:
            self.position -= 1
            self._undo(self.position)
        return self.state

    def _hashes_dropped(self) -> dict[int, str]:
        """For each event that made a block unfindable, the hash it had."""
        known: dict[int | None, str] = {}
        dropped = {}
        for event in self.events:
            if event.kind == "cache":
                known[event.block] = event.detail.removeprefix("hash ")
            elif event.kind in ("evict", "forget"):
                dropped[event.step] = known.get(event.block, "")
        return dropped

    def _list_of(self, event: BlockEvent) -> list[int]:
        if event.seq_id is None:
            return self.state.loose
        return self.state.tables.setdefault(event.seq_id, [])

    def _apply(self, index: int) -> None:
        event, state = self.events[index], self.state
        match event.kind:
            case "allocate" | "share":
                state.ref_counts[event.block] += 1
                self._list_of(event).append(event.block)
            case "release" | "free" if event.block is not None:
                state.ref_counts[event.block] -= 1
                self._remove(event)
            case "release":
                state.holders[event.other] -= 1
                if not state.holders[event.other]:
                    del state.holders[event.other]
                    state.loose += state.leases.pop(event.other)
            case "copy":
                self._swap(event, event.block, event.other)
            case "lease":
                run = self._run_length(range(index - 1, -1, -1), {"allocate", "share"}, {"hit", "evict"})
                state.leases[event.other], state.holders[event.other] = self._take_loose(run), 2
            case "cache":
                state.hashes[event.block] = event.detail.removeprefix("hash ")
            case "evict" | "forget":
                state.hashes[event.block] = None

    def _undo(self, index: int) -> None:
        event, state = self.events[index], self.state
        match event.kind:
            case "allocate" | "share":
                state.ref_counts[event.block] -= 1
                self._remove(event)
            case "release" | "free" if event.block is not None:
                state.ref_counts[event.block] += 1
                if not self._ends_copy(index):
                    self._list_of(event).append(event.block)
            case "release":
                if event.other not in state.leases:  # this closed it: its blocks were let go right after
                    run = self._run_length(range(index + 1, len(self.events)), {"release", "free"})
                    state.leases[event.other], state.holders[event.other] = self._take_loose(run), 0
                state.holders[event.other] += 1
            case "copy":
                self._swap(event, event.other, event.block)
            case "lease":
                del state.holders[event.other]
                state.loose += state.leases.pop(event.other)
            case "cache":
                state.hashes[event.block] = None
            case "evict" | "forget":
                state.hashes[event.block] = self._lost_hashes[event.step]

    def _remove(self, event: BlockEvent) -> None:
        """Take the block off its holder's list, from the end. A copy's source has left the table already."""
        held = self._list_of(event)
        if event.block in held:
            del held[len(held) - 1 - held[::-1].index(event.block)]
        if not held and event.seq_id is not None:
            del self.state.tables[event.seq_id]

    def _swap(self, event: BlockEvent, old: int | None, new: int | None) -> None:
        """A copy waits at the end of the table from its `allocate` on, then takes the source's place."""
        table = self._list_of(event)
        place = table.index(old)
        if old == event.block:
            table.remove(new)
            table[place] = new
        else:
            table[place] = new
            table.append(old)

    def _ends_copy(self, index: int) -> bool:
        event, before = self.events[index], self.events[index - 1] if index else None
        return before is not None and before.kind == "copy" and before.block == event.block

    def _run_length(self, indices: range, counted: set[str],
                    passed: SetABC[str] = frozenset()) -> int:
        """How many events without a sequence, of the kinds `counted`, come in a row along `indices`."""
        length = 0
        for event in map(self.events.__getitem__, indices):
            if event.seq_id is not None or event.block is None or event.kind not in counted | passed:
                return length
            length += event.kind in counted
        return len(self.state.loose)  # up to an end of the log: what is beyond it may belong to the run

    def _take_loose(self, number: int) -> list[int]:
        start = max(0, len(self.state.loose) - number)
        taken = self.state.loose[start:]
        del self.state.loose[start:]
        return taken


# ------------------------------------------------------------------------------------------------ the moves

TAKES = frozenset({"hit", "share", "allocate", "evict"})
LETS_GO = frozenset({"release", "free"})


@dataclass(frozen=True)
class Move:
    """Events [start, end) of the log, which one call of the manager made. `kind` names its sentence."""

    start: int
    end: int
    kind: str


def moves_of(replay: Replay, cuts: SetABC[int] = frozenset()) -> list[Move]:
    """The log in moves. `cuts`: numbers of events which begin a new one whatever came before."""
    moves: list[Move] = []
    start, had_table = 0, False
    for index, event in enumerate(replay.events):
        if index > start and (event.step in cuts or not _continues(replay.events, start, index, had_table)):
            moves.append(Move(start, index, _kind_of(replay.events[start:index], had_table)))
            start = index
        if index == start:  # read before any of its events is applied
            had_table = _actor(replay.events, index) in replay.seek(index).tables
    if replay.events:
        moves.append(Move(start, len(replay.events), _kind_of(replay.events[start:], had_table)))
    return moves


def _actor(events: list[BlockEvent], index: int) -> int | None:
    """Whose event it is. An eviction makes room for the block that is handed out next."""
    event = events[index + 1] if events[index].kind == "evict" and index + 1 < len(events) else events[index]
    return event.seq_id


def _continues(events: list[BlockEvent], start: int, index: int, had_table: bool) -> bool:
    """Whether the event at `index` belongs to the move that began at `start`."""
    first, last, event = events[start], events[index - 1], events[index]
    same_actor = _actor(events, index) == _actor(events, start)
    if last.kind in ("evict", "copy"):
        return True
    if event.kind == "copy":
        return last.kind == "allocate" and last.block == event.other
    if event.kind in TAKES:
        return last.kind in TAKES and same_actor and not had_table
    if event.kind in ("fork", "lease", "adopt"):
        return last.kind in TAKES and same_actor
    if event.kind in LETS_GO and event.block is None:
        return last.kind == "adopt" and last.other == event.other
    if event.kind in LETS_GO:
        ends_copy = any(earlier.kind == "copy" for earlier in events[start:index])
        return last.kind in LETS_GO and last.seq_id == event.seq_id and not ends_copy
    return event.kind == last.kind == first.kind and event.kind in ("cache", "forget")


def _kind_of(events: list[BlockEvent], had_table: bool) -> str:
    kinds = {event.kind for event in events}
    for kind in ("copy", "fork", "lease", "adopt", "cache", "forget"):
        if kind in kinds:
            return kind
    if any(event.block is None for event in events):
        return "let_go"
    anonymous = events[-1].seq_id is None
    if kinds & LETS_GO:
        return "pool_release" if anonymous else "free"
    if anonymous:
        return "pool_take"
    return "grow" if had_table else "admit"


# ------------------------------------------------------------------------------------------------ the words


def describe(kind: str, events: list[BlockEvent], state: PoolState) -> str:
    """What a move did, in a sentence. `state` is the one it led to."""
    last = events[-1]
    blocks = [event.block for event in events if event.kind in ("allocate", "share")]
    freed = [event.block for event in events if event.kind == "free"]
    let_go = [event for event in events if event.kind in LETS_GO and event.block is not None]
    hits = sum(event.kind == "hit" for event in events)
    fields: dict[str, object] = {
        "seq": mover_of(events), "other": last.other,
        "block": list_blocks([event.block for event in events if event.block is not None]),
        "blocks": _count(len(blocks)), "fresh": _count(len(blocks) - hits), "hits": hits,
        "let_go": _count(len(let_go)),
        "freed": len(freed), "findable": sum(state.hashes[block] is not None for block in freed),
        "kept": len(let_go) - len(freed)}
    if kind == "copy":
        copy = next(event for event in events if event.kind == "copy")
        fields |= {"source": copy.block, "copy": copy.other}
        fields["refs"] = references(state.ref_counts[copy.block])
    if kind == "fork":
        counts = {state.ref_counts[block] for block in blocks}
        fields["refs"] = references(counts.pop()) if len(counts) == 1 else t("blockmap.one_more")
    if kind == "grow":
        fields["block"] = blocks[-1]
    if kind == "let_go":
        kind = "let_go_last" if last.other not in state.leases else "let_go_first"
        fields["other"] = events[0].other
    sentence = t(f"blockmap.did_{kind}", **fields)
    evicted = [event.block for event in events if event.kind == "evict"]
    return sentence + (t("blockmap.evicted", block=list_blocks(evicted)) if evicted else "")


def mover_of(events: list[BlockEvent]) -> int | None:
    """The sequence whose move it was."""
    return next((event.seq_id for event in events if event.seq_id is not None), None)


def _count(number: int) -> str:
    return t("blockmap.one_block" if number == 1 else "blockmap.many_blocks", n=number)


def references(number: int) -> str:
    return t("blockmap.one_reference" if number == 1 else "blockmap.many_references", n=number)


def list_blocks(blocks: list[int]) -> str:
    """ "3, 5-9": a run as its ends."""
    runs: list[list[int]] = []
    for block in sorted(set(blocks)):
        if runs and block == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], block]
        else:
            runs.append([block])
    shown = ["–".join(map(str, run)) for run in runs[:6]]
    return t("blockmap.separator").join(shown + ["…"] * (len(runs) > 6))
