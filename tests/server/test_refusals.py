"""What is not served is said in OpenAI's form, and leaves nothing behind."""

from __future__ import annotations

import json
import socket
import threading
import time

import httpx
import openai
import pytest
from server.harness import LONG, running, until

from nanopd.cluster import Cluster
from nanopd.server import app
from nanopd.server.answering import ServerLimits

GOOD = dict(prompt="What is 47+35?", temperature=0)
HELLO = [{"role": "user", "content": "hello"}]


def error_of(response, status, **expected):
    """The error of a refusal, in OpenAI's form."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert {name: error[name] for name in expected} == expected
    return error["message"]


@pytest.fixture(scope="module")
def server(one_server):
    yield one_server
    assert one_server.is_empty()
    assert one_server.post(**GOOD).json()["choices"][0]["text"] == "82"


# ------------------------------------------------------------------------------------------ what is asked wrongly


@pytest.mark.parametrize("body, param, says", [
    ({}, "prompt", "required"),
    ({"prompt": None}, "prompt", "a text, a list of texts"),
    ({"prompt": []}, "prompt", "none of them empty"),
    ({"prompt": ["a", 1]}, "prompt", "a text, a list of texts"),
    ({"prompt": [True]}, "prompt", "a text, a list of texts"),
    ({"prompt": ["a"] * 129}, "prompt", "128 are the most"),
    ({"prompt": [[]]}, None, "the prompt is empty"),
    ({"prompt": [1, 10**9]}, None, "the vocabulary goes from 0"),
    ({"prompt": [-1]}, None, "the vocabulary goes from 0"),
    ({"prompt": [5] * 5000}, None, "the context holds 4096"),
    ({"prompt": "\ud800"}, None, "not valid Unicode"),
    ({**GOOD, "temperature": "hot"}, "temperature", "got 'hot'"),
    ({**GOOD, "temperature": -1}, None, "temperature must be a number >= 0"),
    ({**GOOD, "temperature": 1e300}, "temperature", "less than or equal"),
    ({**GOOD, "top_p": 0}, None, "top_p must be in (0, 1]"),
    ({**GOOD, "top_k": 10**400}, "top_k", "less than"),
    ({**GOOD, "repetition_penalty": 1e-200}, "repetition_penalty", "greater than or equal"),
    ({**GOOD, "max_tokens": 0}, None, "max_tokens must be an integer of at least 1"),
    ({**GOOD, "max_tokens": 1.5}, "max_tokens", "integer"),
    ({**GOOD, "n": True}, "n", "integer"),
    ({**GOOD, "n": 2}, None, "temperature 0 would give the same answer"),
    ({"prompt": "x", "n": 65}, None, "a batch holds 64"),
    ({**GOOD, "seed": 2**63}, "seed", "less than"),
    ({**GOOD, "min_tokens": 20}, None, "must not exceed max_tokens"),
    ({**GOOD, "logprobs": 65}, None, "from 0 to 64"),
    ({**GOOD, "logprobs": 1, "echo": True}, "echo", "no logprobs of prompts"),
    ({**GOOD, "stop": ["x"] * 17}, "stop", "at most 16"),
    ({**GOOD, "stop": ""}, None, "non-empty"),
    ({**GOOD, "stop_token_ids": [10**6]}, None, "the vocabulary goes from 0"),
    ({**GOOD, "stream_options": {"include_usage": True}}, "stream_options", '"stream": true only'),
    ({**GOOD, "tempersture": 1}, "tempersture", "known are echo"),
    ({**GOOD, "presence_penalty": 0.5}, "presence_penalty", "not supported here"),
    ({**GOOD, "best_of": 3}, "best_of", "not supported here"),
    ({**GOOD, "logit_bias": {"5": -100}}, "logit_bias", "not supported here"),
])
def test_invalid_completions(server, body, param, says):
    response = server.http.post("/v1/completions", content=json.dumps(body), headers={"content-type": "application/json"})
    assert says in error_of(response, 400, param=param, type="invalid_request_error")


@pytest.mark.parametrize("body, says", [
    ({}, "messages: field required"),
    ({"messages": []}, "give at least one"),
    ({"messages": "hello"}, "valid list"),
    ({"messages": [{"role": "user"}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "a part of type 'image_url'"),
    ({"messages": HELLO, "top_logprobs": 2}, '"logprobs": true only'),
    ({"messages": HELLO, "logprobs": True, "top_logprobs": 21}, "less than or equal to 20"),
    ({"messages": HELLO, "tools": [{"type": "function"}]}, "tools is not supported here"),
    ({"messages": HELLO, "response_format": {"type": "json_object"}}, "response_format is not supported here"),
    ({"messages": HELLO, "max_completion_tokens": 0}, "at least 1"),
    ({"messages": HELLO, "prompt": "x"}, "unknown field 'prompt'"),
])
def test_invalid_chats(server, body, says):
    assert says in error_of(server.post("/v1/chat/completions", **body), 400)


def test_fields_that_change_nothing_are_let_pass(server):
    plain = server.post(**GOOD).json()["choices"]
    assert plain == server.post(**GOOD, user="me", metadata={"a": "b"}, store=False, presence_penalty=0, frequency_penalty=0.0,
                                best_of=1, logit_bias={}, suffix=None, n=1, logprobs=None, seed=None).json()["choices"]


@pytest.mark.parametrize("body, says", [
    (b"", "not valid JSON"), (b"{", "not valid JSON"), (b'{"prompt": "x",}', "not valid JSON"), (b"\xff\xfe\x00", "not valid JSON"),
    (b"[" * 100_000, "not valid JSON"), (b"9" * 5000, "not valid JSON"), (b"[]", "must be a JSON object"),
    (b'"hello"', "must be a JSON object"), (b"null", "must be a JSON object"),
])
def test_malformed_bodies(server, body, says):
    for path in ("/v1/completions", "/v1/chat/completions"):
        response = server.http.post(path, content=body, headers={"content-type": "application/json; charset=utf-8"})
        assert says in error_of(response, 400)


def test_other_content_types_are_refused_so_that_web_pages_can_not_post_here(server):
    response = server.http.post("/v1/completions", content=json.dumps(GOOD), headers={"content-type": "text/plain"})
    assert "application/json" in error_of(response, 415)


@pytest.mark.parametrize("times, arrives", [(2, True), (40, False)])
def test_bodies_over_the_bound(times, arrives):
    limits = ServerLimits(max_body=10_000)
    with running(limits=limits) as server:
        content = json.dumps({**GOOD, "prompt": "x" * times * limits.max_body}).encode()
        pieces = [content[begin : begin + 5000] for begin in range(0, len(content), 5000)]
        for body in (content, iter(pieces)):  # with its length said before, and in pieces without
            try:
                response = server.http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
            except httpx.TransportError:
                assert not arrives  # it was hung up on while it still sent
            else:
                error_of(response, 413, code="request_too_large")
        almost = {**GOOD, "prompt": [5] * 1000}
        assert len(json.dumps(almost)) < limits.max_body
        assert server.post(**almost).status_code == 200


def test_a_body_that_does_not_come():
    with running(limits=ServerLimits(body_seconds=0.3)) as server, socket.create_connection((server.host, server.port)) as raw:
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n{")
        assert raw.recv(1000).startswith(b"HTTP/1.1 408")


def test_unknown_models_paths_and_methods(server):
    error_of(server.post(**GOOD, model="gpt-5"), 404, code="model_not_found", param="model")
    error_of(server.http.get("/v1/models/gpt-5"), 404, code="model_not_found")
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-5'; served is 'tiny'"):
        server.openai.completions.create(model="gpt-5", prompt="x")
    error_of(server.post("/v1/embeddings", **GOOD), 404)
    error_of(server.http.get("/v1/completions"), 405)
    error_of(server.http.get("/"), 404)


def test_the_openai_client_raises_its_own_errors(server):
    with pytest.raises(openai.BadRequestError, match="top_p must be in") as caught:
        server.openai.completions.create(model="tiny", prompt="x", top_p=2)
    assert caught.value.type == "invalid_request_error"


def test_api_key():
    with running(api_key="sesame") as server:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "sesame"}, {"authorization": "Bearer sésame".encode()}):
            error_of(server.http.post("/v1/completions", json=GOOD, headers=headers), 401, code="invalid_api_key")
            error_of(server.http.get("/v1/models", headers=headers), 401)
        assert server.http.get("/health").status_code == 200
        with_key = openai.OpenAI(base_url=f"{server.url}/v1", api_key="sesame", max_retries=0)
        assert with_key.completions.create(model="tiny", prompt=GOOD["prompt"], temperature=0).choices[0].text == "82"


# ------------------------------------------------------------------------------------------------- too much


def held(server, **body):
    """A stream that has begun, as a context."""
    return server.http.stream("POST", "/v1/completions", json={**LONG, "stream": True, **body})


def refused_while_one_is_open(server, **body):
    """The error of a request while another one streams; when that has gone, the same request is served."""
    with held(server) as stream:
        lines = stream.iter_lines()  # the stream is closed where nobody holds them
        next(lines)
        with httpx.Client(base_url=server.url) as other:
            refusal = other.post("/v1/completions", json={**GOOD, **body})
        says = error_of(refusal, 429, type="rate_limit_error", code="overloaded")
        assert refusal.headers["retry-after"] == "1"
        with pytest.raises(openai.RateLimitError):
            server.openai.completions.create(model="tiny", **GOOD, extra_body=body)
    until(server.is_empty)
    assert server.post(**GOOD, **body).status_code == 200
    assert server.metrics()['nanopd_requests_total{endpoint="/v1/completions",outcome="dropped"}'] == 2
    return says


def test_the_cluster_is_full():
    with running(max_queued=1) as server:
        assert "max_queued" in refused_while_one_is_open(server)
        error_of(server.post(**{**GOOD, "prompt": ["a", "b"]}), 429)  # one was let in, and taken back
        until(server.is_empty)


def test_too_many_streams():
    with running(limits=ServerLimits(max_streams=1)) as server:
        assert "1 answers are being streamed" in refused_while_one_is_open(server, stream=True)
        with held(server) as stream:
            lines = stream.iter_lines()
            next(lines)
            assert server.openai.completions.create(model="tiny", **GOOD).choices[0].text == "82"


def test_too_many_requests():
    with running(limits=ServerLimits(max_requests=1)) as server:
        assert "1 requests are open" in refused_while_one_is_open(server)


# ------------------------------------------------------------------------------------- what breaks on the way


def data_of(lines):
    return [line.removeprefix("data: ") for line in lines if line]


def test_an_answer_that_takes_too_long():
    with running(limits=ServerLimits(timeout=0.3)) as server:
        assert "timed out" in error_of(server.post(**LONG), 504, code="timeout")
        with held(server) as stream:
            *_, error, done = data_of(stream.iter_lines())
        assert done == "[DONE]" and json.loads(error)["error"]["code"] == "timeout"
        with pytest.raises(openai.APIError, match="timed out"):
            list(server.openai.completions.create(model="tiny", prompt="x", max_tokens=3000, stream=True,
                                                  extra_body={"ignore_eos": True}))
        until(server.is_empty)
        assert server.metrics()['nanopd_requests_total{endpoint="/v1/completions",outcome="failed"}'] == 3


def test_a_cluster_that_fails_is_said_to_all_and_the_server_stays_up(monkeypatch):
    with running() as server:
        with held(server) as stream:
            lines = stream.iter_lines()
            next(lines)

            def fail(timeout):
                raise ZeroDivisionError("an engine's bug")

            monkeypatch.setattr(server.driver._cluster, "step", fail)
            *_, error, done = data_of(lines)
        assert done == "[DONE]" and "ZeroDivisionError: an engine's bug" in json.loads(error)["error"]["message"]
        assert "an engine's bug" in error_of(server.post(**GOOD), 503, code="unavailable")
        health = server.http.get("/health")
        assert health.status_code == 503 and "restart" in health.json()["reason"]
        assert server.http.get("/metrics").status_code == 200
        assert server.num_open() == 0


class Losing(Cluster):
    """A cluster whose workers are said to be lost."""

    said: str | None = None

    @property
    def lack(self):
        return self.said


def test_lost_workers_are_noticed_while_nothing_is_asked():
    with running(make_cluster=lambda: Losing("tiny", "C:cpu", "collocated")) as server:
        assert server.post(**GOOD).status_code == 200
        server.driver._cluster.said = "no collocated worker is left: C0 was lost (killed by SIGKILL)"
        until(lambda: server.http.get("/health").status_code == 503)
        assert "C0 was lost" in error_of(server.post(**GOOD), 503)
        assert "C0 was lost" in error_of(server.post(**GOOD, stream=True), 503)


def test_a_bug_met_by_one_request_is_that_request_s_alone(monkeypatch):
    with running() as server:
        submit = server.driver._cluster.submit

        def picky(prompt, sampling, **options):
            if sampling.max_tokens == 13:
                raise ZeroDivisionError("thirteen")
            return submit(prompt, sampling, **options)

        monkeypatch.setattr(server.driver._cluster, "submit", picky)
        assert "thirteen" in error_of(server.post(**GOOD, max_tokens=13), 500, type="server_error")
        assert server.post(**GOOD).status_code == 200


def test_a_driver_with_nothing_to_do_sleeps(monkeypatch):
    with running() as server:
        assert server.post(**GOOD).status_code == 200
        turns, turn = [], server.driver._turn
        monkeypatch.setattr(server.driver, "_turn", lambda: (turns.append(1), turn()))
        time.sleep(2.5)
        assert 1 <= len(turns) <= 4


def test_metrics_do_not_wait_for_busy_workers(monkeypatch):
    monkeypatch.setattr(app, "STATUS_WAIT", 0.05)
    with running() as server:
        busy = threading.Event()
        held_up = server.driver.call(lambda cluster: busy.wait(30))
        said = server.metrics()
        busy.set()
        assert held_up.result(30)
        assert not any(name.startswith("nanopd_kv_blocks") for name in said) and said["nanopd_requests_open"] == 0
        assert server.post(**GOOD).status_code == 200 and server.is_empty()
