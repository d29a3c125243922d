"""Tables A to E of benchmarks/io.py: reading, in one process and with two workers."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import io_peers as peers
import io_pipelines as pipelines
import numpy as np
import torch
from io_peers import BATCH, Photos
from io_race import Bench, Check, Make, check_training, epoch_check
from PIL import Image
from torch.utils.data import DataLoader, Subset, default_collate
from torchvision.transforms import v2

from dlhelpers.lmdb_io import LMDBDataset, write_lmdb
from dlhelpers.lmdb_io.checksums import crc32
from dlhelpers.lmdb_io.decoding import planar
from dlhelpers.lmdb_io.environments import open_environment
from dlhelpers.lmdb_io.schema import position_key


def random_batches(count: int) -> Iterator[list[int]]:
    while True:
        order = torch.randperm(count).tolist()
        for first in range(0, count - BATCH + 1, BATCH):
            yield order[first : first + BATCH]


def from_map(read: peers.Read, count: int) -> Callable[[], Any]:
    batches = random_batches(count)
    return lambda: [read(i) for i in next(batches)]


def from_stream(stream: Any) -> Callable[[], Any]:
    samples = peers.endless(stream)
    return lambda: [next(samples) for _ in range(BATCH)]


def from_lmdb(photos: Photos, **options: Any) -> Callable[[], Any]:
    dataset, batches = LMDBDataset(photos.lmdb, **options), random_batches(len(photos))
    return lambda: dataset.__getitems__(next(batches))


def peer_makers(photos: Photos) -> dict[str, Make]:
    maps = {
        name: lambda make=make: from_map(make(photos), len(photos))
        for name, make in peers.MAP_READERS.items()
    }
    streams = {
        name: lambda name=name: from_stream(photos.stream(name)) for name in peers.STREAM_READERS
    }
    return maps | streams


def collated(make: Make) -> Make:
    def made() -> Callable[[], Any]:
        take = make()
        return lambda: tuple(default_collate(take()))

    return made


def in_memory(photos: Photos, decode: Callable[[bytes], torch.Tensor]) -> Callable[[], Any]:
    images, targets = photos.images, photos.targets
    return from_map(lambda i: (decode(images[i]), targets[i]), len(photos))


def planar_tensor(encoded: bytes) -> torch.Tensor:
    from simplejpeg import decode_jpeg

    return torch.from_numpy(planar(decode_jpeg(encoded)))


def into_buffer(photos: Photos, contiguous: bool) -> Callable[[], Any]:
    """The bound of collate=True: decode, copy into the batch that is used again."""
    from simplejpeg import decode_jpeg

    images, targets, batches = photos.images, photos.targets, random_batches(len(photos))
    height, width = photos.pixels.shape[1:3]
    shape = (BATCH, 3, height, width) if contiguous else (BATCH, height, width, 3)
    buffer = torch.empty(shape, dtype=torch.uint8)

    def call() -> Any:
        numbers = next(batches)
        for place, i in enumerate(numbers):
            pixels = decode_jpeg(images[i])
            if contiguous:
                planar(pixels, buffer[place].numpy())
            else:
                buffer[place] = torch.from_numpy(pixels)
        out = buffer if contiguous else buffer.permute(0, 3, 1, 2)
        return out, default_collate([targets[i] for i in numbers])

    return call


def lmdb_makers(photos: Photos, layout: str, **options: Any) -> dict[str, Make]:
    """LMDBDataset in one layout, with and without its checksum."""
    more = ", collate" if options.get("collate") else ""
    return {
        f"LMDBDataset{more}, {note}": lambda check=check: from_lmdb(
            photos, memory_format=layout, checksum=check, **options
        )
        for note, check in ((layout, True), (f"{layout}, no checksum", False))
    }


def tables_a_b(bench: Bench, photos: Photos, check: Check) -> None:
    last, planes = lmdb_makers(photos, "channels_last"), lmdb_makers(photos, "contiguous")
    memory = {
        "bytes in memory, simplejpeg": peers.simplejpeg_tensor,
        "bytes in memory, OpenCV": peers.cv2_tensor,
        "bytes in memory, torchvision": peers.torchvision_tensor,
        "bytes in memory, torchcodec": peers.torchcodec_tensor,
        "bytes in memory, PIL": peers.pil_tensor,
    }
    in_memories = {n: lambda d=d: in_memory(photos, d) for n, d in memory.items()}
    bound, others = dict(list(in_memories.items())[:1]), dict(list(in_memories.items())[1:])
    contiguous = {"bytes in memory, contiguous": lambda: in_memory(photos, planar_tensor)}
    goal = {"threshold": 0.95, "seconds": 3}
    bench.race("A1 no collation, bound, channels-last", bound | last, BATCH, check, **goal)
    bench.race("A2 no collation, bound, contiguous", contiguous | planes, BATCH, check, **goal)
    bench.race("A3 no collation, other decoders", bound | others, BATCH, check)

    def dali(copy: bool) -> Callable[[], Any]:
        pipeline = pipelines.Dali(photos, 1)
        return lambda: pipeline.batches(1, copy)

    rows = last | planes | peer_makers(photos)
    name = "DALI, 1 thread"
    bench.race("A4 no collation, peers", rows | {name: lambda: dali(False)}, BATCH, check)

    def both(makers: Mapping[str, Make]) -> dict[str, Make]:
        return {name: collated(make) for name, make in makers.items()}

    bench.race("B1 collated, bound, channels-last", both(bound | last), BATCH, check, **goal)
    bench.race("B2 collated, bound, contiguous", both(contiguous | planes), BATCH, check, **goal)
    own = lmdb_makers(photos, "auto", collate=True)
    own_planes = lmdb_makers(photos, "contiguous", collate=True)
    first = {"bytes in memory, into one buffer": lambda: into_buffer(photos, False)}
    bench.race("B3 collate=True, bound", first | own, BATCH, check, **goal)
    first = {"bytes in memory, into planar buffer": lambda: into_buffer(photos, True)}
    bench.race("B4 collate=True, bound, contiguous", first | own_planes, BATCH, check, **goal)
    rows = both(planes | last) | own | both(peer_makers(photos))
    bench.race("B5 collated, peers", rows | {name: lambda: dali(True)}, BATCH, check)


# ---- C: two workers ----


def loader_epoch(dataset: Any, workers: int = 2, **options: Any) -> Callable[[], Any]:
    if workers:
        options |= {"persistent_workers": True, "multiprocessing_context": "fork"}
    loader = DataLoader(dataset, BATCH, shuffle=True, num_workers=workers, **options)
    return lambda: _run_epoch(loader)


def _run_epoch(loader: Any) -> tuple[int, Any]:
    count = 0
    for batch in loader:
        count += len(batch[0])
    return count, (batch[0], batch[1])


def table_c(bench: Bench, part: Photos, check: Check) -> None:
    own = LMDBDataset(part.lmdb, collate=True)
    own_rows: dict[str, Make] = {
        "LMDBDataset": lambda: loader_epoch(LMDBDataset(part.lmdb)),
        "LMDBDataset, no checksum": lambda: loader_epoch(LMDBDataset(part.lmdb, checksum=False)),
        "LMDBDataset, collate": lambda: loader_epoch(own, collate_fn=own.collate_fn),
    }
    maps: dict[str, Make] = {
        name: lambda make=make: loader_epoch(peers.MapDataset(make(part), len(part)))
        for name, make in peers.MAP_READERS.items()
    }

    def stream(name: str) -> Callable[[], Any]:
        loader = peers.stream_loader(name, part.stream(name), 2)
        return lambda: _run_epoch(loader)

    streams: dict[str, Make] = {n: lambda n=n: stream(n) for n in peers.STREAM_READERS}

    def dali() -> Callable[[], Any]:
        pipeline = pipelines.Dali(part, 2)
        return lambda: (len(part), pipeline.batches(len(part) // BATCH))

    def lmdb_threads() -> Callable[[], Any]:
        dataset = LMDBDataset(part.lmdb, collate=True, threads=2)
        return loader_epoch(dataset, 0, collate_fn=dataset.collate_fn)

    threads: dict[str, Make] = {
        "LMDBDataset, collate, 2 threads": lmdb_threads,
        "DALI, 2 threads": dali,
        "SPDL pipeline, 2 threads": lambda: pipelines.spdl_epoch(part, 2),
        "FFCV loader, 2 threads, own JPEGs": lambda: pipelines.ffcv_epoch(part, 2),
    }
    first = {"LMDBDataset": own_rows["LMDBDataset"]}
    checked, count = epoch_check(len(part), check), len(part)
    # in three parts: idle workers and the streams' helper threads cost the others time
    for title, makers in (
        ("C1 two workers, maps", own_rows | maps),
        ("C2 two workers, streams", first | streams),
        ("C3 two workers, threads", first | threads),  # last: the loaders above fork
    ):
        title = f"{title}, {count} images a call"
        bench.race(title, makers, count, checked, seconds=2)


# ---- D: no decoding ----


def table_d(bench: Bench, photos: Photos, check: Check) -> None:
    images = photos.images

    def taken(read: Callable[[int], bytes]) -> Callable[[], Any]:
        batches = random_batches(len(photos))
        return lambda: [(i, read(i)) for i in next(batches)]

    def lmdb_bytes(checksum: bool) -> Callable[[], Any]:
        dataset = LMDBDataset(photos.lmdb, decode=None, checksum=checksum)
        batches = random_batches(len(photos))

        def call() -> Any:
            numbers = next(batches)
            found = dataset.__getitems__(numbers)
            return [(i, image) for i, (image, _) in zip(numbers, found, strict=True)]

        return call

    def plain() -> Callable[[], Any]:
        env, batches = photos.plain_env, random_batches(len(photos))

        def call() -> Any:
            with env().begin(buffers=True) as txn:
                return [(i, bytes(txn.get(b"%08d" % i))) for i in next(batches)]

        return call

    def same_bytes(result: Any) -> str:
        if len(result) != BATCH or any(bytes(found) != images[i] for i, found in result):
            raise ValueError("other bytes than the files have")
        return "same bytes"

    rows: dict[str, Make] = {
        "LMDBDataset, decode=None": lambda: lmdb_bytes(True),
        "LMDBDataset, decode=None, no checksum": lambda: lmdb_bytes(False),
        "plain py-lmdb, buffers, copied": plain,
        "bytes in memory, copied": lambda: taken(lambda i: bytes(memoryview(images[i]))),
        "image folder, open + read": lambda: taken(lambda i: peers.read_file(photos.paths[i])),
        "np.memmap, copied": lambda: taken(photos.store("memmap").__getitem__),
        "HDF5": lambda: taken(photos.store("hdf5").__getitem__),
    }
    bench.race("D1 stored JPEG bytes, no decoding", rows, BATCH, same_bytes)

    pixels, targets = photos.pixels, photos.targets

    def fresh() -> Callable[[], Any]:
        return from_map(lambda i: (peers.tensor(pixels[i].copy()), targets[i]), len(photos))

    def raw(**options: Any) -> Callable[[], Any]:
        dataset, batches = LMDBDataset(photos.raw_lmdb, **options), random_batches(len(photos))
        return lambda: dataset.__getitems__(next(batches))

    rows = {"memcpy to a new array": fresh}
    for layout in ("channels_last", "contiguous"):
        for checksum, more in ((True, ""), (False, ", no checksum")):
            options = {"memory_format": layout, "checksum": checksum}
            rows[f"LMDBDataset, raw, {layout}{more}"] = lambda o=options: raw(**o)
    bench.race("D2 raw arrays, one by one", rows, BATCH, check, threshold=0.5)
    for number, side in ((3, 64), (4, 224), (5, 256)):
        table_raw_batches(bench, photos, f"D{number} raw arrays, collate=True, {side} px", side)


def table_raw_batches(bench: Bench, photos: Photos, title: str, side: int) -> None:
    """Batches of raw arrays against copies of the same bytes, and the checksums alone."""
    count = min(len(photos), 1920)
    pixels = np.stack(
        [np.asarray(Image.fromarray(p).resize((side, side))) for p in photos.pixels[:count]]
    )
    items = [(str(i), pixels[i], photos.targets[i]) for i in range(count)]
    path = photos.work / f"raw-{side}.lmdb"
    write_lmdb(items, path, encode="raw", progress=False)
    buffer = np.empty_like(pixels[:BATCH])

    def memcpy() -> Callable[[], Any]:
        batches = random_batches(count)

        def call() -> Any:
            numbers = next(batches)
            for place, i in enumerate(numbers):
                np.copyto(buffer[place], pixels[i])
            return numbers, buffer, [photos.targets[i] for i in numbers]

        return call

    def from_file() -> Callable[[], Any]:
        # what a reader of the file can reach: small pages, where memcpy's source has huge ones
        environment, batches = open_environment(path), random_batches(count)
        txn, own = environment.begin(), np.empty_like(pixels[:BATCH])
        views = [txn.get(position_key(i)) for i in range(count)]
        size = pixels[0].nbytes
        mapped = [np.frombuffer(v, np.uint8)[-size:].reshape(pixels.shape[1:]) for v in views]

        def call() -> Any:
            numbers = next(batches)
            for place, i in enumerate(numbers):
                np.copyto(own[place], mapped[i])
            return numbers, own, [photos.targets[i] for i in numbers]

        call.open = environment, txn  # the views lie in its map
        return call

    def batch(**options: Any) -> Callable[[], Any]:
        dataset, batches = LMDBDataset(path, collate=True, **options), random_batches(count)

        def call() -> Any:
            numbers = next(batches)
            images, targets = dataset.__getitems__(numbers)
            return numbers, images.permute(0, 2, 3, 1).numpy(), targets.tolist()

        return call

    def sums(crc32: Callable[[Any], int]) -> Callable[[], Any]:
        batches = random_batches(count)

        def call() -> Any:
            numbers = next(batches)
            for i in numbers:
                crc32(pixels[i])
            return numbers, pixels[numbers[:1]], [photos.targets[numbers[0]]]

        return call

    def same(result: Any) -> str:
        numbers, images, targets = result
        numbers = numbers[: len(targets)]
        if not np.array_equal(images, pixels[numbers]):
            raise ValueError("other pixels than were written")
        if targets != [photos.targets[i] for i in numbers]:
            raise ValueError("other targets than were written")
        return "same bytes"

    rows: dict[str, Make] = {"memcpy into one buffer": memcpy}
    rows["memcpy from a map of the file"] = from_file
    for layout, name in (("auto", "channels_last"), ("contiguous", "contiguous")):
        for threads in (1, 2):
            for checksum, more in ((True, ""), (False, ", no checksum")):
                options = {"memory_format": layout, "threads": threads, "checksum": checksum}
                note = f"{name}, {threads} thread{'s' * (threads > 1)}{more}"
                rows[f"LMDBDataset, {note}"] = lambda o=options: batch(**o)
    rows[f"{crc32.__module__.split('.')[0]}'s CRC-32 alone"] = lambda: sums(crc32)
    rows["zlib's CRC-32 alone"] = lambda: sums(zlib.crc32)
    bench.race(title, rows, BATCH, same, threshold=0.9)


# ---- E: a training transform ----


def training(*first: Any) -> Any:
    return v2.Compose(
        [
            v2.RandomResizedCrop(224, antialias=True),
            v2.RandomHorizontalFlip(),
            *first,
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(pipelines.MEAN, pipelines.STD),
        ]
    )


def table_e(bench: Bench, photos: Photos, part: Photos) -> None:
    from torchvision.datasets import ImageFolder

    def datasets(of: Photos) -> dict[str, Callable[[], Any]]:
        decode, simple = peers.folder_decode_jpeg, peers.folder_simplejpeg
        return {
            "LMDBDataset": lambda: LMDBDataset(of.lmdb, training()),
            'LMDBDataset, decode="pil"': lambda: LMDBDataset(
                of.lmdb, training(v2.PILToTensor()), "pil"
            ),
            "image folder, PIL (ImageFolder)": lambda: ImageFolder(
                of.folder, training(v2.PILToTensor())
            ),
            "image folder, decode_jpeg": lambda: peers.MapDataset(decode(of), len(of), training()),
            "image folder, simplejpeg": lambda: peers.MapDataset(simple(of), len(of), training()),
        }

    def here(make: Callable[[], Any]) -> Callable[[], Any]:
        dataset, batches = make(), random_batches(len(photos))
        take = getattr(dataset, "__getitems__", lambda numbers: [dataset[i] for i in numbers])
        return lambda: default_collate(take(next(batches)))

    def dali(of: Photos, threads: int) -> Callable[[], Any]:
        pipeline, count = pipelines.Dali(of, threads, training=True), len(of) // 2 // BATCH
        if threads == 1:
            return lambda: pipeline.batches(1)
        return lambda: (count * BATCH, pipeline.batches(count))

    rows: dict[str, Make] = {n: lambda m=m: here(m) for n, m in datasets(photos).items()}
    rows["DALI, 1 thread"] = lambda: dali(photos, 1)
    bench.race("E1 training transform, one process", rows, BATCH, check_training)
    half = range(0, len(part), 2)  # of both classes
    rows = {n: lambda m=m: loader_epoch(Subset(m(), half)) for n, m in datasets(part).items()}
    rows["DALI, 2 threads"] = lambda: dali(part, 2)
    title = f"E2 training transform, two workers, {len(half)} images a call"
    check = epoch_check(len(half), check_training)
    bench.race(title, rows, len(half), check, seconds=3)
