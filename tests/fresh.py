"""Processes for code that must not run in the tests' own.

They are forked from a Python that has imported torch and nothing else, which saves each of them two
seconds: not for tests of what happens before torch is there or when an interpreter ends.
"""

import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

CONTEXT = None
if sys.platform == "linux":  # elsewhere a fork after torch was imported may crash
    CONTEXT = multiprocessing.get_context("forkserver")
    CONTEXT.set_forkserver_preload(["torch"])


def run(code, *arguments):
    """Run code in a new process; return it with what it has printed, as ``subprocess.run``."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    if CONTEXT is None:
        return subprocess.run(command, capture_output=True, text=True, check=False)
    with tempfile.TemporaryDirectory() as folder:
        printed = [Path(folder, name) for name in ("stdout", "stderr")]
        process = CONTEXT.Process(
            target=_main, args=(code, command[2:], os.environ.copy(), printed)
        )
        process.start()
        process.join()
        said = [path.read_text(encoding="utf-8") for path in printed]
    return subprocess.CompletedProcess(command, process.exitcode, *said)


def _main(code, arguments, environment, printed):
    for descriptor, path in enumerate(printed, 1):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["-c", *arguments[1:]]
    exec(compile(code, "<string>", "exec"), sys.modules["__main__"].__dict__)
