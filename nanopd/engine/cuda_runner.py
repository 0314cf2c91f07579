"""The runner for a GPU: steps are queued and not waited for, and decode steps are replayed as CUDA graphs.

A step's launches take the CPU longer than a small step takes the GPU. So a step of decodes alone is recorded once for
each batch size, as a CUDA graph, and replayed with new inputs; and `launch` returns before the GPU is done, so that
the next step is planned and queued meanwhile. The one synchronisation of a step is the wait for its tokens.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from itertools import accumulate

import torch
from torch import Tensor

from nanopd.block_manager.cache import KVCache
from nanopd.core import PlanRow, StepPlan, StepResult
from nanopd.engine.engine import OnLayer
from nanopd.engine.runner import ModelRunner, drawing_tokens, positions, slots
from nanopd.engine.sampler import Draws, draw, draw_greedily, is_greedy
from nanopd.models.decoder import Decoder
from nanopd.paged_attention import cuda
from nanopd.paged_attention.host import pinned_bytes, upload
from nanopd.paged_attention.ops import AttentionBatch

LIBRARIES = ("cublas", "cublaslt")
STEPS_IN_FLIGHT = 3  # one runs, one waits behind it, one is being prepared


class CudaRunner(ModelRunner):
    """Runs plans on the model's GPU.

    Args:
        max_num_seqs: the most rows a plan may have.
        max_len: the most tokens a row may have in the cache.
        enforce_eager: no CUDA graphs.
    """

    def __init__(self, model: Decoder, cache: KVCache, eos_token_ids: tuple[int, ...] = (), *, max_num_seqs: int,
                 max_len: int, enforce_eager: bool = False) -> None:
        super().__init__(model, cache, eos_token_ids)
        self.device = cache.data.device
        self.tables = BlockTables(max_num_seqs, -(-max_len // cache.block_size), self.device)
        self.inputs = DecodeInputs(max_num_seqs, self.device)
        self.last_drawn = torch.zeros(max_num_seqs, dtype=torch.int64, device=self.device)
        self.graphs: dict[int, DecodeGraph] = {}
        if not enforce_eager and cuda.supports_attention(cache.layer(0)[0]):  # plain torch computes on the host too
            with torch.cuda.device(self.device):
                self._record_graphs(max_num_seqs)

    def execute(self, plan: StepPlan, on_layer: OnLayer | None = None) -> StepResult:
        return self.launch(plan, on_layer)()

    @torch.inference_mode()
    def launch(self, plan: StepPlan, on_layer: OnLayer | None = None) -> Callable[[], StepResult]:
        """Queue a step. The function returned waits for it and gives its result; `duration` is the GPU's time."""
        with torch.cuda.device(self.device):  # events and streams are otherwise the current one's
            return self._launch(plan, on_layer)

    def _launch(self, plan: StepPlan, on_layer: OnLayer | None) -> Callable[[], StepResult]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self.cache.copy_blocks(plan.copies)
        self.tables.update(plan)
        graph = None if on_layer else self._graph_for(plan)
        draws = self._run_eagerly(plan, on_layer) if graph is None else self._replay(graph, plan)
        draws = draws.to_host()
        end.record()

        def wait() -> StepResult:
            end.synchronize()
            return StepResult(draws.collect(plan.rows), start.elapsed_time(end) / 1000)

        return wait

    def _run_eagerly(self, plan: StepPlan, on_layer: OnLayer | None) -> Draws:
        query_lens = [row.num_new for row in plan.rows]
        context_lens = [row.num_cached + row.num_new for row in plan.rows]
        starts = [0, *accumulate(query_lens)]
        batch = AttentionBatch(
            upload(slots(plan, self.cache.block_size), self.device), self.tables.rows(len(plan.rows)), query_lens, context_lens,
            contexts=upload(context_lens, self.device, torch.int32), starts=upload(starts, self.device, torch.int32))
        token_ids = upload([token for row in plan.rows for token in row.token_ids], self.device)
        hidden = self.model(token_ids, upload(positions(plan), self.device), self.cache, batch, on_layer, self.last_drawn)
        drawing = drawing_tokens(plan)
        if not drawing:
            return Draws.in_buffer(torch.empty(0, dtype=torch.uint8, device=self.device))
        draws = draw(self.model.logits(hidden[upload(drawing, self.device)]), plan.rows, self.eos_token_ids)
        self.last_drawn[: len(draws.token_ids)] = draws.token_ids[: len(self.last_drawn)]
        return draws

    # ------------------------------------------------------------------------------------------------- graphs

    def _record_graphs(self, max_num_seqs: int) -> None:
        """Largest first: the smaller ones find room in the memory of those before them.

        Which of the GPU's matrix libraries is quicker depends on the size, so both are tried.
        """
        pool = torch.cuda.graph_pool_handle()
        for size in reversed(batch_sizes(max_num_seqs)):
            tried = [DecodeGraph.record(partial(self._decode, size), library, pool) for library in LIBRARIES]
            self.graphs[size] = min(tried, key=DecodeGraph.measure)
        self._sizes = sorted(self.graphs)

    def _graph_for(self, plan: StepPlan) -> DecodeGraph | None:
        """The smallest graph that holds the plan's rows, if they all decode."""
        if not self.graphs or any(row.num_new != 1 or row.num_samples != 1 for row in plan.rows):
            return None
        return self.graphs[self._sizes[bisect_left(self._sizes, len(plan.rows))]]

    def _replay(self, graph: DecodeGraph, plan: StepPlan) -> Draws:
        self.inputs.fill(plan.rows, slots(plan, self.cache.block_size), graph.size)
        graph.graph.replay()
        if is_greedy(plan.rows):
            return graph.draws.first(len(plan.rows))
        draws = draw(graph.logits[: len(plan.rows)], plan.rows, self.eos_token_ids)
        self.last_drawn[: len(plan.rows)] = draws.token_ids
        return draws

    def _decode(self, size: int) -> tuple[Tensor, Draws]:
        """What a graph holds: a step of `size` decodes, from the inputs' buffers to the likeliest tokens."""
        inputs = self.inputs
        batch = AttentionBatch(inputs.slots[:size], self.tables.rows(size), [1] * size, [1] * size,
                               contexts=inputs.contexts[:size])
        hidden = self.model(inputs.token_ids[:size], inputs.positions[:size], self.cache, batch, last_drawn=self.last_drawn)
        logits = self.model.logits(hidden)
        draws = draw_greedily(logits)
        self.last_drawn[:size] = draws.token_ids
        return logits, draws


def batch_sizes(max_num_seqs: int) -> list[int]:
    """Those that graphs are recorded for: close enough that rows of padding cost little."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max_num_seqs, 64)]
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


@dataclass
class DecodeGraph:
    """A recorded decode step. A replay reads the runner's input buffers and overwrites `logits` and `draws`."""

    graph: torch.cuda.CUDAGraph
    library: str  # for the matrix products that have no kernel of ours
    logits: Tensor
    draws: Draws

    @classmethod
    def record(cls, step: Callable[[], tuple[Tensor, Draws]], library: str, pool: tuple[int, int]) -> DecodeGraph:
        before = torch.backends.cuda.preferred_blas_library()
        torch.backends.cuda.preferred_blas_library(library)
        try:
            with torch.inference_mode():
                step()  # libraries choose and allocate at their first call, which a recording must not contain
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool, stream=_recording_stream(torch.cuda.current_device())):
                    logits, draws = step()
        finally:
            torch.backends.cuda.preferred_blas_library(before)
        return cls(graph, library, logits, draws)

    def measure(self, replays: int = 4) -> float:
        """Milliseconds of a replay on inputs as recorded: rows of padding, which read all weights and no context."""
        self.graph.replay()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(replays):
            self.graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / replays

    @property
    def size(self) -> int:
        return len(self.logits)


@cache
def _recording_stream(device: int) -> torch.cuda.Stream:
    """For all graphs of a GPU, which share memory for it. torch would take one that belongs to the first GPU it met."""
    return torch.cuda.Stream(device)


class DecodeInputs:
    """A decode step's inputs: buffers on the GPU at fixed addresses, filled in one copy.

    token_ids, positions, slots int64 [n]; contexts int32 [n]. What is written on the host must stay until the GPU has
    copied it, so steps take turns with a few buffers there.
    """

    def __init__(self, n: int, device: torch.device) -> None:
        self._n = n
        self._on_gpu = torch.zeros(28 * n, dtype=torch.uint8, device=device)
        self.token_ids, self.positions, self.slots, self.contexts = self._views(self._on_gpu)
        self.slots.fill_(-1)  # as recorded: nothing is stored and nothing is read
        self._turns = [_Turn(pinned_bytes(28 * n)) for _ in range(STEPS_IN_FLIGHT)]

    def fill(self, rows: list[PlanRow], slots: list[int], size: int) -> None:
        """Set the inputs to a plan's decodes, and up to `size` to rows of padding."""
        turn = self._turns[0]
        self._turns.append(self._turns.pop(0))
        turn.copied.synchronize()
        token_ids, positions, slot_mapping, contexts = (view.numpy() for view in self._views(turn.buffer))
        n = len(rows)
        token_ids[:n] = [row.sequence.token_ids[row.num_cached] for row in rows]
        positions[:n] = [row.num_cached for row in rows]
        slot_mapping[:n] = slots
        contexts[:n] = positions[:n] + 1
        token_ids[n:size] = positions[n:size] = contexts[n:size] = 0
        slot_mapping[n:size] = -1
        self._on_gpu.copy_(turn.buffer, non_blocking=True)
        turn.copied.record()

    def _views(self, buffer: Tensor) -> list[Tensor]:
        """token_ids, positions, slots, contexts."""
        n = self._n
        longs = buffer[: 24 * n].view(torch.int64)
        return [longs[:n], longs[n : 2 * n], longs[2 * n :], buffer[24 * n :].view(torch.int32)]


class _Turn:
    """A buffer on the host, and when the GPU is done with it."""

    def __init__(self, buffer: Tensor) -> None:
        self.buffer = buffer
        self.copied = torch.cuda.Event()


class BlockTables:
    """The block tables of a step's rows on the GPU, int32 [rows, width]. Only what has changed is sent there."""

    def __init__(self, max_rows: int, width: int, device: torch.device) -> None:
        self._data = torch.zeros(max_rows, width, dtype=torch.int32, device=device)
        self._known: list[_KnownRow | None] = [None] * max_rows
        self._row_of: dict[int, int] = {}  # by sequence: each is known in one row at most

    def rows(self, count: int) -> Tensor:
        return self._data[:count]

    def update(self, plan: StepPlan) -> None:
        if plan.preempted:  # who comes back has other blocks
            self._known = [None] * len(self._known)
            self._row_of.clear()
        width = self._data.shape[1]
        places: list[int] = []
        blocks: list[int] = []
        for number, row in enumerate(plan.rows):
            known = self._known[number]
            if known is None or known.seq_id != row.sequence.seq_id:
                self._move_in(number, row.sequence.seq_id)
                known = None
            start = known.num_blocks if known is not None and known.continues_in(row) else 0
            count = len(row.block_table)
            if start < count:
                places += range(number * width + start, number * width + count)
                blocks += row.block_table[start:]
            self._known[number] = _KnownRow(row.sequence.seq_id, row.num_cached + row.num_new, count)
        if places:
            device = self._data.device
            self._data.view(-1).index_copy_(0, upload(places, device), upload(blocks, device, torch.int32))


    def _move_in(self, number: int, seq_id: int) -> None:
        """The row is another sequence's now. Where that was before, it may leave with other blocks than it comes back with."""
        resident, last_row = self._known[number], self._row_of.get(seq_id)
        if resident is not None:
            self._row_of.pop(resident.seq_id, None)
        if last_row is not None:
            self._known[last_row] = None
        self._row_of[seq_id] = number


@dataclass(frozen=True)
class _KnownRow:
    """What a row of the tables holds on the GPU."""

    seq_id: int
    num_tokens: int
    num_blocks: int

    def continues_in(self, row: PlanRow) -> bool:
        """Whether the row is the same sequence a step later, with no block replaced."""
        return row.sequence.seq_id == self.seq_id and row.num_cached == self.num_tokens and not row.copies
