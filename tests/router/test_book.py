"""The books: exact whatever comes in whatever order, and what the queue is believed to take corrects itself."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from router.script import STOP, Script, destination, in_prefill, lost, prefilled, tokens
from workers.fake_cluster import assert_books_balance

from nanopd.core import BeamSearchParams
from nanopd.cost_model.analytical import StepWork
from nanopd.messages import WriteEnded
from nanopd.router.book import FIELDS, RECENT, Book, Page


def book(script, worker_id):
    return script.central.fleet.workers[worker_id].book


def page(script, worker_id, job="a"):
    got = book(script, worker_id).pages[job]
    return {name: getattr(got, name) for name in FIELDS if getattr(got, name)}


moves = st.lists(st.tuples(st.sampled_from(["seat", "hold", "queue", "compute", "send", "write", "grow", "end", "close"]),
                           st.sampled_from("abc"), st.integers(1, 1000), st.integers(1, 1000)), max_size=60)


def make(book, what, job, x, y):
    """A move, where it can be."""
    page = book.pages.get(job, Page())
    if what in ("seat", "hold"):
        getattr(book, what)(job, x)
    elif what == "queue" and not page.queued:
        book.queue(job, x, y, 0.0)
    elif what == "close":
        book.close(job)
    elif job in book.pages:
        if what == "compute":
            book.compute(job, 1.0)
        elif what == "send":
            book.send(job, x)
        elif what == "write" and not page.decodes and not page.contexts:
            book.write(job, x, y)
        elif what == "grow" and page.decodes:
            book.grow(job)
        elif what == "end" and page.decodes:
            book.end(job, x, y)


@given(moves)
def test_sums_are_those_of_the_pages_and_nothing_is_left_of_what_is_closed(moves):
    book = Book()
    for what, job, x, y in moves:
        make(book, what, job, x, y)
        for name in FIELDS:
            assert getattr(book.total, name) == sum(getattr(page, name) for page in book.pages.values())
    for job in "abc":
        book.close(job)
    assert (book.pages, book.total) == ({}, Page())


def test_a_collocated_request_s_way():
    script = Script("C0", "collocated")
    script.submit("a", n=2)
    script.step()
    assert page(script, "C0") == {"seats": 2, "held": 3, "queued": 3, "pairs": 6.0}
    assert (book(script, "C0").queue_work, book(script, "C0").running) == (StepWork(3, 6.0), StepWork())
    script.step(("C0", tokens("a", 5)))
    assert page(script, "C0") == {"seats": 2, "held": 4, "decodes": 2, "contexts": 7}
    script.step(("C0", tokens("a", 5, index=1)), ("C0", tokens("a", 6, index=1)))
    assert page(script, "C0") == {"seats": 2, "held": 6, "decodes": 2, "contexts": 9}
    script.step(("C0", tokens("a", 7, STOP, index=1)))
    assert page(script, "C0") == {"seats": 1, "held": 4, "decodes": 1, "contexts": 4}
    script.central.cancel("a")
    script.assert_empty()


def test_a_disaggregated_request_s_way():
    script = Script("P0 D0")
    where = in_prefill(script)
    assert page(script, "P0") == {"held": 3, "queued": 3, "pairs": 6.0} and page(script, "D0") == {"seats": 1, "held": 3}
    script.step(("P0", tokens("a")))
    assert page(script, "P0") == {"held": 3, "sending": 3} and page(script, "D0") == {"seats": 1, "held": 3}
    script.step(("P0", prefilled(where, "a")))
    assert book(script, "P0").pages == {} and page(script, "D0") == {"seats": 1, "held": 4, "decodes": 1, "contexts": 4}
    script.step(("D0", tokens("a", 6)))
    assert book(script, "D0").running == StepWork(0, 0.0, 1, 5)
    script.step(("D0", tokens("a", 6, STOP)))
    script.assert_empty()


def test_what_was_cancelled_counts_at_p_until_it_has_stopped():
    script = Script("P0 D0")
    where = in_prefill(script)
    script.central.cancel("a")
    assert page(script, "P0")["queued"] == 3 and book(script, "D0").pages == {}
    script.step(("P0", WriteEnded("a", where)))
    script.assert_empty()


def test_a_beam_search_says_nothing_until_it_is_over_and_counts_as_writing():
    script = Script("C0", "collocated")
    script.submit("a", beam=BeamSearchParams(2, 4))
    script.step()
    assert page(script, "C0") == {"seats": 2, "held": 3, "decodes": 2, "contexts": 6}
    script.step(("C0", tokens("a", 5)), ("C0", tokens("a", 5, STOP)), ("C0", tokens("a", 5, STOP, index=1)))
    script.assert_empty()


def test_a_retry_recomputes_what_is_written():
    script = Script("P0 P1 D0 D1")
    where = in_prefill(script)
    script.step(("P0", tokens("a")), ("P0", prefilled(where, "a")))
    script.step(("D0", tokens("a", 6)))
    script.step(lost("D0"))
    script.step(script.grant("D1", "a/1"))
    assert_books_balance(script.central)
    prefiller = script.central._entries["a"].prefiller
    script.step((prefiller, tokens("a/1")))  # is not taken, but tells that the prompt is computed
    assert page(script, prefiller, "a/1") == {"held": 3, "sending": 3}
    script.step((prefiller, prefilled(destination(script, "a"), "a/1")))
    assert page(script, "D1", "a/1") == {"seats": 1, "held": 5, "decodes": 1, "contexts": 5}


def test_the_queue_s_time_restarts_with_each_first_token():
    script = Script("C0", "collocated")
    script.submit("a", "b")
    script.step()
    start = script.clock.now
    assert book(script, "C0").queued_since == start
    script.clock.now += 2
    script.submit("c")
    script.step()
    assert book(script, "C0").queued_since == start
    script.step(("C0", tokens("a")))
    assert book(script, "C0").queued_since == start + 2 and book(script, "C0").queue_work.prompt_tokens == 6
    script.clock.now += 1
    script.step(("C0", tokens("a")))
    assert book(script, "C0").queued_since == start + 2


def test_how_many_prompts_came_lately_fades():
    book = Book()
    assert book.prompts_per_second(7.0) == (0, 0)
    for number in range(1000):  # 5 a second
        book.count(100, number / 5)
    prompts, tokens = book.prompts_per_second(200.0)
    assert prompts == pytest.approx(5, rel=0.02) and tokens == pytest.approx(500, rel=0.02)
    assert book.prompts_per_second(200.0 + 5 * RECENT)[0] < 0.05


@pytest.mark.parametrize("begin", [0.0, 500.0])
def test_how_many_prompts_come_is_known_soon_after_they_begin_to_come(begin):
    """Also where some came long ago."""
    book = Book()
    book.count(100, 0.0)
    for number in range(21):  # 10 a second
        book.count(100, begin + number / 10)
    assert book.prompts_per_second(begin + 2.0)[0] == pytest.approx(10, rel=0.1)


def test_the_first_prompt_makes_no_crowd():
    book = Book()
    book.count(100, 7.0)
    assert book.prompts_per_second(7.0) == (1.0, 100.0)
