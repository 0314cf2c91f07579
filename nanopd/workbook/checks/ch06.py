"""Checks of chapter 06: the posterior of a log length, and a router of the learner's own in the engine and on a trace."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

from nanopd import Cluster, SamplingParams
from nanopd.cost_model.analytical import StepWork
from nanopd.router.length_predictor import BayesianLengthPredictor, Belief, Evidence
from nanopd.router.routing import Decision, Question, Router
from nanopd.simulator import Result
from nanopd.workbook import routing
from nanopd.workbook.check import exercise, say

PATIENCE = 20.0  # seconds for a few short answers
MOST_REGRET = 0.2  # of the reference's mean time; taking turns has more on this trace

# ----------------------------------------------------------------------------------------- 06.1, the posterior


@exercise("06.1", hint_en="kappa and dof each grow by the number of lengths n. The mean is the weighted mean of the prior's and the "
                          "logarithms'. The squares add up: dof · variance of the prior, squared deviations of the logarithms from "
                          "their own mean, and (kappa · n / (kappa + n)) · (difference of the two means)². Divided by the new dof.",
          hint_zh="kappa 和 dof 都加上长度的个数 n。新的均值，是先验均值与各对数的加权平均。平方和有三份相加：先验的 dof · variance；"
                  "各对数对自己均值的偏差平方和；(kappa · n / (kappa + n)) ·（两个均值之差）²。最后除以新的 dof。")
def check_the_posterior_is_the_predictors(theirs: Callable[[Belief, list[int]], Belief]) -> None:
    rng = random.Random(61)
    priors = [BayesianLengthPredictor.PRIOR, Belief(3.0, 0.2, 5.0, 9.0)]
    for lengths in ([16, 64], [100], [7] * 4, [rng.randint(1, 900) for _ in range(50)]):
        for prior in priors:
            evidence = Evidence()
            for length in lengths:
                evidence.add(math.log(length))
            expected, got = evidence.posterior(prior), theirs(prior, list(lengths))
            for name in Belief._fields:
                wanted, found = getattr(expected, name), getattr(got, name)
                assert math.isclose(wanted, found, rel_tol=1e-6), say(
                    f"prior {prior}, lengths {lengths[:6]}: {name} is {wanted:.6g} in the predictor, {found:.6g} in yours",
                    f"先验 {prior}，长度 {lengths[:6]}：预测器的 {name} 是 {wanted:.6g}，你的是 {found:.6g}")


# ----------------------------------------------------------------------------------------- 06.5, a router


class _Theirs:
    def __init__(self, choose: Callable[..., Decision | None]) -> None:
        self.choose = choose


def _worker(worker_id: str, queued: int = 0, is_open: bool = True) -> SimpleNamespace:
    return SimpleNamespace(
        worker_id=worker_id, role=worker_id[0], device=None, is_open=is_open, queued=StepWork(queued), queued_since=0.0,
        running=StepWork(), seats=0, free_seats=64, free_tokens=10_000, sending_tokens=0, prompts_per_second=(0.0, 0.0),
        cached_tokens=0)


def _asked(theirs: Callable[..., Decision | None], *workers: Any) -> str | None:
    decision = theirs(Question("0", 100, 64, 1, 1, 0, 0.0, 0.0), list(workers))
    return decision and str(decision.route)


@exercise("06.5", hint_en="Look only at workers with is_open. A collocated route needs a C, a disaggregated one a P and a D. "
                          "Where neither can be had, return None.",
          hint_zh="只看 is_open 的 Worker。混部需要一个 C，分离需要一个 P 和一个 D。哪一条都凑不齐，就返回 None。")
def check_it_goes_where_it_may(theirs: Callable[..., Decision | None]) -> None:
    c0, p0, d0, shut = _worker("C0"), _worker("P0"), _worker("D0"), _worker("C1", is_open=False)
    for workers, allowed in (([c0, shut], {"C0"}), ([shut, p0, d0], {"P0 -> D0"}), ([shut, p0], {None}), ([d0], {None}),
                             ([c0, p0, d0], {"C0", "P0 -> D0"})):
        got = _asked(theirs, *workers)
        names = " ".join(worker.worker_id + ("" if worker.is_open else "(shut)") for worker in workers)
        wanted = " / ".join(sorted(map(str, allowed)))
        assert got in allowed, say(f"workers {names}: possible is {wanted}, your router said {got}",
                                   f"Worker 有 {names}：可选的是 {wanted}，你的路由器选了 {got}")


@exercise("06.5", hint_en="Among workers of one role, prefer the one with the fewest queued.prompt_tokens.",
          hint_zh="同一种角色的 Worker 里，优先选 queued.prompt_tokens 最少的那个。")
def check_it_avoids_a_long_queue(theirs: Callable[..., Decision | None]) -> None:
    for workers, wanted in (([_worker("C0", 50_000), _worker("C1")], "C1"), ([_worker("C0"), _worker("C1", 50_000)], "C0"),
                            ([_worker("P0", 50_000), _worker("P1"), _worker("D0")], "P1 -> D0")):
        got = _asked(theirs, *workers)
        assert got == wanted, say(f"50,000 tokens wait at one worker and none at the other; free is {wanted}, your router said {got}",
                                  f"一个 Worker 前面排着 50,000 个 token，另一个空着；空闲的是 {wanted}，你的路由器选了 {got}")


@exercise("06.5", hint_en="The engine asks with the same question and the same kind of workers; return a Decision with a Route.",
          hint_zh="引擎给的是同样的问题和同样的 Worker；返回一个带 Route 的 Decision。")
def check_the_engine_runs_with_it(theirs: Callable[..., Decision | None]) -> None:
    run_in_the_engine(_Theirs(theirs))


def run_in_the_engine(router: Router) -> None:
    """Six requests in an adaptive cluster. Raises AssertionError where one fails, or is answered otherwise than collocated."""
    prompts = [{"prompt_token_ids": list(range(200 + number, 230 + 40 * number))} for number in range(6)]
    greedy = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    options = dict(dtype="float32", num_gpu_blocks_override=256)
    with Cluster("tiny", "C:cpu", "collocated", **options) as cluster:
        expected = [output.outputs[0].token_ids for output in cluster.generate(prompts, greedy, use_tqdm=False)]
    with Cluster("tiny", "C:cpu P:cpu D:cpu", "adaptive", router=router, **options) as cluster:
        streams = [cluster.submit(prompt, greedy, timeout=PATIENCE) for prompt in prompts]  # a router may say None for ever
        outputs = [stream.result() for stream in streams]
        errors = [output.error for output in outputs if output.error]
        assert not errors, say(f"in the engine: {errors[0]}", f"在引擎里：{errors[0]}")
        assert [output.outputs[0].token_ids for output in outputs] == expected, say(
            "in the engine the answers changed", "在引擎里，回答变了")
        assert not any(worker.manager.leases for worker in cluster.workers.values()), say("a lease is left", "留下了租约")


@exercise("06.5", hint_en="Compare the ways by what waits before the request: tokens queued at the worker that reads it, and a little "
                          "for each seat taken where it is written.",
          hint_zh="两条路比一比：读它的 Worker 前面排了多少 token，写它的 Worker 每占一个座位再加一点。")
def check_its_regret_on_the_trace(theirs: Callable[..., Decision | None]) -> None:
    _, result = routing.simulate(_Theirs(theirs), routing.trace())
    regret = routing.regret(result, _reference())
    assert regret <= MOST_REGRET, say(
        f"on the trace requests took {regret:.0%} longer than with the reference; {MOST_REGRET:.0%} is the most",
        f"在这份负载上，请求比用参考路由器多花了 {regret:.0%} 的时间；上限是 {MOST_REGRET:.0%}")


@lru_cache(maxsize=1)
def _reference() -> Result:
    return routing.simulate(routing.reference(), routing.trace())[1]


