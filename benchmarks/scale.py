"""What do fourteen million images need? Costs per record at growing numbers of tiny records.

Records are tiny (an image of one pixel), so that what is left is the cost of a record, not of its
bytes. Each number of records is written in one process and read in another one:

conversion   write_lmdb as a whole call, fsync included, and the anonymous memory that it took
opening      LMDBDataset(path), and one record
reading      stored bytes of records in random order, from the page cache
targets      the targets of all records
shuffling    the first index of an epoch

Peers write and read the same records, side by side; one that is not installed is named (MosaicML
Streaming asks for an older NumPy, so it belongs into an environment of its own). Prints tables, and
writes benchmarks/results/scale.json and docs/fourteen-million-images.md.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import io
import json
import multiprocessing
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scale_page import PAGE, render
from scale_peers import PEERS

from dlhelpers import machine

CLASSES, READS = 1000, 20_000


class Records:
    """Triples with a length, made as they are asked for."""

    def __init__(self, count: int) -> None:
        self.count = count
        file = io.BytesIO()
        Image.new("RGB", (1, 1)).save(file, "PNG")
        self.image = file.getvalue()

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[str, bytes, int]]:
        for number in range(self.count):
            target = number * CLASSES // self.count
            yield f"{target:04d}/{number:08d}.png", self.image, target


class Memory:
    """Anonymous memory of this process, MB: what is its own, the page cache apart."""

    def __init__(self) -> None:
        self.begin = self.peak = self.now()
        self._is_done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @staticmethod
    def now() -> float:
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) / 1e3 for line in lines if "RssAnon" in line)
        except (OSError, StopIteration):  # only Linux tells
            return float("nan")

    def _watch(self) -> None:
        while not self._is_done.wait(0.02):
            self.peak = max(self.peak, self.now())

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.peak = max(self.peak, self.now())
        self._is_done.set()
        self._thread.join()

    @property
    def grown(self) -> float:
        return max(self.now() - self.begin, 0.0)


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def convert(folder: Path, count: int) -> dict[str, float]:
    peer, records = PEERS["dlhelpers, one LMDB file"], Records(count)
    peer.write(folder / "warm", Records(10))  # imports are not what is measured
    with Memory() as memory:
        seconds, _ = timed(lambda: peer.write(folder, records))
    size = (folder / "images.lmdb").stat().st_size
    return {
        "write_us": seconds / count * 1e6,
        "write_mb": memory.peak - memory.begin,
        "own_bytes": size / count - len(records.image),
    }


def read(folder: Path, count: int) -> dict[str, float]:
    from torch.utils.data import RandomSampler

    peer, reads = PEERS["dlhelpers, one LMDB file"], min(READS, count)
    warm = peer.open(folder / "warm")
    warm[0], np.asarray(warm.targets), list(RandomSampler(warm))  # imports again
    found: dict[str, float] = {}
    memory = Memory()
    seconds, dataset = timed(lambda: peer.open(folder))
    seconds += timed(lambda: dataset[count // 2])[0]
    found |= {"open_ms": seconds * 1e3, "open_mb": memory.grown}
    numbers = random.Random(0).sample(range(count), reads)
    peer.read(dataset, numbers)  # what was written a moment ago is in the page cache
    found["read_us"] = timed(lambda: peer.read(dataset, numbers))[0] / reads * 1e6
    found["read_mb"] = memory.grown
    memory = Memory()
    seconds, targets = timed(lambda: np.asarray(dataset.targets))
    found |= {"targets_ms": seconds * 1e3, "targets_mb": memory.grown}
    found["samples_ms"] = timed(lambda: sum(1 for _ in dataset.samples))[0] * 1e3
    for number in numbers[:100]:
        if int(targets[number]) != number * CLASSES // count:
            raise ValueError(f"record {number} of {count} has the target {targets[number]}")
    samplers: dict[str, Any] = {"shuffle": lambda: RandomSampler(dataset)}
    if importlib.util.find_spec("dlhelpers.lmdb_io.sampling"):
        sampling = importlib.import_module("dlhelpers.lmdb_io.sampling")
        samplers["window"] = lambda: sampling.WindowSampler(dataset)
    for name, make in samplers.items():
        memory = Memory()
        seconds, _begun = timed(lambda make=make: begin_epoch(make()))
        found |= {f"{name}_ms": seconds * 1e3, f"{name}_mb": memory.grown}
    return found


def begin_epoch(sampler: Any) -> Iterator[int]:
    indices = iter(sampler)
    next(indices)
    return indices


def race(name: str, folder: Path, count: int) -> dict[str, float]:
    peer, records = PEERS[name], Records(count)
    warm, folder = folder / "warm", folder / "records"
    for made in (warm, folder):
        made.mkdir()
    peer.write(warm, Records(10))  # imports are not what is measured
    list(peer.stream(peer.open(warm)))
    seconds, _ = timed(lambda: peer.write(folder, records))
    found = {"write_us": seconds / count * 1e6}
    files = [path for path in folder.rglob("*") if path.is_file()]
    on_disk = sum(path.stat().st_blocks * 512 for path in files)
    found["own_bytes"] = on_disk / count - len(records.image)
    found["files"] = len(files)
    seconds, reader = timed(lambda: peer.open(folder))
    found["open_ms"] = seconds * 1e3
    if peer.read:
        numbers = random.Random(0).sample(range(count), min(count, 2000))
        seconds, last = timed(lambda: peer.read(reader, numbers))
        found["read_us"] = seconds / len(numbers) * 1e6
        if bytes(peer.bytes_of(last)) != records.image:
            raise ValueError(f"{name} gives another image")
    seconds, taken = timed(lambda: sum(1 for _ in islice(peer.stream(reader), count)))
    found["stream_us"] = seconds / taken * 1e6
    return found


def in_a_child(function: Callable[..., Any], *arguments: Any, limit: float) -> Any:
    """Run it in a fresh process: memory and caches are its own."""
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    try:
        return pool.submit(function, *arguments).result(limit)
    finally:
        for process in list((pool._processes or {}).values()):
            process.kill()  # one that hangs, or has left threads behind
        pool.shutdown(cancel_futures=True)


def measure_sizes(sizes: list[int], work: Path) -> dict[str, dict[str, float]]:
    found = {}
    for count in sizes:
        with tempfile.TemporaryDirectory(dir=work) as folder:
            row = in_a_child(convert, Path(folder), count, limit=600)
            row |= in_a_child(read, Path(folder), count, limit=600)
        print(count, {name: round(value, 2) for name, value in row.items()}, flush=True)
        found[str(count)] = row
    return found


def measure_peers(count: int, work: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name, peer in PEERS.items():
        if importlib.util.find_spec(peer.module) is None:
            found[name] = {"why": f"{peer.module} is not installed"}
            continue
        with tempfile.TemporaryDirectory(dir=work, ignore_cleanup_errors=True) as folder:
            try:
                found[name] = in_a_child(race, name, Path(folder), count, limit=90)
                found[name]["version"] = version(peer.module)
            except Exception as error:  # a peer's own failure is a row of the table
                found[name] = {"why": f"{type(error).__name__}: {error}".splitlines()[0]}
        print(name, found[name], flush=True)
    return found


def version(module: str) -> str:
    names = importlib.metadata.packages_distributions().get(module, [module])
    return importlib.metadata.version(names[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--peers", type=int, default=20_000, help="records of peers; 0 for none")
    parser.add_argument("--work", type=Path, help="where files are written")
    parser.add_argument("--page", type=Path, default=PAGE)
    results = Path(__file__).parent / "results" / "scale.json"
    parser.add_argument("--results", type=Path, default=results)
    options = parser.parse_args()
    facts = {
        "machine": machine.describe().line,
        "sizes": measure_sizes(sorted(options.sizes), options.work),
        "peers": measure_peers(options.peers, options.work) if options.peers else {},
        "peers_count": options.peers,
    }
    options.results.parent.mkdir(exist_ok=True)
    options.results.write_text(json.dumps(facts, indent=1))
    options.page.write_text(render(facts), encoding="utf-8", newline="\n")
    print(f"wrote {options.results} and {options.page}")


if __name__ == "__main__":
    main()
