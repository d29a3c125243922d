"""docs/fourteen-million-images.md, from what benchmarks/scale.py has measured."""
# ruff: noqa: E501  (rows of Markdown)

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["PAGE", "render"]

PAGE = Path(__file__).parent.parent / "docs" / "fourteen-million-images.md"
GOAL = 14_000_000

HEAD = """# Fourteen million images

ImageNet-21k has fourteen million images. What does a database of so many need, how do several
machines write it, and when is another format the better one?

`benchmarks/scale.py` measures the costs of a record at growing numbers of records and writes this
page. Its records are tiny, so that what is measured is the cost of a record and not of its bytes:
a real image adds the time that reading, decoding and storing its bytes takes. The last column is
computed: a cost per image is taken as it is at the largest number, all others continue the line
through the two largest numbers.
"""

ROWS: tuple[tuple[str, str, str, bool], ...] = (  # what, key, unit, whether it is per image
    ("conversion, per image, one process", "write_us", "us", True),
    ("conversion, anonymous memory", "write_mb", "MB", False),
    ("file, per image beyond its own bytes", "own_bytes", "B", True),
    ("opening, and the first record", "open_ms", "ms", False),
    ("memory of a reader that has opened it", "open_mb", "MB", False),
    ("a record at random, in the page cache", "read_us", "us", True),
    ("memory of a reader after random reads", "read_mb", "MB", False),
    ("`np.asarray(targets)`", "targets_ms", "ms", False),
    ("memory of that array", "targets_mb", "MB", False),
    ("a walk through `samples`: all keys and targets", "samples_ms", "ms", False),
    ("first index of an epoch, RandomSampler", "shuffle_ms", "ms", False),
    ("its memory", "shuffle_mb", "MB", False),
    ("first index of an epoch, WindowSampler", "window_ms", "ms", False),
    ("its memory ", "window_mb", "MB", False),
)
TOTALS = (
    ("conversion, one process", "write_us", "us"),
    ("files beyond the images", "own_bytes", "B"),
)

PEERS_HEAD = """## Side by side

The same tiny records, each written in one process and read in it, from the page cache and a local
disk, which is where the formats for remote storage have nothing to gain. *Own order* is the
shuffled order that a format is made for: for LMDB and plain files a full shuffle, for LitData and
MosaicML Streaming shuffled chunks, for WebDataset a buffer of a thousand records. Bytes are those
of the blocks on the disk. The records of this package hold their key and a checksum, and a
conversion ends with an fsync; the others have neither.
"""

CHOICE = """## Which one to use

| you have | take | because |
|---|---|---|
| images on a local disk or a file system that all nodes mount | this package | any record at once, hence a full shuffle, subsets and evaluation by index; checksums; conversions that resume; nothing is pickled |
| storage by object (S3, GCS, Azure), and nodes without room for all of it | LitData, MosaicML Streaming | they download shards as an epoch needs them and evict them again; an LMDB file has to be there whole, as a file that can be mapped |
| several data sets, mixed in proportions | MosaicML Streaming, LitData | both mix streams by weight; here ConcatDataset and a weighted sampler do it, without resuming in the middle of an epoch |
| training that resumes on another number of nodes | MosaicML Streaming; this package on a mounted file system | its order does not depend on the number of nodes; `WindowSampler` resumes from one number that counts what was consumed |
| token streams and tensors of one length | LitData | it stores them without a header per item and cuts them anew for each block size |
| archives that every tool can read, or a pipe as the source | WebDataset | tar files, read front to back at the speed of the disk or the network; no access by index, and an epoch's length is declared rather than known |
| preprocessing in stages on CPUs and GPUs of a cluster, joins, filters | Ray Data | it plans and schedules a pipeline; `on_ray` runs one function per shard and nothing else |
| one machine, decoding that costs more than anything else, and time to build it | FFCV | compiled pipelines, and images stored at the size that training needs; it is built from source against OpenCV and libjpeg-turbo |
| few images, or images that still change | plain files | nothing to convert, and each change is there at once |

A file system on spinning disks or over a network reads records in random order slowly, whatever the
format: copy the shards to local disks first, or shuffle within windows (`WindowSampler`).

## On many machines

Ray places the tasks, starts those of a worker that died again, and the same command continues
where a driver was killed:

```sh
pip install "dlhelpers[lmdb,ray]"
python -m dlhelpers lmdb write /mnt/photos /mnt/db --shards 256 --ray                # all cores here
python -m dlhelpers lmdb write /mnt/photos /mnt/db --shards 256 --ray 10.0.0.1:6379  # a cluster
```

Without Ray, the ranks of torchrun or Slurm share one scan of the folder and the shards:

```sh
python -m dlhelpers lmdb list /mnt/photos /mnt/photos.listing
torchrun --nnodes 4 --nproc-per-node 16 -m dlhelpers lmdb write /mnt/photos.listing /mnt/db \\
  --shard torchrun --shards 256 --resume
```

`LMDBDataset("/mnt/db")` opens the folder once all of its shards are there and belong together.
"""


def render(facts: Mapping[str, Any]) -> str:
    """Return the page as Markdown."""
    parts = [HEAD, "## How the costs grow\n", f"Measured on {facts['machine']}.\n"]
    parts.append(_growth(facts["sizes"]))
    if facts["peers"]:
        parts += ["", PEERS_HEAD, f"{facts['peers_count']:,} records on {facts['machine']}.\n"]
        parts.append(_side_by_side(facts["peers"]))
    return "\n".join([*parts, "", CHOICE])


def _growth(sizes: Mapping[str, Mapping[str, float]]) -> str:
    counts = sorted(map(int, sizes))
    heads = [f"{count:,}" for count in counts]
    lines = [_line(["", *heads, f"{GOAL:,}, computed"]), "|---" + "|---:" * (len(heads) + 1) + "|"]
    for what, key, unit, is_flat in ROWS:
        values = [sizes[str(count)].get(key) for count in counts]
        if None in values:
            continue
        last = values[-1] if is_flat else _continued(counts, values)
        lines.append(_line([what.strip(), *(_shown(value, unit) for value in [*values, last])]))
    for what, key, unit in TOTALS:
        totals = [sizes[str(count)][key] * count for count in counts]
        totals.append(sizes[str(counts[-1])][key] * GOAL)
        lines.append(_line([f"{what}, in whole", *(_shown(total, unit) for total in totals)]))
    return "\n".join(lines)


def _continued(counts: list[int], values: list[float]) -> float:
    """Return the value at the goal, on the line through the last two; never below the last."""
    if len(counts) < 2:
        return values[-1]
    slope = (values[-1] - values[-2]) / (counts[-1] - counts[-2])
    return max(values[-1], values[-1] + slope * (GOAL - counts[-1]))


def _side_by_side(peers: Mapping[str, Mapping[str, Any]]) -> str:
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "version": lambda row: row["version"],
        "conversion, per image": lambda row: _shown(row["write_us"], "us"),
        "bytes per image beyond its own": lambda row: _shown(row["own_bytes"], "B"),
        "files": lambda row: f"{row['files']:,}",
        "opening": lambda row: _shown(row["open_ms"], "ms"),
        "random access": lambda row: _shown(row["read_us"], "us") if "read_us" in row else "none",
        "own order": lambda row: _shown(row["stream_us"], "us"),
    }
    lines = [_line(["", *columns]), "|---" + "|---:" * len(columns) + "|"]
    for name, row in peers.items():
        if "why" in row:
            cells = [f"not measured: {row['why']}"] + [""] * (len(columns) - 1)
        else:
            cells = [cell(row) for cell in columns.values()]
        lines.append(_line([name, *(cell.replace("|", "/") for cell in cells)]))
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


_LARGER = {
    "us": ("ms", 1e3), "ms": ("s", 1e3), "s": ("min", 60), "min": ("h", 60),
    "B": ("kB", 1e3), "kB": ("MB", 1e3), "MB": ("GB", 1e3),
}  # fmt: skip


def _shown(value: float, unit: str) -> str:
    """Return a value in the largest unit that leaves one or more before the point."""
    if value != value:
        return "not told"
    while unit in _LARGER and abs(value) >= 2 * _LARGER[unit][1]:
        unit, size = _LARGER[unit]
        value /= size
    return f"{value:.{0 if abs(value) >= 100 else 1}f} {unit}"
