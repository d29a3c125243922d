"""Which images make up which batch of an epoch, once some of them are known to be bad?"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from dlhelpers.dali_io.graph import ImagePipeline

__all__ = ["Job", "Plan"]


@dataclass(frozen=True)
class Job:
    """A batch to be made.

    Attributes:
        pipeline: that makes it.
        number: in the epoch.
        indices: [N], of its images.
        kept: bool [N], which of them are wanted.
        seed: of crops and flips.
        end: place in the epoch's order from which the next batch is filled.
    """

    pipeline: ImagePipeline
    number: int
    indices: np.ndarray
    kept: np.ndarray
    seed: tuple[int, ...]
    end: int

    @property
    def wanted(self) -> np.ndarray:
        """Indices of the images that are wanted."""
        return self.indices[self.kept]

    def read(self, pool: ThreadPoolExecutor | None = None) -> tuple[Any, ...]:
        """Return what DALI is fed. What is not wanted draws random numbers all the same.

        Args:
            pool: whose threads share the images; None to read them one after another.
        """
        count = 1 if pool is None else min(self.pipeline.threads, len(self.wanted))
        parts = [part.tolist() for part in np.array_split(self.wanted, count)]
        read = self.pipeline.source.read
        found = [read(parts[0])] if pool is None else list(pool.map(read, parts))
        images = [image for part, _ in found for image in part]
        sizes = np.ones((len(self.indices), 2), dtype=np.int64)
        sizes[self.kept] = np.concatenate([rows for _, rows in found])
        places = self.pipeline.places(sizes, np.random.default_rng(self.seed))
        return images, self.wanted, *(rows[self.kept] for rows in places.values())

    def parts(self) -> Iterator[Job]:
        """Yield the wanted images one by one, each as it is in this batch."""
        for place in np.flatnonzero(self.kept):
            yield replace(self, kept=np.arange(len(self.kept)) == place)


@dataclass(frozen=True)
class Plan:
    """How the batches of every epoch are made, and which images were found to be bad."""

    pipeline: ImagePipeline
    seed: int
    shard: tuple[int, int]
    skips: bool
    bad: dict[int, str] = field(default_factory=dict)

    def augment_seed(self, epoch: int) -> int:
        """Return a seed for DALI's own random operators, another one for each process."""
        entropy = (self.seed, self.shard[0], epoch)
        return int(np.random.SeedSequence(entropy).generate_state(1)[0])

    def jobs(self, epoch: int, order: np.ndarray, numbers: range, place: int) -> Iterator[Job]:
        """Yield some batches of an epoch, the images left out or replaced that are known to be bad.

        Args:
            epoch: decides on crops and flips.
            order: indices of the epoch's images; one at least must be good.
            numbers: of the batches.
            place: in ``order`` from which the first of them is filled.
        """
        batch_size, replaces = self.pipeline.batch_size, self.shard[1] > 1 and self.pipeline.train
        for number in numbers:
            size = min(batch_size, len(order) - number * batch_size)
            indices = order[place : place + size]
            if replaces and (len(indices) < size or not self._are_good(indices).all()):
                indices, place = self._next_good(order, place, size)
            else:
                place += size
            kept = self._are_good(indices)
            seed = (self.seed, epoch, self.shard[0], number)
            yield Job(self.pipeline, number, indices, kept, seed, place)

    def has_good(self, order: np.ndarray) -> bool:
        """Whether any image of an epoch may be good."""
        return not len(order) or any(int(index) not in self.bad for index in order)

    def _are_good(self, indices: np.ndarray) -> np.ndarray:
        return np.array([index not in self.bad for index in indices.tolist()], dtype=bool)

    def _next_good(self, order: np.ndarray, place: int, size: int) -> tuple[np.ndarray, int]:
        """Return the next good images of ``order``, repeated without end, and the place after."""
        found: list[int] = []
        while len(found) < size:
            index = int(order[place % len(order)])
            place += 1
            if index not in self.bad:
                found.append(index)
        return np.array(found, dtype=np.int64), place

    def named(self, bad: dict[int, str]) -> list[tuple[str, str]]:
        """Return (name, reason) of bad images."""
        return [(self.pipeline.source.name(index), why) for index, why in bad.items()]
