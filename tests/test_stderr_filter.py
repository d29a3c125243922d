"""What a kernel's child lets through, and what is left when the kernel or the child dies."""

import os
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import DeadKernelError

from dlhelpers.course import stderr_filter
from dlhelpers.course.report.running import kernel_of_this_python

pytestmark = pytest.mark.skipif(os.name == "nt", reason="a kernel watches no descriptor on Windows")

INSTALL = "import os\nfrom dlhelpers.course import stderr_filter\nprint(stderr_filter.install())"
PID = "import psutil\n[child] = psutil.Process().children()\nprint(child.pid)"
USDT = b"USDT:2026-01-02 03:04:05 6:7 SyncActivityProfilerHandler.cpp:39] profiler_start\n"
WARNING = b"[W0102 03:04:05.678901234 CPUAllocator.cpp:245] Memory block of unknown size was\n"
ERROR = b"ERROR:2026-01-02 03:04:05 6:7 DeviceProperties.cpp:56] gpuGetDeviceCount failed\n"


def run(terminal, *cells):
    """Run cells in a kernel with a file for a terminal; return the streams of each, what it raised.

    A cell that writes to descriptor 2 stays a while: on a busy machine the kernel's own thread,
    which reads what comes there, may be late.
    """
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    client = NotebookClient(notebook, timeout=60, kernel_manager_class=kernel_of_this_python())
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    del environment["PYTEST_CURRENT_TEST"]  # under it no kernel watches its descriptors
    failure = None
    with open(terminal, "wb") as file:
        try:
            client.execute(env=environment, stderr=file)
        except DeadKernelError as error:
            failure = error
    streams = [
        {output.name: output.text for output in cell.outputs if output.output_type == "stream"}
        for cell in notebook.cells
    ]
    return streams, failure


CATCHES_UP = """
import os
from dlhelpers.course.stderr_filter import _Filter
reading, writing = os.pipe()
os.set_blocking(reading, False)
os.dup2(writing, 2)
made = _Filter(terminal=os.dup(1))
for number in range(50):
    os.write(2, b"line %d" % number + b"\\n" * (number % 2))
    made.catch_up()
    assert os.read(reading, 100).startswith(b"line %d" % number)
made.end(os.getpid())
"""


def test_what_is_written_has_passed_when_the_filter_has_caught_up():
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", CATCHES_UP], env=environment, stdout=subprocess.PIPE, check=False
    )
    assert done.returncode == 0


def ended(pid, within=20.0):
    until = time.monotonic() + within
    while psutil.pid_exists(pid) and time.monotonic() < until:
        time.sleep(0.05)
    return not psutil.pid_exists(pid)


def test_the_set_up_drops_what_the_profiler_says_and_nothing_else(tmp_path):
    streams, failure = run(
        tmp_path / "terminal",
        "from dlhelpers.course import notebook\nnotebook.setup()",
        "notebook.setup()\n"
        "after = get_ipython().events.callbacks['post_execute']\n"
        "assert sum('catch_up' in repr(callback) for callback in after) == 1",
        PID,
        "import os, torch, warnings\n"
        "from dlhelpers.memory import measure_peak\n"
        "from dlhelpers.profiling import profile_torch\n"
        "before = torch.zeros(1000)",
        "def step():\n    global before\n    before = None  # freed, though never seen being made\n"
        "    return torch.ones(3) + 1\n"
        "_ = measure_peak(step), profile_torch(step)",
        "import time\nos.write(2, b'hello\\n')\ntime.sleep(1)",
        "os.write(2, b'no end')\ntime.sleep(1)",
        "warnings.warn('mind the gap')",
        "print('the end')",
    )
    assert failure is None
    assert ended(int(streams.pop(2)["stdout"]))
    assert streams[:4] == [{}] * 4
    assert streams[4:6] == [{"stderr": "hello\n"}, {"stderr": "no end"}]
    assert "UserWarning: mind the gap" in streams[6]["stderr"]
    assert streams[7] == {"stdout": "the end\n"}


def test_a_kernel_that_crashes_tells_the_terminal_where(tmp_path):
    streams, failure = run(
        tmp_path / "terminal",
        INSTALL,
        PID,
        "import faulthandler\nfaulthandler.enable()\ndef crash_here():\n    os.abort()",
        "crash_here()",
    )
    assert streams[0] == {"stdout": "True\n"}
    assert failure is not None
    assert ended(int(streams[1]["stdout"]))
    seen = (tmp_path / "terminal").read_text()
    assert "Fatal Python error: Aborted" in seen
    assert "in crash_here" in seen


def test_it_outlives_an_interrupt_and_the_kernel_outlives_it(tmp_path):
    streams, failure = run(
        tmp_path / "terminal",
        INSTALL,
        "import signal, time\n"
        "try:\n    os.killpg(os.getpgrp(), signal.SIGINT)\n    time.sleep(9)\n"
        "except KeyboardInterrupt:\n    pass",
        f"os.write(2, {USDT!r} + b'left\\n')\ntime.sleep(1)",
        PID,
        "child.kill()\nos.write(2, b'while it dies\\n')\ntime.sleep(1)",
        f"os.write(2, {USDT!r})\ntime.sleep(1)",
        "for _ in range(100):\n    os.write(2, bytes(10_000))\ntime.sleep(1)",
    )
    assert failure is None
    assert streams[2] == {"stderr": "left\n"}
    assert streams[4] == {"stderr": "while it dies\n"}
    assert streams[5] == {"stderr": USDT.decode()}
    assert "stderr" in streams[6]  # it did not block


def test_nobody_keeps_it_alive_when_the_kernel_is_gone(tmp_path):
    streams, failure = run(
        tmp_path / "terminal",
        INSTALL,
        PID,
        "import subprocess\nleft = subprocess.Popen(['sleep', '60'], start_new_session=True)\n"
        "print(left.pid)",
        "os.write(2, b'once\\n');",
    )
    psutil.Process(int(streams[2]["stdout"])).kill()
    assert failure is None
    assert ended(int(streams[1]["stdout"]))
    assert (tmp_path / "terminal").read_text().count("once") == 1  # it is no crash


class Kept:
    def __init__(self):
        self.text = b""

    def write(self, text):
        self.text += text


@pytest.mark.parametrize("known", [USDT, WARNING, ERROR])
def test_a_known_line_goes_wherever_it_is_cut(known):
    text = b"10 %\r" + known + b"20 %\n[W0102 my.cpp:3] mine\nERROR: CPUAllocator.cpp\n"
    for cut in range(12, len(text)):
        outlet = Kept()
        rest = stderr_filter._passed(text[:cut], outlet)
        rest = stderr_filter._passed(rest + text[cut:], outlet)
        assert outlet.text + rest == text.replace(known, b"")


def test_a_progress_bar_passes_at_once():
    for text in (b"\r 10 %", b"10 %\r", b"[3/4] ", "█▏".encode()):
        outlet = Kept()
        assert stderr_filter._passed(text, outlet) == b""
        assert outlet.text == text
