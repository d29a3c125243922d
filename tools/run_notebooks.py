"""Run notebooks top to bottom and store their outputs, as they are committed."""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from dlhelpers.course.report.running import kernel_of_this_python


def run(path: Path) -> float:
    """Execute a notebook in its folder, with a fresh ledger; write it whole or not at all."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DLHELPERS_LEDGER"] = str(Path(folder) / "ledger.json")
        client = NotebookClient(
            notebook,
            timeout=600,
            kernel_manager_class=kernel_of_this_python(),
            record_timing=False,
            resources={"metadata": {"path": str(path.parent)}},
        )
        start = time.perf_counter()
        client.execute()
        seconds = time.perf_counter() - start
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = {"name": "python"}
    notebook.metadata["kernelspec"] = {
        "display_name": "Python 3 (ipykernel)",
        "language": "python",
        "name": "python3",
    }
    temporary = path.with_suffix(".part")
    nbformat.write(notebook, temporary)
    temporary.replace(path)
    return seconds


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebooks", nargs="+", type=Path)
    for path in parser.parse_args().notebooks:
        print(f"{path}: {run(path):.1f} s, {path.stat().st_size / 1e3:.0f} KB", flush=True)
