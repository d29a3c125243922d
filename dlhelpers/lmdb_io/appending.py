"""How are images appended to a database that stays in use until all of them are stored?

The file is copied as it is, page by page (on file systems that can, without taking space), and the
copy grows as an interrupted conversion would that is continued. At the end it is renamed over the
old file.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from dlhelpers.lmdb_io import resuming, schema
from dlhelpers.lmdb_io.converting import Conversion
from dlhelpers.lmdb_io.encoding import Encoding
from dlhelpers.lmdb_io.environments import lmdb_path, open_environment
from dlhelpers.lmdb_io.identity import Trace
from dlhelpers.lmdb_io.loading import Loader
from dlhelpers.lmdb_io.merging import common_settings, version_of
from dlhelpers.lmdb_io.renumbering import Renumbered
from dlhelpers.lmdb_io.sources import Source
from dlhelpers.printable import one_line, printable

__all__ = ["Appending", "need_database", "stored_fields"]

_STEP = 1 << 30  # bytes that one call copies
_ROOM = 1 << 20  # of the map, for the pages that the new state takes


def need_database(path: Path) -> None:
    """Raise where a path is no single file that can be appended to.

    Raises:
        FileNotFoundError, IsADirectoryError: says what to do instead.
    """
    if path.is_dir():
        raise IsADirectoryError(
            printable(
                f"{path} is a folder, and append=True (--append) goes into a single file. Of a "
                "folder of shards: write the new images into a file of their own, and all "
                "together into a new folder, `python -m dlhelpers lmdb merge "
                f"{path} NEW.lmdb DST --shards N`"
            )
        )
    if not path.exists():
        raise FileNotFoundError(
            errno.ENOENT,
            "there is no database to append to; without append=True (--append) it is written",
            printable(str(path)),
        )


def stored_fields(path: Path) -> dict[str, str] | None:
    """Return the fields of the database's samples, None of one without and where there is none."""
    if not path.is_file():
        return None
    meta = schema.unpack_meta(open_environment(path).get_entry(schema.META), path)
    fields = meta["settings"].get("fields")
    return None if fields is None else dict(map(tuple, fields))


class Appending(Conversion):
    """A conversion whose file begins with the records of an older one.

    Raises:
        ValueError: the settings or fields are others than those of the database, or it is a shard.
        SourceError: the classes cannot be matched.
    """

    def __init__(
        self,
        source: Source,
        target: Path,
        encoding: Encoding,
        workers: int,
        on_error: str,
        lock: bool,
    ) -> None:
        self._environment = open_environment(target)
        self._entry = self._environment.get_entry(schema.META)
        self._old = old = schema.unpack_meta(self._entry, target)
        if old["shard"] is not None:
            rank, world = old["shard"]
            raise ValueError(
                f"{target} is shard {rank} of {world}, which belongs to the others of its folder: "
                "append to a single file, or merge the folder with a file of new images"
            )
        self._version = version_of(self._environment, old)
        self.base = old["count"]
        skipped = [*self._environment.keys(self._environment.skipped)]
        self.skips_from = int(skipped[-1]) + 1 if skipped else 0
        self._skipped = len(skipped)
        stored = old["settings"]
        new = Renumbered(
            source,
            f"{source.kind} appended to {self._version.decode()}",
            old["classes"],
            stored,
            old["version"],
            one_line(str(target)),
        )
        encoding = _same_encoding(source, encoding, stored, target)
        own = Loader(source, encoding).settings
        self._settings = common_settings([stored, own])
        super().__init__(new, target, encoding, workers, on_error, None, lock)

    def open(self, resume: bool, map_size: int) -> None:
        """Copy the database and open the copy; or take up an interrupted append to it."""
        now = open_environment(self.target).get_entry(schema.META)
        if now != self._entry:  # another append has ended before this one held the lock
            raise BlockingIOError(
                errno.EAGAIN, printable(f"{self.target} was replaced just now: append again")
            )
        if resume and resuming.take_up(self, map_size):
            self.resumed_from -= self.base
            return
        self.is_fresh = True
        trace = Trace()
        state = self.facts() | trace.as_dict()
        state |= {
            "format": schema.FORMAT,
            "version": self._old["version"],
            "count": self.base,
            "image_bytes": self._old["image_bytes"],
            "done": 0,
            "marks": [],
            "boot": resuming.boot_id(),
        }
        self._copy_to_partial(state)
        resuming.adopt(self, state, trace, map_size)
        self.resumed_from = 0
        self.tasks = self.share.tasks()

    def _copy_to_partial(self, state: dict[str, Any]) -> None:
        import lmdb

        # under a name of its own until its state is that of an append: a copy that was cut short
        # has the state of a finished conversion
        copy = self.target.with_name(f".{self.target.name}.copy")
        try:
            _copy_file(self.target, copy)
            size = copy.stat().st_size + _ROOM
            env = lmdb.open(lmdb_path(copy), subdir=False, lock=False, sync=False, map_size=size)
            try:
                with env.begin(write=True) as txn:
                    txn.delete(schema.META)
                    txn.put(schema.STATE, schema.pack_meta(state))
            finally:
                env.close()
            os.replace(copy, self.partial)
        finally:
            with suppress(OSError):
                copy.unlink()

    def close(self) -> None:
        """Close the copy; it goes where nothing was appended to it."""
        super().close()
        if self.kept == self.base:
            self.remove_partial()

    def described(self, meta: dict[str, Any]) -> dict[str, Any]:
        """Return the meta entry of old and new records together."""
        contents = hashlib.blake2b(self._version + self.trace.contents, digest_size=16)
        return meta | {
            "source": self._old["source"],
            "settings": self._settings,
            "skipped": meta["skipped"] + self._skipped,
            "contents": contents.hexdigest(),
        }


def _same_encoding(
    source: Source, encoding: Encoding, stored: dict[str, Any], target: Path
) -> Encoding:
    """Return how new images are stored: as the old ones are."""
    given = encoding.as_dict()
    fields = stored.get("fields")
    own = (given | dict(source.settings)).get("fields")
    if own != fields:
        if fields:
            remedy = f"give samples of these fields, and fields={dict(map(tuple, fields))!r}"
        else:
            remedy = "it takes (image, target) without fields="
        raise ValueError(f"{target} has the fields {fields}, the source {own}: {remedy}")
    differing = stored.get("differing", {})
    known = (stored["quality"], *differing.get("quality", ()))
    if fields and not source.copies and given["quality"] not in known:
        shown = " or ".join(map(str, differing.get("quality", known)))
        raise ValueError(
            f"quality={given['quality']!r} differs from {shown}, which the images of "
            f"{target} were stored with: give quality={shown}"
        )
    copies_all = source.copies and dict(source.settings) == stored and not encoding.changes
    if fields or copies_all:
        return encoding
    resize = stored["resize"]
    resize = tuple(resize) if isinstance(resize, list) else resize
    old = Encoding(stored["encode"], resize, stored["quality"])
    for name, value in given.items():
        if value is not None and value != stored[name]:
            if name in differing:
                shown = " or ".join(map(str, differing[name]))
                raise ValueError(
                    f"{name}={value!r}: the images of {target} were stored with {name} {shown}, "
                    f"so that new ones are kept as they come: leave {name} out"
                )
            raise ValueError(
                f"{name}={value!r} differs from {stored[name]!r}, which the images of {target} "
                f"were stored with: leave {name} out, new images are stored as the old ones"
            )
    return old


def _copy_file(source: Path, target: Path) -> None:
    """Copy a file; where the file system can, both share the space of equal pages."""
    with open(source, "rb") as old, open(target, "wb") as new:
        with suppress(OSError):  # of a file system without them
            os.chmod(target, os.fstat(old.fileno()).st_mode & 0o777)
        try:
            while os.copy_file_range(old.fileno(), new.fileno(), _STEP):
                pass
            return
        except (AttributeError, OSError) as error:
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
        old.seek(0)
        new.seek(0)
        new.truncate()
        shutil.copyfileobj(old, new, 1 << 20)
