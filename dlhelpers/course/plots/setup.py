"""How do figures come into a notebook? As pictures with alt text, in the course's style."""

from __future__ import annotations

import os

from dlhelpers.drawing.style import COLOURS, STYLE, alt_text, picture

__all__ = ["use_style"]


def use_style() -> None:
    """Give matplotlib the course's style; show figures in a notebook as pictures with alt text.

    Registers a formatter for the figures of the running IPython, pyplot's included.
    """
    import matplotlib
    from IPython import get_ipython
    from matplotlib.figure import Figure

    shell = get_ipython()
    if shell is not None and "inline" in os.environ.get("MPLBACKEND", ""):
        # else pyplot's first figure would activate it, and it puts its own formatters in
        shell.enable_matplotlib("inline")
    matplotlib.rcParams.update(STYLE, **{"axes.prop_cycle": matplotlib.cycler(color=COLOURS)})
    if shell is None:
        return
    formatters = shell.display_formatter.formatters
    formatters["text/html"].for_type(Figure, picture)
    formatters["text/plain"].for_type(Figure, lambda figure, p, cycle: p.text(alt_text(figure)))
    # the inline backend would store the picture a second time
    formatters["image/png"].for_type(Figure, lambda figure: None)
