"""How is a source of millions of images converted on many cores, and on many machines?

Ray runs ``write_lmdb(shard=...)`` as one task per shard: it places the tasks, notices workers that
die, and starts their tasks again, which go on after the last commit. A shard that is finished and
of this source is not written again, so the same call goes on after a driver that was killed.

    on_ray.write("photos", "photos.lmdb", shards=64)                          # all cores, here
    on_ray.write("/mnt/photos", "/mnt/db", shards=64, address="10.0.0.1:6379")      # a cluster

Without Ray, the ranks of torchrun or Slurm write the same shards (``write_lmdb(shard=...)``).

Source: Moritz et al. 2018, Ray: A Distributed Framework for Emerging AI Applications, OSDI 2018.
"""

from __future__ import annotations

import inspect
import logging
import math
import os
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from typing import Any

from dlhelpers.arguments import whole_number
from dlhelpers.extras import need
from dlhelpers.lmdb_io.ray_tasks import FIXED, list_folder, write_shard
from dlhelpers.lmdb_io.shards import shard_name
from dlhelpers.lmdb_io.verifying import info_lmdb
from dlhelpers.lmdb_io.writing import WriteReport, write_lmdb
from dlhelpers.printable import one_line
from dlhelpers.progress import bar

__all__ = ["write"]

_FAREWELL_S = 30.0  # that stopped tasks have to end


def write(
    source: Any,
    path: str | os.PathLike[str],
    shards: int,
    *,
    address: str | None = None,
    cpus_per_task: float = 1,
    retries: int = 3,
    progress: bool | None = None,
    **options: Any,
) -> WriteReport:
    """Convert a source into a folder of shards, each a task of Ray.

    Args:
        source: as ``write_lmdb`` takes it: the path of a folder that every node sees, or what can
            be pickled.
        path: the folder of the shards, on a file system that every node sees. An image folder is
            scanned once, into ``source.listing`` in it.
        shards: how many; several per core keep all cores busy to the end, and lose less with a
            worker that dies.
        address: of the cluster, such as ``10.0.0.1:6379`` or ``ray://10.0.0.1:10001``. None takes
            the Ray that this process is connected to, the one of ``RAY_ADDRESS`` or of this
            machine; where none runs, it starts one here and stops it at the end.
        cpus_per_task: cores that Ray reserves for a task; 1 + ``workers`` where that is given.
        retries: times that the task of a worker that died is started again.
        progress: a bar over the shards; None draws it in a terminal only.
        options: of ``write_lmdb``.

    Returns:
        A WriteReport of all shards. ``resumed_from`` counts what earlier calls, and workers that
        died, had stored.

    Raises:
        SourceError, OSError, ValueError, TypeError: as ``write_lmdb``; names the shard. It is not
            tried again, the other tasks are stopped, and what was converted stays.
        ChildProcessError: the workers of one shard died each time.
        ConnectionError: no cluster answers at the address, or it asks for another token.
        ImportError: Ray is not installed.
    """
    start = time.perf_counter()
    ray = need("ray", "on_ray.write")
    shards = whole_number("shards", shards, 1)
    retries = whole_number("retries", retries, 0)
    _check(cpus_per_task, options)
    folder = Path(path).expanduser().resolve()
    if isinstance(source, (str, os.PathLike)):
        source = Path(source).expanduser().resolve()  # tasks have other working directories
    with _connected(ray, address), bar(progress=progress, total=shards, unit="shard") as shown:
        remote = ray.remote(
            num_cpus=cpus_per_task, max_retries=retries, scheduling_strategy="SPREAD"
        )
        if isinstance(source, Path):
            source = _result(ray, remote(list_folder).remote(source, folder), "scan")
        shared = source if isinstance(source, Path) else _put(ray, source)
        task, stop = remote(write_shard), folder / f".stop-{uuid.uuid4().hex}"
        left = {
            task.remote(shared, folder, (rank, shards), options, stop): rank
            for rank in range(shards)
        }
        reports: dict[int, WriteReport] = {}
        try:
            while left:
                (done,), _ = ray.wait(list(left), num_returns=1)
                reports[left[done]] = _result(ray, done, shard_name(left[done], shards))
                del left[done]
                count = sum(report.count for report in reports.values())
                shown.set_postfix_str(f"{count} images", refresh=False)
                shown.update()
            _result(ray, remote(info_lmdb).remote(folder), "the folder of all shards")
        except BaseException as error:
            _stop_all(ray, [*left], stop)
            error.add_note("what was converted is kept: the same call goes on after it")
            raise
    return _together(folder, [reports[rank] for rank in range(shards)], start)


def _stop_all(ray: Any, left: Sequence[Any], stop: Path) -> None:
    """End tasks by a file: ray.cancel ends the driver where a task ends at that moment (#54785)."""
    at_once = ray.remote(num_cpus=0)
    ray.get(at_once(Path.touch).remote(stop), timeout=_FAREWELL_S)
    if len(ray.wait(list(left), num_returns=len(left), timeout=_FAREWELL_S)[0]) == len(left):
        ray.get(at_once(Path.unlink).remote(stop), timeout=_FAREWELL_S)


@contextmanager
def _connected(ray: Any, address: str | None) -> Iterator[None]:
    """Connect to a cluster, or start a local one and stop it again; leave what is connected."""
    if ray.is_initialized():
        if address is not None:
            raise ValueError(
                f"this process is connected to Ray already, address={address!r} would be another "
                "cluster: leave it out, or call ray.shutdown() first"
            )
        yield
        return
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "include_dashboard": False}
    try:
        ray.init(address or _address_here(), **quiet)
    except ConnectionError as error:
        raise ConnectionError(
            f"no Ray at {address or 'the address found here'} lets this process in ({error}): give "
            "the address that ray start --head prints, and where it asks for one, its token "
            "(RAY_AUTH_TOKEN)"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _address_here() -> str | None:
    """Return None for ray.init to find a cluster, which waits minutes for one that was killed."""
    found = Path(os.environ.get("RAY_TMPDIR", tempfile.gettempdir()), "ray", "ray_current_cluster")
    if "RAY_ADDRESS" in os.environ:
        return None
    try:
        host, _, port = found.read_text().strip().rpartition(":")
        socket.create_connection((host, int(port)), 5).close()
    except (OSError, ValueError):
        return "local"
    return None


def _put(ray: Any, source: Any) -> Any:
    try:
        return ray.put(source)
    except TypeError as error:
        raise TypeError(
            f"a source of type {type(source).__name__} cannot be sent to other processes: give the "
            "path of a folder, or what pickle takes, such as a dataset or a list of triples"
        ) from error


def _result(ray: Any, done: Any, what: str) -> Any:
    try:
        return ray.get(done)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, OSError) and cause.strerror:  # which is what it shows
            cause.strerror = f"{what}: {cause.strerror}"
        else:
            cause.args = (f"{what}: {cause}",)
        raise cause from None
    except ray.exceptions.RayError as error:
        why = one_line(str(error).strip().partition("\n")[0])
        raise ChildProcessError(
            f"{what}: its worker died each time that the task was started ({why}); where memory "
            "ran out, give more cpus_per_task, so that fewer run at once"
        ) from error


def _check(cpus_per_task: Any, options: Mapping[str, Any]) -> None:
    if not (isinstance(cpus_per_task, Real) and 0 < cpus_per_task < math.inf):
        raise ValueError(f"cpus_per_task must be a positive number, got {cpus_per_task!r}")
    known = set(inspect.signature(write_lmdb).parameters)
    for name in options:
        if name not in known - {"shard", *FIXED}:
            raise TypeError(f"on_ray.write has no option {name!r}: expected one of write_lmdb")


def _together(folder: Path, reports: Sequence[WriteReport], start: float) -> WriteReport:
    """Return the report of all shards; what each says of the whole source stands there once."""
    notes = [note for report in reports for note in report.notes]
    return WriteReport(
        folder,
        sum(report.count for report in reports),
        sum(report.image_bytes for report in reports),
        tuple(dict.fromkeys(one for report in reports for one in report.skipped)),
        reports[0].ignored,
        tuple(n for n in dict.fromkeys(notes) if not n.startswith(f"1 of {len(reports)} shard")),
        sum(report.resumed_from for report in reports),
        time.perf_counter() - start,
    )
