"""Is LMDBDataset as fast as its decoder, and faster than every other way to store JPEGs?

The same JPEG crops of 256 px for all rows, one process and one torch thread unless a table says
otherwise, every ratio with its interval from paired, interleaved calls against the table's first
row. Before a row is timed, its images are compared with PIL's pixels and its targets with the
folder's. A row whose package is missing, or that fails, says why.

A  read + decode to uint8 RGB [3, H, W], no collation: 64 images a call in random order; stream
   formats in the order of their own shuffle buffer; DALI's batch without a copy
B  the same, collated to [64, 3, H, W] in memory of its own (DALI's copied out of its buffer);
   "bound" tables: LMDBDataset against the decoder on bytes in memory, same layout and collation
C  two workers: one epoch over a part of the images a call, workers stay; DALI, SPDL and FFCV with
   two threads of their own. DataLoader's workers collate to contiguous batches
D  no decoding: stored JPEG bytes copied out of each container; arrays of encode="raw" to tensors
   against copies of arrays in memory; batches of three sizes in one copy, and beside them copies
   from a map of the same file, which has small pages, and checksums alone
E  a training transform: random resized crop 224, flip, float, normalise; collated
F  write_lmdb as a whole call, fsync included, against `tar cf` as a process (its start is tar's),
   with and without fsync; resize=128 with two workers against two processes, started beforehand,
   that each resize half of the folder to files in memory (/dev/shm): write_lmdb goes to the disk
G  a worker's private memory behind an epoch, with two workers reading, at 1x and 10x

Prints tables and goals, and writes benchmarks/results/io.json.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from io_peers import BATCH, Photos
from io_pipelines import read_epoch
from io_race import Bench, Make, Reference
from io_tables import table_c, table_d, table_e, tables_a_b
from PIL import Image

from dlhelpers import machine
from dlhelpers.course import data
from dlhelpers.lmdb_io import write_lmdb


def resize_half(paths: list[str], folder: str) -> int:
    for number, path in enumerate(paths):
        image = Image.open(path)
        image.load()
        image = image.resize((128, 128), Image.Resampling.BILINEAR)
        image.save(f"{folder}/{number:06d}.jpg", quality=90)
    return len(paths)


def table_f(bench: Bench, photos: Photos) -> None:
    target, archive = photos.work / "new.lmdb", photos.work / "new.tar"
    memory = Path("/dev/shm")  # on a disk, making thousands of files costs what it likes
    scratch = tempfile.mkdtemp(dir=memory if memory.is_dir() else photos.work)
    folders = [Path(scratch, str(half)) for half in range(2)]

    def clean() -> None:
        for path in (target, archive):
            path.unlink(missing_ok=True)
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        os.sync()  # nobody pays for what others have left to write

    def tar(sync: bool) -> Callable[[], Any]:
        def call() -> int:
            command = ["tar", "cf", str(archive), "-C", str(photos.folder.parent)]
            subprocess.run([*command, photos.folder.name], check=True)
            if sync:
                with open(archive, "rb") as file:
                    os.fsync(file.fileno())
            return len(photos)

        return call

    def convert(**options: Any) -> Callable[[], Any]:
        return lambda: write_lmdb(photos.folder, target, progress=False, **options).count

    def whole(count: int) -> str:
        if count != len(photos):
            raise ValueError(f"{count} images instead of {len(photos)}")
        return f"{count} images"

    rows: dict[str, Make] = {"tar cf": lambda: tar(False), "write_lmdb": convert}
    options = {"threshold": 0.8, "seconds": 4, "setup": clean}
    bench.race("F1 conversion, bytes as they are", rows, len(photos), whole, **options)
    rows = {"tar cf, then fsync": lambda: tar(True), "write_lmdb": convert}
    options |= {"threshold": 1.0}
    bench.race("F2 conversion, both on the disk", rows, len(photos), whole, **options)
    with multiprocessing.get_context("fork").Pool(2) as pool:

        def halves() -> int:
            parts = [(photos.paths[half::2], str(folders[half])) for half in range(2)]
            return sum(pool.starmap(resize_half, parts, chunksize=1))

        rows = {
            "two processes, PIL to files": lambda: halves,
            "write_lmdb, resize, 2 workers": lambda: convert(resize=128, workers=2),
        }
        options |= {"threshold": 0.95, "seconds": 15}
        bench.race("F3 resize=128, two processes", rows, len(photos), whole, **options)
    shutil.rmtree(scratch)


# ---- G: memory ----


def table_g(photos: Photos) -> list[dict[str, Any]]:
    print("\nG  a worker's memory behind an epoch, two workers reading, MB", flush=True)
    context, found = multiprocessing.get_context("spawn"), []
    for part in (10, 1):
        count = len(photos) // part
        ids = zip(map(str, range(count)), photos.images, photos.targets, strict=False)
        path = write_lmdb(list(ids), photos.work / f"memory-{part}.lmdb", progress=False).path
        wait, results = context.Barrier(2), context.Queue()
        workers = [
            context.Process(target=read_epoch, args=(str(path), wait, results)) for _ in range(2)
        ]
        for worker in workers:
            worker.start()
        memory = json.loads(results.get(timeout=300))
        for worker in workers:
            worker.join()
        row = {"images": count, "database_mb": path.stat().st_size / 1e6} | memory
        row["private_mb"] = memory["Private_Clean"] + memory["Private_Dirty"]
        print(
            f"  {count:6} images, database {row['database_mb']:6.1f}: private "
            f"{row['private_mb']:6.1f} (clean {memory['Private_Clean']:.1f}, dirty "
            f"{memory['Private_Dirty']:.1f}), shared clean {memory['Shared_Clean']:.1f}",
            flush=True,
        )
        found.append(row)
    return found


# ---- goals ----


def judge_goals(bench: Bench, memory: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Compare the intervals with what was asked for."""
    goals = []

    def say(goal: str, low: float, high: float, bound: float, detail: str) -> None:
        verdict = "reached" if low >= bound else "not reached" if high < bound else "undecided"
        goals.append({"goal": goal, "verdict": verdict, "detail": detail})
        print(f"  {verdict:<12} {goal}: {detail}")

    print("\nGoals")
    limits = {"A1": 0.95, "A2": 0.95, "B1": 0.95, "B2": 0.95, "B3": 0.95, "B4": 0.95}
    limits |= {"D2": 0.5, "D3": 0.9, "D4": 0.9, "D5": 0.9, "F1": 0.8, "F2": 1.0, "F3": 0.95}
    for (table, name), row in bench.rows.items():
        promised = "lmdb" in name.lower() and (table[0] != "D" or name.endswith("no checksum"))
        if table in limits and promised:
            detail = f"{row.speedup:.3f} [{row.low:.3f}, {row.high:.3f}]"
            goal = f"{table} {name} >= {limits[table]}"
            say(goal, row.low, row.high, limits[table], detail)
    for table in ("A4", "B5", "C1", "C2", "C3", "E1", "E2"):
        rivals = {
            name: row
            for (title, name), row in bench.rows.items()
            if title == table and not name.startswith("LMDBDataset")
        }
        for name, row in rivals.items():
            if row.high >= 1:
                detail = f"its ratio is {row.speedup:.3f} [{row.low:.3f}, {row.high:.3f}]"
                say(f"{table} faster than {name}", 1 / row.high, 1 / max(row.low, 1e-9), 1, detail)
        if rivals:
            beaten = sum(row.high < 1 for row in rivals.values())
            print(f"  {'':12} {table} faster than {beaten} of {len(rivals)} peers")
            goals.append({"goal": f"{table} peers", "verdict": f"{beaten} of {len(rivals)}"})
    if memory:
        grown = memory[1]["private_mb"] - memory[0]["private_mb"]
        data_mb = memory[1]["database_mb"] - memory[0]["database_mb"]
        detail = f"{grown:+.1f} MB for {data_mb:.0f} MB more data"
        say("G private memory does not grow", data_mb * 0.02 - grown, np.inf, 0, detail)
    return goals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=5000, help="images (%(default)s)")
    parser.add_argument("--budget", type=float, default=4, help="seconds a row (%(default)s)")
    parser.add_argument("--rows", default="", help="only rows whose name holds this text")
    parser.add_argument("--tables", default="ABCDEFG", help="of them (%(default)s)")
    parser.add_argument("--folder", type=Path, help="for images and containers, else temporary")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")  # the peers' own
    torch.set_num_threads(1)
    start = time.perf_counter()
    print(machine.describe().line)
    bench, goals, memory = Bench(given.budget, given.rows), [], []
    folder = given.folder or Path(tempfile.gettempdir())
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as name:
        work = Path(name)
        part_count = BATCH * min(20, given.count // BATCH // 2 * 2)
        photos = Photos(
            data.photos(work / "photos", count=given.count, progress=False), work / "all"
        )
        part = Photos(
            data.photos(work / "part-photos", count=part_count, progress=False), work / "part"
        )
        check, part_check = Reference(photos), Reference(part)
        print(f"{len(photos)} JPEGs, {sum(map(len, photos.images)) / 1e6:.0f} MB")
        for letter, table in {  # forks before threads, and the streams' threads last
            "F": lambda: table_f(bench, photos),
            "G": lambda: memory.extend(table_g(photos)),
            "C": lambda: table_c(bench, part, part_check),
            "E": lambda: table_e(bench, photos, part),
            "D": lambda: table_d(bench, photos, check),
            "A": lambda: tables_a_b(bench, photos, check),
        }.items():
            if letter in given.tables or (letter == "A" and "B" in given.tables):
                table()
                print(f"  ({time.perf_counter() - start:.0f} s so far)", flush=True)
        goals = judge_goals(bench, memory)
    output = Path(__file__).parent / "results" / "io.json"
    output.parent.mkdir(exist_ok=True)
    facts = {"machine": machine.describe().as_dict(), "tables": bench.tables, "memory": memory}
    facts |= {"goals": goals, "not_measured": bench.failed}
    output.write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
