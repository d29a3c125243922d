"""What does the container cost, if the images in it are the same?

The same encoded images as small files, and packed into the formats that the tips name. Reading one
image takes time for

    open + read + decode + collate

of which a container changes the first two only. `split_time` measures all four, so that the most
that any container can win, open + read, is seen beside what it leaves as it was. `evict` takes a
file out of memory, so that the next read comes from the disk.
"""

from dlhelpers.course.stores.containers import STORES, Store, installed, make_store
from dlhelpers.course.stores.pagecache import evict, private_growth, resident_share
from dlhelpers.course.stores.timing import (
    Split,
    loader_time,
    next_batch,
    reading,
    reading_anew,
    split_time,
)

__all__ = [
    "STORES",
    "Split",
    "Store",
    "evict",
    "installed",
    "loader_time",
    "make_store",
    "next_batch",
    "private_growth",
    "reading",
    "reading_anew",
    "resident_share",
    "split_time",
]
