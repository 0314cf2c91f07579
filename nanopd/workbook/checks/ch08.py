"""Checks of chapter 08: a chance of being late, and a router of the learner's own, in the engine and in races."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from statistics import NormalDist

from nanopd.router.routing import Router
from nanopd.workbook import capstone
from nanopd.workbook.arena import Load, within
from nanopd.workbook.capstone import ScoreCard, describe
from nanopd.workbook.check import exercise, say
from nanopd.workbook.checks import ch06

PATIENCE = 60.0  # seconds for a dozen short answers
FIRST = 0.75  # of the best fixed policy
OF_BEST_FIXED, OF_REFERENCE = 0.9, 0.9  # on the practice trace
OF_BEST_FIXED_HIDDEN, OF_REFERENCE_HIDDEN = 0.8, 0.85  # on what nobody has seen

Theirs = Callable[[], Router]  # their class

# ------------------------------------------------------------------------------------- 08.3, the first router


@exercise("08.3", hint_en="Look only at workers with is_open. A C can take the whole request; else it needs one that reads and one that "
                          "writes. Where neither can be had, return None.",
          hint_zh="只看 is_open 的 Worker。C 可以独自处理整个请求；否则就要有一个读、一个写。两样都凑不齐，就返回 None。")
def check_it_goes_where_it_may(theirs: Theirs) -> None:
    within(PATIENCE, lambda: ch06.check_it_goes_where_it_may(theirs().choose))


@exercise("08.3", hint_en="Among workers that could read the prompt, prefer the one with the fewest queued.prompt_tokens.",
          hint_zh="能读这个提示的 Worker 里，优先选 queued.prompt_tokens 最少的那个。")
def check_it_avoids_a_long_queue(theirs: Theirs) -> None:
    within(PATIENCE, lambda: ch06.check_it_avoids_a_long_queue(theirs().choose))


@exercise("08.3", hint_en="Weigh the ways against each other: what waits before the request, and whom it would hold up.",
          hint_zh="把两条路放在一起掂量：它前面排着多少，它又会拖慢谁。")
def check_it_gets_through_the_practice_trace(theirs: Theirs) -> None:
    _not_under_a_fixed_policy(_card(theirs, (capstone.practice(),)), FIRST)


# --------------------------------------------------------------------------------- 08.5, the chance to be late


@exercise("08.5", hint_en="The logarithm of the time is normal: its mean is log(expected), its deviation is spread. Of a normal, "
                          "1 - NormalDist(mean, deviation).cdf(x) lies above x. For expected = 0 there is no logarithm: never late.",
          hint_zh="时间的对数服从正态分布：均值是 log(expected)，标准差是 spread。正态分布落在 x 以上的概率，是 "
                  "1 - NormalDist(mean, deviation).cdf(x)。expected = 0 没有对数：那就绝不会迟到。")
def check_the_chance_to_be_late(theirs: Callable[[float, float, float], float]) -> None:
    for expected, bound, spread in ((0.4, 0.5, 0.3), (0.5, 0.5, 0.2), (0.009, 0.010, 0.25), (2.0, 0.5, 0.3), (0.0, 0.5, 0.3)):
        wanted = 1 - NormalDist(math.log(expected), spread).cdf(math.log(bound)) if expected else 0.0
        found = theirs(expected, bound, spread)
        assert math.isclose(found, wanted, abs_tol=1e-6), say(
            f"expected {expected:g} s, bound {bound:g} s, spread {spread:g}: the chance to be late is {wanted:.4f}, yours says {found:.4f}",
            f"预计 {expected:g} 秒，上限 {bound:g} 秒，spread {spread:g}：迟到的概率是 {wanted:.4f}，你的是 {found:.4f}")


# ------------------------------------------------------------------------------ 08.6 and 08.8, the best router


HINT_FIXED = dict(
    hint_en="Look at the score card: is it TTFT that is late (queues at who reads) or TPOT (prompts among who writes)?",
    hint_zh="看成绩单：迟的是 TTFT（读的地方排队太长），还是 TPOT（写的地方混进了提示）？")
HINT_REFERENCE = dict(
    hint_en="Score each pair by its chance to miss the SLO plus its seconds end to end, and add a part of what those who write beside it "
            "lose. prompts_per_second[1] says how many prompt tokens will come between an answer's tokens.",
    hint_zh="给每一对打分：违约的概率，加上端到端的秒数，再加一部分旁边正在写的回答因此损失的时间。prompts_per_second[1] 说明回答的 token "
            "之间会插进多少提示 token。")


@exercise("08.6", **HINT_FIXED)
def check_it_is_not_under_a_fixed_policy(theirs: Theirs) -> None:
    _not_under_a_fixed_policy(_card(theirs, (capstone.practice(),)), OF_BEST_FIXED)


@exercise("08.6b", **HINT_REFERENCE)
def check_it_comes_near_the_reference(theirs: Theirs) -> None:
    _near_the_reference(_card(theirs, (capstone.practice(),)), OF_REFERENCE)


@exercise("08.8", **HINT_FIXED)
def check_it_is_not_under_a_fixed_policy_on_hidden_traces(theirs: Theirs) -> None:
    _not_under_a_fixed_policy(_card(theirs, tuple(capstone.hidden())), OF_BEST_FIXED_HIDDEN)


@exercise("08.8b", **HINT_REFERENCE)
def check_it_comes_near_the_reference_on_hidden_traces(theirs: Theirs) -> None:
    _near_the_reference(_card(theirs, tuple(capstone.hidden())), OF_REFERENCE_HIDDEN)


@lru_cache(maxsize=4)
def _card(theirs: Theirs, loads: Sequence[Load]) -> ScoreCard:
    """Raises AssertionError where their router did not finish, and NotImplementedError where it is not written."""
    card = capstone.race(theirs, loads)
    if isinstance(card.error, NotImplementedError):
        raise card.error
    assert card.error is None, say(f"your router did not finish: {describe(card.error)}", f"你的路由器没能跑完：{describe(card.error)}")
    return card


def _not_under_a_fixed_policy(card: ScoreCard, least: float) -> None:
    assert card.of_best_fixed >= least, say(
        f"it serves {card.of_best_fixed:.0%} of what the best fixed policy serves in time; {least:.0%} is the least",
        f"按时完成的请求，只有最好的固定策略的 {card.of_best_fixed:.0%}；至少要 {least:.0%}")


def _near_the_reference(card: ScoreCard, least: float) -> None:
    assert card.of_reference >= least, say(
        f"it serves {card.of_reference:.0%} of what the reference serves in time; {least:.0%} is the least",
        f"按时完成的请求，只有参考路由器的 {card.of_reference:.0%}；至少要 {least:.0%}")


# -------------------------------------------------------------------------------------------- 08.7, the engine


@exercise("08.7", hint_en="The engine asks with the same question and the same kind of workers, but it may "
                          "have other workers, and answers that do not end by themselves (min_tokens = max_tokens).",
          hint_zh="引擎给的是同样的问题、同一种 Worker，不过 Worker 的个数可能不同，回答也可能不会自己结束（min_tokens = max_tokens）。")
def check_the_engine_runs_with_it(theirs: Theirs) -> None:
    _card(theirs, (capstone.practice(),))  # what fails there needs no engine
    within(PATIENCE, lambda: ch06.run_in_the_engine(theirs()))
