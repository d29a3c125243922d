"""What is left of an output on GitHub, which strips styles, scripts and inline pictures.

Source: the lists of elements and attributes of gjtorikian/html-pipeline, sanitization_filter.rb.
"""

from __future__ import annotations

import html
from html.parser import HTMLParser

_TAGS = """
h1 h2 h3 h4 h5 h6 br b i strong em a pre code img tt div ins del sup sub p picture ol ul table thead
tbody tfoot blockquote dl dt dd kbd q samp var hr ruby rt rp li tr td th s strike summary details
caption figure figcaption abbr bdo cite dfn mark small source span time wbr
"""
_ATTRIBUTES = """
abbr align alt aria-label aria-hidden border cellpadding cellspacing char charoff clear cols colspan
color compact coords datetime dir disabled for frame headers height hreflang hspace label lang
longdesc maxlength media method multiple name nohref noshade nowrap open progress prompt readonly
rel rev role rows rowspan rules scope selected shape size span start summary tabindex title type
usemap valign value width itemprop
"""
_TAGS, _ATTRIBUTES = (set(names.split()) for names in (_TAGS, _ATTRIBUTES))
_VOID = {"br", "hr", "img", "wbr", "source"}
_EMPTIED = {"script", "style", "svg", "iframe"}


class Sanitizer(HTMLParser):
    """Reads a page; ``kept`` lists the elements that remain, ``page`` is the page made of them."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.kept: list[tuple[str, dict[str, str]]] = []
        self.page, self._inside = "", 0
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs):
        if tag in _EMPTIED:
            self._inside += 1
        elif tag in _TAGS and not self._inside:
            kept = {k: v or "" for k, v in attrs if k in _ATTRIBUTES}
            for k, v in attrs:
                if (tag, k) in (("a", "href"), ("img", "src")) and v.startswith(
                    ("data:image/", "https://", "#")
                ):
                    kept[k] = v
            self.kept.append((tag, kept))
            told = "".join(f' {k}="{html.escape(v)}"' for k, v in kept.items())
            self.page += f"<{tag}{told}>"

    def handle_endtag(self, tag):
        if tag in _EMPTIED:
            self._inside -= 1
        elif tag in _TAGS - _VOID and not self._inside:
            self.page += f"</{tag}>"

    def handle_data(self, data):
        if not self._inside:
            self.page += html.escape(data, quote=False)

    @property
    def text(self) -> str:
        """What can be read, alt texts included."""
        inner = HTMLParser()
        words: list[str] = []
        inner.handle_data = words.append
        inner.handle_starttag = lambda tag, attrs: words.append(dict(attrs).get("alt") or "")
        inner.feed(self.page)
        return " ".join(" ".join(words).split())

    @property
    def pictures(self) -> list[dict[str, str]]:
        """The pictures that are left, with their alt texts."""
        return [kept for tag, kept in self.kept if tag == "img" and kept.get("src")]
