"""A load on a server: one of this test's own, which answers as it is told to, well or badly."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
from contextlib import contextmanager

import numpy as np
import pytest

from nanopd.benchmark.load import Schedule, Stopped
from nanopd.benchmark.load.endpoint import (
    API_KEY,
    FORMS,
    WORDS,
    EndpointError,
    completions_url,
    find_form,
    serve_endpoint,
)
from nanopd.simulator.workload import Arrival

HEAD = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
LENGTH = "HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"


class Server:
    """Answers with `answer(server, body, write)`, a coroutine; `write(text)` sends. Keeps what it was asked, and the headers."""

    def __init__(self, answer):
        self.answer, self.asked, self.headers, self.open, self.most_open = answer, [], [], 0, 0

    async def __call__(self, reader, writer):
        self.open += 1
        self.most_open = max(self.most_open, self.open)

        async def write(text):
            writer.write(text if isinstance(text, bytes) else text.encode())
            await writer.drain()

        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            length = int(head.split("content-length:")[1].split("\r\n")[0])
            self.headers.append(head)
            self.asked.append(json.loads(await reader.readexactly(length)))
            await self.answer(self.asked[-1], write)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client has gone, or the test is over
        finally:
            self.open -= 1
            writer.close()


@contextmanager
def serving(answer):
    """The server, in a thread of its own, and its URL."""
    server, loop, ready, found = Server(answer), asyncio.new_event_loop(), threading.Event(), {}

    async def run():
        found["done"] = asyncio.Event()
        listening = await asyncio.start_server(server, "127.0.0.1", 0)
        found["port"] = listening.sockets[0].getsockname()[1]
        ready.set()
        await found["done"].wait()
        listening.close()
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    thread = threading.Thread(target=loop.run_until_complete, args=(run(),))
    thread.start()
    ready.wait(10)
    try:
        yield server, f"http://127.0.0.1:{found['port']}"
    finally:
        loop.call_soon_threadsafe(found["done"].set)
        thread.join(10)
        loop.close()


def event(text="x", reason=None, **more):
    return f"data: {json.dumps({'choices': [{'text': text, 'finish_reason': reason}], **more}, ensure_ascii=False)}\n\n"


def usage(number):
    return f"data: {json.dumps({'choices': [], 'usage': {'completion_tokens': number}})}\n\n"


async def good(body, write, delay=0.0):
    """As vLLM does: a piece for each token, the last with the reason, then the usage."""
    await asyncio.sleep(delay)
    await write(HEAD)
    for number in range(body["max_tokens"]):
        await write(event(reason="length" if number == body["max_tokens"] - 1 else None))
    await write(usage(body["max_tokens"]) + "data: [DONE]\n\n")


def error(status, body):
    async def answer(asked, write):
        text = body if isinstance(body, str) else json.dumps(body)
        await write(LENGTH.format(status=status, length=len(text), body=text))
    return answer


def at(*times, prompt=6, answer=3):
    return Schedule([Arrival(time, prompt, answer) for time in times], 0.0, 100.0)


def served(answer, schedule=None, **options):
    with serving(answer) as (server, url):
        return server, serve_endpoint(url, schedule or at(0.0), "some-model", **options).records


# -------------------------------------------------------------------------------------------- what is asked


def test_what_is_sent_and_what_came_back(monkeypatch):
    monkeypatch.setenv(API_KEY, "sesame")
    server, records = served(good, at(0.0, 0.02, 0.04, prompt=9, answer=4))
    assert [(one.status, one.num_tokens, one.num_reported, len(one.tokens)) for one in records] == [("completed", 4, 4, 4)] * 3
    assert all(one.sent < one.tokens[0] <= one.tokens[-1] <= one.ended for one in records)
    for body in server.asked:
        assert len(body["prompt"]) == 9 and all(0 <= token < FORMS[0].vocab_size for token in body["prompt"])
        assert (body["model"], body["max_tokens"], body["ignore_eos"], body["stream"]) == ("some-model", 4, True, True)
    assert all("authorization: bearer sesame" in head for head in server.headers)


def test_without_a_key_none_is_sent(monkeypatch):
    monkeypatch.delenv(API_KEY, raising=False)
    server, _ = served(good)
    assert "authorization" not in server.headers[0]


def test_prompts_as_text_where_ids_are_not_taken():
    server, _ = served(good, form=FORMS[-1])
    words = server.asked[0]["prompt"].split()
    assert len(words) == 6 and set(words) <= set(WORDS)


@pytest.mark.parametrize("url", ["http://a:8000", "http://a:8000/", "http://a:8000/v1", "http://a:8000/v1/completions"])
def test_urls(url):
    assert completions_url(url) == "http://a:8000/v1/completions"


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://a", "http://"])
def test_what_is_no_url(url):
    with pytest.raises(EndpointError, match="an endpoint is a URL such as http://localhost:8000"):
        find_form(url, "some-model")


@pytest.mark.parametrize("takes, form", [(lambda prompt: True, 0), (lambda prompt: max(prompt) < 1664, 1),
                                         (lambda prompt: isinstance(prompt, str), 2)])
def test_how_a_server_takes_prompts_is_found_out(takes, form):
    async def picky(body, write):
        await (good if takes(body["prompt"]) else error(400, {"error": {"message": "not such a prompt"}}))(body, write)

    with serving(picky) as (_, url):
        assert find_form(url, "some-model") is FORMS[form]


def test_a_model_that_is_not_there_is_said_in_the_server_s_words():
    with serving(error(404, {"error": {"message": "The model `some-model` does not exist."}})) as (_, url):
        with pytest.raises(EndpointError, match="does not answer for the model 'some-model': HTTP 404: The model `some-model` does"):
            find_form(url, "some-model")


# ------------------------------------------------------------------------------------------------- an open loop


def test_a_server_that_never_answers_holds_back_no_arrival():
    """Forty requests within 0.4 s, all of them open at the same time, none sent later than the machine is slow."""
    async def never(body, write):
        await asyncio.sleep(60)

    server, records = served(never, at(*(0.01 * number for number in range(40))), timeout=1.5)
    assert server.most_open == 40
    assert {(one.status, one.error) for one in records} == {("failed", "no end within 1.5 s")}
    assert all(one.ended - one.sent >= 1.5 and one.lateness < 1.0 for one in records)


def test_a_slow_server_s_times_are_those_of_its_pieces():
    async def slow(body, write):
        await asyncio.sleep(0.2)
        await write(HEAD)
        for number in range(3):
            await write(event(reason="length" if number == 2 else None))
            await asyncio.sleep(0.1)
        await write("data: [DONE]\n\n")

    _, (one,) = served(slow)
    assert one.ttft >= 0.2 and one.tpot >= 0.08 and len(one.tokens) == 3
    assert all(gap >= 0.08 for gap in one.itl) and one.num_reported is None


def test_how_far_it_is_is_told():
    tallies = []

    async def slow(body, write):
        await good(body, write, delay=1.2)

    served(slow, at(0.0, 0.1, 1.4), progress=tallies.append)
    assert tallies[0].seconds >= 1 and tallies[0].total == 3 and tallies[0].sent >= 2


def test_ctrl_c_gives_what_there_is():
    """One is over, one is open, one not sent yet."""
    async def only_the_first(body, write):
        if len(body["prompt"]) == 7:
            await asyncio.sleep(1.0)  # by then the client has read the first one's end
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(60)
        await good(body, write)

    schedule = Schedule([Arrival(0.0, 6, 3), Arrival(0.1, 7, 3), Arrival(50.0, 7, 3)], 0.0, 100.0)
    with serving(only_the_first) as (_, url), pytest.raises(Stopped) as stopped:
        serve_endpoint(url, schedule, "some-model")
    load = stopped.value.load
    assert [(one.status, one.error) for one in load.records] == [("completed", None), ("failed", "the load was stopped")]
    assert 0 < load.end < 50


def test_within_a_running_loop_as_a_notebook_has_one():
    async def cell():
        return served(good)

    _, records = asyncio.run(cell())
    assert records[0].status == "completed"


# ------------------------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("status", [429, 503])
def test_who_is_refused_is_dropped_and_the_others_go_on(status):
    async def full(body, write):
        answer = error(status, {"error": {"message": "too many requests"}}) if len(body["prompt"]) == 7 else good
        await answer(body, write)

    _, records = served(full, Schedule([Arrival(0.0, 6, 3), Arrival(0.02, 7, 3), Arrival(0.04, 6, 3)], 0.0, 1.0))
    assert [one.status for one in records] == ["completed", "dropped", "completed"]
    assert records[1].error == f"HTTP {status}: too many requests" and records[1].ended is not None and not records[1].tokens


@pytest.mark.parametrize("status, body, says", [
    (400, {"error": {"message": "the prompt is too long"}}, "HTTP 400: the prompt is too long"),
    (422, {"detail": [{"msg": "no such field"}]}, "HTTP 422: [{'msg': 'no such field'}]"),
    (500, "<h1>Oops</h1>", "HTTP 500: <h1>Oops</h1>"),
    (404, [], "HTTP 404: []"),
])
def test_other_errors_are_failures_with_the_server_s_words(status, body, says):
    _, (one,) = served(error(status, body))
    assert (one.status, one.error) == ("failed", says)


def test_a_dead_server():
    with serving(good) as (_, url):
        pass
    one, two = serve_endpoint(url, at(0.0, 0.1), "some-model").records
    assert one.status == two.status == "failed" and one.error.startswith("no connection: ")


@pytest.mark.parametrize("pieces, says", [
    ([HEAD, event(), event()], "the stream broke off after 2 pieces"),
    ([HEAD, event(), "data: {\"error\": {\"message\": \"the engine died\"}}\n\n"], "the engine died"),
    ([HEAD, event(), "data: {\"choi\n\n"], "no JSON object"),
    ([HEAD, "data: 7\n\n"], "no JSON object"),
    ([HEAD, "data: [DONE]\n\n"], "broke off after 0 pieces"),
    ([HEAD, event("", "stop"), "data: [DONE]\n\n"], "no tokens"),
    (["HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", "5\r\ndata"], "the connection broke off: 4 bytes read"),
    (["HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", "data: {}"], "the connection broke off"),
    (["SSH-2.0-server\r\n\r\n"], "this is no HTTP/1.1: 'SSH-2.0-server'"),
    ([], "the connection broke off: 0 bytes read"),
])
def test_streams_that_break_are_failures(pieces, says):
    async def cut(body, write):
        for piece in pieces:
            await write(piece)

    _, (one,) = served(cut)
    assert one.status == "failed" and says in one.error


@pytest.mark.parametrize("stream", [
    event() + event() + event("", "length"),  # the end on its own, and neither usage nor [DONE]
    (event() + event() + event("", "length") + usage(2) + "data: [DONE]\n\n").replace("\n", "\r\n").replace("data: ", "data:"),
    ": hello\n\nevent: message\nid: 7\n" + event("", None) + ": still there\n\n" + event("\u2028", "length") + "data:\n\ndata: [DONE]\n\n",
    event() + f"data: {json.dumps({'choices': [{'text': 'x', 'finish_reason': 'length'}], 'usage': {'completion_tokens': 2}})}\n\n",
    event(usage=None) + event(reason="length", usage={"completion_tokens": 2}, error=None),
])
@pytest.mark.parametrize("at_once", [3, 10_000])
def test_streams_that_are_written_otherwise(stream, at_once):
    """Also cut anywhere: in the middle of a line, of a character."""
    async def other(body, write):
        await write(HEAD)
        data = stream.encode()
        for begin in range(0, len(data), at_once):
            await write(data[begin: begin + at_once])
            await asyncio.sleep(0)

    _, (one,) = served(other)
    assert (one.status, one.num_tokens, len(one.tokens)) == ("completed", 2, 2)


def test_a_body_in_chunks():
    """As HTTP/1.1 sends what has no length: pieces under their size, also with something after it."""
    async def chunked(body, write):
        await write("HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\n\r\n")
        for piece in (event(), event(reason="length")[:20], event(reason="length")[20:], usage(2)):
            await write(f"{len(piece):X};x=y\r\n{piece}\r\n")
        await write("0\r\n\r\n")

    _, (one,) = served(chunked)
    assert (one.status, one.num_tokens, len(one.tokens)) == ("completed", 2, 2)


def test_pieces_of_several_tokens_are_seen_by_the_usage():
    async def merged(body, write):
        await write(HEAD + event() + event("three words more", "length") + usage(4) + "data: [DONE]\n\n")

    _, (one,) = served(merged)
    assert (one.num_tokens, len(one.tokens)) == (4, 2)


def test_prompts_are_the_same_for_the_same_seed():
    asked = [served(good, seed=seed)[0].asked[0]["prompt"] for seed in (1, 1, 2)]
    assert asked[0] == asked[1] != asked[2]
    assert np.array(asked).max() > 1000  # of the whole vocabulary
