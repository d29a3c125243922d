"""A real JupyterLab, as `make lab` starts it, and a real Chromium that looks at it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
TOKEN = "browser-test"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def chromium() -> str | None:
    return next(filter(None, map(shutil.which, BROWSERS)), None)


@contextmanager
def server(folder: Path) -> Iterator[str]:
    """JupyterLab through tools/lab.py with a profile of its own; yields its address.

    The repository's tools and lessons are copied, so that the learner's work/ is not touched.
    """
    for name in ("notebooks", "tools", "jupyter"):
        shutil.copytree(ROOT / name, folder / name)
    profile = folder / "profile"
    overrides = folder / "jupyter" / "labconfig" / "default_setting_overrides.json"
    settings = json.loads(overrides.read_text())
    settings["@jupyterlab/notebook-extension:tracker"] = {"windowingMode": "none"}
    settings["@jupyterlab/docmanager-extension:plugin"] = {"autosave": False}
    overrides.write_text(json.dumps(settings))
    environment = os.environ | {
        "JUPYTER_CONFIG_DIR": str(profile / "config"),
        "JUPYTER_DATA_DIR": str(profile / "data"),
        "JUPYTER_RUNTIME_DIR": str(profile / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(profile / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(profile / "workspaces"),
        "DLHELPERS_LEDGER": str(folder / "ledger.json"),
    }
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = (folder / "server.log").open("w")
    command = [sys.executable, str(folder / "tools" / "lab.py"), "--no-browser", f"--port={port}"]
    command += [f"--IdentityProvider.token={TOKEN}", "--LabApp.expose_app_in_browser=True"]
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder)
    address = f"http://127.0.0.1:{port}"
    try:
        _wait_until_up(address, process, folder / "server.log")
        yield address
    finally:
        _shut_down(address, process)
        log.close()


def _wait_until_up(address: str, process: subprocess.Popen, log: Path) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until and process.poll() is None:
        try:
            urllib.request.urlopen(f"{address}/api?token={TOKEN}", timeout=2)
            return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"JupyterLab did not start:\n{log.read_text()}")


def _shut_down(address: str, process: subprocess.Popen) -> None:
    try:  # SIGTERM alone may wait for kernels for a minute
        request = urllib.request.Request(f"{address}/api/shutdown?token={TOKEN}", method="POST")
        urllib.request.urlopen(request, timeout=5)
        process.wait(20)
    except (OSError, subprocess.TimeoutExpired):
        process.kill()
        process.wait()


def open_notebook(page, address: str, name: str) -> None:
    """Open work/NAME and wait until notebook and kernel are ready."""
    page.goto(f"{address}/lab/tree/work/{name}?token={TOKEN}&reset")
    wait_until_ready(page)


def wait_until_ready(page) -> None:
    """Wait until the notebook that is being opened and its kernel are ready."""
    page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=60_000)
    page.wait_for_function(
        "() => window.jupyterapp && window.jupyterapp.shell.currentWidget"
        " && window.jupyterapp.shell.currentWidget.context",
        timeout=60_000,
    )
    page.evaluate("() => window.jupyterapp.shell.currentWidget.context.ready")
    page.evaluate(  # not for ever: it waits while a kernel dialog is open
        "() => Promise.race([window.jupyterapp.shell.currentWidget.sessionContext.ready,"
        " new Promise(done => setTimeout(done, 30000))])"
    )
    page.wait_for_function(
        "() => window.jupyterapp.shell.currentWidget.sessionContext.session?.kernel"
        "?.connectionStatus === 'connected'",
        timeout=60_000,
    )
    page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status='idle']", timeout=60_000)


def run_all(page, timeout_s: float = 300) -> None:
    """Run every cell and wait until each code cell has run."""
    page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells'); }")
    page.wait_for_function(
        """() => {
          const code = window.jupyterapp.shell.currentWidget.content.widgets
            .map(w => w.model)
            .filter(m => m.type === 'code' && m.sharedModel.getSource().trim());
          const planned = m => (m.getMetadata('tags') || []).includes('raises-exception');
          return code.some(m => !planned(m)
              && m.outputs.toJSON().some(o => o.output_type === 'error'))
            || code.every(m => m.executionCount !== null && m.executionState !== 'running');
        }""",
        timeout=timeout_s * 1000,
        polling=500,
    )
    page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status='idle']", timeout=60_000)


def run_cell(page, text: str):
    """Run the first code cell whose source holds the text; return the cell."""
    number = page.evaluate(
        """([text]) => window.jupyterapp.shell.currentWidget.content.widgets.findIndex(
          w => w.model.type === 'code' && w.model.sharedModel.getSource().includes(text))""",
        [text],
    )
    assert number >= 0, text
    page.evaluate(
        """([n]) => { const notebook = window.jupyterapp.shell.currentWidget.content;
          notebook.deselectAll(); notebook.activeCellIndex = n;
          window.jupyterapp.commands.execute('notebook:run-cell'); }""",
        [number],
    )
    page.wait_for_timeout(300)
    page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status='idle']", timeout=60_000)
    return page.locator(".jp-Notebook .jp-Cell").nth(number)


def errors(page) -> list[str]:
    """Unplanned errors of cells, and tracebacks inside widgets, which no cell model knows."""
    found = page.evaluate(
        """() => window.jupyterapp.shell.currentWidget.content.widgets
          .filter(w => w.model.type === 'code')
          .filter(w => !(w.model.getMetadata('tags') || []).includes('raises-exception'))
          .flatMap(w => w.model.outputs.toJSON())
          .filter(o => o.output_type === 'error')
          .map(o => o.ename + ': ' + o.evalue)"""
    )
    stderr = page.evaluate(
        """() => window.jupyterapp.shell.currentWidget.content.widgets
          .filter(w => !(w.model.getMetadata('tags') || []).includes('raises-exception'))
          .flatMap(w => [...w.node.querySelectorAll(
            "[data-mime-type='application/vnd.jupyter.stderr']")])
          .map(element => element.innerText)"""
    )
    return found + [text for text in stderr if "Traceback" in text]
