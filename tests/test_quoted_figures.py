"""The figures in the READMEs are those of the recorded results: every number of the tables and of the text below them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nanopd.benchmark.results import load

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": ("## Results", "## The workbook"), "docs_zh/README.md": ("## 结果", "## 练习册")}
NUMBER = re.compile(r"(?<![\w.-])\d[\d,]*(?:\.\d+)?(?![\w-]|\.\d)")  # not the 50 of p50, nor the 3 of Qwen3-8B
OPEN_LOOP = ("ttft_p50_ms", "ttft_p99_ms", "tpot_p50_ms", "tpot_p99_ms")


def row(bench: str, **where: Any) -> dict[str, Any]:
    """The only row of a recorded result that is so."""
    (found,) = [row for row in load(bench).rows if where.items() <= row.items()]
    return found


def short(value: float) -> str:
    """Three digits: 212 and 16.6 and 4.24, but 7,214 in full."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def percent(share: float) -> str:
    return f"{100 * share:.0f}"


# ------------------------------------------------------------------------------------- what the pages must say


def one_gpu() -> Iterator[list[str]]:
    for batch, context in ((1, 512), (64, 1024), (256, 1024)):
        step = row("decode", model="qwen3-8b", batch=batch, context=context)
        yield [f"{batch}", f"{context:,}", short(step["ms"]), short(step["over_floor"])]
    for tokens in (2048, 8000):
        prompt = row("prefill", tokens=tokens)
        yield [f"{tokens:,}", short(prompt["ms"]), percent(prompt["share"])]
    for shortest, longest in ((64, 256), (1024, 2048)):
        served = row("static", requests=48, prompt_from=shortest, prompt_to=longest, engine="nanopd")
        yield ["48", f"{shortest:,}", f"{longest:,}", f"{served['output']}", short(served["tokens_s"])]
    kernels = load("kernels").summary
    yield [short(kernels["times_flashinfer"]["geometric_mean"]), short(kernels["times_flashinfer"]["worst"])]
    yield ["8,192", short(kernels["prefill_times_cudnn"]["8192 after 0"])]


def two_gpus() -> Iterator[list[str]]:
    for tokens in (512, 8000):
        lone = row("cluster", transport="peer", prompt=tokens)
        yield [f"{tokens:,}", short(lone["ttft_ms"]), short(lone["collocated_ttft_ms"])]
    yield [short(row("cluster", mode=mode, decodes=70)["p99_ratio"]) for mode in ("disaggregated", "collocated")]
    closed = row("cluster", clients=96)
    yield ["96", f"{closed['prompt']:,}", f"{closed['answer']}", short(closed["requests_s"]), short(closed["collocated_requests_s"])]


def open_loop() -> Iterator[list[str]]:
    for load_name in ("0.3", "0.6", "0.9", "full"):
        apart, both = (row("routing", prompts="mixed", load=load_name, mode=mode) for mode in ("disaggregated", "collocated"))
        assert apart["rate"] == both["rate"]
        yield [short(apart["rate"]), *(short(side[name]) for name in OPEN_LOOP for side in (apart, both))]


def in_the_text() -> list[str]:
    study = [row["over_best_fixed"] for row in load("study").rows]
    full = row("routing", prompts="mixed", load="full", mode="disaggregated")
    return [f"{len(study)}", short(min(study)), short(max(study)),
            short(row("decode", model="qwen3-0.6b", batch=1, context=512)["over_floor"]),
            short(full["rate"]), short(full["ttft_p99_simulated"]), short(full["ttft_p99_ms"])]


# ---------------------------------------------------------------------------------------------- what they say


def results_of(page: str) -> str:
    """The section, without its shell blocks."""
    begin, end = PAGES[page]
    section = (ROOT / page).read_text(encoding="utf-8").split(begin + "\n")[1].split(end + "\n")[0]
    return re.sub(r"^```.*?^```$", "", section, flags=re.MULTILINE | re.DOTALL)


def tables_of(section: str) -> list[list[list[str]]]:
    """The numbers of each table's rows, their headings left out."""
    tables = re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE)
    return [[NUMBER.findall(line) for line in table.splitlines()[2:]] for table in tables]


@pytest.mark.parametrize("page", PAGES)
def test_the_tables_hold_what_was_recorded(page):
    assert tables_of(results_of(page)) == [list(table()) for table in (one_gpu, two_gpus, open_loop)]


@pytest.mark.parametrize("page", PAGES)
def test_the_text_holds_what_was_recorded(page):
    prose = re.sub(r"^\|.*$|`[^`]*`", "", results_of(page), flags=re.MULTILINE)
    assert Counter(NUMBER.findall(prose)) == Counter(in_the_text())


def test_what_the_text_concludes_follows_from_the_rows():
    apart, both = ([row("routing", prompts="mixed", load=name, mode=mode) for name in ("0.3", "0.6", "0.9", "full")]
                   for mode in ("disaggregated", "collocated"))
    assert all(one["ttft_p50_ms"] > other["ttft_p50_ms"] and one["ttft_p99_ms"] > other["ttft_p99_ms"]
               for one, other in zip(apart, both)), "a later first token at every rate"
    assert apart[-1]["tpot_p99_ms"] / both[-1]["tpot_p99_ms"] == pytest.approx(0.5, abs=0.05), "half the time per token at p99"
    assert apart[-1]["ttft_p99_ms"] > 3 * both[-1]["ttft_p99_ms"], "a much later one"
    grows = [side[-1]["tpot_p99_ms"] / side[0]["tpot_p99_ms"] for side in (apart, both)]
    assert grows[0] < 1.2 and grows[1] == pytest.approx(2, abs=0.2), "hardly grows with the rate; doubles"
    closed = row("cluster", clients=96)
    assert closed["requests_s"] < closed["collocated_requests_s"], "nor more requests"
    assert not [row for row in load("routing").rows if row["mode"] == "adaptive"], "the README says that there are none"


def test_numbers_are_found_and_names_are_not():
    assert NUMBER.findall("p50 of Qwen3-8B: 1,024 tokens, 4.24 ms, 89% / 42.3. P:0") == ["1,024", "4.24", "89", "42.3", "0"]
    assert [short(value) for value in (0.966, 13.774, 223.05, 7214.1)] == ["0.97", "13.8", "223", "7,214"]
