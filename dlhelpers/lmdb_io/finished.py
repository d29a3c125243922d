"""Is a shard finished already, whole and of the same source and settings?"""

from __future__ import annotations

import json

from dlhelpers.lmdb_io import schema
from dlhelpers.lmdb_io.comparing import is_same_part
from dlhelpers.lmdb_io.converting import Conversion
from dlhelpers.lmdb_io.environments import open_environment
from dlhelpers.lmdb_io.identity import odd_shards

__all__ = ["take_finished"]


def take_finished(conversion: Conversion) -> bool:
    """Take a finished shard in place of converting it again; False where there is none.

    Sets what the conversion reports. A shard that leaves out images is finished only for a
    conversion that may skip some.
    """
    source = conversion.source
    if conversion.shard is None or not source.restarts or not conversion.target.exists():
        return False
    environment = open_environment(conversion.target)
    meta = schema.unpack_meta(environment.get_entry(schema.META), conversion.target)
    facts = conversion.facts()
    if any(meta.get(name) != value for name, value in facts.items()):
        return False
    if not meta.get("identity") or (meta["skipped"] and not conversion.skips):
        return False
    share = conversion.share
    share.look(conversion.workers)
    if odd_shards([meta, facts | {"identity": share.identity()}], 0)[1]:
        return False
    if source.place:  # the same names and sizes on another machine may hold other contents
        tasks, times, contents = [*share.tasks()], meta["times"], meta["contents"]
        if not is_same_part(conversion.loader, tasks, times, contents, conversion.workers):
            return False
    skipped = [tuple(json.loads(value)) for _, value in environment.items(environment.skipped)]
    conversion.skipped = [one for one in skipped if one not in source.problems]
    conversion.count = conversion.resumed_from = meta["count"]
    conversion.image_bytes = meta["image_bytes"]
    return True
