"""Does every notebook run from top to bottom, and what does its evidence say?

Each notebook runs in a fresh kernel of this very Python, in its own folder, in memory: the file
is never written. The ledger's path goes to the kernels in DLHELPERS_LEDGER.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty
from typing import Any

from dlhelpers.extras import need
from dlhelpers.progress import bar

__all__ = ["NotebookRun", "RunSummary", "kernel_of_this_python", "run_notebooks"]

_LOOK_S = 1.0  # between two looks for a message


@dataclass(frozen=True)
class NotebookRun:
    """One notebook that was run.

    Attributes:
        name: the file's stem.
        seconds: wall-clock time, the kernel's start included.
        cells: code cells that were run to their end.
        error: which cell failed and how; empty where none did.
    """

    name: str
    seconds: float
    cells: int
    error: str = ""

    def __str__(self) -> str:
        said = f"FAILED in {self.error}" if self.error else "ran"
        return f"{self.name}: {self.cells} code cells in {self.seconds:.0f} s, {said}"


@dataclass(frozen=True)
class RunSummary:
    """All notebooks that were run, and the ledger that they filled."""

    runs: tuple[NotebookRun, ...]
    ledger: Path

    @property
    def failed(self) -> tuple[NotebookRun, ...]:
        """Those that did not run to their end."""
        return tuple(run for run in self.runs if run.error)

    def __str__(self) -> str:
        return "\n".join(map(str, self.runs))


def run_notebooks(
    folder: str | Path,
    *,
    ledger: str | Path,
    progress: bool = True,
    timeout: float = 600.0,
) -> RunSummary:
    """Run every notebook of a folder, in the order of their names, into a fresh ledger.

    A notebook whose cell fails (other than one tagged ``raises-exception``) stops there, and the
    next one is run.

    Args:
        folder: where ``*.ipynb`` lie.
        ledger: the JSON file; a ledger that is there is replaced.
        progress: show a bar over notebooks and one over cells.
        timeout: seconds that one cell may take.

    Raises:
        FileNotFoundError: the folder holds no notebook.
        ImportError: the extra course is not installed.
        OSError: the ledger cannot be written.
        KeyboardInterrupt: on Ctrl-C; what was settled by then is in the ledger.
    """
    folder, ledger = Path(folder).absolute(), Path(ledger).absolute()
    paths = sorted(folder.glob("*.ipynb"))
    if not paths:
        raise FileNotFoundError(f"no notebook in {folder}: name the folder of *.ipynb files")
    need("nbclient", "running notebooks")
    from dlhelpers.course import ledger as ledgers

    ledgers.start(ledger)
    environment = os.environ | {"DLHELPERS_LEDGER": str(ledger)}
    runs = []
    with bar(paths, progress=progress, unit="notebook") as shown:
        for path in shown:
            shown.set_description(path.stem)
            runs.append(_run(path, environment, progress, timeout))
    return RunSummary(tuple(runs), ledger)


def _run(path: Path, environment: Mapping[str, str], progress: bool, timeout: float) -> NotebookRun:
    import nbformat
    from nbclient import NotebookClient

    started = time.perf_counter()
    begun: list[Any] = []  # code cells that were begun, the last one may have failed
    error, client = "", None
    try:
        notebook = nbformat.read(path, as_version=4)
        code = [c for c in notebook.cells if c.cell_type == "code" and c.source.strip()]
        with bar(progress=progress, total=len(code), unit="cell", leave=False) as shown:

            def begin(cell: Any, cell_index: int) -> None:
                shown.update(bool(begun))
                begun.append(cell)

            client = NotebookClient(
                notebook,
                timeout=timeout,
                kernel_manager_class=kernel_of_this_python(),
                resources={"metadata": {"path": str(path.parent)}},
                on_cell_execute=begin,
            )
            client.execute(env=dict(environment))
    except Exception as failure:  # whatever one notebook does, the others are run
        if getattr(client, "_async_cleanup_kernel_future", None) is not None:
            raise KeyboardInterrupt from failure  # nbclient took the signal for itself
        error = f"{_place(begun)}{_said(failure)}"
    seconds = time.perf_counter() - started
    return NotebookRun(path.stem, seconds, max(len(begun) - bool(error), 0), error)


def kernel_of_this_python() -> type:
    """Return a kernel manager that starts this Python, whatever kernels the user has installed.

    Its client looks for messages once a second: now and then a message comes without waking the
    one that waits for it, who would then sit until the cell's timeout.
    """
    from ipykernel.kernelspec import get_kernel_dict
    from jupyter_client import AsyncKernelClient, AsyncKernelManager
    from jupyter_client.channels import AsyncZMQSocketChannel
    from jupyter_client.kernelspec import KernelSpec
    from traitlets import Type, default

    class Channel(AsyncZMQSocketChannel):
        async def get_msg(self, timeout: float | None = None) -> dict[str, Any]:
            left = math.inf if timeout is None else timeout
            while left > _LOOK_S:
                with suppress(Empty):
                    return await super().get_msg(timeout=_LOOK_S)
                left -= _LOOK_S
            return await super().get_msg(timeout=left)

    class Client(AsyncKernelClient):
        shell_channel_class = Type(Channel)
        iopub_channel_class = Type(Channel)

    class ThisPython(AsyncKernelManager):
        @default("client_factory")
        def _client_factory_default(self) -> type:
            return Client

        @property
        def kernel_spec(self) -> KernelSpec:
            return KernelSpec(**get_kernel_dict())

    return ThisPython


def _place(begun: list[Any]) -> str:
    if not begun:
        return ""
    first = begun[-1].source.strip().splitlines()[0]
    return f"code cell {len(begun)} ({first[:60]}): "


def _said(failure: Exception) -> str:
    name = getattr(failure, "ename", type(failure).__name__)
    text = str(getattr(failure, "evalue", failure)).strip()
    return f"{name}: {text.splitlines()[0][:300]}" if text else name
