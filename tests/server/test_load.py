"""The server under many clients, good and bad, as users start it: it answers or refuses each, and loses nothing."""

from __future__ import annotations

import asyncio
import re
import signal
import time
from collections import Counter
from contextlib import contextmanager
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
from server.harness import served, until
from server.swarm import MAX_BODY, Swarm

from nanopd.core import SamplingParams
from nanopd.tiny import demo_prompts

MAX_TOKENS = 6
# What may come of each kind of request; the first is what must come of some.
PROPER = {
    "stream": {"completed", "429 overloaded"}, "whole": {"completed", "429 overloaded"}, "chat": {"completed", "429 overloaded"},
    "slow": {"completed", "429 overloaded"}, "leave": {"left"}, "hang up": {"left"}, "malformed": {"400 invalid_request_error"},
    "invalid": {"400 invalid_request_error", "400 unknown_parameter"}, "unknown": {"404 model_not_found"},
    "huge": {"413 request_too_large", "hung up on: ConnectionResetError", "hung up on: BrokenPipeError", "hung up on"},
}


def figures(url):
    """Counters and gauges, by name."""
    text = httpx.get(f"{url}/metrics", timeout=30).text
    return {name: float(value) for name, value in re.findall(r"^(nanopd_\S+) (\S+)$", text, re.MULTILINE)}


def is_idle(now):
    return not any(value for name, value in now.items()
                   if name in ("nanopd_requests_open", "nanopd_streams_open", "nanopd_prompts_waiting", "nanopd_prompts_running")
                   or (name.startswith("nanopd_kv_blocks") and 'state="used"' in name))


@contextmanager
def under_load(llm, clients, number, warm_up):
    """What came of the requests, and the process before and after: (Swarm, figures, seconds, (memory, files) before, after)."""
    prompts = [task.prompt for task in demo_prompts()]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=MAX_TOKENS), use_tqdm=False)
    expected = {prompt: output.outputs[0].text for prompt, output in zip(prompts, outputs)}
    with served("--max-queued", "150", "--max-body", str(MAX_BODY)) as (process, url):
        where = urlsplit(url)
        watched = psutil.Process(process.pid)

        def size():
            until(lambda: is_idle(figures(url)))
            until(lambda: len(watched.net_connections()) == 1)
            return watched.memory_info().rss / 2**20, watched.num_fds()

        asyncio.run(Swarm(where.hostname, where.port, expected, MAX_TOKENS, clients=clients, number=warm_up, seed=1).run())
        before, first = size(), figures(url)
        swarm = Swarm(where.hostname, where.port, expected, MAX_TOKENS, clients=clients, number=number)
        begun = time.perf_counter()
        asyncio.run(swarm.run())
        seconds = time.perf_counter() - begun
        after, last = size(), figures(url)
        yield swarm, {name: value - first.get(name, 0) for name, value in last.items()}, seconds, before, after
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
        assert process.wait(30) == 0 and rest.splitlines()[2:] == ["stopped"]  # after the example that it prints


def check(swarm, grown, before, after, most_mib):
    improper = {what: times for what, times in swarm.seen.items() if what[1] not in PROPER[what[0]]}
    assert not improper
    assert {kind for kind, _ in swarm.seen} == set(PROPER) and sum(swarm.seen.values()) == swarm.number
    served_well = {kind for kind, came in swarm.seen if came == "completed"}
    assert served_well == {"stream", "whole", "chat", "slow"}
    came = Counter()
    for (_, what), times in swarm.seen.items():
        came[what] += times
    for outcome, what in (("completed", "completed"), ("dropped", "429 overloaded")):  # who left was counted as one of them, or not
        assert 0 < came[what] <= counted(grown, outcome) <= came[what] + came["left"]
    assert counted(grown, "failed") == 0
    assert swarm.number - swarm.seen["hang up", "left"] <= counted(grown, "") <= swarm.number
    assert after[1] == before[1], "files are left open"
    assert after[0] - before[0] < most_mib, f"memory grew from {before[0]:.0f} to {after[0]:.0f} MiB"


def counted(grown, outcome):
    """How many requests ended so, as the server says; "": all."""
    return sum(value for name, value in grown.items() if name.startswith("nanopd_requests_total") and f'outcome="{outcome}' in name)


def test_200_clients(llm):
    with under_load(llm, clients=200, number=500, warm_up=200) as (swarm, grown, _, before, after):
        check(swarm, grown, before, after, most_mib=40)


@pytest.mark.nightly
@pytest.mark.timeout(1200)
def test_200_clients_10_000_requests(llm, capsys):
    with under_load(llm, clients=200, number=10_000, warm_up=1000) as (swarm, grown, seconds, before, after):
        with capsys.disabled():
            print(f"\n10,000 requests by 200 clients in {seconds:.0f} s; memory {before[0]:.0f} -> {after[0]:.0f} MiB, "
                  f"open files {before[1]} -> {after[1]}")
            for (kind, came), times in sorted(swarm.seen.items()):
                print(f"{times:6} {kind}: {came}")
            print({name: value for name, value in grown.items() if name.startswith("nanopd_requests_total") or "tokens" in name})
        check(swarm, grown, before, after, most_mib=40)
