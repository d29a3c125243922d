"""How do reports draw what they hold? Ratios, shares and lanes, in one style.

Source of the colours: Okabe & Ito 2008, Color Universal Design, https://jfly.uni-koeln.de/color/.
"""

from dlhelpers.drawing.strips import strip
from dlhelpers.drawing.traces import lanes, shares

__all__ = ["lanes", "shares", "strip"]
