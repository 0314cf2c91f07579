"""The `nanopd` command. Each subcommand loads what it needs when it runs, so that --help answers at once."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import nanopd
from nanopd.lab.command import app as lab
from nanopd.terminal import plain_errors as _plain_errors

if TYPE_CHECKING:
    from rich.console import Console

    from nanopd.cost_model.profile import Profile
    from nanopd.llm import LLM

app = typer.Typer(
    name="nanopd",
    help="A small LLM inference engine with prefill/decode disaggregation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
app.add_typer(lab, name="lab")

Model = Annotated[str, typer.Option(help="'tiny' (embedded), a local directory, or a Hugging Face name.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N. Default: a GPU if there is one.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. Default: float32 on a CPU, the checkpoint's on "
                                                "a GPU.")]
MaxModelLen = Annotated[int | None, typer.Option(min=2, help="Longest prompt and answer together, in tokens.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"nanopd {nanopd.__version__}")
        raise typer.Exit


@app.callback()
def main(version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True,
                                               help="Print the version and leave.")] = False) -> None:
    """A small LLM inference engine with prefill/decode disaggregation."""


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False) -> None:
    """Say what this machine has and what runs on it. Fails only where the engine can't run at all."""
    from nanopd.doctor import examine, render

    report = examine()
    if as_json:
        typer.echo(report.to_json())
    else:
        from rich.console import Console

        Console().print(render(report))
    raise typer.Exit(report.exit_code)


@app.command()
def demo(
    model: Model = "tiny",
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 320,
    device: Device = None,
    topology: Annotated[str | None, typer.Option(
        help="Workers as ROLE:DEVICE, P (prefill) and D (decode), also C (collocated): 'P:0 D:1'. Default: all on "
             "one device.")] = None,
    executor: Annotated[str | None, typer.Option(
        help="inline: one process; process: one for each GPU, or each worker on the CPU; ray: the same on all machines of a "
             "Ray cluster. Default: inline where there is one device.")] = None,
) -> None:
    """Run the same prompts in all three modes and compare them. Fails where they differ."""
    from rich.console import Console

    from nanopd.demo import run, show

    console = Console()
    with _plain_errors():
        if console.is_terminal:
            with console.status("starting") as status:
                result = run(model, max_tokens, device, topology, executor, progress=status.update)
        else:
            result = run(model, max_tokens, device, topology, executor,
                         progress=lambda text: console.print(text, highlight=False))
    show(result, console)
    raise typer.Exit(result.exit_code)


@app.command()
def generate(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="One or more; - reads one from stdin.")],
    model: Model = "tiny",
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 always takes the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="Draw from the k likeliest tokens; 0: from all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens of this total probability.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Draw the same answers again.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put each prompt into the model's chat template.")] = False,
    device: Device = None,
    dtype: Dtype = None,
    max_model_len: MaxModelLen = None,
) -> None:
    """Answer prompts. One is printed as it is written; several are answered together, one after the other."""
    with _plain_errors():
        from nanopd import LLM, SamplingParams

        texts = [sys.stdin.read().rstrip("\n") if prompt == "-" else prompt for prompt in prompts]
        params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, max_tokens=max_tokens)
        llm = LLM(model, device=device, dtype=dtype, max_model_len=max_model_len)
        if len(texts) == 1 and not chat:
            _print_stream(llm, texts[0], params)
        else:
            _print_answers(llm, texts, params, chat)


@app.command()
def profile(
    model: Model = "tiny",
    topology: Annotated[str | None, typer.Option(
        help="Workers as ROLE:DEVICE, C (collocated), P (prefill) and D (decode); links are measured from P's devices to "
             "D's. Default: 'C:0 P:0 D:1', or one of each on the only device.")] = None,
    executor: Annotated[str | None, typer.Option(
        help="inline: one process; process: one for each GPU, or each worker on the CPU; ray: the same on all machines of a "
             "Ray cluster. Default: inline where there is one device.")] = None,
    transport: Annotated[str, typer.Option(help="Between processes: auto, peer, relay or collective.")] = "auto",
    dtype: Dtype = None,
    load_format: Annotated[str, typer.Option(help="auto: the checkpoint's weights; dummy: random ones.")] = "auto",
    max_model_len: MaxModelLen = None,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Most sequences in a step.")] = 64,
    max_num_batched_tokens: Annotated[int, typer.Option(min=1, help="Most tokens in a step.")] = 512,
    seconds: Annotated[float | None, typer.Option(min=1, help="Time to take, about. Default: 50 on a GPU, 25 on a CPU.")] = None,
    out: Annotated[Path, typer.Option(help="JSON file to write.")] = Path("profile.json"),
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
) -> None:
    """Measure what steps and transfers take here, and fit the cost model that adaptive mode and the simulator go by."""
    from rich.console import Console

    with _plain_errors():
        if out.exists() and not force:
            raise ValueError(f"{out} is there already: name another file with --out, or write over it with --force")
        from nanopd.config import Topology
        from nanopd.cost_model.table import table
        from nanopd.demo import one_thread

        workers = Topology.parse(topology or _every_role())
        console = Console()
        with one_thread(model == "tiny" and workers.devices == ["cpu"]):
            measured = _measure(console, seconds, model=model, topology=str(workers), executor=executor, transport=transport,
                                mode="collocated" if any(each.role == "C" for each in workers.placements) else "disaggregated",
                                dtype=dtype, load_format=load_format, max_model_len=max_model_len, max_num_seqs=max_num_seqs,
                                max_num_batched_tokens=max_num_batched_tokens)
        measured.save(out)
        console.print(table(measured))
        for note in measured.notes:
            console.print(note, style="bright_black", highlight=False)
        console.print(f"Written to {out}. Errors are of rows left out of the fit; times in seconds.", highlight=False)


def _every_role() -> str:
    """A topology in which all there is to measure can be measured, if possible a link between two GPUs."""
    import torch

    if torch.cuda.device_count() > 1:
        return "C:0 P:0 D:1"
    return "C:{0} P:{0} D:{0}".format("0" if torch.cuda.is_available() else "cpu")


def _measure(console: Console, seconds: float | None, **options: Any) -> Profile:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from nanopd.cluster import Cluster
    from nanopd.cost_model.profiler import profile_cluster

    columns = TextColumn("{task.description}", style="bright_black"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(f"loading {options['model']} for {options['topology']}", total=1.0)
        with Cluster(**options) as cluster:
            return profile_cluster(cluster, lambda text, share: progress.update(task, description=text, completed=share), seconds)


# What simulations are made of.
Hardware = Annotated[str, typer.Option(help="A preset, or a profile.json. An unknown name lists the presets.")]
Prompts = Annotated[str, typer.Option(help="short (64-256 tokens), long (1024-2048), mixed, or a number or span.")]
Outputs = Annotated[str, typer.Option(help="Tokens of an answer, a number or a span: 128, 16-512.")]
Seed = Annotated[int, typer.Option(help="Another one gives other moments and lengths.")]
TraceFile = Annotated[Path | None, typer.Option(help="A recorded workload instead: Azure's CSV or Mooncake's JSON lines.")]
Limit = Annotated[int | None, typer.Option(help="Only the trace's first so many requests.")]
KvBlocks = Annotated[int, typer.Option(help="Of 16 tokens, in each worker's cache.")]
MaxNumSeqs = Annotated[int, typer.Option(help="Sequences of a step.")]
MaxNumBatchedTokens = Annotated[int, typer.Option(help="Tokens of a step.")]
LongestRequest = Annotated[int, typer.Option(help="Longest prompt and answer together, in tokens.")]
PRESET = "nvidia-h200/qwen3-8b"


@app.command()
def simulate(
    hardware: Hardware = PRESET,
    workers: Annotated[str, typer.Option(help="How many of each role, C (collocated), P (prefill), D (decode), each on a "
                                              "device of its own: 'C=4', 'C=2 P=1 D=1'.")] = "C=2 P=1 D=1",
    mode: Annotated[str, typer.Option(help="collocated, disaggregated or adaptive.")] = "adaptive",
    router: Annotated[str | None, typer.Option(help="Chooses in mode adaptive. Default: cost. An unknown name lists them.")] = None,
    rate: Annotated[float, typer.Option(help="Requests a second, at independent moments (Poisson).")] = 4.0,
    requests: Annotated[int, typer.Option(help="How many come.")] = 1000,
    prompts: Prompts = "mixed",
    outputs: Outputs = "128",
    seed: Seed = 0,
    trace: TraceFile = None,
    speed_up: Annotated[float, typer.Option(help="How many times as fast the trace's requests come.")] = 1.0,
    limit: Limit = None,
    slo_ttft: Annotated[float | None, typer.Option(help="Promised: the first token within so many ms; with --slo-tpot.")] = None,
    slo_tpot: Annotated[float | None, typer.Option(help="Promised: each token after it within so many ms on average.")] = None,
    kv_blocks: KvBlocks = 8192,
    max_num_seqs: MaxNumSeqs = 128,
    max_num_batched_tokens: MaxNumBatchedTokens = 2048,
    max_model_len: LongestRequest = 8192,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result there too.")] = None,
) -> None:
    """Serve a workload on hardware that is not here: the real scheduling and routing, with times that a cost model says."""
    from rich.console import Console

    from nanopd.config import SchedulerConfig
    from nanopd.simulator import command
    from nanopd.simulator.hardware import hardware as find_hardware

    with _plain_errors():
        scheduler = SchedulerConfig(max_num_seqs, max_num_batched_tokens, None, max_model_len)
        if trace is None:
            workload = command.poisson_workload(rate, requests, prompts, outputs, seed)
        else:
            workload = command.trace_workload(trace, speed_up, limit, min(max_model_len, kv_blocks * 16))
        with _progress(len(workload.arrivals)) as progress:
            report = command.simulate(find_hardware(hardware), command.parse_workers(workers), mode, workload,
                                      command.cache_for(workload, kv_blocks), scheduler,
                                      router=router, slo=_slo(slo_ttft, slo_tpot), progress=progress)
        if json_file is not None:
            json_file.write_text(report.to_json(), encoding="utf-8")
    command.show(report, Console())


@app.command()
def plan(
    slo_ttft: Annotated[float, typer.Option(help="Promised: the first token within so many ms.")],
    slo_tpot: Annotated[float, typer.Option(help="Promised: each token after it within so many ms on average.")],
    hardware: Hardware = PRESET,
    workers: Annotated[int, typer.Option(help="How many there are to share out, each on a device of its own.")] = 4,
    prompts: Prompts = "mixed",
    outputs: Outputs = "128",
    seed: Seed = 0,
    trace: TraceFile = None,
    limit: Limit = None,
    rate: Annotated[float | None, typer.Option(help="Requests a second: say which splits serve so many in time.")] = None,
    check: Annotated[int, typer.Option(help="Simulate the best so many splits, and adaptive mode; 0: formulas alone.")] = 3,
    kv_blocks: KvBlocks = 8192,
    max_num_seqs: MaxNumSeqs = 128,
    max_num_batched_tokens: MaxNumBatchedTokens = 2048,
    max_model_len: LongestRequest = 8192,
) -> None:
    """Say which split of collocated, prefill and decode workers serves the most requests in time per GPU."""
    from rich.console import Console

    from nanopd.config import SchedulerConfig
    from nanopd.simulator import command, plan
    from nanopd.simulator.hardware import hardware as find_hardware

    with _plain_errors():
        scheduler = SchedulerConfig(max_num_seqs, max_num_batched_tokens, None, max_model_len)
        if trace is None:
            load = plan.poisson_load(prompts, outputs, seed)
        else:
            load = plan.trace_load(command.trace_workload(trace, 1.0, limit, min(max_model_len, kv_blocks * 16)))
        with Console(stderr=True).status("planning") as status:
            found = plan.plan(find_hardware(hardware), workers, _slo(slo_ttft, slo_tpot), load,
                              command.cache_for(load(1.0), kv_blocks), scheduler, rate=rate, check=check, progress=status.update)
    plan.show(found, Console())


@app.command()
def serve(
    model: Model = "tiny",
    topology: Annotated[str | None, typer.Option(
        help="Workers as ROLE:DEVICE, C (collocated), P (prefill) and D (decode): 'P:0 D:1'. Default: one C, on a GPU if there "
             "is one.")] = None,
    mode: Annotated[str | None, typer.Option(
        help="collocated, disaggregated or adaptive. Default: the one that uses all the workers.")] = None,
    executor: Annotated[str | None, typer.Option(
        help="inline: one process; process: one for each GPU, or each worker on the CPU; ray: the same on all machines of a "
             "Ray cluster. Default: inline where there is one device.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on. 127.0.0.1 is for this machine alone.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: one that is free.")] = 8000,
    api_key: Annotated[str | None, typer.Option(envvar="NANOPD_API_KEY", help="Ask clients for this key.")] = None,
    dtype: Dtype = None,
    load_format: Annotated[str, typer.Option(help="auto: the checkpoint's weights; dummy: random ones.")] = "auto",
    max_model_len: MaxModelLen = None,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Most sequences in a step.")] = 64,
    max_num_batched_tokens: Annotated[int, typer.Option(min=1, help="Most tokens in a step.")] = 512,
    max_queued: Annotated[int, typer.Option(min=1, help="Most prompts open at once; beyond, clients are told to come later.")] = 1024,
    max_streams: Annotated[int, typer.Option(min=1, help="Most answers streamed at once.")] = 1024,
    max_body: Annotated[int, typer.Option(min=1, help="Most bytes of a request.")] = 2 * 2**20,
    timeout: Annotated[float | None, typer.Option(min=0, help="Seconds an answer may take. Default: as long as it takes.")] = None,
    profile: Annotated[Path | None, typer.Option(help="Of `nanopd profile`, for mode adaptive. Default: measured now.")] = None,
    slo_ttft: Annotated[float | None, typer.Option(help="Mode adaptive: the first token within so many ms; with --slo-tpot.")] = None,
    slo_tpot: Annotated[float | None, typer.Option(help="Mode adaptive: each token after it within so many ms on average.")] = None,
) -> None:
    """Serve OpenAI's API: completions and chat, streaming, models, health and Prometheus metrics."""
    from rich.console import Console

    with _plain_errors():
        try:
            from nanopd.server import command
            from nanopd.server.answering import ServerLimits
        except ModuleNotFoundError as error:
            raise ValueError(f"{error.name} is not installed: pip install 'nanopd[serve]'") from error
        command.serve(model, topology, mode, executor=executor, host=host, port=port, api_key=api_key, dtype=dtype,
                      load_format=load_format, max_model_len=max_model_len, max_num_seqs=max_num_seqs,
                      max_num_batched_tokens=max_num_batched_tokens, max_queued=max_queued, profile=profile,
                      slo=_slo(slo_ttft, slo_tpot), console=Console(),
                      limits=ServerLimits(max_streams=max_streams, max_body=max_body, timeout=timeout))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
             add_help_option=False)
def bench(context: typer.Context) -> None:
    """Measure: kernels, decode, prefill, static, scheduler, transfer, cluster, routing; serve a load, of a cluster or an
    endpoint; simulate a study of routing. See bench BENCHMARK --help."""
    from nanopd.benchmark.command import main as run

    raise typer.Exit(run(context.args))


def _slo(ttft_ms: float | None, tpot_ms: float | None) -> nanopd.config.SLO | None:
    from nanopd.config import SLO, ConfigError

    if (ttft_ms is None) != (tpot_ms is None):
        raise ConfigError("an SLO has two bounds: give both --slo-ttft and --slo-tpot")
    return None if ttft_ms is None else SLO(ttft_ms / 1e3, tpot_ms / 1e3)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, which goes as it is done or interrupted."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task, every = bar.add_task("simulating", total=total), max(1, total // 200)
        yield lambda ended: bar.update(task, completed=ended) if ended % every == 0 else None


def _print_stream(llm: LLM, prompt: str, params: nanopd.SamplingParams) -> None:
    for event in llm.stream(prompt, params):
        if event.error:
            raise ValueError(event.error)
        typer.echo(event.text, nl=False)
    typer.echo()


def _print_answers(llm: LLM, prompts: list[str], params: nanopd.SamplingParams, chat: bool) -> None:
    if chat:
        outputs = llm.chat([[{"role": "user", "content": prompt}] for prompt in prompts], params, use_tqdm=False)
    else:
        outputs = llm.generate(list(prompts), params, use_tqdm=False)
    for prompt, output in zip(prompts, outputs):
        if output.error:
            raise ValueError(output.error)
        if len(prompts) > 1:
            typer.secho(f"> {prompt}", bold=True)
        typer.echo(output.outputs[0].text)


if __name__ == "__main__":
    app()
