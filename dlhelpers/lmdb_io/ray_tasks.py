"""What does a task of Ray do? It scans the source for all shards, or writes one of them."""

from __future__ import annotations

import _thread
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from dlhelpers.lmdb_io.merging import is_database
from dlhelpers.lmdb_io.scanning import write_listing
from dlhelpers.lmdb_io.writing import WriteReport, write_lmdb

__all__ = ["FIXED", "list_folder", "write_shard"]

FIXED = {"resume": True, "append": False, "progress": False}  # of write_lmdb
_PATIENCE_S = 120.0  # a worker that Ray gave up may hold its lock for a while, over NFS above all


def list_folder(source: Path, folder: Path) -> Path:
    """Scan an image folder once for all shards; a task, since the driver may not see it."""
    if not source.is_dir() or is_database(source):  # a listing already, or what write_lmdb refuses
        return source
    path = folder / "source.listing"
    folder.mkdir(parents=True, exist_ok=True)
    write_listing(source, path, progress=False)
    return path


def write_shard(
    source: Any, path: Path, shard: tuple[int, int], options: Mapping[str, Any], stop: Path
) -> WriteReport | None:
    """Write one shard, a task; None where the driver has stopped all of them."""
    until = time.monotonic() + _PATIENCE_S
    try:
        with _heeding(stop), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            while True:
                try:
                    report = write_lmdb(
                        source, path, shard=shard, shards=shard[1], **FIXED, **options
                    )
                    break
                except BlockingIOError:
                    if time.monotonic() > until:
                        raise
                    time.sleep(0.2)
    except KeyboardInterrupt:
        return None
    notes = [str(one.message) for one in caught if "starting afresh" in str(one.message)]
    return replace(report, notes=(*report.notes, *notes))


@contextmanager
def _heeding(stop: Path) -> Iterator[None]:
    """Interrupt the main thread, as Ctrl-C does, once a file appears."""
    is_done = threading.Event()

    def watch() -> None:
        while not stop.exists():
            if is_done.wait(0.5):
                return
        _thread.interrupt_main()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        is_done.set()
        watcher.join()
