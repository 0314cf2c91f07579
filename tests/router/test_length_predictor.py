import csv
import math
import os
import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from nanopd.router.length_baselines import ConstantLength, WindowedMean, WindowedSample
from nanopd.router.length_predictor import (
    BayesianLengthPredictor,
    Belief,
    Evidence,
    StudentT,
    shortest_interval,
)
from nanopd.router.length_scores import Answer, score

LIMIT = 4096
TRACES = Path(os.environ.get("NANOPD_TRACES", "traces"))  # the folder that holds the traces, where somebody has them
PREDICTORS = [BayesianLengthPredictor, WindowedMean, WindowedSample, ConstantLength]

# Quantiles of the tokens generated in the Azure LLM inference trace 2023, code (Patel et al., Splitwise, ISCA 2024; CC-BY 4.0).
AZURE_CODE = [(0, 6), (.05, 6), (.1, 7), (.2, 8), (.3, 9), (.4, 11), (.5, 13), (.6, 16), (.7, 20), (.8, 29), (.85, 39), (.9, 55),
              (.95, 90), (.98, 171), (.99, 251), (.995, 359), (1, 1899)]


def log_normal(rng, level, spread):
    return max(1, round(math.exp(rng.gauss(level, spread))))


def azure_code(rng):
    share = rng.random()
    for (low, short), (high, long) in pairwise(AZURE_CODE):
        if share <= high:
            return round(math.exp(math.log(short) + (math.log(long) - math.log(short)) * (share - low) / (high - low)))


def log_uniform_prompt(rng):
    return int(2 ** rng.uniform(4, 13))


def answers(lengths, rng, limit=LIMIT):
    return [Answer(log_uniform_prompt(rng), min(length, limit), length >= limit, limit) for length in lengths]


def taught(predictor, lengths, prompt_len=100):
    for length in lengths:
        predictor.update(prompt_len, length)
    return predictor


lengths_seen = st.lists(st.integers(1, 5000), max_size=60)


# ---------------------------------------------------------------------------------------------------------- forecasts


@pytest.mark.parametrize("kind", PREDICTORS)
@given(seen=lengths_seen, limit=st.integers(1, 100_000), data=st.data())
@settings(max_examples=40, deadline=None)
def test_a_forecast_is_one_distribution(kind, seen, limit, data):
    written = data.draw(st.integers(0, limit - 1))
    forecast = taught(kind(), seen).predict(100, limit, written)
    probabilities = sorted(data.draw(st.lists(st.floats(0, 1), min_size=2, max_size=8)))
    quantiles = [forecast.quantile(probability) for probability in probabilities]
    assert quantiles == sorted(quantiles)
    assert all(written < quantile <= limit for quantile in quantiles)
    for probability, quantile in zip(probabilities, quantiles):
        assert forecast.exceeds(quantile) <= 1 - probability + 1e-9
        assert quantile == written + 1 or forecast.exceeds(quantile - 1) >= 1 - probability - 1e-9
    shares = [forecast.exceeds(length) for length in sorted(data.draw(st.lists(st.integers(0, limit), min_size=2, max_size=8)))]
    assert shares == sorted(shares, reverse=True) and 0 <= shares[-1] and shares[0] <= 1
    assert forecast.exceeds(written) == 1 and forecast.exceeds(limit) == 0
    assert written + 1 <= forecast.mean() + 1e-9 and forecast.mean() <= limit


@given(seen=lengths_seen, written=st.integers(1, 400), further=st.integers(0, 2000))
@settings(max_examples=60, deadline=None)
def test_what_is_written_conditions_the_forecast(seen, written, further):
    predictor = taught(BayesianLengthPredictor(), seen)
    before, after = predictor.predict(100, LIMIT), predictor.predict(100, LIMIT, written)
    together = before.exceeds(written) * after.exceeds(written + further)
    assert together == pytest.approx(before.exceeds(written + further), rel=1e-9)
    assert after.mean() >= before.mean() - 1e-9 * LIMIT


@pytest.mark.parametrize("kind", [BayesianLengthPredictor, ConstantLength])
@pytest.mark.parametrize(("level", "spread"), [(0.5, 0.4), (3, 1.2), (5, 0.2), (6, 2)])
@pytest.mark.parametrize(("limit", "written"), [(LIMIT, 0), (LIMIT, 40), (64, 0), (64, 62), (30_000, 700)])
def test_the_mean_is_that_of_the_forecasts_own_probabilities(kind, level, spread, limit, written):
    rng = random.Random(1)
    forecast = taught(kind(), [log_normal(rng, level, spread) for _ in range(300)]).predict(100, limit, written)
    exact = written + sum(forecast.exceeds(length) for length in range(written, limit))
    assert forecast.mean() == pytest.approx(exact, rel=0.02, abs=0.1)


@pytest.mark.parametrize("dof", [4, 5, 10, 100, 1000])
def test_the_t_is_within_two_thousandths_of_the_exact_one(dof):
    t = StudentT(2.0, 0.5, dof)
    for x in (-2.0, 0.5, 1.5, 1.99, 2.0, 2.3, 3.0, 4.0, 8.0):
        assert t.tail(x) == pytest.approx(stats.t.sf(x, dof, 2.0, 0.5), abs=0.002)
        assert t.at_tail(t.tail(x)) == pytest.approx(x, abs=0.01)  # the 1 of a tail near 1 has eaten the digits


# ---------------------------------------------------------------------------------------------------------- posterior


@given(st.lists(st.floats(-5, 15), min_size=1, max_size=30), st.randoms())
@settings(deadline=None)
def test_the_posterior_is_the_textbooks_in_any_order(xs, rng):
    prior = Belief(mean=4.0, variance=0.7, kappa=0.5, dof=4.0)
    rng.shuffle(xs)
    evidence = Evidence()
    for x in xs:
        evidence.add(x)
    for x in xs:  # one at a time, each posterior the next one's prior
        squares = prior.dof * prior.variance + (x - prior.mean) ** 2 * prior.kappa / (prior.kappa + 1)
        mean = (prior.kappa * prior.mean + x) / (prior.kappa + 1)
        prior = Belief(mean, squares / (prior.dof + 1), prior.kappa + 1, prior.dof + 1)
    assert evidence.posterior(Belief(4.0, 0.7, 0.5, 4.0)) == pytest.approx(prior, rel=1e-9, abs=1e-9)


@given(lengths_seen, st.randoms())
@settings(max_examples=40, deadline=None)
def test_without_forgetting_the_order_does_not_matter(seen, rng):
    """To the posterior of level and spread. The shape is learned from forecasts, so from what was known at each."""
    first = taught(BayesianLengthPredictor(memory=math.inf), seen)
    rng.shuffle(seen)
    again = taught(BayesianLengthPredictor(memory=math.inf), seen)
    if first.shifts == again.shifts == 0:
        assert again.belief(100) == pytest.approx(first.belief(100), rel=1e-9)


@given(seen=lengths_seen, cut_at=st.integers(1, 5000), prompt_len=st.sampled_from([100, 3000]))
@settings(max_examples=80, deadline=None)
def test_an_answer_that_was_cut_never_lowers_the_estimate(seen, cut_at, prompt_len):
    predictor = taught(BayesianLengthPredictor(memory=math.inf), seen)
    before, shifts = predictor.belief(prompt_len).mean, predictor.shifts
    predictor.update(prompt_len, cut_at, cut=True)
    assert predictor.shifts > shifts or predictor.belief(prompt_len).mean >= before - 1e-9


def test_the_longer_an_answer_was_before_it_was_cut_the_more_it_says():
    rng = random.Random(2)
    seen = [log_normal(rng, 4, 0.5) for _ in range(30)]
    means = []
    for cut_at in (1, 30, 60, 120):
        predictor = taught(BayesianLengthPredictor(), seen)
        for _ in range(5):
            predictor.update(100, cut_at, cut=True)
        means.append(predictor.predict(100, LIMIT).mean())
    assert means == sorted(means)
    assert means[0] == pytest.approx(taught(BayesianLengthPredictor(), seen).predict(100, LIMIT).mean(), rel=0.03)


@given(mean=st.floats(-3, 10), spread=st.floats(0.01, 3), start=st.floats(-6, 30))
def test_what_is_expected_beyond_a_cut(mean, spread, start):
    """Moments of a truncated normal; from far out they are those of an exponential."""
    x = mean + spread * start
    expected, variance = Belief(mean, spread**2, 100.0, 100.0).beyond(x)
    assert expected >= x - 1e-9 and 0 <= variance <= spread**2 * (1 + 1e-9)
    if start < 7:
        exact = stats.truncnorm(start, math.inf, mean, spread)
        assert (expected, variance) == pytest.approx((exact.mean(), exact.var()), rel=1e-3, abs=1e-4)


def test_a_bucket_borrows_from_all_until_it_knows_better():
    rng = random.Random(3)
    predictor = BayesianLengthPredictor()
    for _ in range(500):
        predictor.update(100, log_normal(rng, 4, 0.5))
    assert predictor.predict(5000, LIMIT).quantile(0.5) == pytest.approx(math.exp(4), rel=0.1)
    medians = []
    for _ in range(60):
        predictor.update(5000, log_normal(rng, 5, 0.5))
        medians.append(predictor.predict(5000, LIMIT).quantile(0.5))
    assert medians[1] < math.exp(4.6) < medians[-1]
    assert predictor.predict(100, LIMIT).quantile(0.5) == pytest.approx(math.exp(4), rel=0.1)


# -------------------------------------------------------------------------------------------------------- calibration


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("draw", [
    lambda rng: log_normal(rng, 5, 0.8),
    lambda rng: log_normal(rng, 2, 0.5),
    azure_code,
    lambda rng: round(rng.expovariate(1 / 80)) + 1,
    lambda rng: log_normal(rng, 2.5, 0.3) if rng.random() < 0.6 else log_normal(rng, 6, 0.3),
], ids=["log-normal", "short", "azure-code", "geometric", "two kinds"])
def test_intervals_cover_what_they_say(draw, seed):
    rng = random.Random(seed)
    scored = score(BayesianLengthPredictor(), answers([draw(rng) for _ in range(2000)], rng))
    assert 0.87 <= scored.central_coverage <= 0.93
    assert 0.87 <= scored.coverage <= 0.94  # short answers: the shortest interval of whole lengths that holds 90% holds more


def azure_trace():
    path = TRACES / "azure_llm_code_2023.csv"
    if not path.exists():
        pytest.skip(f"needs the Azure code trace, {path}")
    with path.open() as lines:
        return [Answer(int(row["ContextTokens"]), min(int(row["GeneratedTokens"]), LIMIT), int(row["GeneratedTokens"]) >= LIMIT, LIMIT)
                for row in csv.DictReader(lines)]


@pytest.mark.parametrize("source", ["trace", "quantiles"])
def test_on_real_lengths_it_is_calibrated_and_beats_the_window_and_the_constant(source):
    rng = random.Random(4)
    rows = azure_trace() if source == "trace" else answers([azure_code(rng) for _ in range(2500)], rng)
    hindsight = sum(row.output_len for row in rows) / len(rows)  # the constant is told the mean of what is to come
    bayes = score(BayesianLengthPredictor(), rows)
    assert 0.87 <= bayes.coverage <= 0.93 and 0.87 <= bayes.central_coverage <= 0.93
    for rival in (WindowedMean(), WindowedSample(), ConstantLength(hindsight)):
        scored = score(rival, rows)
        assert bayes.log_score > scored.log_score + 0.3
        assert bayes.pinball < scored.pinball


@pytest.mark.parametrize("limit", [400, 150, 100])
def test_cuts_bias_the_windowed_mean_and_not_the_posterior(limit):
    """A tenth, half and two thirds of the answers are cut."""
    true_mean, ratios, windowed = math.exp(5 + 0.8**2 / 2), [], []
    for seed in range(5):
        rng = random.Random(seed)
        bayes, window = BayesianLengthPredictor(), WindowedMean(1000)
        for _ in range(3000):
            length = log_normal(rng, 5, 0.8)
            for predictor in (bayes, window):
                predictor.update(100, min(length, limit), cut=length >= limit)
        ratios.append(bayes.predict(100, 100_000).mean() / true_mean)
        windowed.append(window.predict(100, 100_000).mean() / true_mean)
    assert sum(ratios) / 5 == pytest.approx(1, abs=0.06)
    assert max(windowed) < 0.92


# -------------------------------------------------------------------------------------------------------------- drift


@pytest.mark.parametrize(("before", "after"), [((4, 0.7), (5.5, 0.7)), ((5.5, 0.7), (4, 0.7)), ((4, 0.4), (4, 1.2)), ((4, 1.2), (4, 0.4)),
                                               ((3, 1.5), (6, 0.3))])
def test_it_recovers_within_fifty_answers_of_a_shift(before, after):
    """Then its forecasts of the new lengths score within a quarter nat of those of one that never knew the old ones."""
    gaps, medians = [], []
    for seed in range(10):
        rng = random.Random(seed)
        old = answers([log_normal(rng, *before) for _ in range(1000)], rng)
        new = answers([log_normal(rng, *after) for _ in range(150)], rng)
        shifted = score(BayesianLengthPredictor(), old + new, skip=len(old) + 50)
        gaps.append(score(BayesianLengthPredictor(), new, skip=50).log_score - shifted.log_score)
        predictor = BayesianLengthPredictor()
        for answer in old + new[:50]:
            predictor.update(answer.prompt_len, answer.output_len)
        medians.append(math.log(predictor.predict(100, LIMIT).quantile(0.5)))
    assert sum(gaps) / len(gaps) < 0.05 and max(gaps) < 0.25
    assert sum(medians) / len(medians) == pytest.approx(after[0], abs=0.15)


@pytest.mark.parametrize("spread", [0.3, 0.8, 1.5])
def test_no_shift_is_seen_where_there_is_none(spread):
    rng = random.Random(5)
    predictor = BayesianLengthPredictor()
    for _ in range(6000):
        predictor.update(log_uniform_prompt(rng), log_normal(rng, 5, spread))
    assert predictor.shifts <= 2  # at most one in 2,981 is expected


def test_a_slow_drift_is_followed():
    rng, errors = random.Random(6), []
    predictor = BayesianLengthPredictor()
    for number in range(4000):
        level = 4 + 1.5 * math.sin(number / 4000 * 2 * math.pi)
        if number > 200:
            errors.append(abs(math.log(predictor.predict(100, LIMIT).quantile(0.5)) - level))
        predictor.update(100, log_normal(rng, level, 0.7))
    assert sum(errors) / len(errors) < 0.25


# ----------------------------------------------------------------------------------------------------------- extremes


@pytest.mark.parametrize("length", [1, 42, 10**6])
def test_answers_that_are_all_alike(length):
    predictor = taught(BayesianLengthPredictor(), [length] * 2000)
    forecast = predictor.predict(100, 2 * 10**6)
    first, last = shortest_interval(forecast, 0.9)
    assert first <= length <= last and last - first <= 0.4 * length
    assert forecast.mean() == pytest.approx(length, rel=0.05)
    beyond = predictor.predict(100, 2 * 10**6, 2 * 10**6 - 2)  # longer than anything seen: still a forecast
    assert beyond.mean() <= 2 * 10**6 and 0 <= beyond.exceeds(2 * 10**6 - 1) <= 1


def test_a_hundred_thousand_answers_and_the_outermost_lengths():
    rng = random.Random(7)
    predictor = BayesianLengthPredictor(memory=100.0)  # weights pass 1e100 three times
    for number in range(100_000):
        predictor.update(log_uniform_prompt(rng), log_normal(rng, 4, 0.6))
        if number == 50_000:
            for length in (1, 10**6, 1, 10**6):
                predictor.update(10**6, length, cut=length > 1)
    assert predictor.predict(100, LIMIT).quantile(0.5) == pytest.approx(math.exp(4), rel=0.25)


def test_answers_that_are_all_cut():
    predictor = BayesianLengthPredictor()
    for _ in range(3000):
        predictor.update(100, 64, cut=True)
    assert predictor.predict(100, 64).exceeds(63) > 0.95
    assert math.isfinite(predictor.predict(100, 10**6).mean())


# ------------------------------------------------------------------------------------------------------ scores, input


def test_scores_of_a_forecast_worked_by_hand():
    """Geometric with mean 2: P(1) = 1/2, P(2) = 1/4, and 1/4 of the answers are longer."""
    rows = [Answer(10, 1, False, 4096), Answer(10, 2, True, 2)]
    scored = score(ConstantLength(2.0), rows)
    assert scored.num_answers == 2
    assert scored.log_score == pytest.approx((math.log(0.5) + math.log(0.5)) / 2)
    assert scored.central_coverage == pytest.approx((0.45 / 0.5 + 0.45 / 0.5) / 2)
    assert scored.coverage == 1.0
    assert scored.bias == pytest.approx((2.0 - 1 + 1.5 - 2) / 2)
    # quantiles 1, 1, 1, 2, 5 of the first and 1, 1, 1, 2, 2 of the second
    assert scored.pinball == pytest.approx((0.25 * 1 + 0.05 * 4 + 0.05 + 0.25 + 0.5) / 10)


def test_scores_are_prequential():
    rng = random.Random(8)
    rows = answers([log_normal(rng, 4, 0.5) for _ in range(50)], rng)
    assert score(WindowedMean(), [*rows, Answer(10, 4000, False, LIMIT)], skip=50) \
        != score(WindowedMean(), [*rows[:-1], Answer(10, 4000, False, LIMIT), Answer(10, 4000, False, LIMIT)], skip=50)
    with pytest.raises(ValueError, match="more answers than the 50"):
        score(WindowedMean(), rows, skip=50)


@pytest.mark.parametrize("kind", PREDICTORS)
def test_bad_input_is_named(kind):
    predictor = kind()
    for prompt_len, output_len in ((0, 5), (5, 0), (5, -1), (5, 2.5), (math.nan, 5), (5, None)):
        with pytest.raises(ValueError, match="must be a whole number of at least 1 token, got"):
            predictor.update(prompt_len, output_len)
    with pytest.raises(ValueError, match="max_tokens must be"):
        predictor.predict(5, 0)
    for written in (-1, 16, 20, 1.5):
        with pytest.raises(ValueError, match="written must be a whole number from 0 to 15"):
            predictor.predict(5, 16, written)
    for probability in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="from 0 to 1"):
            predictor.predict(5, 16).quantile(probability)


def test_bad_settings_are_named():
    for memory in (0, -5, math.nan):
        with pytest.raises(ValueError, match="memory must be at least 1"):
            BayesianLengthPredictor(memory)
    with pytest.raises(ValueError, match="window must be at least 1"):
        WindowedMean(0)
    for length in (1, 0, math.inf, math.nan):
        with pytest.raises(ValueError, match="length must be a number of tokens above 1"):
            ConstantLength(length)


def test_no_heavy_import():
    code = "import sys, nanopd.router.length_scores, nanopd.router.length_baselines; print({'torch', 'scipy', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
