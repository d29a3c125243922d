"""Exercises of notebook 03: stages, batches, normalisation, flips, the centre crop."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from dlhelpers.exercises import Case, Exercise

__all__ = ["EXERCISES"]


def batch_time(times: Sequence[float], overlap: bool) -> float:
    """Return the time for each batch of many: the slowest stage where they overlap, else all."""
    return max(times) if overlap else sum(times)


def _takes(times: list[float], overlap: bool, wanted: float) -> Callable[[Any], bool]:
    return lambda f: math.isclose(f(list(times), overlap), wanted)


def batches(count: int, batch_size: int, drop_last: bool) -> int:
    """Return len() of a DataLoader: rounded down where the last, smaller batch is dropped."""
    return count // batch_size if drop_last else -(-count // batch_size)


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
            math.isclose(scale * x + shift, (x / 255 - mean) / std, abs_tol=1e-9) for x in values
        )

    return test


def flip_each(images: torch.Tensor, flags: torch.Tensor) -> torch.Tensor:
    """Return images [N, C, H, W], those mirrored left to right whose flag (bool [N]) is set."""
    return torch.where(flags[:, None, None, None], images.flip(-1), images)


def _images() -> torch.Tensor:
    return torch.arange(4 * 3 * 2 * 5).reshape(4, 3, 2, 5)


def _flips(*flags: bool) -> Callable[[Any], bool]:
    def test(f: Any) -> bool:
        found = f(_images(), torch.tensor(flags))
        wanted = [
            image.flip(-1) if flag else image for image, flag in zip(_images(), flags, strict=True)
        ]
        return found.shape == (4, 3, 2, 5) and torch.equal(found, torch.stack(wanted))

    return test


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
        title="Who decides (predict, then run)",
        task="Write batch_time(times, overlap): the time for each batch, once the pipeline runs.",
        cases=(
            Case(
                "one after the other",
                "20, 5 and 10 ms without overlap: each batch takes all of them, 35 ms",
                _takes([20.0, 5.0, 10.0], False, 35.0),
            ),
            Case(
                "side by side",
                "20, 5 and 10 ms with overlap: every 20 ms a batch leaves the slowest stage, and "
                "the others wait for it",
                _takes([20.0, 5.0, 10.0], True, 20.0),
            ),
            Case(
                "the last one is the slowest",
                "5, 10 and 20 ms with overlap: the slowest decides, wherever it stands",
                _takes([5.0, 10.0, 20.0], True, 20.0),
            ),
            Case("a single stage", "there is nothing to overlap with", _takes([7.0], True, 7.0)),
        ),
        hints=(
            "Without overlap a batch goes through all stages before the next one begins.",
            "With overlap it is max(times), without sum(times).",
        ),
        solution=batch_time,
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
        ),
        hints=(
            "// rounds down. What rounds up?",
            "-(-count // batch_size) rounds up; math.ceil(count / batch_size) does too.",
        ),
        solution=batches,
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
        ),
        hints=(
            "Multiply (x / 255 - mean) / std out.",
            "x stands in x / (255 * std); the rest does not depend on x.",
        ),
        solution=scale_and_shift,
    ),
    Exercise(
        id="03.4",
        title="Flip each image by its own draw",
        task="Write flip_each(images, flags): mirror the images whose flag is set, left to right.",
        cases=(
            Case(
                "all",
                "all four flags are set: every image is mirrored left to right, that is along the "
                "last dimension",
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
        ),
        hints=(
            "images.flip(-1) mirrors all of them; torch.where chooses.",
            "flags has the shape [N]; flags[:, None, None, None] fits images [N, C, H, W].",
        ),
        solution=flip_each,
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
        ),
        hints=(
            "Which side is the shorter one? It becomes `shorter`, the other keeps the ratio.",
            "side * shorter // min(height, width), for both sides.",
        ),
        solution=resized,
    ),
)
