"""What makes a network fast beyond few FLOPs? ShuffleNetV2's four guidelines, and how far they go.

``layer_costs`` counts what each layer does and moves, ``guideline_table`` runs the paper's
experiments on this machine, ``audit`` names what breaks the guidelines in a model of one's own,
``predict_latency`` tells the time of a model on a published CPU.

    >>> import torch
    >>> model = ShuffleNetV2(width=0.5).eval()
    >>> costs = layer_costs(model, torch.empty(1, 3, 224, 224, device="meta"))
    >>> round(costs.multiply_adds / 1e6), round(costs.parameters / 1e6, 1)
    (40, 1.4)
"""

from dlhelpers.shufflenet.auditing import audit
from dlhelpers.shufflenet.costs import LayerCost, LayerCosts, layer_costs
from dlhelpers.shufflenet.formulas import mac_lower_bound, memory_access_cost
from dlhelpers.shufflenet.guidelines import GuidelineTable, guideline_networks, guideline_table
from dlhelpers.shufflenet.latency import (
    LatencyFormula,
    fit_latency,
    fit_power_law,
    held_out_error,
    predict_latency,
)
from dlhelpers.shufflenet.network import ShuffleNetV2, Unit, channel_shuffle

__all__ = [
    "GuidelineTable",
    "LatencyFormula",
    "LayerCost",
    "LayerCosts",
    "ShuffleNetV2",
    "Unit",
    "audit",
    "channel_shuffle",
    "fit_latency",
    "fit_power_law",
    "guideline_networks",
    "guideline_table",
    "held_out_error",
    "layer_costs",
    "mac_lower_bound",
    "memory_access_cost",
    "predict_latency",
]
