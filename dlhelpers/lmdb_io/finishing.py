"""How does the growing file become the database: its ``meta`` entry, the sync and the rename."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlhelpers.lmdb_io import schema
from dlhelpers.lmdb_io.comparing import Neighbours
from dlhelpers.lmdb_io.locking import in_turn
from dlhelpers.lmdb_io.sources import SourceError
from dlhelpers.printable import one_line

if TYPE_CHECKING:
    from dlhelpers.lmdb_io.converting import Conversion

__all__ = ["finish"]


def finish(conversion: Conversion) -> None:
    """Write the meta entry, bring all of it to the disk, and rename."""
    import lmdb

    from dlhelpers import __version__

    expected = conversion.share.count
    if expected is not None and conversion.done != expected:
        raise SourceError(
            f"the source said that it has {expected} items and gave {conversion.done}: nothing was "
            "replaced"
        )
    if not conversion.share.was_listed_as(conversion.trace):
        conversion.trace.times = conversion.share.look_again(
            conversion.loader, conversion.trace, conversion.workers
        )
    if conversion.count == conversion.base and conversion.shard is None:
        if conversion.base and conversion.skips:  # all that was to be appended is there
            return
        first = conversion.skipped[0] if conversion.skipped else ()
        reasons = "".join(f": {one_line(text)}" for text in first)
        raise SourceError(f"the source holds no image that could be stored{reasons}")
    meta = conversion.facts() | {
        "format": schema.FORMAT,
        "version": conversion.version,
        "count": conversion.count,
        "image_bytes": conversion.image_bytes,
        "skipped": len(conversion.skipped) + len(conversion.source.problems),
        "digest": conversion.trace.items.hex(),
        "contents": conversion.trace.contents.hex(),
        "columns": conversion.columns.finish(
            conversion.env, conversion.columns_db, conversion.make_room
        ),
        "library": f"dlhelpers {__version__}, lmdb {lmdb.__version__}",
    }
    meta = conversion.described(meta)
    if conversion.shard is None:
        _publish(conversion, meta)
        return
    meta |= {"times": conversion.trace.times, "identity": conversion.share.identity()}
    meta["marks"] = conversion.share.timed(conversion.marks)
    neighbours = Neighbours(
        conversion.target, conversion.shard, conversion.loader, conversion.workers
    )
    neighbours.equal_versions(meta)  # what takes long is done before it is this rank's turn
    conversion.env.sync(True)
    with in_turn(conversion.target.parent, conversion.lock):
        meta["identity"]["equal"] = neighbours.equal_versions(meta)
        _publish(conversion, meta)


def _publish(conversion: Conversion, meta: dict[str, Any]) -> None:
    with conversion.env.begin(write=True) as txn:
        for number, problem in enumerate(conversion.source.problems):
            key = schema.position_key(conversion.skips_from + conversion.done + number)
            txn.put(key, json.dumps(problem).encode(), db=conversion.skips_db)
        # the state stays: a kill before the file is renamed costs nothing then
        txn.put(schema.META, schema.pack_meta(meta))
    size = (conversion.env.info()["last_pgno"] + 1) * conversion.env.stat()["psize"]
    conversion.env.close()
    conversion.disk.finish(size)  # pages freed at the end are never written
    conversion.close()
    os.replace(conversion.partial, conversion.target)
    _sync_folder(conversion.target.parent)


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows has no such call
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
