"""Which images does a rank read, in which order, and how does it go on in the middle of an epoch?

An epoch is one order of all items, which the ranks deal out in turn. After n samples on each of W
ranks it has been read up to the place

    consumed = n W

exactly. This one number resumes the epoch on every rank, and on another number of ranks too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch.distributed
from torch.utils.data import DistributedSampler

from dlhelpers.arguments import whole_number
from dlhelpers.lmdb_io.ordering import Order
from dlhelpers.lmdb_io.sampler_state import read_state, warn_of_left

__all__ = ["WindowSampler"]

_CHUNK = 4096  # indices that are made at a time
_LARGEST_SEED = 2**64 - 1


class WindowSampler(DistributedSampler):
    """Indices of one rank, shuffled within windows, from any point of an epoch.

    Stands in for torch's DistributedSampler, on one process as well. Shards come in random order,
    a single file in blocks of neighboring records, and every ``window`` records of that order are
    shuffled among each other. Indices are made as they are needed: a full shuffle keeps no list
    of them, a window keeps its own.

    The records of a window lie in window / block runs of the file. Memory should hold a few
    windows, and of a file that it does not hold the dataset should be opened with
    ``readahead=True``: then a disk reads the file about once an epoch, in runs, while a full
    shuffle reads every record by itself.

    Of a folder that is sorted by class, batches of B mix the K = window / block blocks of their
    window, which makes K (1 - (1 - 1/K)^B) classes on average where every block is of another
    class. Whole shards are large blocks: give ``block`` where records were converted in the order
    of their classes, as those of an image folder are, so that K is as large as the batch.

    Ranks read the same window at the same time, each every W-th record of its order. Weights and
    samples that are drawn more than once are not supported.

    Resuming counts the samples that were consumed, not those that workers have asked for in
    advance. With torchdata's StatefulDataLoader save and load the state of the loader alone; on
    another number of ranks all load that of rank 0, and ``snapshot_every_n_steps`` stays 1. A
    batch sampler must be torchdata's own there. With a plain DataLoader the training loop says
    what it has consumed:

        loader = DataLoader(dataset, batch_size=64, sampler=sampler, num_workers=8)
        if checkpoint is not None:
            sampler.load_state_dict(checkpoint["sampler"])
        for epoch in range(sampler.epoch, epochs):
            sampler.set_epoch(epoch)
            for images, targets in loader:
                train(images, targets)
                sampler.advance(len(targets))
                ...  # now and then torch.save({"sampler": sampler.state_dict(), ...})

    The first pass after loading a state takes what is left of its epoch. Every other pass takes a
    whole epoch, also after one that was left early.

    Args:
        dataset: an LMDBDataset (of a file or a folder of shards), Subset or ConcatDataset of some,
            whose records are then taken in the order in which they are stored; or any dataset
            with a length.
        num_replicas: number of ranks, W; None takes it from torch.distributed, 1 where that is not
            initialized.
        rank: of this process, from 0; None as above.
        window: records that are shuffled among each other; None shuffles all of them.
        block: neighboring records that stay together until they are shuffled in their window. None
            takes each shard of a folder as a whole, and of a single file the square root of
            ``window``.
        shuffle: False for the dataset's own order.
        seed: of the order, together with the epoch; the same on all ranks.
        drop_last: leaves out what the number of ranks does not divide, W - 1 samples at most.
            Otherwise as many are repeated, see ``repeats``.

    Attributes:
        epoch: as :meth:`set_epoch` or a state has set it.
        dataset, num_replicas, rank, window, block, shuffle, seed, drop_last: as given.

    Raises:
        TypeError: the dataset has no length.
        ValueError: an option is out of range.

    >>> sampler = WindowSampler(range(1000), num_replicas=2, rank=0, window=100)
    >>> handed_out = [index for index, _ in zip(sampler, range(28))]  # as workers do in advance
    >>> sampler.advance(12)
    >>> state = sampler.state_dict()
    >>> state["epoch"], state["consumed"]  # by both ranks
    (0, 24)
    >>> other = WindowSampler(range(1000), num_replicas=4, rank=0, window=100)
    >>> other.load_state_dict(state)
    >>> len(other)  # a quarter of the 976 that are left
    244
    """

    def __init__(
        self,
        dataset: Any,
        num_replicas: int | None = None,
        rank: int | None = None,
        *,
        window: int | None = None,
        block: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        has_ranks = torch.distributed.is_available() and torch.distributed.is_initialized()
        if num_replicas is None:
            num_replicas = torch.distributed.get_world_size() if has_ranks else 1
        if rank is None:
            rank = torch.distributed.get_rank() if has_ranks else 0
        if window is not None:
            window = whole_number("window", window, 1)
        if block is not None:
            if window is None:
                raise ValueError(f"block={block!r} needs a window: without one all is shuffled")
            block = whole_number("block", block, 1)
        for name, value in (("shuffle", shuffle), ("drop_last", drop_last)):
            if not isinstance(value, bool):
                raise ValueError(f"{name} must be True or False, got {value!r}")
        self.dataset, self.window, self.block = dataset, window, block
        self.num_replicas = whole_number("num_replicas", num_replicas, 1)
        self.rank = whole_number("rank", rank, 0, self.num_replicas - 1)
        self.shuffle, self.drop_last = shuffle, drop_last
        self.seed = whole_number("seed", seed, 0, _LARGEST_SEED)
        self._order = Order(dataset, shuffle=shuffle, window=window, block=block, seed=self.seed)
        self.epoch = 0
        self._asked: int | None = None  # the epoch that set_epoch was given since the last pass
        self._first = 0  # place in the epoch at which the latest pass began, or the next one will
        self._resumes = False  # whether the next pass begins there, instead of at 0
        self._is_over = False  # whether the latest pass has handed out all
        self._passes = 0  # that were begun, or for which a place was set
        self._handed_out = self._advanced = 0  # samples of this rank in the latest pass

    def __iter__(self) -> Iterator[int]:
        if not self._resumes and not self._share(self._first):
            self._is_over = True  # a loader that was resumed at the end begins its next pass
        return _Pass(self)

    def __len__(self) -> int:
        """Number of this rank's samples in the present pass, or in the one that comes next.

        It stays the same until all are consumed: workers ask for the last ones in advance.
        """
        is_consumed = self._is_over and self._advanced == self._handed_out
        return self._share(0 if is_consumed else self._first)

    @property
    def num_samples(self) -> int:
        """The same as ``len``, as DistributedSampler calls it."""
        return len(self)

    @property
    def total_size(self) -> int:
        """``len`` of all ranks together."""
        return len(self) * self.num_replicas

    @property
    def repeats(self) -> list[int]:
        """Indices that the latest pass, or the coming one, reads twice over all ranks."""
        share = self._share(self._first)
        extra = share * self.num_replicas - (self._order.length - self._first)
        places = np.arange(max(extra, 0)) % max(self._order.length, 1)
        return self._order.epoch(self.epoch)(places).tolist()

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, as DistributedSampler has it; another one starts at its beginning.

        A resumed epoch goes on if it is set again.
        """
        epoch = whole_number("epoch", epoch, 0)
        if epoch != self.epoch:
            if self._resumes and not self._advanced:
                warn_of_left(self.epoch, self._first, self._order.length, epoch)
            self._begin_at(0, epoch, False)
        self._asked = epoch

    def advance(self, samples: int) -> None:
        """Say that this rank, as all others, has consumed more samples of the present pass.

        Args:
            samples: of one rank: the size of its batch.

        Raises:
            ValueError: that would be more than the pass has handed out.
        """
        samples = whole_number("samples", samples, 0)
        if self._advanced + samples > self._handed_out:
            raise ValueError(
                f"advance({samples}) after {self._advanced}: the sampler has handed out "
                f"{self._handed_out} samples in this pass. Give the number of images of this "
                "rank's batch, once each batch, and iterate over a loader with this sampler"
            )
        self._advanced += samples

    def state_dict(self) -> dict[str, Any]:
        """Return where the epoch stands, the same on all ranks.

        Its numbers are plain: JSON, pickle and torch.save keep them. ``consumed`` counts samples
        of all ranks in this epoch, as :meth:`advance` was told.
        """
        return self._state(self.epoch, self._first + self._advanced * self.num_replicas)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where a state was taken, with any number of ranks; the next pass begins there.

        Raises:
            ValueError: it is no state of a WindowSampler, or of another order: the dataset, its
                shards, ``window``, ``block``, ``shuffle`` or ``seed`` are not the same.
        """
        epoch, consumed = read_state(state_dict, self._order.facts)
        self._begin_at(consumed, epoch, True)

    # ---- private ----

    def _share(self, first: int) -> int:
        left = self._order.length - first
        return left // self.num_replicas if self.drop_last else -(-left // self.num_replicas)

    def _state(self, epoch: int, consumed: int) -> dict[str, Any]:
        consumed = min(consumed, self._order.length)  # repeats are none of the epoch's samples
        return {"epoch": epoch, "consumed": consumed, **self._order.facts}

    def _begin_at(self, first: int, epoch: int, resumes: bool) -> None:
        self.epoch, self._first, self._resumes = epoch, first, resumes
        self._is_over, self._handed_out, self._advanced = False, 0, 0
        self._passes += 1  # one that is still read from counts no longer


class _Pass(Iterator[int]):
    """One pass of a rank, which begins when its first index is asked for.

    It has a state by itself, since StatefulDataLoader stores it with each batch that it hands to
    a worker: the sampler's own would be ahead.
    """

    def __init__(self, sampler: WindowSampler) -> None:
        self._sampler = sampler
        self._indices: Iterator[int] | None = None
        self._number = self._epoch = self._first = self._yielded = 0

    def __next__(self) -> int:
        sampler = self._sampler
        if self._indices is None:
            if not sampler._resumes:
                sampler._begin_at(0, sampler.epoch, False)
            self._begin()
        index = next(self._indices, None)
        is_latest = self._number == sampler._passes
        if index is None:
            if is_latest:
                sampler._is_over, sampler._resumes = True, False
            raise StopIteration
        self._yielded += 1
        if is_latest:
            sampler._handed_out = self._yielded
        return index

    def state_dict(self) -> dict[str, Any]:
        """Return a state of the sampler that counts what this pass has handed out."""
        sampler = self._sampler
        if self._indices is None:
            return sampler._state(sampler.epoch, sampler._first if sampler._resumes else 0)
        return sampler._state(self._epoch, self._first + self._yielded * sampler.num_replicas)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken; in an epoch that was set, if it is another."""
        sampler = self._sampler
        epoch, first = read_state(state_dict, sampler._order.facts)
        # the loader loads its state when it is iterated over, after the loop has set the epoch
        asked = epoch if sampler._asked is None else sampler._asked
        if asked != epoch:
            warn_of_left(epoch, first, sampler._order.length, asked)
            epoch, first = asked, 0
        sampler._begin_at(first, epoch, False)
        self._begin()

    def _begin(self) -> None:
        sampler = self._sampler
        sampler._asked = None
        sampler._passes += 1
        sampler._handed_out = sampler._advanced = 0
        self._number, self._yielded = sampler._passes, 0
        self._epoch, self._first = sampler.epoch, sampler._first
        self._indices = self._made(sampler._order.epoch(self._epoch))

    def _made(self, items: Callable[[np.ndarray], np.ndarray]) -> Iterator[int]:
        sampler = self._sampler
        share = sampler._share(self._first)
        for start in range(0, share, _CHUNK):
            turns = np.arange(start, min(start + _CHUNK, share))
            places = self._first + sampler.rank + turns * sampler.num_replicas
            yield from items(places % sampler._order.length).tolist()
