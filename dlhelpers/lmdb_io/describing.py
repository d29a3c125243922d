"""What does a database say of itself, without a look at any record?"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlhelpers.lmdb_io import schema
from dlhelpers.lmdb_io.environments import open_environment
from dlhelpers.lmdb_io.fields import Fields
from dlhelpers.lmdb_io.shards import check_shards, shard_files
from dlhelpers.printable import one_line, printable

__all__ = ["DatabaseInfo", "info_lmdb"]


@dataclass(frozen=True, repr=False)
class DatabaseInfo:
    """What a database says of itself.

    Attributes:
        path: file or folder of shards.
        count: images.
        classes: their names; None without.
        image_bytes, file_bytes: of the images, and of the files.
        settings: encode, resize and quality of the conversion; of records of several under
            ``differing`` the values of each.
        skipped: (what, why) of all that the conversion left out.
        library: versions that wrote it.
        fields: name -> kind of a database of fields; None of images with targets.
    """

    path: Path
    count: int
    classes: tuple[str, ...] | None
    image_bytes: int
    file_bytes: int
    settings: dict[str, Any]
    skipped: tuple[tuple[str, str], ...]
    library: str
    fields: dict[str, str] | None = None

    def __repr__(self) -> str:
        classes = "none" if self.classes is None else f"{len(self.classes)}"
        shown = ", ".join(map(one_line, (self.classes or ())[:5])) + (
            ", ..." if len(self.classes or ()) > 5 else ""
        )
        lines = [
            one_line(str(self.path)),
            f"  images    {self.count}, {self.image_bytes / 1e6:.1f} MB in a file of "
            f"{self.file_bytes / 1e6:.1f} MB",
            f"  classes   {classes}" + (f": {shown}" if shown else ""),
            *[
                f"  field     {one_line(name)}: {kind}"
                for name, kind in (self.fields or {}).items()
            ],
            f"  stored    {_stored(self.settings)}",
            f"  written   by {self.library}",
            f"  skipped   {len(self.skipped)}",
        ]
        lines += [f"    {one_line(what)}: {one_line(why)}" for what, why in self.skipped]
        return printable("\n".join(lines))


def info_lmdb(path: str | os.PathLike[str]) -> DatabaseInfo:
    """Return what a database says of itself; no image is read.

    Raises:
        DatabaseError, FileNotFoundError: as LMDBDataset.
    """
    path = Path(path).expanduser().resolve()
    files = shard_files(path)
    metas, skipped = [], []
    for file in files:
        environment = open_environment(file)
        metas.append(schema.unpack_meta(environment.get_entry(schema.META), file))
        skipped += [tuple(json.loads(v)) for _, v in environment.items(environment.skipped)]
    check_shards(path, files, metas)
    classes = metas[0]["classes"]
    fields = Fields.stored(metas[0], path)
    return DatabaseInfo(
        path=path,
        count=sum(meta["count"] for meta in metas),
        classes=None if classes is None else tuple(classes),
        image_bytes=sum(meta["image_bytes"] for meta in metas),
        file_bytes=sum(file.stat().st_size for file in files),
        settings={k: v for k, v in metas[0]["settings"].items() if k != "fields"},
        skipped=tuple(skipped),
        library=metas[0]["library"],
        fields=dict(fields.kinds) if fields else None,
    )


def _stored(settings: Mapping[str, Any]) -> str:
    """Return how the images are stored."""
    if differing := settings.get("differing"):
        return "differing: " + ", ".join(
            f"{name} {' or '.join('none' if value is None else str(value) for value in values)}"
            for name, values in differing.items()
        )
    found = ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None)
    return found or "bytes as the source had them"
