"""One run of a conversion: the growing file, and how far the source was read.

The file grows as ``.NAME.part`` beside its target. Each commit holds the records, their index and
the state (how far the source was read, and a digest of it) in one transaction, so that a kill at
any moment leaves the last commit. At the end the file is synced and renamed over its target, which
readers see either as it was or whole.
"""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from dlhelpers.lmdb_io import schema
from dlhelpers.lmdb_io.column_writer import ColumnWriter
from dlhelpers.lmdb_io.comparing import (
    Neighbours,
    content_of,
    gives_the_same,
    is_same_part,
    mark_of,
    marked,
)
from dlhelpers.lmdb_io.encoding import Encoding, is_turned
from dlhelpers.lmdb_io.environments import lmdb_path
from dlhelpers.lmdb_io.identity import Trace
from dlhelpers.lmdb_io.loading import Item, Loader, load_chunks
from dlhelpers.lmdb_io.locking import in_turn
from dlhelpers.lmdb_io.sharing import Share
from dlhelpers.lmdb_io.sources import Source, SourceError
from dlhelpers.printable import one_line, printable
from dlhelpers.progress import bar

__all__ = ["Conversion"]

_COMMIT_BYTES = 16 << 20  # a commit holds so much at most, or what came in a second
_COMMIT_S = 1.0
_SMALLEST_MAP = 1 << 18  # LMDB needs some pages of its own before the first record


class Conversion:
    """One run of write_lmdb: the growing file and how far the source was read."""

    def __init__(
        self,
        source: Source,
        target: Path,
        encoding: Encoding,
        workers: int,
        on_error: str,
        shard: tuple[int, int] | None,
        lock: bool,
    ) -> None:
        self.lock = lock
        self.source, self.target, self.workers = source, target, workers
        self.partial = target.with_name(f".{target.name}.part")
        self.loader = Loader(source, encoding)
        self.skips, self.shard = on_error == "skip", shard
        self.share = Share(source, shard)
        self.marked = frozenset(marked(self.share.count or 0) if shard and source.place else ())
        self.reading = False  # whether an error comes from the source
        self.is_fresh = False  # whether the file was begun by this run
        self.pending_bytes = 0  # what the commit under way needs at most
        self._start_afresh()
        self.env: Any = None

    def _start_afresh(self) -> None:
        self.count = self.image_bytes = self.done = 0
        self.kept = self.resumed_from = 0  # records of the last commit, and of an earlier run
        self.skipped: list[tuple[str, str]] = []
        self.trace = Trace()
        self.columns = ColumnWriter()
        self.marks: dict[int, int] = {}  # position in a shard's part -> mark of what was there
        self.version = schema.VERSION  # of the schema

    def advice(self) -> str:
        """Return how to go on after a stop, the end of a message; empty if nothing is kept."""
        if not self.kept:
            return ""
        images = "1 image is" if self.kept == 1 else f"{self.kept} images are"
        return f"{images} kept: resume=True (--resume) goes on after them"

    # ---- the file ----

    def open(self, resume: bool, map_size: int) -> None:
        """Open the partial file, going on with an interrupted one where it fits."""
        if not resume or not self._take_up(map_size):
            self._remove_partial()
            self.is_fresh = True
            self._open_env(map_size)

    def _open_env(self, map_size: int) -> None:
        import lmdb

        # the commits' order is kept without a sync: a kill loses none, see _take_up for a crash
        self.env = lmdb.open(
            lmdb_path(self.partial),
            subdir=False,
            lock=False,
            sync=False,
            metasync=False,
            readahead=False,
            meminit=False,
            map_size=max(map_size, _SMALLEST_MAP),
            max_dbs=4,
            mode=0o644,
        )
        self.map_size = self.env.info()["map_size"]
        names = (schema.RECORDS, schema.INDEX, schema.SKIPPED, schema.COLUMNS)
        self.records, self.index, self.skips_db, self.columns_db = map(self.env.open_db, names)

    def close(self) -> None:
        """Close the partial file; it stays."""
        if self.env is not None:
            self.env.close()
            self.env = None

    def _remove_partial(self) -> None:
        with suppress(FileNotFoundError):
            self.partial.unlink()

    def _take_up(self, map_size: int) -> bool:
        """Go on behind the last commit of an interrupted conversion; False where it differs."""
        if not self.partial.exists():
            return False
        why = self._read_state(map_size) or self._differs()
        if not why:
            return True
        self.close()
        self._start_afresh()
        warnings.warn(
            printable(
                f"{self.target.name}: cannot go on with the interrupted conversion, {why}: "
                "starting afresh"
            ),
            stacklevel=4,
        )
        if not self.source.restarts:
            self._remove_partial()
            raise SourceError(
                f"the source is an iterator that gives its items only once, and {why}: call "
                "write_lmdb again with a new iterator"
            )
        return False

    def _read_state(self, map_size: int) -> str:
        """Open the partial file and read its state; return why that cannot be done."""
        from dlhelpers.lmdb_io.verifying import find_problems, peek_state

        state = peek_state(self.partial)
        if isinstance(state, str):
            return state
        facts = self._facts()
        for name in facts:
            if state[name] != facts[name]:
                return f"its {name} were {state[name]!r}, now they are {facts[name]!r}"
        try:
            trace = Trace.from_dict(state)
        except KeyError:
            return "it was begun by an earlier version of dlhelpers"
        if not state["boot"] or state["boot"] != _boot_id():
            # the machine went down: what was written last may never have reached the disk
            problems = find_problems(self.partial)
            if problems:
                return f"the file was damaged when the machine went down ({problems[0]})"
        self._open_env(map_size)
        self.count, self.done = state["count"], state["done"]
        self.image_bytes, self.trace = state["image_bytes"], trace
        self.version, self.marks = state["version"], dict(state.get("marks", ()))
        self.resumed_from = self.kept = self.count
        with self.env.begin(db=self.skips_db) as txn:
            # those behind it are the source's own problems, listed at the end
            end = schema.position_key(self.done)
            self.skipped = [tuple(json.loads(v)) for key, v in txn.cursor() if key < end]
        with self.env.begin(write=True) as txn:
            try:
                self.columns.take_up(txn, self.columns_db, self.records, self.count)
            except schema.DatabaseError as error:
                return f"the file is damaged ({error})"
        return ""

    def _differs(self) -> str:
        """Compare the part of the source that is done with what it was; return what differs."""
        trace, done = Trace(), []
        self._tasks = self.share.tasks()
        for number in range(self.done):
            task = next(self._tasks, None)
            if task is None:
                return f"the source has only {number} of {self.done} items left"
            trace.add(self.source.stamp(task))
            if self.source.place or self.source.hides:
                done.append(task)
        if trace.items != self.trace.items:
            return "the source has changed"
        contents = self.trace.contents.hex()
        if self.source.place:
            if not is_same_part(self.loader, done, self.trace.times, contents, self.workers):
                return "the source has changed"
            self.trace.times = trace.times
        if self.source.hides:  # only loading can tell
            with self.env.begin() as txn:
                databases = {"records": self.records, "index": self.index, "skipped": self.skips_db}
                read = {name: partial(txn.get, db=db) for name, db in databases.items()}
                if not gives_the_same(self.loader, done, read, self.workers):
                    return "the dataset gives other images now"
        return ""

    def _facts(self) -> dict[str, Any]:
        """Return what must not change before a conversion goes on, as JSON gives it back."""
        facts = {
            "source": self.source.kind,
            "settings": self.loader.encoding.as_dict(),
            "shard": self.shard,
            "classes": self.source.classes,
            "total": None if self.shard is None else self.source.count,
        }
        return json.loads(json.dumps(facts))

    # ---- the records ----

    def run(self, progress: bool | None) -> None:
        """Convert what is left of the source."""
        if not self.resumed_from and not self.done:
            self._tasks = self.share.tasks()
        self.share.look(self.workers)
        total = self.share.count
        batch: list[Item] = []
        size, since = 0, time.monotonic()
        with bar(
            progress=progress,
            total=total,
            initial=self.done,
            desc=printable(self.target.name),
            unit="img",
        ) as shown:
            begin, begin_bytes = time.monotonic(), self.image_bytes
            for items in self._loaded():
                batch += items
                size += sum(len(item.image) for item in items)
                now = time.monotonic()
                if size >= _COMMIT_BYTES or now - since >= _COMMIT_S:
                    self._commit(batch)
                    speed = (self.image_bytes - begin_bytes) / 1e6 / max(now - begin, 1e-9)
                    shown.set_postfix_str(f"{speed:.1f} MB/s", refresh=False)
                    shown.update(len(batch))
                    batch, size, since = [], 0, now
            self._commit(batch)
            shown.update(len(batch))

    def _loaded(self) -> Iterator[list[Item]]:
        """Yield what is left of the source, and note when its own code is at work."""
        self.reading = True
        for items in load_chunks(self.loader, self._tasks, self.workers):
            self.reading = False
            yield items
            self.reading = True
        self.reading = False

    def _commit(self, batch: list[Item]) -> None:
        """Store a batch and the state in one transaction; the map grows until it fits."""
        import lmdb

        before = (self.count, self.done, self.image_bytes, len(self.skipped), replace(self.trace))
        columns = self.columns.copy()
        stop: SourceError | None = None
        while True:
            self._make_room(sum(len(item.image) + 8192 for item in batch))
            try:
                with self.env.begin(write=True) as txn:
                    for item in batch:
                        stop = self._put(txn, item)
                        if stop:
                            break
                    self.columns.put(txn, self.columns_db)
                    self._put_state(txn)
                break
            except lmdb.MapFullError:
                self.count, self.done, self.image_bytes, skipped, trace = before
                self.trace, self.columns = replace(trace), columns.copy()
                del self.skipped[skipped:]
                self._grow(self.map_size)
        self.kept = self.count
        if stop:
            raise stop

    def _make_room(self, need: int) -> None:
        self.pending_bytes = need
        used = (self.env.info()["last_pgno"] + 1) * self.env.stat()["psize"]
        if used + 2 * need + (1 << 20) > self.map_size:
            self._grow(used + 2 * need)

    def _grow(self, need: int) -> None:
        self.map_size = max(2 * self.map_size, 2 * need)
        self.env.set_mapsize(self.map_size)

    def _put(self, txn: Any, item: Item) -> SourceError | None:
        """Store one item, or note why not; return the error to stop with."""
        why, record = item.why, b""
        if not why:
            key = schema.index_key(item.key)
            entry = schema.index_entry(self.count, item.key, item.target)
            if not txn.put(key, entry, overwrite=False, db=self.index):
                first = json.loads(txn.get(key, db=self.index))[0]
                why = f"its key {item.name!r} is taken by record {first}: keys must be unique"
        if why and not self.skips:
            self.kept = self.count  # this commit's among them
            advice = f'on_error="skip" leaves it out. {self.advice()}'.strip()
            return SourceError(f"{one_line(item.name)}: {one_line(why)}; {advice}")
        if why:
            value = json.dumps([item.name, why]).encode()
            txn.put(schema.position_key(self.done), value, db=self.skips_db)
            self.skipped.append((item.name, why))
        else:
            record = schema.pack_record(self.count, *item.parts)
            txn.put(schema.position_key(self.count), record, append=True, db=self.records)
            if is_turned(item.image):
                self.version = schema.TURNED
            self.columns.add(item.key, item.target)
            self.count += 1
            self.image_bytes += len(item.image)
        if self.done in self.marked:
            self.marks[self.done] = mark_of(item)
        self.done += 1
        self.trace.add(item.stamp, content_of(item, record))
        return None

    def _put_state(self, txn: Any) -> None:
        state = self._facts() | self.trace.as_dict()
        state |= {
            "format": schema.FORMAT,
            "version": self.version,
            "count": self.count,
            "image_bytes": self.image_bytes,
            "done": self.done,
            "marks": [*self.marks.items()],
            "boot": _boot_id(),
        }
        txn.put(schema.STATE, schema.pack_meta(state))

    # ---- the end ----

    def finish(self) -> None:
        """Write the meta entry, bring all of it to the disk, and rename."""
        import lmdb

        from dlhelpers import __version__

        expected = self.share.count
        if expected is not None and self.done != expected:
            raise SourceError(
                f"the source said that it has {expected} items and gave {self.done}: nothing was "
                "replaced"
            )
        if not self.share.was_listed_as(self.trace):
            self.trace.times = self.share.look_again(self.loader, self.trace, self.workers)
        if not self.count and self.shard is None:
            reasons = ": ".join(["", *map(one_line, self.skipped[0])]) if self.skipped else ""
            raise SourceError(f"the source holds no image that could be stored{reasons}")
        meta = self._facts() | {
            "format": schema.FORMAT,
            "version": self.version,
            "count": self.count,
            "image_bytes": self.image_bytes,
            "skipped": len(self.skipped) + len(self.source.problems),
            "digest": self.trace.items.hex(),
            "contents": self.trace.contents.hex(),
            "columns": self.columns.finish(self.env, self.columns_db, self._make_room),
            "library": f"dlhelpers {__version__}, lmdb {lmdb.__version__}",
        }
        if self.shard is None:
            self._publish(meta)
            return
        meta |= {"times": self.trace.times, "identity": self.share.identity()}
        meta["marks"] = self.share.timed(self.marks)
        neighbours = Neighbours(self.target, self.shard, self.loader, self.workers)
        neighbours.equal_versions(meta)  # what takes long is done before it is this rank's turn
        self.env.sync(True)
        with in_turn(self.target.parent, self.lock):
            meta["identity"]["equal"] = neighbours.equal_versions(meta)
            self._publish(meta)

    def _publish(self, meta: dict[str, Any]) -> None:
        with self.env.begin(write=True) as txn:
            for number, problem in enumerate(self.source.problems):
                key = schema.position_key(self.done + number)
                txn.put(key, json.dumps(problem).encode(), db=self.skips_db)
            # the state stays: a kill before the file is renamed costs nothing then
            txn.put(schema.META, schema.pack_meta(meta))
        size = (self.env.info()["last_pgno"] + 1) * self.env.stat()["psize"]
        self.close()
        with open(self.partial, "r+b") as file:
            if os.fstat(file.fileno()).st_size < size:
                file.truncate(size)  # pages freed at the end are never written
            os.fsync(file.fileno())
        os.replace(self.partial, self.target)
        _sync_folder(self.target.parent)


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows has no such call
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
