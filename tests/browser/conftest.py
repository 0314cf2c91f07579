"""JupyterLab on this machine, a headless Chromium in front of it, and what a test says to a notebook in it.

A test takes `open_notebook` (chapters) or `write_notebook` (its own) and gets an `OpenNotebook`:

    def test_it(open_notebook):
        notebook = open_notebook("solutions/zh/01_block_manager.ipynb")
        notebook.run_all()
        panel = notebook.panel("widgets.BlockMap(small")
        notebook.press_and_see_change(panel)
        notebook.assert_quiet()

Screenshots go to the folder NANOPD_SCREENSHOTS, or to pytest's temporary one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import nbformat
import pytest
from chromium import find_chromium

import nanopd
from nanopd.workbook import builder

LOCAL_HOSTS = {"127.0.0.1", "localhost"}
START_SECONDS, RUN_SECONDS, WIDGET_SECONDS = 90, 240, 60  # for a machine that has much else to do
QUIET_SETTINGS = {  # JupyterLab asks jupyter.org for news and updates unless told not to
    "@jupyterlab/apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}
# The picture as plotly holds it: what is drawn, not how.
FIGURE = """panel => {
    const plot = panel.querySelector('.js-plotly-plot');
    if (!plot?.data) return '';
    const {shapes, annotations, title} = plot.layout;
    return JSON.stringify([plot.data, shapes, annotations, title]);
}"""
# What JupyterLab knows about the notebook in front (--expose-app-in-browser): its dot says idle too early, and a
# cell run before the kernel is there is lost; and what shows in the page depends on where it is scrolled to.
IDLE = "() => window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
FINISHED = """() => {
    const {content, sessionContext} = jupyterapp.shell.currentWidget;
    const cells = [...content.model.cells].map(cell => cell.toJSON()).filter(cell => cell.cell_type === 'code');
    const serious = cells.filter(cell => !cell.metadata.tags?.includes('raises-exception'));
    const error = serious.flatMap(cell => cell.outputs).find(output => output.output_type === 'error');
    if (error) return [`${error.ename}: ${error.evalue}`];
    const done = cells.every(cell => cell.execution_count !== null || !cell.source.length);
    return done && sessionContext.session.kernel.status === 'idle' ? [null] : null;
}"""
# The cell whose code holds a text. Lab keeps cells that are out of sight out of the page, so it is scrolled there.
CELL = """async text => {
    const {content} = jupyterapp.shell.currentWidget;
    const index = [...content.model.cells].findIndex(
        cell => cell.type === 'code' && cell.sharedModel.getSource().includes(text));
    if (index < 0) throw new Error('no cell with ' + text);
    content.activeCellIndex = index;
    await content.scrollToItem(index, 'start');
    return content.widgets[index].node;
}"""
RUN_CELL = """async () => {
    await jupyterapp.commands.execute('notebook:run-cell');
    const {content} = jupyterapp.shell.currentWidget;
    return content.activeCell.model.toJSON().outputs.map(output => output.text ?? output.evalue ?? '').join('');
}"""
STOP_KERNELS = """async () => {
    const headers = {'X-XSRFToken': (document.cookie.match(/_xsrf=([^;]*)/) || [])[1] || ''};
    for (const session of await (await fetch('/api/sessions')).json())
        await fetch('/api/sessions/' + session.id, {method: 'DELETE', headers});
}"""


@dataclass(frozen=True)
class Lab:
    url: str
    root: Path  # its folder of notebooks, a copy


class OpenNotebook:
    """A notebook in the page, and what the page complained about."""

    def __init__(self, page: Any, lab: Lab, path: str, screenshots: Path) -> None:
        self.page = page
        self.path = path
        self.screenshots = screenshots
        self.console_errors: list[str] = []
        self.foreign_requests: list[str] = []
        page.on("console", lambda message: message.type == "error" and self.console_errors.append(
            f"{message.text} ({message.location.get('url', '')})"))
        page.on("pageerror", lambda error: self.console_errors.append(str(error)))
        page.on("request", lambda request: self._note_request(request.url))
        page.on("websocket", lambda socket: self._note_request(socket.url))
        page.goto(f"{lab.url}/lab/tree/{path}?reset", wait_until="domcontentloaded")
        self.wait_until(lambda: page.evaluate(IDLE), "the kernel is not idle", START_SECONDS)

    def run_all(self) -> None:
        """Run All Cells from the menu, and wait for the last. Fails with the first error, unless the cell is tagged for it."""
        self.page.get_by_role("menuitem", name="Run", exact=True).click()
        self.page.get_by_text("Run All Cells", exact=True).click()
        errors = self.wait_until(lambda: self.page.evaluate(FINISHED), "the cells did not finish", RUN_SECONDS)
        assert errors == [None], errors[0]

    def run_cell(self, code: str) -> str:
        """Run the first cell whose code holds this text. Returns what it printed, or the error it ended with."""
        self.page.evaluate_handle(CELL, code)
        return self.page.evaluate(RUN_CELL)

    def panel(self, code: str) -> Any:
        """The first cell whose code holds this text, once its output has a figure: the very element, wherever the
        page is scrolled to."""
        cell = self.page.evaluate_handle(CELL, code).as_element()
        self.wait_until(lambda: self.figure_of(cell), f"no figure in the cell with {code}")
        return cell

    def figure_of(self, panel: Any) -> str:
        """The panel's figure as text; empty while there is none."""
        return panel.evaluate(FIGURE)

    def press_and_see_change(self, panel: Any, selector: str = ".nanopd-step") -> tuple[str, str]:
        """Press the panel's first button under `selector` and wait until its figure is another one."""
        return self._act_and_see_change(panel, selector, lambda button, time: button.click(timeout=time))

    def slide_and_see_change(self, panel: Any, key: str = "ArrowRight", slider: str = "") -> tuple[str, str]:
        """Press a key on the panel's first slider (under the selector `slider`), and wait as above."""
        return self._act_and_see_change(panel, f"{slider} .noUi-handle", lambda handle, time: handle.press(key, timeout=time))

    def _act_and_see_change(self, panel: Any, selector: str, act: Callable[[Any, float], None]) -> tuple[str, str]:
        before, time = self.figure_of(panel), WIDGET_SECONDS * 1000
        act(panel.wait_for_selector(selector, timeout=time), time)
        self.wait_until(lambda: self.figure_of(panel) not in ("", before),
                         lambda: f"{selector} did not change the figure; the panel says {self._said_by(panel)!r}")
        return before, self.figure_of(panel)

    def _said_by(self, panel: Any) -> list[str]:
        return [line.inner_text() for line in panel.query_selector_all(".widget-html-content")]

    def text(self) -> str:
        return self.page.locator(".jp-NotebookPanel").inner_text()

    def screenshot(self, name: str) -> Path:
        path = self.screenshots / f"{name}.png"
        self.page.screenshot(path=path)
        return path

    def assert_quiet(self) -> None:
        """Nothing in the console is an error, and nothing was asked of another machine."""
        assert self.foreign_requests == []
        assert self.console_errors == []

    def close(self) -> None:
        self.page.evaluate(STOP_KERNELS)
        self.page.close()

    def _note_request(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("blob", "data") and parts.hostname not in LOCAL_HOSTS:
            self.foreign_requests.append(url)

    def wait_until(self, condition: Callable[[], Any], complaint: str | Callable[[], str],
                    seconds: float = WIDGET_SECONDS) -> Any:
        deadline = time.monotonic() + seconds
        while not (value := condition()):
            if time.monotonic() > deadline:
                pytest.fail(f"{complaint if isinstance(complaint, str) else complaint()} (within {seconds} s)")
            self.page.wait_for_timeout(100)  # lets the page work, which time.sleep would not
        return value


# ------------------------------------------------------------------------------------------------ fixtures


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Module-wide, not session-wide: playwright's event loop would be in the way of nbclient in other tests."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    executable = find_chromium()
    if executable is None:
        pytest.skip("there is no Chromium on the PATH")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=executable, args=[
            "--no-sandbox", "--disable-gpu", "--disable-background-networking"])
        yield chromium.new_context(viewport={"width": 1280, "height": 900})  # one: JupyterLab's code is cached
        chromium.close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """JupyterLab on a free port of 127.0.0.1, over a copy of the notebooks, with settings of its own."""
    pytest.importorskip("jupyterlab", reason="JupyterLab is not installed")
    home = tmp_path_factory.mktemp("lab")
    root = home / "notebooks"
    shutil.copytree(builder.NOTEBOOKS, root, ignore=shutil.ignore_patterns("src", ".*", "__pycache__"))
    port = _free_port()
    with open(home / "lab.log", "w", encoding="utf-8") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1",
             f"--ServerApp.port={port}", "--ServerApp.port_retries=0", "--IdentityProvider.token=",
             f"--ServerApp.root_dir={root}", "--expose-app-in-browser"],
            env=_environment(home), stdout=log, stderr=log, start_new_session=True)
        try:
            _wait_for_server(f"http://127.0.0.1:{port}/api/status", server, home / "lab.log")
            yield Lab(f"http://127.0.0.1:{port}", root)
        finally:
            os.killpg(server.pid, signal.SIGTERM)  # its own session: the kernels go with it
            server.wait(timeout=30)


@pytest.fixture
def open_notebook(lab: Lab, browser: Any, tmp_path: Path) -> Iterator[Callable[..., OpenNotebook]]:
    """open_notebook("solutions/zh/01_topic.ipynb"), for a path under notebooks/."""
    opened: list[OpenNotebook] = []
    screenshots = Path(os.environ.get("NANOPD_SCREENSHOTS") or tmp_path)
    screenshots.mkdir(parents=True, exist_ok=True)

    def open_it(path: str) -> OpenNotebook:
        page = browser.new_page()
        opened.append(OpenNotebook(page, lab, path, screenshots))
        return opened[-1]

    yield open_it
    for notebook in opened:
        notebook.close()


@pytest.fixture
def write_notebook(lab: Lab) -> Callable[..., str]:
    """write_notebook("zh/own.ipynb", "code of a cell", ...) returns the path to open."""

    def write_it(path: str, *cells: str) -> str:
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
        notebook.metadata.kernelspec = {"display_name": "Python 3", "language": "python", "name": "python3"}
        (lab.root / path).parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, lab.root / path)
        return path

    return write_it


def _environment(home: Path) -> dict[str, str]:
    """Nobody's own Jupyter settings are read or written, and kernels find the package under test."""
    for name, settings in QUIET_SETTINGS.items():
        path = home / "settings" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings), encoding="utf-8")
    folders = {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "JUPYTER_RUNTIME_DIR": "runtime",
               "JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces", "IPYTHONDIR": "ipython"}
    environment = {name: value for name, value in os.environ.items() if not re.match("NANOPD_|JUPYTER", name)}
    return environment | {name: str(home / folder) for name, folder in folders.items()} | {
        "PYTHONPATH": str(Path(nanopd.__file__).parents[1])}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_for_server(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except (urllib.error.URLError, OSError):
            tail = log.read_text(encoding="utf-8")[-2000:]
            assert server.poll() is None, f"JupyterLab ended:\n{tail}"
            assert time.monotonic() < deadline, f"JupyterLab did not answer within {START_SECONDS} s:\n{tail}"
            time.sleep(0.2)
