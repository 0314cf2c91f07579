"""What a reader or an installer meets first: the wheel, the Makefile, the READMEs and their Chinese twins."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import nanopd

ROOT = Path(__file__).parents[1]
TWINS = [(ROOT / "README.md", ROOT / "docs_zh" / "README.md"),
         *((ROOT / "docs_en" / name, ROOT / "docs_zh" / name) for name in ("CONTRIBUTING.md", "INSTRUCTOR.md", "SYLLABUS.md"))]
PAGES = [page for pair in TWINS for page in pair]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def by_path(page):
    return str(page.relative_to(ROOT))


def text(page):
    return page.read_text(encoding="utf-8")


# ---------------------------------------------------------------------------------------------- the wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of the checkout, so that nothing is left behind in it."""
    pytest.importorskip("hatchling")
    source = tmp_path_factory.mktemp("source")
    for name in ("nanopd", "csrc", "notebooks", "tests"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, source)
    (source / "csrc").mkdir(exist_ok=True)
    (source / "csrc" / "probe.cu").write_text("// a source that must travel\n")
    built = tmp_path_factory.mktemp("wheel")
    ran = subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(built)],
                         cwd=source, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    (path,) = built.glob("*.whl")
    return path


def test_the_wheel_holds_the_package_and_its_data(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {f"nanopd/{path.relative_to(ROOT / 'nanopd').as_posix()}" for path in (ROOT / "nanopd").rglob("*")
               if path.is_file() and path.suffix in (".py", ".json", ".safetensors", ".jinja") and "_csrc" not in path.parts}
    assert package <= names, sorted(package - names)
    assert "nanopd/tiny/weights/model.safetensors" in names
    assert any(name.startswith("nanopd/models/presets/") for name in names)
    assert "nanopd/_csrc/probe.cu" in names


def test_the_wheel_holds_nothing_else(wheel):
    roots = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert roots == {"nanopd", f"nanopd-{nanopd.__version__}.dist-info"}


def test_the_wheel_holds_the_notebooks_and_copies_them(wheel, tmp_path):
    archive = zipfile.ZipFile(wheel)
    packed = {info.filename: info.compress_size for info in archive.infolist() if info.filename.startswith("nanopd/_notebooks/")}
    built = {f"nanopd/_notebooks/{path.relative_to(ROOT / 'notebooks').as_posix()}"
             for folder in ("en", "zh", "solutions") for path in (ROOT / "notebooks" / folder).rglob("*.ipynb")}
    assert set(packed) == built, "the built notebooks, and no sources"
    assert sum(packed.values()) < 1e6
    archive.extractall(tmp_path / "installed")
    ran = subprocess.run([sys.executable, "-m", "nanopd", "lab", "new", "set", "--lang", "zh", "--chapters", "01"], cwd=tmp_path,
                         capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")})
    assert ran.returncode == 0, ran.stderr
    copied = tmp_path / "set" / "zh" / "01_block_manager.ipynb"
    assert copied.read_bytes() == archive.read("nanopd/_notebooks/zh/01_block_manager.ipynb")


def test_the_wheel_s_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith("/METADATA"))
    (scripts,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith("/entry_points.txt"))
    for line in (f"Version: {nanopd.__version__}", "License-Expression: MIT", "Requires-Python: <3.14,>=3.10",
                 "Provides-Extra: lab", "Provides-Extra: course",
                 "Provides-Extra: test"):
        assert line in metadata
    assert "nanopd = nanopd.cli:app" in scripts


# -------------------------------------------------------------------------------------------- the Makefile


def make(*args, **environment):
    return subprocess.run(["make", "--no-print-directory", *args], cwd=ROOT, capture_output=True, text=True, check=False,
                          env={**os.environ, **environment})


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@needs_make
def test_make_says_which_python_it_wants(tmp_path):
    old = tmp_path / "python3.9"
    old.write_text('#!/bin/sh\ncase "$2" in *print*) echo 3.9.1;; *) exit 1;; esac\n')
    old.chmod(0o755)
    ran = make("demo", f"PYTHON={old}", f"VENV={tmp_path}/venv")
    assert ran.returncode != 0
    assert "needs Python 3.10 to 3.13" in ran.stderr
    assert "is 3.9.1" in ran.stderr
    assert not (tmp_path / "venv").exists()


@needs_make
def test_make_says_when_python_cannot_make_environments(tmp_path):
    bare = tmp_path / "python3"
    bare.write_text('#!/bin/sh\ncase "$2" in *ensurepip*) exit 1;; *print*) echo 3.12.1;; esac\n')
    bare.chmod(0o755)
    ran = make("lab", f"PYTHON={bare}", f"VENV={tmp_path}/venv")
    assert ran.returncode != 0
    assert "apt-get install python3-venv" in ran.stderr


@needs_make
def test_a_second_make_installs_nothing(tmp_path):
    environment = tmp_path / "venv"
    environment.mkdir()
    for stamp in ("pyvenv.cfg", ".ready-demo"):
        (environment / stamp).touch()
    again = make("--dry-run", "demo", f"VENV={environment}").stdout
    assert "nanopd demo" in again
    assert "pip install" not in again
    assert "pip install" in make("--dry-run", "lab", f"VENV={environment}").stdout


def test_ci_runs_make_test_without_a_keyboard():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make --no-print-directory test" in text(script)
    assert "</dev/null" in text(script)
    ran = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


# ------------------------------------------------------------------------------------------------- pages


@pytest.mark.parametrize("page", PAGES, ids=by_path)
def test_every_command_a_page_names_exists(page):
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
    wanted = set(re.findall(r"\bmake (?:[A-Z]+=\S+ )*([a-z][a-z-]+)", code_of(page)))
    assert wanted <= targets, f"no such target: {sorted(wanted - targets)}"

    from typer.main import get_command

    from nanopd.cli import app

    commands = set(get_command(app).commands)
    wanted = set(re.findall(r"\bnanopd ([a-z]+)", code_of(page)))
    assert wanted <= commands, f"no such command: {sorted(wanted - commands)}"


def code_of(page):
    """Shell blocks and what stands between backticks: where commands are."""
    return "\n".join(fences(page, "sh") + re.findall(r"`([^`\n]+)`", text(page)))


def fences(page, language=r"\w*"):
    return re.findall(rf"^```{language}\n(.*?)^```", text(page), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=by_path)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text(page)):
        assert (page.parent / target).exists(), f"{by_path(page)} links to {target}"


@pytest.mark.parametrize("english, chinese", TWINS, ids=lambda page: by_path(page))
def test_twins_have_the_same_sections_and_the_same_code(english, chinese):
    def outline(page):
        prose = re.sub(r"^```.*?^```", "", text(page), flags=re.MULTILINE | re.DOTALL)
        return [len(marks) for marks in re.findall(r"^(#+) ", prose, re.MULTILINE)]

    def table_sizes(page):
        return [len(table.splitlines()) for table in re.findall(r"(?:^\|.*\n)+", text(page), re.MULTILINE)]

    assert outline(english) == outline(chinese)
    assert table_sizes(english) == table_sizes(chinese)
    for language in ("python", "sh"):
        ours, theirs = ([without_comments(code) for code in fences(page, language)] for page in (english, chinese))
        assert ours == theirs


def without_comments(code):
    return [line.split("  #")[0].rstrip() for line in code.splitlines() if not line.startswith("#")]


def test_the_readme_s_python_runs():
    (example,) = fences(ROOT / "README.md", "python")
    ran = subprocess.run([sys.executable, "-c", example], cwd=ROOT, capture_output=True, text=True, check=False, timeout=240)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("82\n")
    assert "P0 -> D0" in ran.stdout


@pytest.mark.parametrize("page", TWINS[0], ids=by_path)
def test_the_map_shows_every_package_and_nothing_else(page):
    """All of nanopd/*/; of a package's own packages those that are named."""
    first_cells = "".join(re.findall(r"^\| (`[^|]*) \|", text(page), re.MULTILINE))
    named = set(re.findall(r"`(\w+(?:/\w+)*)/`", first_cells))
    packages = {f"nanopd/{path.parent.name}" for path in (ROOT / "nanopd").glob("*/__init__.py")}
    assert packages <= named
    assert not [folder for folder in named if not (ROOT / folder).is_dir()]


def test_chapters_said_to_be_there_are_there_and_no_others():
    rows = re.findall(r"^\| (\d\d) \|(.*)\|$", text(ROOT / "README.md"), re.MULTILINE)
    said = {number for number, rest in rows if "planned" not in rest}
    assert len(rows) == 9
    there = {path.name[:2] for path in (ROOT / "notebooks" / "src").glob("[0-9][0-9]_*.py")}
    assert said == there
