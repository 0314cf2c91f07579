"""Checks of chapter 05: which blocks a chunk sends, and what is said to whom when a worker is lost."""

from __future__ import annotations

import random
from collections.abc import Callable

from nanopd import Cluster
from nanopd.core import PlanRow, Request, SamplingParams, Sequence
from nanopd.messages import Destination, FromWorker, Prefill, Reserve, Resume, Tokens, ToWorker, Written
from nanopd.workbook.check import exercise, say
from nanopd.workbook.streams import Ledger
from nanopd.workers.transfer import Transfer
from nanopd.workers.worker import Worker

# ------------------------------------------------------------------------------------ 05.4, the blocks of a chunk


def _sent_by_the_engine(num_sent: int, num_cached: int, num_new: int, block_size: int) -> list[int]:
    """Places in the block table that Transfer sends of this chunk, where the blocks' numbers are their places."""
    table = list(range(-(-max(num_sent, num_cached + num_new) // block_size)))
    ledger = Ledger()
    transfer = Transfer(ledger, Destination("D0", 0, table, num_sent), block_size, num_layers=1)
    tokens = range(num_cached + num_new)
    transfer.send_layer(PlanRow(Sequence(tokens), Request("", list(tokens)), num_new, num_cached, table), 0)
    return [block for _, blocks in ledger.sends for block in blocks]


@exercise("05.4", hint_en="The chunk ends at token num_cached + num_new. From the block that holds token num_sent up to "
                          "the block that holds the chunk's last token; nothing if num_sent is past the chunk's end.",
          hint_zh="分块到第 num_cached + num_new 个 token 为止。从第 num_sent 个 token 所在的块开始，发到分块最后一个 token 所在的块；"
                  "如果 num_sent 已经不在分块的末尾之前，就什么也不发。")
def check_blocks_equal_the_transfers(theirs: Callable[[int, int, int, int], range]) -> None:
    rng = random.Random(54)
    cases = [(0, 0, 40, 16), (40, 40, 40, 16), (80, 80, 20, 16), (0, 0, 32, 16), (32, 32, 1, 16), (96, 0, 40, 16),
             (96, 64, 32, 16), (40, 0, 40, 16), (40, 32, 4, 16)]  # the last two: preempted, and reading the prompt again
    for _ in range(200):
        size, num_cached = rng.choice([1, 4, 16]), rng.randint(0, 60)
        there = rng.choice([num_cached, num_cached // size * size, rng.randint(0, 8) * size])
        cases.append((there, num_cached, rng.randint(1, 60), size))
    for num_sent, num_cached, num_new, block_size in cases:
        expected = _sent_by_the_engine(num_sent, num_cached, num_new, block_size)
        got = list(theirs(num_sent, num_cached, num_new, block_size))
        assert got == expected, say(
            f"{num_sent} tokens sent, a chunk of {num_new} after {num_cached}, blocks of {block_size}: "
            f"the engine sends {expected}, you {got}",
            f"已发 {num_sent} 个 token，分块在 {num_cached} 个之后又算了 {num_new} 个，块大小 {block_size}：引擎发的是 {expected}，"
            f"你发的是 {got}")


# ----------------------------------------------------------------------------------------- 05.7, a worker is lost


def _tell(worker: Worker, *messages: ToWorker) -> list[FromWorker]:
    """One step. What the worker has to say."""
    worker.inbox.extend(messages)
    worker.step()
    said = list(worker.outbox)
    worker.outbox.clear()
    return said


def _serve(p0: Worker, d0: Worker, request: Request) -> Written:
    """The whole answer, by a prefill worker and a decode worker that live."""
    [granted] = _tell(d0, Reserve(request))
    said = _tell(p0, Prefill(request, granted.destination))
    while not said:
        said = _tell(p0)
    prefilled = said[-1]
    said += _tell(d0, Resume(request.request_id, prefilled.destination.lease_id, prefilled.written))
    while d0.has_work:
        said += _tell(d0)
    events = [event for message in said if isinstance(message, Tokens) for event in message.events]
    return Written(0, [event.token_id for event in events], [event.logprob for event in events])


def _cases() -> list[Request]:
    """A prompt of one chunk and one of several; a greedy answer and a sampled one."""
    greedy = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    sampled = SamplingParams(temperature=1.0, max_tokens=20, ignore_eos=True)
    return [Request("short", list(range(300, 350)), greedy), Request("long", list(range(200, 400)), sampled, seed=7)]


@exercise("05.7", hint_en="Reserve at d1, Prefill at p0 with the destination granted, and step p0 until it says "
                          "Prefilled. What p0 draws is known already. Then Resume at d1 with what is written, and collect its Tokens.",
          hint_zh="向 d1 发 Reserve；带着批下来的目的地向 p0 发 Prefill，一步步推到它说 Prefilled。p0 抽出来的那个 token 客户端早就有了。"
                  "然后带着已经写好的部分向 d1 发 Resume，把它的 Tokens 收集起来。")
def check_the_client_sees_no_gap_and_no_repeat(theirs: Callable[..., list[int]]) -> None:
    with Cluster("tiny", "P:cpu D:cpu D:cpu", "disaggregated", dtype="float32", max_num_batched_tokens=64) as cluster:
        p0, d0, d1 = cluster.workers.values()
        for request in _cases():
            whole = _serve(p0, d0, request)
            for seen in (1, 9):
                written = Written(0, whole.token_ids[:seen], whole.logprobs[:seen])
                got = theirs(_tell, p0, d1, request, written)
                rest = whole.token_ids[seen:]
                assert got == rest, say(
                    f"the client has seen {seen} tokens and lacks {rest}; you give it {got}",
                    f"客户端看过 {seen} 个 token，还差 {rest}；你给它的是 {got}")
                assert not (p0.transfers or p0.engine.has_work or d1.manager.leases or d1.engine.has_work), say(
                    "the answer is right, but something is left on the workers: a transfer, a lease or a request",
                    "回答没错，可 Worker 上还留着东西：传输、租约，或者请求")
