"""Feed a DALI pipeline ahead of the loop, in order, and find the image at which it broke."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakMethod

import numpy as np
import torch

from dlhelpers.dali_io.edges import brighten_edges_
from dlhelpers.dali_io.graph import ImagePipeline
from dlhelpers.lmdb_io import load_decoder

__all__ = ["Executor", "Job"]


@dataclass(frozen=True)
class Job:
    """A batch to be made: indices [N], which of them are wanted, and the seed of the batch."""

    pipeline: ImagePipeline
    indices: np.ndarray
    kept: np.ndarray
    seed: tuple[int, ...]

    @property
    def wanted(self) -> np.ndarray:
        """Indices of the images that are wanted."""
        return self.indices[self.kept]

    def read(self) -> Read:
        """Read the images. What is not wanted draws random numbers all the same."""
        source = self.pipeline.source
        images = source.read(self.wanted.tolist())
        sizes = np.ones((len(self.indices), 2), dtype=np.int64)
        sizes[self.kept] = np.array([source.size(image) for image in images]).reshape(-1, 2)
        places = self.pipeline.places(sizes, np.random.default_rng(self.seed))
        gains = self.pipeline.gains(sizes[self.kept])
        return Read((images, *(rows[self.kept] for rows in places.values())), gains)

    def parts(self) -> Iterator[Job]:
        """Yield the wanted images one by one, each as it is in this batch."""
        for place in np.flatnonzero(self.kept):
            yield replace(self, kept=np.arange(len(self.kept)) == place)


@dataclass(frozen=True)
class Read:
    """What DALI is fed for a batch, and how its edges are mended afterwards, if at all."""

    fed: tuple[Any, ...]
    gains: np.ndarray | None


class Executor:
    """A built DALI pipeline that is fed jobs and gives their images in order."""

    def __init__(self, pipeline: ImagePipeline, seed: int) -> None:
        self._pipeline, self._seed = pipeline, seed
        self._readers = ThreadPoolExecutor(2, thread_name_prefix="dali_io")
        self._jobs: Iterator[Job] = iter(())
        self._ahead: deque[tuple[Job, Future[Read]]] = deque()  # being read
        self._fed: deque[Job] = deque()  # in DALI
        self._gains: deque[np.ndarray | None] = deque()  # of those that have images
        self._built: Any = None
        self._idle = True  # DALI holds no batch and waits for a reset
        self.run = 0  # counts loops, so that one that has ended knows it
        self.closed = False

    def start(self, jobs: Iterator[Job]) -> None:
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
            feed = WeakMethod(self._feed)  # else the two would keep each other alive
            self._built = self._pipeline.build(lambda: feed()(), seed=self._seed)
        else:
            self._built.reset()
        self._clear()
        self._idle, self._jobs = True, jobs
        self._read_ahead()

    def next(self) -> tuple[Job, torch.Tensor]:
        """Return the next job and its images; StopIteration after the last."""
        if self._idle:
            self._built.schedule_run()  # fills DALI's queue
            self._idle = False
        if self._fed and not self._fed[0].kept.any():
            return self._fed.popleft(), torch.empty(0)  # all of its images were left out
        if self._built.empty():
            raise StopIteration
        (outputs,) = self._built.share_outputs()
        images = torch.from_dlpack(outputs.as_tensor())  # DALI hands the memory over, uncopied
        self._built.release_outputs()
        self._built.schedule_run()
        job, gains = self._fed.popleft(), self._gains.popleft()
        if gains is not None:
            brighten_edges_(images, gains, self._pipeline.mean, self._pipeline.std)
        return job, images

    def find_bad(self) -> dict[int, str]:
        """Return index -> reason of images under way that cannot be read; DALI is made anew."""
        self._built = None
        bad: dict[int, str] = {}
        probe = _Probe(self._pipeline)
        for job in self._fed:
            for part in job.parts():
                if why := probe.try_(part):
                    bad[int(part.wanted[0])] = why
            if bad:
                break
        self._forget()
        self._clear()
        self._idle = True
        return bad

    def close(self) -> None:
        """End the loop, and give threads and buffers back."""
        self.run += 1
        self.closed = True
        self._jobs = iter(())
        self._forget()
        self._clear()
        self._built, self._idle = None, True
        self._readers.shutdown(cancel_futures=True)

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


class _Probe:
    """Puts images through a pipeline one at a time, to see which of them it breaks at."""

    def __init__(self, pipeline: ImagePipeline) -> None:
        self._pipeline, self._built = pipeline, None
        self._next: list[tuple[Any, ...]] = []

    def try_(self, job: Job) -> str:
        """Return why the one image of a job cannot be read, empty where it can."""
        try:
            fed = job.read().fed
        except Exception as error:  # whatever a reader raises
            return str(error) or type(error).__name__
        try:
            self._run(fed)
        except Exception as error:  # whatever DALI raises
            self._built = None
            return f"DALI {_reason(error)}; {_pillow_says(fed[0][0])}"
        return ""

    def _run(self, fed: tuple[Any, ...]) -> None:
        self._next = [fed]
        if self._built is None:
            self._built = self._pipeline.build(self._feed, batch_size=1)
        else:
            self._built.reset()
        self._built.schedule_run()
        self._built.share_outputs()
        self._built.release_outputs()
        self._built.schedule_run()  # finds nothing more, and can be reset

    def _feed(self) -> tuple[Any, ...]:
        if not self._next:
            raise StopIteration
        return self._next.pop()


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
