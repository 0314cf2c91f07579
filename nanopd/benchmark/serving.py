"""The engine as a whole: what a step takes in steady decode, for one prompt, and with many requests at once."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from itertools import count
from typing import Any

import torch

from nanopd.benchmark import ceilings, floors
from nanopd.benchmark.show import progress
from nanopd.core import Request, SamplingParams, StepRecord, TokenEvent
from nanopd.engine.engine import Engine
from nanopd.llm import LLM
from nanopd.models.resolve import resolve_model

DECODES = ((1, 512), (16, 1024), (32, 1024), (64, 1024), (256, 1024))  # sequences, context
SMALL_MODEL, SMALL_DECODES = "qwen3-0.6b", ((1, 512),)
PROMPTS = (64, 512, 2048, 8000)
SHORT, LONG = (64, 256), (1024, 2048)  # prompt lengths
SETS = ((48, *SHORT), (48, *LONG), (256, *SHORT), (256, *LONG))  # requests, shortest and longest prompt
OPTIONS = dict(load_format="dummy", max_num_seqs=256, max_num_batched_tokens=8192, max_model_len=8192,
               enable_prefix_caching=False)
WARM_UP = 10

_request_numbers = count()


def open_model(model: str) -> tuple[LLM, dict[str, Any]]:
    """An engine with random weights, and how long it took to start: until it was built, and until the first answer."""
    progress(f"{model}: weights, cache, graphs")
    start = time.perf_counter()
    llm = LLM(model, device="cuda", dtype="bfloat16", **OPTIONS)
    built = time.perf_counter()
    finish(llm.engine, [request(llm.engine, 64, max_tokens=4)])
    return llm, {"startup_s": built - start, "first_answer_s": time.perf_counter() - built}


# ---------------------------------------------------------------------------------------------------- decode


def decode_rows(llm: LLM, model: str, cells: Iterable[tuple[int, int]], read_gb_s: float,
                steps: int = 50) -> Iterator[dict[str, Any]]:
    """Milliseconds a step in steady decode, beside the floor for the contexts that those steps really had."""
    for batch, context in cells:
        progress(f"{model}: decode {batch} x {context}")
        run = steady_decode(llm.engine, batch, context, steps)
        rate = ceilings.matmul_tflop_s()
        floor = floors.decode_floor_ms(llm.spec, batch, run.context, read_gb_s, rate)
        yield {"model": model, "batch": batch, "context": context, "mean_context": run.context, "ms": run.step_ms,
               **floor, "over_floor": run.step_ms / floor["floor_ms"], "matmul_tflop_s": rate,
               "gpu_idle_share": run.idle_share, "scheduling_us": run.scheduling_us, "tokens_s": batch / run.step_ms * 1e3}


@dataclass
class SteadyDecode:
    """What was seen over some steps in a row. `context` is their mean."""

    context: int
    step_ms: float
    scheduling_us: float
    idle_share: float | None  # of the GPU; None where no graphs ran


def steady_decode(engine: Engine, batch: int, context: int, steps: int) -> SteadyDecode:
    """Let `batch` sequences reach `context` tokens, about half of the measured steps before and half after."""
    before = max(1, context - WARM_UP - steps // 2)
    prefill_steps = -(-batch * before // engine.scheduler.config.max_num_batched_tokens) + 2
    requests = [request(engine, before, max_tokens=WARM_UP + steps + 2 * prefill_steps + 8) for _ in range(batch)]
    for each in requests:
        engine.add(each)
    try:
        while not (engine.history and _all_decode(engine.history[-1], batch)):
            _step(engine)
        for _ in range(WARM_UP):
            _step(engine)
        with _scheduling_time(engine) as scheduling, _graph_times() as graphs:
            start = time.perf_counter()
            for _ in range(steps):
                _step(engine)
            seconds = time.perf_counter() - start
        records = list(engine.history)[-steps:]
    finally:
        for each in requests:
            engine.cancel(each.request_id)
        while engine.has_work:
            engine.step()
    if not all(_all_decode(record, batch) for record in records):
        raise RuntimeError(f"the {steps} steps were not all decodes of {batch} sequences")
    contexts = [row.num_cached + row.num_new for record in records for row in record.rows]
    return SteadyDecode(round(statistics.mean(contexts)), seconds / steps * 1e3, sum(scheduling) / steps * 1e6,
                        graphs.idle_share())


def _all_decode(record: StepRecord, batch: int) -> bool:
    return len(record.rows) == batch and all(row.kind == "decode" for row in record.rows)


@contextmanager
def _scheduling_time(engine: Engine) -> Iterator[list[float]]:
    """Seconds of each call of the scheduler that plans a step or takes its result in."""
    scheduler, seconds, nested = engine.scheduler, [], []

    def timed(method: Callable) -> Callable:
        @wraps(method)
        def call(*args: Any) -> Any:
            nested.append(method)
            start = time.perf_counter()
            try:
                return method(*args)
            finally:
                nested.pop()
                if not nested:  # planning ahead calls planning: count it once
                    seconds.append(time.perf_counter() - start)
        return call

    names = ("schedule", "schedule_ahead", "commit")
    for name in names:
        setattr(scheduler, name, timed(getattr(scheduler, name)))
    try:
        yield seconds
    finally:
        for name in names:
            delattr(scheduler, name)


@dataclass
class GraphTimes:
    """When the GPU entered and left each CUDA graph."""

    events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    def idle_share(self) -> float | None:
        """The share of the time from the first graph's begin to the last one's begin in which none ran."""
        if len(self.events) < 2:
            return None
        torch.cuda.synchronize()
        span = self.events[0][0].elapsed_time(self.events[-1][0])
        busy = sum(start.elapsed_time(end) for start, end in self.events[:-1])
        return max(0.0, 1 - busy / span)


@contextmanager
def _graph_times() -> Iterator[GraphTimes]:
    times = GraphTimes()
    replay = torch.cuda.CUDAGraph.replay

    def timed(graph: torch.cuda.CUDAGraph) -> None:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        replay(graph)
        end.record()
        times.events.append((start, end))

    torch.cuda.CUDAGraph.replay = timed
    try:
        yield times
    finally:
        torch.cuda.CUDAGraph.replay = replay


# --------------------------------------------------------------------------------------------------- prefill


def prefill_rows(llm: LLM, model: str, lengths: Iterable[int] = PROMPTS, repeats: int = 5) -> Iterator[dict[str, Any]]:
    """Milliseconds from a prompt's arrival to its first token, alone in the engine, and the rate that makes."""
    for length in lengths:
        progress(f"{model}: a prompt of {length}")
        prompt_ms(llm.engine, length)
        ms, rate = ceilings.beside_matmul(
            lambda length=length: statistics.median(prompt_ms(llm.engine, length) for _ in range(repeats)))
        tflop_s = floors.prefill_flops(llm.spec, length) / ms / 1e9
        yield {"model": model, "tokens": length, "ms": ms, "tflop_s": tflop_s, "matmul_tflop_s": rate,
               "share": tflop_s / rate}


def prompt_ms(engine: Engine, length: int) -> float:
    prompt = request(engine, length, max_tokens=1)
    start = time.perf_counter()
    finish(engine, [prompt])
    return (time.perf_counter() - start) * 1e3


# ----------------------------------------------------------------------------------------------------- serve


def serve_rows(llm: LLM, model: str, sets: Iterable[tuple[int, int, int]] = SETS, output: int = 128) -> Iterator[dict[str, Any]]:
    """Requests that arrive all at once, with prompts of random length: tokens written a second, in all."""
    for requests, shortest, longest in sets:
        progress(f"{model}: {requests} requests of {shortest} to {longest}")
        arriving = [request(llm.engine, length, output) for length in prompt_lengths(requests, shortest, longest)]
        start = time.perf_counter()
        written = finish(llm.engine, arriving)
        seconds = time.perf_counter() - start
        if written != requests * output:
            raise RuntimeError(f"{written} tokens were written instead of {requests * output}")
        yield {"model": model, "requests": requests, "prompt_from": shortest, "prompt_to": longest, "output": output,
               "engine": "nanopd", "s": seconds, "tokens_s": written / seconds}


def prompt_lengths(requests: int, shortest: int, longest: int) -> list[int]:
    """The same for every engine that is compared."""
    draw = random.Random(0)
    return [draw.randint(shortest, longest) for _ in range(requests)]


def transformers_rows(model: str, sets: Iterable[tuple[int, int, int]] = SETS, output: int = 128) -> Iterator[dict[str, Any]]:
    """The same requests through transformers' own continuous batching, its start included."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    config = AutoConfig.from_pretrained(resolve_model(model))
    with torch.device("cuda"):
        peer = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="paged|sdpa").eval()
    generation = GenerationConfig(max_new_tokens=output, do_sample=False, eos_token_id=-1, pad_token_id=0)
    for requests, shortest, longest in sets:
        progress(f"transformers: {requests} requests of {shortest} to {longest}")
        prompts = [random_prompt(length, config.vocab_size, i)
                   for i, length in enumerate(prompt_lengths(requests, shortest, longest))]
        start = time.perf_counter()
        answers = peer.generate_batch(prompts, generation_config=generation)
        seconds = time.perf_counter() - start
        written = sum(len(answer.generated_tokens) for answer in answers.values())
        yield {"model": model, "requests": requests, "prompt_from": shortest, "prompt_to": longest, "output": output,
               "engine": "transformers", "s": seconds, "tokens_s": written / seconds}


# ----------------------------------------------------------------------------------------------------- parts


def request(engine: Engine, length: int, max_tokens: int) -> Request:
    number = next(_request_numbers)
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    return Request(f"bench-{number}", random_prompt(length, engine.limits.vocab_size, number), params)


def random_prompt(length: int, vocab_size: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(vocab_size), k=length)


def finish(engine: Engine, requests: list[Request]) -> int:
    """Hand the requests in and run until they have ended. Returns the tokens written."""
    for each in requests:
        engine.add(each)
    written, waiting = 0, {each.request_id for each in requests}
    while waiting:
        for event in _step(engine):
            written += event.token_id is not None
            if event.finish_reason is not None:
                waiting.discard(event.request_id)
    return written


def _step(engine: Engine) -> list[TokenEvent]:
    """A step that has to go well."""
    if not engine.has_work:
        raise RuntimeError("the engine has nothing to do, but requests are open")
    events = engine.step()
    for event in events:
        if event.error:
            raise RuntimeError(event.error)
    return events
