"""Do the paper's four guidelines hold on this machine? Its experiments, run again.

Each one keeps the multiply-adds and changes the shape of the network: channel widths (G1), groups
(G2), fragments (G3), element-wise operators (G4).

Source: Ma et al. 2018, arXiv:1807.11164, section 2 and Tables 1 to 4.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from dlhelpers.arguments import whole_number
from dlhelpers.measure import Comparison, compare_many
from dlhelpers.shufflenet.costs import layer_costs
from dlhelpers.shufflenet.paper import TABLES, Row
from dlhelpers.tables import html_table, text_table

__all__ = ["GuidelineRow", "GuidelineTable", "guideline_networks", "guideline_table"]

SIDE = 56  # pixels, as in the paper
BLOCKS = 10
_TABLE = {"G1": 1, "G2": 2, "G3": 3, "G4": 4}


def _convolution(c1: int, c2: int, kernel: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c1, c2, kernel, padding=kernel // 2, groups=groups, bias=False)


class _Parallel(nn.Module):
    """Branches that see the same input; their outputs are added."""

    def __init__(self, branches: Sequence[nn.Module]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        first, *others = (branch(x) for branch in self.branches)
        for other in others:
            first = first + other
        return first


class _Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 around a quarter of the channels, with or without ReLU and shortcut."""

    def __init__(self, c: int, relu: bool, shortcut: bool) -> None:
        super().__init__()
        activation = nn.ReLU if relu else nn.Identity
        self.shortcut = shortcut
        self.branch = nn.Sequential(
            _convolution(c, c // 4),
            activation(),
            _convolution(c // 4, c // 4, kernel=3),
            activation(),
            _convolution(c // 4, c),
        )
        self.last = activation()

    def forward(self, x: Tensor) -> Tensor:
        y = self.branch(x)
        return self.last(y + x if self.shortcut else y)


def _widths(guideline: str, row: Row, scale: int) -> tuple[int, ...]:
    """Return the channels that the row's convolutions really have."""
    widths = tuple(scale * c for c in row.channels)
    if guideline == "G2":  # a multiple of the groups
        groups = int(row.name)
        return (groups * math.ceil(widths[0] / groups),)
    if guideline == "G3":  # n convolutions of c' channels: n c'^2 = c^2
        return (round(widths[0] / math.sqrt(int(row.name[0]))),)
    return widths


def _block(guideline: str, row: Row, scale: int) -> Callable[[], nn.Module]:
    c, *others = _widths(guideline, row, scale)
    if guideline == "G1":
        return lambda: nn.Sequential(_convolution(c, *others), _convolution(*others, c))
    if guideline == "G2":
        return lambda: _convolution(c, c, groups=int(row.name))
    if guideline == "G3":
        parallel = row.name.endswith("parallel")
        join = _Parallel if parallel else lambda layers: nn.Sequential(*layers)
        return lambda: join([_convolution(c, c) for _ in range(int(row.name[0]))])
    relu, shortcut = row.name in ("ReLU and shortcut", "ReLU alone"), "shortcut" in row.name
    return lambda: _Bottleneck(c, relu, shortcut)


def guideline_networks(
    guideline: str, *, channels: Literal["gpu", "arm"] = "arm", scale: int = 1
) -> dict[str, tuple[nn.Module, Tensor]]:
    """Return row's name -> network and its input [1, c, 56, 56], as the paper describes them.

    What the paper leaves open: Table 2's 180 channels in 8 groups are no whole number each, so 184
    are taken. Table 3's n fragments have c / sqrt(n) channels, rounded, and parallel ones are
    added. Table 4's bottleneck has a quarter of the channels inside, as in ResNet; with all of
    them the printed ARM speeds would pass that processor's peak.

    Args:
        guideline: ``G1`` to ``G4``.
        channels: the numbers of channels that the paper took for its GPU or for its ARM processor.
        scale: factor on the tables' channels; 1, 2 and 4 are the tables' columns.

    Raises:
        ValueError: there is no such experiment.
    """
    scale = whole_number("scale", scale, 1)
    rows = _rows(guideline, channels)
    networks = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for row in rows:
            make = _block(guideline, row, scale)
            network = nn.Sequential(*(make() for _ in range(BLOCKS))).eval()
            c = next(m for m in network.modules() if isinstance(m, nn.Conv2d)).in_channels
            networks[row.name] = network, torch.rand(1, c, SIDE, SIDE)
    return networks


def _rows(guideline: str, channels: str) -> tuple[Row, ...]:
    if guideline not in TABLES:
        raise ValueError(f"guideline must be one of {sorted(TABLES)}, got {guideline!r}")
    if channels not in ("gpu", "arm"):
        raise ValueError(f'channels must be "gpu" or "arm", got {channels!r}')
    return TABLES[guideline][channels]


@dataclass(frozen=True)
class GuidelineRow:
    """One row: the same experiment here and in the paper.

    Attributes:
        name: as the paper's table has it.
        channels: c1 and c2 in Table 1, c elsewhere, of this scale.
        multiply_adds: of the whole network, exact.
        nbytes: read and written by its operators.
        measured: first row's time / this row's, with its interval; None for the first row.
        paper: this row's speed / the first row's in the paper.
    """

    name: str
    channels: tuple[int, ...]
    multiply_adds: int
    nbytes: int
    measured: Comparison | None
    paper: float

    @property
    def speed(self) -> float:
        """Measured speed relative to the first row."""
        return self.measured.speedup if self.measured else 1.0


@dataclass(frozen=True)
class GuidelineTable:
    """A guideline's experiment here, beside the paper's table.

    Attributes:
        guideline, channels, scale: which one.
        rows: in the paper's order; the first one is the baseline.
    """

    guideline: str
    channels: str
    scale: int
    rows: tuple[GuidelineRow, ...] = field(repr=False)

    def per_multiply_add(self, name: str) -> float:
        """Return a row's relative speed as if it had the first row's multiply-adds.

        The paper's channel numbers keep them equal to within some percent only.
        """
        row = next(row for row in self.rows if row.name == name)
        return row.speed * row.multiply_adds / self.rows[0].multiply_adds

    @property
    def rank_correlation(self) -> float:
        """Spearman's coefficient between the paper's speeds and those measured here."""
        from scipy.stats import spearmanr

        paper, here = [row.paper for row in self.rows], [row.speed for row in self.rows]
        return float(spearmanr(paper, here).statistic)

    def _lines(self) -> list[list[str]]:
        base = self.rows[0].multiply_adds
        return [
            [
                row.name,
                " to ".join(map(str, row.channels)),
                f"{row.multiply_adds / 1e6:,.2f}",
                f"{row.multiply_adds / base - 1:+.1%}",
                f"{row.nbytes / 2**20:,.1f}",
                f"{row.speed:.2f} [{row.measured.low:.2f}, {row.measured.high:.2f}]"
                if row.measured
                else "1",
                f"{self.per_multiply_add(row.name):.2f}",
                f"{row.paper:.2f}",
            ]
            for row in self.rows
        ]

    def _title(self) -> str:
        platform = {"gpu": "GTX 1080Ti", "arm": "Snapdragon 810"}[self.channels]
        return (
            f"{self.guideline} · the paper's Table {_TABLE[self.guideline]}, channels for "
            f"{platform}, times {self.scale} · rank correlation {self.rank_correlation:+.2f}"
        )

    def __str__(self) -> str:
        return f"{self._title()}\n{text_table(_COLUMNS, self._lines())}"

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(self._title())}</p>{html_table(_COLUMNS, self._lines())}"


_COLUMNS = (
    "row",
    "channels",
    "M multiply-adds",
    "against first",
    "MiB moved",
    "speed here",
    "at equal multiply-adds",
    "in the paper",
)


def guideline_table(
    guideline: str,
    *,
    channels: Literal["gpu", "arm"] = "arm",
    scale: int = 1,
    budget_s: float = 1.0,
) -> GuidelineTable:
    """Measure a guideline's experiment on this machine and put it beside the paper's table.

    Args:
        guideline, channels: as :func:`guideline_networks`.
        scale: 1, 2 or 4, a column of the table.
        budget_s: seconds at most for each row.

    Raises:
        ValueError: there is no such experiment.
    """
    if scale not in (1, 2, 4):
        raise ValueError(f"scale must be 1, 2 or 4, as in the paper's tables, got {scale!r}")
    rows = _rows(guideline, channels)
    networks = guideline_networks(guideline, channels=channels, scale=scale)
    costs = {name: layer_costs(*pair) for name, pair in networks.items()}

    def forward(network: nn.Module, x: Tensor) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with torch.inference_mode():
                return network(x)

        return run

    runs = {name: forward(*pair) for name, pair in networks.items()}
    found = compare_many(runs, baseline=rows[0].name, budget_s=budget_s)
    column = (1, 2, 4).index(scale)
    return GuidelineTable(
        guideline,
        channels,
        scale,
        tuple(
            GuidelineRow(
                name=row.name,
                channels=_widths(guideline, row, scale),
                multiply_adds=costs[row.name].multiply_adds,
                nbytes=costs[row.name].nbytes,
                measured=found[row.name] if row is not rows[0] else None,
                paper=row.speeds[column] / rows[0].speeds[column],
            )
            for row in rows
        ),
    )
