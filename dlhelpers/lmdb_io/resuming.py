"""Can an interrupted conversion be continued: is its file sound, and the source still the same?"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlhelpers.lmdb_io import schema
from dlhelpers.lmdb_io.comparing import gives_the_same, is_same_part
from dlhelpers.lmdb_io.identity import Trace
from dlhelpers.lmdb_io.sources import SourceError
from dlhelpers.printable import printable

if TYPE_CHECKING:
    from dlhelpers.lmdb_io.converting import Conversion

__all__ = ["adopt", "boot_id", "take_up"]


def take_up(conversion: Conversion, map_size: int) -> bool:
    """Continue after the last commit of an interrupted conversion; False where it differs."""
    if not conversion.partial.exists():
        return False
    why = _read_state(conversion, map_size) or _differs(conversion)
    if not why:
        return True
    conversion.close()
    conversion.start_afresh()
    warnings.warn(
        printable(
            f"{conversion.target.name}: cannot go on with the interrupted conversion, {why}: "
            "starting afresh"
        ),
        stacklevel=4,
    )
    if not conversion.source.restarts:
        conversion.remove_partial()
        raise SourceError(
            f"the source is an iterator that gives its items only once, and {why}: call "
            "write_lmdb again with a new iterator"
        )
    return False


def _read_state(conversion: Conversion, map_size: int) -> str:
    """Open the partial file and read its state; return why that cannot be done."""
    from dlhelpers.lmdb_io.verifying import find_problems, peek_state

    state = peek_state(conversion.partial)
    if isinstance(state, str):
        return state
    facts = conversion.facts()
    for name in facts:
        if state[name] != facts[name]:
            return f"its {name} were {state[name]!r}, now they are {facts[name]!r}"
    try:
        trace = Trace.from_dict(state)
    except KeyError:
        return "it was begun by an earlier version of dlhelpers"
    if not state["boot"] or state["boot"] != boot_id():
        # the machine went down: what was written last may never have reached the disk
        problems = find_problems(conversion.partial)
        if problems:
            return f"the file was damaged when the machine went down ({problems[0]})"
    try:
        adopt(conversion, state, trace, map_size)
    except schema.DatabaseError as error:
        return f"the file is damaged ({error})"
    return ""


def adopt(conversion: Conversion, state: Mapping[str, Any], trace: Trace, map_size: int) -> None:
    """Open the partial file, and take its state for that of the conversion.

    Raises:
        DatabaseError: a record that is needed is missing or damaged.
    """
    conversion.open_env(map_size)
    conversion.count, conversion.done = state["count"], state["done"]
    conversion.image_bytes, conversion.trace = state["image_bytes"], trace
    conversion.version, conversion.marks = state["version"], dict(state.get("marks", ()))
    conversion.resumed_from = conversion.kept = conversion.count
    with conversion.env.begin(db=conversion.skips_db) as txn:
        # those behind it are the source's own problems, listed at the end
        first = conversion.skips_from
        own = schema.position_key(first), schema.position_key(first + conversion.done)
        skipped = [tuple(json.loads(v)) for key, v in txn.cursor() if own[0] <= key < own[1]]
        conversion.skipped = skipped
    with conversion.env.begin(write=True) as txn:
        for key in [*txn.cursor(conversion.skips_db).iternext(keys=True, values=False)]:
            if key >= own[1]:  # of a run that ended before its rename; they may be gone
                txn.delete(key, db=conversion.skips_db)
        conversion.columns.take_up(txn, conversion.columns_db, conversion.records, conversion.count)


def _differs(conversion: Conversion) -> str:
    """Compare the part of the source that is done with what it was; return what differs."""
    trace, done = Trace(), []
    conversion.tasks = conversion.share.tasks()
    for number in range(conversion.done):
        task = next(conversion.tasks, None)
        if task is None:
            return f"the source has only {number} of {conversion.done} items left"
        trace.add(conversion.source.stamp(task))
        if conversion.source.place or conversion.source.hides:
            done.append(task)
    if trace.items != conversion.trace.items:
        return "the source has changed"
    contents = conversion.trace.contents.hex()
    if conversion.source.place:
        if not is_same_part(
            conversion.loader, done, conversion.trace.times, contents, conversion.workers
        ):
            return "the source has changed"
        conversion.trace.times = trace.times
    elif conversion.source.identity is not None and trace.times != conversion.trace.times:
        return "the source was listed anew and has changed"  # its listing says what was there
    if conversion.source.hides:  # only loading can tell
        with conversion.env.begin() as txn:
            databases = {
                "records": conversion.records,
                "index": conversion.index,
                "skipped": conversion.skips_db,
            }
            read = {name: partial(txn.get, db=db) for name, db in databases.items()}
            if not gives_the_same(conversion.loader, done, read, conversion.workers):
                return "the dataset gives other images now"
    return ""


def boot_id() -> str:
    """Return what tells one start of this machine from the next; empty where nothing does."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
