"""Convert a source into one LMDB file that appears whole or not at all.

The file grows as ``.NAME.part`` beside its target. Each commit holds the records, their index and
the state (how far the source was read, and a digest of it) in one transaction, so that a kill at
any moment leaves the last commit. At the end the file is synced and renamed over its target, which
readers see either as it was or whole.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from dlhelpers.lmdb_io import schema
from dlhelpers.lmdb_io.encoding import Encoding
from dlhelpers.lmdb_io.environments import open_environment
from dlhelpers.lmdb_io.sources import Source, SourceError, open_source

__all__ = ["WriteReport", "write_lmdb"]

_COMMIT_BYTES = 16 << 20  # a commit holds so much at most, or what came in a second
_COMMIT_S = 1.0
_CHUNK = 16  # images that a worker gets at a time
_FIRST_MAP = 1 << 28


@dataclass(frozen=True, repr=False)
class WriteReport:
    """What a conversion did.

    Attributes:
        path: the database.
        count: records in it.
        image_bytes: what their images take.
        skipped: (what, why) of all that was left out.
        ignored: files of the source folder that are no images by their name.
        resumed_from: records that an earlier, interrupted conversion had stored.
        seconds: that this conversion took.
    """

    path: Path
    count: int
    image_bytes: int
    skipped: tuple[tuple[str, str], ...]
    ignored: tuple[str, ...]
    resumed_from: int
    seconds: float

    def __str__(self) -> str:
        speed = (self.count - self.resumed_from) / max(self.seconds, 1e-9)
        lines = [
            f"{self.count} images, {self.image_bytes / 1e6:.1f} MB, in {self.path} "
            f"({self.seconds:.1f} s, {speed:.0f} images/s)"
        ]
        if self.resumed_from:
            lines.append(f"the first {self.resumed_from} were there from an interrupted conversion")
        if self.ignored:
            lines.append(f"{len(self.ignored)} files are no images by name: {_some(self.ignored)}")
        if self.skipped:
            lines.append(f"{len(self.skipped)} skipped:")
            lines += [f"  {what}: {why}" for what, why in self.skipped[:20]]
            lines += [f"  and {len(self.skipped) - 20} more"] * (len(self.skipped) > 20)
        return "\n".join(lines)

    __repr__ = __str__


def write_lmdb(
    source: Any,
    path: str | os.PathLike[str],
    *,
    workers: int = 0,
    encode: Literal["jpeg", "png", "webp", "raw"] | None = None,
    resize: int | tuple[int, int] | None = None,
    quality: int | None = None,
    map_size: int | None = None,
    resume: bool = False,
    on_error: Literal["raise", "skip"] = "raise",
    shard: tuple[int, int] | None = None,
    progress: bool = True,
) -> WriteReport:
    """Convert images into one LMDB file for :class:`LMDBDataset`.

    Args:
        source: an image folder (one folder for each class, the order of torchvision's
            ImageFolder), a map-style dataset of (image or bytes, target), or an iterable of
            (key, bytes, target). Targets are ints, or what JSON can hold.
        path: the file; appears whole, or not at all. An older database there stays in use until
            then, and stays for good if this conversion fails.
        workers: processes that read, resize and encode; 0 does it here. Pays where images are
            resized or encoded.
        encode: stores this format; None keeps encoded bytes as they are, and the format of what
            is resized. Pixels that come without one are stored as PNG, without loss.
        resize: the shorter side in pixels, as torchvision's Resize does it, or (height, width).
            An image of that size already is kept as it is.
        quality: of JPEG and WebP, 90 where None.
        map_size: bytes of the first memory map; it grows by itself all the same.
        resume: goes on behind an interrupted conversion of the same source and settings; where
            they differ it starts afresh and warns.
        on_error: ``raise`` stops at the first image that cannot be stored, what was converted
            stays for ``resume``; ``skip`` leaves it out and lists it.
        shard: (rank, world) writes this rank's part into the folder ``path``, which
            LMDBDataset opens as one. Parts are contiguous; of an iterable without length, rank
            takes each world-th item.
        progress: shows a bar with images/s and MB/s.

    Returns:
        A WriteReport that lists what was skipped.

    Raises:
        SourceError: an image, key or class of the source cannot be stored; names it.
        FileExistsError: path holds something that write_lmdb has not written.
        OSError: the disk is full or not writable; what was converted stays for ``resume``.
        BlockingIOError: another process is converting into this path.
        ValueError, TypeError: an argument is out of range.

    >>> import tempfile
    >>> from dlhelpers import data
    >>> folder = tempfile.mkdtemp()
    >>> photos = data.photos(f"{folder}/photos", count=8, size=64, progress=False)
    >>> write_lmdb(photos, f"{folder}/photos.lmdb", progress=False).count
    8
    """
    start = time.perf_counter()
    _validate(workers, map_size, on_error, shard)
    encoding = Encoding(encode, resize, quality)
    opened = open_source(source)
    if opened.problems and on_error == "raise":
        what, why = opened.problems[0]
        raise SourceError(f'{what}: {why}; on_error="skip" keeps the class and goes on')
    target = _target(Path(path).expanduser(), shard)
    target.parent.mkdir(parents=True, exist_ok=True)
    _refuse_foreign(target)
    conversion = _Conversion(opened, target, encoding, workers, on_error, shard)
    with _only_writer(target), _translated_errors(conversion):
        conversion.open(resume, map_size or _FIRST_MAP)
        try:
            conversion.run(progress)
            conversion.finish()
        finally:
            conversion.close()
    return WriteReport(
        target,
        conversion.count,
        conversion.image_bytes,
        (*opened.problems, *conversion.skipped),
        opened.ignored,
        conversion.resumed_from,
        time.perf_counter() - start,
    )


class _Item:
    """One task's result: what to store, or why it cannot be."""

    __slots__ = ("identity", "image", "key", "name", "target", "why")

    def __init__(self, name: str, identity: bytes, why: str = "") -> None:
        self.name, self.identity, self.why = name, identity, why
        self.key = self.target = self.image = b""


class _Loader:
    """Loads and encodes tasks; what DataLoader's workers call."""

    def __init__(self, source: Source, encoding: Encoding) -> None:
        self.source, self.encoding = source, encoding

    def __getitems__(self, tasks: list[Any]) -> list[_Item]:
        return [self._item(task) for task in tasks]

    def __getitem__(self, task: Any) -> _Item:  # DataLoader asks that it exists
        return self._item(task)

    def _item(self, task: Any) -> _Item:
        source = self.source
        try:
            key, target, image, identity = source.load(task)
            item = _Item(key, identity)
            item.key = schema.encode_key(key)
            item.target = schema.encode_target(target)
            item.image = self.encoding.apply(image)
        except (ValueError, OSError, IndexError, KeyError, TypeError) as error:
            identity = source.identity(task) or b"unreadable"
            return _Item(source.name(task), identity, f"{error}" or type(error).__name__)
        return item


class _Conversion:
    """One run of write_lmdb: the growing file and how far the source was read."""

    def __init__(
        self,
        source: Source,
        target: Path,
        encoding: Encoding,
        workers: int,
        on_error: str,
        shard: tuple[int, int] | None,
    ) -> None:
        self.source, self.target, self.workers = source, target, workers
        self.partial = target.with_name(f".{target.name}.part")
        self.loader = _Loader(source, encoding)
        self.skips, self.shard = on_error == "skip", shard
        self.count = self.image_bytes = self.done = self.resumed_from = 0
        self.skipped: list[tuple[str, str]] = []
        self.digest = b""
        self.env: Any = None

    # ---- the file ----

    def open(self, resume: bool, map_size: int) -> None:
        """Open the partial file, going on with an interrupted one where it fits."""
        if not resume or not self._take_up(map_size):
            self._remove_partial()
            self._open_env(map_size)

    def _open_env(self, map_size: int) -> None:
        import lmdb

        # the commits' order is kept without a sync: a kill loses none, see _take_up for a crash
        self.env = lmdb.open(
            str(self.partial),
            subdir=False,
            lock=False,
            sync=False,
            metasync=False,
            readahead=False,
            meminit=False,
            map_size=map_size,
            max_dbs=3,
        )
        self.map_size = max(map_size, self.env.info()["map_size"])
        self.records, self.index, self.skips_db = (
            self.env.open_db(name) for name in (schema.RECORDS, schema.INDEX, schema.SKIPPED)
        )

    def close(self) -> None:
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
        self.count = self.image_bytes = self.done = self.resumed_from = 0
        self.digest, self.skipped = b"", []
        warnings.warn(
            f"{self.target.name}: cannot go on with the interrupted conversion, {why}: "
            "starting afresh",
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
        from dlhelpers.lmdb_io.verifying import find_problems

        try:
            state = _peek(self.partial, schema.STATE, whole=False)
        except (schema.DatabaseError, OSError) as error:
            return str(error)
        if state is None:
            return "nothing was stored yet"
        facts = self._facts()
        for name in facts:
            if state[name] != facts[name]:
                return f"its {name} were {state[name]!r}, now they are {facts[name]!r}"
        if not state["boot"] or state["boot"] != _boot_id():
            # the machine went down: what was written last may never have reached the disk
            problems = find_problems(self.partial)
            if problems:
                return f"the file was damaged when the machine went down ({problems[0]})"
        self._open_env(map_size)
        self.count, self.done = state["count"], state["done"]
        self.image_bytes, self.digest = state["image_bytes"], bytes.fromhex(state["digest"])
        self.resumed_from = self.count
        with self.env.begin(db=self.skips_db) as txn:
            self.skipped = [tuple(json.loads(value)) for _, value in txn.cursor()]
        return ""

    def _differs(self) -> str:
        """Compare the part of the source that is done with what it was; return what differs."""
        digest, last = b"", None
        self._tasks = self._own_tasks()
        for number in range(self.done):
            task = next(self._tasks, None)
            if task is None:
                return f"the source has only {number} of {self.done} items left"
            identity = self.source.identity(task)
            digest = _chain(digest, identity or b"%d" % number)
            last = task if identity is None else None
        if digest != self.digest:
            return "the source has changed"
        if last is not None and self.count:  # a dataset: only loading can tell
            item = self.loader[last]
            with self.env.begin(db=self.records, buffers=True) as txn:
                view = txn.get(schema.position_key(self.count - 1))
                same = not item.why and bytes(view) == schema.pack_record(
                    self.count - 1, item.key, item.target, item.image
                )
            if not same and not (item.why and self.skipped):
                return "the dataset gives other images now"
        return ""

    def _facts(self) -> dict[str, Any]:
        return {
            "source": self.source.kind,
            "settings": self.loader.encoding.as_dict(),
            "shard": None if self.shard is None else list(self.shard),
            "classes": self.source.classes,
        }

    # ---- the records ----

    def run(self, progress: bool) -> None:
        """Convert what is left of the source."""
        from tqdm.auto import tqdm

        if not self.resumed_from and not self.done:
            self._tasks = self._own_tasks()
        total = self._own_count()
        batch: list[_Item] = []
        size, since = 0, time.monotonic()
        with tqdm(
            total=total,
            initial=self.done,
            desc=self.target.name,
            unit="img",
            disable=None if progress else True,
        ) as bar:
            begin, begin_bytes = time.monotonic(), self.image_bytes
            for items in self._loaded():
                batch += items
                size += sum(len(item.image) for item in items)
                now = time.monotonic()
                if size >= _COMMIT_BYTES or now - since >= _COMMIT_S:
                    self._commit(batch)
                    speed = (self.image_bytes - begin_bytes) / 1e6 / max(now - begin, 1e-9)
                    bar.set_postfix_str(f"{speed:.1f} MB/s", refresh=False)
                    bar.update(len(batch))
                    batch, size, since = [], 0, now
            self._commit(batch)
            bar.update(len(batch))

    def _own_tasks(self) -> Iterator[Any]:
        """The tasks of this shard, in order."""
        tasks = self.source.tasks()
        if self.shard is None:
            return tasks
        from itertools import islice

        rank, world = self.shard
        if self.source.count is None:
            return islice(tasks, rank, None, world)
        return islice(tasks, *_part(self.source.count, rank, world))

    def _own_count(self) -> int | None:
        if self.source.count is None or self.shard is None:
            return self.source.count
        first, last = _part(self.source.count, *self.shard)
        return last - first

    def _loaded(self) -> Iterator[list[_Item]]:
        chunks = _chunks(self._tasks, _CHUNK)
        if not self.workers:
            return map(self.loader.__getitems__, chunks)
        from torch.utils.data import DataLoader

        return iter(
            DataLoader(
                self.loader,
                batch_sampler=chunks,
                num_workers=self.workers,
                collate_fn=_unchanged,
                prefetch_factor=4,
            )
        )

    def _commit(self, batch: list[_Item]) -> None:
        """Store a batch and the state in one transaction; the map grows until it fits."""
        import lmdb

        before = (self.count, self.done, self.image_bytes, self.digest, len(self.skipped))
        stop: SourceError | None = None
        while True:
            need = sum(len(item.image) + 8192 for item in batch)
            used = (self.env.info()["last_pgno"] + 1) * self.env.stat()["psize"]
            if used + 2 * need + (1 << 20) > self.map_size:
                self._grow(used + 2 * need)
            try:
                with self.env.begin(write=True) as txn:
                    for item in batch:
                        stop = self._put(txn, item)
                        if stop:
                            break
                    self._put_state(txn)
                break
            except lmdb.MapFullError:
                self.count, self.done, self.image_bytes, self.digest, skipped = before
                del self.skipped[skipped:]
                self._grow(self.map_size)
        if stop:
            raise stop

    def _grow(self, need: int) -> None:
        self.map_size = max(2 * self.map_size, 2 * need)
        self.env.set_mapsize(self.map_size)

    def _put(self, txn: Any, item: _Item) -> SourceError | None:
        """Store one item, or note why not; return the error to stop with."""
        why = item.why
        if not why:
            key = schema.index_key(item.key)
            entry = schema.index_entry(self.count, item.key, item.target)
            if not txn.put(key, entry, overwrite=False, db=self.index):
                first = json.loads(txn.get(key, db=self.index))[0]
                why = f"its key {item.name!r} is taken by record {first}: keys must be unique"
        if why and not self.skips:
            kept = f"{self.count} images before it are kept: resume=True goes on behind them"
            return SourceError(f'{item.name}: {why}; on_error="skip" leaves it out. {kept}')
        if why:
            value = json.dumps([item.name, why]).encode()
            txn.put(schema.position_key(self.done), value, db=self.skips_db)
            self.skipped.append((item.name, why))
        else:
            record = schema.pack_record(self.count, item.key, item.target, item.image)
            txn.put(schema.position_key(self.count), record, append=True, db=self.records)
            self.count += 1
            self.image_bytes += len(item.image)
        self.done += 1
        self.digest = _chain(self.digest, item.identity)
        return None

    def _put_state(self, txn: Any) -> None:
        state = self._facts() | {
            "format": schema.FORMAT,
            "version": schema.VERSION,
            "count": self.count,
            "image_bytes": self.image_bytes,
            "done": self.done,
            "digest": self.digest.hex(),
            "boot": _boot_id(),
        }
        txn.put(schema.STATE, schema.pack_meta(state))

    # ---- the end ----

    def finish(self) -> None:
        """Write the meta entry, bring all of it to the disk, and rename."""
        import lmdb

        from dlhelpers import __version__

        expected = self._own_count()
        if expected is not None and self.done != expected:
            raise SourceError(
                f"the source said that it has {expected} items and gave {self.done}: nothing was "
                "replaced"
            )
        if not self.count and self.shard is None:
            reasons = f": {self.skipped[0][0]}: {self.skipped[0][1]}" if self.skipped else ""
            raise SourceError(f"the source holds no image that could be stored{reasons}")
        meta = self._facts() | {
            "format": schema.FORMAT,
            "version": schema.VERSION,
            "count": self.count,
            "image_bytes": self.image_bytes,
            "skipped": len(self.skipped) + len(self.source.problems),
            "digest": self.digest.hex(),
            "library": f"dlhelpers {__version__}, lmdb {lmdb.__version__}",
        }
        with self.env.begin(write=True) as txn:
            for number, problem in enumerate(self.source.problems):
                key = schema.position_key(self.done + number)
                txn.put(key, json.dumps(problem).encode(), db=self.skips_db)
            txn.put(schema.META, schema.pack_meta(meta))
            txn.delete(schema.STATE)
        size = (self.env.info()["last_pgno"] + 1) * self.env.stat()["psize"]
        self.close()
        with open(self.partial, "r+b") as file:
            if os.fstat(file.fileno()).st_size < size:
                file.truncate(size)  # pages freed at the end are never written
            os.fsync(file.fileno())
        os.replace(self.partial, self.target)
        _sync_folder(self.target.parent)


def _chain(digest: bytes, identity: bytes) -> bytes:
    return hashlib.blake2b(digest + identity, digest_size=16).digest()


def _chunks(tasks: Iterator[Any], size: int) -> Iterator[list[Any]]:
    from itertools import islice

    while chunk := list(islice(tasks, size)):
        yield chunk


def _unchanged(items: list[_Item]) -> list[_Item]:
    return items


def _part(count: int, rank: int, world: int) -> tuple[int, int]:
    """Return first and last + 1 of a rank's contiguous part."""
    return count * rank // world, count * (rank + 1) // world


def _peek(path: Path, key: bytes, *, whole: bool = True) -> dict[str, Any] | None:
    """Return ``meta`` or ``state`` of a file, None where it has no such entry."""
    environment = open_environment(path, whole=whole)
    value = environment.get_entry(key)
    return None if value is None else schema.unpack_meta(value, path)


def _target(path: Path, shard: tuple[int, int] | None) -> Path:
    if shard is None:
        if path.is_dir():
            raise IsADirectoryError(
                f"{path} is a folder, expected the path of a file such as {path / 'images.lmdb'}"
            )
        return path
    if path.is_file():
        raise FileExistsError(f"{path} is a file, expected the folder of all shards")
    rank, world = shard
    others = {p.name.split("-of-")[-1] for p in path.glob("shard-*-of-*.lmdb")}
    if others - {f"{world:05d}.lmdb"}:
        raise FileExistsError(
            f"{path} holds shards of another world size ({', '.join(sorted(others))}): remove "
            "them or give another folder"
        )
    return path / f"shard-{rank:05d}-of-{world:05d}.lmdb"


def _refuse_foreign(target: Path) -> None:
    if not target.exists():
        return
    try:
        if _peek(target, schema.META) is None:
            raise schema.DatabaseError("it is an LMDB file of something else")
    except (schema.DatabaseError, OSError) as error:
        raise FileExistsError(
            f"{target} exists and is no whole database of write_lmdb ({error}): nothing was "
            "touched; remove it or give another path"
        ) from None


@contextmanager
def _only_writer(target: Path) -> Iterator[None]:
    """Hold the lock of a target; the system drops it with the process that held it."""
    from filelock import FileLock, Timeout

    lock = FileLock(target.with_name(f".{target.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BlockingIOError(
            errno.EAGAIN, f"another process is converting into {target}: wait for it or stop it"
        ) from None
    try:
        yield
    finally:
        with suppress(OSError):
            os.unlink(lock.lock_file)  # while it is held, so that nobody waits at a file that goes
        lock.release()


@contextmanager
def _translated_errors(conversion: _Conversion) -> Iterator[None]:
    import lmdb

    try:
        yield
    except KeyboardInterrupt as error:
        error.add_note(f"{conversion.count} images are kept: resume=True (--resume) goes on")
        raise
    except (lmdb.Error, OSError) as error:
        _raise_clearly(error, conversion)


def _raise_clearly(error: Exception, conversion: _Conversion) -> NoReturn:
    kept = f"{conversion.count} images are kept: resume=True goes on behind them"
    text, code = str(error), getattr(error, "errno", None)
    if code == errno.ENOSPC or os.strerror(errno.ENOSPC) in text:
        code, what = errno.ENOSPC, "the disk is full: free some space"
    elif code == errno.EFBIG or os.strerror(errno.EFBIG) in text:
        code, what = errno.EFBIG, "the file is larger than the limit for files here (ulimit -f)"
    elif isinstance(error, OSError):
        raise error
    else:
        code, what = errno.EIO, text
    raise OSError(code, f"{conversion.partial}: {what}. {kept}") from error


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


def _validate(
    workers: int, map_size: int | None, on_error: str, shard: tuple[int, int] | None
) -> None:
    if not isinstance(workers, int) or workers < 0:
        raise ValueError(f"workers must be a whole number, 0 or more, got {workers!r}")
    if map_size is not None and (not isinstance(map_size, int) or map_size < 1):
        raise ValueError(f"map_size must be a number of bytes, such as 2**30, got {map_size!r}")
    if on_error not in ("raise", "skip"):
        raise ValueError(f'on_error must be "raise" or "skip", got {on_error!r}')
    if shard is not None and not (
        isinstance(shard, (tuple, list))
        and len(shard) == 2
        and all(isinstance(number, int) for number in shard)
        and 0 <= shard[0] < shard[1]
    ):
        raise ValueError(f"shard must be (rank, world) with 0 <= rank < world, got {shard!r}")


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
