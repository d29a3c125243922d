"""The same JPEG images behind every peer's own interface; benchmarks/io.py runs them.

Each reader gives (uint8 RGB tensor [3, H, W], target). Decoders hand out [H, W, 3]; their tensor
is a view of it (channels-last strides), which costs nothing. Packages are imported where they are
needed, so that one that is missing costs its own row only.

map readers      one image by its number; any order
stream readers   samples in the format's own order, through its own shuffle buffer where it has one
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import pil_to_tensor

from dlhelpers.course.stores import make_store
from dlhelpers.lmdb_io import write_lmdb

BATCH = 64
Sample = tuple[torch.Tensor, int]
Read = Callable[[int], Sample]


class Photos:
    """An image folder, its bytes, and each container of them, written when a row asks for it."""

    def __init__(self, folder: Path, work: Path) -> None:
        tree = ImageFolder(folder)
        self.folder, self.work = folder, work
        self.paths, self.targets = [path for path, _ in tree.samples], tree.targets
        self.images = [Path(path).read_bytes() for path in self.paths]
        self._streams: dict[str, Any] = {}
        work.mkdir(parents=True, exist_ok=True)

    def __len__(self) -> int:
        return len(self.paths)

    @cached_property
    def pixels(self) -> np.ndarray:
        """What PIL decodes: uint8 [N, H, W, 3]; every row is compared with it."""
        return np.stack([np.array(Image.open(path).convert("RGB")) for path in self.paths])

    @cached_property
    def lmdb(self) -> Path:
        return write_lmdb(self.folder, self.work / "photos.lmdb", progress=False).path

    @cached_property
    def raw_lmdb(self) -> Path:
        path = self.work / "raw.lmdb"
        return write_lmdb(self.folder, path, encode="raw", workers=2, progress=False).path

    @cached_property
    def plain_lmdb(self) -> str:
        """As tutorials write it: the position is the key, the file's bytes are the value."""
        import lmdb

        path = str(self.work / "plain")
        with lmdb.open(path, map_size=1 << 33) as env, env.begin(write=True) as txn:
            for number, image in enumerate(self.images):
                txn.put(b"%08d" % number, image)
        return path

    @cached_property
    def plain_env(self) -> PerProcess:
        """Open once for all rows: LMDB forbids to open a file twice in a process."""
        import lmdb

        path = self.plain_lmdb
        return PerProcess(lambda: lmdb.open(path, readonly=True, lock=False))

    def store(self, name: str) -> Any:
        """A container of dlhelpers.course.stores, the same in every table."""
        if name not in self._streams:
            self._streams[name] = make_store(name, self.images, self.targets, self.work)
        return self._streams[name]

    def stream(self, name: str) -> Any:
        """A stream reader, made once: some allow one open dataset for each folder only."""
        if name not in self._streams:
            self._streams[name] = STREAM_READERS[name](self)
        return self._streams[name]


class PerProcess:
    """Something that must not cross a fork: made anew in each process."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make, self.pid, self.value = make, -1, None

    def __call__(self) -> Any:
        if self.pid != os.getpid():
            self.value, self.pid = self.make(), os.getpid()
        return self.value


class MapDataset(Dataset):
    """A map reader for DataLoader."""

    def __init__(self, read: Read, count: int, transform: Any = None) -> None:
        self.read, self.count, self.transform = read, count, transform

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        image, target = self.read(index)
        return (image if self.transform is None else self.transform(image)), target


def tensor(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1)


def simplejpeg_tensor(data: Any) -> torch.Tensor:
    from simplejpeg import decode_jpeg

    return tensor(decode_jpeg(data))


def pil_tensor(data: bytes) -> torch.Tensor:
    return pil_to_tensor(Image.open(io.BytesIO(data)).convert("RGB"))


def cv2_tensor(data: bytes) -> torch.Tensor:
    import cv2

    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    return tensor(pixels)


def torchvision_tensor(data: bytes) -> torch.Tensor:
    from torchvision.io import ImageReadMode, decode_jpeg

    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return decode_jpeg(encoded, mode=ImageReadMode.RGB)


def torchcodec_tensor(data: bytes) -> torch.Tensor:
    from torchcodec.decoders import decode_image

    return decode_image(data)


# ---- map readers ----


def read_file(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def folder_pil(photos: Photos) -> Read:
    return ImageFolder(photos.folder, transform=pil_to_tensor).__getitem__


def folder_decode_jpeg(photos: Photos) -> Read:
    from torchvision.io import ImageReadMode, decode_jpeg, read_file

    paths, targets = photos.paths, photos.targets
    return lambda i: (decode_jpeg(read_file(paths[i]), mode=ImageReadMode.RGB), targets[i])


def folder_decode_image(photos: Photos) -> Read:
    from torchvision.io import ImageReadMode, decode_image

    paths, targets = photos.paths, photos.targets
    return lambda i: (decode_image(paths[i], mode=ImageReadMode.RGB), targets[i])


def folder_cv2(photos: Photos) -> Read:
    import cv2

    paths, targets = photos.paths, photos.targets
    return lambda i: (tensor(cv2.imread(paths[i], cv2.IMREAD_COLOR_RGB)), targets[i])


def folder_simplejpeg(photos: Photos) -> Read:
    paths, targets = photos.paths, photos.targets
    return lambda i: (simplejpeg_tensor(read_file(paths[i])), targets[i])


def folder_spdl(photos: Photos) -> Read:
    import spdl.io

    paths, targets = photos.paths, photos.targets
    load, to_torch = spdl.io.load_image, spdl.io.to_torch
    load(paths[0])  # says at once that FFmpeg's libraries are missing
    return lambda i: (to_torch(load(read_file(paths[i]))).permute(2, 0, 1), targets[i])


def plain_lmdb(decode: Callable[[bytes], torch.Tensor]) -> Callable[[Photos], Read]:
    def make(photos: Photos) -> Read:
        env, targets = photos.plain_env, photos.targets

        def read(i: int) -> Sample:
            with env().begin() as txn:
                data = txn.get(b"%08d" % i)
            return decode(data), targets[i]

        return read

    return make


def store_simplejpeg(name: str) -> Callable[[Photos], Read]:
    def make(photos: Photos) -> Read:
        written, targets = photos.store(name), photos.targets
        opened = PerProcess(lambda: type(written)(written.path, len(written)))
        return lambda i: (simplejpeg_tensor(opened()[i]), targets[i])

    return make


MAP_READERS: dict[str, Callable[[Photos], Read]] = {
    "image folder, PIL (ImageFolder)": folder_pil,
    "image folder, decode_jpeg": folder_decode_jpeg,
    "image folder, decode_image": folder_decode_image,
    "image folder, cv2.imread": folder_cv2,
    "image folder, simplejpeg": folder_simplejpeg,
    "image folder, SPDL load_image": folder_spdl,
    "plain py-lmdb, PIL": plain_lmdb(pil_tensor),
    "plain py-lmdb, OpenCV": plain_lmdb(cv2_tensor),
    "plain py-lmdb, simplejpeg": plain_lmdb(simplejpeg_tensor),
    "np.memmap, simplejpeg": store_simplejpeg("memmap"),
    "HDF5, simplejpeg": store_simplejpeg("hdf5"),
}


# ---- stream readers ----


def webdataset(decode: str) -> Callable[[Photos], Iterable[Sample]]:
    """Two tar shards, a shuffle buffer of 1,000 encoded images, its own pipeline."""

    def make(photos: Photos) -> Iterable[Sample]:
        import webdataset as wds

        shards = str(photos.work / "web-%d.tar")
        with wds.ShardWriter(shards, maxcount=-(-len(photos) // 2), verbose=0) as writer:
            for number, image in enumerate(photos.images):
                key, target = f"{number:07d}", photos.targets[number]
                writer.write({"__key__": key, "jpg": image, "cls": target})
        urls = [shards % number for number in range(2)]
        samples = wds.WebDataset(urls, shardshuffle=2, empty_check=False).shuffle(1000)
        if decode == "simplejpeg":
            first = simplejpeg_tensor
            return samples.to_tuple("jpg", "cls").map_tuple(first, int)
        first = pil_to_tensor if decode == "pil" else tensor
        return samples.decode(decode).to_tuple("jpg", "cls").map_tuple(first, int)

    return make


def tfrecord(photos: Photos) -> Iterable[Sample]:
    """One file with its index, a shuffle buffer of 1,000 encoded images."""
    from tfrecord.tools.tfrecord2idx import create_index
    from tfrecord.torch.dataset import TFRecordDataset

    path = str(photos.store("tfrecord").path)
    create_index(path, f"{path}.index")

    def sample(row: dict[str, Any]) -> Sample:
        return simplejpeg_tensor(bytes(row["image"])), int(row["target"][0])

    kinds = {"image": "byte", "target": "int"}
    return TFRecordDataset(path, f"{path}.index", kinds, 1000, sample)


def mosaic(encoding: str) -> Callable[[Photos], Iterable[Sample]]:
    """MDS shards of 64 MB, its own shuffle."""

    def make(photos: Photos) -> Iterable[Sample]:
        from streaming import MDSWriter, StreamingDataset
        from streaming.base.util import clean_stale_shared_memory

        path = str(photos.work / f"mds-{encoding}")
        with MDSWriter(out=path, columns={"image": encoding, "target": "int"}) as writer:
            for source, image, target in zip(
                photos.paths, photos.images, photos.targets, strict=True
            ):
                writer.write(
                    {"image": Image.open(source) if encoding == "jpeg" else image, "target": target}
                )

        class Mosaic(StreamingDataset):
            def __getitem__(self, index: Any) -> Sample:
                row = super().__getitem__(index)
                decode = pil_to_tensor if encoding == "jpeg" else simplejpeg_tensor
                return decode(row["image"]), row["target"]

        clean_stale_shared_memory()
        return Mosaic(local=path, shuffle=True, batch_size=BATCH)

    return make


def litdata(kind: str) -> Callable[[Photos], Iterable[Sample]]:
    """Chunks of 64 MB, its own shuffle; "jpeg" is its own decoder (torchvision's)."""

    def make(photos: Photos) -> Iterable[Sample]:
        from litdata import StreamingDataset
        from litdata.streaming.writer import BinaryWriter

        path = photos.work / f"lit-{kind}"
        path.mkdir()
        writer = BinaryWriter(str(path), chunk_bytes="64MB")
        for number, target in enumerate(photos.targets):
            image = Image.open(photos.paths[number]) if kind == "jpeg" else photos.images[number]
            writer.add_item(number, (image, target))
        writer.done()
        writer.merge()

        def own(row: Any) -> Sample:
            return row[0], row[1]

        def with_simplejpeg(row: Any) -> Sample:
            return simplejpeg_tensor(row[0]), row[1]

        decode = own if kind == "jpeg" else with_simplejpeg
        return StreamingDataset(str(path), shuffle=True, transform=decode)

    return make


STREAM_READERS: dict[str, Callable[[Photos], Any]] = {
    'WebDataset, decode("pil"), buffer': webdataset("pil"),
    'WebDataset, decode("rgb8"), buffer': webdataset("rgb8"),
    "WebDataset, simplejpeg, buffer": webdataset("simplejpeg"),
    "TFRecord, simplejpeg, buffer": tfrecord,
    "MosaicML Streaming, PIL, own order": mosaic("jpeg"),
    "MosaicML Streaming, simplejpeg, own": mosaic("bytes"),
    "LitData, its decoder, own order": litdata("jpeg"),
    "LitData, simplejpeg, own order": litdata("bytes"),
}


def endless(stream: Iterable[Sample]) -> Iterator[Sample]:
    while True:
        yield from stream


def stream_loader(name: str, stream: Any, workers: int) -> Any:
    """The loader that the format's own pages ask for; epochs with workers that stay."""
    options = {"batch_size": BATCH, "num_workers": workers, "persistent_workers": workers > 0}
    if name.startswith("LitData"):
        from litdata import StreamingDataLoader as Loader
    elif name.startswith("MosaicML"):
        from streaming import StreamingDataLoader as Loader
    elif name.startswith("WebDataset"):
        from webdataset import WebLoader as Loader
    else:
        from torch.utils.data import DataLoader as Loader

        assert isinstance(stream, IterableDataset)
    return Loader(stream, **options)
