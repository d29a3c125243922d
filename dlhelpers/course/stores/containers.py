"""Seven containers of encoded images behind one face."""

from __future__ import annotations

import io
import itertools
import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dlhelpers.course.stores.pagecache import files_of
from dlhelpers.extras import install_hint

__all__ = ["STORES", "Store", "installed", "make_store"]


class Store:
    """Encoded images in one kind of container.

    Attributes:
        name: of the kind.
        package: what must be installed to use it; empty for nothing beyond this package's needs.
        only_in_order: whether it can only be read from its beginning.
        suffix: of its file; empty for a folder.
        path: the file or folder.
    """

    name: str
    package = ""
    only_in_order = False
    suffix = ""

    def __init__(self, path: Path, count: int) -> None:
        self.path, self._count = path, count

    @classmethod
    def write(cls, path: Path, images: Sequence[bytes], targets: Sequence[int]) -> None:
        """Write the images in their order."""
        raise NotImplementedError

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> bytes:
        """Return the encoded image of an index.

        Raises:
            IndexError: there is no such image.
            TypeError: the container can only be read in order.
        """
        return self.read(self.open(index))

    def __iter__(self) -> Iterator[bytes]:
        return map(self.__getitem__, range(len(self)))

    def open(self, index: int) -> Any:
        """Return whatever :meth:`read` needs; the first of the four stages."""
        if self.only_in_order:
            raise TypeError(f"{self.name} can only be read in order: iterate over the store")
        if not -self._count <= index < self._count:
            raise IndexError(f"index {index} is out of range, {self.name} has {self._count} images")
        return index % self._count

    def read(self, opened: Any) -> bytes:
        """Return the encoded image; the second stage."""
        raise NotImplementedError

    def reopened(self) -> Store:
        """Return the same container opened anew, with nothing of it mapped into memory yet."""
        return type(self)(self.path, len(self))

    @property
    def stored_bytes(self) -> int:
        """Bytes of all its files."""
        return sum(file.stat().st_size for file in files_of(self.path))


def installed() -> tuple[str, ...]:
    """Return the names of the stores whose packages are here.

    >>> installed()[:3]
    ('files', 'lmdb', 'memmap')
    """
    return tuple(n for n, kind in STORES.items() if not kind.package or find_spec(kind.package))


def make_store(
    name: str, images: Sequence[bytes], targets: Sequence[int], folder: str | os.PathLike[str]
) -> Store:
    """Write images into a container in ``folder`` and open it; one that is there is replaced.

    Args:
        name: one of :data:`STORES`.
        images: encoded, one after the other.
        targets: their classes.
        folder: where the container shall lie.

    Raises:
        ValueError: there is no such container, or the lengths differ.
        ImportError: its package is not installed.

    >>> import tempfile
    >>> store = make_store("memmap", [b"one", b"three"], [0, 1], tempfile.mkdtemp())
    >>> len(store), store[1]
    (2, b'three')
    """
    if name not in STORES:
        raise ValueError(f"there is no store {name!r}; there are {', '.join(STORES)}")
    if len(images) != len(targets):
        raise ValueError(f"{len(images)} images and {len(targets)} targets do not belong together")
    kind = STORES[name]
    path = Path(folder) / f"{name}{kind.suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        kind.write(path, images, targets)
        return kind(path, len(images))
    except ImportError as error:
        raise ImportError(
            f"the store {name!r} needs {kind.package} ({error}): {install_hint(kind.package)}"
        ) from None


_FILES = f"*/{'[0-9]' * 7}.jpg"  # what the store of files has written, and nothing else


class _Files(Store):
    name, suffix = "files", ""

    @classmethod
    def write(cls, path: Path, images: Sequence[bytes], targets: Sequence[int]) -> None:
        for old in sorted(path.glob(_FILES)):
            old.unlink()
            with suppress(OSError):  # the class has more files
                old.parent.rmdir()
        for number, (image, target) in enumerate(zip(images, targets, strict=True)):
            folder = path / f"{target}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number:07d}.jpg").write_bytes(image)

    def __init__(self, path: Path, count: int) -> None:
        super().__init__(path, count)
        self._paths = sorted(map(str, path.glob(_FILES)), key=os.path.basename)

    def open(self, index: int) -> Any:
        return open(self._paths[super().open(index)], "rb")

    def read(self, opened: Any) -> bytes:
        with opened:
            return opened.read()


class _Lmdb(Store):
    name, suffix = "lmdb", ".lmdb"

    @classmethod
    def write(cls, path: Path, images: Sequence[bytes], targets: Sequence[int]) -> None:
        from dlhelpers.lmdb_io import write_lmdb

        items = [(f"{n:07d}", i, t) for n, (i, t) in enumerate(zip(images, targets, strict=True))]
        write_lmdb(items, path, progress=False)

    def __init__(self, path: Path, count: int) -> None:
        from dlhelpers.lmdb_io import LMDBDataset

        super().__init__(path, count)
        self._dataset = LMDBDataset(path, decode=None)

    def read(self, opened: Any) -> bytes:
        return self._dataset[opened][0]


class _Memmap(Store):
    name, suffix = "memmap", ".npy"

    @classmethod
    def write(cls, path: Path, images: Sequence[bytes], targets: Sequence[int]) -> None:
        np.save(path, np.frombuffer(b"".join(images), np.uint8))
        ends = [0, *itertools.accumulate(map(len, images))]
        np.save(path.with_suffix(".ends.npy"), np.array(ends))

    def __init__(self, path: Path, count: int) -> None:
        super().__init__(path, count)
        self._bytes = np.load(path, mmap_mode="r")
        self._ends = np.load(path.with_suffix(".ends.npy")).tolist()

    def read(self, opened: Any) -> bytes:
        return self._bytes[self._ends[opened] : self._ends[opened + 1]].tobytes()


class _Hdf5(Store):
    name, suffix, package = "hdf5", ".h5", "h5py"

    @classmethod
    def write(cls, path: Path, images: Sequence[bytes], targets: Sequence[int]) -> None:
        import h5py

        with h5py.File(path, "w") as file:
            kind = h5py.vlen_dtype(np.uint8)
            stored = file.create_dataset("images", len(images), dtype=kind)
            for number, image in enumerate(images):
                stored[number] = np.frombuffer(image, np.uint8)
            file["targets"] = np.array(targets)

    def __init__(self, path: Path, count: int) -> None:
        import h5py

        super().__init__(path, count)
        self._images = h5py.File(path)["images"]

    def read(self, opened: Any) -> bytes:
        return self._images[opened].tobytes()


class _Pth(Store):
    name, suffix = "pth", ".pth"

    @classmethod
    def write(cls, path: Path, images: Sequence[bytes], targets: Sequence[int]) -> None:
        tensors = [torch.frombuffer(bytearray(image), dtype=torch.uint8) for image in images]
        torch.save({"images": tensors, "targets": torch.tensor(targets)}, path)

    def __init__(self, path: Path, count: int) -> None:
        super().__init__(path, count)
        self._images = torch.load(path, mmap=True)["images"]

    def read(self, opened: Any) -> bytes:
        return self._images[opened].numpy().tobytes()


class _TFRecord(Store):
    name, suffix, package, only_in_order = "tfrecord", ".tfrecord", "tfrecord", True

    @classmethod
    def write(cls, path: Path, images: Sequence[bytes], targets: Sequence[int]) -> None:
        from tfrecord import TFRecordWriter

        writer = TFRecordWriter(str(path))
        for image, target in zip(images, targets, strict=True):
            writer.write({"image": (image, "byte"), "target": (target, "int")})
        writer.close()

    def __init__(self, path: Path, count: int) -> None:
        import tfrecord

        super().__init__(path, count)
        self._loader = tfrecord.tfrecord_loader

    def __iter__(self) -> Iterator[bytes]:
        for row in self._loader(str(self.path), None, {"image": "byte"}):
            yield bytes(row["image"])


class _WebDataset(Store):
    name, suffix, package, only_in_order = "webdataset", ".tar", "webdataset", True

    @classmethod
    def write(cls, path: Path, images: Sequence[bytes], targets: Sequence[int]) -> None:
        with tarfile.open(path, "w") as tar:
            for number, (image, target) in enumerate(zip(images, targets, strict=True)):
                for ending, data in (("jpg", image), ("cls", b"%d" % target)):
                    entry = tarfile.TarInfo(f"{number:07d}.{ending}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))

    def __init__(self, path: Path, count: int) -> None:
        import webdataset

        super().__init__(path, count)
        self._samples = webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False)

    def __iter__(self) -> Iterator[bytes]:
        return (sample["jpg"] for sample in self._samples)


STORES: Mapping[str, type[Store]] = {
    kind.name: kind for kind in (_Files, _Lmdb, _Memmap, _Hdf5, _Pth, _TFRecord, _WebDataset)
}
