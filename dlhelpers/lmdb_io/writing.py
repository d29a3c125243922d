"""Convert a source into one LMDB file that appears whole or not at all."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dlhelpers.arguments import shard_of, whole_number
from dlhelpers.extras import need
from dlhelpers.lmdb_io import schema
from dlhelpers.lmdb_io.appending import Appending, need_database, stored_fields
from dlhelpers.lmdb_io.converting import Conversion
from dlhelpers.lmdb_io.environments import open_environment
from dlhelpers.lmdb_io.failures import clear_errors
from dlhelpers.lmdb_io.field_sources import open_samples
from dlhelpers.lmdb_io.finishing import finish
from dlhelpers.lmdb_io.locking import only_writer
from dlhelpers.lmdb_io.merging import names_databases
from dlhelpers.lmdb_io.opening import need_outside
from dlhelpers.lmdb_io.shards import shard_name
from dlhelpers.lmdb_io.sharing import Seen
from dlhelpers.lmdb_io.sources import SourceError
from dlhelpers.lmdb_io.spreading import Totals, own_shards, write_shards
from dlhelpers.printable import one_line, printable

__all__ = ["WriteReport", "write_lmdb"]

_FIRST_MAP = 1 << 28


@dataclass(frozen=True, repr=False)
class WriteReport:
    """What a conversion did.

    Attributes:
        path: the database.
        count: records in it.
        image_bytes: what their images take.
        skipped: (what, why) of all that was left out.
        ignored: files of the source folder that are no images by their name.
        notes: what else is worth knowing of the source.
        resumed_from: records that an earlier, interrupted conversion had stored.
        seconds: that this conversion took.
        appended_to: records of the database that the others were appended to.
    """

    path: Path
    count: int
    image_bytes: int
    skipped: tuple[tuple[str, str], ...]
    ignored: tuple[str, ...]
    notes: tuple[str, ...]
    resumed_from: int
    seconds: float
    appended_to: int = 0

    def __str__(self) -> str:
        new = self.count - self.appended_to
        speed = (new - self.resumed_from) / max(self.seconds, 1e-9)
        lines = [
            f"{self.count} image{'s' * (self.count != 1)}, {self.image_bytes / 1e6:.1f} MB, in "
            f"{one_line(str(self.path))} ({self.seconds:.1f} s, {speed:.0f} images/s)"
        ]
        if self.appended_to:
            lines.append(f"{new} of them appended to the {self.appended_to} that were there")
        if self.resumed_from:
            was_there = f"the first {self.resumed_from} were there from an interrupted conversion"
            if self.appended_to:
                was_there = f"of these, {was_there}"
            if self.path.is_dir():
                was_there = f"{self.resumed_from} were there from an earlier run"
            lines.append(was_there)
        lines += self.notes
        if self.ignored:
            what = "file is no image" if len(self.ignored) == 1 else "files are no images"
            lines.append(f"{len(self.ignored)} {what} by name: {_some(self.ignored)}")
        if self.skipped:
            lines.append(f"{len(self.skipped)} skipped:")
            lines += [f"  {one_line(what)}: {one_line(why)}" for what, why in self.skipped[:20]]
            lines += [f"  and {len(self.skipped) - 20} more"] * (len(self.skipped) > 20)
        return printable("\n".join(lines))

    __repr__ = __str__


def write_lmdb(
    source: Any,
    path: str | os.PathLike[str],
    *,
    fields: Mapping[str, str] | None = None,
    workers: int = 0,
    encode: Literal["jpeg", "png", "webp", "raw"] | None = None,
    resize: int | tuple[int, int] | None = None,
    quality: int | None = None,
    map_size: int | None = None,
    resume: bool = False,
    on_error: Literal["raise", "skip"] = "raise",
    shard: tuple[int, int] | None = None,
    shards: int | None = None,
    append: bool = False,
    lock: bool = True,
    progress: bool | None = None,
) -> WriteReport:
    """Convert images into one LMDB file for :class:`LMDBDataset`.

    Args:
        source: an image folder (one folder for each class, the order of torchvision's
            ImageFolder), a map-style dataset of (image or bytes, target), or an iterable of
            (key, bytes, target). Targets are ints, or what JSON can hold. Of an ImageFolder or
            LMDBDataset without a transform, and of Subset and ConcatDataset around them, however
            nested, the stored bytes, keys and classes are taken. The path of a listing
            (write_listing), read in place of its folder; of a database, or a list of them, whose
            records are copied as they are, with classes matched by name.
        path: the file; appears whole, or not at all. An older database there stays in use until
            then, and stays for good if this conversion fails.
        fields: name -> kind of what each sample of the source holds, where that is more than an
            image and a target: a dict with these keys, a dataclass, or a tuple in this order; of an
            iterable (key, sample). ``image`` keeps encoded bytes and stores pixels as PNG;
            ``jpeg``, ``png``, ``webp`` and ``raw`` keep bytes of that format and encode others, of
            which PNG holds masks exactly (1 bit, grey, palette, 16 and 32 bits); ``numpy`` arrays,
            tensors and numbers; ``text``; ``json``, whose tuples become lists; ``bytes``. A
            ``json`` field called ``label`` or ``target`` gives the dataset's ``targets``. None
            takes the fields of a database that has some.
        workers: processes that read, resize and encode; 0 does it here. Pays where images are
            resized or encoded.
        encode: stores this format; None keeps encoded bytes as they are, and the format of what
            is resized. Pixels that come without one are stored as RGB or grey PNG. What is kept
            is looked at (format, end), not decoded.
        resize: the shorter side in pixels, as torchvision's Resize does it, or (height, width).
            An image of that size already is kept as it is. Both mean the pixels as they are
            stored; the EXIF orientation is kept beside them, in every encoding.
        quality: of JPEG and WebP, 90 where None. ``encode`` and ``resize`` do not go with fields,
            since a mask is not resized as its image is: resize both in the dataset.
        map_size: bytes of the first memory map; it grows by itself all the same.
        resume: goes on after an interrupted conversion of the same source and settings; where
            they differ it starts afresh and warns. Names and sizes of the files that are done are
            compared, and contents where modification times differ. Of a dataset, which has to be
            loaded to be compared, it looks at up to 64 of the items that are done.
        on_error: ``raise`` stops at the first image that cannot be stored, what was converted
            stays for ``resume``; ``skip`` leaves it out and lists it.
        shard: (rank, world) writes this rank's part into the folder ``path``, which
            LMDBDataset opens as one. Parts are contiguous; of an iterable without length, rank
            takes each world-th item. Each shard carries the identity of the whole source, and
            only shards of one identity are opened: names, targets and sizes of all files, all
            items of an iterable, some of a dataset (one in 40 of a rank's own number, 16 to
            1024). On one machine contents are compared where modification times differ: of all
            files of a part, or of 32 where every time differs, as those of a copy do.
        shards: writes so many shards into the folder ``path``, one after the other, whatever the
            number of writers: with ``shard=(rank, world)`` those numbered rank, rank + world, ...
            The source is looked at once. ``resume`` keeps the shards that are whole and of the
            same source and settings.
        append: stores the images behind those of the database ``path``, with its settings. It
            stays in use until all are there, its records are copied as they are, and its classes
            keep their numbers: those of the source are matched by name, new ones follow. Without
            ``fields`` the source's samples have those of the database.
        lock: keeps two processes from converting into one file. False goes without, for a mount
            that has no locks; then see to it that nobody else converts into this file.
        progress: a bar with images/s and MB/s; None draws it in a terminal only.

    Returns:
        A WriteReport that lists what was skipped.

    Raises:
        SourceError: an image, key or class of the source cannot be stored; names it.
        FileExistsError: path holds something that write_lmdb has not written.
        OSError: the disk is full or not writable; what was converted stays for ``resume``.
            The folder's file system has no locks.
        BlockingIOError: another process is converting into this path.
        ValueError, TypeError: an argument is out of range.

    >>> import tempfile
    >>> import torch
    >>> from torch.utils.data import TensorDataset
    >>> images = TensorDataset(torch.zeros(8, 3, 64, 64, dtype=torch.uint8), torch.arange(8))
    >>> write_lmdb(images, f"{tempfile.mkdtemp()}/black.lmdb", progress=False).count
    8
    """
    start = time.perf_counter()
    _validate(map_size, on_error)
    workers = whole_number("workers", workers, 0)
    need("lmdb", "write_lmdb")
    shard = None if shard is None else shard_of(shard)
    shards = None if shards is None else whole_number("shards", shards, 1, 99_999)
    if append and fields is None and not names_databases(source):
        fields = stored_fields(Path(path).expanduser())
    opened, encoding = open_samples(source, fields, encode, resize, quality)
    if opened.problems and on_error == "raise":
        what, why = opened.problems[0]
        raise SourceError(
            f'{one_line(what)}: {one_line(why)}; on_error="skip" lists it and goes on'
        )
    if opened.refused and on_error == "raise":
        what, why = opened.refused
        raise SourceError(f'{one_line(what)}: {one_line(why)}; on_error="skip" leaves it out')
    path = Path(path).expanduser().resolve()
    if path in opened.paths:
        raise ValueError(
            printable(f"{path} is read and cannot be written at the same time: give another path")
        )

    if (shard, shards) != (None, None) and opened.root is not None:
        need_outside(path, opened.root)
    if append:
        if (shard, shards) != (None, None):
            raise ValueError("append=True goes into a single file: leave out shard and shards")
        need_database(path)

    def begin(shard: tuple[int, int] | None, seen: Seen | None = None) -> Conversion:
        target = _target(path, shard)
        target.parent.mkdir(parents=True, exist_ok=True)
        _refuse_foreign(target)
        if append:
            return Appending(opened, target, encoding, workers, on_error, lock)
        return Conversion(opened, target, encoding, workers, on_error, shard, lock, seen)

    def write(conversion: Conversion) -> None:
        with clear_errors(conversion), only_writer(conversion.target, lock):
            conversion.open(resume, map_size or _FIRST_MAP)
            try:
                conversion.run(progress)
                finish(conversion)
            finally:
                conversion.close()

    result: Conversion | Totals
    if shards is None:
        result = begin(shard)
        write(result)
        path, notes, base = result.target, result.source.notes, result.base
    else:
        own = own_shards(shards, shard)
        result = write_shards(opened, own, shards, begin, write, resume)
        notes, base = (*opened.notes, *result.notes(shards)), 0
    return WriteReport(
        path,
        result.count,
        result.image_bytes,
        (*opened.problems, *result.skipped),
        opened.ignored,
        notes,
        result.resumed_from,
        time.perf_counter() - start,
        base,
    )


def _target(path: Path, shard: tuple[int, int] | None) -> Path:
    if shard is None:
        if path.is_dir():
            raise IsADirectoryError(
                printable(
                    f"{path} is a folder, expected the path of a file such as "
                    f"{path / 'images.lmdb'}"
                )
            )
        return path
    if path.is_file():
        raise FileExistsError(printable(f"{path} is a file, expected the folder of all shards"))
    rank, world = shard
    others = {p.name.split("-of-")[-1] for p in path.glob("shard-*-of-*.lmdb")}
    if others - {f"{world:05d}.lmdb"}:
        raise FileExistsError(
            printable(
                f"{path} holds shards of another number (shard-*-of-{min(others)}): remove "
                "them or give another folder"
            )
        )
    return path / shard_name(rank, world)


def _refuse_foreign(target: Path) -> None:
    if not target.exists():
        return
    try:
        schema.unpack_meta(open_environment(target).get_entry(schema.META), target)
    except (schema.DatabaseError, OSError) as error:
        raise FileExistsError(
            printable(
                f"{target} exists and is no whole database of write_lmdb ({error}): nothing was "
                "touched; remove it or give another path"
            )
        ) from None


def _validate(map_size: int | None, on_error: str) -> None:
    if map_size is not None and (not isinstance(map_size, int) or map_size < 1):
        raise ValueError(f"map_size must be a number of bytes, such as 2**30, got {map_size!r}")
    if on_error not in ("raise", "skip"):
        raise ValueError(f'on_error must be "raise" or "skip", got {on_error!r}')


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(map(one_line, names[:3])) + (", ..." if len(names) > 3 else "")
