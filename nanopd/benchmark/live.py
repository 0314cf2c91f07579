"""`nanopd bench record`: live serving as the workbook's panel has it, with nobody at its sliders, as files to replay.

One cluster serves each mode in turn; by its seed the load driver sends the same requests, with answers of the same lengths, in
each of them. Rates rise past what can be served, and the last is low again: one sees the queue come and go.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from nanopd.benchmark import environment
from nanopd.benchmark.results import slug
from nanopd.benchmark.show import progress
from nanopd.cluster import Cluster
from nanopd.config import Topology
from nanopd.cost_model.presets import preset_names, preset_path
from nanopd.demo import one_thread
from nanopd.widgets.live_load import Load, LoadDriver
from nanopd.widgets.live_recording import FOLDER, Recording

CHOICES = ("model", "topology", "modes", "rates", "seconds", "profile")
WARM_UP = 1.0  # seconds of the first rate, in each mode, before anything is recorded


@dataclass(frozen=True)
class Plan:
    """What is recorded: each mode for `seconds` of each of `rates`."""

    model: str
    topology: str
    load: Load
    rates: tuple[float, ...]
    seconds: float
    options: dict[str, Any]  # of the cluster
    modes: tuple[str, ...] = ("collocated", "disaggregated", "adaptive")
    profile: str | None = None


CASES = {
    "cuda": Plan("qwen3-8b", "C:0 P:0 D:0", Load(mix="mixed", output_tokens=64), rates=(10, 20, 40, 60, 100, 10), seconds=2.5, options=dict(
        load_format="dummy", dtype="bfloat16", max_num_seqs=256, max_num_batched_tokens=2048, max_model_len=8192,
        num_gpu_blocks_override=12_288)),
    "cpu": Plan("tiny", "C:cpu P:cpu D:cpu", Load(mix="mixed", output_tokens=16), rates=(2, 6, 12, 24, 2), seconds=4.0, options=dict(
        dtype="float32", num_gpu_blocks_override=512)),
}
TWO_GPUS = "C:0 C:1 P:0 D:1"  # both ways have both GPUs


def plan(device: str | None = None, **choices: Any) -> Plan:
    """Of a kind of device, by default that of this machine. `choices`: what is to be otherwise, of CHOICES.

    Raises ConfigError where the topology has no workers for a mode.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    made = CASES[kind]
    if kind == "cuda" and torch.cuda.device_count() > 1:
        made = replace(made, topology=TWO_GPUS)
    made = replace(made, **choices)
    for mode in made.modes:
        Topology.parse(made.topology).check_mode(mode)
    return made


def run(plan: Plan, out: Path, **provenance: Any) -> Iterator[Path]:
    """Writes OUT/<device>/live/<mode>.json, each when it is over. `provenance`: command, commit and dirty of the recordings.

    Raises what ends a run before its time.
    """
    on_cpu = Topology.parse(plan.topology).devices == ["cpu"]
    facts = environment.device_facts(on_cpu)
    provenance |= {"device": facts, "versions": environment.versions()}
    progress(f"starting {plan.model} on '{plan.topology}'")
    with one_thread(on_cpu), _open(plan, facts["name"]) as cluster:
        for mode in plan.modes:
            _serve(cluster, plan, mode, (plan.rates[0],), WARM_UP)
            driver = _serve(cluster, plan, mode, plan.rates, plan.seconds)
            now = datetime.now(timezone.utc).isoformat(timespec="seconds")
            path = out / slug(facts["name"]) / FOLDER / f"{mode}.json"
            Recording.of(driver, date=now, **provenance).save(path)
            yield path


def _open(plan: Plan, device: str) -> Cluster:
    """Caches of prefixes off: each mode is sent the same load."""
    preset = f"{slug(device)}/{plan.model}"
    profile = plan.profile or (preset_path(preset) if preset in preset_names() else None)
    mode = "adaptive" if "adaptive" in plan.modes else plan.modes[0]
    return Cluster(plan.model, plan.topology, mode, enable_prefix_caching=False, profile=profile if mode == "adaptive" else None,
                   **plan.options)


def _serve(cluster: Cluster, plan: Plan, mode: str, rates: tuple[float, ...], seconds: float) -> LoadDriver:
    """The driver of a load that has ended."""
    driver = LoadDriver(lambda: cluster, replace(plan.load, mode=mode, rate=rates[0]), keep=None)
    driver.start()
    try:
        for rate in rates:
            driver.change(rate=rate)
            driver.wait(seconds)
            seen = driver.picture()
            progress(f"{mode}, {rate:g}/s: {seen.num_finished} ended, {seen.num_open} open")
    finally:
        driver.stop()
    if driver.error is not None:
        raise driver.error
    return driver
