"""Which bottleneck do the facts point to, and what would its remedy save? Rules for every machine.

Each rule reads :class:`~dlhelpers.profiling.seen.Seen`, tries its remedy where that can be done on
the spot, and says nothing where the gain would be below the share of a step that was asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from dlhelpers.profiling.recurrent import recurrent_cells
from dlhelpers.profiling.rules_loading import loading
from dlhelpers.profiling.rules_loops import decoding, loops
from dlhelpers.profiling.rules_models import batch_of_one, evaluation, kept_graphs
from dlhelpers.profiling.rules_waste import (
    anomaly_detection,
    double_precision,
    kept_tensors,
    optimizers,
    repeated_calls,
)
from dlhelpers.profiling.seen import Bottleneck, Seen, Speedup

__all__ = ["LOOKED_FOR", "NOT_LOOKED_FOR", "RULES"]

Rule = Callable[[Seen, float, Speedup], Iterator[Bottleneck]]

RULES: tuple[Rule, ...] = (
    loading,
    loops,
    recurrent_cells,
    decoding,
    batch_of_one,
    evaluation,
    kept_graphs,
    anomaly_detection,
    double_precision,
    optimizers,
    repeated_calls,
    kept_tensors,
)

# in the words of what a reader is told where nothing was found
LOOKED_FOR = (
    "slow loading",
    "loops in Python outside models' forward",
    "decoding in the step",
    "batches of one",
    "graphs that nobody needs",
    "BatchNorm that could be folded",
    "anomaly detection",
    "float64 in models",
    "optimizers that go by tensor",
    "repeated forward passes",
    "tensors that are kept",
)
NOT_LOOKED_FOR = "whether the model, its layers or their sizes could be others"
