"""`nanopd demo`: the same prompts through the collocated and the disaggregated pipeline, and through both, side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nanopd.config import MODES, ConfigError, Placement, Topology
from nanopd.core import FinishReason, RequestOutput, SamplingParams

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from nanopd.tiny import Task

WARM_UP = "What is 1+1?"
VERDICT_COLOURS = {"right": "green", "wrong": "red", "cut off": "yellow"}
SHARED_DEVICE = (" All workers share one device here, so the times show where a request waits, not which pipeline is faster.")
MEASURE_FOR = 3.0  # seconds, about: what adaptive mode goes by; `nanopd profile` takes its time
LONGEST_ANSWER = 320  # tokens; room for the embedded model's longest story


@dataclass(frozen=True)
class Pipeline:
    """A way to serve, and the workers it needs."""

    mode: str
    topology: str


@dataclass(frozen=True)
class Served:
    """One prompt's answer by one pipeline. Times in seconds."""

    text: str
    token_ids: tuple[int, ...]
    path: str
    ttft: float | None
    tpot: float | None
    cut_off: bool = False  # by --max-tokens, so neither right nor wrong
    error: str | None = None


@dataclass(frozen=True)
class Row:
    """One prompt, and what came of it in each mode."""

    task: Task
    collocated: Served
    disaggregated: Served
    adaptive: Served

    @property
    def verdict(self) -> str:
        """Whether the collocated answer is right. The others are the same, or are reported as a difference."""
        from nanopd.tiny.tasks import is_right

        if is_right(self.task, self.collocated.text):
            return "right"
        return "cut off" if self.collocated.cut_off else "wrong"

    @property
    def difference(self) -> str | None:
        """What makes one of the answers differ from the collocated one, or None where all agree token by token."""
        for mode in MODES:
            if getattr(self, mode).error:
                return f"{mode} failed: {getattr(self, mode).error}"
        other = next((mode for mode in MODES if self.differs(mode)), None)
        if other is None:
            return None
        ours, theirs = self.collocated.token_ids, getattr(self, other).token_ids
        first = next((i for i, pair in enumerate(zip(ours, theirs)) if pair[0] != pair[1]), min(len(ours), len(theirs)))
        return f"{other} from token {first + 1} on ({len(ours)} and {len(theirs)} tokens)"

    def differs(self, mode: str) -> bool:
        """Whether a mode's answer has other tokens than the collocated one."""
        return getattr(self, mode).token_ids != self.collocated.token_ids


@dataclass(frozen=True)
class Result:
    model: str
    device: str  # or several, as they are shown
    rows: list[Row]
    seconds: float
    shares_device: bool = True  # all workers are on one

    @property
    def differing(self) -> list[Row]:
        return [row for row in self.rows if row.difference is not None]

    @property
    def exit_code(self) -> int:
        return 1 if self.differing else 0


def pipelines(topology: Topology) -> tuple[Pipeline, ...]:
    """A collocated pipeline, the topology's own or a worker on each of its devices; its disaggregated one; and both together.

    Raises ConfigError where there is no disaggregated one.
    """
    topology.check_mode("disaggregated")
    collocated = [placement for placement in topology.placements if placement.role == "C"]
    collocated = collocated or [Placement("C", device) for device in topology.devices]
    others = [placement for placement in topology.placements if placement.role != "C"]
    return (Pipeline("collocated", str(Topology(tuple(collocated)))), Pipeline("disaggregated", str(topology)),
            Pipeline("adaptive", str(Topology((*collocated, *others)))))


def pick_device(device: str | None = None) -> str:
    """"cpu", "cuda" or "cuda:N" (default: a GPU if there is one) as a topology writes it."""
    if device is None:
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    return "0" if device == "cuda" else device.removeprefix("cuda:")


def run(model: str = "tiny", max_tokens: int = LONGEST_ANSWER, device: str | None = None, topology: str | None = None,
        executor: str | None = None, progress: Callable[[str], object] = lambda text: None) -> Result:
    """Serve the demo prompts in every mode. `progress` is told what is under way.

    `topology`: such as "P:0 D:1"; default: all workers on `device`. `executor`: as `Cluster` takes it.
    """
    from nanopd.tiny import demo_prompts

    if topology is not None and device is not None:
        raise ConfigError("a topology says which devices: leave --device out")
    start = time.perf_counter()
    where = "P:{0} D:{0}".format(pick_device(device)) if topology is None else topology
    workers = Topology.parse(where)
    tasks = demo_prompts()
    with one_thread(model == "tiny" and workers.devices == ["cpu"]):
        served = [_serve(pipeline, model, tasks, max_tokens, executor, progress) for pipeline in pipelines(workers)]
    rows = [Row(*parts) for parts in zip(tasks, *served)]
    seconds = time.perf_counter() - start
    return Result(model, _device_names(workers.devices, executor), rows, seconds, shares_device=len(workers.devices) == 1)


@contextmanager
def one_thread(wanted: bool) -> Iterator[None]:
    """The embedded model's matrices are too small to share out: threads would only wait for one another."""
    if not wanted:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _serve(pipeline: Pipeline, model: str, tasks: Sequence[Task], max_tokens: int, executor: str | None,
           progress: Callable[[str], object]) -> list[Served]:
    from nanopd.cluster import Cluster
    from nanopd.cost_model.profiler import profile_cluster
    from nanopd.router.policies import make_router

    progress(f"{pipeline.mode}: loading {model} for {pipeline.topology}")
    # In float32 the pipelines' different batches leave the embedded model's greedy choices as they are.
    dtype = "float32" if model == "tiny" else None
    is_adaptive = pipeline.mode == "adaptive"
    with Cluster(model, topology=pipeline.topology, mode=pipeline.mode, executor=executor,
                 router="round-robin" if is_adaptive else None, dtype=dtype) as cluster:
        # What happens once, at first use, should not count as the first prompt's TTFT.
        warm_ups = [WARM_UP] * len(cluster.topology.placements)  # one for each worker, and more
        cluster.generate(warm_ups, SamplingParams(temperature=0, max_tokens=2), use_tqdm=False)
        if is_adaptive:
            progress("adaptive: measuring what steps and transfers take here")
            cluster.router = make_router("cost", profile_cluster(cluster, seconds=MEASURE_FOR).cost)
        progress(f"{pipeline.mode}: answering {len(tasks)} prompts at once")
        params = SamplingParams(temperature=0, max_tokens=max_tokens)
        outputs = cluster.generate([task.prompt for task in tasks], params, use_tqdm=False)
        return [_served(output, " -> ".join(cluster.timeline(output.request_id).path)) for output in outputs]


def _served(output: RequestOutput, path: str) -> Served:
    answer = output.outputs[0]
    tpot = output.metrics.tpot(len(answer.token_ids))
    cut_off = answer.finish_reason is FinishReason.LENGTH
    return Served(answer.text, tuple(answer.token_ids), path, output.metrics.ttft, tpot, cut_off, output.error)


def _device_names(devices: list[str], executor: str | None) -> str:
    import torch

    if executor == "ray":  # they may be elsewhere
        return ", ".join("the CPU" if device == "cpu" else f"GPU {device.removeprefix('cuda:')} of Ray's" for device in devices)
    return ", ".join("the CPU" if device == "cpu" else
                     f"GPU {device.removeprefix('cuda:')} ({torch.cuda.get_device_name(device)})" for device in devices)


# -------------------------------------------------------------------------------------------- on screen


def show(result: Result, console: Console) -> None:
    """Print the table, whether the modes agree, and where to go from here."""
    console.print(_table(result.rows, console.width))
    console.print("TTFT is the time to the first token, TPOT the time per token after it. All prompts were sent at once and "
                  "share every step. Adaptive mode measured for a few seconds what each way takes, and chose for each prompt."
                  + SHARED_DEVICE * result.shares_device, style="bright_black", highlight=False)
    console.print()
    console.print(_verdict(result), highlight=False)
    right = sum(row.verdict == "right" for row in result.rows)
    console.print(f"{right} of {len(result.rows)} answers right. Model {result.model} on {result.device}, "
                  f"{result.seconds:.0f} s in all.", highlight=False)
    console.print()
    console.print(_next_steps(), highlight=False)


def _table(rows: Sequence[Row], width: int) -> RenderableType:
    """A line a prompt for each mode; the later ones repeat the answer only where it differs."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, title="The same prompts in three modes", title_justify="left", title_style="bold")
    for heading in ("prompt", "answer", "right?", "path", "TTFT ms", "TPOT ms"):
        table.add_column(heading, justify="right" if heading.endswith("ms") else "left", no_wrap=True)
    room = max(12, (width - 49) // 2)  # what the other columns leave for prompt and answer
    for row in rows:
        mark = Text(row.verdict, VERDICT_COLOURS[row.verdict])
        prompt, answer = (Text(shorten(text, room)) for text in (row.task.prompt, row.collocated.text))
        table.add_row(prompt, answer, mark, *_measured(row.collocated))
        for mode in ("disaggregated", "adaptive"):
            served = getattr(row, mode)
            other = Text(shorten(served.text, room), "red") if row.differs(mode) else Text("the same", "bright_black")
            table.add_row("", other, "", *_measured(served))
    return table


def _measured(served: Served) -> tuple[str, str, str]:
    return served.path, _milliseconds(served.ttft), _milliseconds(served.tpot)


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.1f}"


def shorten(text: str, width: int) -> str:
    """Both ends of a text, in at most `width` columns; a Chinese character takes two."""
    from rich.cells import cell_len, set_cell_size

    text = " ".join(text.split())
    if cell_len(text) <= width:
        return text
    half = (width - 1) // 2
    head = set_cell_size(text, half).rstrip()
    tail = set_cell_size(text[::-1], half)[::-1].lstrip()
    return f"{head}…{tail}"


def _verdict(result: Result) -> RenderableType:
    from rich.text import Text

    if not result.differing:
        return Text(f"All three modes agree token by token on all {len(result.rows)} prompts.", "bold green")
    lines = [f"The modes differ on {len(result.differing)} of {len(result.rows)} prompts:"]
    lines += [f"  {shorten(row.task.prompt, 60)}: {row.difference}" for row in result.differing]
    return Text("\n".join(lines), "bold red")


def _next_steps() -> RenderableType:
    from rich.text import Text

    return Text("Next:\n"
                '  nanopd generate "What is 47+35?"   ask the embedded model something\n'
                "  nanopd doctor                      see what this machine can run\n"
                "  make lab                           open the workbook\n"
                "`source .venv/bin/activate` puts nanopd on your PATH.")
