"""What did the paper measure? Its Tables 1 to 4, as data.

Source: Ma et al. 2018, arXiv:1807.11164, Tables 1 to 4: speeds at 56 x 56 on a GTX 1080Ti (GPU,
batches a second) and on one thread of a Snapdragon 810 (ARM, images a second).
"""

from __future__ import annotations

__all__ = ["TABLES", "Row"]

from typing import NamedTuple


class Row(NamedTuple):
    """One row of a table on one platform.

    Attributes:
        name: as the table has it.
        channels: of the experiment at scale 1: c1 and c2 in Table 1, c elsewhere.
        speeds: at scales 1, 2 and 4 (channels times so many).
    """

    name: str
    channels: tuple[int, ...]
    speeds: tuple[float, float, float]


# guideline -> platform -> rows, in the table's order
TABLES: dict[str, dict[str, tuple[Row, ...]]] = {
    "G1": {  # Table 1: 10 blocks of 1x1 convolutions c1 -> c2 and c2 -> c1
        "gpu": (
            Row("1:1", (128, 128), (1480, 723, 232)),
            Row("1:2", (90, 180), (1296, 586, 206)),
            Row("1:6", (52, 312), (876, 489, 189)),
            Row("1:12", (36, 432), (748, 392, 163)),
        ),
        "arm": (
            Row("1:1", (32, 32), (76.2, 21.7, 5.3)),
            Row("1:2", (22, 44), (72.9, 20.5, 5.1)),
            Row("1:6", (13, 78), (69.1, 17.9, 4.6)),
            Row("1:12", (9, 108), (57.6, 15.1, 4.4)),
        ),
    },
    "G2": {  # Table 2: 10 pointwise convolutions in g groups
        "gpu": (
            Row("1", (128,), (2451, 1289, 437)),
            Row("2", (180,), (1725, 873, 341)),
            Row("4", (256,), (1026, 644, 338)),
            Row("8", (360,), (634, 445, 230)),
        ),
        "arm": (
            Row("1", (64,), (40.0, 10.2, 2.3)),
            Row("2", (90,), (35.0, 9.5, 2.2)),
            Row("4", (128,), (32.9, 8.7, 2.1)),
            Row("8", (180,), (27.8, 7.5, 1.8)),
        ),
    },
    "G3": {  # Table 3: 10 blocks of pointwise convolutions; c of the 1-fragment block
        "gpu": (
            Row("1-fragment", (128,), (2446, 1274, 434)),
            Row("2-fragment-series", (128,), (1790, 909, 336)),
            Row("4-fragment-series", (128,), (752, 745, 349)),
            Row("2-fragment-parallel", (128,), (1537, 803, 320)),
            Row("4-fragment-parallel", (128,), (691, 572, 292)),
        ),
        "arm": (
            Row("1-fragment", (64,), (40.2, 10.1, 2.3)),
            Row("2-fragment-series", (64,), (38.6, 10.1, 2.2)),
            Row("4-fragment-series", (64,), (38.4, 10.1, 2.3)),
            Row("2-fragment-parallel", (64,), (33.4, 9.1, 2.2)),
            Row("4-fragment-parallel", (64,), (35.0, 8.4, 2.1)),
        ),
    },
    "G4": {  # Table 4: 10 bottlenecks 1x1, 3x3, 1x1 with and without ReLU and shortcut
        "gpu": (
            Row("ReLU and shortcut", (32,), (2427, 2066, 1436)),
            Row("ReLU alone", (32,), (2647, 2256, 1735)),
            Row("shortcut alone", (32,), (2672, 2121, 1458)),
            Row("neither", (32,), (2842, 2376, 1782)),
        ),
        "arm": (
            Row("ReLU and shortcut", (32,), (56.7, 16.9, 5.0)),
            Row("ReLU alone", (32,), (61.9, 18.8, 5.2)),
            Row("shortcut alone", (32,), (57.3, 18.2, 5.1)),
            Row("neither", (32,), (66.3, 20.2, 5.4)),
        ),
    },
}
