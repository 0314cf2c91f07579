"""Imports run one way. The table below is the architecture: change it only together with the design."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "nanopd"

# What each part may import of nanopd. A name stands for a module, or for a package and all in it; the longest
# name that fits a module is the one that counts, and a part may always import itself.
BASE = {"core", "config", "interrupts"}
BLOCKS = BASE | {"block_manager.pool", "block_manager.manager"}
SCHEDULING = BLOCKS | {"engine.beam", "engine.limits", "engine.speculative", "engine.scheduler"}
TENSORS = BASE | {"paged_attention", "block_manager.cache"}
MODELS = TENSORS | {"models", "tiny"}
STEPPING = SCHEDULING | {"engine.engine", "engine.output"}
ENGINE = STEPPING | MODELS | {"engine"}
WORKERS = ENGINE | {"messages", "workers"}

MAY_IMPORT: dict[str, set[str]] = {
    # the nouns and the settings: nothing of ours
    "core": set(),
    "config": {"core"},
    "interrupts": set(),
    "messages": BASE,
    "metrics": BASE,
    # bookkeeping without tensors
    "block_manager": BLOCKS,
    "engine.beam": BLOCKS,
    "engine.limits": BASE,
    "engine.output": BASE,
    "engine.speculative": BASE,
    "engine.scheduler": SCHEDULING,
    "engine.engine": SCHEDULING | {"engine.output"},
    # tensors
    "paged_attention": BASE,
    "block_manager.cache": BASE | {"paged_attention"},
    "tiny": BASE,
    "models": MODELS,
    "engine": ENGINE,
    "workers": WORKERS,
    # deciding where a request goes: talks to workers by messages only
    "cost_model": BASE,
    "router": BASE | {"cost_model", "messages", "engine.limits", "block_manager.pool"},
    "simulator": STEPPING | {"cost_model", "router", "messages", "metrics", "workers.worker", "workers.transfer"},
    # the client's side: text, without tensors
    "client": BASE | {"engine.limits", "engine.output"},
}
EVERYTHING = {*MAY_IMPORT, "llm", "cluster", "benchmark", "widgets", "workbook", "lab", "server", "doctor", "demo", "terminal", "cli"}

# These sit on top: they may import anything, and only they import each other.
TOP = {
    "": EVERYTHING,  # nanopd/__init__.py
    "llm": set(MAY_IMPORT),
    "cluster": set(MAY_IMPORT),
    "benchmark": EVERYTHING - {"cli", "workbook"},
    "widgets": EVERYTHING - {"cli", "workbook"},
    "workbook": EVERYTHING - {"cli"},
    "lab": EVERYTHING - {"cli"},
    "server": EVERYTHING - {"cli", "benchmark", "widgets", "workbook", "lab"},
    "terminal": set(),
    "doctor": EVERYTHING - {"cli"},
    "demo": EVERYTHING - {"cli"},
    "cli": EVERYTHING,
    "__main__": {"cli"},
}
LAYERS = MAY_IMPORT | TOP

NEEDS_NO_TORCH = ("core", "config", "interrupts", "messages", "metrics", "block_manager.pool", "block_manager.manager", "engine.scheduler",
                  "engine.engine", "workers.worker", "client", "cost_model", "router", "simulator", "simulator.plan", "benchmark.command",
                  "benchmark.load", "benchmark.load.endpoint", "benchmark.study", "benchmark.sweep", "benchmark.report",
                  "doctor", "demo", "lab.command", "cli")
FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib"}
FORBIDDEN_NAMES = {"sys.path", "torch.load", "torch.save"}


# ------------------------------------------------------------------------------------ reading the sources


@cache
def modules() -> dict[str, Path]:
    """Dotted name below nanopd ("" is nanopd itself) -> file."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def at_run_time(node: ast.AST) -> Iterator[ast.AST]:
    """Every node below, also inside functions, but not what only a type checker reads."""
    for child in ast.iter_child_nodes(node):
        if is_type_checking(child):
            for other in child.orelse:
                yield other
                yield from at_run_time(other)
        else:
            yield child
            yield from at_run_time(child)


def imported(module: str, node: ast.AST) -> list[str]:
    """Full names that an import statement brings in; `from a import b` counts as a.b."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = node.module or ""
    if node.level:
        here = ["nanopd", *module.split(".")] if module else ["nanopd"]
        is_package = modules()[module].name == "__init__.py"
        here = here[: len(here) - node.level + is_package]
        base = ".".join([*here, *([node.module] if node.module else [])])
    return [f"{base}.{alias.name}" for alias in node.names]


def our_imports(module: str) -> set[str]:
    """Modules of nanopd that `module` imports at run time, by their names below nanopd."""
    found = set()
    for node in at_run_time(parse(modules()[module])):
        for name in imported(module, node):
            if name == "nanopd" or name.startswith("nanopd."):
                found.add(_nearest_module(name.removeprefix("nanopd").removeprefix(".")))
    return found


def _nearest_module(name: str) -> str:
    """The module that holds `name`: itself, or the one it is an attribute of."""
    while name not in modules():
        name = name.rpartition(".")[0]
    return name


def layer_of(module: str) -> str | None:
    name = module
    while name:
        if name in LAYERS:
            return name
        name = name.rpartition(".")[0]
    return "" if module == "" else None


def allows(layer: str, other: str) -> bool:
    """Whether a module of `layer` may import the module `other`."""
    if other == "" or layer_of(other) == layer:
        return True  # nanopd/__init__.py is lazy, so importing the package's version or names costs no layer
    # The longest name that fits decides: "engine" does not open what has an entry of its own.
    return layer_of(other) in LAYERS[layer] or other in LAYERS[layer]


# ------------------------------------------------------------------------------------------------- tests


def test_every_module_has_its_place_in_the_table():
    homeless = [name for name in modules() if layer_of(name) is None]
    assert not homeless, f"give {homeless} a line in MAY_IMPORT (or TOP) in {Path(__file__).name}"


def test_imports_run_one_way():
    wrong = [f"nanopd.{module} imports nanopd.{other}; {layer!r} may import {', '.join(sorted(LAYERS[layer])) or 'nothing'}"
             for module in modules() if (layer := layer_of(module)) is not None
             for other in sorted(our_imports(module)) if not allows(layer, other)]
    assert not wrong, "\n".join(wrong)


def test_no_import_cycles():
    # A package's __init__ runs before its modules anyway, so importing something from one's own package is no cycle.
    graph = {
        name: {other for other in our_imports(name) if other != "" and not f"{name}.".startswith(f"{other}.")}
        for name in modules() if name
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_the_table_itself_has_no_cycles():
    graph = {name: {other for other in allowed if other != name and not _related(name, other)}
             for name, allowed in MAY_IMPORT.items()}
    TopologicalSorter(graph).prepare()


def _related(a: str, b: str) -> bool:
    """One is a part of the other's package."""
    return f"{a}.".startswith(f"{b}.") or f"{b}.".startswith(f"{a}.")


def test_no_path_edits_and_no_pickles():
    wrong = []
    for module, path in modules().items():
        for node in ast.walk(parse(path)):
            names = set(imported(module, node)) | ({ast.unparse(node)} if isinstance(node, ast.Attribute) else set())
            roots = {name.split(".")[0] for name in imported(module, node)}
            wrong += [f"{path.relative_to(ROOT)}:{node.lineno}: {name}" for name in
                      names & FORBIDDEN_NAMES | roots & FORBIDDEN_MODULES]
    assert not wrong, "paths are not edited; data is safetensors or JSON, for a pickle can run any code:\n" + "\n".join(wrong)


def loaded_by(statement: str) -> tuple[float, set[str]]:
    """Seconds that `statement` takes in a fresh interpreter, and the modules loaded after it."""
    code = (f"import sys, time; start = time.perf_counter(); {statement}; "
            "print(time.perf_counter() - start, *sys.modules)")
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert ran.returncode == 0, ran.stderr
    seconds, *names = ran.stdout.split()
    return float(seconds), set(names)


def test_import_nanopd_is_quick_and_loads_nothing_heavy():
    seconds, names = min((loaded_by("import nanopd") for _ in range(3)), key=lambda run: run[0])
    assert seconds < 1
    assert not names & {"torch", "numpy", "transformers", "plotly", "IPython"}
    assert {name for name in names if name.startswith("nanopd")} == {"nanopd"}


@pytest.mark.parametrize("part", NEEDS_NO_TORCH)
def test_scheduling_deciding_and_simulating_need_no_torch(part):
    if part not in modules():
        pytest.skip(f"nanopd.{part} is not there yet")
    _, names = loaded_by(f"import nanopd.{part}")
    assert "torch" not in names


def test_public_names():
    import nanopd

    assert set(nanopd.__all__) <= set(dir(nanopd))
    for name in nanopd.__all__:
        assert getattr(nanopd, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = nanopd.nothing
    from nanopd import check, predict

    assert callable(check)
    assert callable(predict)


# The checker is code too: it must see what it is there to see.
@pytest.mark.parametrize("layer, other, allowed", [
    ("engine.scheduler", "block_manager.manager", True),
    ("engine.scheduler", "block_manager.cache", False),
    ("engine.scheduler", "engine.runner", False),
    ("block_manager", "block_manager.cache", False),
    ("router", "messages", True),
    ("router", "workers.worker", False),
    ("models", "llm", False),
    ("workers", "widgets", False),
])
def test_the_table_says_what_the_design_says(layer, other, allowed, monkeypatch):
    monkeypatch.setitem(modules(), other, PACKAGE / "core.py")
    try:
        assert allows(layer, other) is allowed
    finally:
        modules.cache_clear()


def test_type_checking_imports_do_not_count():
    source = ast.parse("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\nelse:\n    import json\n"
                       "def f():\n    import numpy\n")
    names = [name for node in at_run_time(source) for name in imported("", node)]
    assert names == ["typing.TYPE_CHECKING", "json", "numpy"]
