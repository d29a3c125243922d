import math
import re
import sys
from contextlib import contextmanager

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dlhelpers import shufflenet
from dlhelpers.roofline import Roofline
from dlhelpers.shufflenet import (
    ShuffleNetV2,
    Unit,
    audit,
    channel_shuffle,
    guideline_networks,
    guideline_table,
    layer_costs,
    mac_lower_bound,
    memory_access_cost,
)
from dlhelpers.shufflenet.paper import TABLES

PEAKS = Roofline(10.0, {"fp32": 100.0, "bf16": None, "int8": None}, 1)
WIDTHS = {0.5: "0_5", 1.0: "1_0", 1.5: "1_5", 2.0: "2_0"}


def costs_of(model, *inputs, policy="conv+linear"):
    return layer_costs(model, inputs, policy=policy, peaks=PEAKS)


# ---- the network ----


@pytest.mark.parametrize("width", WIDTHS)
def test_weights_go_to_torchvision_and_back_and_give_the_same_outputs(width):
    ours = ShuffleNetV2(width).eval()
    theirs = getattr(torchvision.models, f"shufflenet_v2_x{WIDTHS[width]}")().eval()
    x = torch.randn(2, 3, 96, 64)
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))
        for parameter in ours.parameters():
            parameter.mul_(1.01)
        theirs.load_state_dict(ours.state_dict())
        assert torch.equal(ours(x), theirs(x))


def test_train_mode_and_gradients_are_torchvisions():
    ours, theirs = (
        ShuffleNetV2(0.5, classes=7),
        torchvision.models.shufflenet_v2_x0_5(num_classes=7),
    )
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 3, 64, 64)
    for model in (ours, theirs):
        F.cross_entropy(model(x), torch.tensor([0, 1, 2, 3])).backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    for a, b in zip(ours.buffers(), theirs.buffers(), strict=True):
        assert torch.equal(a, b)


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 2))
def test_channel_shuffle_takes_one_from_each_group_in_turn(groups, each, dims):
    x = torch.arange(2 * groups * each * 3**dims).view(2, groups * each, *[3] * dims)
    by_hand = [group * each + i for i in range(each) for group in range(groups)]
    assert torch.equal(channel_shuffle(x, groups), x[:, by_hand])


def test_channel_shuffle_back_and_forth_is_nothing():
    x = torch.randn(1, 12, 2, 2)
    assert torch.equal(channel_shuffle(channel_shuffle(x, 3), 4), x)


@pytest.mark.parametrize("groups", [0, 4, -1])
def test_channels_that_do_not_divide_are_named(groups):
    with pytest.raises(ValueError, match=f"6 channels cannot be shuffled in {groups} groups"):
        channel_shuffle(torch.zeros(1, 6), groups)


def test_half_of_the_channels_pass_a_unit_unchanged():
    unit, x = Unit(8, 8).eval(), torch.randn(1, 8, 5, 5)
    y = unit(x)
    assert torch.equal(y[:, ::2], x[:, :4])  # shuffled: every other one is of the first half
    assert not torch.equal(y[:, 1::2], x[:, 4:])


def test_units_and_widths_that_the_paper_does_not_have_are_named():
    with pytest.raises(ValueError, match="c1=8, c2=16, stride=1"):
        Unit(8, 16)
    with pytest.raises(ValueError, match="c2=9"):
        Unit(9, 9)
    with pytest.raises(ValueError, match=r"one of \[0.5, 1.0, 1.5, 2.0\], got 3"):
        ShuffleNetV2(3)


# ---- memory access ----

sizes = st.integers(1, 2048)


@given(sizes, sizes, sizes)
def test_the_bound_of_equation_1_is_never_passed_and_met_by_equal_channels(c1, c2, hw):
    least = mac_lower_bound(hw * c1 * c2, hw)
    assert memory_access_cost(c1, c2, hw).elements >= least * (1 - 1e-12)
    equal = memory_access_cost(c1, c1, hw).elements
    assert math.isclose(equal, mac_lower_bound(hw * c1 * c1, hw), rel_tol=1e-12)


@given(st.integers(1, 8), st.integers(1, 40), st.integers(1, 40), sizes, st.integers(1, 7))
def test_memory_access_counts_what_a_convolution_holds(groups, a, b, hw, kernel):
    c1, c2 = groups * a, groups * b
    with torch.device("meta"):
        weight = nn.Conv2d(c1, c2, kernel, groups=groups, bias=False).weight
    moved = memory_access_cost(c1, c2, hw, kernel=kernel, groups=groups)
    assert moved.elements == hw * c1 + hw * c2 + weight.numel()
    assert moved.bytes == 4 * moved.elements


def test_memory_access_of_table_1_is_what_the_equation_says():
    found = [memory_access_cost(*row.channels, 56 * 56).elements for row in TABLES["G1"]["gpu"]]
    assert found == [819_200, 862_920, 1_157_728, 1_483_200]  # hw(c1 + c2) + c1 c2 by hand


def test_sizes_that_make_no_convolution_are_named():
    with pytest.raises(ValueError, match="c1=6, c2=4, hw=9, kernel=1, groups=4"):
        memory_access_cost(6, 4, 9, groups=4)
    with pytest.raises(ValueError, match="hw=0"):
        memory_access_cost(1, 1, 0)


# ---- the costs of layers ----

SOME = ["shufflenet_v2_x1_0", "mobilenet_v3_small", "squeezenet1_1", "swin_t"]
REST = [
    "efficientnet_b0",
    "googlenet",
    "densenet121",
    "resnext50_32x4d",
    "maxvit_t",
    "vit_b_32",
    "convnext_tiny",
]
FIXED = ("maxvit_t", "vit_b_32")  # in their size
every_model = pytest.mark.parametrize(
    "name", SOME + [pytest.param(name, marks=pytest.mark.slow) for name in REST]
)


@contextmanager
def attention_as_products():
    """torch's counter has no formula for attention as one operator."""
    torch.backends.mha.set_fastpath_enabled(False)
    with sdpa_kernel(SDPBackend.MATH):
        yield
    torch.backends.mha.set_fastpath_enabled(True)


@every_model
def test_conv_and_linear_flops_are_torchs_own_exactly(name):
    model = torchvision.models.get_model(name).eval()
    x = torch.zeros(1, 3, 224 if name in FIXED else 96, 224 if name in FIXED else 96)
    with attention_as_products(), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    costs = costs_of(model, x)
    assert costs.flops == counter.get_total_flops() == 2 * costs.multiply_adds
    assert not costs_of(model, x, policy="all").without_formula


@pytest.mark.parametrize(("width", "authors"), [(0.5, 41), (1.0, 146), (1.5, 299)])
def test_multiply_adds_are_the_authors_within_what_the_paper_rounds(width, authors):
    costs = costs_of(ShuffleNetV2(width).eval(), torch.zeros(1, 3, 224, 224))
    assert costs.multiply_adds / 1e6 == pytest.approx(authors, rel=0.015)


def test_policy_all_counts_by_its_rule():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False),  # 8 x 8 -> 6 x 6
        nn.BatchNorm2d(4),
        nn.SiLU(),
        nn.MaxPool2d(2),  # -> 3 x 3
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Softmax(1),
    )
    by_hand = {
        "convolution": 2 * 4 * 36 * 27,
        "native_batch_norm": 2 * 4 * 36,
        "silu": 4 * 36,
        "max_pool2d_with_indices": 4 * 9 * 4,
        "mean": 4 * 9,  # what a pool to 1 x 1 calls
        "_softmax": 5 * 4,
    }
    costs = costs_of(model.eval(), torch.zeros(1, 3, 8, 8), policy="all")
    assert costs.by_operator() == by_hand
    assert (costs.without_formula, costs.left_out) == ({}, {})
    assert costs.multiply_adds == 4 * 36 * 27
    training = costs_of(model.train(), torch.zeros(1, 3, 8, 8), policy="all")
    assert training.by_operator()["native_batch_norm"] == 7 * 4 * 36


def test_the_narrow_policy_names_what_it_leaves_out():
    costs = costs_of(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.zeros(2, 4))
    assert costs.left_out == {"relu": 2 * 8 * 4}
    assert [layer.formula for layer in costs.layers] == [True, False]
    assert "left out by the policy: relu" in str(costs)
    assert costs._repr_html_().count("<tr>") == 3


class Inverts(nn.Module):
    def forward(self, x):
        return torch.linalg.inv(x).abs()


def test_an_operator_without_a_formula_is_named_with_its_bytes():
    costs = costs_of(Inverts(), torch.eye(8), policy="all")
    assert costs.without_formula == {"linalg_inv_ex": 2 * 8 * 8 * 4 + 4}  # and a number of int32
    assert "WITHOUT A FORMULA: linalg_inv_ex" in str(costs)


def test_attention_that_torch_counts_as_nothing_has_a_formula():
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0)
    x = torch.zeros(2, 10, 32)
    slow = costs_of(layer.train(), x, policy="all").by_operator()
    products = 2 * 20 * 32 * (3 * 32 + 32 + 2 * 64)  # projections in and out, two linear layers
    attention = 2 * 2 * 2 * 10 * 10 * 32
    assert sum(slow[op] for op in slow if op in ("addmm", "mm")) == products
    assert slow["_scaled_dot_product_flash_attention_for_cpu"] == attention


def test_bytes_are_those_of_what_is_read_and_written():
    model = nn.Conv2d(3, 8, 3, stride=2, padding=1)
    (layer,) = costs_of(model, torch.zeros(2, 3, 8, 8)).layers
    assert layer.elements == 2 * 3 * 64 + 8 * 27 + 8 + 2 * 8 * 16
    assert layer.nbytes == 4 * layer.elements
    assert layer.intensity == layer.flops / layer.nbytes
    half = costs_of(model.bfloat16(), torch.zeros(2, 3, 8, 8, dtype=torch.bfloat16)).layers[0]
    assert half.nbytes == 2 * layer.elements


class Adds(nn.Module):
    def forward(self, x, y):
        return x + y.expand_as(x)


def test_an_expanded_tensor_is_read_once_and_a_view_moves_nothing():
    (layer,) = costs_of(Adds(), torch.zeros(10, 5), torch.zeros(1, 5)).layers
    assert (layer.operator, layer.elements) == ("add", 50 + 5 + 50)
    assert costs_of(nn.Flatten(), torch.zeros(2, 3, 4)).layers == ()


def test_the_predicted_time_is_the_larger_of_both():
    wide, thin = nn.Linear(1000, 1000, bias=False), nn.ReLU()
    by_arithmetic = costs_of(wide, torch.zeros(1000, 1000)).layers[0]
    assert by_arithmetic.bound == "arithmetic"
    assert by_arithmetic.predicted_s == pytest.approx(2e9 / 100e9)
    by_memory = costs_of(thin, torch.zeros(1000, 1000)).layers[0]
    assert by_memory.bound == "memory"
    assert by_memory.predicted_s == pytest.approx(8e6 / 10e9)
    total = costs_of(nn.Sequential(wide, thin), torch.zeros(1000, 1000)).predicted_s
    assert total == pytest.approx(2e9 / 100e9 + 8e6 / 10e9)


def test_each_operator_has_the_name_of_its_module():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Sequential(nn.ReLU(), nn.Conv2d(2, 2, 1)))
    costs = costs_of(model, torch.zeros(1, 1, 4, 4))
    assert [layer.module for layer in costs.layers] == ["0", "1.0", "1.1"]
    assert (costs.activations, costs.parameters) == (2 * 2 * 16, 4 + 6)


def test_counting_leaves_the_model_alone_and_needs_no_memory():
    from torch.nn.modules import module as hooks

    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    costs_of(model, torch.randn(2, 3, 4, 4))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with torch.device("meta"):
        large, x = nn.Linear(100_000, 100_000), torch.empty(100_000, 100_000)
    assert costs_of(large, x).multiply_adds == 10**15
    with pytest.raises(RuntimeError):
        costs_of(model, torch.zeros(2, 5, 4, 4))
    assert not hooks._global_forward_hooks
    assert not hooks._global_forward_pre_hooks


class DataDependent(nn.Module):
    def forward(self, x):
        return x[x > 0]


def test_what_cannot_be_counted_is_said():
    with pytest.raises(ValueError, match="depends on data"):
        costs_of(DataDependent(), torch.ones(3))
    with pytest.raises(ValueError, match=r"policy must be .* got 'thop'"):
        costs_of(nn.ReLU(), torch.ones(3), policy="thop")
    with pytest.raises(TypeError, match="must hold a tensor"):
        costs_of(nn.ReLU(), 3)


# ---- the guidelines ----

experiments = pytest.mark.parametrize(
    ("guideline", "channels", "scale"),
    [
        pytest.param(g, c, s, marks=[pytest.mark.slow] * (s > 1))
        for g in TABLES
        for c in ("gpu", "arm")
        for s in (1, 2, 4)
    ],
)


@experiments
def test_every_experiment_has_the_papers_channels_and_equal_multiply_adds(
    guideline, channels, scale
):
    networks = guideline_networks(guideline, channels=channels, scale=scale)
    rows = TABLES[guideline][channels]
    assert list(networks) == [row.name for row in rows]
    found = {name: costs_of(*pair).multiply_adds for name, pair in networks.items()}
    first = found[rows[0].name]
    assert all(abs(n / first - 1) < 0.06 for n in found.values())  # the paper's own rounding
    for row in rows:
        network, x = networks[row.name]
        c = next(m for m in network.modules() if isinstance(m, nn.Conv2d)).in_channels
        assert (x.shape, len(network)) == ((1, c, 56, 56), 10)
        if row.name != "8" and guideline != "G3":
            assert c == scale * row.channels[0]
    c = rows[0].channels
    by_hand = {
        "G1": 2 * 10 * 56**2 * scale**2 * c[0] * c[-1],
        "G2": 10 * 56**2 * (scale * c[0]) ** 2,
        "G3": 10 * 56**2 * (scale * c[0]) ** 2,
        "G4": 10 * 56**2 * 17 * (scale * c[0]) ** 2 // 16,  # 1/4 + 9/16 + 1/4
    }
    assert first == by_hand[guideline]


def test_the_rows_differ_in_what_their_guideline_names():
    count = {
        name: sum(isinstance(m, nn.ReLU) for m in network.modules())
        for name, (network, _) in guideline_networks("G4").items()
    }
    assert count == {"ReLU and shortcut": 30, "ReLU alone": 30, "shortcut alone": 0, "neither": 0}
    adds = {
        name: sum(layer.operator == "add" for layer in costs_of(*pair).layers)
        for name, pair in guideline_networks("G4").items()
    }
    assert adds == {"ReLU and shortcut": 10, "ReLU alone": 0, "shortcut alone": 10, "neither": 0}
    groups = [
        {m.groups for m in network.modules() if isinstance(m, nn.Conv2d)}
        for network, _ in guideline_networks("G2").values()
    ]
    assert groups == [{1}, {2}, {4}, {8}]
    fragments = {
        name: sum(isinstance(m, nn.Conv2d) for m in network.modules()) // 10
        for name, (network, _) in guideline_networks("G3").items()
    }
    assert [fragments[name] for name in fragments] == [1, 2, 4, 2, 4]


def test_the_papers_tables_say_what_its_text_says():
    gpu = {g: {row.name: row.speeds for row in TABLES[g]["gpu"]} for g in TABLES}
    arm = {g: {row.name: row.speeds for row in TABLES[g]["arm"]} for g in TABLES}
    # section 2, G2: 8 groups "more than two times slower" on GPU, "up to 30% slower" on ARM
    assert gpu["G2"]["1"][0] / gpu["G2"]["8"][0] > 2
    assert arm["G2"]["8"][0] / arm["G2"]["1"][0] == pytest.approx(0.7, abs=0.01)
    # G3: "4-fragment structure is 3x slower than 1-fragment"
    assert gpu["G3"]["1-fragment"][0] / gpu["G3"]["4-fragment-series"][0] > 3
    # G4: "around 20% speedup is obtained on both GPU and ARM"
    for table in (gpu, arm):
        gain = table["G4"]["neither"][0] / table["G4"]["ReLU and shortcut"][0]
        assert gain == pytest.approx(1.2, abs=0.05)
    for platform in ("gpu", "arm"):  # speeds fall with scale in every row
        for guideline in TABLES:
            for row in TABLES[guideline][platform]:
                assert row.speeds[0] > row.speeds[1] > row.speeds[2]


def fake_comparisons(speeds):
    from dlhelpers.measure import Comparison

    def compare_many(functions, baseline, budget_s):
        for run in functions.values():
            assert run().shape[-2:] == (56, 56)
        return {
            name: Comparison(
                speedup=speed,
                low=speed * 0.99,
                high=speed * 1.01,
                outcome="slower",
                pairs=9,
                baseline_s=1.0,
                candidate_s=1 / speed,
                confidence=0.95,
                negligible=0.03,
                threshold=None,
                ratios=(speed,) * 9,
                device="cpu",
                threads=1,
                elapsed_s=0.0,
            )
            for name, speed in zip(list(functions)[1:], speeds, strict=True)
        }

    return compare_many


def test_a_table_puts_this_machine_beside_the_paper(monkeypatch):
    from dlhelpers.shufflenet import guidelines

    monkeypatch.setattr(guidelines, "compare_many", fake_comparisons([0.9, 0.95, 0.5]))
    table = guideline_table("G1", channels="arm", scale=2)
    assert [row.paper for row in table.rows] == pytest.approx(
        [1, 20.5 / 21.7, 17.9 / 21.7, 15.1 / 21.7]
    )
    assert [row.channels for row in table.rows] == [(64, 64), (44, 88), (26, 156), (18, 216)]
    # ranks here 1, 3, 2, 4 against 1, 2, 3, 4: 1 - 6 * 2 / (4 * 15)
    assert table.rank_correlation == pytest.approx(0.8)
    assert table.per_multiply_add("1:2") == pytest.approx(0.9 * (44 * 88) / (64 * 64))
    assert table.rows[1].multiply_adds == 20 * 56**2 * 44 * 88
    text = str(table)
    assert "Table 1" in text
    assert "+0.80" in text
    assert "0.90 [0.89, 0.91]" in text
    assert table._repr_html_().count("<tr>") == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"guideline": "G5"}, "one of .*'G4'.*, got 'G5'"),
        ({"guideline": "G1", "channels": "tpu"}, "got 'tpu'"),
        ({"guideline": "G1", "scale": 3}, "1, 2 or 4.* got 3"),
    ],
)
def test_experiments_that_the_paper_did_not_make_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        guideline_table(**arguments)


def test_attention_is_counted_in_eval_mode_too():
    layer, x = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), torch.zeros(3, 5, 16)
    counts = {costs_of(layer.train(mode), x).multiply_adds for mode in (True, False)}
    projections, attention, ahead = 4 * 5 * 16 * 16, 2 * 5 * 5 * 16, 2 * 5 * 16 * 32
    assert counts == {3 * (projections + attention + ahead)}
    assert torch.backends.mha.get_fastpath_enabled()


def test_of_a_table_only_what_is_taken_is_read():
    (layer,) = costs_of(nn.Embedding(1000, 16), torch.zeros(8, dtype=torch.int64)).layers
    assert (layer.elements, layer.nbytes) == (8 * 16 + 8 + 8 * 16, 8 * 8 + 2 * 4 * 8 * 16)


class Chooses(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Holds(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, *inputs):
        return self.head(*inputs)


class Decorated(Holds):
    forward = torch.inference_mode()(Holds.forward)


class Calls(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


@pytest.mark.parametrize(
    "ask",
    [
        lambda x: x if x.sum() > 0 else -x,
        lambda x: x * x.max().item(),
        lambda x: x * float(x.mean().numpy()),
        lambda x: x[: int(x.sum())],
        lambda x: x.unique(),
        lambda x: x.nonzero(),
    ],
)
def test_what_depends_on_data_is_named_with_its_module_and_line(ask):
    line = ask.__code__.co_firstlineno
    with pytest.raises(
        ValueError, match=rf"depends on data: module 'head' .* {__name__}.py:{line}; compute it"
    ):
        costs_of(Holds(Calls(ask)), torch.zeros(3))
    with pytest.raises(ValueError, match="the model itself calls"):
        costs_of(Chooses(), torch.zeros(3))


@pytest.mark.parametrize(
    ("model", "shapes"),
    [
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()), [(2, 3, 8, 8)]),
        (nn.ConvTranspose1d(5, 3, 3, stride=2), [(2, 5, 16)]),
        (nn.Linear(16, 4, bias=False), [(2, 5, 16)]),
        (nn.MultiheadAttention(16, 4), [(2, 5, 16)] * 3),
        (nn.TransformerEncoderLayer(16, 4, 32), [(2, 5, 16)]),
        (nn.LSTM(16, 8, 2, bidirectional=True), [(2, 5, 16)]),
        (Calls(lambda a: torch.einsum("bij,bkj->bik", a, a)), [(2, 5, 16)]),
        (nn.Sequential(nn.LayerNorm(16), nn.GELU(), nn.Softmax(-1)), [(2, 5, 16)]),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_inference_mode_hides_nothing(model, shapes, mode):
    getattr(model, mode)()
    inputs = [torch.zeros(shape) for shape in shapes]
    wanted = costs_of(Holds(model), *inputs, policy="all")
    found = [costs_of(Decorated(model), *inputs, policy="all")]
    with torch.inference_mode():
        found.append(costs_of(Holds(model), *inputs, policy="all"))
        found.append(costs_of(Holds(model), *[x.clone() for x in inputs], policy="all"))
    for costs in found:
        assert (costs.multiply_adds, costs.flops) == (wanted.multiply_adds, wanted.flops)
        assert not costs.without_formula
    if not isinstance(model, nn.MultiheadAttention | nn.TransformerEncoderLayer):  # a copy less
        assert all(costs.layers == wanted.layers for costs in found)


@pytest.mark.parametrize("given", [(-1, 10), (100, 0), (math.nan, 10), (10, math.nan)])
def test_the_bound_refuses_what_is_no_size(given):
    with pytest.raises(ValueError, match="must be 0 or more"):
        mac_lower_bound(*given)


# ---- the audit ----


@pytest.mark.parametrize(
    ("layer", "shape", "remedy"),
    [
        (nn.Conv1d(8, 16, 3, groups=2), (1, 8, 64), "nn.Conv1d(8, 8, 3)"),
        (nn.Conv2d(8, 16, (1, 7), groups=2), (1, 8, 9, 9), "nn.Conv2d(8, 8, (1, 7))"),
        (nn.Conv3d(8, 16, 3, groups=2), (1, 8, 5, 5, 5), "nn.Conv3d(8, 8, 3)"),
    ],
)
def test_the_audits_figures_are_those_of_the_layer(layer, shape, remedy):
    (found,) = findings_of(layer, *shape)
    (cost,) = costs_of(layer, torch.zeros(*shape)).layers
    assert found.name == "groups (G2)"
    assert found.remedy.startswith(remedy)
    assert f"moves {cost.elements:,} elements for {cost.multiply_adds / 1e6:,.1f} M" in found.what
    pixels = math.prod(cost.shapes[-1][2:])
    seconds = pixels * (16 - 16 / 2) * 4 / (1e9 * PEAKS.bandwidth_gb_s)
    assert f"{1e6 * seconds:,.0f} µs of" in found.what


def test_the_audit_says_nothing_of_what_the_formulas_are_not_of():
    transposed = nn.ConvTranspose2d(8, 16, 4, stride=2, groups=2)
    assert not findings_of(transposed, 1, 8, 8, 8)


@pytest.fixture
def no_measuring(monkeypatch):
    def measured(*args, **kwargs):
        raise AssertionError("nothing is measured unasked")

    for name in ("_matmul_gflops", "_bandwidth_gb_s", "_best_seconds"):
        monkeypatch.setattr(sys.modules["dlhelpers.roofline"], name, measured)
    monkeypatch.setattr("dlhelpers.shufflenet.auditing._overhead_s", measured)
    monkeypatch.setattr("dlhelpers.roofline.cache_dir", measured)


def test_without_peaks_nothing_is_measured_and_no_time_predicted(no_measuring):
    costs = layer_costs(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), torch.zeros(2, 8))
    assert costs.predicted_s is None
    assert costs.roofline is None
    assert {(layer.predicted_s, layer.bound) for layer in costs.layers} == {(None, "")}
    timed = costs_of(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), torch.zeros(2, 8))
    for layer, other in zip(costs.layers, timed.layers, strict=True):
        assert (layer.nbytes, layer.flops) == (other.nbytes, other.flops)
    for text, whole in ((str(costs), str(timed)), (costs._repr_html_(), timed._repr_html_())):
        assert "predicted" not in text
        assert "from memory" not in text
        assert "predicted" in whole
    head, first, *_ = str(costs).splitlines()
    assert len(head) == len(first)


def test_without_peaks_the_audit_ranks_by_bytes_and_says_so(no_measuring):
    model = nn.Sequential(Branches(), nn.Conv2d(16, 64, 1), nn.ReLU()).eval()
    found = audit(model, torch.zeros(1, 8, 64, 64))
    assert {finding.name for finding in found} == {
        "element-wise (G4)", "unequal-channels (G1)", "fragments (G3)",
    }  # fmt: skip
    moved = [float(re.search(r": ([\d.]+) MiB of", finding.what)[1]) for finding in found]
    assert moved == sorted(moved, reverse=True)
    assert moved[0] == 2 * 64 * 64 * 64 * 4 / 2**20  # ReLU reads and writes 64 channels
    assert "ranked by bytes" in str(found)
    assert "ranked by bytes" in found._repr_html_()
    assert "of the bytes moved" in audit(nn.Identity(), torch.zeros(1), at_least=0.5).scope
    assert "ranked" not in str(findings_of(nn.ReLU(), 1, 8, 64, 64))


def findings_of(model, *shape, least=0.0):
    return audit(model.eval(), torch.zeros(*shape), at_least=least, peaks=PEAKS)


def test_unequal_channels_cost_what_passes_the_bound():
    (finding,) = findings_of(nn.Conv2d(8, 96, 1, bias=False), 1, 8, 32, 32)
    assert (finding.name, finding.where) == ("unequal-channels (G1)", "")
    more = 1024 * (8 + 96) + 8 * 96 - (2 * math.sqrt(1024**2 * 8 * 96) + 8 * 96)
    assert f"{1e6 * more * 4 / 10e9:,.0f} µs of" in finding.what
    assert "nn.Conv2d(28, 28, 1)" in finding.remedy


def test_groups_that_are_not_depthwise_break_the_second():
    model = nn.Sequential(nn.Conv2d(16, 16, 1, groups=4, bias=False))
    (finding,) = findings_of(model, 1, 16, 64, 64)
    assert (finding.name, finding.where) == ("groups (G2)", "0")
    # equation 2: g = 4 against g = 1 at equal multiply-adds and input: hw c2 (1 - 1/g)
    assert f"{1e6 * 64 * 64 * 12 * 4 / 10e9:,.0f} µs of" in finding.what
    (depthwise,) = findings_of(nn.Conv2d(16, 16, 3, groups=16, bias=False), 1, 16, 64, 64)
    assert depthwise.name == "depthwise (G4)"


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(2))

    def forward(self, x):
        return torch.cat((self.a(x), self.b(x)), 1)


def test_convolutions_that_share_an_input_are_fragments():
    (finding,) = findings_of(Branches(), 1, 8, 64, 64)
    assert (finding.name, finding.where) == ("fragments (G3)", "a, b")
    assert findings_of(Branches().a, 1, 8, 64, 64) == []


def test_element_wise_operators_are_named_by_module_the_most_expensive_first():
    model = nn.Sequential(
        nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(4), nn.Sigmoid()
    )
    found = findings_of(model, 1, 4, 66, 66)
    assert [(f.name, f.where) for f in found] == [
        ("element-wise (G4)", "1"),
        ("element-wise (G4)", "2"),
        ("element-wise (G4)", "4"),
    ]
    assert f"{1e6 * 2 * 4 * 64 * 64 * 4 / 10e9:,.0f} µs of" in found[1].what
    assert "dlhelpers.fusion.fuse_conv_bn(" in found[0].remedy


def test_least_leaves_out_what_costs_little_and_says_so():
    model = nn.Sequential(nn.Conv2d(64, 64, 3, bias=False), nn.ReLU())
    assert len(findings_of(model, 1, 64, 32, 32)) == 1
    none = findings_of(model, 1, 64, 32, 32, least=0.5)
    assert none == []
    assert str(none) == "nothing breaks G1 to G4 for 50.0% of the predicted time or more"
    with pytest.raises(ValueError, match="at_least must be a share between 0 and 1, got 2"):
        findings_of(model, 1, 64, 32, 32, least=2)


KNOWN = {
    "shufflenet_v2_x0_5": {"fragments (G3)", "depthwise (G4)", "element-wise (G4)"},
    "mobilenet_v2": {"unequal-channels (G1)", "depthwise (G4)", "element-wise (G4)"},
    "resnet18": {"unequal-channels (G1)", "fragments (G3)", "element-wise (G4)"},
    "resnext50_32x4d": {"groups (G2)", "unequal-channels (G1)"},
    "squeezenet1_0": {"fragments (G3)", "unequal-channels (G1)"},
}


@pytest.mark.parametrize("name", KNOWN)
def test_what_the_literature_says_of_known_networks_is_found(name):
    found = findings_of(torchvision.models.get_model(name), 1, 3, 224, 224)
    assert {finding.name for finding in found} >= KNOWN[name]
    if name == "shufflenet_v2_x0_5":
        assert "groups (G2)" not in {finding.name for finding in found}


def test_the_package_has_what_it_names():
    assert all(hasattr(shufflenet, name) for name in shufflenet.__all__)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.sampled_from([1, 3, 5]))
def test_layers_alone_move_what_the_formula_says(groups, a, b, kernel):
    conv = nn.Conv2d(groups * a, groups * b, kernel, padding=kernel // 2, groups=groups, bias=False)
    (layer,) = costs_of(conv, torch.zeros(1, groups * a, 7, 9)).layers
    formula = memory_access_cost(groups * a, groups * b, 63, kernel=kernel, groups=groups)
    assert (layer.elements, layer.nbytes) == formula
