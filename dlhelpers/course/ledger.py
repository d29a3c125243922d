"""Where do the verdicts of this machine stand, and how do they get there unharmed?

A ledger is one JSON file with exactly these keys:

    schema    1
    machine   what ``dlhelpers.machine.describe()`` found, with its ``line`` and ``key``
    versions  package -> version
    created   time of the ledger's beginning, ISO 8601, UTC
    rows[]    id, verdict, effect, low, high, control, answer, conditions; one row a claim

``verdict`` is one of holds, fails, depends, unsettled, not-measured. Numbers that are not finite
are null: the file is strict JSON. A file is replaced whole (written beside, then renamed) under
a lock, so that processes which write at once lose no row and no reader sees half a file.

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

SCHEMA = 1
_KEYS = ("schema", "machine", "versions", "created", "rows")
_ROW_KEYS = ("id", "verdict", "effect", "low", "high", "control", "answer", "conditions")
_CONDITION_KEYS = ("name", "verdict", "effect", "low", "high", "reason")
_CONTROL_KEYS = ("effect", "low", "high", "outcome")
_VERDICTS = ("holds", "fails", "depends", "unsettled", "not-measured")
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
    """Return a ledger as a dict, checked.

    Raises:
        FileNotFoundError: there is none yet.
        LedgerError: the file is no ledger of this schema.
        OSError: it cannot be read.
    """
    path = default_path() if path is None else Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        ledger = _strict(json.loads(text, parse_constant=_refuse_constant))  # 1e999 is infinite
    except (ValueError, RecursionError) as error:  # no JSON, or no UTF-8
        raise LedgerError(f"{path} is no ledger: {error}") from error
    if problem := _problem(ledger):
        raise LedgerError(f"{path} is no ledger: {problem}")
    return ledger


def start(path: str | Path) -> None:
    """Begin a ledger without rows; one that stands there already is replaced.

    Raises:
        OSError: the folder cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _lock(path):
        _load(path)  # puts a file aside that is no ledger
        _replace(path, _empty())


def update(row: Mapping[str, Any], path: str | Path | None = None) -> None:
    """Write the row of one claim, in place of an earlier one.

    An earlier row's answer is kept where the new one has none. A file that is no ledger is put
    aside as ``ledger.json.bad-1`` (-2, ...) with a warning.

    Args:
        row: keys as in the module's docstring.
        path: the ledger; :func:`default_path` where None.

    Raises:
        LedgerError: the row breaks the schema.
        OSError: the folder cannot be written, or the lock was not free for 20 s.
    """
    path = default_path() if path is None else Path(path)
    row = _strict(dict(row))
    if problem := _row_problem(row):
        raise LedgerError(f"this row cannot stand in a ledger: {problem}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with _lock(path):
        ledger = _own(path, _load(path))
        rows = {old["id"]: old for old in ledger["rows"]}
        if row["answer"] is None and row["id"] in rows:
            row["answer"] = rows[row["id"]]["answer"]
        rows[row["id"]] = row
        _replace(path, ledger | {"rows": list(rows.values())})


def record(row: Mapping[str, Any]) -> None:
    """Write a row to the default ledger; one warning, and no error, where that is not writable."""
    path = default_path()
    try:
        update(row, path)
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
    return versions


def _empty() -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "machine": describe_machine(),
        "versions": _versions(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "rows": [],
    }


def _lock(path: Path) -> Any:
    from filelock import FileLock

    return FileLock(f"{path}.lock", timeout=_LOCK_S)


def _load(path: Path) -> dict[str, Any] | None:
    """Return the ledger that stands there, None without one; what is no ledger is put aside."""
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


def _problem(ledger: Any) -> str:
    """Return what keeps this from being a ledger, empty where nothing does."""
    if not isinstance(ledger, dict) or set(ledger) != set(_KEYS):
        found = sorted(ledger) if isinstance(ledger, dict) else type(ledger).__name__
        return f"expected the keys {', '.join(_KEYS)}, got {found}"
    if ledger["schema"] != SCHEMA or isinstance(ledger["schema"], bool):
        return f"schema {ledger['schema']!r}, this version reads {SCHEMA}"
    for key, kind in (("machine", dict), ("versions", dict), ("created", str), ("rows", list)):
        if not isinstance(ledger[key], kind):
            return f"{key} must be of type {kind.__name__}, got {ledger[key]!r}"
    seen: set[str] = set()
    for number, row in enumerate(ledger["rows"], start=1):
        if problem := _row_problem(row):
            return f"row {number}: {problem}"
        if row["id"] in seen:
            return f"row {number}: a second row of {row['id']!r}"
        seen.add(row["id"])
    return ""


def _row_problem(row: Any) -> str:
    if not isinstance(row, dict) or set(row) != set(_ROW_KEYS):
        found = sorted(row) if isinstance(row, dict) else type(row).__name__
        return f"expected the keys {', '.join(_ROW_KEYS)}, got {found}"
    if not isinstance(row["id"], str) or not isinstance(row["answer"], (str, type(None))):
        return f"id must be text and answer text or null, got {row['id']!r}, {row['answer']!r}"
    if not isinstance(row["conditions"], list):
        return f"conditions must be a list, got {row['conditions']!r}"
    parts = [("", row, _ROW_KEYS)]
    parts += [("conditions: ", c, _CONDITION_KEYS) for c in row["conditions"]]
    if row["control"] is not None:
        parts.append(("control: ", row["control"], _CONTROL_KEYS))
    for where, part, keys in parts:
        if not isinstance(part, dict) or set(part) != set(keys):
            return f"{where}expected the keys {', '.join(keys)}, got {part!r}"
        if part.get("verdict", "holds") not in _VERDICTS:
            return f"{where}verdict {part['verdict']!r} is none of {', '.join(_VERDICTS)}"
        for key in ("effect", "low", "high"):
            if not isinstance(part[key], (int, float, type(None))):
                return f"{where}{key} must be a number or null, got {part[key]!r}"
        for key in {"name", "reason", "outcome"} & set(part):
            if not isinstance(part[key], str):
                return f"{where}{key} must be text, got {part[key]!r}"
    return ""
