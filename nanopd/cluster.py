"""The public face of many engines: a client of workers with roles."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nanopd.client import Client, Prompt, Stream
from nanopd.config import EXECUTORS, SLO, ConfigError, Topology
from nanopd.core import Request, SamplingParams, TokenEvent
from nanopd.cost_model.analytical import CostModel
from nanopd.cost_model.profile import Profile
from nanopd.engine.factory import EngineOptions, device_name, give_back_memory, resolve_device
from nanopd.engine.limits import Limits
from nanopd.interrupts import uninterrupted
from nanopd.messages import History, LinkTimed, Status
from nanopd.models.loader import load_spec, load_tokenizer, resolve_dtype
from nanopd.router.central_scheduler import TIMELINES_KEPT, CentralScheduler
from nanopd.router.explain import Explanation, began, explain
from nanopd.router.planner import WorkerSize
from nanopd.router.policies import ROUTERS, AlwaysCollocated, make_router
from nanopd.router.routing import Router
from nanopd.router.timeline import Timeline
from nanopd.router.trace import save_trace
from nanopd.workers.executors import InlineExecutor
from nanopd.workers.host import HostSpec, build_workers
from nanopd.workers.links import TRANSPORTS
from nanopd.workers.process import Children, Launcher, ProcessExecutor
from nanopd.workers.transfer import LocalTransport, Transport
from nanopd.workers.worker import Worker

POLL_FOR = 0.05  # seconds; as long may Ctrl-C wait


class Cluster(Client):
    """Workers with roles on one or more devices.

    Args:
        model: as for `LLM`.
        topology: workers as ROLE:DEVICE, roles C (collocated), P (prefill), D (decode); "P:cpu D:cpu", "C:0 P:1 D:2".
        mode: "collocated", "disaggregated", or "adaptive": a router chooses for each request.
        executor: "inline": all workers in this process, in turn, which takes a single device; "process": a process for
            each GPU, or on the CPU for each worker; "ray": such processes on all machines of a Ray cluster, where the GPU
            numbers of `topology` only say which workers share one. Default: inline where there is a single device.
        transport: how KV caches travel between processes: "auto" takes the best that a pair of devices can do.
        checksums: send the checksum of each prompt's KV along, and compare.
        hang_timeout: seconds without a sign of life after which a process is given up and killed.
        max_queued: how many requests may be open at once; one more raises Overloaded.
        router: of an adaptive cluster: a name, see `nanopd.router.policies`, or an object, see `nanopd.router.routing`.
        slo: of an adaptive cluster: what the router "cost" is to keep. Default: it keeps times short.
        profile: of an adaptive cluster: what steps and transfers take, as a file, a Profile or a CostModel. Default: it is
            measured now, if the router needs it.
        options: see `EngineOptions`: max_model_len, max_num_seqs, max_num_batched_tokens, block_size, ...
    """

    def __init__(self, model: str = "tiny", topology: str = "P:cpu D:cpu", mode: str = "disaggregated", *,
                 executor: str | None = None, transport: str = "auto", checksums: bool = False, hang_timeout: float = 60.0,
                 max_queued: int = 16_384, router: str | Router | None = None, slo: SLO | None = None,
                 profile: str | Path | Profile | CostModel | None = None, dtype: str | torch.dtype | None = None,
                 load_format: str = "auto", seed: int = 0, **options: Any) -> None:
        self.topology = Topology.parse(topology)
        self.topology.check_mode(mode)
        _check_router(mode, router, slo, profile)
        self.mode = mode
        self._is_shut_down = False
        self._poll_for = POLL_FOR
        self.executor = _pick_executor(executor, self.topology)
        _check_transport(transport, self.executor)
        if hang_timeout <= 0:
            raise ConfigError(f"hang_timeout must be a number of seconds above 0, got {hang_timeout!r}")
        engine_options = EngineOptions.from_keywords(options)
        if self.executor != "ray":  # whose devices may be elsewhere
            for device in self.topology.devices:
                resolve_device(device)
        self.model = model
        self.spec = load_spec(model)
        self.dtype = resolve_dtype(dtype, self.spec, torch.device(self.topology.devices[0]))
        super().__init__(load_tokenizer(model), seed)
        spec = partial(HostSpec, model=model, shape=self.spec, dtype=dtype, load_format=load_format, seed=seed,
                       options=engine_options, transport=transport, checksums=checksums)
        if self.executor == "inline":
            self._executor: InlineExecutor | ProcessExecutor = _inline(self.topology, spec)
        else:
            self._executor = ProcessExecutor(_hosts(self.topology, spec, self.executor), hang_timeout, _launcher(self.executor))
        self._central = CentralScheduler(
            self._executor, mode, Limits.tightest(self._executor.limits.values()), max_queued=max_queued,
            router=AlwaysCollocated() if mode == "adaptive" else None,  # until there is the one that is wanted
            devices={worker_id: placement.device for worker_id, placement in self.topology.workers.items()},
            prefix_caching=engine_options.enable_prefix_caching)
        if mode == "adaptive":
            try:
                self.router = self._make_router(router, slo, profile, engine_options)
            except BaseException:
                self._release()
                raise

    def _make_router(self, router: str | Router | None, slo: SLO | None, profile: str | Path | Profile | CostModel | None,
                     options: EngineOptions) -> Router:
        if router is not None and not isinstance(router, str):
            return router
        name = router or "cost"
        cost = self._cost_model(profile) if name == "cost" else None
        chunk = min(options.max_num_batched_tokens, options.prefill_chunk_size or sys.maxsize)
        limits = self.limits
        return make_router(name, cost, slo=slo, size=WorkerSize(limits.max_num_seqs, chunk, limits.num_blocks * limits.block_size))

    def _cost_model(self, profile: str | Path | Profile | CostModel | None) -> CostModel:
        if isinstance(profile, CostModel):
            return profile
        if profile is None:
            profile = self._profile()
        elif not isinstance(profile, Profile):
            profile = Profile.load(profile)
        profile.warn_if_foreign(device=self.device_name, model=self.model, dtype=str(self.dtype).removeprefix("torch."))
        return profile.cost

    def _profile(self) -> Profile:
        from tqdm.auto import tqdm

        from nanopd.cost_model.profiler import profile_cluster

        with tqdm(total=1.0, desc="measuring this cluster", bar_format="{desc}: {percentage:3.0f}% {bar} {elapsed}") as bar:
            def show(text: str, share: float) -> None:
                bar.set_description_str(text)
                bar.update(share - bar.n)

            return profile_cluster(self, progress=show)

    @property
    def workers(self) -> dict[str, Worker]:
        """By id: "C0", "P0", "P1", "D0", ... Where they are in processes of their own, ask `status` and `history`."""
        if isinstance(self._executor, ProcessExecutor):
            raise RuntimeError("the workers are in processes of their own: see status() and history()")
        return self._executor.workers

    @property
    def limits(self) -> Limits:
        return self._central.limits

    @property
    def router(self) -> Router | None:
        """Who is asked where requests go, in an adaptive cluster. Another one may be set while requests flow: those that come
        after go where it says. Raises ConfigError where the cluster is not adaptive."""
        return self._central.router

    @router.setter
    def router(self, router: Router) -> None:
        self._central.router = router

    @property
    def device_name(self) -> str:
        """What the topology's first device calls itself, such as "NVIDIA H200"."""
        if isinstance(self._executor, ProcessExecutor):
            return self._executor.device_name
        return device_name(self.topology.devices[0])

    def submit(self, prompt: Prompt, sampling_params: SamplingParams | None = None, *, timeout: float | None = None,
               mode: str | None = None) -> Stream:
        """Queue one prompt, a text or {"prompt_token_ids": [...]}. Returns its stream at once.

        Args:
            timeout: seconds; when they are over, what is unfinished of the request ends with an error.
            mode: the pipeline of this request, where it is not to be the cluster's.

        Raises:
            InvalidRequest: it can't be served; the message says why.
            Overloaded: `max_queued` requests are open.
        """
        request = self._make_request(prompt, sampling_params or SamplingParams(), timeout=timeout)
        return self._submit(request, mode=mode)

    def step(self, timeout: float = POLL_FOR) -> list[TokenEvent]:
        """Advance. Returns the events of all requests, which also reach their streams; waits for some at most `timeout`
        seconds."""
        self._poll_for = timeout
        return super().step()

    def status(self) -> dict[str, Status]:
        """How each living worker is doing, by its id."""
        if self.executor != "inline":  # what they have said since the last step may be about blocks to give back
            with uninterrupted():
                self._central.catch_up()
        return self._executor.status()

    def history(self, since: float = 0.0) -> dict[str, History]:
        """What each living worker has done lately, by its id: its steps, and the transfers that left it. Of that what began
        at `since` or later, on the monotonic clock."""
        return self._executor.history(since)

    @property
    def lack(self) -> str | None:
        """Why nothing can be served any more: the workers that are lost. None as long as something can."""
        return self._central.fleet.lack(self.mode)

    def set_role(self, worker_id: str, role: str) -> None:
        """Give a worker another role ("C", "P" or "D"), while requests flow: it ends what it has, and changes then.

        Raises ConfigError if there is no such worker or role, or if a role would be left without a worker.
        """
        self._central.set_role(worker_id, role)

    @contextmanager
    def cast(self, roles: dict[str, str]) -> Iterator[None]:
        """For the time being these workers alone get requests, each in the role given: {"D1": "C"}, to measure it.

        Raises:
            ConfigError: there is no such worker.
            RuntimeError: requests are open.
        """
        if self.has_work:
            raise RuntimeError("requests are open: wait for them, or cancel them")
        with self._central.fleet.cast(roles):
            yield

    def time_link(self, source_id: str, destination_id: str, num_tokens: int) -> LinkTimed:
        """How long KV takes from a worker to another, up to that of `num_tokens` tokens. Neither should have work to do.

        Raises:
            ConfigError: there is no such worker.
            RuntimeError: it could not be measured; the message says why.
        """
        prompt = self._random.choices(range(self.limits.vocab_size), k=num_tokens)
        with uninterrupted():
            job = self._central.time_link(source_id, destination_id, prompt)
        while job not in self._central.link_times:
            self.step()
        times = self._central.link_times.pop(job)
        if isinstance(times, str):
            raise RuntimeError(f"the link from {source_id} to {destination_id} can't be timed: {times}")
        return times

    def save_trace(self, path: str | Path) -> None:
        """Write what the latest requests and the workers did as a Chrome trace, for https://ui.perfetto.dev."""
        save_trace(path, self._central.timelines, self.history())

    def explain(self, request_id: str) -> Explanation:
        """Why the router sent a request where it did: what it expected of each route, and what the request really took.

        Raises KeyError where it is not among the latest, and InvalidRequest where no router was asked about it.
        """
        return explain(self.timeline(request_id), began(self.timeline(request_id), self.history()))

    def timeline(self, request_id: str) -> Timeline:
        """The request's path through the workers, and when it got where."""
        if request_id not in self._central.timelines:
            raise KeyError(f"no request {request_id!r}; timelines are kept of the last {TIMELINES_KEPT} requests")
        return self._central.timelines[request_id]

    def _release(self) -> None:
        self._is_shut_down = True
        self._executor.close()
        give_back_memory()

    def _start(self, request: Request, mode: str | None = None) -> None:
        if self._is_shut_down:
            raise RuntimeError("this cluster has been shut down: make a new one")
        self._central.submit(request, mode)

    def _advance(self) -> list[TokenEvent]:
        events = self._central.step(self._poll_for)
        if not events and self.has_work and not self._central.has_work:
            raise RuntimeError("requests are open, but no worker knows of them: a request was lost")
        return events

    def _cancel(self, request_id: str) -> list[TokenEvent]:
        return self._central.cancel(request_id)

    def _stop_answer(self, request_id: str, index: int) -> None:
        self._central.cancel(request_id, index)


def _pick_executor(executor: str | None, topology: Topology) -> str:
    if executor is None:
        return "inline" if len(topology.devices) == 1 else "process"
    if executor not in EXECUTORS:
        raise ConfigError(f"unknown executor {executor!r}; there are {', '.join(EXECUTORS)}")
    if executor == "inline" and len(topology.devices) > 1:
        raise ConfigError(f"topology '{topology}' names several devices; the inline executor runs all workers on one: "
                          "leave executor out, or take 'process'")
    return executor


def _check_router(mode: str, router: object, slo: object, profile: object) -> None:
    given = [name for name, value in (("router", router), ("slo", slo), ("profile", profile)) if value is not None]
    if given and mode != "adaptive":
        raise ConfigError(f"{' and '.join(given)} given, but mode {mode!r} asks no router: take mode='adaptive', or leave "
                          f"{'it' if len(given) == 1 else 'them'} out")
    if isinstance(router, str) and router not in ROUTERS:
        make_router(router)  # says so
    if router is not None and not isinstance(router, str):
        if not callable(getattr(router, "choose", None)):
            raise ConfigError(f"a router is one of {', '.join(ROUTERS)}, or an object with a method choose(question, workers); "
                              f"got {router!r:.80}")
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(given[1:])} given, but the router is an object of its own: give it what it needs "
                              "when you make it")
    if slo is not None and not isinstance(slo, SLO):
        raise ConfigError(f"slo must be SLO(ttft, tpot), in seconds, got {slo!r:.80}")
    if router not in (None, "cost") and isinstance(router, str) and len(given) > 1:
        raise ConfigError(f"{' and '.join(given[1:])} given, but the router {router!r} has no use for it: take 'cost'")


def _check_transport(transport: str, executor: str) -> None:
    if transport not in TRANSPORTS:
        raise ConfigError(f"unknown transport {transport!r}; there are {', '.join(TRANSPORTS)}")
    if executor == "inline" and transport != "auto":
        raise ConfigError(f"transport {transport!r} goes between processes, and the inline executor has only one: "
                          "leave transport out, or take executor='process'")
    if executor == "ray" and transport not in ("auto", "collective"):
        raise ConfigError(f"transport {transport!r} needs memory that both sides can map, and Ray's processes may be on two machines: "
                          "leave transport out, or take 'collective'")


def _inline(topology: Topology, spec: Callable[..., HostSpec]) -> InlineExecutor:
    """All workers in this process, and so no way between them but the direct one."""
    workers: dict[str, Worker] = {}

    def connect(source_id: str, destination_id: str) -> Transport:
        return LocalTransport(workers[source_id].cache, workers[destination_id].cache)

    roles = {worker_id: placement.role for worker_id, placement in topology.workers.items()}
    workers |= build_workers(spec(host=0, roles=roles, device=topology.devices[0]), connect)
    return InlineExecutor(list(workers.values()))


def _launcher(executor: str) -> Launcher:
    if executor == "ray":
        from nanopd.workers.actors import RayLauncher  # Ray is an extra, and takes its time to load

        return RayLauncher()
    return Children()


def _hosts(topology: Topology, spec: Callable[..., HostSpec], executor: str) -> list[HostSpec]:
    """One for each GPU, whose workers share the weights; one for each worker on the CPU, where work runs side by side."""
    groups: dict[str, dict[str, str]] = {}
    for worker_id, placement in topology.workers.items():
        groups.setdefault(worker_id if placement.device == "cpu" else placement.device, {})[worker_id] = placement.role
    num_threads = 1 if executor == "ray" else max(1, torch.get_num_threads() // len(groups))  # each has one CPU of Ray's
    return [spec(host=number, roles=roles, device=topology.workers[next(iter(roles))].device, num_threads=num_threads)
            for number, roles in enumerate(groups.values())]
