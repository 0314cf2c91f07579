"""The sampler against transformers' filters and an inverse CDF written out plainly."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from nanopd import BeamSearchParams, FinishReason, SamplingParams
from nanopd.core import PlanRow, Request, Sequence
from nanopd.engine import sampler
from nanopd.engine.sampler import sample, uniform

VOCAB = 60


def make_row(params: SamplingParams, seed: int = 0, prompt: list[int] = (1, 2, 3), output: list[int] = (), index: int = 0,
             num_samples: int | None = None, num_top: int = 0, beam: BeamSearchParams | None = None) -> PlanRow:
    sequence = Sequence(prompt, index=index)
    for token in output:
        sequence.append_token(token)
    request = Request("r", list(prompt), params, beam=beam, seed=seed)
    num_samples = (1 if output else params.n) if num_samples is None else num_samples
    return PlanRow(sequence, request, 1, len(sequence) - 1, [0], num_samples=num_samples, num_top=num_top)


def random_logits(rows: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))


def draw(logits: torch.Tensor, rows: list[PlanRow], eos: frozenset[int] = frozenset()) -> list[list[int]]:
    results = sample(logits, rows, eos)
    assert all(result.error is None for result in results)
    return [result.token_ids for result in results]


# ------------------------------------------------------------------------------------- the distribution

FILTERS = [
    dict(), dict(temperature=0.5), dict(temperature=2.0), dict(top_k=1), dict(top_k=5), dict(top_k=VOCAB), dict(top_k=10_000),
    dict(top_p=1e-6), dict(top_p=0.3), dict(top_p=0.9), dict(min_p=0.02), dict(min_p=0.3), dict(min_p=1.0),
    dict(repetition_penalty=1.5), dict(repetition_penalty=0.5),
    dict(temperature=1.7, top_k=12, top_p=0.8), dict(temperature=0.8, top_p=0.95, min_p=0.05),
    dict(temperature=1.3, top_k=20, top_p=0.9, min_p=0.02, repetition_penalty=1.2),
]


def reference_probs(logits: torch.Tensor, params: SamplingParams, seen: list[list[int]]) -> torch.Tensor:
    """transformers' processors and warpers, in the order in which its generate() puts them."""
    filters = LogitsProcessorList()
    if params.repetition_penalty != 1:
        filters.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    filters.append(TemperatureLogitsWarper(float(params.temperature)))
    if params.top_k:
        filters.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        filters.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        filters.append(MinPLogitsWarper(params.min_p))
    return filters(torch.tensor(seen), logits.clone()).double().softmax(-1)


def invert(probs: torch.Tensor, point: float) -> tuple[int, float]:
    """The token at `point` of the distribution, likeliest first, and how far the point is from a boundary."""
    total = 0.0
    for token in sorted(range(len(probs)), key=lambda token: (-probs[token].item(), token)):
        below, total = total, total + probs[token].item()
        if point < total:
            return token, min(point - below if below else 1.0, total - point)
    return token, 0.0


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_draws_are_transformers_distribution_inverted(options):
    """So the support is the same, and every token's share of [0, 1) is its probability."""
    params = SamplingParams(**options)
    logits = random_logits(200)
    prompts = [[i % VOCAB, (7 * i) % VOCAB, 3] for i in range(200)]
    outputs = [[(11 * i) % VOCAB] * (i % 3) for i in range(200)]
    rows = [make_row(params, seed=i, prompt=prompt, output=output, index=i % 5)
            for i, (prompt, output) in enumerate(zip(prompts, outputs, strict=True))]
    got = draw(logits, rows)
    sure = 0
    for i, row in enumerate(rows):
        probs = reference_probs(logits[i : i + 1], params, [row.sequence.token_ids])[0]
        expected, distance = invert(probs, uniform(i, i % 5, len(outputs[i])))
        assert probs[got[i][0]] > 0
        if distance > 1e-5:
            assert got[i] == [expected]
            sure += 1
    assert sure > 190


@pytest.mark.parametrize("options", [dict(), dict(temperature=1.5, top_k=8), dict(top_p=0.8), dict(min_p=0.1)], ids=str)
def test_frequencies(options):
    """Over many seeds, answers and positions: a chi-square test against the probabilities."""
    params = SamplingParams(**options, n=4)
    logits = random_logits(1, seed=5, scale=1.5)
    rows = [make_row(params, seed=seed) for seed in range(3000)]
    tokens = torch.tensor(draw(logits.expand(3000, -1), rows)).flatten()
    probs = reference_probs(logits, params, [[1]])[0]
    counts = torch.bincount(tokens, minlength=VOCAB)
    assert counts[probs == 0].sum() == 0
    expected = probs[probs > 0] * 12_000
    assert scipy.stats.chisquare(counts[probs > 0].double(), expected).pvalue > 1e-3


def test_every_row_follows_its_own_params():
    options = [SamplingParams(**o) for o in FILTERS] + [SamplingParams(temperature=0), SamplingParams(n=3)]
    logits = random_logits(len(options))
    rows = [make_row(params, seed=i) for i, params in enumerate(options)]
    together = draw(logits, rows)
    assert together == [draw(logits[i : i + 1], [row])[0] for i, row in enumerate(rows)]
    assert together == draw(logits.flip(0), rows[::-1])[::-1]


@pytest.mark.parametrize("point", [0.0, 1 - 2**-53])
@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_the_ends_of_the_unit_interval_stay_within_the_support(options, point, monkeypatch):
    """A uniform number just below 1 is 1 in float32; it must not draw what a filter has cut off."""
    monkeypatch.setattr(sampler, "uniform", lambda *_: point)
    params = SamplingParams(**options, min_tokens=1)
    logits = random_logits(50)
    masked = logits.clone()
    masked[:, 4] = -torch.inf  # EOS, which min_tokens forbids
    rows = [make_row(params) for _ in range(50)]
    for i, (token,) in enumerate(draw(logits, rows, frozenset({4}))):
        probs = reference_probs(masked[i : i + 1], params, [[1, 2, 3]])[0]
        assert probs[token] > 0
        assert point > 0 or token == probs.argmax()


# ------------------------------------------------------------------------------------- extremes


def test_greedy_takes_the_first_of_equals():
    logits = torch.zeros(2, VOCAB)
    logits[0, [9, 30]] = 2.0
    assert draw(logits, [make_row(SamplingParams(temperature=0))] * 2) == [[9], [0]]


def test_greedy_ignores_seed_and_filters():
    logits = random_logits(1)
    tokens = {draw(logits, [make_row(SamplingParams(temperature=0, top_k=3, top_p=0.5, min_p=0.1), seed=seed)])[0][0]
              for seed in range(20)}
    assert tokens == {logits.argmax().item()}


@pytest.mark.parametrize("temperature", [1e-4, 1e-20, 1e-40, 1e-100])
def test_next_to_no_temperature_is_greedy(temperature):
    logits = random_logits(50)
    logits[:, 7] = 0.0  # 0 / 0 is no number
    rows = [make_row(SamplingParams(temperature=temperature), seed=i) for i in range(50)]
    assert draw(logits, rows) == logits.argmax(-1, keepdim=True).tolist()


@pytest.mark.parametrize("temperature", [1e6, 1e30, 1e300])
def test_endless_temperature_is_uniform(temperature):
    logits = random_logits(1).expand(3000, -1)
    rows = [make_row(SamplingParams(temperature=temperature), seed=i) for i in range(3000)]
    counts = torch.bincount(torch.tensor(draw(logits, rows)).flatten(), minlength=VOCAB)
    assert scipy.stats.chisquare(counts).pvalue > 1e-3


def test_logits_are_left_as_they_were():
    logits = random_logits(2)
    before = logits.clone()
    draw(logits, [make_row(SamplingParams(repetition_penalty=2.0, min_tokens=1))] * 2, frozenset({5}))
    assert torch.equal(logits, before)


def test_no_rows():
    assert sample(torch.zeros(0, VOCAB), [], frozenset()) == []


# ------------------------------------------------------------------------------------- seeds


def test_uniform_is_uniform():
    for numbers in (
        [uniform(seed, 0, 0) for seed in range(20_000)],
        [uniform(3, index, 5) for index in range(20_000)],
        [uniform(3, 0, position) for position in range(20_000)],
        [uniform(2**64 - seed, seed % 7, seed % 11) for seed in range(20_000)],
    ):
        assert all(0 <= number < 1 for number in numbers)
        assert scipy.stats.kstest(numbers, "uniform").pvalue > 1e-3
        pairs = [int(10 * a) * 10 + int(10 * b) for a, b in zip(numbers, numbers[1:])]
        assert scipy.stats.chisquare([pairs.count(cell) for cell in range(100)]).pvalue > 1e-4  # nor do neighbours agree


def test_uniform_tells_its_arguments_apart():
    numbers = {uniform(seed, index, position) for seed in range(20) for index in range(20) for position in range(20)}
    assert len(numbers) == 20**3


@pytest.mark.parametrize("seed", [-1, 0, 2**64 - 1, 2**70, -(2**70)])
def test_any_integer_is_a_seed(seed):
    assert 0 <= uniform(seed, 0, 0) < 1
    assert uniform(seed, 0, 0) != uniform(seed + 1, 0, 0)
    assert uniform(seed, 0, 0) == uniform(seed, 0, 0)


def test_seeds_answers_and_positions_give_different_draws():
    logits = torch.zeros(1, VOCAB).expand(40, -1)
    params = SamplingParams()
    by_seed = draw(logits, [make_row(params, seed=i) for i in range(40)])
    by_answer = draw(logits, [make_row(params, index=i, output=[1]) for i in range(40)])
    by_position = draw(logits, [make_row(params, output=[1] * (i + 1)) for i in range(40)])
    for tokens in (by_seed, by_answer, by_position):
        assert len({token for (token,) in tokens}) > 15


def test_first_draws_of_n_answers_are_those_of_each():
    logits = random_logits(1)
    params = SamplingParams(n=5)
    (together,) = draw(logits, [make_row(params, seed=9)])
    apart = [draw(logits, [make_row(params, seed=9, index=i, num_samples=1)])[0][0] for i in range(5)]
    assert together == apart and len(set(together)) > 1


# ------------------------------------------------------------------------------------- logprobs, min_tokens


def test_logprobs_are_the_models_own():
    """Before temperature, penalties and filters."""
    logits = random_logits(2)
    params = SamplingParams(temperature=0.3, top_k=3, repetition_penalty=1.5, n=2, min_tokens=1)
    rows = [make_row(params, seed=1, num_top=4), make_row(SamplingParams(temperature=0), num_top=1000)]
    results = sample(logits, rows, frozenset({0}))
    expected = logits.log_softmax(-1)
    for row, result in enumerate(results):
        assert result.logprobs == pytest.approx(expected[row, result.token_ids].tolist(), abs=1e-6)
        best = expected[row].topk(min(rows[row].num_top, VOCAB))
        assert [token for token, _ in result.top_logprobs] == best.indices.tolist()
        assert [value for _, value in result.top_logprobs] == pytest.approx(best.values.tolist(), abs=1e-6)
    assert sample(logits, [make_row(params)] * 2, frozenset())[0].top_logprobs == []


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_end_before_min_tokens(temperature):
    logits = random_logits(1)
    logits[0, [3, 8]] = 50.0  # an EOS and a stop token that want to come
    params = SamplingParams(temperature=temperature, min_tokens=2, stop_token_ids=[8])
    for num_output in range(4):
        (token,) = draw(logits, [make_row(params, output=[1] * num_output)], frozenset({3}))[0]
        assert (token in (3, 8)) == (num_output >= 2)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_min_tokens_without_any_stop_token(temperature):
    logits = random_logits(1)
    assert draw(logits, [make_row(SamplingParams(temperature=0, min_tokens=2))]) == [[logits.argmax().item()]]


def test_beams_look_at_the_models_own_logits():
    """A beam's SamplingParams carry no filters; whatever they say, its candidates are the model's likeliest."""
    logits = random_logits(1)
    params = SamplingParams(temperature=0, repetition_penalty=3.0, min_tokens=4)
    row = make_row(params, num_top=5, num_samples=1, beam=BeamSearchParams(2, 4))
    (result,) = sample(logits, [row], frozenset(range(VOCAB)))
    assert [token for token, _ in result.top_logprobs] == logits[0].topk(5).indices.tolist()


# ------------------------------------------------------------------------------------- broken logits

BROKEN = {"nan": (0, math.nan), "inf": (0, math.inf), "all -inf": (slice(None), -math.inf), "all nan": (slice(None), math.nan)}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_logits_break_their_row_only(kind):
    logits = random_logits(5)
    rows = [make_row(SamplingParams(temperature=t, n=n), seed=i, num_top=2)
            for i, (t, n) in enumerate([(1, 1), (1, 3), (0, 1), (0, 1), (1, 2)])]
    healthy = sample(logits, rows, frozenset())
    where, value = BROKEN[kind]
    logits[1, where] = logits[3, where] = value
    results = sample(logits, rows, frozenset())
    for i in (0, 2, 4):
        assert results[i] == healthy[i]
    for i in (1, 3):
        assert "NaN or infinity" in results[i].error and results[i].token_ids == []


def test_minus_infinity_is_a_legal_logit():
    logits = random_logits(1)
    logits[0, 10:] = -torch.inf
    for seed in range(20):
        assert draw(logits, [make_row(SamplingParams(temperature=5.0), seed=seed)])[0][0] < 10


class PoisonedLogits:
    """Stands in for a runner; from its `step`-th draw on, the request's logits are broken."""

    def __init__(self, engine, request_id: str, step: int, value: float) -> None:
        self.inner, self.model, self.cache = engine.runner, engine.runner.model, engine.runner.cache
        self.request_id, self.step, self.value = request_id, step, value
        self.draws = 0

    def execute(self, plan, on_layer=None):
        healthy = self.model.logits
        drawing = [row for row in plan.rows if row.num_samples]
        hit = [i for i, row in enumerate(drawing) if row.request.request_id == self.request_id]
        self.draws += bool(hit)

        def logits(hidden):
            values = healthy(hidden).clone()
            if self.draws > self.step:
                values[hit] = self.value
            return values

        self.model.logits = logits
        try:
            return self.inner.execute(plan, on_layer)
        finally:
            del self.model.logits


@pytest.mark.parametrize("step", [0, 1, 5])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_request_ends_with_an_error_and_the_others_go_on(value, step, checkpoint, make_llm):
    llm = make_llm(checkpoint("qwen3"), block_size=4, prefill_chunk_size=8)
    prompts = [{"prompt_token_ids": checkpoint("qwen3").random_prompt(length)} for length in (5, 12, 20)]
    params = [SamplingParams(seed=i, max_tokens=10, n=n) for i, n in enumerate((1, 3, 2))]
    healthy = llm.generate(prompts, params, use_tqdm=False)
    runner = llm.engine.runner
    llm.engine.runner = PoisonedLogits(llm.engine, "4", step, value)
    first, broken, last = llm.generate(prompts, params, use_tqdm=False)
    for got, expected in ((first, healthy[0]), (last, healthy[2])):
        assert [a.token_ids for a in got.outputs] == [a.token_ids for a in expected.outputs]
        assert got.error is None
    assert "NaN or infinity" in broken.error
    for answer, expected in zip(broken.outputs, healthy[1].outputs, strict=True):
        assert answer.finish_reason is FinishReason.ERROR
        assert answer.token_ids == expected.token_ids[:step]
    llm.engine.runner = runner
    again = llm.generate(prompts, params, use_tqdm=False)
    assert [[a.token_ids for a in o.outputs] for o in again] == [[a.token_ids for a in o.outputs] for o in healthy]


def test_broken_request_in_a_cluster(checkpoint, make_cluster):
    """At the first token on the prefill worker, and later on the decode worker."""
    model = checkpoint("qwen3")
    cluster = make_cluster(model, block_size=4)
    prompts = [{"prompt_token_ids": model.random_prompt(length)} for length in (5, 12, 20)]
    params = [SamplingParams(seed=i, max_tokens=10, n=2) for i in range(3)]
    healthy = cluster.generate(prompts, params, use_tqdm=False)
    for request_id, worker_id, num_tokens in (("4", "P0", 0), ("7", "D0", 3)):
        engine = cluster.workers[worker_id].engine
        runner = engine.runner
        engine.runner = PoisonedLogits(engine, request_id, max(0, num_tokens - 1), math.nan)
        outputs = cluster.generate(prompts, params, use_tqdm=False)
        engine.runner = runner
        assert [output.error is not None for output in outputs] == [False, True, False]
        for output, expected in zip(outputs, healthy, strict=True):
            length = 10 if output.error is None else num_tokens
            assert [a.token_ids for a in output.outputs] == [a.token_ids[:length] for a in expected.outputs]


# ------------------------------------------------------------------------------------- seeds, in the engine


def test_seeded_request_is_the_same_in_any_company(checkpoint, make_llm):
    model = checkpoint("qwen3")
    prompt = {"prompt_token_ids": model.random_prompt(9)}
    others = [{"prompt_token_ids": model.random_prompt(length)} for length in (3, 14, 30)]
    params = SamplingParams(seed=77, max_tokens=12, n=2)
    llm = make_llm(model, block_size=4)

    def answers(output):
        return [answer.token_ids for answer in output.outputs]

    alone = answers(llm.generate(prompt, params, use_tqdm=False)[0])
    assert alone == answers(llm.generate([*others, prompt], params, use_tqdm=False)[-1])
    assert alone == answers(llm.generate([prompt, *others], params, use_tqdm=False)[0])
    assert alone == answers(make_llm(model, seed=5).generate(prompt, params, use_tqdm=False)[0])
    assert alone != answers(llm.generate(prompt, SamplingParams(seed=78, max_tokens=12, n=2), use_tqdm=False)[0])


def test_unseeded_requests_differ_but_follow_the_llms_seed(checkpoint, make_llm):
    model = checkpoint("qwen3")
    prompts = [{"prompt_token_ids": model.random_prompt(9)}] * 6
    params = SamplingParams(temperature=2.0, max_tokens=8)

    def answers(seed):
        outputs = make_llm(model, seed=seed).generate(prompts, params, use_tqdm=False)
        return [tuple(output.outputs[0].token_ids) for output in outputs]

    assert len(set(answers(1))) == 6
    assert answers(1) == answers(1) != answers(2)


def test_bad_keys_leave_the_prefix_cache_with_their_request(checkpoint, make_llm):
    """The chunk that went wrong was cached long before the logits told: the same prompt must not find it again."""
    llm = make_llm(checkpoint("qwen3"), block_size=4, prefill_chunk_size=8)
    prompt = {"prompt_token_ids": checkpoint("qwen3").random_prompt(20)}
    greedy = SamplingParams(temperature=0, max_tokens=6)
    expected = llm.generate(prompt, greedy, use_tqdm=False)[0].outputs[0].token_ids
    manager = llm.engine.scheduler.manager
    manager.reset_prefix_cache()

    stream = llm.submit(prompt, greedy)
    llm.step()
    table = manager.block_table(llm.engine.scheduler.running[0].group.live[0])
    assert manager.pool.is_cached(table[0])
    llm.engine.runner.cache.poison(table[:1])
    assert "NaN or infinity" in stream.result().error
    assert llm.generate(prompt, greedy, use_tqdm=False)[0].outputs[0].token_ids == expected
