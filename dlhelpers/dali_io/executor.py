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
    """A batch to be made: its number in the epoch, indices [N], which are wanted, and its seed."""

    pipeline: ImagePipeline
    number: int
    indices: np.ndarray
    kept: np.ndarray
    seed: tuple[int, ...]

    @property
    def wanted(self) -> np.ndarray:
        """Indices of the images that are wanted."""
        return self.indices[self.kept]

    def read(self) -> tuple[Any, ...]:
        """Return what DALI is fed. What is not wanted draws random numbers all the same."""
        images, found = self.pipeline.source.read(self.wanted.tolist())
        sizes = np.ones((len(self.indices), 2), dtype=np.int64)
        sizes[self.kept] = found
        places = self.pipeline.places(sizes, np.random.default_rng(self.seed))
        return images, self.wanted, *(rows[self.kept] for rows in places.values())

    def parts(self) -> Iterator[Job]:
        """Yield the wanted images one by one, each as it is in this batch."""
        for place in np.flatnonzero(self.kept):
            yield replace(self, kept=np.arange(len(self.kept)) == place)


class Executor:
    """A built DALI pipeline that is fed jobs and gives their images in order."""

    def __init__(self, pipeline: ImagePipeline, seed: int) -> None:
        self._pipeline, self._seed = pipeline, seed
        self._readers = ThreadPoolExecutor(2, thread_name_prefix="dali_io")
        self._jobs: Iterator[Job] = iter(())
        self._ahead: deque[tuple[Job, Future[tuple[Any, ...]]]] = deque()  # being read
        self._fed: deque[Job] = deque()  # in DALI
        self._built: Any = None
        self._idle = True  # DALI holds no batch and waits for a reset
        self.run = 0  # counts loops, so that one that has ended knows it
        self.closed = False

    def start(self, jobs: Iterator[Job]) -> None:
        """Begin with new jobs; what was under way is dropped."""
        self.run += 1
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
        self._fed.clear()
        self._idle, self._jobs = True, jobs
        self._read_ahead()

    def next(self) -> tuple[int, torch.Tensor, np.ndarray]:
        """Return number, images and indices of the next batch; StopIteration after the last."""
        if self._idle:
            self._built.schedule_run()  # fills DALI's queue
            self._idle = False
        if self._built.empty():
            raise StopIteration
        outputs = self._built.share_outputs()
        images = torch.from_dlpack(outputs[0].as_tensor())  # DALI hands the memory over, uncopied
        indices, *gains = (np.array(output.as_array()) for output in outputs[1:])
        self._built.release_outputs()
        number = self._fed.popleft().number
        self._built.schedule_run()
        if gains:
            gain = gains[0].reshape(-1, 2, 2)
            brighten_edges_(images, gain, self._pipeline.mean, self._pipeline.std)
        return number, images, indices

    def find_bad(self) -> dict[int, str]:
        """Return index -> reason of images under way that cannot be read; DALI is made anew."""
        self._built = None
        bad: dict[int, str] = {}
        # errors of the user's own operators are no image's
        plain = self._pipeline.augment and (lambda images: images)
        probe = _Probe(replace(self._pipeline, augment=plain))
        for job in [*self._fed, *(job for job, _ in self._ahead)]:
            for part in job.parts():
                if why := probe.try_(part):
                    bad[int(part.wanted[0])] = why
            if bad:
                break
        self._forget()
        self._fed.clear()
        self._idle = True
        return bad

    def close(self) -> None:
        """End the loop, and give threads and buffers back."""
        self.run += 1
        self.closed = True
        self._forget()
        self._fed.clear()
        self._built, self._idle = None, True
        self._readers.shutdown(cancel_futures=True)

    def _read_ahead(self) -> None:
        while len(self._ahead) < 2:
            job = next(self._jobs, None)
            if job is None:
                return
            if job.kept.any():  # else all of its images were left out
                self._ahead.append((job, self._readers.submit(job.read)))

    def _feed(self) -> tuple[Any, ...]:
        """Return the next batch for DALI, which calls this whenever it has room."""
        if not self._ahead:
            raise StopIteration
        job, reading = self._ahead[0]
        fed = reading.result()  # where this raises, the job is still the next one
        self._ahead.popleft()
        self._fed.append(job)
        self._read_ahead()
        return fed

    def _forget(self) -> None:
        self._jobs = iter(())
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
            fed = job.read()
        except Exception as error:  # whatever a reader raises
            return str(error) or type(error).__name__
        try:
            self._run(fed)
        except Exception as error:  # whatever DALI raises
            self._built = None
            encoded = self._pipeline.source.encoded(int(job.wanted[0]))
            return f"DALI {_reason(error)}; {_pillow_says(encoded)}"
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


def _pillow_says(encoded: bytes | None) -> str:
    if encoded is None:
        return "it was decoded before"
    try:
        load_decoder("pil")(encoded)
    except Exception as error:  # Pillow raises a dozen kinds
        return f"Pillow: {error}"
    return "Pillow can: convert it, to JPEG or PNG"
