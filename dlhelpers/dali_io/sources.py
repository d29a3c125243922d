"""Where do the encoded images come from: a folder, a list of files, or a database?"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from dlhelpers.dali_io.formats import by_pillow, for_dali
from dlhelpers.extras import install_hint, need
from dlhelpers.lmdb_io import LMDBDataset, load_decoder
from dlhelpers.lmdb_io.encoding import image_format
from dlhelpers.lmdb_io.listed import Targets
from dlhelpers.lmdb_io.plain import own_reading
from dlhelpers.printable import one_line

__all__ = [
    "Files",
    "ImageError",
    "Records",
    "Source",
    "has_dali",
    "open_source",
    "require_dali",
]


class ImageError(ValueError):
    """Images that cannot be read or decoded; says which and why.

    Args:
        images: (name, reason) of each.
        all_of_them: nothing is left that can be read, so that skipping does not help.

    Attributes:
        images: as given.
    """

    def __init__(self, images: Sequence[tuple[str, str]], *, all_of_them: bool = False) -> None:
        self.images = tuple(images)
        listed = "; ".join(f"{one_line(name)} ({one_line(why)})" for name, why in self.images[:5])
        more = f" and {len(self.images) - 5} more" if len(self.images) > 5 else ""
        images_, them = ("image", "it") if len(self.images) == 1 else ("images", "them")
        advice = f'Fix or remove {them}, or skip {them} with DALILoader(..., on_error="skip")'
        if all_of_them:
            advice = "No image is left: check that the folder or database is there and readable"
        super().__init__(f"{len(self.images)} {images_} cannot be read: {listed}{more}. {advice}")


class Source:
    """Images by index, and their targets.

    Attributes:
        kind: what is read: ``bytes`` (encoded images, uint8 [B]) or ``pixels`` (uint8 [H, W, 3]).
        targets: int64 [N]; of a database, the array in the file, int32 where that is enough.
        classes: names of the classes, or None.
    """

    def __init__(self, targets: Sequence[Any], classes: list[str] | None, kind: str) -> None:
        self.targets, self.classes, self.kind = _as_targets(targets), classes, kind
        self._refused: set[int] = set()  # by DALI, although their headers promise nothing odd

    def name(self, index: int) -> str:
        """Return what the reader knows an image by."""
        raise NotImplementedError

    def stored(self, indices: Sequence[int]) -> list[bytes]:
        """Return what is stored of some images. Called by several threads, as :meth:`read`."""
        raise NotImplementedError

    def read(self, indices: Sequence[int]) -> tuple[list[np.ndarray], np.ndarray]:
        """Return some images, one array each, and their sizes int [N, 2], (height, width).

        What DALI would decode to other pixels than Pillow, Pillow decodes.
        """
        found = self.stored(indices)
        if self.kind == "pixels":
            images = [load_decoder("pil")(data) for data in found]
            return images, np.array([image.shape[:2] for image in images])
        fed = [
            by_pillow(data) if index in self._refused else for_dali(data)
            for index, data in zip(indices, found, strict=True)
        ]
        return [np.frombuffer(data, np.uint8) for data, _ in fed], np.array(
            [size for _, size in fed]
        )

    def leave_to_pillow(self, index: int) -> bool:
        """Let Pillow decode an image from now on that DALI has refused; whether that is new.

        Raises:
            Exception: Pillow cannot decode it either.
        """
        if self.kind == "pixels" or index in self._refused:
            return False
        by_pillow(self.stored([index])[0])
        self._refused.add(index)
        return True


class Files(Source):
    """Files with targets."""

    def __init__(self, samples: Sequence[tuple[Any, Any]], classes: list[str] | None) -> None:
        super().__init__([target for _, target in samples], classes, "bytes")
        self._paths = [os.path.abspath(os.fspath(path)) for path, _ in samples]

    def name(self, index: int) -> str:
        """Return the path."""
        return self._paths[index]

    def stored(self, indices: Sequence[int]) -> list[bytes]:
        """Return the bytes of the files."""
        found = []
        for index in indices:
            with open(self._paths[index], "rb", buffering=0) as file:
                found.append(file.read())
        return found


class Records(Source):
    """The images of a database that ``write_lmdb`` has written, as they are stored."""

    def __init__(self, dataset: LMDBDataset) -> None:
        self._dataset = LMDBDataset(dataset.path, decode=None, checksum=dataset.checksum)
        super().__init__(self._dataset.targets, dataset.classes, "bytes")
        with suppress(Exception):  # a damaged record is told when its batch is made
            self.kind = "pixels" if image_format(self._dataset[0][0]) == "raw" else "bytes"

    def name(self, index: int) -> str:
        """Return path, position and source key."""
        key = ""
        with suppress(Exception):  # of a database that is gone a message is wanted all the same
            key = f", key {self._dataset.samples[index][0]!r}"
        return f"{self._dataset.path}, record {index}{key}"

    def stored(self, indices: Sequence[int]) -> list[bytes]:
        """Return the stored bytes."""
        return [image for image, _ in self._dataset.__getitems__(indices)]


def open_source(source: Any, fields: Sequence[str] | None = None) -> Source:
    """Return the source that a user has given; see ``image_pipeline``.

    Raises:
        FileNotFoundError: there is no such folder, or no image in it.
        TypeError, ValueError: it is nothing that can be read; targets are no whole numbers.
    """
    if (isinstance(source, LMDBDataset) or hasattr(source, "samples")) and (
        why := own_reading(source)
    ):
        raise ValueError(
            f"the {type(source).__name__} has {why}, which DALI would not run: give a plain "
            "ImageFolder or LMDBDataset, a folder, or a list of (path, target); or store what the "
            "dataset gives with write_lmdb"
        )
    from dlhelpers.dali_io.field_records import FieldRecords, refuse_fields

    if isinstance(source, LMDBDataset) and source.fields is not None:
        return FieldRecords(source, fields)
    refuse_fields(source, fields)
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
        raise FileNotFoundError(f"{one_line(str(root))} is {kind}: give {wanted}")
    try:
        folder = need("torchvision.datasets", "an image folder").ImageFolder(root)
    except FileNotFoundError as error:
        why = one_line(str(error))
        raise FileNotFoundError(f"{why}: give a folder with one folder for each class") from None
    return folder.samples, folder.classes


def _as_targets(targets: Sequence[Any]) -> np.ndarray:
    if isinstance(targets, Targets) and (found := np.asarray(targets)).dtype.kind == "i":
        return found
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
