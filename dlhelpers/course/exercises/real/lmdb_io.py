"""Real exercise of notebook 02: a database for one read pattern, from images in a folder."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dlhelpers import measure
from dlhelpers.course.data import photos
from dlhelpers.course.exercises.real.tasks import (
    Reached,
    RefusedError,
    Task,
    given,
    speedup_reached,
)
from dlhelpers.lmdb_io import LMDBDataset, write_lmdb

__all__ = ["TASK"]

_GOAL = 3.0
_SIDE = 96
_COUNT = 32  # images of the pattern
_LEAST_DB = 20.0  # of peak signal to noise, on average


@cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    """Return a folder that goes when Python ends."""
    return tempfile.TemporaryDirectory(ignore_cleanup_errors=True)


def _folder(**settings: int) -> Path:
    folder = Path(tempfile.mkdtemp(dir=_scratch().name)) / "photos"
    return photos(folder, count=48, progress=False, **settings)


@cache
def photographs() -> Path:
    """Return a folder of JPEGs of 400 by 400 pixels."""
    return _folder(size=400)


@cache
def fine() -> Path:
    """Return a folder of JPEGs that are hardly compressed."""
    return _folder(size=320, quality=95)


@cache
def scans() -> Path:
    """Return a folder of PNGs."""
    from PIL import Image

    folder = _folder(size=256)
    for file in folder.rglob("*.jpg"):
        Image.open(file).save(file.with_suffix(".png"), compress_level=1)
        file.unlink()
    return folder


@cache
def grey() -> Path:
    """Return a folder of JPEGs in shades of grey."""
    from PIL import Image

    folder = _folder(size=400)
    for file in folder.rglob("*.jpg"):
        Image.open(file).convert("L").save(file, quality=90)
    return folder


class FromFolder:
    """Images of a folder, decoded and made small at each call, in the order of ImageFolder."""

    def __init__(self, folder: Path) -> None:
        from torchvision.datasets import ImageFolder

        self._images = ImageFolder(folder)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from torchvision.transforms.v2 import functional as G

        image, target = self._images[index]
        return G.resize(G.pil_to_tensor(image), [_SIDE, _SIDE], antialias=True), target


def database(folder: Path, path: Path) -> LMDBDataset:
    """Return images that were made small once, when they were written."""
    write_lmdb(folder, path, resize=(_SIDE, _SIDE), progress=False)
    return LMDBDataset(path)


def _measure(make: Callable[[], Any], answer: Callable[..., Any]) -> Reached:
    folder = Path(make())
    old = FromFolder(folder)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "images.lmdb"
        new = given(answer, folder, path)
        order = torch.randperm(len(old), generator=torch.Generator().manual_seed(0))
        order = order[:_COUNT].tolist()
        if type(new) is not LMDBDataset or new.path != path.resolve():
            raise RefusedError(
                "the answer must be an LMDBDataset of the path that is given, "
                f"got {type(new).__name__}"
            )
        _need_files(path, folder)
        _need_images(old, new, order)
        compared = measure.compare(
            lambda: [old[index] for index in order],
            lambda: [new[index] for index in order],
            threshold=_GOAL,
            budget_s=5,
        )
        return speedup_reached(
            compared,
            _GOAL,
            "profile_python([new[i] for i in order] as a function) shows what reading still does: "
            "decode, resize or look up?",
        )


def _need_files(path: Path, folder: Path) -> None:
    files = [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]
    taken = sum(one.stat().st_size for one in files)
    allowed = sum(one.stat().st_size for one in folder.rglob("*") if one.is_file())
    if taken > allowed:
        raise RefusedError(
            f"the database takes {taken:,} bytes, the folder {allowed:,}: what the pattern "
            "does not read need not be stored"
        )


def _need_images(old: FromFolder, new: Any, order: list[int]) -> None:
    if len(new) != len(old):
        raise RefusedError(f"the database has {len(new)} images, the folder {len(old)}")
    errors = []
    for index in order:
        (wanted, target), (found, its) = old[index], new[index]
        if not isinstance(found, Tensor) or found.dtype != torch.uint8:
            raise RefusedError(f"image {index} must be a uint8 tensor, got {type(found).__name__}")
        if found.shape != wanted.shape:
            raise RefusedError(f"image {index} is {list(found.shape)}, not {list(wanted.shape)}")
        if int(its) != target:
            raise RefusedError(f"image {index} has class {its}, in the folder it has {target}")
        errors.append((found.double() - wanted.double()).square().mean())
    noise_db = float(10 * torch.log10(255**2 / torch.stack(errors).mean().clamp_min(1e-9)))
    if noise_db < _LEAST_DB:
        raise RefusedError(
            f"the images are not those of the folder ({noise_db:.0f} dB of peak signal to noise, "
            f"{_LEAST_DB:g} are asked for): compare one of them side by side"
        )


TASK = Task(
    id="02",
    goal="at least 3 times as fast as the folder, in no more bytes",
    offered={"photographs": photographs, "fine": fine, "scans": scans, "grey": grey},
    own="the path of a folder of images, one folder per class",
    measure=_measure,
    rubric=(
        "how the time of one image divided into opening, reading, decoding and resizing",
        "which of these the database removes, and which it does once instead of at each read",
        "what was given up: pixels, another size later, or time to convert",
    ),
    explanation="Nearly all of the time went into decoding large images and making them small, and "
    "hardly any into opening and reading files. The database holds them small already, so a read "
    "decodes only the pixels that are used. It was paid with the large images, which another "
    "training size would need, and with decoding all of them once.",
    solution=database,
)
