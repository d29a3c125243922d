"""Which real data does a machine without a network have?

scikit-learn brings 1,797 handwritten digits of 8 x 8 pixels and two sample photographs of
427 x 640; crops of the photographs make an image folder of any size. Their sources and licences
are in data/README.md.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dlhelpers.arguments import whole_number
from dlhelpers.extras import need
from dlhelpers.files import cache_dir
from dlhelpers.progress import bar

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.data import Dataset

__all__ = [
    "cifar10",
    "data_dir",
    "digits",
    "imagenette",
    "photo_batch",
    "photos",
    "published_latencies",
    "quantization_tools",
]

_MANIFEST = "photos.json"


def data_dir() -> Path:
    """Return where data lies: ``DLHELPERS_DATA``, else the repository's data/, else the cache.

    The same from any working directory; the folder need not exist yet.
    """
    if given := os.environ.get("DLHELPERS_DATA"):
        return Path(given).expanduser().resolve()
    repository = Path(__file__).resolve().parents[2]
    if (repository / "pyproject.toml").exists():
        return repository / "data"
    return cache_dir() / "data"


def digits(split: Literal["train", "test", "all"] = "train") -> tuple[Tensor, Tensor]:
    """Return scikit-learn's handwritten digits as (images, labels).

    Args:
        split: ``train`` (1,437), ``test`` (360; the same share of each class) or ``all`` (1,797).

    Returns:
        images float32 [N, 1, 8, 8] between 0 and 1, labels int64 [N] from 0 to 9.

    Raises:
        ValueError: another split.

    Source: Alpaydin & Kaynak 1998, UCI Optical Recognition of Handwritten Digits (its test set).

    >>> images, labels = digits("test")
    >>> images.shape, labels.shape
    (torch.Size([360, 1, 8, 8]), torch.Size([360]))
    """
    import torch

    if split not in ("train", "test", "all"):
        raise ValueError(f'split must be "train", "test" or "all", got {split!r}')
    bunch = need("sklearn.datasets", "data.digits").load_digits()
    rows = list(range(len(bunch.target)))
    if split != "all":
        split_of = need("sklearn.model_selection", "data.digits").train_test_split
        parts = split_of(rows, test_size=360, stratify=bunch.target, random_state=0)
        rows = parts[0] if split == "train" else parts[1]
    images = torch.tensor(bunch.images[rows], dtype=torch.float32)[:, None] / 16
    return images, torch.tensor(bunch.target[rows], dtype=torch.int64)


def published_latencies(cpu: Literal["i7", "i9"]) -> dict[str, Any]:
    """Return a published table of image models on a CPU, a column to a name.

    Args:
        cpu: ``i9`` (i9-10940X) or ``i7`` (i7-12700H).

    Returns:
        ``model`` (names), and arrays of float64: ``seconds`` of one image, ``multiply_adds``,
        ``activations`` (elements) and ``params``. A row with an empty field is left out.

    Raises:
        ValueError: another CPU.
        FileNotFoundError: the table is not here; it comes with the repository, not the package.

    Source: huggingface/pytorch-image-models, folder results, Apache-2.0.
    """
    import csv

    import numpy as np

    if cpu not in ("i7", "i9"):
        raise ValueError(f'cpu must be "i7" or "i9", got {cpu!r}')
    with _published(f"timm_{cpu}.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if all(row.values())]
    columns = {  # of the file, and what one unit there is
        "seconds": ("infer_step_time", 1e-3),
        "multiply_adds": ("infer_gmacs", 1e9),
        "activations": ("infer_macts", 1e6),
        "params": ("param_count", 1e6),
    }
    table: dict[str, Any] = {"model": [row["model"] for row in rows]}
    for name, (column, unit) in columns.items():
        table[name] = np.array([float(row[column]) * unit for row in rows])
    return table


def quantization_tools() -> list[dict[str, str]]:
    """Return what became of the tools that the tips recommend, a row to a tool.

    Returns:
        Rows with ``tool``, ``what became of it``, ``last sign of life`` (a date or empty),
        ``successor``, ``to use it`` and ``source``; as read in November 2026.

    Raises:
        FileNotFoundError: the table is not here; it comes with the repository, not the package.
    """
    import csv

    with _published("quantization_tools.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def _published(name: str) -> Path:
    path = data_dir() / "published" / name
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing: it lies in the repository's data/published; DLHELPERS_DATA may "
            "name the folder that holds published/"
        )
    return path


def photos(
    root: str | Path,
    *,
    count: int = 5000,
    size: int = 256,
    quality: int = 90,
    seed: int = 0,
    progress: bool | None = None,
) -> Path:
    """Make an image folder of JPEG crops of real photographs; return its path.

    One class folder for each of scikit-learn's sample photographs; crops of random place and scale,
    half of them mirrored. The same settings give the same bytes with the same Pillow. The folder
    appears whole or not at all; one that exists with these settings is used as it is.

    Args:
        root: the folder to make.
        count: number of images over all classes.
        size: their height and width in pixels, 16 to 427.
        quality: of the JPEGs, 1 to 95.
        seed: of the crops.
        progress: a bar on long runs; None draws it in a terminal only.

    Raises:
        ValueError: a setting is out of range.
        FileExistsError: root holds something else; nothing in it is touched.
    """
    root = Path(root).expanduser().resolve()
    count = whole_number("count", count, 1, 10_000_000)
    size = whole_number("size", size, 16, 427)
    quality = whole_number("quality", quality, 1, 95)
    if not isinstance(seed, int):
        raise ValueError(f"seed must be a whole number, got {seed!r}")
    settings = {"count": count, "size": size, "quality": quality, "seed": seed, "version": 1}
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        _need_same(root, settings)
        return root
    sources = _photographs()
    partial = root.with_name(f".{root.name}.{os.getpid()}.part")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        for name in sources:
            (partial / name).mkdir(parents=True)
        names = sorted(sources)
        crops = random.Random(seed)
        for index in bar(range(count), progress=progress, desc="photos", unit="img"):
            name = names[index % len(names)]
            image = _crop(sources[name], size, crops)
            image.save(partial / name / f"{index:07d}.jpg", quality=quality)
        (partial / _MANIFEST).write_text(json.dumps(settings))
        if root.exists():
            root.rmdir()  # empty, as seen above
        partial.replace(root)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return root


def photo_batch(count: int = 16, size: int = 96) -> Tensor:
    """Return the pixels of :func:`photos`: float32 [count, 3, size, size] between 0 and 1.

    Raises:
        ValueError: a setting is out of range.

    >>> photo_batch(2, 32).shape
    torch.Size([2, 3, 32, 32])
    """
    import tempfile

    import torch
    from PIL import Image
    from torchvision.transforms.v2 import functional as G

    with tempfile.TemporaryDirectory() as scratch:
        folder = photos(Path(scratch) / "photos", count=count, size=size, progress=False)
        files = sorted(folder.rglob("*.jpg"))
        return torch.stack([G.to_dtype(G.pil_to_tensor(Image.open(f)), scale=True) for f in files])


def _need_same(root: Path, settings: dict[str, int]) -> None:
    try:
        found = json.loads((root / _MANIFEST).read_text())
    except (OSError, ValueError):
        found = None
    photos = len(list(root.glob("*/*.jpg"))) if found else 0
    if found == settings and photos == settings["count"]:
        return
    if found == settings:
        holds = f"holds {photos} of its {settings['count']} photos"
    elif found:
        holds = f"holds photos made with {found}"
    elif root.is_dir():
        holds = f"holds {min(entry.name for entry in root.iterdir())!r}, not made here"
    else:
        holds = "is a file"
    raise FileExistsError(
        f"{root} {holds}; wanted were {settings}: choose another folder or remove it"
    )


def _photographs() -> dict[str, Any]:
    bunch = need("sklearn.datasets", "data.photos").load_sample_images()
    pil = need("PIL.Image", "data.photos")
    return {
        Path(name).stem: pil.fromarray(pixels)
        for name, pixels in zip(bunch.filenames, bunch.images, strict=True)
    }


def _crop(photograph: Any, size: int, crops: random.Random) -> Any:
    from PIL import Image, ImageOps

    width, height = photograph.size
    side = crops.randint(min(size, height) // 2 + 1, height)
    left, top = crops.randint(0, width - side), crops.randint(0, height - side)
    image = photograph.crop((left, top, left + side, top + side))
    image = image.resize((size, size), Image.Resampling.BICUBIC)
    return ImageOps.mirror(image) if crops.random() < 0.5 else image


def cifar10(train: bool = True, **options: Any) -> Dataset:
    """Return torchvision's CIFAR-10 under :func:`data_dir`, downloaded where there is a network.

    Raises:
        RuntimeError: it is not there and cannot be downloaded; nothing half made is left.
    """
    from torchvision.datasets import CIFAR10

    return _download(CIFAR10, "cifar10", train=train, **options)


def imagenette(split: str = "train", **options: Any) -> Dataset:
    """Return torchvision's Imagenette under :func:`data_dir`, as :func:`cifar10` does."""
    from torchvision.datasets import Imagenette

    return _download(Imagenette, "imagenette", split=split, **({"size": "160px"} | options))


def _download(dataset: Any, name: str, **options: Any) -> Dataset:
    root = data_dir() / name
    before = set(root.iterdir()) if root.exists() else None
    root.mkdir(parents=True, exist_ok=True)
    found = None
    try:
        try:
            found = dataset(root, download=False, **options)  # there already
        except RuntimeError:
            found = dataset(root, download=True, **options)
        return found
    except (OSError, EOFError, RuntimeError, HTTPException) as error:
        raise RuntimeError(
            f"{dataset.__name__} is not in {root} and could not be downloaded ({error}): connect "
            "to a network and try again, or work offline with data.digits() or data.photos(DIR)"
        ) from error
    finally:
        if found is None:  # leave nothing half made
            for entry in set(root.iterdir()) - (before or set()):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            if before is None:
                root.rmdir()
