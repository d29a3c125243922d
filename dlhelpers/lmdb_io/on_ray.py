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
import os
import socket
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from dlhelpers.arguments import whole_number
from dlhelpers.extras import need
from dlhelpers.lmdb_io.describing import info_lmdb
from dlhelpers.lmdb_io.merging import is_database
from dlhelpers.lmdb_io.opening import need_outside
from dlhelpers.lmdb_io.scanning import write_listing
from dlhelpers.lmdb_io.shards import shard_name
from dlhelpers.lmdb_io.writing import WriteReport, write_lmdb
from dlhelpers.printable import one_line
from dlhelpers.progress import bar

__all__ = ["write"]

_FIXED = {"resume": True, "append": False, "progress": False}  # of write_lmdb, in a task
_PATIENCE_S = 120.0  # a worker that Ray gave up may hold its lock for a while, over NFS above all
_REACH_S = 5.0


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
        address: of the cluster, such as ``10.0.0.1:6379`` or ``ray://10.0.0.1:10001``; ``auto`` is
            the one that runs on this machine. None takes the Ray that this process is connected
            to, or the one of ``RAY_ADDRESS``; without either it starts one here, and stops it at
            the end.
        cpus_per_task: cores that Ray reserves for a task; 1 + ``workers`` where that is given.
        retries: times that the task of a worker that died is started again.
        progress: a bar over the shards; None draws it in a terminal only.
        options: of ``write_lmdb``.

    Returns:
        A WriteReport of all shards. ``resumed_from`` counts what earlier calls, and workers that
        died, had stored.

    Raises:
        SourceError, OSError, ValueError, TypeError: as ``write_lmdb``; names the shard. It is not
            tried again, and what was converted stays. The other tasks end with the connection; on
            a Ray that this process was connected to before, they finish their shards.
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
    elif isinstance(source, (list, tuple)) and all(
        isinstance(path, (str, os.PathLike)) for path in source
    ):
        source = [Path(path).expanduser().resolve() for path in source]
    with _connected(ray, address), bar(progress=progress, total=shards, unit="shard") as shown:
        remote = ray.remote(
            num_cpus=cpus_per_task, max_retries=retries, scheduling_strategy="SPREAD"
        )
        if isinstance(source, Path):
            source = _result(ray, remote(_list_folder).remote(source, folder), "scan")
        shared, task = _put(ray, source), remote(_write_shard)
        left = {task.remote(shared, folder, (n, shards), options): n for n in range(shards)}
        reports: dict[int, WriteReport] = {}
        try:
            while left:
                (done,), _ = ray.wait(list(left), num_returns=1)
                reports[left[done]] = _result(ray, done, shard_name(left[done], shards))
                del left[done]
                shown.set_postfix_str(f"{sum(r.count for r in reports.values())} images", False)
                shown.update()
            _result(ray, remote(info_lmdb).remote(folder), "the folder of all shards")
        except BaseException as error:
            if folder.is_dir() and any(folder.iterdir()):
                error.add_note("what was converted is kept: the same call continues after it")
            raise
    return _together(folder, [reports[rank] for rank in range(shards)], start)


def _list_folder(source: Path, folder: Path) -> Path:
    """Scan an image folder once for all shards; a task, since the driver may not see it."""
    if not source.is_dir() or is_database(source):  # known already, or what write_lmdb refuses
        return source
    need_outside(folder, source)
    folder.mkdir(parents=True, exist_ok=True)
    write_listing(source, folder / "source.listing", progress=False)
    return folder / "source.listing"


def _write_shard(
    source: Any, folder: Path, shard: tuple[int, int], options: Mapping[str, Any]
) -> WriteReport:
    """Write one shard, a task."""
    until, report = time.monotonic() + _PATIENCE_S, None
    settings = {"shard": shard, "shards": shard[1], **_FIXED, **options}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        while report is None:
            try:
                report = write_lmdb(source, folder, **settings)
            except BlockingIOError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.2)
    notes = [str(one.message) for one in caught if "starting afresh" in str(one.message)]
    return replace(report, notes=(*report.notes, *notes))


@contextmanager
def _connected(ray: Any, address: str | None) -> Iterator[None]:
    """Connect to a cluster, or start a local one and stop it again; leave what is connected."""
    if ray.is_initialized():
        if address is not None:
            raise ValueError(
                f"this process is connected to Ray already: leave out address={address!r}, or "
                "call ray.shutdown() first"
            )
        yield
        return
    _need_reachable(address or os.environ.get("RAY_ADDRESS", ""))
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "include_dashboard": False}
    try:
        ray.init(address or os.environ.get("RAY_ADDRESS", "local"), **quiet)
    except ConnectionError as error:
        raise ConnectionError(
            f"no Ray at {address or 'RAY_ADDRESS'} accepts this process ({error}): give what "
            "ray start --head prints, and RAY_AUTH_TOKEN where it asks for a token"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _need_reachable(address: str) -> None:
    """Raise at once where nothing listens at an address, for which Ray itself takes a minute."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_S).close()
    except OSError as error:
        raise ConnectionError(
            f"nothing answers at {address} ({error}): give what ray start --head prints there"
        ) from None


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
            f"{what}: its worker died each time ({why}); where memory ran out, give more "
            "cpus_per_task, so that fewer run at once"
        ) from error


def _check(cpus_per_task: Any, options: Mapping[str, Any]) -> None:
    if not (isinstance(cpus_per_task, (int, float)) and 0 < cpus_per_task < 1e6):
        raise ValueError(f"cpus_per_task must be a positive number, got {cpus_per_task!r}")
    known = set(inspect.signature(write_lmdb).parameters) - {"shard", *_FIXED}
    if odd := sorted(set(options) - known):
        raise TypeError(f"on_ray.write has no option {odd[0]!r}: expected one of write_lmdb")


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
