"""Quantizing leaves alone what a forward writes to outside of the model."""

import pytest
import torch
from torch import nn

from dlhelpers.quantization import quantize_dynamic, quantize_static, sensitivity

TABLES, SEEN = {}, []
X = torch.rand(4, 8, generator=torch.Generator().manual_seed(0))


class Keeps(nn.Module):
    total = 0

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, x):
        y = self.layers(x)
        if "ones" not in TABLES:
            TABLES["ones"] = torch.ones_like(y[:1])
        SEEN.append(y)
        Keeps.total += 1
        return y * TABLES["ones"]


@pytest.mark.parametrize(
    "run",
    [
        lambda model: quantize_static(model, [X], engine="qnnpack", budget_s=0.01),
        lambda model: quantize_dynamic(model, X, budget_s=0.01),
        lambda model: sensitivity(model, [X]),
    ],
    ids=["static", "dynamic", "sensitivity"],
)
def test_what_a_forward_keeps_outside_of_the_model_is_as_it_was(run):
    TABLES.clear(), SEEN.clear()
    model, Keeps.total = Keeps().eval(), 0
    run(model)
    assert (TABLES, SEEN, Keeps.total) == ({}, [], 0)
