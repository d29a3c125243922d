"""What does the container cost, if the images in it are the same?

The same encoded images as small files, and packed into the formats that the tips name. Reading one
image takes time for

    open + read + decode + collate

of which a container changes the first two only. `split_time` measures all four, so that the most
that any container can win, open + read, is seen beside what it leaves as it was. `evict` takes a
file out of memory, so that the next read comes from the disk.
"""

from dlhelpers.stores.containers import STORES, Store, make_store
from dlhelpers.stores.pagecache import evict, resident_share
from dlhelpers.stores.splitting import Split, split_time

__all__ = ["STORES", "Split", "Store", "evict", "make_store", "resident_share", "split_time"]
