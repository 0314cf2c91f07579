"""`nanopd serve`: start and stop."""

from __future__ import annotations

import ipaddress
import signal
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from rich.console import Console

from nanopd.cluster import Cluster
from nanopd.config import SLO, ConfigError, Topology
from nanopd.demo import one_thread
from nanopd.models.loader import load_tokenizer
from nanopd.server.answering import ServerLimits
from nanopd.server.app import Served, make_app
from nanopd.server.driver import Driver

GRACE = 5.0  # seconds that open requests have to end in when the server is told to stop
STALLED = 60.0  # seconds after which a client that takes nothing is cut off


def serve(model: str, topology: str | None, mode: str | None, *, host: str, port: int, api_key: str | None,
          limits: ServerLimits, slo: SLO | None, profile: Any, console: Console, **options: Any) -> None:
    """Serve until SIGINT or SIGTERM. `options` are those of `Cluster`.

    Raises:
        ConfigError, ModelError, OSError: it can't be served, or not there; the message says why.
    """
    workers = Topology.parse(topology or _own_topology())
    mode = mode or _mode_of(workers)
    workers.check_mode(mode)
    adaptive = {"slo": slo, "profile": profile}
    with listen(host, port) as listener, one_thread(model == "tiny" and workers.devices == ["cpu"]):
        console.print(f"loading {model} for {workers}, mode {mode}", highlight=False)
        driver = Driver(lambda: Cluster(model, str(workers), mode, **adaptive, **options))
        driver.start()
        try:
            max_len = driver.call(lambda cluster: cluster.limits.max_len).result()
            served = Served(model, max_len, load_tokenizer(model))
            run(served, driver, listener, limits, api_key, lambda: _greet(console, served, listener, bool(api_key)))
        finally:
            driver.shutdown()
    console.print("stopped", highlight=False)


def run(served: Served, driver: Driver, listener: socket.socket, limits: ServerLimits | None = None, api_key: str | None = None,
        when_up: Callable[[], None] = lambda: None) -> None:
    """Serve at a listener until SIGINT or SIGTERM; in another thread than the main one until `Server.should_exit`."""
    server = Server(served, driver, limits, api_key, when_up)
    handlers = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:  # uvicorn raises the signal that stopped it once more when it has stopped: then it is to do nothing
        server.run([listener])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


class Server(uvicorn.Server):
    """Says when it is up, and lets open requests end before it stops."""

    def __init__(self, served: Served, driver: Driver, limits: ServerLimits | None = None, api_key: str | None = None,
                 when_up: Callable[[], None] = lambda: None, grace: float = GRACE) -> None:
        app = make_app(served, driver, limits, api_key)
        super().__init__(uvicorn.Config(app, log_level="warning", access_log=False, lifespan="on",
                                        timeout_graceful_shutdown=int(grace + GRACE)))
        self.service, self._when_up, self._grace = app.state.service, when_up, grace

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._when_up()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.service.stop(self._grace)
        await super().shutdown(sockets)


def listen(host: str, port: int, stalled: float = STALLED) -> socket.socket:
    """A socket bound to an address, on which nobody listens yet. Raises OSError where it can't be had.

    Args:
        stalled: seconds after which a connection is cut whose other end takes nothing. Linux alone can do that.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except socket.gaierror as error:
        raise ConfigError(f"unknown host {host!r}: {error.strerror}") from error
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(stalled * 1000))
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise OSError(error.errno, f"can't listen on {host}, port {port}: {error.strerror}; --port takes another") from None
    return listener


def _greet(console: Console, served: Served, listener: socket.socket, has_key: bool) -> None:
    host, port = listener.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    key = " -H 'Authorization: Bearer KEY'" if has_key else ""
    if not ipaddress.ip_address(host).is_loopback:
        warning = "and what is sent there is not encrypted" if has_key else "and nobody is asked for a key: set --api-key"
        console.print(f"warning: {host} can be reached from other machines, {warning}", style="yellow", highlight=False)
    console.print(f"listening on {url}; stop with Ctrl-C. Try:\n"
                  f"  curl {url}/v1/completions{key} -H 'Content-Type: application/json' \\\n"
                  f"    -d '{{\"model\": \"{served.name}\", \"prompt\": \"What is 47+35?\", \"max_tokens\": 16, \"temperature\": 0}}'",
                  highlight=False, markup=False, soft_wrap=True)


def _own_topology() -> str:
    import torch

    return "C:0" if torch.cuda.is_available() else "C:cpu"


def _mode_of(workers: Topology) -> str:
    """The mode that uses all the workers there are. Raises ConfigError where none is complete."""
    roles = {placement.role for placement in workers.placements}
    if roles == {"C"}:
        return "collocated"
    return "adaptive" if "C" in roles else "disaggregated"
