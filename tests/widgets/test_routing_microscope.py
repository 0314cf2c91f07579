"""The microscope shows both ways as they were forecast, what was measured, and calls its regret an estimate."""

from __future__ import annotations

import pytest

from nanopd.router.explain import Explanation, Measured
from nanopd.router.routing import Decision, Question, Route, Score
from nanopd.widgets.routing_microscope import BARS, RoutingMicroscope, at_real_length, best_other, regret
from nanopd.widgets.strings import set_language

HERE, THERE, FAR = Route.collocated("C0"), Route("P0", "D0"), Route("P1", "D0")


@pytest.fixture(autouse=True)
def english():
    set_language("en")
    yield
    set_language(None)


def score(route, ttft, tpot, steps, objective=None, **terms):
    e2e = ttft + tpot * steps
    return Score(route, {"prefill": ttft, "decode": tpot * steps, **terms}, ttft, tpot, e2e, objective or e2e)


def explanation(request_id="7", taken=HERE, scores=None, e2e=1.0):
    """Forecast for 10 steps; there were 20, at 45 ms each."""
    if scores is None:
        scores = (score(HERE, 0.1, 0.04, 10, others=0.2), score(THERE, 0.2, 0.03, 10, 0.9), score(FAR, 0.3, 0.03, 10, 0.99))
    question = Question(request_id, 100, 64, 1, 1, 0, 5.0, 5.0)
    measured = Measured(str(taken), {"prefill": 0.1, "decode": 0.9}, 0.1, 0.045, e2e)
    return Explanation(question, Decision(taken, scores), measured)


def bar(panel, name):
    trace = panel.figure.data[3 + BARS.index(name)]
    return dict(zip(trace.y, trace.x))


def test_a_bar_for_the_best_of_each_way_and_one_for_what_was_measured():
    panel = RoutingMicroscope([explanation()])
    assert bar(panel, "prefill") == pytest.approx({"C0 ✓": 100, "P0 -> D0": 200, "measured": 100})
    assert bar(panel, "decode") == pytest.approx({"C0 ✓": 400, "P0 -> D0": 300, "measured": 900})
    assert bar(panel, "others") == pytest.approx({"C0 ✓": 200, "P0 -> D0": 0, "measured": 0})


def test_regret_compares_at_the_real_length():
    one = explanation()
    assert at_real_length(one, one.chosen) == pytest.approx(0.1 + 20 * 0.04)
    assert best_other(one).route == THERE and regret(one) == pytest.approx(1.0 - (0.2 + 20 * 0.03))
    said = RoutingMicroscope([one]).sentence
    assert "+200.0 ms" in said and "was not measured" in said and "800.0 ms" in said
    assert regret(explanation(taken=THERE)) == pytest.approx(1.0 - 0.9), "the other way is the one that was not taken"


def test_a_request_is_picked_from_the_list_or_by_a_click():
    panel = RoutingMicroscope([explanation("1"), explanation("2", THERE), explanation("3", THERE)])
    assert panel.picker.value == "1"
    panel.picker.value = "2"
    assert "Request <b>2</b>" in panel.message.value and "P0 -> D0 ✓" in bar(panel, "prefill")
    said_by_page = panel.view._handle_custom_msg
    said_by_page({"clicked": [[1, 1]]}, [])  # the second of those that went the other way
    assert panel.picker.value == "3"
    said_by_page({"clicked": []}, [])
    said_by_page({"clicked": [[2, 0]]}, [])  # the ring around the one that is picked
    said_by_page({"clicked": [[5, 0]]}, [])  # a bar
    assert panel.picker.value == "3"
    with pytest.raises(KeyError, match="there are 1, 2, 3"):
        panel.pick("4")
    assert "Request <b>3</b>" in panel.snapshot().layout.title.text


def test_without_scores_or_another_way_it_says_so():
    assert "gives no scores" in RoutingMicroscope([explanation(scores=())]).sentence
    only = explanation(scores=(score(HERE, 0.1, 0.04, 10),))
    assert regret(only) is None and "was not open" in RoutingMicroscope([only]).sentence


def test_what_has_not_ended_is_left_out():
    panel = RoutingMicroscope([explanation(e2e=None)])
    assert panel.picker.value is None and "Nothing to look at" in panel.message.value
