"""The docs: the same in both languages, pointing at what exists, and printing what they say they print."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENGLISH = sorted((ROOT / "docs_en").glob("*.md"))
CHINESE = sorted((ROOT / "docs_zh").glob("*.md"))
PAGES = [*ENGLISH, *CHINESE, ROOT / "README.md"]

# A block of code, its language, and the block of plain text right below it, if any: what it prints.
SERVER = "127.0.0.1:8000"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)

# For each page, runs its blocks one after another in one namespace, and writes down what each of them prints, or the error.
# The pages are forks of a process that has imported what takes long.
RUN_PAGES = """
import contextlib, io, json, os, sys, traceback
import torch, transformers, nanopd.cluster, nanopd.llm

def run(blocks):
    printed, names = [], {"__name__": "__main__"}
    for where, source in blocks:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(source, where, "exec"), names)
        printed.append(out.getvalue())
    return printed

for page, blocks in json.load(sys.stdin).items():
    if os.fork() == 0:
        try:
            answer = {"printed": run(blocks)}
        except BaseException:
            answer = {"error": traceback.format_exc()}
        print(json.dumps({page: answer}), flush=True)
        os._exit(0)
    os.wait()
"""


def by_path(page: Path) -> str:
    return str(page.relative_to(ROOT))


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", text(page), flags=re.MULTILINE | re.DOTALL)


def python_blocks(page: Path) -> list[tuple[str, str, str]]:
    """(file:line, code, what it prints) of each block, but for those that ask a server: test_commands.py runs these."""
    source = text(page)
    return [(f"{by_path(page)}:{source.count(chr(10), 0, match.start()) + 1}", match[2], match[3] or "")
            for match in FENCE.finditer(source) if match[1] == "python" and SERVER not in match[2]]


WITH_CODE = [page for page in ENGLISH if python_blocks(page)]


def pointers(page: Path) -> set[tuple[str, str]]:
    """(file, name) of every `file.py:name`."""
    return set(re.findall(r"`([\w/]+\.py):([A-Za-z_][\w.]*)`", prose(page)))


def names_in(path: Path) -> set[str]:
    return _names(ast.parse(text(path)).body)


def _names(body: list[ast.stmt], prefix: str = "") -> set[str]:
    """Functions, classes and assigned names, members (also of self) with their class: {"Scheduler", "Scheduler.schedule", ...}."""
    found: set[str] = set()
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(prefix + node.name)
        if isinstance(node, ast.ClassDef):
            found |= _names(node.body, f"{prefix}{node.name}.")
            found |= {f"{prefix}{node.name}.{inner.attr}" for inner in ast.walk(node)
                      if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store)
                      and isinstance(inner.value, ast.Name) and inner.value.id == "self"}
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        found |= {prefix + target.id for target in targets if isinstance(target, ast.Name)}
    return found


@cache
def files_called(name: str) -> list[Path]:
    """`name` from the root, or else the files below nanopd whose path ends so."""
    if (ROOT / name).is_file():
        return [ROOT / name]
    return [path for path in (ROOT / "nanopd").rglob(Path(name).name) if path.as_posix().endswith(f"/{name}")]


# ---------------------------------------------------------------------------------------------- languages


def test_every_page_has_its_twin():
    # README.md stands at the root; its own test is in test_project.py.
    assert {page.name for page in ENGLISH} == {page.name for page in CHINESE} - {"README.md"}


@pytest.mark.parametrize("page", ENGLISH, ids=by_path)
def test_twins_have_the_same_headings_and_the_same_code(page):
    twin = ROOT / "docs_zh" / page.name
    levels, twin_levels = ([len(marks) for marks in re.findall(r"^(#+) ", prose(p), re.MULTILINE)] for p in (page, twin))
    assert levels == twin_levels
    ours, theirs = ([block[1:] for block in python_blocks(p)] for p in (page, twin))
    assert ours == theirs
    assert pointers(page) == pointers(twin)


# ----------------------------------------------------------------------------------------------- pointers


@pytest.mark.parametrize("page", PAGES, ids=by_path)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", prose(page))
    assert not [target for target in targets if not (page.parent / target).exists()]


@pytest.mark.parametrize("page", PAGES, ids=by_path)
def test_pointers_name_what_exists(page):
    wrong = []
    for file, name in sorted(pointers(page)):
        paths = files_called(file)
        if len(paths) != 1:
            wrong.append(f"{file}: {len(paths)} such files, give more of the path")
        elif name not in names_in(paths[0]):
            wrong.append(f"{file}:{name}")
    assert not wrong, "\n".join(wrong)


# --------------------------------------------------------------------------------------------------- code


@pytest.fixture(scope="module")
def answers():
    """What each page's code printed, or the error that it ended with."""
    pages = {by_path(page): [(where, source) for where, source, _ in python_blocks(page)] for page in WITH_CODE}
    ran = subprocess.run(
        [sys.executable, "-c", RUN_PAGES], input=json.dumps(pages), cwd=ROOT, capture_output=True, text=True, check=False,
        timeout=900, env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)})
    assert ran.returncode == 0, ran.stderr
    return {page: answer for line in ran.stdout.splitlines() for page, answer in json.loads(line).items()}


@pytest.mark.timeout(1000)
@pytest.mark.parametrize("page", WITH_CODE, ids=by_path)
def test_the_code_runs_and_prints_what_the_page_says(answers, page):
    answer = answers[by_path(page)]
    assert "error" not in answer, answer["error"]
    for (where, _, expected), printed in zip(python_blocks(page), answer["printed"], strict=True):
        if expected:
            assert printed == expected, where
