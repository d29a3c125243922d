"""How many bytes does a training step need, what are they, and how does one need fewer?

``measure_peak`` runs code and reads the allocator's record, ``estimate`` predicts the same report
without memory. ``checkpoint_blocks`` and ``accumulate`` make a step smaller without changing what
it computes.

    >>> import torch
    >>> model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(9)))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> x = torch.zeros(512, 64)
    >>> plain = estimate(model, x, optimizer).peak_bytes
    >>> plain > estimate(model, x, optimizer, checkpoint=3).peak_bytes
    True
"""

from dlhelpers.memory.accumulating import Micro, accumulate
from dlhelpers.memory.checkpointing import checkpoint_blocks, checkpoint_plan
from dlhelpers.memory.estimating import estimate
from dlhelpers.memory.measuring import measure_peak
from dlhelpers.memory.report import KINDS, MemoryReport, mib

__all__ = [
    "KINDS",
    "MemoryReport",
    "Micro",
    "accumulate",
    "checkpoint_blocks",
    "checkpoint_plan",
    "estimate",
    "measure_peak",
    "mib",
]
