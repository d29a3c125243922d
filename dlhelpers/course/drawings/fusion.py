"""How does BatchNorm fold into a convolution, and where can it not?"""

from __future__ import annotations

from dlhelpers.drawing.panel import GREY, ORANGE, RUST, Panel

__all__ = ["folding", "folding_refused"]


def folding() -> Panel:
    """Two layers become one."""
    alt = """Above, a convolution with weight W and bias b, then BatchNorm with fixed mean and
    variance: two layers. Below, one convolution with weight s W and bias beta + s (b - mu),
    s = gamma / sqrt(sigma^2 + eps): one layer with the same output."""
    p = Panel(640, 210, alt, "In eval mode BatchNorm is a factor and an offset per channel")
    p.text(20, 84, "x")
    p.arrow(34, 80, 80, 80)
    p.box(82, 56, 150, 48, "convolution\nW, b")
    p.arrow(234, 80, 290, 80)
    p.box(292, 56, 190, 48, "BatchNorm\nγ, β, μ, σ²", fill=ORANGE)
    p.arrow(484, 80, 540, 80)
    p.text(548, 84, "y")
    p.arrow(287, 110, 287, 134)
    p.text(20, 164, "x")
    p.arrow(34, 160, 80, 160)
    p.box(82, 136, 400, 48, "convolution\nW' = s W,   b' = β + s (b − μ)")
    p.arrow(484, 160, 540, 160)
    p.text(548, 164, "the same y")
    p.text(82, 202, "s = γ / √(σ² + ε), one number per output channel", size=12)
    return p


def folding_refused() -> Panel:
    """Two places where a second reader of the convolution forbids folding."""
    alt = """Two networks that must not be folded. Left: the convolution's output goes to BatchNorm
    and also straight to another layer, which would then get the folded values. Right: one
    convolution is called twice, and each call is followed by a BatchNorm of its own, so that one
    weight would have to hold two different factors."""
    p = Panel(640, 200, alt, "Refused: someone else needs the convolution as it was")
    p.text(20, 56, "its output branches", bold=True)
    p.box(20, 88, 64, 40, "conv")
    p.arrow(86, 100, 138, 84)
    p.arrow(86, 116, 138, 146)
    p.box(140, 66, 96, 36, "BatchNorm", fill=ORANGE)
    p.box(140, 130, 96, 36, "add", fill=GREY)
    p.text(20, 188, "add would get the folded values", colour=RUST)
    p.text(330, 56, "its weight is shared", bold=True)
    for y, name in ((66, "BatchNorm 1"), (130, "BatchNorm 2")):
        p.box(330, y, 110, 36, "conv, weight W")
        p.arrow(442, y + 18, 488, y + 18)
        p.box(490, y, 110, 36, name, fill=ORANGE)
    p.line([(385, 104), (385, 128)])
    p.text(394, 120, "the same W", size=12)
    p.text(330, 188, "W cannot be s1 W and s2 W at once", colour=RUST)
    return p
