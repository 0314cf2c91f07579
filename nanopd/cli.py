"""The `nanopd` command. Each subcommand loads what it needs when it runs, so that --help answers at once."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import nanopd

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
        help="inline: one process; process: one for each GPU, or each worker on the CPU. Default: inline where there "
             "is one device.")] = None,
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
        help="inline: one process; process: one for each GPU, or each worker on the CPU. Default: inline where there "
             "is one device.")] = None,
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


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
             add_help_option=False)
def bench(context: typer.Context) -> None:
    """Measure kernels, decode, prefill, serve, scheduler, transfer or cluster, and record it: bench BENCHMARK --help."""
    from nanopd.benchmark.command import main as run

    raise typer.Exit(run(context.args))


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


@contextmanager
def _plain_errors() -> Iterator[None]:
    """What the user can put right is said in one line: bad options and requests, models that aren't there."""
    try:
        yield
    except (ValueError, OSError) as error:  # ConfigError, InvalidRequest and ModelError are ValueErrors
        typer.secho(f"nanopd: {error}", fg="red", err=True)
        raise typer.Exit(2) from error


if __name__ == "__main__":
    app()
