"""Read a database as a map-style dataset."""

from __future__ import annotations

import bisect
import itertools
import operator
import os
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import Dataset, default_collate

from dlhelpers.arguments import whole_number
from dlhelpers.lmdb_io import decoding, schema
from dlhelpers.lmdb_io.batching import BatchBuffer, Threads
from dlhelpers.lmdb_io.database_file import DatabaseFile
from dlhelpers.lmdb_io.listed import Columns, Samples, Targets
from dlhelpers.lmdb_io.raw_batches import RawBatch, transactions
from dlhelpers.lmdb_io.samples import SampleReader
from dlhelpers.lmdb_io.shards import check_shards, shard_files
from dlhelpers.printable import printable

__all__ = ["LMDBDataset"]

_RESIZES_FIRST = (
    "Resize",
    "RandomResizedCrop",
    "RandomResize",
    "ScaleJitter",
    "RandomShortestSide",
)


class LMDBDataset(Dataset):
    """Images and targets of a database that ``write_lmdb`` has written.

    ``dataset[i]`` is ``(image, target)``: a uint8 RGB tensor [3, H, W] and an int. It opens its
    file when the first image is read, again in each worker, read-only and without a lock, so that
    it can be pickled, forked and spawned, and lie in a read-only folder. A process that
    has the file open when it is replaced goes on with the old one; a worker that opens it later
    raises DatabaseError, since its images are others.

    Of a database that was written with ``fields=``, ``dataset[i]`` is the sample: a dict, tuple or
    list as the source gave it, which ``transform`` gets as a whole. Images are decoded, JPEG to
    RGB pixels, other formats in their own mode: masks to [H, W], palette indices and 16 bits as
    they are. With ``decode="pil"`` they are PIL images, with None the stored bytes.

    With ``decode="pil"`` it stands in for torchvision's ImageFolder: PIL images, ``classes``,
    ``class_to_idx``, ``targets``, and ``samples`` (with the source's keys in place of paths). The
    last two are sequences that read the file, without an object per record; of many integer
    targets, ``np.asarray(dataset.targets)`` is the fastest to compute with.

    Args:
        path: the file, or a folder of shards.
        transform: from the image to what the model gets; None for none.
        decode: ``auto`` (the fastest that is installed), ``simplejpeg``, ``opencv``,
            ``torchvision``, ``torchcodec``; ``pil`` gives PIL images; None the stored bytes.
        target_transform: from the stored target to what the loss gets; None for none.
        memory_format: of the tensor. ``auto`` is channels-last, as decoders give it, where the
            transform begins with a resize, which is fast on it, and contiguous otherwise, which
            batches are collated from fastest. Batches of ``collate`` stay as decoders give them.
        collate: ``__getitems__`` gives whole batches, (images [B, 3, H, W], targets [B]), decoded
            straight into one buffer that the next batch uses again, whichever loader asks for it:
            clone what you keep. For
            ``DataLoader(dataset, collate_fn=dataset.collate_fn)``; images must have one size.
        threads: that share the images of a batch in this process, each on a core of its own, since
            decoders let go of Python's lock. Faster than as many workers where images are large,
            which workers have to hand over; random transforms draw in the threads' order.
        checksum: compares each record's checksum when it is read.
        readahead: lets the system read the neighbors of a record from disk as well, which pays
            where they are wanted soon: in order, or by a WindowSampler with a window. None does
            so where memory holds the file. Who opens a file first in a process decides for it.

    Attributes:
        path, transform, target_transform, decode, checksum: as given.
        classes: names of the classes, in order of their numbers; None without.
        fields: name -> kind of a database of fields; None of images with targets.

    Raises:
        FileNotFoundError: there is no such file.
        DatabaseError: it is truncated, of something else, of another version; or shards are
            missing or do not belong together.
        ImportError: the decoder is not installed.
        ValueError: an option is out of range.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        transform: Callable[[Any], Any] | None = None,
        decode: str | None = "auto",
        *,
        target_transform: Callable[[Any], Any] | None = None,
        memory_format: Literal["auto", "contiguous", "channels_last"] = "auto",
        collate: bool = False,
        threads: int = 1,
        checksum: bool = True,
        readahead: bool | None = None,
    ) -> None:
        self.path = Path(path).expanduser().resolve()
        self.transform, self.target_transform = transform, target_transform
        self.decode = decode
        if decode not in (None, "pil"):
            decoding.load_decoder(decode)  # says at once what is missing
        if memory_format not in ("auto", "contiguous", "channels_last"):
            raise ValueError(
                f"memory_format must be auto, contiguous or channels_last, got {memory_format!r}"
            )
        threads = whole_number("threads", threads, 1)
        if collate and decode in (None, "pil") and transform is None:
            raise ValueError(f"collate=True needs tensors, decode={decode!r} gives none")
        self._channels_last = memory_format == "channels_last" or (
            memory_format == "auto" and not collate and _resizes_first(transform)
        )
        self._planar_batch = memory_format == "contiguous"
        self._collates, self.checksum = collate, checksum
        self._files = [DatabaseFile(path, readahead) for path in shard_files(self.path)]
        self._metas = [file.meta for file in self._files]
        check_shards(self.path, [file.path for file in self._files], self._metas)
        self._ends = list(itertools.accumulate(meta["count"] for meta in self._metas))
        classes = self._metas[0]["classes"]
        self.classes: list[str] | None = None if classes is None else [*classes]
        fields = self._files[0].fields
        self.fields = dict(fields.kinds) if fields else None
        self._reader = SampleReader(fields, decode, self._channels_last) if fields else None
        if fields and (collate or target_transform is not None):
            what = "collate=True" if collate else "target_transform"
            raise ValueError(
                f"{what} does not go with a database of fields ({fields}): DataLoader's own "
                "collate_fn makes batches of them, and transform gets the whole sample"
            )
        self._buffer, self._threads = BatchBuffer(), Threads(threads)

    # ---- reading ----

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Any:
        file, position = self._locate(index)
        environment = file.open()
        with environment.begin() as txn:
            record = file.read(txn, position, self.checksum)
            image = self._image(record, (file, position))
        return self._transformed(image, record.target)

    def __getitems__(self, indices: Sequence[int]) -> Any:
        """Return the samples of a batch, read in one transaction for each file."""
        if type(self).__getitem__ is not LMDBDataset.__getitem__:
            return [self[index] for index in indices]  # as a subclass gives them
        if self._collates:
            return self._batch(indices)
        places = self._places(indices)
        samples: list[Any] = [None] * len(places)

        def read(numbers: Sequence[int]) -> None:
            for number, record in self._records(places, numbers):
                image = self._image(record, places[number])
                samples[number] = self._transformed(image, record.target)

        self._threads.share(read, range(len(places)))
        return samples

    def find(self, key: str) -> int:
        """Return the index of a source key, such as ``china/0000001.jpg``.

        Raises:
            KeyError: there is none.
        """
        data = schema.index_key(schema.encode_key(key))
        for file, end, meta in zip(self._files, self._ends, self._metas, strict=True):
            environment = file.open()
            with environment.begin(db=environment.index, buffers=False) as txn:
                if value := txn.get(data):
                    return schema.read_index(data, value)[0] + end - meta["count"]
        raise KeyError(f"{self.path} has no key {key!r}; .samples lists all of them")

    def stored(self, index: int) -> tuple[str, Any, Any]:
        """Return (source key, target, encoded image) of a record, compared with its checksum.

        With fields a dict of the stored bytes of each stands in place of the image, and the target
        is the label.
        """
        record = self.record(index)
        if self._reader is None:
            return record.key, record.target, bytes(record.image)
        file, position = self._locate(index)
        return record.key, record.target, self._reader.stored(record, file.path, position)

    def record(self, index: int) -> schema.Record:
        """Return a record in memory of its own, compared with its checksum."""
        file, position = self._locate(index)
        with file.open().begin() as txn:
            record = file.read(txn, position, True)
            return record._replace(image=memoryview(bytes(record.image)))

    @property
    def identity(self) -> bytes:
        """What tells the content of this dataset apart from that of another one."""
        return b"".join(file.identity for file in self._files)

    @property
    def label(self) -> str | None:
        """Name of the field that gives the targets; None without one, or without fields."""
        return self._reader.fields.label if self._reader is not None else None

    @staticmethod
    def collate_fn(batch: Any) -> Any:
        """For DataLoader: leave whole batches (``collate=True``) as they are, collate others."""
        return batch if isinstance(batch, tuple) else default_collate(batch)

    # ---- as ImageFolder has it ----

    @property
    def class_to_idx(self) -> dict[str, int]:
        """Class name -> number."""
        return {name: number for number, name in enumerate(self.classes or [])}

    @cached_property
    def samples(self) -> Samples:
        """(source key, target) of every record, a sequence that reads them where they are stored;
        no image is read for it."""
        return Samples(self._columns)

    @cached_property
    def targets(self) -> Targets:
        """The target of every record, a sequence over an array in the file, which np.asarray gives
        without a copy; no image is read for it.

        With fields the labels, of the field of kind ``json`` that is called ``label`` or
        ``target``.

        Raises:
            AttributeError: there is no such field.
        """
        if self._reader is not None and self.label is None:
            raise AttributeError(
                f"{self.path} has no targets: none of its fields ({self._reader.fields}) is of the "
                "kind json and called label or target"
            )
        return Targets(self._columns)

    @cached_property
    def _columns(self) -> Columns:
        return Columns(self._files)

    # ---- private ----

    def _locate(self, index: int) -> tuple[DatabaseFile, int]:
        count = self._ends[-1]
        number = operator.index(index)
        if not -count <= number < count:
            raise IndexError(
                printable(f"index {number} is out of range, {self.path} has {count} images")
            )
        number %= count
        if len(self._files) == 1:
            return self._files[0], number
        shard = bisect.bisect_right(self._ends, number)
        return self._files[shard], number - self._ends[shard] + self._metas[shard]["count"]

    def _places(self, indices: Sequence[int]) -> list[_Place]:
        numbers = [*map(operator.index, indices)]
        if len(self._files) == 1 and numbers and 0 <= min(numbers) <= max(numbers) < len(self):
            return [(self._files[0], number) for number in numbers]
        return [self._locate(number) for number in numbers]

    def _records(
        self, places: Sequence[_Place], numbers: Sequence[int]
    ) -> Iterator[tuple[int, schema.Record]]:
        """Yield some of a batch's records, read in one transaction for each file."""
        with transactions() as of:
            for number in numbers:
                file, position = places[number]
                yield number, file.read(of(file), position, self.checksum)

    def _image(self, record: schema.Record, place: _Place) -> Any:
        if self._reader is not None:
            return self._reader.sample(record, place[0].path, place[1])
        if self.decode is None:
            return bytes(record.image)
        pixels = self._pixels(record, place, self._channels_last)
        if self.decode == "pil":
            return pixels
        if self._channels_last:
            return torch.from_numpy(pixels).permute(2, 0, 1)
        return torch.from_numpy(decoding.planar(pixels))

    def _pixels(self, record: schema.Record, place: _Place, copy: bool = True) -> Any:
        """Return pixels [H, W, 3], or a PIL image; without ``copy`` maybe a view of the map."""
        try:
            if self.decode == "pil":
                return decoding.open_pil(record.image)
            return decoding.load_decoder(self.decode)(record.image, copy)
        except Exception as error:  # decoders raise a dozen kinds
            raise schema.DatabaseError(
                f"{place[0].path}, record {place[1]}, key {record.key!r}: the image cannot be "
                f"decoded ({error}); its bytes are as they were stored if verify_lmdb finds nothing"
            ) from error

    def _transformed(self, image: Any, target: Any) -> Any:
        if self.transform is not None:
            image = self.transform(image)
        if self._reader is not None:
            return image  # the whole sample
        if self.target_transform is not None:
            target = self.target_transform(target)
        return image, target

    def _batch(self, indices: Sequence[int]) -> tuple[torch.Tensor, Any]:
        places = self._places(indices)
        if not places:
            raise ValueError("a batch needs one index at least, got none")
        targets: list[Any] = [None] * len(places)
        whole_pixels = self.transform is None and not self._planar_batch
        out: Any = None

        def read(numbers: Sequence[int]) -> None:
            nonlocal out
            for number, record in self._records(places, numbers):
                image, targets[number] = self._for_batch(record, places[number])
                if out is None:
                    out = self._buffer.room(len(places), image.shape, image.dtype)
                if image.shape != out.shape[1:]:
                    raise ValueError(
                        f"record {places[number][1]} has the shape {tuple(image.shape)}, the "
                        f"first of its batch {tuple(out.shape[1:])}: collate=True needs images of "
                        "one size, from a transform or write_lmdb(..., resize=(height, width))"
                    )
                if self.transform is None and self._planar_batch:
                    decoding.planar(image.permute(1, 2, 0).numpy(), out[number].numpy())
                else:
                    out[number] = image

        raw = None if self.transform is not None else RawBatch.like(places[0], self._planar_batch)
        if raw is not None:
            out = self._buffer.room(len(places), raw.shape, torch.uint8)
            others = self._copy_raw(raw, places, out.numpy(), targets)
        else:
            read(range(1))  # the first image says how large the batch is
            others = range(1, len(places))
        self._threads.share(read, others)
        return out.permute(0, 3, 1, 2) if whole_pixels else out, default_collate(targets)

    def _copy_raw(
        self, raw: RawBatch, places: Sequence[_Place], out: Any, targets: list[Any]
    ) -> list[int]:
        """Copy raw images into a batch; return the numbers of those that have to be read."""
        others: list[int] = []

        def copy(numbers: Sequence[int]) -> None:
            others.extend(raw.copy(places, numbers, out, targets, self.checksum))

        if raw.is_large and self.checksum:
            self._threads.share(copy, range(len(places)))
        else:
            copy(range(len(places)))
        if self.target_transform is not None:
            for number in sorted({*range(len(places))}.difference(others)):
                targets[number] = self.target_transform(targets[number])
        return others

    def _for_batch(self, record: schema.Record, place: _Place) -> tuple[torch.Tensor, Any]:
        """Return (image, target); without a transform the pixels as the decoder lays them."""
        if self.transform is not None:
            return self._transformed(self._image(record, place), record.target)
        pixels = torch.from_numpy(self._pixels(record, place))
        target = record.target
        if self.target_transform is not None:
            target = self.target_transform(target)
        return pixels.permute(2, 0, 1) if self._planar_batch else pixels, target

    def __getstate__(self) -> dict[str, Any]:
        return {
            k: v for k, v in self.__dict__.items() if k not in ("samples", "targets", "_columns")
        }

    def __repr__(self) -> str:
        classes = f", {len(self.classes)} classes" if self.classes else ""
        what = f"samples of {self._reader.fields}" if self._reader else "images"
        return (
            f"LMDBDataset({str(self.path)!r}: {len(self)} {what}{classes}, decode={self.decode!r})"
        )


def _resizes_first(transform: Any) -> bool:
    """Whether a torchvision transform begins with a resize."""
    steps = getattr(transform, "transforms", None)
    first = steps[0] if isinstance(steps, (list, tuple)) and steps else transform
    return type(first).__name__ in _RESIZES_FIRST


_Place = tuple[DatabaseFile, int]  # a file and a position in it
