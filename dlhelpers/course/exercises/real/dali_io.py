"""Real exercise of notebook 03: a loader for which the training step no longer waits."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dlhelpers.course.exercises.real.tasks import BlankError, Reached, RefusedError, Task, given
from dlhelpers.stages import Span, Timeline

__all__ = ["TASK", "Work"]

_GOAL = 20.0  # % of its time that the step may wait
_SET_UP_S = 10.0
_EPOCHS = (7, 8)  # that are timed, and compared afterwards
_STEP_SHARE = 0.5  # of the time that a batch takes, as it is loaded at first


@dataclass(frozen=True)
class Work:
    """What a loader has to do.

    Attributes:
        load: number of a batch -> what is the same in every epoch.
        augment: (what was loaded, epoch, number of the batch) -> the batch.
        batches: number of them in an epoch.
    """

    load: Callable[[int], Any]
    augment: Callable[[Any, int, int], Tensor]
    batches: int = 12

    def batch(self, epoch: int, number: int) -> Tensor:
        """Return one batch, made from the beginning."""
        return self.augment(self.load(number), epoch, number)


def _flipped(images: Tensor, epoch: int, number: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * epoch + number)
    flags = torch.rand(len(images), generator=generator) < 0.5
    return torch.where(flags[:, None, None, None], images.flip(-1), images)


def _pictures(number: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    coarse = torch.rand(8, 3, size // 16, size // 16, generator=generator)
    return torch.nn.functional.interpolate(coarse, size=size, mode="bilinear")


def _files(size: int, **kind: Any) -> list[list[bytes]]:
    from PIL import Image

    batches = []
    for number in range(12):
        files = []
        for picture in (_pictures(number, size) * 255).byte().permute(0, 2, 3, 1).numpy():
            file = io.BytesIO()
            Image.fromarray(picture).save(file, **kind)
            files.append(file.getvalue())
        batches.append(files)
    return batches


def _decoded(files: list[bytes]) -> Tensor:
    import numpy as np
    from PIL import Image

    small = [Image.open(io.BytesIO(file)).resize((64, 64)) for file in files]
    return torch.stack([torch.from_numpy(np.array(one)).permute(2, 0, 1) for one in small])


def decoding() -> Work:
    """Return work that decodes large JPEGs in every epoch."""
    files = _files(384, format="JPEG")
    return Work(lambda number: _decoded(files[number]), _flipped)


def scans() -> Work:
    """Return work that decodes large PNGs in every epoch."""
    files = _files(256, format="PNG", compress_level=1)
    return Work(lambda number: _decoded(files[number]), _flipped)


def far_away() -> Work:
    """Return work whose files come from a disk that answers late."""

    def load(number: int) -> Tensor:
        time.sleep(0.03)
        return (_pictures(number, 64) * 255).byte()

    return Work(load, _flipped)


def by_hand() -> Work:
    """Return work that normalises row by row, in Python."""

    def load(number: int) -> Tensor:
        images = _pictures(number, 64)
        rows = [(row - row.mean()) / row.std() for image in images for row in image.flatten(0, 1)]
        return torch.stack(rows).view_as(images)

    return Work(load, _flipped)


def loader(work: Work) -> Callable[[int], Iterator[Tensor]]:
    """Return a loader that loads once, and augments the next batch in a thread meanwhile."""
    loaded = [work.load(number) for number in range(work.batches)]

    def epoch_of(epoch: int) -> Iterator[Tensor]:
        with ThreadPoolExecutor(1) as thread:
            coming = thread.submit(work.augment, loaded[0], epoch, 0)
            for number in range(work.batches):
                batch = coming.result()
                if (following := number + 1) < work.batches:
                    coming = thread.submit(work.augment, loaded[following], epoch, following)
                yield batch

    return epoch_of


def _measure(make: Callable[[], Any], answer: Callable[..., Any]) -> Reached:
    work = make()
    start = time.perf_counter()
    epoch_of = given(answer, work)
    took = time.perf_counter() - start
    if not callable(epoch_of):
        raise RefusedError(f"the answer must give a function: epoch -> batches, got {epoch_of!r}")
    if (first := epoch_of(0)) is None or first is ...:
        raise BlankError
    if took > _SET_UP_S:
        raise RefusedError(
            f"{took:.0f} s went by before the first epoch, not {_SET_UP_S:g} s or less"
        )
    step_s = _STEP_SHARE * _batch_s(work)
    shares = []
    for epoch in _EPOCHS:
        batches: list[Tensor] = []
        timeline = waiting(epoch_of(epoch), step_s, batches)
        shares.append(100 * (1 - timeline.busy_share("train")))
        _need_batches(work, epoch, batches)
    share = min(shares)
    return Reached(
        share,
        f"% of its time the step waits (goal: {_GOAL:g} or less)",
        passed=share <= _GOAL,
        advice="time work.load and work.augment for one batch: what is the same in every epoch "
        "can be done once, and the rest while the step computes",
    )


def _batch_s(work: Work) -> float:
    times = []
    for number in range(min(4, work.batches)):
        start = time.perf_counter()
        work.batch(0, number)
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def waiting(batches: Iterable[Any], step_s: float, kept: list[Any], clock: Any = time) -> Timeline:
    """Return when a step worked that takes step_s a batch and leaves the processor alone."""
    spans, start = [Span("train", -1, 0.0, 0.0)], clock.perf_counter()
    for number, batch in enumerate(batches):
        begin = clock.perf_counter() - start
        clock.sleep(step_s)
        spans.append(Span("train", number, begin, clock.perf_counter() - start))
        kept.append(batch)
    return Timeline(("train",), tuple(spans))


def _need_batches(work: Work, epoch: int, batches: list[Any]) -> None:
    if len(batches) != work.batches or not all(isinstance(one, Tensor) for one in batches):
        raise RefusedError(f"epoch {epoch} must give {work.batches} batches, all of them tensors")
    for number, batch in enumerate(batches):
        wanted = work.batch(epoch, number)
        if batch.shape != wanted.shape or not torch.allclose(batch.double(), wanted.double()):
            raise RefusedError(f"epoch {epoch}: batch {number} is not the one that work gives")


TASK = Task(
    id="03",
    goal="the step waits at most 20% of its time, for the same batches",
    offered={
        "decoding": decoding,
        "scans": scans,
        "far away": far_away,
        "by hand": by_hand,
    },
    own="a Work(load, augment, batches)",
    measure=_measure,
    rubric=(
        "which stage the step waited for, and whether that stage computed or waited itself",
        "what is done once, what is done meanwhile, and why the batches are still the same",
        "what would have to change for the step to wait again: more images, less memory, a faster "
        "step",
    ),
    explanation="Loading took longer than the step and came before it, so the step waited for both "
    "in turn. What is the same in every epoch is now loaded once, and the random part of the next "
    "batch is made while the step computes, with the same seed as before. The images fit into "
    "memory here; with more of them they would have to be kept small on disk, and a step twice as "
    "fast would need twice the work to be hidden.",
    solution=loader,
)
