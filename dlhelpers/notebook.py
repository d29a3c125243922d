"""What does every notebook do in its set-up cell, and how does it show the package's own code?"""

from __future__ import annotations

from typing import Any

__all__ = ["setup", "show_source"]


def setup(seed: int = 0, threads: int | None = None) -> None:
    """Seed, set torch's threads and the style of figures; say in one line what this machine is.

    Args:
        seed: of Python, NumPy and torch.
        threads: torch's intra-op threads; None leaves them as they are.

    Raises:
        ValueError: threads is below 1.
    """
    import torch

    from dlhelpers import machine, plots
    from dlhelpers.training import seed_everything

    if threads is not None:
        if threads < 1:
            raise ValueError(f"threads must be 1 or more, or None to leave them, got {threads}")
        torch.set_num_threads(threads)
    seed_everything(seed)
    plots.use_style()
    line = f"{machine.describe().line} · {torch.get_num_threads()} threads · seed {seed}"
    _show({"text/plain": line})


def show_source(thing: Any) -> None:
    """Show the source of a function or class of this package, highlighted.

    Raises:
        TypeError: the thing has no Python source.
    """
    import inspect

    try:
        source = inspect.getsource(thing)
    except (OSError, TypeError) as error:
        raise TypeError(
            f"{thing!r} has no Python source to show: give a function or a class"
        ) from error
    from IPython.display import Code

    code = Code(source.rstrip(), language="python")
    _show({"text/html": code._repr_html_(), "text/plain": source})


def _show(bundle: dict[str, str]) -> None:
    from IPython import get_ipython
    from IPython.display import display

    if get_ipython() is not None:
        display(bundle, raw=True)
