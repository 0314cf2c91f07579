"""Every command in README and docs: those that run anywhere are run as typed, those that can't be must at least exist.

The table below says of each command what becomes of it here. A command that fits no line fails the test, and so does a line
that no command fits. Python in the docs is run by test_docs.py.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs_en").glob("*.md")), *sorted((ROOT / "docs_zh").glob("*.md"))]
PRESET = ROOT / "nanopd" / "cost_model" / "presets" / "nvidia-h200" / "qwen3-8b.json"
SERVER = "127.0.0.1:8000"  # as the pages call it
SECONDS, SERVER_SECONDS = 240, 120  # for a machine that has much else to do

RUNS, NIGHTLY, SERVES = "run as typed", "run as typed, at night", "started, asked for its health, and stopped"

# What a command looks like -> what becomes of it, or why it can only be looked up. The first line that fits counts.
TABLE = {
    r"make [a-z-]+": "makes an environment and installs into it",
    r"PIP_EXTRA_INDEX_URL=\S+ make demo": "downloads",
    r"pip install .*": "downloads",
    r"source .venv/bin/activate": "make's environment",
    r"python -m pytest .*": "are these tests",
    r"python -m nanopd\.workbook\.builder --check .*": "is a part of make test",
    r"python -m nanopd\.workbook\.builder --stamp .*": "changes the checkout",
    r"python -m nanopd\.benchmark\.report\.figures": "changes the checkout; benchmark/report/test_figures.py looks at what it draws",
    r"nanopd doctor": RUNS,
    r"nanopd generate --model Qwen/.*": "downloads from the hub",
    r"nanopd generate .*": RUNS,
    r"nanopd bench scheduler .*": RUNS,
    r"nanopd bench report --recorded": RUNS,
    r"nanopd bench report sweep": "draws what was measured on GPUs",
    r"nanopd bench serve .*--model .*": "needs a GPU, or a server that is not there",
    r"nanopd bench serve( .*)?": NIGHTLY,
    r"nanopd bench record --device cpu .*": NIGHTLY,
    r"nanopd bench \w+( .*)?": "needs a GPU",
    r"nanopd profile --model qwen3-8b .*": "needs a GPU",
    r"nanopd profile": NIGHTLY,  # half a minute
    r"nanopd simulate --rate 20": RUNS,
    r"nanopd simulate .*": NIGHTLY,
    r"nanopd plan .*": NIGHTLY,
    r"nanopd serve --model Qwen/.*": "downloads from the hub",
    r"nanopd serve": SERVES,
    r"curl .*": "is asked of that server",
    r"nanopd lab new .*": RUNS,
    r"nanopd lab release .*": NIGHTLY,
    r"nanopd lab gallery .*": NIGHTLY,
    r"nanopd lab grade .*": "marks what somebody has handed in",
    r"docker run .* nanopd lab grade .*": "needs docker",
    r"vllm .*": "another project's",
    r"python -m sglang\..*": "another project's",
    r"(RAY_AUTH_MODE=token )?ray [a-z-]+.*": "starts and stops Ray on the machines of a network",
}


@dataclass(frozen=True)
class Command:
    """A line of a shell block, as it is to be typed."""

    line: str
    page: Path
    number: int  # of the line in its page

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.number}"

    @property
    def words(self) -> list[str]:
        """Without what is set before the command, and without the & after it."""
        words = shlex.split(self.line.removesuffix("&"), comments=True)
        return words[next(i for i, word in enumerate(words) if not re.match(r"[A-Z_]+=", word)):]

    @property
    def typed(self) -> str:
        """Without its comment, with single spaces: what the table is about."""
        return re.sub(r"\s+", " ", re.sub(r"\s#\s.*", "", self.line)).strip()

    @property
    def fate(self) -> str | None:
        return next((fate for pattern, fate in TABLE.items() if re.fullmatch(pattern, self.typed)), None)


def commands_of(page: Path) -> list[Command]:
    """Of all shell blocks, in order. A backslash at its end joins a line with the next."""
    text, found = page.read_text(encoding="utf-8"), []
    for block in re.finditer(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        number = text.count("\n", 0, block.start()) + 2
        for line in re.split(r"(?<!\\)\n", block[1]):
            if line.strip() and not line.lstrip().startswith("#"):
                found.append(Command(line.replace("\\\n", " "), page, number))
            number += 1 + line.count("\n")
    return found


def once(commands: list[Command]) -> list[Command]:
    """The pages of both languages have the same commands: each is tried once."""
    return list({command.typed: command for command in reversed(commands)}.values())[::-1]


COMMANDS = [command for page in PAGES for command in commands_of(page)]
by_line = {"ids": lambda command: command.typed}


def of_fate(*fates: str) -> list[Command]:
    return [command for command in once(COMMANDS) if command.fate in fates]


# --------------------------------------------------------------------------------------------------- the table


def test_every_command_has_a_line_in_the_table():
    unknown = [f"{command.where}: {command.typed}" for command in COMMANDS if command.fate is None]
    assert not unknown, f"give these a line in TABLE in {Path(__file__).name}:\n" + "\n".join(unknown)


def test_every_line_of_the_table_is_about_a_command():
    for pattern in TABLE:
        assert any(re.fullmatch(pattern, command.typed) for command in COMMANDS), f"no page has a command like {pattern}"


def test_shell_blocks_are_all_called_sh():
    for page in PAGES:
        assert not re.search(r"^```(bash|shell|console|zsh)$", page.read_text(encoding="utf-8"), re.MULTILINE), page


# ------------------------------------------------------------------------------------------- what only has to exist


@pytest.mark.parametrize("command", once(COMMANDS), **by_line)
def test_the_command_and_its_options_exist(command):
    problem = problem_of(command.words)
    assert problem is None, f"{command.where}: {command.typed}: {problem}"


def problem_of(words: list[str]) -> str | None:
    """Why this can't be a command, or None. Nothing is run but --help."""
    match words:
        case ["make", *targets]:
            known = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
            return next((f"no target {target}" for target in targets if "=" not in target and target not in known), None)
        case ["pip", "install", *packages]:
            return _problem_of_packages(packages)
        case ["source", ".venv/bin/activate"]:
            return None
        case ["python", "-m", "pytest", *rest]:
            return _problem_of_tests(rest)
        case ["python", "-m", "sglang.launch_server", *_]:
            return None
        case ["python", "-m", module, *rest]:
            if importlib.util.find_spec(module) is None:
                return f"no module {module}"
            return _unknown_option(rest, printed(lambda: importlib.import_module(module).main(["--help"])))
        case ["nanopd", *rest]:
            return _problem_of_subcommand(rest)
        case ["docker", "run", *rest] if "nanopd" in rest:
            return problem_of(rest[rest.index("nanopd"):])
        case ["curl" | "vllm" | "ray", *_]:
            return None
    return "a command that this test knows nothing of"


def _problem_of_packages(packages: list[str]) -> str | None:
    extras = re.search(r"^\[project.optional-dependencies\]\n(.*?)^\[", (ROOT / "pyproject.toml").read_text(encoding="utf-8"),
                       re.MULTILINE | re.DOTALL)
    assert extras is not None
    known = set(re.findall(r"^(\w+) = \[", extras[1], re.MULTILINE))
    wanted = {name for package in packages for names in re.findall(r"\[([\w,]+)\]", package) for name in names.split(",")}
    return f"no extra {', '.join(sorted(wanted - known))}" if wanted - known else None


def _problem_of_tests(words: list[str]) -> str | None:
    if words[:1] == ["-m"]:
        marked = re.search(rf'^    "{words[1]}: ', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
        return None if marked else f"no marker {words[1]}"
    return next((f"no {path}" for path in words if not (ROOT / path).exists()), None)


def _problem_of_subcommand(words: list[str]) -> str | None:
    """Parsed by the command itself, as if it were about to run; of `bench`, which parses on its own, by its help."""
    import click
    from typer.main import get_command

    from nanopd.cli import app

    command, context, name = get_command(app), None, "nanopd"
    while hasattr(command, "commands"):
        if not words or words[0] not in command.commands:
            return f"no command {' '.join([name, *words[:1]])}"
        context = click.Context(command, parent=context, info_name=name)
        name, *words = words
        command = command.commands[name]
    if command.context_settings.get("ignore_unknown_options"):
        return _unknown_option(words[1:], printed(lambda: app([name, *words[:1], "--help"])))
    try:
        command.make_context(name, list(words), parent=context)
    except click.exceptions.Exit:
        return None
    except Exception as error:  # typer has a ClickException of its own
        return getattr(error, "message", None) or repr(error)
    return None


def _unknown_option(words: list[str], known: str | None) -> str | None:
    if known is None:
        return "--help is not understood"
    options = [word.split("=")[0] for word in words if word.startswith("--")]
    return next((f"no option {option}" for option in options if not re.search(rf"(?<![\w-]){option}(?![\w-])", known)), None)


def printed(help_of: Callable[[], object]) -> str | None:
    """What --help prints; None where it fails."""
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
            help_of()
    except SystemExit as ended:
        return None if ended.code else out.getvalue()
    return None


@pytest.mark.parametrize("line, problem", [
    ("make tea", "no target tea"),
    ("pip install 'nanopd[lab,tea]'", "no extra tea"),
    ("python -m pytest tests/tea", "no tests/tea"),
    ("python -m pytest -m tea", "no marker tea"),
    ("python -m nanopd.tea", "no module nanopd.tea"),
    ("python -m nanopd.workbook.builder --chec 01", "no option --chec"),
    ("nanopd tea", "no command nanopd tea"),
    ("nanopd simulate --tea 3", "--tea"),
    ("nanopd simulate --rate fast", "valid"),
    ("nanopd bench decode --tea 3", "no option --tea"),
    ("nanopd bench tea", "--help is not understood"),
    ("tea", "knows nothing of"),
])
def test_what_does_not_exist_is_found(line, problem):
    assert problem in (problem_of(shlex.split(line)) or "nothing found")


def test_comments_settings_and_joined_lines_are_no_part_of_a_command(tmp_path):
    page = tmp_path / "page.md"
    page.write_text('text\n```sh\n# alone\nA=b nanopd x  "#1"  # why\nnanopd y \\\n    --z &\n```\n', encoding="utf-8")
    first, second = commands_of(page)
    assert first.typed == 'A=b nanopd x "#1"' and first.words == ["nanopd", "x", "#1"] and first.number == 4
    assert second.words == ["nanopd", "y", "--z"] and second.number == 5


# ------------------------------------------------------------------------------------------------------ what is run


@pytest.fixture(scope="module")
def shell(tmp_path_factory):
    """Runs lines in a folder of its own, with this checkout's `nanopd` and without a GPU; an H200's profile is in mine.json."""
    home = tmp_path_factory.mktemp("home")
    folder, programs = home / "work", home / "bin"
    folder.mkdir()
    programs.mkdir()
    for name, words in (("nanopd", "-m nanopd"), ("python", "")):
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {words} "$@"\n', encoding="utf-8")
        (programs / name).chmod(0o755)
    shutil.copy(PRESET, folder / "mine.json")
    environment = {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT),
                   "CUDA_VISIBLE_DEVICES": "", "HOME": str(home)}

    def start(line: str, **options) -> subprocess.Popen[str]:
        return subprocess.Popen(["bash", "-c", line], cwd=folder, env=environment, text=True, stdin=subprocess.DEVNULL,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)

    return start


def run(shell, command: Command) -> None:
    process = shell(command.typed)
    said, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, f"{command.where}: {command.typed}\n{said}"


@pytest.mark.parametrize("command", of_fate(RUNS), **by_line)
def test_it_runs_as_typed(shell, command):
    run(shell, command)


@pytest.mark.nightly
@pytest.mark.parametrize("command", of_fate(NIGHTLY), **by_line)
def test_it_runs_as_typed_at_night(shell, command):
    run(shell, command)


@pytest.mark.skipif(importlib.util.find_spec("fastapi") is None, reason="fastapi is not installed (pip install 'nanopd[serve]')")
@pytest.mark.parametrize("command", of_fate(SERVES), **by_line)
def test_a_server_starts_answers_and_stops(shell, command):
    """On a port that is free; what the pages ask of it, with curl or from Python, is asked."""
    port = free_port()
    process = shell(f"exec {command.typed} --port {port}")
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process)
        for asked in questions():
            answer = shell(asked.replace(SERVER, f"127.0.0.1:{port}"))
            said, _ = answer.communicate(timeout=SECONDS)
            assert answer.returncode == 0 and said.strip(), f"{asked}\n{said}"
    finally:
        process.terminate()
        said, _ = process.communicate(timeout=60)
    assert process.returncode in (0, -15, 143), said


def questions() -> list[str]:
    """Of all pages, to be typed in a shell: calls of curl, and blocks of Python that ask the server."""
    curls = [command.typed.replace("curl", "curl --fail --silent --show-error", 1) for command in once(COMMANDS)
             if command.words[0] == "curl" and shutil.which("curl")]
    blocks = {block for page in PAGES for block in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"),
                                                             re.MULTILINE | re.DOTALL) if SERVER in block}
    return curls + [f"python -c {shlex.quote(block)}" for block in sorted(blocks)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(url: str, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + SERVER_SECONDS
    while True:
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except (urllib.error.URLError, OSError):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, f"{url} did not answer within {SERVER_SECONDS} s"
            time.sleep(0.2)
