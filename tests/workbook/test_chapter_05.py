"""Chapter 05's checks tell right from wrong, and its lab breaks what it says it breaks."""

from __future__ import annotations

import pytest

from nanopd import Cluster, SamplingParams
from nanopd.messages import Prefill, Prefilled, ReleaseLease, Reserve, Resume
from nanopd.tiny import recall_prompt
from nanopd.widgets.strings import set_language
from nanopd.workbook import streams
from nanopd.workbook.check import check

GREEDY = SamplingParams(temperature=0, max_tokens=8)


@pytest.fixture(autouse=True, params=[pytest.param("en", marks=pytest.mark.nightly), "zh"])
def language(request, monkeypatch):
    monkeypatch.delenv("NANOPD_STRICT_CHECKS", raising=False)
    set_language(request.param)
    yield request.param
    set_language(None)


# ------------------------------------------------------------------------------------ 05.4, the blocks of a chunk


def blocks_to_send(num_sent, num_cached, num_new, block_size):
    computed = num_cached + num_new
    return range(0) if computed <= num_sent else range(num_sent // block_size, -(-computed // block_size))


def test_the_blocks_of_a_chunk():
    assert check("05.4", blocks_to_send)


@pytest.mark.parametrize("theirs", [
    lambda sent, cached, new, size: range(cached // size, -(-(cached + new) // size)),
    lambda sent, cached, new, size: range(-(-sent // size), -(-(cached + new) // size)),
    lambda sent, cached, new, size: range(sent // size, (cached + new) // size),
    lambda sent, cached, new, size: range(sent // size, -(-(cached + new) // size)),
    lambda sent, cached, new, size: range(-(-(cached + new) // size)),
], ids=["the chunk's own", "half full once", "only full ones", "preempted again", "all"])
def test_other_blocks_are_named(theirs):
    result = check("05.4", theirs)
    assert not result and result.hint and "[" in result.failures[0].message


# ----------------------------------------------------------------------------------------- 05.7, a worker is lost


def retry(tell, p0, d1, request, written, *, resume_with=None, shown_from=0, extra=()):
    [granted] = tell(d1, Reserve(request))
    said = tell(p0, Prefill(request, granted.destination))
    while not any(isinstance(message, Prefilled) for message in said):
        said = tell(p0)
    first = said[0].events
    answers = said[-1].written if resume_with == "prefilled" else [written]
    said = tell(d1, Resume(request.request_id, granted.destination.lease_id, answers), *extra)
    while d1.has_work:
        said += tell(d1)
    events = [event for message in said for event in message.events]
    return [event.token_id for event in (first + events if shown_from < 0 else events[shown_from:])]


def test_a_retry_by_token_ids():
    assert check("05.7", retry)


@pytest.mark.parametrize("fault", [dict(resume_with="prefilled"), dict(shown_from=-1), dict(shown_from=1)],
                         ids=["begun again", "first token twice", "gap"])
def test_a_gap_or_a_repeat_is_found_out(fault):
    result = check("05.7", lambda *given: retry(*given, **fault))
    assert not result and result.hint


def test_what_is_left_on_a_worker_is_found_out():
    def careless(tell, p0, d1, request, written):
        tell(d1, Reserve(request))  # and nobody releases it
        return retry(tell, p0, d1, request, written)

    result = check("05.7", careless)
    assert not result and ("lease" in result.failures[0].message or "租约" in result.failures[0].message)


def test_whoever_does_not_wait_for_the_prompt_is_told(language):
    def hurried(tell, p0, d1, request, written):
        [granted] = tell(d1, Reserve(request))
        tell(p0, Prefill(request, granted.destination))
        tell(d1, Resume(request.request_id, granted.destination.lease_id, [written]), ReleaseLease(granted.destination.lease_id, "writer"))
        return []

    assert not check("05.7", hurried)


# ----------------------------------------------------------------------------------------- 05.9, the event wait

QUESTIONS = [recall_prompt(seed, 600, "en") for seed in range(40, 43)]


class Mended(streams.HastyTransport):
    def send(self, layers, source_blocks, destination_blocks):
        self.stream.wait_event(layers.stop - 1)
        return super().send(layers, source_blocks, destination_blocks)


def ask(cluster, transport):
    streams.use(cluster, transport)
    outputs = [cluster.generate(question.prompt, GREEDY, use_tqdm=False)[0] for question in QUESTIONS]
    for worker in cluster.workers.values():
        worker.manager.check()
        assert not worker.transfers and not worker.manager.leases
    return [output.outputs[0].text for output in outputs]


@pytest.fixture
def cluster():
    with Cluster("tiny", "P:cpu D:cpu", "disaggregated", dtype="float32", enable_prefix_caching=False) as cluster:
        yield cluster


@pytest.mark.parametrize("transport", [streams.StreamTransport, Mended])
def test_behind_its_event_every_copy_is_right(cluster, transport):
    assert ask(cluster, transport) == [question.answer for question in QUESTIONS]


def test_without_the_event_the_prompt_before_is_sent(cluster):
    answers = ask(cluster, streams.HastyTransport)
    assert [answer[0] for answer in answers] == [question.answer[0] for question in QUESTIONS], "P draws it from its own cache"
    for before, answer in zip(QUESTIONS, answers[1:]):
        assert answer[1:] == before.answer[1:]


def test_a_stream_runs_in_order_and_no_earlier_than_its_events():
    stream, log = streams.CopyStream(), []
    stream.begin_step()
    stream.launch(lambda: log.append("free"))
    for layer in (0, 2):
        stream.wait_event(layer)
        stream.launch(lambda layer=layer: log.append(layer))
    assert log == ["free"] and not stream.wait()
    stream.record_event(0)
    stream.record_event(1)
    assert log == ["free", 0]
    stream.record_event(2)
    assert log == ["free", 0, 2] and stream.wait()
