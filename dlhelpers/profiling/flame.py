"""How does one look at a profile? snakeviz's own page, static: no server, no network.

The page is the one that the ``snakeviz`` command serves, with its scripts, its style and the data
inside, so that it works in JupyterLab, in exported HTML and as a file.
"""

from __future__ import annotations

import html
import json
import pstats
import re
from pathlib import Path

from dlhelpers.arguments import whole_number
from dlhelpers.extras import install_hint, need
from dlhelpers.files import write_whole

__all__ = ["Flame"]

_SHRUNK = 0.7


class Flame:
    """The interactive view of a profile; shows itself in a notebook.

    Args:
        stats: the profile.
        height: of the frame, in pixels.

    Attributes:
        page: the whole page as HTML, about 0.7 MB.
    """

    def __init__(self, stats: pstats.Stats, height: int = 500) -> None:
        self._stats, self._height = stats, whole_number("height", height, 100)
        self.page = _page(stats)

    def save(self, path: str | Path) -> Path:
        """Write the page as an ``.html`` file; whole, or not at all."""
        return write_whole(path, (".html",), lambda name: Path(name).write_text(self.page, "utf-8"))

    def __repr__(self) -> str:
        return f"an interactive view of {len(self._stats.stats)} functions; a click zooms in"

    def _repr_html_(self) -> str:
        # the page is made for a whole window: it is drawn larger, and shrunk
        return (
            f'<div style="width:100%;height:{self._height}px;overflow:hidden;border:1px solid '
            f'var(--jp-border-color2,#ccc)"><iframe title="{html.escape(repr(self))}" '
            f'sandbox="allow-scripts" style="width:{100 / _SHRUNK:.2f}%;'
            f"height:{self._height / _SHRUNK:.0f}px;border:0;background:white;"
            f'transform:scale({_SHRUNK});transform-origin:0 0" '
            f'srcdoc="{html.escape(self.page)}"></iframe></div>'
        )


def _page(stats: pstats.Stats) -> str:
    snakeviz, of_stats = need("snakeviz", "flame"), need("snakeviz.stats", "flame")
    callees = of_stats.json_stats(stats)
    if not callees:
        raise ValueError("the profile has no function that calls another: there is nothing to draw")
    folder = Path(snakeviz.__file__).parent
    templates = need("tornado.template", "flame").Loader(str(folder / "templates"))
    page = templates.load("viz.html").generate(
        profile_name="profile",
        table_rows=_script(of_stats.table_rows(stats)),
        callees=_script(callees),
    )
    return _inlined(page.decode(), folder / "static")


def _script(data: object) -> str:
    """JSON that may stand inside a script element, whatever the names of functions hold."""
    return json.dumps(data).replace("<", "\\u003c")


def _inlined(page: str, static: Path) -> str:
    """Put the content of all files that the page asks for into the page."""

    def read(name: str) -> str:
        return (static / name).read_text("utf-8").replace("</script", "<\\/script")

    libraries = read("vendor/immutable.min.js") + ";\n" + read("vendor/lodash.min.js") + ";\n"
    for pattern, make in (
        (r"<link href=\"/static/([^\"]+)\" rel=\"stylesheet\">", lambda m: _style(read(m[1]))),
        (r"<script src=[\"']/static/([^\"']+)[\"']></script>", lambda m: _element(read(m[1]))),
        (_IMPORTS, lambda m: "// its libraries stand above\n"),
        (r'type="javascript/worker">', lambda m: m[0] + "\n" + libraries),
    ):
        page, count = re.subn(pattern, make, page, flags=re.DOTALL)
        if not count:
            raise RuntimeError(
                f"snakeviz's page is another one than 2.2's: it has no {pattern!r}. "
                f"Fix it by: {install_hint('snakeviz')}"
            )
    return page


_IMPORTS = r"// Try loading JS from CDN.*?(?=var depth = 0;)"


def _style(text: str) -> str:
    # its pictures are arrows of a table, which sorts without them as well
    return f"<style>{re.sub(r'url[(][^)]*[)]', 'none', text)}</style>"


def _element(text: str) -> str:
    return f"<script>{text}</script>"
