"""Is DALILoader faster than DALI as its documentation shows it, and than what people use instead?

One epoch over the same photographs a call, every ratio with its interval from paired, interleaved
calls against DALILoader on the folder. Each row starts its epoch when it is called and has nothing
left to do when the call ends, so that no row works in another one's time.

A  eval: shorter side to 256 with antialiasing, centre crop 224, normalised, order fixed; each
   row's last batch is compared with torchvision's, in steps of 1/255 of the pixel range
B  train: random resized crop 224, horizontal flip, normalised, shuffled
1  one DALI thread or one worker; DataLoader also without a worker. DALI's thread and a worker both
   leave Python's main thread to hand the batches over
2  two of them

Prints tables and what is faster than DALILoader, and writes benchmarks/results/dali.json.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dali_peers as peers
import torch
from dali_peers import BATCH, Job
from io_race import Bench, Make, epoch_check
from torchvision.datasets import ImageFolder

from dlhelpers import machine
from dlhelpers.course import data
from dlhelpers.dali_io import DALILoader, image_pipeline, torchvision_transform
from dlhelpers.dali_io.transforms import STD
from dlhelpers.lmdb_io import LMDBDataset, write_lmdb

OWN = "DALILoader, folder"
TABLES = {"A1": (False, 1), "A2": (False, 2), "B1": (True, 1), "B2": (True, 2)}
WORST_MEAN = 8  # of 255: decoders and filters differ by less, another crop or image by far more


class Reference:
    """The last batch of an epoch in torchvision, which the others' eval batches must resemble."""

    def __init__(self, folder: Path, count: int) -> None:
        tree = ImageFolder(folder, torchvision_transform(peers.SIZE, train=False))
        self.size = (count - 1) % BATCH + 1
        samples = [tree[i] for i in range(count - self.size, count)]
        self.images = torch.stack([image for image, _ in samples])
        self.targets = torch.tensor([target for _, target in samples])

    def check_eval(self, batch: Any) -> str:
        images, targets = self._checked(batch)
        if not torch.equal(targets, self.targets):
            raise ValueError("targets of other images, or in another order")
        steps = (images - self.images).abs() * torch.tensor(STD).view(3, 1, 1) * 255
        mean, worst = float(steps.mean()), float(steps.max())
        if mean >= WORST_MEAN:
            raise ValueError(f"off torchvision by {mean:.1f} of 255 on average")
        return f"off torchvision by {mean:.2f}, at most {worst:.0f}"

    def check_train(self, batch: Any) -> str:
        images, _ = self._checked(batch)
        if not 0.3 < images.std() < 3:
            raise ValueError(f"standard deviation {images.std():.2f}")
        return f"std {images.std():.2f}"

    def _checked(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        images, targets = batch[0], batch[1].flatten()
        wanted = (self.size, 3, peers.SIZE, peers.SIZE)
        if images.shape != wanted or images.dtype != torch.float32 or len(targets) != self.size:
            raise ValueError(f"{images.dtype} {tuple(images.shape)}, {len(targets)} targets")
        return images, targets


def own_epoch(job: Job, source: Any) -> Callable[[], Any]:
    pipeline = image_pipeline(
        source,
        size=peers.SIZE,
        batch_size=BATCH,
        train=job.train,
        device="cpu",
        threads=job.threads,
    )
    return peers.epoch_of(DALILoader(pipeline))


def rows_of(job: Job) -> dict[str, Make]:
    """Return what a table races; the first is the baseline."""
    transform = torchvision_transform(peers.SIZE, train=job.train)

    def own_decoder(threads: int = 1) -> Any:
        return LMDBDataset(job.database, transform, threads=threads)

    datasets: dict[str, Callable[[], Any]] = {
        "torchvision v2, PIL": lambda: ImageFolder(job.folder, transform),
        "torchvision v2, LMDBDataset": own_decoder,
        "OpenCV + numpy": lambda: peers.OpenCV(job.folder, job.train),
    }
    rows: dict[str, Make] = {
        OWN: lambda: own_epoch(job, job.folder),
        "DALILoader, LMDBDataset": lambda: own_epoch(job, LMDBDataset(job.database)),
        "DALI, as documented": lambda: peers.dali_epoch(job),
        "DALI, subpixel_scale=False": lambda: peers.dali_epoch(job, subpixel_scale=False),
        "DALI, dynamic mode": lambda: peers.dynamic_epoch(job),
        "SPDL": lambda: peers.spdl_epoch(job),
    }
    if job.threads > 1:
        rows[f"torchvision v2, LMDBDataset, {job.threads} threads"] = lambda: peers.loader_epoch(
            job, own_decoder(job.threads), 0
        )
    for workers in (0, 1) if job.threads == 1 else (job.threads,):
        for name, make in datasets.items():
            rows[f"{name}, {workers} worker{'s' * (workers != 1)}"] = (
                lambda make=make, workers=workers: peers.loader_epoch(job, make(), workers)
            )
    return rows


def tell_faster(bench: Bench) -> list[dict[str, Any]]:
    """Print the peers whose whole interval lies above DALILoader's speed."""
    print(f"\nFaster than {OWN}")
    found = [
        {"table": table, "name": name, "speedup": row.speedup, "low": row.low, "high": row.high}
        for (table, name), row in bench.rows.items()
        if row.low > 1
    ]
    for row in found:
        ratio = f"{row['speedup']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
        print(f"  {row['table']} {row['name']:<40}{ratio}")
    if not found:
        print(f"  none of {len(bench.rows)} rows")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=320, help="images (%(default)s)")
    parser.add_argument("--size", type=int, default=400, help="of them, in pixels (%(default)s)")
    parser.add_argument("--budget", type=float, default=20, help="seconds a row (%(default)s)")
    parser.add_argument("--rows", default="", help="only rows whose name holds this text")
    parser.add_argument("--tables", nargs="+", default=list(TABLES), choices=TABLES)
    parser.add_argument("--folder", type=Path, help="for images and database, else temporary")
    output = Path(__file__).parent / "results" / "dali.json"
    parser.add_argument("--json", type=Path, default=output, help="to write (%(default)s)")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")  # the peers' own
    torch.set_num_threads(1)
    # workers come from a server that has no threads: forks of a process that runs DALI may hang
    multiprocessing.set_forkserver_preload(["torchvision.transforms.v2", "dlhelpers.lmdb_io"])
    start = time.perf_counter()
    print(machine.describe().line)
    bench = Bench(given.budget, given.rows)
    root = given.folder or Path(tempfile.gettempdir())
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, ignore_cleanup_errors=True) as name:
        folder = data.photos(
            Path(name, "photos"), count=given.count, size=given.size, progress=False
        )
        peers.crop_some(folder)
        database = write_lmdb(folder, Path(name, "photos.lmdb"), progress=False).path
        reference = Reference(folder, given.count)
        print(f"{given.count} JPEGs up to {given.size} px wide and high, batches of {BATCH}")
        for table in given.tables:
            train, threads = TABLES[table]
            job = Job(folder, database, given.count, train, threads)
            title = f"{table} {'train' if train else 'eval'}, {threads} thread{'s' * (threads > 1)}"
            check = reference.check_train if train else reference.check_eval
            bench.race(title, rows_of(job), given.count, epoch_check(given.count, check))
            print(f"  ({time.perf_counter() - start:.0f} s so far)", flush=True)
    faster = tell_faster(bench)
    given.json.parent.mkdir(exist_ok=True)
    facts = {"machine": machine.describe().as_dict(), "tables": bench.tables, "faster": faster}
    given.json.write_text(json.dumps(facts | {"not_measured": bench.failed}, indent=1))


if __name__ == "__main__":
    main()
