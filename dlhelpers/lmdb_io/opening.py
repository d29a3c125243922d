"""Which kind of source is it that a user gives?"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dlhelpers.lmdb_io.folder_source import FolderSource
from dlhelpers.lmdb_io.item_sources import DatasetSource, TripleSource
from dlhelpers.lmdb_io.listing import Listing, is_listing
from dlhelpers.lmdb_io.merging import Databases, is_database, open_databases
from dlhelpers.lmdb_io.plain import is_plain_folder
from dlhelpers.lmdb_io.sources import Source
from dlhelpers.lmdb_io.wrappers import look_through
from dlhelpers.printable import printable

__all__ = ["need_outside", "open_source"]


def open_source(source: Any) -> Source:
    """Return the items of an image folder, a database, a map-style dataset or an iterable of
    triples; of wrapped datasets those inside.

    Raises:
        TypeError: it is none of them.
        FileNotFoundError, NotADirectoryError: there is no such folder.
    """
    if isinstance(source, Source):
        return source
    if isinstance(source, (str, os.PathLike)):
        path = Path(source).expanduser()
        if is_database(path):
            return Databases([path])
        return Listing(path) if is_listing(path) else FolderSource.scan(path)
    if isinstance(source, (list, tuple)):
        if source and all(isinstance(path, (str, os.PathLike)) for path in source):
            return open_databases([Path(path).expanduser() for path in source])
        return TripleSource(source)
    if (found := look_through(source, _open_dataset)) is not None:
        return found
    if not isinstance(source, (bytes, bytearray, Mapping)):
        if hasattr(source, "__getitem__") and hasattr(source, "__len__"):
            return _open_dataset(source)
        if isinstance(source, Iterable):
            return TripleSource(source)
    raise TypeError(
        "source must be an image folder, a map-style dataset of (image, target), or an iterable "
        f"of (key, bytes, target), got {type(source).__name__}"
    )


def _open_dataset(source: Any) -> Source:
    if is_plain_folder(source):
        return FolderSource.of_image_folder(source)  # its files, instead of what it decodes of them
    return DatasetSource(source)


def need_outside(path: Path, root: Path) -> None:
    """Raise where a folder of shards would lie in the image folder that it is made from.

    Raises:
        ValueError: it would become one of its classes.
    """
    root = root.expanduser().resolve()
    if path == root or root in path.parents:
        raise ValueError(
            printable(
                f"{path} lies in the image folder {root} and would become a class of it: give a "
                "folder outside of it"
            )
        )
