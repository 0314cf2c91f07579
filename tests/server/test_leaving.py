"""Clients that leave, or do not read; a server that is told to stop. Nothing is left behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress

import httpx
import psutil
import pytest
from server.harness import LONG, running, served, until

from nanopd.server import job

GOOD = dict(prompt="What is 47+35?", temperature=0)


@contextmanager
def raw_stream(server, receive_buffer=None, **body):
    """A connection on which a stream was asked for, and from which nothing is read."""
    content = json.dumps({**LONG, "stream": True, **body}).encode()
    with socket.socket() as raw:
        if receive_buffer:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        raw.connect((server.host, server.port))
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                    + f"content-length: {len(content)}\r\n\r\n".encode() + content)
        yield raw


def outcome(server, name):
    return server.metrics().get(f'nanopd_requests_total{{endpoint="/v1/completions",outcome="{name}"}}', 0)


# ---------------------------------------------------------------------------------------------- who leaves


@pytest.mark.parametrize("body", [{"stream": True}, {"stream": False}, {"stream": True, "n": 3, "temperature": 1.0},
                                  {"stream": False, "prompt": ["a", "b", "c"]}], ids=str)
def test_a_client_that_leaves_ends_its_request_and_frees_every_block(server, body):
    before = outcome(server, "cancelled")
    with raw_stream(server, **body):
        until(lambda: server.driver.num_open()[1] > 0)
        assert any(server.used_blocks().values()) and not server.is_empty()
    until(server.is_empty)
    assert outcome(server, "cancelled") == before + 1
    assert server.metrics()["nanopd_streams_open"] == 0
    assert server.post(**GOOD).json()["choices"][0]["text"] == "82"


def test_a_client_that_leaves_before_its_body_has_come(server):
    before = outcome(server, "cancelled")
    with socket.create_connection((server.host, server.port)) as raw:
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n{")
        until(lambda: server.metrics()["nanopd_requests_open"] == 1)
    until(lambda: server.metrics()["nanopd_requests_open"] == 0)
    assert outcome(server, "cancelled") == before + 1


# ------------------------------------------------------------------------------------------- who reads slowly


def test_who_does_not_read_is_given_up_and_others_are_served(monkeypatch):
    monkeypatch.setattr(job, "MOST_UNREAD", 50)
    with running(send_buffer=4096) as server, raw_stream(server, receive_buffer=4096, logprobs=20) as raw:
        until(lambda: server.num_open() == 1)
        for _ in range(3):
            assert server.post(**GOOD).json()["choices"][0]["text"] == "82"
        until(server.is_empty)
        assert server.metrics()["nanopd_generated_tokens_total"] < LONG["max_tokens"] / 2
        said = b""
        while b"[DONE]" not in said:
            said += raw.recv(2**16)
        assert b"50 tokens of it waited to be read" in said
        until(lambda: outcome(server, "failed") == 1)


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="the system can't cut connections that stall")
def test_who_takes_nothing_is_cut_off_in_the_end():
    with running(stalled=0.5, send_buffer=4096) as server, raw_stream(server, receive_buffer=4096, logprobs=20):
        until(lambda: outcome(server, "cancelled") == 1, 60)
        until(server.is_empty)
        assert server.metrics()["nanopd_streams_open"] == 0


# ------------------------------------------------------------------------------------------------- the end


def test_open_requests_are_told_when_the_server_stops():
    with running(grace=0.2) as server:
        with server.http.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as stream:
            lines = stream.iter_lines()
            next(lines)
            server.server.should_exit = True
            *_, error, done = [line.removeprefix("data: ") for line in lines if line]
        assert done == "[DONE]" and json.loads(error)["error"]["message"] == "the server is stopping"
    assert not server.driver._thread.is_alive() and server.driver._cluster._is_shut_down


def test_a_short_request_may_end_when_the_server_stops():
    with running(grace=20.0) as server:
        with server.http.stream("POST", "/v1/completions", json={**LONG, "max_tokens": 60, "stream": True}) as stream:
            lines = stream.iter_lines()
            first = next(lines)
            server.server.should_exit = True
            chunks = [json.loads(line.removeprefix("data: ")) for line in [first, *lines] if line and not line.endswith("[DONE]")]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


@pytest.mark.nightly
@pytest.mark.parametrize("number, options", [
    (signal.SIGINT, ("--topology", "P:cpu D:cpu", "--executor", "process")), (signal.SIGTERM, ()),
])
def test_a_signal_ends_the_process_cleanly(number, options):
    with served(*options) as (process, url):
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) == (2 if options else 0)
        answers = []

        def ask():
            with suppress(httpx.TransportError):
                answers.append(httpx.post(f"{url}/v1/completions", json=LONG, timeout=60))

        asking = threading.Thread(target=ask)
        asking.start()
        until(lambda: "nanopd_prompts_running 1.0" in httpx.get(f"{url}/metrics").text)
        process.send_signal(number)
        rest = process.stdout.read()
        assert process.wait(30) == 0, rest
        assert rest.endswith("stopped\n") and "Traceback" not in rest
        asking.join(30)
        assert [answer.status_code for answer in answers] in ([503], [200])
        assert not [child for child in children if child.is_running()]


@pytest.mark.nightly
def test_a_worker_that_is_killed_is_said_to_be_lost():
    with served("--topology", "P:cpu D:cpu", "--executor", "process") as (process, url):
        assert httpx.post(f"{url}/v1/completions", json=GOOD, timeout=60).json()["choices"][0]["text"] == "82"
        psutil.Process(process.pid).children(recursive=True)[0].kill()
        until(lambda: httpx.get(f"{url}/health").status_code == 503)
        for response in (httpx.get(f"{url}/health"), httpx.post(f"{url}/v1/completions", json=GOOD, timeout=60)):
            assert response.status_code == 503 and "was lost (killed by SIGKILL)" in response.text
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0


@pytest.mark.nightly
def test_ctrl_c_while_it_loads():
    process = subprocess.Popen([sys.executable, "-u", "-m", "nanopd", "serve", "--port", "0"], stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    with process:
        assert process.stdout.readline().startswith("loading tiny")
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
        assert process.wait(30) == 130 and rest.endswith("nanopd: interrupted\n") and "Traceback" not in rest
