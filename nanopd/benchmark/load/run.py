"""One open-loop run: its settings, how it is done, and the record of it as JSON.

    settings = RunSettings(model="tiny", topology="C:cpu", rate=2.0)
    with open_cluster(settings) as cluster:
        record = run_on_cluster(settings, cluster)
    record.save(Path("run.json"))
    record.metrics["p99_ttft_ms"], record.settings["rate"], record.requests["ttft"]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from nanopd.benchmark.load.cluster import serve_cluster
from nanopd.benchmark.load.metrics import load_metrics
from nanopd.benchmark.load.record import PHASES, ClientRecord, Load, Tally
from nanopd.benchmark.load.schedule import Schedule, poisson_schedule, trace_schedule
from nanopd.benchmark.load.workloads import RECORDED, workload
from nanopd.benchmark.results import rounded, write_whole
from nanopd.config import SLO, ConfigError
from nanopd.simulator.traces import read_trace
from nanopd.simulator.workload import checked

if TYPE_CHECKING:
    from nanopd.cluster import Cluster

SCHEMA = 1
OF_CLUSTER = ("topology", "mode", "executor", "transport", "dtype", "load_format", "max_num_seqs", "max_num_batched_tokens",
              "kv_blocks", "profile")
HERE = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class RunSettings:
    """What is served by whom. Spans in seconds, bounds of the SLO in milliseconds, both or none.

    Of the cluster, None leaves what `Cluster` does by default. An `endpoint`, a URL, is served by a cluster of its own, of which
    `model` is the name there.
    """

    model: str = "tiny"
    topology: str = "C:cpu"
    mode: str = "collocated"
    executor: str | None = None
    transport: str = "auto"
    dtype: str | None = None
    load_format: str = "auto"
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    max_model_len: int | None = None
    kv_blocks: int | None = None
    profile: str | None = None  # a file: what an adaptive cluster goes by
    workload: str = "short"
    rate: float | None = None  # requests a second; of a trace None
    burstiness: float = 1.0
    trace: str | None = None  # a file: its requests, as they came, instead of a workload at a rate
    speed_up: float = 1.0  # how many times as fast the trace's requests come
    warmup: float = 2.0
    window: float | None = 10.0  # None: all of a trace
    tail: float = 0.0
    seed: int = 0
    slo_ttft_ms: float | None = None
    slo_tpot_ms: float | None = None
    endpoint: str | None = None

    @property
    def slo(self) -> SLO | None:
        """Raises ConfigError where only one bound is set, or one is no number above 0."""
        if (self.slo_ttft_ms is None) != (self.slo_tpot_ms is None):
            raise ConfigError("an SLO has two bounds, slo_ttft_ms and slo_tpot_ms: set both, or none")
        return None if self.slo_ttft_ms is None else SLO(self.slo_ttft_ms / 1e3, self.slo_tpot_ms / 1e3)

    def schedule(self, max_len: int) -> Schedule:
        """The same for equal settings, whoever serves it. What was recorded is cut to `max_len` tokens, prompt and answer
        together. Raises ConfigError for what can't be, also for other requests that are longer."""
        made = self._poisson() if self.trace is None else self._replay(self.trace)
        if self.trace is not None or self.workload in RECORDED:
            made = made.cut_to(max_len)
        checked(made.arrivals, max_len)
        return made

    def _poisson(self) -> Schedule:
        if self.rate is None or self.window is None:
            raise ConfigError("a workload comes at a rate, for a window: set both, or take a trace")
        return poisson_schedule(self.rate, workload(self.workload), self.window, self.warmup, self.tail, self.seed, self.burstiness)

    def _replay(self, path: str) -> Schedule:
        if self.rate is not None:
            raise ConfigError("a trace's requests come when they came: leave the rate out, and make it faster by speed_up")
        return trace_schedule(read_trace(path).sped_up(self.speed_up), self.window, self.warmup, self.tail)


@dataclass(frozen=True)
class RunRecord:
    """A run that is over. `requests` are columns, of the requests that count in the order of their arrival; in seconds, None
    where there is none."""

    settings: dict[str, Any]
    metrics: dict[str, Any]  # of `load_metrics`
    requests: dict[str, list[Any]]
    device: dict[str, Any]
    versions: dict[str, str | None]
    commit: str | None  # None where it was not run from a checkout
    dirty: bool | None  # whether the checkout differed from the commit
    date: str  # ISO 8601, UTC
    command: str  # that was typed
    num_cut: int = 0  # requests that are shorter than they were recorded, for more the server does not take
    schema: int = SCHEMA

    @classmethod
    def of(cls, settings: RunSettings, load: Load, device: dict[str, Any], num_cut: int = 0) -> RunRecord:
        from nanopd.benchmark import environment

        chosen = asdict(settings)
        if settings.endpoint is not None:  # whoever serves there, it is not the cluster that these are about
            chosen |= dict.fromkeys(OF_CLUSTER)
        commit, dirty = environment.commit()
        return cls(chosen, rounded(load_metrics(load, settings.slo)), _columns(load.counted), device, environment.versions(),
                   commit, dirty, datetime.now(timezone.utc).isoformat(timespec="seconds"), " ".join(sys.argv), num_cut)

    def save(self, path: Path) -> None:
        write_whole(path, json.dumps(asdict(self), allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> RunRecord:
        """Raises ValueError where the file is of another version, or no record of a run."""
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            raise ValueError(f"{path} is no record of a run with schema {SCHEMA}: run `nanopd bench serve --out {path}` again")
        return cls(**data)


def open_cluster(settings: RunSettings) -> Cluster:
    """A cluster as these settings want it, not yet loaded. Raises ConfigError for settings that can't be."""
    from nanopd.cluster import Cluster

    options = {"dtype": settings.dtype, "max_num_seqs": settings.max_num_seqs, "max_model_len": settings.max_model_len,
               "max_num_batched_tokens": settings.max_num_batched_tokens, "num_gpu_blocks_override": settings.kv_blocks,
               "profile": settings.profile, "slo": settings.slo if settings.mode == "adaptive" else None}
    return Cluster(settings.model, settings.topology, settings.mode, executor=settings.executor, transport=settings.transport,
                   load_format=settings.load_format, seed=settings.seed,
                   **{name: value for name, value in options.items() if value is not None})


def run_on_cluster(settings: RunSettings, cluster: Cluster, progress: Callable[[Tally], None] | None = None) -> RunRecord:
    """Serve one setting on a cluster, which may have served others of the same topology; in the settings' mode.

    Raises:
        ConfigError: it can't be; for example requests are longer than the cluster takes.
        Stopped: on Ctrl-C, with the load as far as it went.
    """
    schedule = settings.schedule(cluster.limits.max_len)
    load = serve_cluster(cluster, schedule, settings.mode, settings.seed, progress)
    return RunRecord.of(settings, load, device_of(cluster), schedule.num_cut)


def run_on_endpoint(settings: RunSettings, progress: Callable[[Tally], None] | None = None) -> RunRecord:
    """Serve one setting on the server at `settings.endpoint`.

    Raises:
        ConfigError: it can't be.
        EndpointError: the server does not answer, or not for this model.
        Stopped: on Ctrl-C, with the load as far as it went.
    """
    from nanopd.benchmark.load.endpoint import find_form, serve_endpoint

    schedule = settings.schedule(settings.max_model_len or sys.maxsize)
    form = find_form(settings.endpoint, settings.model)
    load = serve_endpoint(settings.endpoint, schedule, settings.model, form, settings.seed, progress=progress)
    return RunRecord.of(settings, load, device_behind(settings.endpoint), schedule.num_cut)


def device_of(cluster: Cluster) -> dict[str, Any]:
    from nanopd.benchmark import environment

    return environment.device_facts(on_cpu=cluster.topology.devices == ["cpu"])


def device_behind(url: str) -> dict[str, Any]:
    """This machine's, if the server is here; of others the client knows nothing but the name."""
    from nanopd.benchmark import environment

    host = urlsplit(url).hostname
    return environment.device_facts() if host in HERE else {"kind": "remote", "name": host}


def _columns(counted: Sequence[ClientRecord]) -> dict[str, list[Any]]:
    """Times to ten microseconds."""
    def column(of: Callable[[ClientRecord], float | None]) -> list[float | None]:
        values = [of(record) if record.tokens else None for record in counted]
        return [None if value is None else round(value, 5) for value in values]

    return {
        "arrival": [round(record.arrival, 5) for record in counted], "prompt_len": [record.prompt_len for record in counted],
        "output_len": [record.num_tokens for record in counted], "ttft": column(lambda record: record.ttft),
        "tpot": column(lambda record: record.tpot), "e2e": column(lambda record: record.e2e),
        "mode": [record.mode for record in counted], "status": [record.status for record in counted],
        **_phases(counted)}


def _phases(counted: Sequence[ClientRecord]) -> dict[str, list[float | None]]:
    """No columns where nothing is known of them."""
    if not any(record.phases for record in counted):
        return {}
    return {name: [record.phases and round(record.phases[name], 5) for record in counted] for name in PHASES}
