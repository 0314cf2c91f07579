"""Processes on several machines, as Ray actors: Ray finds room for them, starts them, and says when they are over.

What host and parent say to each other does not go through Ray: the actor calls its parent, over TCP.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing import AuthenticationError
from typing import Any

import nanopd
from nanopd.config import ConfigError
from nanopd.interrupts import interruptible
from nanopd.workers.host import HostSpec, serve
from nanopd.workers.network import LOOPBACK, Gate, Guest, Network, call_at
from nanopd.workers.wire import Wire

PLACING_TIME = 10.0  # seconds for Ray to find room
CONNECTING_TIME = 5.0  # seconds for a Ray cluster to answer at all
LOOK_EVERY = 0.5  # seconds, while actors start, between two looks whether one has failed
KILL_TIME = 10.0  # seconds to wait for Ray's word that an actor is dead
ONLY_GPU = "cuda:0"  # as Ray shows an actor the one that it has given to it


class Actor:
    """What Ray runs: a host."""

    def run(self, number: int, gate: tuple[str, int], secret: bytes, version: str) -> int:
        """Serve the parent, who listens at `gate`. Returns the exit code, as it were; the process is of no more use then."""
        ray = import_ray()
        here = LOOPBACK if gate[0] == LOOPBACK else ray.util.get_node_ip_address()
        if version != nanopd.__version__:
            raise ConfigError(f"nanopd {nanopd.__version__} is installed on {here}, but {version} where the cluster was asked for: "
                              "install the same")
        try:
            connection = call_at(gate, number, secret)
        except (OSError, EOFError, AuthenticationError) as error:
            raise ConfigError(f"{here} can't get through to {gate[0]}, port {gate[1]}: {error!r}") from error
        try:
            return serve(Wire(connection), Network(here, secret), ONLY_GPU)
        finally:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)  # the process lives until Ray ends it


class ActorProcess:
    """An actor that has called, as its parent sees it."""

    def __init__(self, actor: Any, result: Any, guest: Guest) -> None:
        self._actor = actor
        self._result = result
        self._ended: str | None = None
        self.wire = Wire(guest.connection)
        self.clock_ahead = guest.clock_ahead

    def wait(self, timeout: float) -> str | None:
        if self._ended is None and _is_over(self._result, timeout):
            self._ended = how_it_ended(self._result)
            _end(self._actor)  # it may have come back from its work; its GPU's memory is free when the process is gone
        return self._ended

    def kill(self) -> str:
        _end(self._actor)
        return self.wait(KILL_TIME) or "killed, but Ray has not said that it is over"


class RayLauncher:
    """Starts hosts in the Ray cluster that this process is, or can be, connected to; without one, in one of their own."""

    def __init__(self) -> None:
        self._ray = import_ray()
        self._has_connected = False
        self._is_own = False  # the cluster: then nothing of ours has to be reached from other machines
        self._group: Any = None  # the room that Ray keeps for the actors
        self._actors: list[Any] = []

    def launch(self, specs: list[HostSpec]) -> Iterator[ActorProcess]:
        """Raises ConfigError where Ray has no room, and RuntimeError where a host does not get so far as to call."""
        self._connect(Counter(map(_resource, specs))["CPU"])  # Ctrl-C waits: a Ray that is half started is not ended as a whole
        with interruptible():
            self._reserve(specs)
            started = self._start(specs)
        yield from started

    def close(self) -> None:
        ray = self._ray
        if ray.is_initialized():  # else nothing is left of it; and to ask Ray for something would start one
            for actor in self._actors:
                _end(actor)
            if self._group is not None:
                ray.util.remove_placement_group(self._group)
            if self._has_connected:
                ray.shutdown()
        self._actors.clear()
        self._group, self._has_connected = None, False

    def _connect(self, num_cpus: int) -> None:
        """To a cluster that runs, by Ray's own rules; else start one on this machine."""
        ray, address = self._ray, os.environ.get("RAY_ADDRESS")
        if ray.is_initialized():
            return
        _check_address(address)
        quiet = dict(logging_level=logging.ERROR, log_to_driver=False)
        self._has_connected = True
        try:
            ray.init("auto", **quiet)
        except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
            if address or not isinstance(error, ConnectionError):
                raise ConfigError(f"this process could not join the Ray cluster {address or 'of this machine'}: {error}") from error
            ray.init("local", num_cpus=max(num_cpus, os.cpu_count() or 1), include_dashboard=False, **quiet)
            self._is_own = True

    def _reserve(self, specs: list[HostSpec]) -> None:
        """Room for all of them, as near to one another as there is any."""
        self._group = self._ray.util.placement_group([{_resource(spec): 1} for spec in specs], strategy="PACK")
        if not self._group.wait(PLACING_TIME):
            asked, has, free = (_listed(counts) for counts in (
                Counter(map(_resource, specs)), self._ray.cluster_resources(), self._ray.available_resources()))
            raise ConfigError(f"the topology needs {asked} of the Ray cluster, which has {has}, of that free: {free}. Start Ray on "
                              "more machines (ray start --address=...), or ask for fewer workers")

    def _start(self, specs: list[HostSpec]) -> list[ActorProcess]:
        """All at once. Returns when all have called."""
        address = LOOPBACK if self._is_own else self._ray.util.get_node_ip_address()
        network = Network(address, secrets.token_bytes(32))
        gate = Gate(network)
        try:
            for place, spec in enumerate(specs):
                self._actors.append(self._actor(spec, place))
            results = [actor.run.remote(number, gate.address, network.secret, nanopd.__version__)
                       for number, actor in enumerate(self._actors)]
            return self._await_calls(gate, specs, results)
        finally:
            gate.close()

    def _actor(self, spec: HostSpec, place: int) -> Any:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        options = {"num_gpus": 1, "num_cpus": 0} if _resource(spec) == "GPU" else {"num_cpus": 1}
        where = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=place)
        return self._ray.remote(Actor).options(**options, scheduling_strategy=where, max_restarts=0).remote()

    def _await_calls(self, gate: Gate, specs: list[HostSpec], results: list[Any]) -> list[ActorProcess]:
        called: dict[int, ActorProcess] = {}
        while len(called) < len(specs):
            if guest := gate.admit(LOOK_EVERY):
                called[guest.number] = ActorProcess(self._actors[guest.number], results[guest.number], guest)
            for number, result in enumerate(results):
                if number not in called and _is_over(result, 0):
                    raise RuntimeError(f"{specs[number]} did not start: {how_it_ended(result)}")
        return [called[number] for number in range(len(specs))]


def import_ray() -> Any:
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ConfigError("the ray executor needs Ray: pip install 'nanopd[ray]', on every machine") from error
    return ray


def how_it_ended(result: Any) -> str:
    """Of what an actor ran. Ray knows no exit code of a process that was killed."""
    import ray

    if not ray.is_initialized():  # to ask would start one
        return "its process ended with Ray"
    try:
        return f"its process ended with exit code {ray.get(result)}"
    except ray.exceptions.RayTaskError as error:
        return str(error.cause)
    except ray.exceptions.RayError as error:
        last_line = str(error).strip().splitlines()[-1]
        return f"its Ray actor died: {last_line.rpartition('exit detail: ')[2].partition(' Some common causes')[0]}"


def _is_over(result: Any, timeout: float) -> bool:
    import ray

    return not ray.is_initialized() or bool(ray.wait([result], timeout=timeout)[0])


def _end(actor: Any) -> None:
    import ray

    if ray.is_initialized():
        ray.kill(actor)


def _resource(spec: HostSpec) -> str:
    return "CPU" if spec.device == "cpu" else "GPU"


def _listed(counts: dict[str, float]) -> str:
    return ", ".join(f"{counts[name]:g} {name}{'s' * (counts[name] != 1)}" for name in ("GPU", "CPU") if counts.get(name)) or "none"


def _check_address(address: str | None) -> None:
    """Ray itself would try for minutes."""
    if not address or address in ("auto", "local"):
        return
    host, _, port = address.rpartition(":")
    if "://" in address or not port.isdigit():
        raise ConfigError(f"RAY_ADDRESS is {address!r}; it has to be HOST:PORT, and nanopd to run on a machine of that cluster")
    with suppress(OSError):
        socket.create_connection((host, int(port)), CONNECTING_TIME).close()
        return
    raise ConfigError(f"nothing answers at RAY_ADDRESS {address}: start Ray there (ray start --head), or unset RAY_ADDRESS to have one "
                      "started here")
