"""How do many small image files become one file that is read fast and safely?

Reading one image takes

    open + read + decode + collate

and a database saves the first two: one file, opened once, mapped into memory, from which a record
is found in a tree of pages and handed to the decoder without a copy. What is left is decoding, so
the decoder matters more than the store; notebook 02 measures both.

    write_lmdb("photos", "photos.lmdb", workers=2, resize=256)     # appears whole or not at all
    dataset = LMDBDataset("photos.lmdb", transform)                # dataset[i] -> (image, target)
    verify_lmdb("photos.lmdb")                                     # every record's checksum

A sample may hold more than an image and a target, in named fields:

    write_lmdb(samples, "scenes.lmdb", fields={"image": "jpeg", "mask": "png", "boxes": "numpy"})
    LMDBDataset("scenes.lmdb", joint_transform)                    # dataset[i] -> a dict

The layout of the file stands in :mod:`dlhelpers.lmdb_io.schema`; nothing in it is pickled.

Source: Chu 2011, MDB: A Memory-Mapped Database and Backend for OpenLDAP, LDAPCon 2011.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dlhelpers.lmdb_io.dataset import LMDBDataset

from dlhelpers.lmdb_io.decoding import decoders, load_decoder
from dlhelpers.lmdb_io.schema import DatabaseError
from dlhelpers.lmdb_io.sources import SourceError
from dlhelpers.lmdb_io.verifying import info_lmdb, verify_lmdb
from dlhelpers.lmdb_io.writing import write_lmdb

__all__ = [
    "DatabaseError",
    "LMDBDataset",
    "SourceError",
    "decoders",
    "info_lmdb",
    "load_decoder",
    "verify_lmdb",
    "write_lmdb",
]


def __getattr__(name: str) -> Any:
    if name == "LMDBDataset":  # brings torch, which converting and verifying do not need
        return importlib.import_module("dlhelpers.lmdb_io.dataset").LMDBDataset
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
