"""What does every notebook do in its set-up cell, and how does it show the package's own code?"""

from __future__ import annotations

import html
import io
import keyword
import sys
import token
import tokenize
from typing import Any

__all__ = ["in_ipython", "setup", "show", "show_source"]


def setup(seed: int = 0, threads: int | None = None) -> None:
    """Seed, set torch's threads and the style of figures; say in one line what this machine is.

    In a kernel, the lines that torch's profiler itself writes to stderr are dropped from now on.

    Args:
        seed: of Python, NumPy and torch.
        threads: torch's intra-op threads; None leaves them as they are.

    Raises:
        ValueError: threads is below 1.
    """
    import torch

    from dlhelpers import machine
    from dlhelpers.course import plots, stderr_filter
    from dlhelpers.course.training import seed_everything

    if threads is not None:
        if threads < 1:
            raise ValueError(f"threads must be 1 or more, or None to leave them, got {threads}")
        torch.set_num_threads(threads)
    if in_ipython():
        stderr_filter.install()
    seed_everything(seed)
    plots.use_style()
    used = torch.get_num_threads()
    line = f"{machine.describe().line} · {used} thread{'s' * (used > 1)} · seed {seed}"
    show({"text/plain": line})


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
    show({"text/html": _highlighted(source), "text/plain": source})


def in_ipython() -> bool:
    """Whether this runs inside an IPython shell or kernel."""
    module = sys.modules.get("IPython")
    return module is not None and module.get_ipython() is not None


def show(bundle: dict[str, Any]) -> None:
    """Display a mime bundle where IPython is active, else do nothing."""
    if in_ipython():
        from IPython.display import display

        display(bundle, raw=True)


def _highlighted(source: str) -> str:
    """Colour source by the theme's own colours, alike for each version of Python."""
    text, parts, done = source.rstrip("\n"), [], 0
    starts = [0]
    for line in io.StringIO(text):
        starts.append(starts[-1] + len(line))
    for kind, first, last in _coloured(text):
        begin, end = starts[first[0] - 1] + first[1], starts[last[0] - 1] + last[1]
        colour = f"var(--jp-mirror-editor-{kind}-color,inherit)"
        parts += [html.escape(text[done:begin]), f'<span style="color:{colour}">']
        parts += [html.escape(text[begin:end]), "</span>"]
        done = end
    body = "".join([*parts, html.escape(text[done:])])
    style = (
        "color:var(--jp-ui-font-color1,currentColor);padding:0;"
        "font-family:var(--jp-code-font-family,monospace);font-size:var(--jp-code-font-size,13px);"
        "line-height:var(--jp-code-line-height,1.3)"
    )
    return f'<pre class="highlight" style="{style}">{body}</pre>'


def _coloured(text: str) -> list[tuple[str, tuple[int, int], tuple[int, int]]]:
    """Return (kind, first, last) of all tokens that have a colour; positions as tokenize's."""
    found, opened = [], []
    try:
        for part in tokenize.generate_tokens(io.StringIO(text).readline):
            name = token.tok_name[part.type]
            if name.endswith("STRING_START"):  # from 3.12 on f-strings come in pieces
                opened.append(part.start)
            elif name.endswith("STRING_END"):
                start = opened.pop()
                if not opened:
                    found.append(("string", start, part.end))
            elif not opened:
                kind = {"STRING": "string", "COMMENT": "comment", "NUMBER": "number"}.get(name)
                if name == "NAME" and keyword.iskeyword(part.string):
                    kind = "keyword"
                if kind:
                    found.append((kind, part.start, part.end))
    except (tokenize.TokenError, SyntaxError):  # a method is indented, its end may not be
        pass
    return found
