"""How does a kernel drop torch's known lines from stderr and still tell how it crashed?

A child process stands between file descriptor 2 and the kernel's own pipe. It outlives a crash,
and then gives the last text to the terminal, since nobody reads the kernel's pipe any more.
"""

from __future__ import annotations

import atexit
import itertools
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from functools import cache

__all__ = ["install"]

# lines that torch writes past Python's stderr whatever one does, by the place that they name
_KNOWN = re.compile(
    rb"(?:\[W[\d:. ]*|(?:USDT|ERROR):[\d: -]+)"
    rb"(?:CPUAllocator|SyncActivityProfilerHandler|DeviceProperties|qlinear_dynamic)\.cpp:\d+\]"
    rb"[^\n]*(?:\n|\Z)"
)
_BEGUN = re.compile(rb"(?:\[W|USDT:|ERROR:)[^\r\n]*\Z")
_PATIENCE_S = 0.02  # for the end of a line that may be a known one
_LOOK_S = 0.5  # between two looks whether the kernel lives
_CATCH_UP_S = 1.0  # that the end of a cell waits at most
_KERNEL_READS_S = 0.005  # that its thread has to read its pipe: nothing tells when it has
_RECENT = 1 << 16  # bytes that a kernel may have left unread when it died
_RECENT_S = 10.0  # a core dump takes its time
_LINGER_S = 2.0  # a dead kernel's own children may write that much longer


@cache
def install() -> bool:
    """Filter this kernel's file descriptor 2 from now on; a second call changes nothing.

    Returns:
        Whether it is filtered: only where the kernel watches the descriptor, which it does not on
        Windows nor under pytest.
    """
    try:
        terminal = sys.stderr.fileno()  # a kernel's stream names the descriptor it echoes to
    except (AttributeError, OSError, ValueError):
        return False
    if os.name == "nt" or terminal == 2 or "ipykernel" not in sys.modules:
        return False
    from IPython import get_ipython

    try:
        made = _Filter(terminal)
    except OSError:  # no process or descriptor left: then nothing is filtered
        return False
    get_ipython().events.register("post_execute", made.catch_up)
    atexit.register(made.end, os.getpid())
    return True


class _Filter:
    """The kernel's side: the child process, and descriptor 2 as long as it leads there."""

    def __init__(self, terminal: int) -> None:
        self._straight = os.dup(2)
        self._ask, answer = socket.socketpair()
        self._ask.settimeout(_CATCH_UP_S)
        self._tokens = itertools.cycle(range(1, 256))
        self._reading, writing = os.pipe()
        with answer:
            self._child = subprocess.Popen(
                [sys.executable, "-I", "-S", __file__, str(os.getpid()), str(answer.fileno())],
                stdin=self._reading,
                stdout=self._straight,
                stderr=terminal,
                pass_fds=[answer.fileno()],
                start_new_session=True,  # an interrupt or a shutdown signals the kernel's group
            )
        os.dup2(writing, 2)
        os.close(writing)
        self._pipe = os.fstat(2)
        threading.Thread(target=self._bypass, name="stderr filter", daemon=True).start()

    def catch_up(self) -> None:
        """Wait until the child has passed on what was written: it belongs to the cell that ends."""
        token = bytes([next(self._tokens)])
        with suppress(OSError):
            self._ask.sendall(token)
            while self._ask.recv(1) not in (token, b""):  # else the answer to an earlier one
                pass
            time.sleep(_KERNEL_READS_S)

    def end(self, kernel: int) -> None:
        """Tell the child that this is no crash."""
        if os.getpid() == kernel:  # not in a fork
            with suppress(OSError):
                self._ask.sendall(b"\0")
            self._restore()

    def _bypass(self) -> None:
        """Do without the child once it has ended: writing must neither fail nor block."""
        self._child.wait()
        self._restore()
        os.set_blocking(self._reading, False)
        with suppress(OSError):  # no more there, though another process may write there still
            while left := os.read(self._reading, 1 << 16):
                os.write(self._straight, left)
        os.close(self._reading)

    def _restore(self) -> None:
        if os.path.samestat(os.fstat(2), self._pipe):  # else somebody has put another one there
            os.dup2(self._straight, 2)


class _Outlet:
    """The child's side: the kernel's pipe while the kernel lives, then the terminal."""

    def __init__(self, kernel: int) -> None:
        self._kernel = kernel
        self._recent: list[tuple[float, bytes]] = []
        self.ended = False  # in good order

    @property
    def alive(self) -> bool:
        return os.getppid() == self._kernel

    def write(self, text: bytes) -> None:
        now = time.monotonic()
        self._recent = [(at, part) for at, part in self._recent if now - at < _RECENT_S]
        self._recent.append((now, text))
        while sum(len(part) for _, part in self._recent[1:]) > _RECENT:
            del self._recent[0]
        if self.alive:
            with suppress(BrokenPipeError):  # it died meanwhile
                _write(1, text)

    def close(self) -> None:
        """Repeat on the terminal what a crashed kernel may not have read."""
        until = time.monotonic() + _LINGER_S
        while not self.ended and self.alive and time.monotonic() < until:
            time.sleep(0.01)  # its descriptors are closed before its children are told
        if not self.ended and not self.alive:
            now = time.monotonic()
            _write(2, b"".join(part for at, part in self._recent if now - at < _RECENT_S))


def _write(descriptor: int, text: bytes) -> None:
    while text:
        text = text[os.write(descriptor, text) :]


def _filter(kernel: int, answer: socket.socket) -> None:
    """Pass on what comes on stdin, all but known lines, until the kernel is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    outlet, rest, asked = _Outlet(kernel), b"", b""
    watched, until = [0, answer], float("inf")
    while time.monotonic() < until:
        wait = 0.0 if asked else _PATIENCE_S if rest else _LOOK_S
        ready = select.select(watched, [], [], wait)[0]
        if answer in ready:
            with suppress(OSError):
                asked = answer.recv(1)
            outlet.ended |= asked == b"\0"
            if asked in (b"", b"\0"):
                watched.remove(answer)
                asked = b""
        if 0 in ready:
            if not (chunk := os.read(0, 1 << 16)):
                break
            rest = _passed(rest + chunk, outlet)
        elif not ready:
            if rest and not _KNOWN.search(rest):
                outlet.write(rest)
                rest = b""
            if asked:  # all that was written before has been passed on
                with suppress(OSError):
                    answer.sendall(asked)
                asked = b""
            elif not outlet.alive:
                break
        if until == float("inf") and not outlet.alive:
            until = time.monotonic() + _LINGER_S
    outlet.write(_KNOWN.sub(b"", rest))
    outlet.close()


def _passed(text: bytes, outlet: _Outlet) -> bytes:
    """Write what can be judged by now and return the rest, a line that may become a known one."""
    begun = _BEGUN.search(text)
    cut = begun.start() if begun and len(text) - begun.start() < 1 << 12 else len(text)
    if kept := _KNOWN.sub(b"", text[:cut]):
        outlet.write(kept)
    return text[cut:]


if __name__ == "__main__":
    _filter(int(sys.argv[1]), socket.socket(fileno=int(sys.argv[2])))
