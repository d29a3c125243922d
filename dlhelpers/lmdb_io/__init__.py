"""How do many small image files become one file that is read fast and safely?

Reading one image takes

    open + read + decode + collate

and a database saves the first two: one file, opened once, mapped into memory, from which a record
is found in a tree of pages and handed to the decoder without a copy. What is left is decoding, so
the decoder matters more than the store; notebook 02 measures both.

    write_lmdb("photos", "photos.lmdb", workers=2, resize=256)     # appears whole or not at all
    dataset = LMDBDataset("photos.lmdb", transform)                # dataset[i] -> (image, target)
    sampler = WindowSampler(dataset, window=10_000)                # shuffles; resumes an epoch
    verify_lmdb("photos.lmdb")                                     # every record's checksum
    convert_lmdb("old", "new.lmdb")                                # what a tutorial or Caffe wrote

Of many images each rank writes a shard, from one scan; databases are merged as they are stored:

    write_listing("photos", "photos.listing")                      # one scan, for all ranks
    write_lmdb("photos.listing", "shards", shards=64, shard=(rank, world))
    write_lmdb(["shards", "more.lmdb"], "all", shards=16)          # no image is decoded
    write_lmdb("new", "photos.lmdb", append=True)                  # after the records in it

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
    from dlhelpers.lmdb_io.sampling import WindowSampler

from dlhelpers.lmdb_io.decoding import decoders, load_decoder
from dlhelpers.lmdb_io.describing import info_lmdb
from dlhelpers.lmdb_io.listing import Listing
from dlhelpers.lmdb_io.old_databases import convert_lmdb
from dlhelpers.lmdb_io.scanning import write_listing
from dlhelpers.lmdb_io.schema import DatabaseError
from dlhelpers.lmdb_io.sources import SourceError
from dlhelpers.lmdb_io.verifying import verify_lmdb
from dlhelpers.lmdb_io.writing import write_lmdb

__all__ = [
    "DatabaseError",
    "LMDBDataset",
    "Listing",
    "SourceError",
    "WindowSampler",
    "convert_lmdb",
    "decoders",
    "info_lmdb",
    "load_decoder",
    "verify_lmdb",
    "write_listing",
    "write_lmdb",
]


def __getattr__(name: str) -> Any:
    # these bring torch, which converting and verifying do not need
    if module := {"LMDBDataset": "dataset", "WindowSampler": "sampling"}.get(name):
        return getattr(importlib.import_module(f"dlhelpers.lmdb_io.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
