"""Where does the time go, and what would it be worth to fix it?

``profile_python``, ``profile_lines`` and ``sample`` look at Python, ``profile_torch`` at the phases
and operators of a training step; ``diagnose`` names the bottleneck, tries its remedy and says what
it would bring; ``overhead`` tells what looking costs.

>>> import torch
>>> model, x = torch.nn.Linear(64, 8), torch.zeros(32, 64)
>>> report = profile_torch(lambda: model(x).sum().backward(), steps=2)
>>> abs(sum(report.shares.values()) - 1) < 1e-9
True
"""

from dlhelpers.profiling.diagnosing import diagnose
from dlhelpers.profiling.flame import Flame
from dlhelpers.profiling.line_profile import profile_lines
from dlhelpers.profiling.overheads import overhead
from dlhelpers.profiling.python_profile import profile_python
from dlhelpers.profiling.sampling import sample, sample_threads
from dlhelpers.profiling.seen import Bottleneck
from dlhelpers.profiling.torch_profile import profile_torch

__all__ = [
    "Bottleneck",
    "Flame",
    "diagnose",
    "overhead",
    "profile_lines",
    "profile_python",
    "profile_torch",
    "sample",
    "sample_threads",
]
