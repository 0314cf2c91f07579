"""What a load comes to: the names of `vllm bench serve`, the numbers of `nanopd.metrics`."""

from __future__ import annotations

from statistics import fmean

import numpy as np
import pytest

from nanopd.benchmark.load import ClientRecord, Load, load_metrics
from nanopd.config import SLO
from nanopd.metrics import meets, quantile, summarize


def answered(arrival, *tokens, late=0.0, **fields):
    """Tokens at times from the arrival on."""
    return ClientRecord(arrival, 10, len(tokens), sent=arrival + late, ended=arrival + tokens[-1], status="completed",
                        mode="collocated", tokens=[arrival + time for time in tokens], **fields)


def dropped(arrival):
    return ClientRecord(arrival, 10, 5, sent=arrival, ended=arrival, status="dropped", error="too many")


def many(number=200, seed=1):
    random = np.random.default_rng(seed)
    return [answered(0.1 * place, *np.cumsum(random.exponential(0.1, random.integers(1, 8)))) for place in range(number)]


def test_by_hand():
    """Two answers of three and two tokens over four seconds; one of the two is late with its second token."""
    load = Load([answered(1.0, 0.5, 1.0, 2.0, late=0.1), answered(2.0, 0.5, 3.0, late=0.3)], begin=1.0, end=3.0)
    found = load_metrics(load, SLO(ttft=0.5, tpot=1.0))
    assert (found["duration"], found["completed"], found["failed"], found["dropped"]) == (4.0, 2, 0, 0)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (20, 5)
    assert (found["request_throughput"], found["output_throughput"], found["total_token_throughput"]) == (0.5, 1.25, 6.25)
    assert found["mean_ttft_ms"] == found["p99_ttft_ms"] == 500
    assert (found["mean_tpot_ms"], found["median_tpot_ms"], found["p99_tpot_ms"]) == (1625, 750, 2500)
    assert (found["mean_itl_ms"], found["median_itl_ms"], found["p99_itl_ms"]) == (pytest.approx(4000 / 3), 1000, 2500)
    assert (found["mean_e2el_ms"], found["p90_e2el_ms"]) == (2500, 3000)
    assert (found["attainment"], found["request_goodput"]) == (0.5, 0.25)
    assert (found["mean_lateness_ms"], found["p99_lateness_ms"]) == (pytest.approx(200), pytest.approx(300))
    assert found["window_output_throughput"] == 1.5  # in the window's two seconds: at 1.5, 2 and 2.5
    assert found["shares"] == {"collocated": 1.0}


def test_the_numbers_are_those_of_summarize():
    records, slo = many(), SLO(ttft=0.1, tpot=0.1)
    found, summary = load_metrics(Load(records, 0.0, 20.0), slo, bootstrap=0), summarize(records, slo)
    assert found["duration"] == summary.seconds
    assert (found["request_throughput"], found["output_throughput"]) == (summary.requests_per_second, summary.tokens_per_second)
    assert (found["attainment"], found["request_goodput"]) == (summary.attainment, summary.goodput)
    for name, quantiles in (("ttft", summary.ttft), ("tpot", summary.tpot), ("e2el", summary.e2e)):
        assert [found[f"{which}_{name}_ms"] for which in ("median", "p90", "p99")] == pytest.approx(
            [1e3 * value for value in (quantiles.p50, quantiles.p90, quantiles.p99)])
    assert found["mean_e2el_ms"] == pytest.approx(1e3 * fmean(record.e2e for record in records))
    assert found["ci"] == {}


def test_only_the_window_s_requests_count_but_all_tokens_in_it():
    warmup = ClientRecord(0.0, 10, 2, counts=False, sent=0.0, ended=5.5, status="completed", tokens=[0.5, 5.5])
    load = Load([warmup, *(answered(5.0 + place, 0.25, 0.5) for place in range(6))], begin=5.0, end=10.0)
    load.records[-1].counts = False
    found = load_metrics(load)
    assert (found["completed"], found["total_output_tokens"], found["request_goodput"], found["attainment"]) == (5, 10, None, None)
    assert found["window_output_throughput"] == 11 / 5


def test_who_was_refused_or_failed_has_not_been_served_in_time():
    failed = ClientRecord(1.0, 10, 5, sent=1.0, ended=2.0, status="failed", tokens=[1.1])
    found = load_metrics(Load([answered(0.0, 0.5, 1.0), failed, dropped(2.0), dropped(3.0)], 0.0, 4.0), SLO(ttft=1, tpot=1))
    assert (found["completed"], found["failed"], found["dropped"], found["attainment"]) == (1, 1, 2, 0.25)
    assert found["mean_ttft_ms"] == 500 and found["total_output_tokens"] == 2


@pytest.mark.parametrize("records", [[], [dropped(float(place)) for place in range(5)]], ids=["nobody came", "all were dropped"])
def test_nothing_was_completed(records):
    found = load_metrics(Load(records, 0.0, 5.0), SLO(ttft=1, tpot=1))
    assert (found["completed"], found["dropped"], found["output_throughput"]) == (0, len(records), 0.0)
    assert found["request_goodput"] == 0 and found["attainment"] == (0.0 if records else None)
    assert {found[f"{which}_{name}_ms"] for which in ("mean", "median", "p90", "p99") for name in ("ttft", "tpot", "itl", "e2el")} == {None}
    assert not found["steady"]["is_steady"] and found["shares"] == {}
    assert set(found["ci"]) == ({"attainment", "request_goodput"} if records else set())


def test_answers_of_one_token_have_no_time_between_tokens():
    found = load_metrics(Load([answered(0.0, 1.0), answered(1.0, 1.0)], 0.0, 2.0), SLO(ttft=1, tpot=1))
    assert (found["mean_tpot_ms"], found["p99_itl_ms"], found["attainment"], found["mean_ttft_ms"]) == (None, None, 1.0, 1000)
    assert not [name for name in found["ci"] if "tpot" in name]


def test_the_server_s_count_goes_before_that_of_the_pieces():
    found = load_metrics(Load([answered(0.0, 1.0, 2.0, 3.0, num_reported=5)], 0.0, 4.0))
    assert (found["total_output_tokens"], found["merged_tokens"], found["mean_tpot_ms"], found["mean_itl_ms"]) == (5, 2, 500, 1000)


# ------------------------------------------------------------------------------------------------ confidence


def test_the_same_seed_gives_the_same_intervals():
    load = Load(many(), 0.0, 20.0)
    first, again, other = (load_metrics(load, seed=seed)["ci"] for seed in (0, 0, 1))
    assert first == again != other


def test_intervals_are_about_what_was_measured_and_shrink_with_the_number():
    few, more = (load_metrics(Load(many(number), 0.0, 0.1 * number), SLO(0.1, 0.1)) for number in (50, 800))
    for found in (few, more):
        for name, (low, high) in found["ci"].items():
            assert low <= found[name] <= high
    for name in ("mean_ttft_ms", "median_e2el_ms", "attainment"):
        widths = [found["ci"][name][1] - found["ci"][name][0] for found in (few, more)]
        assert 0 < widths[1] < widths[0] / 2


def test_the_interval_of_a_mean_is_that_of_theory():
    """1.96 standard errors to either side."""
    records = many(1000)
    low, high = load_metrics(Load(records, 0.0, 100.0))["ci"]["mean_ttft_ms"]
    error = 1e3 * np.std([record.ttft for record in records]) / np.sqrt(1000)
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_the_interval_of_a_quantile_is_resampled_as_it_is_taken():
    """The plain way, one draw after the other: the same up to chance."""
    records, random = many(300), np.random.default_rng(5)
    values = [1e3 * record.ttft for record in records]
    plain = [quantile(random.choice(values, len(values)).tolist(), 0.9) for _ in range(1000)]
    assert load_metrics(Load(records, 0.0, 30.0))["ci"]["p90_ttft_ms"] == pytest.approx(np.quantile(plain, (0.025, 0.975)), rel=0.1)


def test_thirty_of_thirty_are_no_certainty():
    """By Wilson's formula: 1 / (1 + 1.96² / 30)."""
    found = load_metrics(Load([answered(float(place), 0.1) for place in range(30)], 0.0, 30.0), SLO(1, 1))
    assert found["ci"]["attainment"] == pytest.approx([0.8865, 1.0], abs=1e-4)


def test_goodput_s_interval_is_that_of_who_met():
    records, slo = many(400), SLO(0.1, 0.1)
    found = load_metrics(Load(records, 0.0, 40.0), slo)
    met = sum(meets(record, slo) for record in records)
    assert found["ci"]["request_goodput"] == pytest.approx([400 * end / found["duration"] for end in found["ci"]["attainment"]])
    spread = 1.96 * np.sqrt(met / 400 * (1 - met / 400) / 400)
    assert found["ci"]["attainment"][1] - met / 400 == pytest.approx(spread, abs=0.01)
