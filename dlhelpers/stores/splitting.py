"""Where does the time of one image go?"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from dlhelpers.stores.containers import Store

__all__ = ["Split", "split_time"]


@dataclass(frozen=True)
class Split:
    """Where the time of one image goes; medians over batches.

    Attributes:
        open_us, read_us, decode_us, collate_us: microseconds for each image.
    """

    open_us: float
    read_us: float
    decode_us: float
    collate_us: float

    @property
    def total_us(self) -> float:
        """All four together."""
        return self.open_us + self.read_us + self.decode_us + self.collate_us

    @property
    def store_share(self) -> float:
        """What the container is responsible for, from 0 to 1."""
        return (self.open_us + self.read_us) / self.total_us

    def as_dict(self) -> dict[str, float]:
        """Return stage -> microseconds."""
        return {
            "open": self.open_us,
            "read": self.read_us,
            "decode": self.decode_us,
            "collate": self.collate_us,
        }


def split_time(
    store: Store,
    decode: Callable[[bytes], Any],
    order: Sequence[int],
    *,
    batch_size: int = 32,
) -> Split:
    """Measure the four stages of reading images in an order, batch by batch, in this process.

    Args:
        store: a container that is read at random.
        decode: from encoded bytes to uint8 pixels [H, W, 3], all of one size.
        order: indices, a few batches of them.
        batch_size: images that are collated into one tensor.

    Raises:
        ValueError: fewer indices than a batch.
    """
    if len(order) < batch_size:
        raise ValueError(f"{len(order)} indices are less than one batch of {batch_size}")
    rows = []
    for first in range(0, len(order) - batch_size + 1, batch_size):
        times = [0.0] * 4
        pixels = []
        for index in order[first : first + batch_size]:
            marks = [perf_counter()]
            opened = store.open(index)
            marks.append(perf_counter())
            data = store.read(opened)
            marks.append(perf_counter())
            pixels.append(torch.from_numpy(decode(data)))
            marks.append(perf_counter())
            for stage, (begin, end) in enumerate(itertools.pairwise(marks)):
                times[stage] += end - begin
        begin = perf_counter()
        torch.stack(pixels)
        times[3] = perf_counter() - begin
        rows.append([1e6 * seconds / batch_size for seconds in times])
    return Split(*(median(column) for column in zip(*rows, strict=True)))
