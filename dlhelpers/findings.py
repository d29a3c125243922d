"""What a check of the reader's own model found: where, what, why, and the remedy as code.

A finding is an ``error`` where something is certain to be wrong, a ``suspicion`` where the
values look wrong and a healthy program could still produce them.
"""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import Literal

from dlhelpers.printable import printable

__all__ = ["Finding", "Findings", "Severity"]

Severity = Literal["error", "suspicion"]


@dataclass(frozen=True)
class Finding:
    """One entry of a check.

    Attributes:
        name: stable identifier, such as ``softmax-into-cross-entropy``.
        severity: ``error`` or ``suspicion``.
        what: what was seen, with the values.
        why: what it does to training or inference.
        remedy: code that mends it.
        where: ``file.py:12``, a module's path in the model, or empty.
    """

    name: str
    severity: Severity
    what: str
    why: str
    remedy: str
    where: str = ""

    def details(self) -> list[tuple[str, str]]:
        """Return what it says, as (heading, text)."""
        return [("what", self.what), ("why", self.why), ("remedy", self.remedy)]

    def __str__(self) -> str:
        place = f" at {self.where}" if self.where else ""
        lines = [f"  {heading:<7} {text}" for heading, text in self.details() if text]
        return printable("\n".join([f"{self.severity}: {self.name}{place}", *lines]))


class Findings(list[Finding]):
    """A list of findings that prints and displays itself.

    Attributes:
        scope: what an empty list says: how much was looked at, where that is not plain.
        note: stands below the findings; empty for nothing.

    >>> print(Findings())
    nothing found
    """

    scope: str = "nothing found"
    note: str = ""

    @property
    def errors(self) -> Findings:
        """The findings of severity ``error`` alone."""
        return Findings(finding for finding in self if finding.severity == "error")

    def __str__(self) -> str:
        found = "\n".join(map(str, self)) or self.scope
        return f"{found}\n({self.note})" if self.note else found

    __repr__ = __str__

    def _repr_html_(self) -> str:
        note = f"<p>({html.escape(self.note)})</p>" if self.note else ""
        if not self:
            return f"<p>{html.escape(self.scope[:1].upper() + self.scope[1:])}.</p>{note}"
        rows = "".join(
            f"<tr style='text-align:left;vertical-align:top'><td><b>{html.escape(f.severity)}</b>"
            f"</td><td>{html.escape(f.name)}<br><small>{html.escape(f.where)}</small></td>"
            f"<td style='text-align:left'>{html.escape(f.what)}<br>{html.escape(f.why)}"
            f"{_more(f)}</td><td style='text-align:left'><code style='white-space:pre-wrap'>"
            f"{html.escape(f.remedy)}</code></td></tr>"
            for f in self
        )
        head = "<tr><th></th><th>finding</th><th>what and why</th><th>remedy</th></tr>"
        return f"<table><thead>{head}</thead><tbody>{rows}</tbody></table>{note}"


def _more(finding: Finding) -> str:
    """What a kind of finding says beyond what, why and remedy."""
    known = {"what", "why", "remedy"}
    return "".join(
        f"<br><i>{heading}</i>: {html.escape(text)}"
        for heading, text in finding.details()
        if text and heading not in known
    )
