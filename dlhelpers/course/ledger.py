"""Where do the verdicts of this machine stand, and how do they get there unharmed?

A ledger is one JSON file with these keys:

    schema    2
    machine   what ``dlhelpers.machine.describe()`` found, with its ``line`` and ``key``
    versions  package -> version, when it was last written
    created   time of the ledger's beginning, ISO 8601, UTC
    rows[]    one row a claim: id, judged (time, UTC), versions (package -> version), control,
              predictions and earlier ones (condition, says, sure, when), axis (unit, where,
              threshold, and of each point: at, effect, low, high, verdict; null without), and of
              each of its conditions: name, verdict, agreement, effect, low, high, threshold,
              theory, since, reason

and, once a change to the slow script was measured, ``script[]``, one row per change: id (the field
of ``Settings``), value, speedup, low, high, outcome, epochs and peak_bytes (before and after, or
null), measured (time, UTC); once a short exercise was attempted in a notebook, ``short[]``, one row
per exercise: id, passed, attempts, measured (time, UTC); and, once a real exercise was attempted,
``real[]``, one row per exercise: id, on (what it was solved on), passed, attempts, value, low,
high, unit, explanation (the reader's), measured (time, UTC).

``verdict`` is one of holds, fails, unsettled, not-measured, and ``reason`` says why it is one of
the last two; ``agreement`` (agrees, against, open) says whether that is what the theory of the
day predicted. ``predictions`` are the reader's, empty where nobody was asked; those of an earlier
run move to ``earlier`` when new ones come. What a ledger of schema 1 lacks is null: unknown.
Numbers that are not finite are null too: the file is strict JSON. A file is replaced whole (written
beside, then renamed) under a lock, so that processes which write at once lose no row and no reader
sees half a file.

It lies in the user's cache folder, or where the environment variable DLHELPERS_LEDGER says. A
ledger belongs to one machine and one build of torch: where another machine's is found it is put
aside as ``ledger.json.KEY`` and taken up again when that machine is back.
"""

from __future__ import annotations

import json
import math
import os
import platform
import warnings
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dlhelpers.course import ledger_schema
from dlhelpers.course.ledger_schema import SCHEMA

__all__ = [
    "SCHEMA",
    "LedgerError",
    "default_path",
    "describe_machine",
    "read",
    "record",
    "start",
    "update",
]

_PACKAGES = ("dlhelpers", "torch", "torchvision", "numpy")
_LOCK_S = 20.0
_warned: set[str] = set()  # ledgers that could not be written, each of them said once


class LedgerError(ValueError):
    """A file that is no ledger; the message names it and what is wrong."""


def default_path() -> Path:
    """Return the ledger's path: DLHELPERS_LEDGER, else ``ledger.json`` in the user's cache."""
    if named := os.environ.get("DLHELPERS_LEDGER"):
        return Path(named).expanduser().absolute()
    from dlhelpers.files import cache_dir

    return cache_dir() / "ledger.json"


def read(path: str | Path | None = None) -> dict[str, Any]:
    """Return a ledger as a dict, checked; one of schema 1 as schema 2, with null for what it lacks.

    Raises:
        FileNotFoundError: there is none yet.
        LedgerError: the file is no ledger of these schemas.
        OSError: it cannot be read.
    """
    path = default_path() if path is None else Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        ledger = _strict(json.loads(text, parse_constant=_refuse_constant))  # 1e999 is infinite
    except (ValueError, RecursionError) as error:  # no JSON, or no UTF-8
        raise LedgerError(f"{path} is no ledger: {error}") from error
    if problem := ledger_schema.problem(ledger):
        raise LedgerError(f"{path} is no ledger: {problem}")
    return ledger_schema.upgraded(ledger)


def start(path: str | Path) -> None:
    """Begin a ledger without rows; one that is there already is replaced.

    Raises:
        OSError: the folder cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _lock(path):
        _load(path)  # puts a file aside that is no ledger
        _replace(path, _empty())


def update(
    row: Mapping[str, Any], path: str | Path | None = None, part: str = "rows"
) -> dict[str, Any]:
    """Write the row of one claim or change, in place of an earlier one; return it as it is kept.

    The earlier row's predictions are kept. A file that is no ledger is put
    aside as ``ledger.json.bad-1`` (-2, ...) with a warning.

    Args:
        row: keys as in the module's docstring; ``judged`` (``measured``) and ``versions`` are
            those of now where they are left out, and ``earlier`` is filled in.
        path: the ledger; :func:`default_path` where None.
        part: of the ledger: ``rows`` for a claim, ``script`` for a change to the slow script,
            ``real`` and ``short`` for an exercise.

    Raises:
        LedgerError: the row breaks the schema.
        OSError: the folder cannot be written, or the lock was not free for 20 s.
    """
    path = default_path() if path is None else Path(path)
    row = _strict(_usual(part) | dict(row))
    keys, problem_of = ledger_schema.PARTS[part]
    if problem := problem_of(row):
        raise LedgerError(f"this row cannot be kept in a ledger: {problem}")
    row = {key: row[key] for key in keys}
    path.parent.mkdir(parents=True, exist_ok=True)
    with _lock(path):
        ledger = _own(path, _load(path))
        rows = {old["id"]: old for old in ledger.get(part, [])}
        if part == "rows" and (old := rows.get(row["id"])):
            before = {_key(said): said for said in (*old["earlier"], *old["predictions"])}
            if row["predictions"]:
                new = {_key(said) for said in row["predictions"]}
                row["earlier"] = [said for key, said in before.items() if key not in new]
            else:
                row |= {key: old[key] for key in ("predictions", "earlier")}
        rows[row["id"]] = row
        _replace(path, ledger | {part: list(rows.values())})
    return row


def _usual(part: str) -> dict[str, Any]:
    if part != "rows":
        return {"measured": _now()}
    return {
        "predictions": [], "earlier": [], "axis": None, "judged": _now(), "versions": _versions(),
    }  # fmt: skip


def _key(said: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(said.values())


def record(row: Mapping[str, Any], part: str = "rows") -> dict[str, Any] | None:
    """Write a row to the default ledger and return it as it is kept.

    Where that is not writable there is one warning, and None is returned.

    Args:
        row: of a claim, of a change, or of a real exercise.
        part: as in :func:`update`.
    """
    path = default_path()
    try:
        return update(row, path, part)
    except OSError as error:
        if str(path) not in _warned:
            _warned.add(str(path))
            warnings.warn(
                f"the ledger {path} cannot be written ({error}); verdicts are shown and not kept. "
                "Set the environment variable DLHELPERS_LEDGER to a file that can be written.",
                stacklevel=3,
            )


@cache
def describe_machine() -> dict[str, Any]:
    """Return what this machine is, with its ``line`` and ``key``, as a ledger holds it."""
    from dlhelpers import machine

    found = machine.describe()
    return _strict({"line": found.line, "key": found.key} | dict(found.as_dict()))


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    for found in describe_machine().get("extras", {}).values():
        versions |= {package: version for package, version in found.items() if version}
    return versions


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _empty() -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "machine": describe_machine(),
        "versions": _versions(),
        "created": _now(),
        "rows": [],
    }


def _lock(path: Path) -> Any:
    from filelock import FileLock

    return FileLock(f"{path}.lock", timeout=_LOCK_S)


def _load(path: Path) -> dict[str, Any] | None:
    """Return the ledger that is there, None without one; what is no ledger is put aside."""
    try:
        return read(path)
    except FileNotFoundError:
        return None
    except LedgerError as error:
        aside = next(
            name for n in range(1, 10_000) if not (name := Path(f"{path}.bad-{n}")).exists()
        )
        os.replace(path, aside)
        warnings.warn(f"{error}; it was put aside as {aside.name}", stacklevel=4)
        return None


def _own(path: Path, ledger: dict[str, Any] | None) -> dict[str, Any]:
    """Return this machine's ledger, after putting another machine's aside."""
    machine = describe_machine()
    if ledger is not None and ledger["machine"].get("key", machine["key"]) != machine["key"]:
        os.replace(path, f"{path}.{_file_name(ledger['machine']['key'])}")
        ledger = _load(Path(f"{path}.{_file_name(machine['key'])}"))
    if ledger is None:
        return _empty()
    return ledger | {"machine": machine, "versions": _versions()}


def _file_name(key: Any) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in str(key))[:64]


def _replace(path: Path, ledger: dict[str, Any]) -> None:
    text = json.dumps(ledger, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # a lone surrogate becomes \udXXX, which is how JSON writes it
        with open(beside, "w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def _strict(value: Any) -> Any:
    """Return plain JSON values: floats that are not finite become None."""
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
