"""Chapter 04's checks tell right from wrong."""

from __future__ import annotations

import pytest

from nanopd.widgets.strings import set_language
from nanopd.workbook.check import check


@pytest.fixture(autouse=True, params=["en", "zh"])
def language(request, monkeypatch):
    monkeypatch.delenv("NANOPD_STRICT_CHECKS", raising=False)
    set_language(request.param)
    yield request.param
    set_language(None)


def prefers(gamma_ms, bandwidth_gb_s, batch_thresh, bytes_per_token, load, *, ms=1e3, giga=1e9, early=1.0):
    ratio = gamma_ms / (bytes_per_token / (bandwidth_gb_s * giga) * ms)
    return ratio * load > batch_thresh * early


def test_the_seeds_rule():
    assert check("04.1", prefers)


@pytest.mark.parametrize("theirs", [
    lambda *given: prefers(*given, ms=1.0),
    lambda *given: prefers(*given, giga=1e6),
    lambda *given: not prefers(*given),
    lambda *given: prefers(*given[:4], 8),
    lambda *given: prefers(*given, early=0.5),
], ids=["seconds", "megabytes", "the other way round", "always one load", "too early"])
def test_other_rules_are_found_out(theirs):
    result = check("04.1", theirs)
    assert not result and result.hint and "batch_thresh" in result.failures[0].message


def slopes(prefill, decode, thresh, *, x=lambda batch, thresh: max(1, batch / thresh), weight=lambda x, y: x * x):
    def slope(points):
        return sum(weight(x, y) * y / x for x, y in points) / sum(weight(x, y) for x, y in points)

    return slope([(row.new_tokens, row.seconds) for row in prefill]), slope([(x(row.decodes, thresh), row.seconds) for row in decode])


def test_alpha_and_beta():
    assert check("04.3", slopes)


@pytest.mark.parametrize("fault", [dict(x=lambda batch, thresh: batch / thresh), dict(x=lambda batch, thresh: max(1, batch)),
                                   dict(weight=lambda x, y: 1), dict(weight=lambda x, y: x)],
                         ids=["no floor", "no threshold", "mean of ratios", "ratio of means"])
def test_another_fit_leaves_larger_squares(fault):
    result = check("04.3", lambda *given: slopes(*given, **fault))
    assert not result and result.hint and ("alpha" in result.failures[0].message or "beta" in result.failures[0].message)


def step(decodes, context, floor, sequence, token, sharpness, *, contexts_within=False):
    compute = decodes * sequence + (context * token if contexts_within else 0)
    return (floor**sharpness + compute**sharpness) ** (1 / sharpness) + (0 if contexts_within else context * token)


def test_the_roofline_of_a_decode_step():
    assert check("04.6", step)


@pytest.mark.parametrize("theirs", [
    lambda *given: step(*given, contexts_within=True),
    lambda *given: step(*given[:5], 1.0),
    lambda decodes, context, floor, sequence, token, sharpness: max(floor, decodes * sequence) + context * token,
    lambda decodes, context, *rest: step(decodes, decodes * context, *rest),
], ids=["contexts below the roof", "a sum", "a maximum", "contexts of each"])
def test_other_steps_are_found_out(theirs):
    result = check("04.6", theirs)
    assert not result and result.hint and "ms" in result.failures[0].message.replace("毫秒", "ms")


def own_and_delay(model, prompt, running):
    together = model.step_seconds(running + prompt)
    return together, together - model.step_seconds(running)


def test_whose_time_it_is():
    assert check("04.8", own_and_delay)


@pytest.mark.parametrize("theirs", [
    lambda model, prompt, running: (model.step_seconds(prompt) + own_and_delay(model, prompt, running)[1],) * 2,
    lambda model, prompt, running: (model.step_seconds(prompt), own_and_delay(model, prompt, running)[1]),
    lambda model, prompt, running: (model.step_seconds(running + prompt), model.step_seconds(prompt)),
    lambda model, prompt, running: (model.step_seconds(running + prompt), 0.0),
], ids=["twice", "as if alone", "a step of its own", "free for the others"])
def test_what_is_charged_twice_or_not_at_all_is_found_out(theirs):
    result = check("04.8", theirs)
    assert not result and result.hint
