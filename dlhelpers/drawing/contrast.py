"""Which text can be read on which ground? The rule of WCAG 2.2: a contrast of 4.5 to 1 at least.

With L the relative luminance of a colour, 0.2126 R + 0.7152 G + 0.0722 B of its linear parts, the
contrast is (L_light + 0.05) / (L_dark + 0.05).

Source: W3C, Web Content Accessibility Guidelines 2.2, success criterion 1.4.3.
"""

from __future__ import annotations

__all__ = ["LEAST", "as_text", "contrast", "text_on"]

LEAST = 4.5  # of text of ordinary size


def contrast(one: str, other: str) -> float:
    """Return the contrast of two colours, 1 to 21.

    Args:
        one, other: as ``#rrggbb``.

    >>> contrast("#ffffff", "#000000")
    21.0
    """
    dark, light = sorted((_luminance(one), _luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def text_on(ground: str) -> str:
    """Return white where it can be read on a ground, else black.

    >>> text_on("#0072b2"), text_on("#cc79a7")
    ('#ffffff', '#000000')
    """
    return "#ffffff" if contrast("#ffffff", ground) >= LEAST else "#000000"


def as_text(colour: str, ground: str = "#ffffff") -> str:
    """Return a colour darkened until text in it can be read on a light ground.

    >>> as_text("#0072b2")
    '#0072b2'
    >>> contrast(as_text("#e69f00"), "#ffffff") >= LEAST
    True
    """
    parts, share = _parts(colour), 1.0
    while contrast(colour, ground) < LEAST and share > 0:
        share -= 0.02
        colour = "#" + "".join(f"{max(0, int(part * share)):02x}" for part in parts)
    return colour


def _parts(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))


def _luminance(colour: str) -> float:
    linear = []
    for part in _parts(colour):
        c = part / 255
        linear.append(c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4)
    red, green, blue = linear
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
