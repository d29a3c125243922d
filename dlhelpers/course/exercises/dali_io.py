"""Exercises of notebook 03: stages, batches, normalisation, flips, the centre crop."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from dlhelpers.course.exercises import Case, Exercise
from dlhelpers.course.exercises.watching import unseen, whole
from dlhelpers.dali_io.loader import count_batches
from dlhelpers.stages import predict_stages

__all__ = ["EXERCISES"]


def total_time(times: Sequence[float], batches: int, overlap: bool) -> float:
    """Return the time until the last batch has left the last stage.

    Side by side, the first batch goes through all stages, and then one leaves the slowest stage
    every max(times); one after the other, each takes the sum.
    """
    if overlap:
        return sum(times) + (batches - 1) * max(times)
    return batches * sum(times)


def _takes(times: list[float], batches: int, overlap: bool) -> Callable[[Any], bool]:
    def test(f: Any) -> bool:
        stages = {str(place): time for place, time in enumerate(times)}
        line = predict_stages(stages, batches=batches, depth=2 * overlap)
        return math.isclose(f(list(times), batches, overlap), line.total_s)

    return test


def _counts(*rows: tuple[int, int, bool, int]) -> Callable[[Any], bool]:
    return lambda f: all(f(*row[:3]) == row[3] for row in rows)


def scale_and_shift(mean: float, std: float) -> tuple[float, float]:
    """Return (scale, shift) for which ``scale * x + shift`` normalises a pixel x of 0 to 255.

    (x / 255 - mean) / std, multiplied out.
    """
    return 1 / (255 * std), -mean / std


def _normalises(mean: float, std: float, *values: float) -> Callable[[Any], bool]:
    def test(f: Any) -> bool:
        scale, shift = f(mean, std)
        return all(
            math.isclose(scale * x + shift, (x / 255 - mean) / std, rel_tol=1e-5, abs_tol=1e-5)
            for x in values
        )

    return test


def flip_each(images: torch.Tensor, flags: torch.Tensor) -> torch.Tensor:
    """Return images [N, C, H, W], those mirrored left to right whose flag (bool [N]) is set."""
    return torch.where(flags[:, None, None, None], images.flip(-1), images)


def _images() -> torch.Tensor:
    return torch.arange(4 * 3 * 2 * 5).reshape(4, 3, 2, 5)


def _flips(*flags: bool) -> Callable[[Any], bool]:
    def test(f: Any) -> bool:
        found = f(_images(), torch.tensor(flags)).to(torch.int64)
        wanted = [
            image.flip(-1) if flag else image for image, flag in zip(_images(), flags, strict=True)
        ]
        return found.shape == (4, 3, 2, 5) and torch.equal(found, torch.stack(wanted))

    return test


def _keeps_the_type(f: Any) -> bool:
    flags = torch.tensor([True, False, True, False])
    return f(_images().to(torch.uint8), flags).dtype == torch.uint8


def _leaves_the_input(f: Any) -> bool:
    images = _images()
    f(images, torch.tensor([True, True, False, False]))
    return torch.equal(images, _images())


def resized(height: int, width: int, shorter: int) -> tuple[int, int]:
    """Return (height, width) after torchvision's Resize(shorter): the longer side rounded down."""
    least = min(height, width)
    return height * shorter // least, width * shorter // least


def _sizes(height: int, width: int, shorter: int) -> Callable[[Any], bool]:
    def test(f: Any) -> bool:
        from torchvision.transforms.v2 import functional

        image = torch.empty(1, height, width, device="meta")
        return tuple(f(height, width, shorter)) == functional.resize(image, [shorter]).shape[-2:]

    return test


EXERCISES = (
    Exercise(
        id="03.1",
        title="How long it takes (predict, then run)",
        task="Write total_time(times, batches, overlap): until the last batch has been trained on.",
        cases=(
            Case(
                "one after the other",
                "stages of 20, 5 and 10 units without overlap, 4 batches: each batch goes through "
                "all of them before the next one begins, 35 units each",
                _takes([20.0, 5.0, 10.0], 4, False),
            ),
            Case(
                "a single batch",
                "one batch has nothing to overlap with: it takes all stages, also with overlap",
                _takes([20.0, 5.0, 10.0], 1, True),
            ),
            Case(
                "the slowest stage is the first",
                "20, 5 and 10 units with overlap, 4 batches: the first batch takes 35, and after "
                "it one arrives every 20 units",
                _takes([20.0, 5.0, 10.0], 4, True),
            ),
            Case(
                "the slowest stage is the last",
                "5, 10 and 20 units with overlap: the slowest stage decides, wherever it is",
                _takes([5.0, 10.0, 20.0], 7, True),
            ),
            Case(
                "the slowest stage is in the middle",
                "5, 20 and 10 units with overlap: neither the first nor the last stage is the "
                "slowest one; compare all of them",
                _takes([5.0, 20.0, 10.0], 3, True),
            ),
            unseen(
                _takes([3.0, 8.0], 5, True),
                _takes([1.0, 2.0, 4.0, 3.0], 9, True),
                _takes([1.0, 2.0, 4.0, 3.0], 9, False),
            ),
        ),
        hints=(
            "When does the first batch arrive? And how long after it the second one?",
            "With overlap two terms: what fills the pipeline, once, and what the slowest stage "
            "takes per batch after the first.",
        ),
        solution=total_time,
        by_hand=("dlhelpers.*",),
    ),
    Exercise(
        id="03.2",
        title="How many batches",
        task="Write batches(count, batch_size, drop_last): what len() of a DataLoader says.",
        cases=(
            Case(
                "an even number",
                "8 images in batches of 4 are 2, dropped or not",
                _counts((8, 4, False, 2), (8, 4, True, 2)),
            ),
            Case(
                "a rest",
                "9 images in batches of 4 are 3 batches, the last with one image",
                _counts((9, 4, False, 3), (5, 4, False, 2)),
            ),
            Case(
                "a rest is dropped",
                "9 images in batches of 4, drop_last=True: 2 batches",
                _counts((9, 4, True, 2), (11, 4, True, 2)),
            ),
            Case(
                "fewer than a batch",
                "3 images in batches of 4: one batch, or none where the last is dropped",
                _counts((3, 4, False, 1), (3, 4, True, 0)),
            ),
            whole(9, 4, False),
            unseen(
                _counts((60_000, 128, False, 469), (60_000, 128, True, 468), (1, 1, True, 1)),
                _counts((0, 8, False, 0), (13, 5, True, 2), (14, 7, False, 2)),
            ),
        ),
        hints=(
            "// rounds down. When is that right, and when is a batch missing?",
            "Round up where the rest makes a batch: math.ceil, or add batch_size - 1 before //.",
        ),
        solution=count_batches,
        by_hand=("dlhelpers.*", "torch.utils.data.*"),
    ),
    Exercise(
        id="03.3",
        title="Normalise pixels in one pass",
        task="Write scale_and_shift(mean, std): scale * x + shift normalises a pixel of 0 to 255.",
        cases=(
            Case(
                "black",
                "a pixel of 0 becomes (0 - mean) / std: that is the shift",
                _normalises(0.485, 0.229, 0.0),
            ),
            Case(
                "white",
                "a pixel of 255 is 1 once it is scaled, and becomes (1 - mean) / std: the 255 "
                "belongs to the scale alone",
                _normalises(0.485, 0.229, 0.0, 255.0),
            ),
            Case(
                "another channel",
                "another mean and std: nothing of ImageNet may be built in",
                _normalises(0.1, 0.5, 0.0, 100.0, 255.0),
            ),
            unseen(_normalises(0.3, 0.25, 0.0, 64.0, 255.0), _normalises(0.0, 1.0, 1.0, 200.0)),
        ),
        hints=(
            "Multiply (x / 255 - mean) / std out.",
            "x occurs in x / (255 * std) alone; the rest does not depend on x.",
        ),
        solution=scale_and_shift,
        by_hand=("dlhelpers.*",),
    ),
    Exercise(
        id="03.4",
        title="Flip each image by its own draw",
        task="Write flip_each(images, flags): mirror the images whose flag is set, left to right.",
        cases=(
            Case(
                "all",
                "all four flags are set: every image is mirrored left to right, that is along the "
                "last dimension; a mask needs the same number of dimensions as images",
                _flips(True, True, True, True),
            ),
            Case(
                "some",
                "only images 0 and 2 are to be mirrored; if flags.any() mirrors the whole batch",
                _flips(True, False, True, False),
            ),
            Case("none", "no flag is set: nothing changes", _flips(False, False, False, False)),
            Case(
                "the batch that was given",
                "the input itself was changed: return a new tensor, or clone first",
                _leaves_the_input,
            ),
            Case(
                "the type of the pixels",
                "the pixels were uint8 and came back as another type: multiplying by a mask of "
                "floats makes them floats, four times the bytes. Choose between pixels instead",
                _keeps_the_type,
            ),
            unseen(_flips(False, True, True, False), _flips(False, False, False, True)),
        ),
        hints=(
            "Make both versions of every image, and choose between them by a mask.",
            "torch.where chooses; the mask needs four dimensions, as images have: flags.view(...).",
        ),
        solution=flip_each,
        by_hand=("dlhelpers.*",),
    ),
    Exercise(
        id="03.5",
        title="The size that torchvision rounds to",
        task="Write resized(height, width, shorter): (height, width) after Resize(shorter).",
        cases=(
            Case(
                "a square",
                "both sides are the shorter one: 300 x 300 becomes 256 x 256",
                _sizes(300, 300, 256),
            ),
            Case(
                "wider than high",
                "427 x 640 with Resize(256): 640 * 256 / 427 = 383.7 becomes 383: torchvision "
                "rounds down, DALI's resize_shorter gives 384",
                _sizes(427, 640, 256),
            ),
            Case(
                "higher than wide",
                "now the width is the shorter side; the order stays (height, width)",
                _sizes(640, 427, 256),
            ),
            Case(
                "scaled up",
                "an image smaller than that is scaled up by the same rule",
                _sizes(100, 151, 256),
            ),
            whole(427, 640, 256),
            unseen(_sizes(375, 500, 224), _sizes(1200, 801, 232), _sizes(49, 98, 31)),
        ),
        hints=(
            "The shorter side becomes `shorter`, the other keeps the ratio: what does torchvision "
            "do with its fraction?",
            "Both sides by one formula: side times shorter over the shorter side, rounded down.",
        ),
        solution=resized,
        by_hand=("dlhelpers.*", "torchvision.*"),
    ),
)
