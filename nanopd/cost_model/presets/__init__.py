"""Profiles that come with the package, and how one is made of recorded benchmarks.

A preset is a file, <device>/<model>.json, that a running cluster was measured for, as `nanopd profile` does. `from_results`
makes a profile without another measurement, of what `nanopd bench decode | prefill | transfer` recorded. It tells less: those
run one thing at a time.

    from_results(RECORDED / "nvidia-h200", "qwen3-8b", load_spec("qwen3-8b"))
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nanopd.config import ModelSpec
from nanopd.cost_model.analytical import Shape
from nanopd.cost_model.checks import CostModelError
from nanopd.cost_model.measurements import DecodeRow, Measurements, PrefillRow, TransferRow
from nanopd.cost_model.profile import Profile

PRESETS = Path(__file__).parent
SEED = "seed"  # the folder of the earlier system's parameters, which are no profiles
DTYPE = "bfloat16"  # what the benchmarks run in
BYTES_PER_ELEMENT = 2
LARGE_MB = 500  # from here on the latency is less than a hundredth of a send, or little more
PAIR = ("cuda:0", "cuda:1")  # that transfers are recorded between


def preset_names() -> list[str]:
    """Such as "nvidia-h200/qwen3-8b"."""
    found = (path.relative_to(PRESETS).with_suffix("").as_posix() for path in PRESETS.glob("*/*.json"))
    return sorted(name for name in found if not name.startswith(f"{SEED}/"))


def preset_path(name: str) -> Path:
    return PRESETS / f"{name}.json"


def preset(name: str) -> Profile:
    """Raises CostModelError where there is no such preset; the message says which there are."""
    if name not in preset_names():
        raise CostModelError(f"no preset {name!r}; there are {', '.join(preset_names()) or 'none'}. Measure a machine with "
                             "`nanopd profile` for one of its own")
    return Profile.load(preset_path(name))


def from_results(folder: Path, model: str, spec: ModelSpec) -> Profile:
    """A profile from a device's recorded results: decode.json and prefill.json, and transfer.json where it is there.

    No benchmark times steps that mix prompts and decodes, so what decodes add to a prompt's step is assumed. Contexts and
    batches go together in what is recorded by default, so what a sequence computes is told from what its context costs
    by the bend of the roofline only.

    Raises:
        CostModelError: a file is missing, is of another device than the others, or has too few rows of this model.
    """
    reports = {bench: _report(folder / f"{bench}.json") for bench in ("decode", "prefill")}
    if (folder / "transfer.json").exists():
        reports["transfer"] = _report(folder / "transfer.json")
    devices = {report["device"]["name"] for report in reports.values()}
    if len(devices) > 1:
        raise CostModelError(f"the results in {folder} are of several devices: {', '.join(sorted(devices))}")
    measurements = Measurements(
        prefill=tuple(PrefillRow(seconds=row["ms"] / 1e3, new_tokens=row["tokens"], cached_tokens=0)
                      for row in reports["prefill"]["rows"] if row["model"] == model),
        decode=tuple(DecodeRow(seconds=row["ms"] / 1e3, decodes=row["batch"],
                               context_tokens=float(row["batch"] * row["mean_context"]))
                     for row in reports["decode"]["rows"] if row["model"] == model),
        transfer=tuple(_transfer_rows(reports.get("transfer"), spec.num_layers)))
    return Profile.of(
        measurements, Shape(spec.num_layers, spec.kv_bytes_per_token(BYTES_PER_ELEMENT)), device=devices.pop(), model=model,
        dtype=DTYPE, date=max(report["date"] for report in reports.values()), versions=reports["decode"]["versions"],
        notes=(*(_origin(report) for report in reports.values()),
               "what decodes add to a step with a prompt is assumed, not measured",
               "prefill: from a lone prompt's arrival to its first token, in one step"))


def _transfer_rows(report: dict[str, Any] | None, num_layers: int) -> list[TransferRow]:
    """Of the GPUs' benchmark what tells the rate, large sends whole, and one small send that tells the latency: its other
    rows are of many sends in a row, which hide the latency."""
    if report is None or report["device"]["kind"] == "cpu":
        return []
    rows = [row for row in report["rows"] if row["pieces"] == "whole"]
    layer_bytes = {row["transport"]: row["mb"] * 1e6 / row["blocks"] / num_layers for row in rows}
    return [*(TransferRow(row["ms"] / 1e3, *PAIR, row["transport"], row["mb"] * 1e6) for row in rows if row["mb"] >= LARGE_MB),
            *(TransferRow(latency / 1e6, *PAIR, transport, layer_bytes[transport])
              for transport, latency in report["summary"]["latency_us"].items())]


def _origin(report: dict[str, Any]) -> str:
    commit = report["commit"][:7] if report["commit"] else "none"
    return f"{report['bench']}: recorded {report['date'][:10]}, commit {commit}{' with changes' if report['dirty'] else ''}"


def _report(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CostModelError(f"can't read the recorded result {path}: {error}; record it with `nanopd bench {path.stem}`") from None
