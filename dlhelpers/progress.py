"""When does long work show a bar? By one rule, everywhere."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from functools import cache
from typing import Any

__all__ = ["bar"]

_WIDGET = "application/vnd.jupyter.widget-view+json"


def bar(iterable: Iterable[Any] | None = None, *, progress: bool | None, **options: Any) -> Any:
    """Return tqdm's bar, over an iterable or to be moved by hand.

    In a notebook it goes when the work is done, as a widget that is kept is dead in the stored
    file; a line of text stays, which is also what a page without widgets shows.

    Args:
        progress: True shows it, False does not, None shows it in a terminal only, and only if the
            work takes longer than a second.
        options: of ``tqdm``.
    """
    from tqdm.auto import tqdm
    from tqdm.notebook import tqdm_notebook

    shown = sys.stderr.isatty() if progress is None else progress
    kind = _fleeting() if shown and issubclass(tqdm, tqdm_notebook) else tqdm
    return kind(iterable, **{"delay": int(progress is None), "disable": not shown} | options)


@cache
def _fleeting() -> type:
    from IPython.display import display
    from tqdm.notebook import tqdm

    class Fleeting(tqdm):
        """A notebook's bar that leaves a line of text."""

        _place = None

        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options, display=False)
            if not self.disable and self.delay <= 0:
                self._show()

        def display(self, *arguments: Any, check_delay: bool = True, **options: Any) -> None:
            if check_delay and self.delay > 0 and not self.displayed:
                self._show()
            super().display(*arguments, check_delay=check_delay, **options)

        def close(self) -> None:
            super().close()
            if self._place is not None:
                self._place.update({"text/plain": self._line()}, raw=True)

        def _show(self) -> None:
            view = {"version_major": 2, "version_minor": 0, "model_id": self.container.model_id}
            bundle = {_WIDGET: view, "text/plain": self._line()}
            self._place = display(bundle, raw=True, display_id=True)
            self.displayed = True

        def _line(self) -> str:
            """Say what is counted, the same at the beginning and the end.

            What runs a notebook again to compare its outputs may see the first text alone.
            """
            name = self.desc.removesuffix(": ") or ("done" if self.unit == "it" else self.unit)
            return name if self.total in (None, 1) else f"{name}: {self.total:,}"

    return Fleeting
