"""When does long work show a bar? By one rule, everywhere."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

__all__ = ["bar"]


def bar(iterable: Iterable[Any] | None = None, *, progress: bool | None, **options: Any) -> Any:
    """Return tqdm's bar, over an iterable or to be moved by hand.

    Args:
        progress: True shows it, False does not, None shows it in a terminal only, since a notebook
            keeps what it prints, and only if the work takes longer than a second.
        options: of ``tqdm``.
    """
    from tqdm.auto import tqdm

    shown = sys.stderr.isatty() if progress is None else progress
    return tqdm(iterable, **{"delay": int(progress is None), "disable": not shown} | options)
