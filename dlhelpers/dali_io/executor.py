"""Feed a DALI pipeline ahead of the loop, in order, and find the image at which it broke."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any
from weakref import WeakMethod

import numpy as np
import torch

from dlhelpers.dali_io.edges import brighten_edges_
from dlhelpers.dali_io.graph import ImagePipeline
from dlhelpers.dali_io.plan import Job

__all__ = ["Executor"]


class Executor:
    """A built DALI pipeline that is fed jobs and gives their images in order."""

    def __init__(self, pipeline: ImagePipeline, seed: int) -> None:
        self._pipeline, self._seed = pipeline, seed
        self._readers = ThreadPoolExecutor(2, thread_name_prefix="dali_io")  # of batches
        self._openers = (  # of a batch's images
            ThreadPoolExecutor(pipeline.threads, thread_name_prefix="dali_io_images")
            if pipeline.threads > 1
            else None
        )
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
            except Exception:  # an image of a loop that nobody wants any more
                self._built = None
        if self._built is None:
            feed = WeakMethod(self._feed)  # else the two would keep each other alive
            self._built = self._pipeline.build(lambda: feed()(), seed=self._seed)
        else:
            self._built.reset()
        self._fed.clear()
        self._idle, self._jobs = True, jobs
        self._read_ahead()

    def next(self) -> tuple[Job, torch.Tensor, np.ndarray]:
        """Return the next batch's job, images and indices; StopIteration after the last."""
        if self._idle:
            self._built.schedule_run()  # fills DALI's queue
            self._idle = False
        if self._built.empty():
            raise StopIteration
        outputs = self._built.share_outputs()
        images = torch.from_dlpack(outputs[0].as_tensor())  # DALI hands the memory over, uncopied
        indices, *gains = (np.array(output.as_array()) for output in outputs[1:])
        self._built.release_outputs()
        job = self._fed.popleft()
        self._built.schedule_run()
        if gains:
            gain = gains[0].reshape(-1, 2, 2)
            brighten_edges_(images, gain, self._pipeline.mean, self._pipeline.std)
        return job, images, indices

    def find_bad(self) -> dict[int, str]:
        """Return index -> reason of images under way that cannot be read; DALI is made anew.

        Empty where all of them can be read now: the error was not an image's, or has passed, or
        DALI has refused what Pillow decodes, which is left to Pillow from now on.
        """
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
        self._readers.shutdown(cancel_futures=True)  # first, since its threads wait for the others
        if self._openers is not None:
            self._openers.shutdown()

    def _read_ahead(self) -> None:
        while len(self._ahead) < 2:
            job = next(self._jobs, None)
            if job is None:
                return
            if job.kept.any():  # else all of its images were left out
                self._ahead.append((job, self._readers.submit(job.read, self._openers)))

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
            return self._second_opinion(int(job.wanted[0]), error)
        return ""

    def _second_opinion(self, index: int, error: Exception) -> str:
        """Return why an image that DALI has refused cannot be read, empty where Pillow can."""
        source = self._pipeline.source
        try:
            if source.leave_to_pillow(index):
                return ""
        except Exception as refused:  # the file may be gone by now
            return f"DALI {_reason(error)}; {refused}"
        how = "was decoded before" if source.kind == "pixels" else "was decoded by Pillow"
        return f"DALI {_reason(error)}; it {how}"

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
