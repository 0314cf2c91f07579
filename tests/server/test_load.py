"""The server under many clients, good and bad, as users start it: it answers or refuses each, and loses nothing."""

from __future__ import annotations

import asyncio
import re
import signal
import time
from collections import Counter
from dataclasses import dataclass
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


@dataclass
class Came:
    """What came of a load: `seen` as in `Swarm`, the growth of the server's own figures, and how large its process was after
    the warm-up, at half time and at the end, as (MiB, open files)."""

    seen: Counter
    grown: dict[str, float]
    seconds: float
    sizes: list[tuple[float, int]]

    def counted(self, outcome):
        """How many requests ended so, as the server says; "": all."""
        return sum(value for name, value in self.grown.items()
                   if name.startswith("nanopd_requests_total") and f'outcome="{outcome}' in name)


def under_load(llm, clients, number, warm_up):
    prompts = [task.prompt for task in demo_prompts()]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=MAX_TOKENS), use_tqdm=False)
    expected = {prompt: output.outputs[0].text for prompt, output in zip(prompts, outputs)}
    with served("--max-queued", "180", "--max-body", str(MAX_BODY)) as (process, url):
        where = urlsplit(url)
        watched = psutil.Process(process.pid)

        def ask(number, seed):
            swarm = Swarm(where.hostname, where.port, expected, MAX_TOKENS, clients=clients, number=number, seed=seed)
            asyncio.run(swarm.run())
            until(lambda: is_idle(figures(url)))
            until(lambda: len(watched.net_connections()) == 1)
            sizes.append((watched.memory_info().rss / 2**20, watched.num_fds()))
            return swarm.seen

        sizes = []
        ask(warm_up, seed=0)
        first, begun = figures(url), time.perf_counter()
        seen = ask(number // 2, seed=1) + ask(number - number // 2, seed=2)
        seconds, last = time.perf_counter() - begun, figures(url)
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
        assert process.wait(30) == 0 and rest.splitlines()[2:] == ["stopped"]  # after the example that it prints
    return Came(seen, {name: value - first.get(name, 0) for name, value in last.items()}, seconds, sizes)


def check(came, number):
    improper = {what: times for what, times in came.seen.items() if what[1] not in PROPER[what[0]]}
    assert not improper
    assert {kind for kind, _ in came.seen} == set(PROPER) and sum(came.seen.values()) == number
    assert {kind for kind, end in came.seen if end == "completed"} == {"stream", "whole", "chat", "slow"}
    ends = Counter()
    for (_, end), times in came.seen.items():
        ends[end] += times
    for outcome, end in (("completed", "completed"), ("dropped", "429 overloaded")):  # who left was counted as one of them, or not
        assert ends[end] <= came.counted(outcome) <= ends[end] + ends["left"]
    assert came.counted("failed") == 0 < came.counted("cancelled")
    assert number - came.seen["hang up", "left"] <= came.counted("") <= number
    assert len({files for _, files in came.sizes}) == 1, "files are left open"
    assert came.sizes[2][0] - came.sizes[1][0] < 20, f"memory grows: {came.sizes}"


def test_200_clients(llm):
    check(under_load(llm, clients=200, number=500, warm_up=200), 500)


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_200_clients_10_000_requests(llm, capsys):
    came = under_load(llm, clients=200, number=10_000, warm_up=1000)
    with capsys.disabled():
        sizes = " -> ".join(f"{mib:.0f} MiB, {files} files" for mib, files in came.sizes)
        print(f"\n10,000 requests by 200 clients in {came.seconds:.0f} s; {sizes}")
        for (kind, end), times in sorted(came.seen.items()):
            print(f"{times:6} {kind}: {end}")
        for outcome in ("completed", "dropped", "invalid", "cancelled", "failed", ""):
            print(f"{came.counted(outcome):6.0f} {outcome or 'all'}, as the server counts")
    check(came, 10_000)
