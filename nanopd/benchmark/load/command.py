"""`nanopd bench serve`: options, what is shown while a load is on, and the table at its end."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from nanopd.benchmark.load.record import Stopped, Tally
from nanopd.benchmark.load.run import (
    OF_CLUSTER,
    RunRecord,
    RunSettings,
    open_cluster,
    run_on_cluster,
    run_on_endpoint,
)
from nanopd.benchmark.load.workloads import NAMES
from nanopd.benchmark.show import print_table, progress
from nanopd.config import EXECUTORS, MODES, ConfigError

WORKLOAD, RATE = "64-256/32", 2.0  # what a laptop's core serves with the embedded model
EVERY = 10  # seconds between two lines about a load, where no terminal shows each second
FIGURES = {"ttft": "first token", "tpot": "time per token after it", "itl": "gap between tokens", "e2el": "whole answer"}


def add_parser(commands: Any) -> None:
    """To the subcommands of `nanopd bench`."""
    parser = commands.add_parser(
        "serve", help="Requests that come whether or not earlier ones are answered, on a cluster or an endpoint: times, goodput.",
        description="Requests that come whether or not earlier ones are answered, on a cluster that is started for them, or on any "
                    "server that speaks OpenAI's /v1/completions. Figures have the names of `vllm bench serve`. "
                    "Ctrl-C ends it early and shows what there is by then.")
    parser.set_defaults(run=run)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write settings, figures and every request's times there, as JSON")
    parser.add_argument("--commit", help="the commit to record, where this copy has no .git")
    _add_server(parser.add_argument_group("who serves"))
    _add_load(parser.add_argument_group("what comes"))


def _add_server(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--model", help="'tiny' (embedded), a local directory, or a Hugging Face name; default: tiny")
    group.add_argument("--topology", help="workers as ROLE:DEVICE, such as 'P:0 D:1'; default: C:0, or C:cpu where there is no GPU")
    group.add_argument("--mode", choices=tuple(MODES), help="default: collocated")
    group.add_argument("--executor", choices=EXECUTORS, help="default: inline where there is one device")
    group.add_argument("--transport", help="between processes: auto, peer, relay or collective")
    group.add_argument("--dtype", help="float32, bfloat16 or float16")
    group.add_argument("--load-format", choices=("auto", "dummy"), help="dummy: random weights")
    group.add_argument("--max-num-seqs", type=positive, metavar="N", help="sequences in a step")
    group.add_argument("--max-num-batched-tokens", type=positive, metavar="N", help="tokens in a step")
    group.add_argument("--max-model-len", type=positive, metavar="N",
                       help="longest prompt and answer together; recorded requests are cut to it")
    group.add_argument("--kv-blocks", type=positive, metavar="N", help="of 16 tokens, in each worker's cache")
    group.add_argument("--profile", metavar="FILE", help="what adaptive mode goes by; default: it is measured at the start")
    group.add_argument("--endpoint", metavar="URL", help="such as http://localhost:8000, of a server that runs --model already; a key, "
                                                         "where it wants one, is taken from the variable OPENAI_API_KEY")


def _add_load(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--workload", metavar="NAME", help=f"{', '.join(NAMES)}, or PROMPTS/OUTPUTS in tokens; default: {WORKLOAD}")
    group.add_argument("--prompts", metavar="TOKENS", help="instead: a number of tokens, a span such as 64-256, or short, long, mixed")
    group.add_argument("--outputs", metavar="TOKENS", help="of each answer, a number or a span")
    group.add_argument("--trace", metavar="FILE", help="instead: recorded requests, Azure's CSV or Mooncake's JSON lines")
    group.add_argument("--speed-up", type=float, default=1.0, metavar="X", help="how many times as fast the trace's requests come")
    group.add_argument("--rate", type=float, metavar="R", help=f"requests a second; default: {RATE:g}")
    group.add_argument("--burstiness", type=float, default=1.0, metavar="SHAPE",
                       help="1: Poisson; below: in bursts; above: more even (shape of the Gamma distribution of the gaps)")
    group.add_argument("--warmup", type=float, default=RunSettings.warmup, metavar="S",
                       help="seconds whose requests do not count; default: %(default)g")
    group.add_argument("--window", type=float, metavar="S",
                       help=f"seconds after them whose requests count; default: {RunSettings.window:g}, or all of a trace")
    group.add_argument("--tail", type=float, default=0.0, metavar="S", help="seconds in which requests go on to come; default: 0")
    group.add_argument("--seed", type=int, default=0, help="another one gives other moments, lengths and prompts")
    group.add_argument("--slo-ttft", type=float, metavar="MS", dest="slo_ttft_ms", help="promised: the first token; with --slo-tpot")
    group.add_argument("--slo-tpot", type=float, metavar="MS", dest="slo_tpot_ms", help="promised: each token after it, on average")


def positive(text: str) -> int:
    """A number of at least 1, of an option."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


# --------------------------------------------------------------------------------------------------- running


def run(options: argparse.Namespace) -> int:
    """Returns the exit code. Raises ConfigError and OSError for what the user can put right."""
    settings = settings_of(options)
    settings.schedule(sys.maxsize)  # says what is wrong with it before anything is started
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)  # says now that it can't be, not when the load is over
    line = _Line()
    try:
        record = _on_endpoint(settings, line) if settings.endpoint else _on_cluster(settings, line)
    except Stopped as stopped:
        line.end()
        _show_stopped(RunRecord.of(settings, stopped.load, {}))
        return 130
    line.end()
    record = replace(record, command=options.command, **({"commit": options.commit, "dirty": None} if options.commit else {}))
    show(record)
    if options.out is not None:
        record.save(options.out)
        progress(f"saved {options.out}")
    return 0


def _show_stopped(record: RunRecord) -> None:
    if not record.requests["arrival"]:
        print("stopped before a request came that counts", file=sys.stderr)
        return
    show(record)
    print("stopped: these are the requests sent by then; those that were still open count as failed. Nothing was saved", file=sys.stderr)


def settings_of(options: argparse.Namespace) -> RunSettings:
    """Raises ConfigError where options exclude each other."""
    _check_one_of(options, "endpoint", OF_CLUSTER)
    _check_one_of(options, "trace", ("workload", "prompts", "outputs", "rate"))
    _check_one_of(options, "workload", ("prompts", "outputs"))
    chosen = {field.name: value for field in fields(RunSettings) if (value := getattr(options, field.name)) is not None}
    if options.endpoint is None:
        chosen.setdefault("topology", _default_topology())
    elif options.model is None:
        raise ConfigError("--endpoint needs --model, the name that the server has for it; GET /v1/models lists them")
    if options.trace is None:
        prompts, outputs = WORKLOAD.split("/")
        chosen = {"workload": f"{options.prompts or prompts}/{options.outputs or outputs}", "rate": RATE} | chosen
    elif options.window is None:
        chosen["window"] = None
    settings = RunSettings(**chosen)
    _ = settings.slo
    return settings


def _check_one_of(options: argparse.Namespace, name: str, others: tuple[str, ...]) -> None:
    given = [other for other in others if getattr(options, other) is not None]
    if getattr(options, name) is not None and given:
        raise ConfigError(f"--{name} and {', '.join(map(_flag, given))} exclude each other: leave one out")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _default_topology() -> str:
    import torch

    return "C:0" if torch.cuda.is_available() else "C:cpu"


def _on_cluster(settings: RunSettings, line: _Line) -> RunRecord:
    from nanopd.demo import one_thread

    progress(f"starting {settings.model} on {settings.topology}, {settings.mode}")
    with one_thread(settings.model == "tiny" and set(settings.topology.split(":")[1::2]) == {"cpu"}), open_cluster(settings) as cluster:
        return run_on_cluster(settings, cluster, line)


def _on_endpoint(settings: RunSettings, line: _Line) -> RunRecord:
    progress(f"asking {settings.endpoint}")
    return run_on_endpoint(settings, line)


class _Line:
    """How far the load is: on a terminal a line that changes each second, elsewhere a line now and then."""

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._has_begun = False

    def __call__(self, tally: Tally) -> None:
        text = f"  {tally.seconds:4.0f} s: {tally.sent} of {tally.total} sent, {tally.open} open, {tally.ended} ended"
        if self._is_terminal:
            print(f"\r{text}\x1b[K", end="", file=sys.stderr, flush=True)
            self._has_begun = True
        elif int(tally.seconds) % EVERY == 0:
            print(text, file=sys.stderr, flush=True)

    def end(self) -> None:
        if self._has_begun:
            print(file=sys.stderr)


# ------------------------------------------------------------------------------------------------- the table


def show(record: RunRecord) -> None:
    """A table of times, and in lines what else there is to say."""
    found = record.metrics
    print(f"\nnanopd bench serve: {_what(record.settings)}")
    columns = ("mean", "median", "p90", "p99")
    print_table(["milliseconds", *columns, "p99, 95% sure"], [
        [text, *(_ms(found[f"{column}_{name}_ms"]) for column in columns), _interval(found["ci"].get(f"p99_{name}_ms"))]
        for name, text in FIGURES.items()])
    for line in _lines(record):
        print(line)


def _what(settings: dict[str, Any]) -> str:
    who = settings["endpoint"] or f"{settings['topology']}, {settings['mode']}"
    if settings["trace"]:
        what = f"{Path(settings['trace']).name}, {settings['speed_up']:g} times as fast"
    else:
        what = f"{settings['workload']}, {settings['rate']:g} requests/s, burstiness {settings['burstiness']:g}, seed {settings['seed']}"
    return f"{settings['model']} on {who}; {what}"


def _lines(record: RunRecord) -> list[str]:
    found, slo = record.metrics, (record.settings["slo_ttft_ms"], record.settings["slo_tpot_ms"])
    lines = [f"{found['completed']} completed, {found['failed']} failed, {found['dropped']} dropped; over {found['duration']:.1f} s",
             f"{found['request_throughput']:.2f} requests/s, {found['output_throughput']:,.0f} output tokens/s, "
             f"{found['total_token_throughput']:,.0f} tokens/s; {found['window_output_throughput']:,.0f} output tokens/s in the window"]
    if found["attainment"] is not None:
        lines.append(f"{found['attainment']:.1%} met the SLO (TTFT {slo[0]:g} ms, TPOT {slo[1]:g} ms), 95% sure "
                     f"{_interval(found['ci'].get('attainment'), '{:.1%}')}; goodput {found['request_goodput']:.2f} requests/s")
    if found["mean_lateness_ms"] is not None:
        lines.append(f"the client sent {found['mean_lateness_ms']:.1f} ms late on average, p99 {found['p99_lateness_ms']:.1f} ms")
    if len(found["shares"]) > 1:
        lines.append("went " + ", ".join(f"{mode} {share:.0%}" for mode, share in found["shares"].items()))
    return lines + _warnings(record)


def _warnings(record: RunRecord) -> list[str]:
    found, lines = record.metrics, []
    if found["steady"]["why"]:
        lines.append(f"not steady: {found['steady']['why']}")
    if record.num_cut:
        lines.append(f"{record.num_cut} requests were cut, for longer ones the server does not take")
    if found["merged_tokens"]:
        lines.append(f"{found['merged_tokens']} of {found['total_output_tokens']} tokens came in a piece with another one: ITL is of "
                     "pieces, TPOT of tokens")
    return lines


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"


def _interval(ends: list[float] | None, form: str = "{:,.1f}") -> str:
    return "-" if ends is None else f"{form.format(ends[0])} to {form.format(ends[1])}"
