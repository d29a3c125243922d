"""When does a growing file reach the disk? While it grows, so that little is left at its end."""

from __future__ import annotations

import os
import threading
from pathlib import Path

__all__ = ["WriteBack"]


class WriteBack:
    """Brings a file to the disk from a thread of its own, while others write more of it.

    It has the file open from beginning to end, since the system tells an error of writing back
    once, to those who have the file open when it happens.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "r+b")  # noqa: SIM115
        self._thread: threading.Thread | None = None
        self._error: OSError | None = None

    def start(self) -> None:
        """Begin to bring what was written so far to the disk, unless that is under way.

        Raises:
            OSError: what was begun before has failed.
        """
        if self._thread is not None and self._thread.is_alive():
            return
        self._wait()
        self._thread = threading.Thread(target=self._sync, daemon=True)
        self._thread.start()

    def finish(self, size: int) -> None:
        """Bring all of the file to the disk, with ``size`` bytes at least.

        Raises:
            OSError: some of it could not be written.
        """
        self._wait()
        if os.fstat(self._file.fileno()).st_size < size:
            self._file.truncate(size)
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file, once nothing is under way."""
        if self._thread is not None:
            self._thread.join()
        self._file.close()

    def _wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _sync(self) -> None:
        try:
            getattr(os, "fdatasync", os.fsync)(self._file.fileno())
        except OSError as error:
            self._error = error
