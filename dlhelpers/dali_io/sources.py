"""Where do the encoded images come from: a folder, a list of files, or a database?"""

from __future__ import annotations

import importlib.util
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dlhelpers.extras import install_hint, need
from dlhelpers.lmdb_io import LMDBDataset, load_decoder
from dlhelpers.lmdb_io.encoding import jpeg_size

__all__ = [
    "Files",
    "ImageError",
    "Records",
    "Source",
    "encoded_size",
    "has_dali",
    "open_source",
    "require_dali",
]

_HEADER = 4096  # bytes of a file in which nearly every JPEG tells its size


class ImageError(ValueError):
    """Images that cannot be read or decoded; says which and why.

    Attributes:
        images: (name, reason) of each.
    """

    def __init__(self, images: Sequence[tuple[str, str]]) -> None:
        self.images = tuple(images)
        listed = "; ".join(f"{name} ({why})" for name, why in self.images[:5])
        more = f" and {len(self.images) - 5} more" if len(self.images) > 5 else ""
        super().__init__(
            f"{len(self.images)} image(s) cannot be read: {listed}{more}. Mend or remove them, or "
            'leave them out with DALILoader(..., on_error="skip")'
        )


class Source(Protocol):
    """Encoded images by index.

    Attributes:
        kind: what is read: ``paths`` (DALI opens the files), ``bytes`` (encoded images), each uint8
            [B], or ``pixels`` (uint8 [H, W, 3]).
        targets: int64 [N].
        classes: names of the classes, or None.
    """

    kind: str
    targets: np.ndarray
    classes: list[str] | None

    def name(self, index: int) -> str:
        """Return what the reader knows an image by."""

    def read(self, indices: Sequence[int]) -> tuple[list[np.ndarray], np.ndarray]:
        """Return some images, one array each, and their sizes int [N, 2], (height, width).

        Called by several threads.
        """

    def encoded(self, index: int) -> bytes | None:
        """Return the encoded bytes of an image, None where it is stored decoded."""


class Files:
    """Files with targets. DALI reads them; here their headers are read, once, for the sizes."""

    kind = "paths"

    def __init__(self, samples: Sequence[tuple[Any, Any]], classes: list[str] | None) -> None:
        self._paths = [os.path.abspath(os.fspath(path)) for path, _ in samples]
        self.classes = classes
        self.targets = _as_targets([target for _, target in samples])
        self._sizes = np.zeros((len(samples), 2), dtype=np.int32)  # 0 until the header was read

    def name(self, index: int) -> str:
        """Return the path."""
        return self._paths[index]

    def read(self, indices: Sequence[int]) -> tuple[list[np.ndarray], np.ndarray]:
        """Return the paths as bytes, and the sizes."""
        for index in indices:
            if not self._sizes[index, 0]:
                self._sizes[index] = _file_size(self._paths[index])
        paths = [np.frombuffer(os.fsencode(self._paths[i]), np.uint8) for i in indices]
        return paths, self._sizes[list(indices)]

    def encoded(self, index: int) -> bytes:
        """Return the bytes of the file."""
        return Path(self._paths[index]).read_bytes()


class Records:
    """The images of a database that ``write_lmdb`` has written, as they are stored."""

    def __init__(self, dataset: LMDBDataset) -> None:
        self._dataset = LMDBDataset(dataset.path, decode=None, checksum=dataset.checksum)
        self._decode, self.classes = load_decoder("auto"), dataset.classes
        self.targets = _as_targets(dataset.targets)
        stored, _ = self._dataset[0]
        self.kind = "pixels" if stored.startswith(b"RAW\0") else "bytes"

    def name(self, index: int) -> str:
        """Return path, position and source key."""
        return f"{self._dataset.path}, record {index}, key {self._dataset.samples[index][0]!r}"

    def read(self, indices: Sequence[int]) -> tuple[list[np.ndarray], np.ndarray]:
        """Return the stored bytes, or pixels where those are stored, and the sizes."""
        stored = [image for image, _ in self._dataset.__getitems__(indices)]
        if self.kind == "pixels":
            images = [self._decode(image) for image in stored]
            return images, np.array([image.shape[:2] for image in images])
        images = [np.frombuffer(image, np.uint8) for image in stored]
        return images, np.array([encoded_size(image) for image in stored])

    def encoded(self, index: int) -> bytes | None:
        """Return the stored bytes; None for pixels."""
        return self._dataset[index][0] if self.kind == "bytes" else None


def open_source(source: Any) -> Source:
    """Return the source that a user has given; see ``image_pipeline``.

    Raises:
        FileNotFoundError: there is no such folder, or no image in it.
        TypeError, ValueError: it is nothing that can be read; targets are no whole numbers.
    """
    for name in ("transform", "target_transform"):
        if getattr(source, name, None) is not None:
            raise ValueError(
                f"the {type(source).__name__} has {name}={getattr(source, name)!r}, which DALI "
                f"would not run: give one without it, or its .samples"
            )
    if isinstance(source, LMDBDataset):
        return Records(source)
    if isinstance(source, str | os.PathLike):
        return Files(*_folder(Path(source).expanduser()))
    samples = getattr(source, "samples", source)
    if not isinstance(samples, Sequence) or isinstance(samples, bytes):
        raise TypeError(
            f"source is of type {type(source).__name__}; expected were a folder with one folder "
            "for each class, a list of (path, target), an ImageFolder or an LMDBDataset (for a "
            "Subset: [folder.samples[i] for i in subset.indices])"
        )
    if not samples:
        raise ValueError("source is an empty list: give (path, target) of one image at least")
    for number, sample in enumerate(samples):
        if not isinstance(sample, Sequence) or isinstance(sample, str) or len(sample) != 2:
            raise ValueError(
                f"source[{number}] is {sample!r}, expected was (path, target), such as "
                '("photos/cat/1.jpg", 0)'
            )
    return Files(samples, getattr(source, "classes", None))


def _folder(root: Path) -> tuple[list[tuple[str, int]], list[str]]:
    if not root.is_dir():
        kind = "a file" if root.exists() else "not there"
        wanted = "LMDBDataset(PATH)" if root.suffix in (".lmdb", ".mdb") else "a folder of images"
        raise FileNotFoundError(f"{root} is {kind}: give {wanted}")
    try:
        folder = need("torchvision.datasets", "an image folder").ImageFolder(root)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}: give a folder with one folder for each class") from None
    return folder.samples, folder.classes


def _file_size(path: str) -> tuple[int, int]:
    """Return (height, width) from a file's header."""
    with open(path, "rb", buffering=0) as file:
        head = file.read(_HEADER)
        if len(head) == _HEADER and jpeg_size(head) is None:
            head += file.read()  # a large thumbnail stands before the size, or it is no JPEG
    return encoded_size(head)


def encoded_size(data: bytes) -> tuple[int, int]:
    """Return (height, width) from an encoded image's header.

    Raises:
        ValueError: it is no image that Pillow knows, or one without pixels.
    """
    if (size := jpeg_size(data)) is not None:
        if 0 in size:
            raise ValueError(f"a JPEG whose header says {size[0]} x {size[1]} pixels")
        return size
    pil = need("PIL.Image", "an image that is no JPEG")
    try:
        width, height = pil.open(io.BytesIO(data)).size
    except pil.UnidentifiedImageError:
        what = f"{len(data)} bytes starting with {bytes(data[:8])!r}" if data else "no bytes at all"
        raise ValueError(f"not an image that is known ({what})") from None
    return height, width


def _as_targets(targets: Sequence[Any]) -> np.ndarray:
    wrong = next((t for t in targets if not isinstance(t, int | np.integer)), None)
    if wrong is not None:
        raise ValueError(
            f"targets must be whole numbers, the indices of classes, got {wrong!r}: map them, for "
            "example by {name: n for n, name in enumerate(sorted(set(names)))}"
        )
    return np.asarray(targets, dtype=np.int64)


def has_dali() -> bool:
    """Whether DALI is installed; it is not imported."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:
        return False


def require_dali() -> None:
    """Raise where DALI is missing.

    Raises:
        ImportError: says what to install, or what to use instead.
    """
    if has_dali():
        return
    instead = (
        "torchvision runs the same pipeline everywhere: "
        "ImageFolder(folder, dali_io.torchvision_transform(size, train)) in a DataLoader"
    )
    if sys.platform != "linux":
        raise ImportError(f"NVIDIA DALI exists for Linux only, this is {sys.platform}. {instead}")
    raise ImportError(
        f"NVIDIA DALI is not installed: {install_hint('nvidia.dali')} (no GPU needed). {instead}"
    )
