"""How is a name shown that no terminal can print?"""

from __future__ import annotations

__all__ = ["one_line", "printable"]


def printable(text: str) -> str:
    r"""Return text with what cannot be printed escaped.

    File names are bytes: Python hands on those that are no UTF-8 as lone surrogates, which no
    strict stream writes. Lines and tabs stay.

    >>> print(printable(b"caf\xe9.jpg".decode("utf-8", "surrogateescape")))
    caf\xe9.jpg
    """
    if text.isprintable():
        return text
    return "".join(map(_escaped, text))


def one_line(text: str) -> str:
    r"""Return text as :func:`printable` does, on one line: for a name within a message.

    A name that holds a newline could be taken for a line of the report that lists it.

    >>> print(one_line("cat\n2 skipped.jpg"))
    cat\n2 skipped.jpg
    """
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    if 0xD800 <= code <= 0xDFFF:
        return f"\\u{code:04x}"
    if (code < 0x20 and character not in "\n\t") or code == 0x7F:
        return f"\\x{code:02x}"
    return character
