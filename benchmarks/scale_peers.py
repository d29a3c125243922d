"""What benchmarks/scale.py measures of others: each writes the same tiny records, and reads them.

write(folder, records) stores all of them in this process, open(folder) gives a reader,
read(reader, numbers) loads records by their numbers (None where a peer has no such access), and
stream(reader) yields an epoch in the shuffled order that the peer is made for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from dlhelpers.lmdb_io import LMDBDataset, write_lmdb

Records = Iterable[tuple[str, bytes, int]]


class Peer(NamedTuple):
    module: str  # what is imported
    write: Callable[[Path, Records], None]
    open: Callable[[Path], Any]
    read: Callable[[Any, list[int]], Any] | None
    stream: Callable[[Any], Iterable[Any]]
    bytes_of: Callable[[Any], bytes]  # the image of what is read, to be compared


def by_number(reader: Any, numbers: list[int]) -> Any:
    for number in numbers:
        item = reader[number]
    return item


def at_random(reader: Any) -> Iterable[Any]:
    from torch.utils.data import RandomSampler

    return (reader[number] for number in RandomSampler(reader))


def in_own_order(reader: Any) -> Iterable[Any]:
    return iter(reader)


def write_ours(folder: Path, records: Records) -> None:
    write_lmdb(records, folder / "images.lmdb", progress=False)


def open_ours(folder: Path) -> Any:
    return LMDBDataset(folder / "images.lmdb", decode=None)


def write_litdata(folder: Path, records: Records) -> None:
    from litdata.streaming.cache import Cache

    cache = Cache(str(folder), chunk_bytes="64MB")
    for number, (_, image, target) in enumerate(records):
        cache[number] = {"image": image, "target": target}
    cache.done()
    cache.merge()


def open_litdata(folder: Path) -> Any:
    from litdata import StreamingDataset

    dataset = StreamingDataset(str(folder), shuffle=True)
    len(dataset)
    return dataset


def write_mds(folder: Path, records: Records) -> None:
    from streaming import MDSWriter

    with MDSWriter(out=str(folder), columns={"image": "bytes", "target": "int"}) as writer:
        for _, image, target in records:
            writer.write({"image": image, "target": target})


def open_mds(folder: Path) -> Any:
    from streaming import StreamingDataset

    return StreamingDataset(local=str(folder), batch_size=64, shuffle=True)


def write_webdataset(folder: Path, records: Records) -> None:
    import webdataset

    pattern = str(folder / "%06d.tar")
    with webdataset.ShardWriter(pattern, maxcount=10_000, verbose=0) as writer:
        for number, (_, image, target) in enumerate(records):
            writer.write({"__key__": f"{number:09d}", "png": image, "cls": target})


def open_webdataset(folder: Path) -> Any:
    import webdataset

    paths = sorted(map(str, folder.glob("*.tar")))
    return webdataset.WebDataset(paths, shardshuffle=len(paths)).shuffle(1000)


def write_files(folder: Path, records: Records) -> None:
    made = set()
    for key, image, _ in records:
        path = os.path.join(folder, key)
        if (parent := os.path.dirname(path)) not in made:
            os.mkdir(parent)
            made.add(parent)
        with open(path, "wb") as file:
            file.write(image)


def open_files(folder: Path) -> Any:
    from torchvision.datasets import DatasetFolder

    return DatasetFolder(str(folder), loader=read_file, extensions=(".png",))


def read_file(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def first(item: Any) -> bytes:
    return item[0]


def named_image(item: Any) -> bytes:
    return item["image"]


PEERS = {
    "dlhelpers, one LMDB file": Peer(
        "dlhelpers", write_ours, open_ours, by_number, at_random, first
    ),
    "plain files, torchvision": Peer(
        "torchvision", write_files, open_files, by_number, at_random, first
    ),
    "LitData": Peer("litdata", write_litdata, open_litdata, by_number, in_own_order, named_image),
    "MosaicML Streaming": Peer(
        "streaming", write_mds, open_mds, by_number, in_own_order, named_image
    ),
    "WebDataset": Peer(
        "webdataset", write_webdataset, open_webdataset, None, in_own_order, lambda i: i["png"]
    ),
}
