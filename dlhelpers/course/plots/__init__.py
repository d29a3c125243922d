"""How does every figure of the course look?

One axes and one message a figure: the title is the answer, axes carry units, the baseline is grey,
the treatment blue, what fails orange (Okabe & Ito's colours, for the colour-blind as well).
Faces are opaque white, so that a figure reads the same in JupyterLab's light and dark theme. Each
figure carries alt text, which `use_style` puts into the notebook beside the picture.

Source: Okabe & Ito 2008, Color Universal Design, https://jfly.uni-koeln.de/color/.
"""

from dlhelpers.course.plots.areas import memory, memory_bars
from dlhelpers.course.plots.break_even import break_even
from dlhelpers.course.plots.chains import chain
from dlhelpers.course.plots.figures import (
    curves,
    dots,
    heatmap,
    intervals,
    pictures,
    splits,
    timeline,
)
from dlhelpers.course.plots.panels import pair_panel
from dlhelpers.course.plots.ranges import clipping, ranking
from dlhelpers.course.plots.scatters import roofline, scatter
from dlhelpers.course.plots.setup import use_style
from dlhelpers.course.plots.waterfalls import waterfall
from dlhelpers.drawing import lanes, shares, strip
from dlhelpers.drawing.style import BASELINE, FAILING, TREATMENT, describe

__all__ = [
    "BASELINE",
    "FAILING",
    "TREATMENT",
    "break_even",
    "chain",
    "clipping",
    "curves",
    "describe",
    "dots",
    "heatmap",
    "intervals",
    "lanes",
    "memory",
    "memory_bars",
    "pair_panel",
    "pictures",
    "ranking",
    "roofline",
    "scatter",
    "shares",
    "splits",
    "strip",
    "timeline",
    "use_style",
    "waterfall",
]
