"""A real server on a free port of this machine, in a thread of this process."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import httpx
import openai

from nanopd.cluster import Cluster
from nanopd.server.answering import ServerLimits
from nanopd.server.app import Served
from nanopd.server.command import Server, listen
from nanopd.server.driver import Driver

MODES = {"C:cpu": "collocated", "P:cpu D:cpu": "disaggregated", "C:cpu P:cpu D:cpu": "adaptive"}
# Long enough to be under way for as long as a test needs, for "tiny" writes one step after another.
LONG = dict(prompt="What is 47+35?", max_tokens=3000, temperature=0, ignore_eos=True)


class Running:
    """A server as tests see it."""

    def __init__(self, server, driver, listener):
        self.server, self.driver = server, driver
        self.host, self.port = listener.getsockname()
        self.url = f"http://{self.host}:{self.port}"
        self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)
        self.http = httpx.Client(base_url=self.url, timeout=60)

    def post(self, path="/v1/completions", **body):
        return self.http.post(path, json=body)

    def num_open(self):
        return sum(self.driver.num_open())

    def used_blocks(self):
        status = self.driver.call(Cluster.status).result(30)
        return {worker_id: one.num_blocks - one.num_free_blocks for worker_id, one in status.items()}

    def is_empty(self):
        """Nothing is open, and no block or lease is held."""
        status = self.driver.call(Cluster.status).result(30)
        return self.num_open() == 0 and not any(
            one.num_blocks - one.num_free_blocks or one.num_leases or one.num_transfers or one.num_waiting or one.num_running
            for one in status.values())

    def metrics(self):
        lines = self.http.get("/metrics").text.splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


@contextmanager
def running(topology="C:cpu", *, limits=None, api_key=None, grace=0.2, stalled=60.0, send_buffer=None, make_cluster=None, **options):
    driver = Driver(make_cluster or (lambda: Cluster("tiny", topology, MODES[topology], **options)))
    driver.start()
    bounds = driver.call(lambda cluster: (cluster.limits.max_len, cluster.tokenizer)).result()
    with listen("127.0.0.1", 0, stalled) as listener:
        if send_buffer:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        server = Server(Served("tiny", *bounds), driver, limits or ServerLimits(), api_key, grace=grace)
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        try:
            until(lambda: server.started)
            yield Running(server, driver, listener)
        finally:
            server.should_exit = True
            thread.join(30)
            driver.shutdown()
    assert not thread.is_alive()


@contextmanager
def served(*options):
    """`nanopd serve` as users start it: (process, url)."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    process = subprocess.Popen([sys.executable, "-u", "-m", "nanopd", "serve", "--port", "0", *options], stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True, env=environment)
    try:
        said = ""
        for line in process.stdout:
            said += line
            if found := re.search(r"listening on (http://\S+:\d+);", line):
                break
        else:
            raise AssertionError(said)
        yield process, found[1]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def until(holds, seconds=30.0):
    """Wait for what is to come true."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not so after {seconds:g} s"
        time.sleep(0.02)
