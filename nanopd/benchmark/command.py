"""`nanopd bench`: options, the order of things, and where the results go. Loads torch only to measure."""

from __future__ import annotations

import argparse
import math
import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nanopd.benchmark.load import command as load_command
from nanopd.benchmark.results import RECORDED, Report, rounded
from nanopd.benchmark.show import progress, show
from nanopd.benchmark.sweep_command import add_parsers

if TYPE_CHECKING:
    from nanopd.llm import LLM

HOT = "the GPU lowers its clock under heavy load: each compute-bound figure stands beside the matmul rate of that moment"
TIMED = "kernels: CUDA graphs over rotating buffers, median of several replays"
SENT = "wall time until the last byte is there, several sends in a row; scattered blocks of 16 tokens; median of several turns"
STEPS = "one cluster holds both pipelines, P:0 D:1 and C:0 C:1; idle: one request at a time, the pipelines in turn"
OPEN = ("Poisson arrivals, sent whether or not earlier ones are answered; the router knows of each answer its longest length; "
        "simulated: the same arrivals, by the profile measured at the start of the run")
SIMULATED = ("simulated, not measured: the real schedulers and routers, with times by each hardware's profile or preset; goodput and "
             "attainment of requests after the warming up; a rate is the highest at which 90% of the requests met the SLO")
PREFIXES = ("simulated, not measured: the real schedulers, caches and routers, with times by the hardware's preset; both routers "
            "are the reference, and workers keep what they have computed either way")
STEADY = "decode: wall time of engine.step() over consecutive steps; idle: outside of the steps' CUDA graphs"


class Found(NamedTuple):
    """What a benchmark hands over to be recorded."""

    ceilings: dict[str, float]
    rows: list[dict[str, Any]]
    summary: dict[str, Any]
    notes: list[str]
    on_cpu: bool = False


def main(args: list[str]) -> int:
    """Run one benchmark, or all of them. Returns the exit code."""
    options = _parser().parse_args(args)
    options.command = _command(args)
    try:
        return options.run(options)
    except (ValueError, OSError) as error:
        print(f"nanopd: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; of the benchmark that was running nothing was saved", file=sys.stderr)
        return 130


def _command(args: list[str]) -> str:
    """What to type for the same figures: where they are written to does not matter."""
    _, words = _common().parse_known_args(args)
    return shlex.join(["nanopd", "bench", *words])


# --------------------------------------------------------------------------------------------------- options


def _common() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--out", type=Path, default=RECORDED, metavar="DIR",
                        help="write DIR/<device>/<benchmark>.json; default: %(default)s")
    common.add_argument("--commit", help="the commit to record, where this copy has no .git")
    return common


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nanopd bench", description="What this machine reaches, beside what it allows.")
    commands = parser.add_subparsers(required=True, metavar="BENCHMARK")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, parents=[_common()], help=text, description=text)
        added.set_defaults(run=run)
        return added

    kernels = command("kernels", _alone(_kernels), "Attention, linear layers and small kernels, each alone.")
    kernels.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: the reference path, small sizes")
    kernels.add_argument("--only", nargs="+", choices=("decode_attention", "small", "linear", "prefill_attention"))
    kernels.add_argument("--no-peers", action="store_true", help="leave FlashInfer out, also where it is installed")

    decode = command("decode", _alone(_decode), "Time of a decode step in the engine, beside its floor.")
    decode.add_argument("--model", help="default: qwen3-8b, and qwen3-0.6b at 1x512")
    decode.add_argument("--cells", nargs="+", type=_cell, metavar="BxCONTEXT", help="such as 16x1024")
    decode.add_argument("--steps", type=_positive, default=50)

    prefill = command("prefill", _alone(_prefill), "Time to a lone prompt's first token, and the rate that makes.")
    prefill.add_argument("--model", default="qwen3-8b")
    prefill.add_argument("--tokens", nargs="+", type=_positive, help="prompt lengths")

    static = command("static", _alone(_static), "Many requests at once: tokens written a second.")
    static.add_argument("--model", default="qwen3-8b")
    static.add_argument("--sets", nargs="+", type=_set, metavar="NxFROM-TO", help="requests and their prompts, such as 48x64-256")
    static.add_argument("--output", type=_positive, default=128, help="tokens of each answer")
    static.add_argument("--peer", choices=("transformers",), help="the same requests through transformers' generate_batch")

    scheduler = command("scheduler", _alone(_scheduler), "CPU time to plan a step and to take its result in. Needs no GPU.")
    scheduler.add_argument("--batches", nargs="+", type=_positive)
    scheduler.add_argument("--context", type=_positive, default=1024)
    scheduler.add_argument("--steps", type=_positive, default=200)

    transfer = command("transfer", _alone(_transfer), "Blocks of a KV cache from one GPU to another, by each transport.")
    cluster = command("cluster", _alone(_cluster), "Prefill and decode on two GPUs: what the transfer costs, and what it gives.")
    routing = command("routing", _alone(_routing), "Three modes under an open loop, beside what profile and simulator say of them.")
    for two in (transfer, cluster, routing):
        two.add_argument("--device", choices=("cuda", "cpu"), default="cuda",
                         help="cpu: the embedded model in processes on the CPU, to see that it works")

    study = command("study", _alone(_study), "Simulated: adaptive mode beside each fixed way to use as many workers. Needs no GPU.")
    study.add_argument("--jobs", type=_positive, default=os.cpu_count(), help="processes that work side by side")
    study.add_argument("--only", nargs="+", default=(), metavar="PART",
                       help="the cells whose names have all of these in them, such as: h200 mixed tight")

    prefixes = command("prefixes", _alone(_prefixes), "Simulated: what it is worth that the router knows who has computed what. "
                                                      "Needs no GPU.")
    prefixes.add_argument("--trace", type=Path, required=True, metavar="FILE", help="with prefixes: Mooncake's JSON lines")
    prefixes.add_argument("--requests", type=_positive, default=2000, help="of the trace; default: the first %(default)s")
    prefixes.add_argument("--speed-up", type=float, default=2.0, metavar="FACTOR", help="default: %(default)s times as fast")

    record = command("record", _live, "Live serving under a load that rises past what can be served, in each mode, for the workbook "
                                      "to replay: DIR/<device>/live/<mode>.json.")
    record.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    record.add_argument("--model", help="default: qwen3-8b with random weights, or tiny on the CPU")
    record.add_argument("--topology", help="workers for all modes, such as 'C:0 C:1 P:0 D:1'; default: these on two GPUs, 'C P D' on one")
    record.add_argument("--modes", nargs="+", choices=("collocated", "disaggregated", "adaptive"), help="default: all")
    record.add_argument("--rates", nargs="+", type=_above_0, metavar="R", help="requests a second, one after the other")
    record.add_argument("--seconds", type=_above_0, metavar="S", help="of each rate")
    record.add_argument("--profile", metavar="FILE", help="what adaptive mode goes by; default: the preset of this device and model, or "
                                                          "measured at the start")

    load_command.add_parser(commands)
    add_parsers(commands)

    command("all", _all, "All that need one GPU, what heats it last; about four minutes on an H200.")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def _above_0(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def _cell(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not BATCHxCONTEXT, such as 16x1024")
    return int(match[1]), int(match[2])


def _set(text: str) -> tuple[int, int, int]:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)-([1-9]\d*)", text)
    if match is None or int(match[2]) > int(match[3]):
        raise argparse.ArgumentTypeError(f"{text!r} is not REQUESTSxFROM-TO, such as 48x64-256")
    return int(match[1]), int(match[2]), int(match[3])


# ------------------------------------------------------------------------------------------------ benchmarks


def _alone(measure: Callable[[argparse.Namespace], Found]) -> Callable[[argparse.Namespace], int]:
    def run(options: argparse.Namespace) -> int:
        _record(measure.__name__.strip("_"), measure(options), options)
        return 0
    return run


def _kernels(options: argparse.Namespace) -> Found:
    if options.device == "cpu":
        from nanopd.benchmark.attention import reference_rows

        return Found({}, list(reference_rows()), {}, ["the reference path, float32, wall time, median of 20"],
                     on_cpu=True)
    _require_gpu("kernels", "; `nanopd bench kernels --device cpu` times the reference path at small sizes")
    from nanopd.benchmark import ceilings, kernels

    measured = ceilings.measure()
    rows, summary = kernels.run(measured["read_gb_s"], options.only or kernels.OPS, not options.no_peers)
    return Found(measured, rows, summary, [TIMED, HOT])


def _decode(options: argparse.Namespace) -> Found:
    _require_gpu("decode")
    from nanopd.benchmark import ceilings, serving

    work = {options.model: options.cells or serving.DECODES} if options.model else {
        serving.SMALL_MODEL: serving.SMALL_DECODES, "qwen3-8b": options.cells or serving.DECODES}
    measured, rows, starts = ceilings.measure(), [], {}
    for model, cells in work.items():
        llm, starts[model] = _engines.open(model)
        rows += serving.decode_rows(llm, model, cells, measured["read_gb_s"], options.steps)
    return Found(measured, rows, {"startup": starts}, [STEADY, HOT])


def _prefill(options: argparse.Namespace) -> Found:
    _require_gpu("prefill")
    from nanopd.benchmark import ceilings, serving

    measured = ceilings.measure()
    llm, start = _engines.open(options.model)
    rows = list(serving.prefill_rows(llm, options.model, options.tokens or serving.PROMPTS))
    return Found(measured, rows, {"startup": {options.model: start}}, [HOT])


def _static(options: argparse.Namespace) -> Found:
    _require_gpu("static")
    from nanopd.benchmark import ceilings, serving

    measured, sets = ceilings.measure(), options.sets or serving.SETS
    llm, start = _engines.open(options.model)
    rows = list(serving.serve_rows(llm, options.model, sets, options.output))
    if options.peer:
        del llm
        _engines.close()
        rows += serving.transformers_rows(options.model, sets, options.output)
    return Found(measured, rows, {"startup": {options.model: start}}, [HOT])


def _scheduler(options: argparse.Namespace) -> Found:
    from nanopd.benchmark import planning

    rows = planning.run(options.batches or planning.BATCHES, options.context, options.steps)
    return Found({}, rows, {}, ["steady decode, greedy, prefix cache on; one CPU core"])


def _transfer(options: argparse.Namespace) -> Found:
    _require_two_gpus("transfer", options.device)
    from nanopd.benchmark import transfers

    return Found(*transfers.run(transfers.CASES[options.device]), [SENT], on_cpu=options.device == "cpu")


def _cluster(options: argparse.Namespace) -> Found:
    _require_two_gpus("cluster", options.device)
    from nanopd.benchmark import clusters

    rows, summary = clusters.run(clusters.CASES[options.device])
    return Found({}, rows, summary, [STEPS], on_cpu=options.device == "cpu")


def _routing(options: argparse.Namespace) -> Found:
    _require_two_gpus("routing", options.device)
    from nanopd.benchmark import routing
    from nanopd.benchmark.results import slug

    case = routing.CASES[options.device]
    rows, summary, profile = routing.run(case)
    profile.save(options.out / slug(profile.device) / f"profile-{case.model}.json")
    return Found({}, rows, summary, [OPEN], on_cpu=options.device == "cpu")


def _study(options: argparse.Namespace) -> Found:
    from nanopd.benchmark import study

    cells = [cell for cell in study.CELLS if all(part in str(cell) for part in options.only)]
    if not cells:
        raise ValueError(f"no cell has all of {', '.join(map(repr, options.only))} in its name; there are\n"
                         + "\n".join(map(str, study.CELLS)))
    rows, summary = study.run(cells, options.jobs)
    return Found({}, rows, summary, [SIMULATED], on_cpu=True)


def _prefixes(options: argparse.Namespace) -> Found:
    from nanopd.benchmark import prefixes
    from nanopd.simulator.traces import read_trace

    trace = read_trace(options.trace).sped_up(options.speed_up).first(options.requests)
    if not any(one.prefix for one in trace):
        raise ValueError(f"the trace {options.trace} does not say which prompts begin alike (hash_ids): there is nothing to find")
    rows, summary = prefixes.run(trace)
    return Found({}, rows, summary, [PREFIXES], on_cpu=True)


def _live(options: argparse.Namespace) -> int:
    from nanopd.benchmark import environment, live

    commit, dirty = (options.commit, None) if options.commit else environment.commit()
    for path in live.run(live.plan(options.device, **{name: value for name in live.CHOICES if (value := getattr(options, name))}),
                         options.out, command=options.command, commit=commit, dirty=dirty):
        progress(f"saved {path}")
    return 0


def _all(options: argparse.Namespace) -> int:
    """One after the other, each saved when it is done. One that fails does not keep the others from running."""
    _require_gpu("all")
    failed = []
    for name in ("scheduler", "kernels", "decode", "prefill", "static"):
        chosen = _parser().parse_args([name])
        chosen.out, chosen.commit, chosen.command = options.out, options.commit, options.command
        try:
            chosen.run(chosen)
        except Exception:
            traceback.print_exc()
            failed.append(name)
    if failed:
        print(f"nanopd: failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


# ----------------------------------------------------------------------------------------------------- parts


def _require_gpu(bench: str, otherwise: str = "; `nanopd bench scheduler` runs anywhere") -> None:
    import torch

    from nanopd.benchmark.environment import CannotMeasure

    if not torch.cuda.is_available():
        raise CannotMeasure(f"`bench {bench}` needs a CUDA device, and torch sees none{otherwise}")


def _require_two_gpus(bench: str, device: str) -> None:
    import torch

    from nanopd.benchmark.environment import CannotMeasure

    if device == "cuda" and torch.cuda.device_count() < 2:
        raise CannotMeasure(f"`bench {bench}` needs two CUDA devices, and torch sees {torch.cuda.device_count()}; "
                            f"`nanopd bench {bench} --device cpu` shows it on the CPU")


class _Engines:
    """Keeps the engine that was last asked for: several benchmarks in a row use it."""

    def __init__(self) -> None:
        self._model: str | None = None
        self._opened: tuple[LLM, dict[str, Any]] | None = None

    def open(self, model: str) -> tuple[LLM, dict[str, Any]]:
        """The engine and its start-up times."""
        from nanopd.benchmark.serving import open_model

        if self._opened is None or self._model != model:
            self.close()
            self._model, self._opened = model, open_model(model)
        return self._opened

    def close(self) -> None:
        if self._opened is not None:
            self._opened[0].shutdown()
            self._opened = None


_engines = _Engines()


def _record(bench: str, found: Found, options: argparse.Namespace) -> None:
    from nanopd.benchmark import environment

    commit, dirty = (options.commit, None) if options.commit else environment.commit()
    report = Report(
        bench=bench, date=datetime.now(timezone.utc).isoformat(timespec="seconds"), command=options.command,
        commit=commit, dirty=dirty, device=environment.device_facts(found.on_cpu), versions=environment.versions(),
        ceilings=rounded(found.ceilings), rows=rounded(found.rows), summary=rounded(found.summary), notes=found.notes)
    show(report)
    progress(f"saved {report.save(options.out)}")
