"""What is there to do while a commit writes? The next files are read, for the batch behind it.

LMDB lets go of Python's lock while it commits, and so does the system while it reads. Loading
goes on in a thread for just that time, so that code of the source never runs beside the rest of a
conversion, and never in more than one thread.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator

from dlhelpers.lmdb_io.loading import Item

__all__ = ["ReadAhead"]


class ReadAhead:
    """Chunks of items in their order; some are loaded between :meth:`start` and :meth:`stop`.

    What loading raises, there as elsewhere, is raised where its chunk is due.
    """

    def __init__(self, chunks: Iterator[list[Item]], most_bytes: int) -> None:
        """Take chunks; up to ``most_bytes`` are loaded ahead, 0 for none."""
        self._chunks, self._most_bytes = chunks, most_bytes
        self._ready: deque[list[Item]] = deque()
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._ends = threading.Event()

    def __iter__(self) -> Iterator[list[Item]]:
        return self

    def __next__(self) -> list[Item]:
        if self._ready:
            return self._ready.popleft()
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return next(self._chunks)

    def start(self) -> None:
        """Begin to load in a thread; nothing else may be asked for until it is stopped."""
        if self._most_bytes and self._error is None:
            self._ends.clear()
            self._thread = threading.Thread(target=self._load, daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End it behind the chunk that is being loaded."""
        self._ends.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _load(self) -> None:
        ahead = sum(len(item.image) for items in self._ready for item in items)
        try:
            while ahead < self._most_bytes and not self._ends.is_set():
                items = next(self._chunks)
                self._ready.append(items)
                ahead += sum(len(item.image) for item in items)
        except BaseException as error:  # the end is one, too
            self._error = error
