"""Checks of chapter 04: the seed's rule, its fit, the roofline of a decode step, and whose time a prompt is."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

from nanopd.cost_model.analytical import (
    CostModel,
    DecodeCost,
    MixedCost,
    PrefillCost,
    Shape,
    StepWork,
    attended_pairs,
)
from nanopd.cost_model.measurements import DecodeRow, PrefillRow
from nanopd.cost_model.seed import SeedModel, seed_preset, seed_preset_names
from nanopd.workbook.check import exercise, say

ROUNDING = 1e-9

# ---------------------------------------------------------------------------------------------- 04.1, the seed's rule


@exercise("04.1", hint_en="transfer_rate is the time for one token: bytes_per_token / (bandwidth_gb_s * 1e9) seconds. gamma is in "
                          "milliseconds. Disaggregate where gamma / transfer_rate is above batch_thresh / load.",
          hint_zh="transfer_rate 是搬一个 token 的时间：bytes_per_token / (bandwidth_gb_s * 1e9) 秒，而 gamma 的单位是毫秒。"
                  "gamma / transfer_rate 大于 batch_thresh / load 时分离。")
def check_rule_equals_the_seeds(theirs: Callable[[float, float, float, float, int], bool]) -> None:
    rng = random.Random(41)
    models = [seed_preset(name) for name in seed_preset_names()]
    models += [SeedModel(0.1, 10, rng.randint(1, 64), rng.uniform(0.01, 1), rng.uniform(0.5, 500), rng.uniform(1e4, 1e6))
               for _ in range(50)]
    for model in models:
        for load in (1, 2, 3, 8, 40):
            expected = model.prefers_disaggregated(load)
            got = theirs(model.gamma_ms_per_token, model.bandwidth_gb_s, model.batch_thresh, model.bytes_per_token, load)
            assert bool(got) == expected, say(
                f"gamma {model.gamma_ms_per_token:.4g} ms, {model.bandwidth_gb_s:.4g} GB/s, batch_thresh {model.batch_thresh}, "
                f"{model.bytes_per_token:.0f} bytes a token, load {load}: the seed says {expected}, you {bool(got)}",
                f"gamma {model.gamma_ms_per_token:.4g} 毫秒，{model.bandwidth_gb_s:.4g} GB/s，batch_thresh {model.batch_thresh}，"
                f"每 token {model.bytes_per_token:.0f} 字节，负载 {load}：Seed 的结果是 {expected}，你的是 {bool(got)}")


# ------------------------------------------------------------------------------------------------- 04.3, alpha and beta


def _squares(alpha: float, beta: float, prefill: Sequence[PrefillRow], decode: Sequence[DecodeRow], thresh: float) -> tuple[float, float]:
    return (sum((alpha * row.new_tokens - row.seconds) ** 2 for row in prefill),
            sum((beta * max(1, row.decodes / thresh) - row.seconds) ** 2 for row in decode))


def _noisy_rows(rng: random.Random, thresh: int) -> tuple[list[PrefillRow], list[DecodeRow]]:
    prefill = [PrefillRow(length * 1e-4 * rng.uniform(0.7, 1.4), length, 0) for length in (50, 100, 400, 900)]
    decode = [DecodeRow(0.02 * max(1, batch / thresh) * rng.uniform(0.7, 1.4), batch, 100.0 * batch) for batch in (1, 4, 9, 16, 40)]
    return prefill, decode


@exercise("04.3", hint_en="alpha is the slope over x = new_tokens, beta the slope over x = max(1, decodes / batch_thresh), both "
                          "through 0: sum of x * seconds over sum of x * x.",
          hint_zh="alpha 是对 x = new_tokens 的斜率，beta 是对 x = max(1, decodes / batch_thresh) 的斜率，两条直线都过原点："
                  "x * seconds 之和，除以 x * x 之和。")
def check_no_other_numbers_fit_better(theirs: Callable[[list[PrefillRow], list[DecodeRow], float], tuple[float, float]]) -> None:
    rng = random.Random(43)
    for thresh in (1, 8, 16):
        prefill, decode = _noisy_rows(rng, thresh)
        alpha, beta = theirs(prefill, decode, thresh)
        ours = _squares(alpha, beta, prefill, decode, thresh)
        for factor in (0.999, 1.001):
            others = _squares(alpha * factor, beta * factor, prefill, decode, thresh)
            for name, own, other in zip(("alpha", "beta"), ours, others):
                assert own < other, say(
                    f"batch_thresh {thresh}: your {name} leaves squares of {own:.6g}; {name} x {factor} leaves {other:.6g}",
                    f"batch_thresh 为 {thresh}：你的 {name} 剩下的平方和是 {own:.6g}，换成 {name} × {factor} 则是 {other:.6g}")


# ----------------------------------------------------------------------------------------- 04.6, the roofline of a step


@exercise("04.6", hint_en="Floor and compute (decodes * per_sequence) each to the power of the sharpness, added, to the power of "
                          "1 / sharpness. The contexts are added after that.",
          hint_zh="地板和计算（decodes * per_sequence）各取 sharpness 次方，相加，再取 1 / sharpness 次方。上下文在这之后才加。")
def check_step_equals_the_models(theirs: Callable[..., float]) -> None:
    rng = random.Random(46)
    for _ in range(50):
        cost = DecodeCost(rng.uniform(1e-3, 1e-2), rng.uniform(1e-5, 1e-4), rng.uniform(0, 1e-7), rng.uniform(1, 8))
        decodes, context = rng.randint(1, 256), float(rng.randint(100, 300_000))
        expected = cost.seconds(decodes, context)
        got = theirs(decodes, context, cost.floor_seconds, cost.sequence_seconds, cost.context_token_seconds, cost.sharpness)
        assert math.isclose(got, expected, rel_tol=ROUNDING), say(
            f"{decodes} sequences, {context:.0f} tokens of context, {cost}: {expected * 1e3:.4g} ms, you say {got * 1e3:.4g} ms",
            f"{decodes} 条序列，上下文共 {context:.0f} 个 token，{cost}：应为 {expected * 1e3:.4g} 毫秒，你的结果是 {got * 1e3:.4g} 毫秒")


# ------------------------------------------------------------------------------------------------- 04.8, whose time it is

PREFILL = PrefillCost(8e-3, 24e-6, 8e-10, 3.0)
MODEL = CostModel(PREFILL, DecodeCost(5e-3, 25e-6, 36e-9, 3.0), MixedCost.on_top(PREFILL, 1e-6, 36e-9), (), Shape(36, 147_456))


@exercise("04.8", hint_en="The step that holds both takes model.step_seconds(running + prompt): that is the prompt's own time. Those "
                          "that decode would have had their step anyway, after model.step_seconds(running).",
          hint_zh="两者同在的那一步要 model.step_seconds(running + prompt)，这就是提示自己的时间。正在解码的序列本来也要走一步，"
                  "要 model.step_seconds(running)。")
def check_nothing_is_charged_twice(theirs: Callable[[CostModel, StepWork, StepWork], tuple[float, float]]) -> None:
    for length in (1, 64, 512, 4096):
        for decodes in (1, 16, 200):
            running = StepWork(decodes=decodes, context_tokens=decodes * 700)
            request = MODEL.request(length, 0, 0, running)
            got = tuple(theirs(MODEL, StepWork(length, attended_pairs(length)), running))
            for name, expected, number in zip(("own time", "delay"), (request.prefill_seconds, request.delay_by_prefill_seconds), got):
                assert math.isclose(number, expected, rel_tol=1e-6), say(
                    f"a prompt of {length} tokens beside {decodes} decodes: {name} {expected * 1e3:.4g} ms, you say {number * 1e3:.4g} ms",
                    f"{length} 个 token 的提示，旁边 {decodes} 条在解码：{'自己的时间' if name == 'own time' else '耽误每条序列'}"
                    f"应为 {expected * 1e3:.4g} 毫秒，你的结果是 {number * 1e3:.4g} 毫秒")
