"""How is a name shown that no terminal can print?"""

from __future__ import annotations

__all__ = ["one_line", "printable"]


def printable(text: str) -> str:
    r"""Return text with what cannot be printed escaped.

    File names are bytes: Python hands on those that are no UTF-8 as lone surrogates, which no
    strict stream writes. Characters that move the cursor, reverse the text, break a line or
    are invisible are escaped as well. Newlines and tabs stay.

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
    if character.isprintable() or character in "\n\t":
        return character
    return character.encode("unicode_escape").decode()
