"""One run of a conversion: the growing file, and how far the source was read.

The file grows as ``.NAME.part`` beside its target. Each commit holds the records, their index and
the state (how far the source was read, and a digest of it) in one transaction, so that a kill at
any moment leaves the last commit. At the end the file is synced and renamed over its target, which
readers see either as it was or whole.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from dlhelpers.lmdb_io import resuming, schema
from dlhelpers.lmdb_io.column_writer import ColumnWriter
from dlhelpers.lmdb_io.comparing import (
    content_of,
    mark_of,
    marked,
)
from dlhelpers.lmdb_io.encoding import Encoding, is_turned
from dlhelpers.lmdb_io.environments import lmdb_path
from dlhelpers.lmdb_io.identity import Trace
from dlhelpers.lmdb_io.loading import Item, Loader, load_chunks
from dlhelpers.lmdb_io.reading_ahead import ReadAhead
from dlhelpers.lmdb_io.sharing import Seen, Share
from dlhelpers.lmdb_io.sources import Source, SourceError
from dlhelpers.lmdb_io.writing_back import WriteBack
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
        seen: Seen | None = None,
    ) -> None:
        self.lock = lock
        self.source, self.target, self.workers = source, target, workers
        self.partial = target.with_name(f".{target.name}.part")
        self.loader = Loader(source, encoding)
        self.skips, self.shard = on_error == "skip", shard
        self.share = Share(source, shard, seen)
        self.marked = frozenset(marked(self.share.count or 0) if shard and source.place else ())
        self.reading = False  # whether an error comes from the source
        self.is_fresh = False  # whether the file was begun by this run
        self.pending_bytes = 0  # what the commit under way needs at most
        self.start_afresh()
        self.env: Any = None
        self.disk: WriteBack | None = None

    base = 0  # records of the database that is appended to
    skips_from = 0  # position of the first that is skipped

    def start_afresh(self) -> None:
        """Forget what was converted."""
        self.count = self.image_bytes = self.done = 0
        self.kept = self.resumed_from = 0  # records of the last commit, and of an earlier run
        self.skipped: list[tuple[str, str]] = []
        self.trace = Trace()
        self.columns = ColumnWriter()
        self.marks: dict[int, int] = {}  # position in a shard's part -> mark of what was there
        self.version = max(self.source.version, self.loader.encoding.version)  # of the schema

    def advice(self) -> str:
        """Return how to go on after a stop, the end of a message; empty if nothing is kept."""
        if (kept := self.kept - self.base) <= 0:
            return ""
        images = "1 image is" if kept == 1 else f"{kept} images are"
        return f"{images} kept: resume=True (--resume) goes on after them"

    # ---- the file ----

    def open(self, resume: bool, map_size: int) -> None:
        """Open the partial file, going on with an interrupted one where it fits."""
        if not resume or not resuming.take_up(self, map_size):
            self.remove_partial()
            self.is_fresh = True
            self.open_env(map_size)

    def open_env(self, map_size: int) -> None:
        """Open the partial file, or make it."""
        import lmdb

        # the commits' order is kept without a sync: a kill loses none, see resuming for a crash
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
        self.disk, self.unwritten_bytes = WriteBack(self.partial), 0
        self.map_size = self.env.info()["map_size"]
        names = (schema.RECORDS, schema.INDEX, schema.SKIPPED, schema.COLUMNS)
        self.records, self.index, self.skips_db, self.columns_db = map(self.env.open_db, names)

    def close(self) -> None:
        """Close the partial file; it stays."""
        if self.env is not None:
            self.env.close()
            self.env = None
        if self.disk is not None:
            self.disk.close()
            self.disk = None

    def remove_partial(self) -> None:
        """Remove the partial file, where there is one."""
        with suppress(FileNotFoundError):
            self.partial.unlink()

    def facts(self) -> dict[str, Any]:
        """Return what must not change before a conversion continues, as JSON gives it back."""
        facts = {
            "source": self.source.kind,
            "settings": self.loader.settings,
            "shard": self.shard,
            "classes": self.source.classes,
            "total": None if self.shard is None else self.source.count,
        }
        return json.loads(json.dumps(facts))

    def described(self, meta: dict[str, Any]) -> dict[str, Any]:
        """Return the meta entry of the finished file."""
        return meta

    # ---- the records ----

    def run(self, progress: bool | None) -> None:
        """Convert what is left of the source."""
        if not self.resumed_from and not self.done:
            self.tasks = self.share.tasks()
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
        can_go_on = self.source.in_thread and not self.workers
        chunks = load_chunks(self.loader, self.tasks, self.workers)
        self.ahead = ReadAhead(chunks, _COMMIT_BYTES if can_go_on else 0)
        for items in self.ahead:
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
            self.make_room(sum(len(item.image) + 8192 for item in batch))
            try:
                with self.env.begin(write=True) as txn:
                    for item in batch:
                        stop = self._put(txn, item)
                        if stop:
                            break
                    self.columns.put(txn, self.columns_db)
                    self._put_state(txn)
                    self.ahead.start()  # until the transaction, which ends here, is committed
                break
            except lmdb.MapFullError:
                self.count, self.done, self.image_bytes, skipped, trace = before
                self.trace, self.columns = replace(trace), columns.copy()
                del self.skipped[skipped:]
                self._grow(self.map_size)
            finally:
                self.ahead.stop()
        self.kept = self.count
        self.unwritten_bytes += self.pending_bytes
        if self.unwritten_bytes >= _COMMIT_BYTES:
            self.disk.start()
            self.unwritten_bytes = 0
        if stop:
            raise stop

    def make_room(self, need: int) -> None:
        """Let the map grow until the next commit fits, which stores so many bytes."""
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
                if item.name.isdecimal():
                    why += ", and a dataset's are item numbers: give (key, bytes, target) instead"
        if why and not self.skips:
            self.kept = self.count  # this commit's among them
            advice = f'on_error="skip" leaves it out. {self.advice()}'.strip()
            return SourceError(f"{one_line(item.name)}: {one_line(why)}; {advice}")
        if why:
            value = json.dumps([item.name, why]).encode()
            txn.put(schema.position_key(self.skips_from + self.done), value, db=self.skips_db)
            self.skipped.append((item.name, why))
        else:
            record = schema.pack_record(self.count, *item.parts)
            txn.put(schema.position_key(self.count), record, append=True, db=self.records)
            if is_turned(item.image):  # a sample of fields never looks like that
                self.version = max(self.version, schema.TURNED)
            self.columns.add(item.key, item.target)
            self.count += 1
            self.image_bytes += len(item.image)
        if self.done in self.marked:
            self.marks[self.done] = mark_of(item)
        self.done += 1
        self.trace.add(item.stamp, content_of(item, record))
        return None

    def _put_state(self, txn: Any) -> None:
        state = self.facts() | self.trace.as_dict()
        state |= {
            "format": schema.FORMAT,
            "version": self.version,
            "count": self.count,
            "image_bytes": self.image_bytes,
            "done": self.done,
            "marks": [*self.marks.items()],
            "boot": resuming.boot_id(),
        }
        txn.put(schema.STATE, schema.pack_meta(state))
