"""How is a file read that may end the process that reads it?

LMDB trusts its file: a broken page can crash or hang it. So a child process does the reading, and
what becomes of it is one more problem of the file.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dlhelpers.progress import bar

__all__ = ["read_apart"]

_SILENCE_S = 120.0  # a child that says nothing for so long hangs on a broken page


def read_apart(
    path: Path, module: str, entry: bytes = b"", *, progress: bool | None = False
) -> tuple[list[str], dict[str, Any] | None]:
    """Run ``_main(path, entry)`` of a module in a child process, and return what it finds.

    Args:
        path: of the file.
        module: whose function prints lines of JSON, (kind, value): ``meta``, ``at`` and
            ``problem`` as they come, at last ``end``.
        entry: what it is to look at, where that is not the whole file.
        progress: a bar on long runs; None draws it in a terminal only.

    Returns:
        (problems, the meta entry or None). That the child crashes or hangs is a problem.
    """
    root = str(Path(__file__).resolve().parents[2])
    known = os.environ.get("PYTHONPATH")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (root, known)))}
    code = f"import sys; from {module} import _main; _main(*sys.argv[1:])"
    # -P: no module is taken from the folder in which the user happens to be
    command = [sys.executable, "-P", "-c", code, os.fspath(path), entry.decode()]
    problems: list[str] = []
    meta, at, ended = None, 0, False
    with (
        tempfile.TemporaryFile() as errors_file,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors_file, env=environment
        ) as child,
        bar(progress=progress, desc="verify", unit="img") as shown,
    ):
        try:
            for line in _lines(child):
                kind, value = json.loads(line)
                if kind == "at":
                    shown.update(value - at)
                    at = value
                elif kind == "meta":
                    meta = value
                    shown.total = value["count"]
                elif kind == "problem":
                    problems.append(value)
                else:
                    ended = True
        finally:
            if not ended:
                child.kill()
                child.wait()
        errors_file.seek(0)
        errors = errors_file.read().decode(errors="replace")
    if not ended:
        problems.append(_last_words(child.returncode, at, errors))
    return problems, meta


def _lines(child: Any) -> Iterator[bytes]:
    """Yield the child's lines, until its end or until it hangs."""
    if os.name == "nt":  # pipes cannot be waited for there
        yield from child.stdout
        return
    rest = b""
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ)
        while selector.select(_SILENCE_S):
            if not (data := os.read(child.stdout.fileno(), 1 << 16)):
                child.wait()
                return
            *lines, rest = (rest + data).split(b"\n")
            yield from lines


def _last_words(status: int, at: int, errors: str) -> str:
    where = f"at or behind record {at}"
    if status == -signal.SIGKILL:
        return f"LMDB hangs on the file {where}, or reading was killed"
    if status < 0:
        return f"LMDB crashes on a broken page {where} ({signal.Signals(-status).name})"
    last = errors.strip().splitlines()[-1:] or [f"exit status {status}"]
    return f"reading failed {where}: {last[0]}"
