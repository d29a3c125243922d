"""Lay the lessons without outputs into work/ and open JupyterLab there (`make lab`)."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat

REPOSITORY = Path(__file__).resolve().parent.parent
LAID = ".laid.json"  # file name in work/ -> hash of what was laid there


def without_outputs(path: Path) -> bytes:
    """Return the notebook's file without outputs and execution counts, the same for each call."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return (nbformat.writes(notebook) + "\n").encode()


def lay(source: Path, target: Path) -> Iterator[str]:
    """Lay the lessons of ``source`` into ``target``; yield a line for each thing worth saying.

    A file that was changed since it was laid is left as it is: a newer lesson is put beside it.
    """
    target.mkdir(parents=True, exist_ok=True)
    record = target / LAID
    laid = _read_record(record)
    for lesson in sorted(source.glob("*.ipynb")):
        content = without_outputs(lesson)
        digest = hashlib.sha256(content).hexdigest()
        if laid.get(f"lesson {lesson.name}") == digest and (target / lesson.name).exists():
            continue  # this version was laid before, here or beside
        for name in _names(lesson):
            path = target / name
            if not path.exists() or _digest(path) == laid.get(name):
                break  # a free name, or a file that nobody changed
        if name != lesson.name:
            yield f"{lesson.name} is yours and stays; the newer lesson lies beside it: {name}"
        _write(path, content)
        laid[name] = laid[f"lesson {lesson.name}"] = digest
        _write(record, json.dumps(laid, indent=1).encode())  # after each: Ctrl-C loses nothing


def _read_record(record: Path) -> dict[str, str]:
    try:
        return json.loads(record.read_text())
    except (OSError, ValueError):
        return {}  # none, or broken: then every file there counts as the learner's


def _names(lesson: Path) -> Iterator[str]:
    yield lesson.name
    yield f"{lesson.stem}.newer.ipynb"
    number = 2
    while True:
        yield f"{lesson.stem}.newer-{number}.ipynb"
        number += 1


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".part")
    temporary.write_bytes(content)
    temporary.replace(path)


def command(arguments: list[str]) -> list[str]:
    """Return the command that starts JupyterLab on localhost; its token stays on."""
    started = [sys.executable, "-m", "jupyterlab", f"--ServerApp.root_dir={REPOSITORY}"]
    started.append("--ServerApp.ip=localhost")
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        started.append("--allow-root")
    return started + arguments


def serve(arguments: list[str]) -> None:
    """Become JupyterLab, with the repository's additions to the reader's configuration."""
    paths = [str(REPOSITORY / "jupyter"), os.environ.get("JUPYTER_CONFIG_PATH")]
    os.environ["JUPYTER_CONFIG_PATH"] = os.pathsep.join(filter(None, paths))
    if os.name == "nt":  # there execv would hand the console back at once
        sys.exit(subprocess.call(command(arguments)))
    os.execv(sys.executable, command(arguments))


if __name__ == "__main__":
    for line in lay(REPOSITORY / "notebooks", REPOSITORY / "work"):
        print(line, flush=True)
    serve(sys.argv[1:])
