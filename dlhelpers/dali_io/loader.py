"""A DALI pipeline that iterates like a torch DataLoader."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DistributedSampler

from dlhelpers.dali_io.edges import brighten_edges
from dlhelpers.dali_io.graph import ImagePipeline
from dlhelpers.dali_io.sources import ImageError
from dlhelpers.lmdb_io import load_decoder

__all__ = ["DALILoader"]

Batch = tuple[torch.Tensor, torch.Tensor]


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
            names it, or ``skip`` it: its batch is smaller, and :attr:`skipped` lists it.

    Attributes:
        pipeline, batch_size, drop_last: as given.
        epoch: the one that the next loop will go through; set_epoch sets it, each loop adds one.
        skipped: (name, reason) of images that were left out so far.

    Raises:
        ValueError: an option is out of range.
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
        rank, world = shard
        if not 0 <= rank < world:
            raise ValueError(f"shard must be (rank, processes) with 0 <= rank < N, got {shard!r}")
        if on_error not in ("raise", "skip"):
            raise ValueError(f'on_error must be "raise" or "skip", got {on_error!r}')
        if not isinstance(seed, int) or seed < 0:
            raise ValueError(f"seed must be a whole number, 0 or more, got {seed!r}")
        self.pipeline, self.batch_size = pipeline, pipeline.batch_size
        self.drop_last, self.seed, self.epoch = drop_last, seed, 0
        self._rank, self._skips = rank, on_error == "skip"
        self._sampler: DistributedSampler[Any] = DistributedSampler(
            pipeline.source.targets,  # type: ignore[arg-type]
            num_replicas=world,
            rank=rank,
            shuffle=pipeline.train if shuffle is None else shuffle,
            seed=seed,
            drop_last=drop_last,
        )
        self._bad: dict[int, str] = {}
        self._executor: _Executor | None = None
        self._running: _Epoch | None = None

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """Return (name, reason) of the images that were left out so far."""
        return [(self.pipeline.source.name(index), why) for index, why in self._bad.items()]

    def __len__(self) -> int:
        count = len(self._sampler)
        return count // self.batch_size if self.drop_last else -(-count // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next loop goes through, to resume a training, say.

        Raises:
            ValueError: it is negative.
        """
        if not isinstance(epoch, int) or epoch < 0:
            raise ValueError(f"epoch must be a whole number, 0 or more, got {epoch!r}")
        self.epoch = epoch

    def __iter__(self) -> Iterator[Batch]:
        run, self._running = self._running, None
        if run is None or run.started or run.epoch != self.epoch:
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

    def __repr__(self) -> str:
        return f"DALILoader({len(self)} batches, {self.pipeline!r})"

    def _begin(self) -> _Epoch:
        if self._executor is None:
            self._executor = _Executor(self.pipeline, self.seed)
        self._sampler.set_epoch(self.epoch)
        order = np.fromiter(self._sampler, dtype=np.int64, count=len(self._sampler))
        return _Epoch(self, self.epoch, order, self._executor)

    def _job(self, epoch: int, number: int, order: np.ndarray) -> _Job:
        """Return what a batch of an epoch is made of."""
        first = number * self.batch_size
        indices = order[first : first + self.batch_size]
        kept = np.array([index not in self._bad for index in indices.tolist()])
        return _Job(self.pipeline, indices, kept, (self.seed, epoch, self._rank, number))

    def _tell(self, bad: dict[int, str]) -> None:
        """Note images that cannot be read, or raise them."""
        named = [(self.pipeline.source.name(index), why) for index, why in bad.items()]
        if not self._skips:
            raise ImageError(named)
        self._bad |= bad
        for name, why in named:
            warnings.warn(f"{name} is left out: {why}", stacklevel=5)


@dataclass(frozen=True)
class _Job:
    """A batch to be made: indices [N], which of them are wanted, and the seed of the batch."""

    pipeline: ImagePipeline
    indices: np.ndarray
    kept: np.ndarray
    seed: tuple[int, ...]

    @property
    def wanted(self) -> np.ndarray:
        return self.indices[self.kept]

    def read(self) -> _Read:
        """Read the images. What is not wanted draws random numbers all the same."""
        source = self.pipeline.source
        images = source.read(self.wanted.tolist())
        sizes = np.ones((len(self.indices), 2), dtype=np.int64)
        sizes[self.kept] = np.array([source.size(image) for image in images]).reshape(-1, 2)
        places = self.pipeline.places(sizes, np.random.default_rng(self.seed))
        gains = self.pipeline.gains(sizes[self.kept])
        return _Read((images, *(rows[self.kept] for rows in places)), gains)

    def parts(self) -> Iterator[_Job]:
        """Yield the wanted images one by one, each as it is in this batch."""
        for place in np.flatnonzero(self.kept):
            yield replace(self, kept=np.arange(len(self.kept)) == place)


@dataclass(frozen=True)
class _Read:
    """What DALI is fed for a batch, and how its edges are mended afterwards, if at all."""

    fed: tuple[Any, ...]
    gains: np.ndarray | None


class _Epoch:
    """One loop over the loader."""

    def __init__(
        self, loader: DALILoader, epoch: int, order: np.ndarray, executor: _Executor
    ) -> None:
        self.epoch, self.started, self.over = epoch, False, False
        self._loader, self._order, self._executor = loader, order, executor
        self._batches = len(loader)
        self._given = 0  # batches that the executor has given back
        self._seen: deque[Batch] = deque()  # peeked at
        executor.start(loader._job(epoch, n, order) for n in range(self._batches))
        self._run = executor.run

    def __iter__(self) -> _Epoch:
        return self

    def __len__(self) -> int:
        return self._batches

    def __next__(self) -> Batch:
        self.started = True
        return self._seen.popleft() if self._seen else self._next()

    def peek(self) -> Batch:
        if not self._seen:
            self._seen.append(self._next())
        return self._seen[0]

    def _next(self) -> Batch:
        while not self.over:
            if self._run != self._executor.run:
                raise RuntimeError(
                    "this loop has ended, because another one over the same DALILoader has begun: "
                    "make a DALILoader for each of loops that run at a time"
                )
            try:
                job, images = self._executor.next()
            except StopIteration:
                self.over = True
                break
            except Exception as error:
                self._mend(error)
                continue
            self._given += 1
            if job.kept.any():
                targets = torch.from_numpy(job.pipeline.source.targets[job.wanted])
                return images, targets.to(images.device)
        raise StopIteration

    def _mend(self, error: Exception) -> None:
        """Find the images at which the pipeline broke, and go on without them."""
        bad = self._executor.find_bad()
        if not bad:
            self._loader.close()
            raise error
        try:
            self._loader._tell(bad)
        except ImageError as named:
            self._loader.close()
            self.over = True
            raise named from error
        left = range(self._given, self._batches)
        self._executor.start(self._loader._job(self.epoch, n, self._order) for n in left)
        self._run = self._executor.run


class _Executor:
    """A built DALI pipeline that is fed jobs and gives their images in order."""

    def __init__(self, pipeline: ImagePipeline, seed: int) -> None:
        self._pipeline, self._seed = pipeline, seed
        self._readers = ThreadPoolExecutor(2, thread_name_prefix="dali_io")
        self._jobs: Iterator[_Job] = iter(())
        self._ahead: deque[tuple[_Job, Future[_Read]]] = deque()  # being read
        self._fed: deque[_Job] = deque()  # in DALI
        self._gains: deque[np.ndarray | None] = deque()  # of those that have images
        self._built: Any = None
        self._idle = True  # DALI holds no batch and waits for a reset
        self.run = 0  # counts loops, so that one that has ended knows it

    def start(self, jobs: Iterator[_Job]) -> None:
        """Begin with new jobs; what was under way is dropped."""
        self.run += 1
        self._jobs = iter(())
        self._forget()
        if self._built is not None and not self._idle:
            try:
                while not self._built.empty():
                    self._built.share_outputs()
                    self._built.release_outputs()
                    self._built.schedule_run()
            except RuntimeError:  # an image of a loop that nobody wants any more
                self._built = None
        if self._built is None:
            self._built = self._pipeline.build(self._feed, seed=self._seed)
        else:
            self._built.reset()
        self._clear()
        self._idle, self._jobs = True, jobs
        self._read_ahead()

    def next(self) -> tuple[_Job, torch.Tensor]:
        """Return the next job and its images; StopIteration after the last."""
        if self._idle:
            self._built.schedule_run()  # fills DALI's queue
            self._idle = False
        if self._fed and not self._fed[0].kept.any():
            return self._fed.popleft(), torch.empty(0)  # all of its images were left out
        if self._built.empty():
            raise StopIteration
        images = self._outputs()
        self._built.schedule_run()
        job, gains = self._fed.popleft(), self._gains.popleft()
        if gains is not None:
            brighten_edges(images, gains, self._pipeline.mean, self._pipeline.std)
        return job, images

    def find_bad(self) -> dict[int, str]:
        """Return index -> reason of images under way that cannot be read; DALI is made anew."""
        self._built = None
        bad: dict[int, str] = {}
        for job in self._fed:
            for part in job.parts():
                if why := self._try(part):
                    bad[int(part.wanted[0])] = why
            if bad:
                break
        self._forget()
        self._clear()
        self._idle = True
        return bad

    def close(self) -> None:
        self.run += 1
        self._jobs = iter(())
        self._forget()
        self._clear()
        self._built, self._idle = None, True
        self._readers.shutdown(wait=False, cancel_futures=True)

    def _outputs(self) -> torch.Tensor:
        if self._pipeline.device.type == "cpu":
            (images,) = self._built.share_outputs()
        else:
            stream = torch.cuda.current_stream(self._pipeline.device)
            (images,) = self._built.share_outputs(stream)
        # no copy: DALI's default executor hands the memory over
        tensor = torch.from_dlpack(images.as_tensor())
        self._built.release_outputs()
        return tensor

    def _read_ahead(self) -> None:
        while len(self._ahead) < 2:
            job = next(self._jobs, None)
            if job is None:
                return
            self._ahead.append((job, self._readers.submit(job.read)))

    def _feed(self) -> tuple[Any, ...]:
        """Return the next batch for DALI, which calls this whenever it has room."""
        while self._ahead:
            job, reading = self._ahead.popleft()
            self._read_ahead()
            self._fed.append(job)
            if job.kept.any():
                read = reading.result()
                self._gains.append(read.gains)
                return read.fed
        raise StopIteration

    def _clear(self) -> None:
        self._fed.clear()
        self._gains.clear()

    def _forget(self) -> None:
        for _, reading in self._ahead:
            reading.cancel()
        self._ahead.clear()

    def _try(self, job: _Job) -> str:
        """Return why an image cannot be read, empty where it can."""
        try:
            fed = job.read().fed
        except Exception as error:  # whatever a reader raises
            return str(error) or type(error).__name__
        given = iter([fed])
        try:
            probe = self._pipeline.build(lambda: next(given), batch_size=1)
            probe.schedule_run()
            probe.share_outputs()
            probe.release_outputs()
        except Exception as error:  # whatever DALI raises
            return f"DALI {_reason(error)}; {_pillow_says(fed[0][0])}"
        return ""


def _reason(error: Exception) -> str:
    """Return the one line of DALI's many that says what is wrong."""
    lines = [line.strip(" :") for line in str(error).splitlines()]
    lines = lines[lines.index("encountered") + 1 :] if "encountered" in lines else lines
    told = next((line for line in lines if line), type(error).__name__)
    failed = told.startswith(("Failed to decode", "nvImageCodec failure"))
    return "cannot decode it" if failed else f"says {told!r}"


def _pillow_says(image: np.ndarray) -> str:
    if image.ndim == 3:
        return "it was decoded before"
    try:
        load_decoder("pil")(image.tobytes())
    except Exception as error:  # Pillow raises a dozen kinds
        return f"Pillow: {error}"
    return "Pillow can: convert it, to JPEG or PNG"
