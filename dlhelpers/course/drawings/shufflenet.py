"""Which channels does a convolution connect, and how does ShuffleNetV2's unit mix them?"""

from __future__ import annotations

from dlhelpers.drawing.panel import BLUE, GREY, ORANGE, Panel
from dlhelpers.drawing.style import FAILING, TREATMENT

__all__ = ["connections", "shuffle_unit"]


def connections(channels: int = 4) -> Panel:
    """Dense, grouped and depthwise convolutions: the lines that join inputs to outputs."""
    alt = """Four input channels above, four output channels below, three times. Dense: every input
    is joined to every output. Two groups: only within each half. Depthwise: each input only to its
    own output. The number of connections falls as one over the number of groups."""
    p = Panel(640, 210, alt, "More groups, fewer connections, and no mixing between groups")
    for column, (name, groups) in enumerate(
        (("dense", 1), ("2 groups", 2), ("depthwise", channels))
    ):
        left, size = 40 + 205 * column, channels // groups
        joined = [
            (i, o) for i in range(channels) for o in range(channels) if i // size == o // size
        ]
        for i, o in joined:
            colour = (TREATMENT, FAILING)[i // size % 2]
            p.line([(left + 14 + 44 * i, 88), (left + 14 + 44 * o, 150)], colour=colour)
        for c in range(channels):
            p.box(left + 44 * c, 66, 28, 22)
            p.box(left + 44 * c, 150, 28, 22, fill=ORANGE)
        p.text(left + 80, 56, name, anchor="middle", bold=True)
        p.text(left + 80, 196, f"{len(joined)} connections", anchor="middle")
    return p


def shuffle_unit(half: int = 4) -> Panel:
    """The unit of ShuffleNetV2 at stride 1."""
    alt = """The unit of ShuffleNetV2. The channels are split in two halves. One half passes
    untouched; the other goes through a 1x1 convolution, a 3x3 depthwise one and a 1x1 again. They
    are concatenated, and a channel shuffle takes one from each half in turn, so that the next
    unit's halves hold some of both."""
    p = Panel(640, 230, alt, "Half of the channels pass untouched; the shuffle mixes the halves")
    p.box(16, 98, 60, 44, "split", fill=GREY)
    p.arrow(78, 106, 112, 76)
    p.arrow(78, 134, 112, 164)
    p.line([(112, 76), (388, 76)], colour=TREATMENT, wide=3)
    p.text(250, 68, "untouched", anchor="middle")
    for x, name in ((114, "1x1"), (206, "3x3\ndepthwise"), (312, "1x1")):
        p.box(x, 142, 74, 44, name, fill=ORANGE)
    p.arrow(190, 164, 204, 164)
    p.arrow(282, 164, 310, 164)
    p.arrow(388, 76, 418, 104)
    p.arrow(388, 164, 418, 136)
    p.box(420, 98, 60, 44, "concat", fill=GREY)
    p.arrow(482, 120, 508, 120)
    p.text(562, 62, "shuffle", anchor="middle", bold=True)
    for place in range(2 * half):
        new = place % half * 2 + place // half  # [2, half] transposed, as view and transpose do
        y = 72 + 18 * place
        fill = (BLUE, ORANGE)[place // half]
        p.box(512, y, 22, 14, fill=fill)
        p.box(596, 72 + 18 * new, 22, 14, fill=fill)
        p.line([(534, y + 7), (596, 79 + 18 * new)], colour=(TREATMENT, FAILING)[place // half])
    return p
