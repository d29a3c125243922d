"""A DALI pipeline that iterates like a torch DataLoader."""

from __future__ import annotations

import threading
import warnings
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DistributedSampler

from dlhelpers.arguments import shard_of, whole_number
from dlhelpers.dali_io.executor import Executor
from dlhelpers.dali_io.graph import ImagePipeline
from dlhelpers.dali_io.plan import Job, Plan
from dlhelpers.dali_io.sources import ImageError

__all__ = ["DALILoader"]

Batch = tuple[torch.Tensor, torch.Tensor]


def count_batches(count: int, batch_size: int, drop_last: bool) -> int:
    """Return len() of a DataLoader: rounded down where the last, smaller batch is dropped."""
    return count // batch_size if drop_last else -(-count // batch_size)


class DALILoader:
    """Batches of an image pipeline: ``images`` float32 [N, 3, size, size], ``targets`` int64 [N].

    Stands where ``DataLoader(dataset, batch_size, shuffle)`` stands: the same ``len``, the same
    number of images in each epoch, a last batch that is smaller, or dropped. The images of an epoch
    come in the order of torch's DistributedSampler with the same seed. A loop may be left early;
    the next one begins a new epoch. Seed and epoch decide on order, crops and flips, bit for bit on
    the CPU, however the epochs before were left.

    Args:
        pipeline: what :func:`image_pipeline` returned.
        shuffle: None for shuffling where the pipeline trains.
        drop_last: drop what does not fill a batch (and, with shards, what cannot be dealt out
            evenly), as torch does.
        seed: of order, crops and flips.
        shard: (rank, number of processes): this process gets every so-many-th image, as with
            DistributedSampler, which repeats some so that all get equally many.
        on_error: what an image that cannot be read or decoded does: ``raise`` an ImageError that
            names it, or ``skip`` it; :attr:`skipped` lists it. With shards and a pipeline that
            trains, the next images of this process's order take its place, at the end of the epoch
            those from its start, so that every process gets ``len`` whole batches and none waits
            for another in vain. Otherwise no image comes twice: the batch is smaller, or missing
            where nothing is left of it.

    Attributes:
        pipeline, batch_size, drop_last, seed: as given.
        epoch: the one that the next loop will go through; set_epoch sets it, each loop adds one.
        skipped: (name, reason) of images that were left out so far.

    Raises:
        ValueError: an option is out of range.
        ImageError: in a loop, where ``on_error`` says so, or no image of the epoch can be read.
    """

    def __init__(
        self,
        pipeline: ImagePipeline,
        *,
        shuffle: bool | None = None,
        drop_last: bool = False,
        seed: int = 0,
        shard: tuple[int, int] = (0, 1),
        on_error: str = "raise",
    ) -> None:
        if not isinstance(pipeline, ImagePipeline):
            raise TypeError(
                f"pipeline is of type {type(pipeline).__name__}: give what image_pipeline returns"
            )
        rank, world = shard_of(shard)
        if on_error not in ("raise", "skip"):
            raise ValueError(f'on_error must be "raise" or "skip", got {on_error!r}')
        seed = whole_number("seed", seed, 0)
        self.pipeline, self.batch_size = pipeline, pipeline.batch_size
        self.drop_last, self.seed, self.epoch = drop_last, seed, 0
        self._plan = Plan(pipeline, seed, (rank, world), skips=on_error == "skip")
        self._sampler: DistributedSampler[Any] = DistributedSampler(
            pipeline.source.targets,  # type: ignore[arg-type]
            num_replicas=world,
            rank=rank,
            shuffle=pipeline.train if shuffle is None else shuffle,
            seed=seed,
            drop_last=drop_last,
        )
        self._executor: Executor | None = None
        self._running: _Epoch | None = None

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """Return (name, reason) of the images that were left out so far."""
        return self._plan.named(self._plan.bad)

    def __len__(self) -> int:
        return count_batches(len(self._sampler), self.batch_size, self.drop_last)

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next loop goes through, to resume a training, say.

        Raises:
            ValueError: it is negative.
        """
        self.epoch = whole_number("epoch", epoch, 0)

    def __iter__(self) -> Iterator[Batch]:
        run, self._running = self._running, None
        if run is None or run.started or run.over or run.epoch != self.epoch:
            run = self._begin()
        self._running = run
        self.epoch += 1
        return run

    def peek(self) -> Batch:
        """Return the batch that comes next, which is not lost: the loop will give it as well.

        Within a loop the next batch of that loop, else the first of the next loop.

        Raises:
            StopIteration: no batch is left in this loop, or in any.
        """
        run = self._running
        if run is None or run.over or (not run.started and run.epoch != self.epoch):
            run = self._running = self._begin()
        return run.peek()

    def close(self) -> None:
        """Give DALI's threads and buffers back; the next loop makes new ones."""
        self._running = None
        if self._executor is not None:
            self._executor.close()
        self._executor = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_executor": None, "_running": None}

    def __repr__(self) -> str:
        return f"DALILoader({len(self)} batches, {self.pipeline!r})"

    def _begin(self) -> _Epoch:
        if self._executor is None or self._executor.closed:
            self._executor = Executor(self.pipeline, self._plan.augment_seed(self.epoch))
        self._sampler.set_epoch(self.epoch)
        order = np.fromiter(self._sampler, dtype=np.int64, count=len(self._sampler))
        return _Epoch(self._plan, self.epoch, order, len(self), self._executor)


class _Epoch:
    """One loop over the loader, which it does not hold, lest the two keep each other alive."""

    def __init__(
        self, plan: Plan, epoch: int, order: np.ndarray, batches: int, executor: Executor
    ) -> None:
        self.epoch, self.started, self.over = epoch, False, False
        self._plan, self._order, self._executor = plan, order, executor
        self._batches = batches
        self._given = 0  # batches that the executor has given back, or left out
        self._place = 0  # in the order, from which the next batch is filled
        self._retried = -1  # batches given when an error was tried once more
        self._seen: deque[Batch] = deque()  # peeked at
        self._lock = threading.Lock()
        self._interrupted = False
        self._start()

    def __iter__(self) -> _Epoch:
        return self

    def __len__(self) -> int:
        return self._batches

    def __next__(self) -> Batch:
        # as torch's own loader does, so that a profile tells what is waited for
        with self._lock, torch.autograd.profiler.record_function("data loading"):
            self.started = True
            return self._seen.popleft() if self._seen else self._next()

    def peek(self) -> Batch:
        with self._lock:
            if not self._seen:
                self._seen.append(self._next())
            return self._seen[0]

    def _next(self) -> Batch:
        if self._interrupted:
            raise RuntimeError("this loop was interrupted: begin a new one over the DALILoader")
        while not self.over:
            if self._run != self._executor.run:
                raise RuntimeError(
                    "this loop has ended, because another one over the same DALILoader has begun "
                    "or it was closed: make a DALILoader for each of loops that run at a time"
                )
            try:
                job, images, indices = self._next_batch()
            except StopIteration:
                self.over = True
                break
            except Exception:
                self.over = True
                self._executor.close()
                raise
            except BaseException:  # Ctrl-C: nobody knows how far DALI has come
                self.over = self._interrupted = True
                self._executor.close()
                raise
            self._given, self._place = job.number + 1, job.end
            return images, self._targets(indices, images.device)
        raise StopIteration

    def _targets(self, indices: np.ndarray, device: torch.device) -> torch.Tensor:
        found = self._plan.pipeline.source.targets[indices]
        targets = torch.from_numpy(found.astype(np.int64))
        if device.type == "cpu":
            return targets
        return targets.pin_memory().to(device, non_blocking=True)  # the host does not wait

    def _start(self) -> None:
        if not self._plan.has_good(self._order):
            bad = {index: self._plan.bad[index] for index in dict.fromkeys(self._order.tolist())}
            self.over = True
            self._executor.close()
            raise ImageError(self._plan.named(bad), all_of_them=True)
        left = range(self._given, self._batches)
        self._executor.start(self._plan.jobs(self.epoch, self._order, left, self._place))
        self._run = self._executor.run

    def _next_batch(self) -> tuple[Job, torch.Tensor, np.ndarray]:
        """Return the executor's next batch, after bad images were found and left out."""
        while True:
            try:
                return self._executor.next()
            except StopIteration:
                raise
            except Exception as error:
                bad = self._executor.find_bad()
                if bad and not self._plan.skips:
                    raise ImageError(self._plan.named(bad)) from error
                if not bad and self._retried == self._given:
                    raise
                self._retried = self._given if not bad else self._retried
                self._plan.bad.update(bad)
                self._start()
                for name, why in self._plan.named(bad):
                    warnings.warn(f"{name} is left out: {why}", stacklevel=4)
