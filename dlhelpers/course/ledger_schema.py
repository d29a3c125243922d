"""What must a ledger hold, and how is one of an earlier schema read?

Schema 1 had a verdict and a number for the claim, and for its conditions neither threshold nor
theory; what it lacks stays null, which means unknown. Nothing is taken from today's claims. It had
one answer for all conditions, as had the first rows of schema 2: it is kept as an earlier
prediction that names no condition, and not scored.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date, datetime
from typing import Any, get_args

from dlhelpers.course.verdicts import (
    STRADDLES,
    Settled,
    Theory,
    Threshold,
    agreement_of,
    control_off,
)

__all__ = [
    "PARTS",
    "SCHEMA",
    "problem",
    "row_problem",
    "upgraded",
]

SCHEMA = 2
_KEYS = ("schema", "machine", "versions", "created", "rows")
_ROW_KEYS = (
    "id", "judged", "versions", "control", "predictions", "earlier", "axis", "conditions",
)  # fmt: skip
_CHANGE_KEYS = (
    "id", "value", "speedup", "low", "high", "outcome", "epochs", "peak_bytes", "measured",
)  # fmt: skip
_REAL_KEYS = (
    "id", "on", "passed", "attempts", "value", "low", "high", "unit", "explanation", "measured",
)  # fmt: skip
_OPTIONAL = ("script", "real")
_FIRST_ROW_KEYS = ("id", "judged", "versions", "control", "answer", "answered", "conditions")
_AXIS_KEYS = ("unit", "where", "threshold", "points")
_POINT_KEYS = ("at", "effect", "low", "high", "verdict")
_SAID_KEYS = ("condition", "says", "sure", "when")
_CONDITION_KEYS = (
    "name", "verdict", "agreement", "effect", "low", "high", "threshold", "theory", "since",
    "reason",
)  # fmt: skip
_CONTROL_KEYS = ("effect", "low", "high", "outcome")
_VERDICTS = get_args(Settled)
_OLD_ROW_KEYS = ("id", "verdict", "effect", "low", "high", "control", "answer", "conditions")
_OLD_CONDITION_KEYS = ("name", "verdict", "effect", "low", "high", "reason")
_A_TIME = "a time, 2026-11-30T12:00:00+00:00"
_NO_INTERVAL = "no interval, the reason is unknown"
_OLD_ANSWERS = {"holds": "all", "fails": "none", "depends": "some"}


def problem(ledger: Any) -> str:
    """Return what keeps this from being a ledger of schema 1 or 2, empty where nothing does."""
    if not isinstance(ledger, dict) or set(ledger) - set(_OPTIONAL) != set(_KEYS):
        found = sorted(ledger) if isinstance(ledger, dict) else type(ledger).__name__
        return f"expected the keys {', '.join(_KEYS)}, got {found}"
    schema = ledger["schema"]
    if schema not in (1, SCHEMA) or isinstance(schema, bool):
        return f"schema {schema!r}, this version reads 1 and {SCHEMA}"
    for key, kind in (("machine", dict), ("versions", dict), ("created", str), ("rows", list)):
        if not isinstance(ledger[key], kind):
            return f"{key} must be of type {kind.__name__}, got {ledger[key]!r}"
    seen: set[str] = set()
    for number, row in enumerate(ledger["rows"], start=1):
        if said := (row_problem(row) if schema == SCHEMA else _old_row_problem(row)):
            return f"row {number}: {said}"
        if row["id"] in seen:
            return f"row {number}: a second row of {row['id']!r}"
        seen.add(row["id"])
    for part in _OPTIONAL:
        if not isinstance(rows := ledger.get(part, []), list):
            return f"{part} must be a list of rows, got {rows!r}"
        for row in rows:
            if said := PARTS[part][1](row):
                return f"{part}: {said}"
    return ""


def _change_problem(row: Any) -> str:
    """Return what keeps this from being a change to the script, empty where nothing does."""
    if not isinstance(row, dict) or set(row) != set(_CHANGE_KEYS):
        return f"expected the keys {', '.join(_CHANGE_KEYS)}, got {row!r}"
    for key in ("id", "outcome"):
        if not isinstance(row[key], str):
            return f"{key} must be text, got {row[key]!r}"
    for key in ("speedup", "low", "high"):
        if not isinstance(row[key], (int, float, type(None))):
            return f"{key} must be a number or null, got {row[key]!r}"
    for key in ("epochs", "peak_bytes"):
        pair = row[key]
        if pair is not None and not (
            isinstance(pair, list) and [type(number) for number in pair] == [int, int]
        ):
            return f"{key} must be two whole numbers, before and after, or null, got {pair!r}"
    return _unlike(row, "measured", datetime.fromisoformat, _A_TIME)


def _real_problem(row: Any) -> str:
    """Return what keeps this from being a real exercise's row, empty where nothing does."""
    if not isinstance(row, dict) or set(row) != set(_REAL_KEYS):
        return f"expected the keys {', '.join(_REAL_KEYS)}, got {row!r}"
    for key in ("id", "on", "unit", "explanation"):
        if not isinstance(row[key], str):
            return f"{key} must be text, got {row[key]!r}"
    for key in ("value", "low", "high"):
        if not isinstance(row[key], (int, float, type(None))):
            return f"{key} must be a number or null, got {row[key]!r}"
    if not isinstance(row["passed"], bool):
        return f"passed must be true or false, got {row['passed']!r}"
    if type(row["attempts"]) is not int or row["attempts"] < 1:
        return f"attempts must be a whole number from 1, got {row['attempts']!r}"
    return _unlike(row, "measured", datetime.fromisoformat, _A_TIME)


def row_problem(row: Any) -> str:
    """Return what keeps this from being a row of schema 2, empty where nothing does."""
    is_first = isinstance(row, dict) and "answer" in row
    keys = _FIRST_ROW_KEYS if is_first else _ROW_KEYS
    if said := _parts_problem(row, keys, _CONDITION_KEYS):
        return said
    for key in ("judged", "answered") if is_first else ("judged",):
        if said := _unlike(row, key, datetime.fromisoformat, _A_TIME):
            return said
    for key in () if is_first else ("predictions", "earlier"):
        if said := _said_problem(row[key]):
            return f"{key}: {said}"
    if not is_first and (said := _axis_problem(row["axis"])):
        return f"axis: {said}"
    if not isinstance(row["versions"], (dict, type(None))):
        return f"versions must map packages to versions or be null, got {row['versions']!r}"
    for c in row["conditions"]:
        said = _unlike(c, "threshold", Threshold.parse, "text such as '>= 1.05'")
        said = said or _unlike(c, "since", date.fromisoformat, "a day such as 2026-11-30")
        if said:
            return f"conditions: {said}"
        if c["theory"] not in (*get_args(Theory), None):
            return f"conditions: theory {c['theory']!r} is none of {', '.join(get_args(Theory))}"
        if c["agreement"] != (right := agreement_of(c["verdict"], c["theory"])):
            return (
                f"conditions: agreement {c['agreement']!r} of {c['name']!r} must be {right!r}, for "
                f"the verdict is {c['verdict']!r} and theory says {c['theory']!r}"
            )
    return ""


def upgraded(ledger: dict[str, Any]) -> dict[str, Any]:
    """Return a checked ledger as one of schema 2."""
    upgrade = _with_predictions if ledger["schema"] == SCHEMA else _upgraded_row
    return ledger | {"schema": SCHEMA, "rows": list(map(upgrade, ledger["rows"]))}


def _with_predictions(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of schema 2 with predictions of single conditions."""
    if "answer" not in row:
        return dict(row)
    rest = {key: value for key, value in row.items() if key not in ("answer", "answered")}
    earlier = _as_earlier(row["answer"], row["answered"])
    return rest | {"predictions": [], "earlier": earlier, "axis": None}


def _as_earlier(answer: str | None, when: str | None) -> list[dict[str, Any]]:
    said = {"condition": "", "says": answer, "sure": None, "when": when}
    return [] if answer is None else [said]


def _upgraded_row(row: Mapping[str, Any]) -> dict[str, Any]:
    off = control_off(row["control"]["outcome"]) if row["control"] else ""
    return {
        "id": row["id"],
        "judged": None,
        "versions": None,
        "control": row["control"],
        "predictions": [],
        "earlier": _as_earlier(_OLD_ANSWERS.get(row["answer"], row["answer"]), None),
        "axis": None,
        "conditions": [_upgraded_condition(c, off) for c in row["conditions"]],
    }


def _upgraded_condition(condition: Mapping[str, Any], off: str) -> dict[str, Any]:
    """Return a condition of schema 2; a control that was off leaves it unsettled."""
    verdict, reason = condition["verdict"], condition["reason"]
    if off and verdict in ("holds", "fails"):
        verdict, reason = "unsettled", off
    elif verdict == "unsettled" and not reason:
        reason = _NO_INTERVAL if condition["high"] is None else STRADDLES
    unknown = dict.fromkeys(_CONDITION_KEYS)
    return unknown | dict(condition) | {"verdict": verdict, "reason": reason}


def _old_row_problem(row: Any) -> str:
    if said := _parts_problem(row, _OLD_ROW_KEYS, _OLD_CONDITION_KEYS):
        return said
    if row["verdict"] not in (*_VERDICTS, "depends"):
        return f"verdict {row['verdict']!r} is none of {', '.join(_VERDICTS)}, depends"
    return _not_numbers(row)


def _parts_problem(row: Any, row_keys: tuple[str, ...], condition_keys: tuple[str, ...]) -> str:
    if not isinstance(row, dict) or set(row) != set(row_keys):
        found = sorted(row) if isinstance(row, dict) else type(row).__name__
        return f"expected the keys {', '.join(row_keys)}, got {found}"
    answer = row.get("answer")
    if not isinstance(row["id"], str) or not isinstance(answer, (str, type(None))):
        return f"id must be text and answer text or null, got {row['id']!r}, {answer!r}"
    if not isinstance(row["conditions"], list):
        return f"conditions must be a list, got {row['conditions']!r}"
    parts = [("conditions: ", c, condition_keys) for c in row["conditions"]]
    if row["control"] is not None:
        parts.append(("control: ", row["control"], _CONTROL_KEYS))
    for where, part, keys in parts:
        if not isinstance(part, dict) or set(part) != set(keys):
            return f"{where}expected the keys {', '.join(keys)}, got {part!r}"
        if part.get("verdict", "holds") not in _VERDICTS:
            return f"{where}verdict {part['verdict']!r} is none of {', '.join(_VERDICTS)}"
        if said := _not_numbers(part):
            return where + said
        for key in {"name", "reason", "outcome"} & set(part):
            if not isinstance(part[key], str):
                return f"{where}{key} must be text, got {part[key]!r}"
    return ""


def _axis_problem(axis: Any) -> str:
    if axis is None:
        return ""
    if not isinstance(axis, dict) or set(axis) != set(_AXIS_KEYS):
        return f"expected null or the keys {', '.join(_AXIS_KEYS)}, got {axis!r}"
    for key in ("unit", "where"):
        if not isinstance(axis[key], str):
            return f"{key} must be text, got {axis[key]!r}"
    if not isinstance(axis["points"], list) or not axis["points"]:
        return f"points must be a list of points, got {axis['points']!r}"
    for point in axis["points"]:
        if not isinstance(point, dict) or set(point) != set(_POINT_KEYS):
            return f"expected the keys {', '.join(_POINT_KEYS)}, got {point!r}"
        if point["verdict"] not in _VERDICTS:
            return f"verdict {point['verdict']!r} is none of {', '.join(_VERDICTS)}"
        if not isinstance(point["at"], (int, float)):
            return f"at must be a number, got {point['at']!r}"
        if said := _not_numbers(point):
            return said
    return _unlike(axis, "threshold", Threshold.parse, "text such as '>= 1.05'")


def _said_problem(predictions: Any) -> str:
    if not isinstance(predictions, list):
        return f"must be a list, got {predictions!r}"
    for said in predictions:
        if not isinstance(said, dict) or set(said) != set(_SAID_KEYS):
            return f"expected the keys {', '.join(_SAID_KEYS)}, got {said!r}"
        if not isinstance(said["condition"], str) or not _may_say(**said):
            return (
                "says must be 'holds', 'fails' or a positive number, and any text where no "
                f"condition is named, got {said!r}"
            )
        if said["sure"] not in (1, 2, 3, None) or isinstance(said["sure"], bool):
            return f"sure must be 1, 2, 3 or null, got {said['sure']!r}"
        if wrong := _unlike(said, "when", datetime.fromisoformat, _A_TIME):
            return wrong
    return ""


def _may_say(condition: str, says: Any, **_: Any) -> bool:
    if not condition:  # an answer on all conditions, as earlier releases took it
        return isinstance(says, str)
    return says in ("holds", "fails") or (type(says) in (int, float) and says > 0)


def _not_numbers(part: Mapping[str, Any]) -> str:
    for key in ("effect", "low", "high"):
        if not isinstance(part[key], (int, float, type(None))):
            return f"{key} must be a number or null, got {part[key]!r}"
    return ""


def _unlike(part: Mapping[str, Any], key: str, read: Any, wanted: str) -> str:
    """Say what is wrong with a text that must be read by a function, or be null."""
    value = part[key]
    try:
        if value is not None:
            read(value)
    except (TypeError, ValueError):
        return f"{key} must be {wanted}, or null, got {value!r}"
    return ""


PARTS = {
    "rows": (_ROW_KEYS, row_problem),
    "script": (_CHANGE_KEYS, _change_problem),
    "real": (_REAL_KEYS, _real_problem),
}  # part of a ledger -> keys of its rows, and what keeps something from being one
