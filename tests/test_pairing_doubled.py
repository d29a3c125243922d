# ruff: noqa: PT031  (the block under test is a training loop)
"""Pairing, one layer further: an activation in front of the last one, in check and in guard."""

import math
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dlhelpers import pairing
from dlhelpers.pairing.reach import binary_floors, class_floor, span
from dlhelpers.pairing.trace import Head

N, C, K = 16, 5, 4
SEED = torch.Generator().manual_seed(0)
X = torch.randn(N, 6, generator=SEED)
LABELS = torch.randint(0, C, (N,), generator=SEED)
BITS = torch.randint(0, 2, (N, K), generator=SEED).float()
SOFT = torch.randn(N, C, generator=SEED).softmax(1)
ONE_HOT = F.one_hot(LABELS, C).float()
NLL, CE, BCE, BCEL, MSE = (
    nn.NLLLoss(),
    nn.CrossEntropyLoss(),
    nn.BCELoss(),
    nn.BCEWithLogitsLoss(),
    nn.MSELoss(),
)
KL = nn.KLDivLoss(reduction="batchmean")
SOFTMAX, SIGMOID = "activation-before-softmax", "activation-before-sigmoid"


def scores(width: int = C) -> torch.Tensor:
    return X @ torch.randn(6, width, generator=SEED).requires_grad_()


def named(*case) -> list[tuple[str, str]]:
    return [(f.name, f.severity) for f in pairing.check(*case)]


def own_bce_and_dice(o, t):
    p = torch.sigmoid(o)
    return F.binary_cross_entropy(p, t) + 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)


class Functions(nn.Module):
    """A head of functions and methods, not of modules, with steps that keep values between."""

    def __init__(self, *steps):
        super().__init__()
        self.fc, self.steps = nn.Linear(6, C), steps

    def forward(self, x):
        x = self.fc(x)
        for step in self.steps:
            x = step(x)
        return x


DROP = nn.Dropout(0.3)
CTC = (torch.tensor([[1, 2, 3]] * 2), torch.tensor([9, 9]), torch.tensor([3, 3]))
WRONG = {
    "softmax": (scores().softmax(1).log_softmax(1), NLL, LABELS, SOFTMAX),
    "sigmoid": (scores().sigmoid().log_softmax(1), NLL, LABELS, SOFTMAX),
    "tanh": (scores().tanh().log_softmax(1), NLL, LABELS, SOFTMAX),
    "relu": (F.log_softmax(F.relu(scores()), 1), F.nll_loss, LABELS, SOFTMAX),
    "temperature": (F.log_softmax(scores().softmax(1) / 2, 1), NLL, LABELS, SOFTMAX),
    "softmin": (F.log_softmax(F.softmin(scores(), 1), 1), NLL, LABELS, SOFTMAX),
    "dropout": (F.log_softmax(DROP(scores().softmax(1)), 1), NLL, LABELS, SOFTMAX),
    "clamp": (scores().softmax(1).clamp(1e-7, 1).log_softmax(1), NLL, LABELS, SOFTMAX),
    "index": (
        scores().softmax(1)[torch.arange(N) > 3].log_softmax(1),
        NLL,
        LABELS[4:],
        SOFTMAX,
    ),
    "reshape": (
        scores().softmax(1)[:, :, None].squeeze(2).reshape(N, C).log_softmax(1),
        NLL,
        LABELS,
        SOFTMAX,
    ),
    "log(softmax)": (scores().softmax(1).softmax(1).log(), NLL, LABELS, SOFTMAX),
    "own loss": (
        scores().softmax(1),
        lambda o, t: F.nll_loss(F.log_softmax(o, 1), t),
        LABELS,
        SOFTMAX,
    ),
    "own loss, no graph": (
        scores().softmax(1).detach(),
        lambda o, t: F.nll_loss(F.log_softmax(o, 1), t),
        LABELS,
        SOFTMAX,
    ),
    "KL": (scores().sigmoid().log_softmax(1), KL, SOFT, SOFTMAX),
    "wasted log_softmax": (scores().softmax(1).log_softmax(1), CE, LABELS, SOFTMAX),
    "CTC": (
        (torch.randn(9, 2, 6) @ torch.randn(6, C).requires_grad_()).softmax(2).log_softmax(2),
        nn.CTCLoss(),
        CTC,
        SOFTMAX,
    ),
    "softmax twice, BCE": (scores().softmax(1).softmax(1), BCE, ONE_HOT, SOFTMAX),
    "sigmoid twice": (scores(K).sigmoid().sigmoid(), BCE, BITS, SIGMOID),
    "tanh, sigmoid": (scores(K).tanh().sigmoid(), BCE, BITS, SIGMOID),
    "relu, sigmoid": (scores(K).relu().sigmoid(), BCE, BITS, SIGMOID),
    "softmax, sigmoid": (scores().softmax(1).sigmoid(), BCE, ONE_HOT, SIGMOID),
    "log_softmax, sigmoid": (scores(K).log_softmax(1).sigmoid(), BCE, BITS, SIGMOID),
    "hard sigmoid": (F.hardsigmoid(scores(K)).sigmoid(), BCE, BITS, SIGMOID),
    "own BCE and Dice": (scores(K).sigmoid(), own_bce_and_dice, BITS, SIGMOID),
    "scaled, cross entropy": (scores().softmax(1) / 4, CE, LABELS, "softmax-into-cross-entropy"),
    "dropout, BCE with logits": (
        DROP(scores(K).sigmoid()),
        BCEL,
        BITS,
        "sigmoid-into-bce-with-logits",
    ),
    "sigmoid twice, regression": (
        scores(1).sigmoid().sigmoid(),
        MSE,
        torch.linspace(0, 1, N)[:, None],
        "head-cannot-reach-targets",
    ),
}


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
def test_the_activation_in_front_is_an_error(case):
    *arguments, name = case
    assert (name, "error") in named(*arguments)


MODELS = {
    "modules": nn.Sequential(nn.Linear(6, C), nn.Softmax(1), nn.LogSoftmax(1)),
    "nested, dropout": nn.Sequential(
        nn.Linear(6, C), nn.Sequential(nn.Softmax(1), nn.Dropout(0.1)), nn.LogSoftmax(1)
    ),
    "functions": Functions(lambda x: F.softmax(x, 1), lambda x: F.log_softmax(x, 1)),
    "methods, temperature": Functions(
        lambda x: x.softmax(1) / 2, lambda x: torch.log_softmax(x, dim=1)
    ),
    "views": Functions(lambda x: x.tanh().unsqueeze(2).squeeze(2), lambda x: F.log_softmax(x, 1)),
}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("inputs", [X, None], ids=["run", "not run"])
def test_a_model_shows_it_with_and_without_a_run(model, inputs):
    assert (SOFTMAX, "error") in named(model, NLL, LABELS, inputs)


@pytest.mark.parametrize(
    ("head", "loss", "target", "name"),
    [
        ([nn.Softmax(1), nn.LogSoftmax(1)], F.nll_loss, LABELS, SOFTMAX),
        ([nn.Softmax(1)], lambda o, t: F.nll_loss(F.log_softmax(o, 1), t), LABELS, SOFTMAX),
        ([nn.Sigmoid(), nn.Linear(C, K), nn.Sigmoid()], own_bce_and_dice, BITS, SIGMOID),
        ([nn.Linear(C, K), nn.Tanh(), nn.Dropout(0.2), nn.Sigmoid()], BCE, BITS, SIGMOID),
    ],
)
def test_guard_finds_it_in_a_training_loop(head, loss, target, name):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, C), *head)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.warns(pairing.PairingWarning), pairing.guard() as findings:
        for _ in range(3):
            optimizer.zero_grad()
            loss(net(X), target).backward()
            optimizer.step()
    assert [f.name for f in findings.errors] == [name]


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.fc = nn.Linear(6, C), nn.Linear(6, C)

    def forward(self, x):
        return F.log_softmax(self.gate(x).softmax(1) * self.fc(x), 1)


MEANS = {  # a step between the two activations
    "eps": (F.log_softmax(scores().softmax(1) + 1e-8, 1), NLL, LABELS, SOFTMAX),
    "minus": (F.log_softmax(scores().softmax(1) - 0.5, 1), NLL, LABELS, SOFTMAX),
    "KL": (F.log_softmax(scores().softmax(1) + 1e-8, 1), KL, ONE_HOT, SOFTMAX),
    "two": (
        F.log_softmax((scores().softmax(1) + scores().softmax(1)) / 2, 1),
        NLL,
        LABELS,
        SOFTMAX,
    ),
    "mean": (
        torch.stack([scores().softmax(1) for _ in range(3)]).mean(0).log_softmax(1),
        NLL,
        LABELS,
        SOFTMAX,
    ),
    "tanh to 0 and 1": (((scores(K).tanh() + 1) / 2).sigmoid(), BCE, BITS, SIGMOID),
    "sigmoid to -1 and 1": ((2 * scores(K).sigmoid() - 1).sigmoid(), BCE, BITS, SIGMOID),
    "own": (
        scores(),
        lambda o, t: F.nll_loss(F.log_softmax(o.softmax(1) + 1e-8, 1), t),
        LABELS,
        SOFTMAX,
    ),
}


@pytest.mark.parametrize("case", MEANS.values(), ids=MEANS)
def test_a_mean_or_a_constant_between_two_activations_hides_nothing(case):
    *arguments, name = case
    assert [found for found, _ in named(*arguments)] == [name]
    outputs, loss, target = arguments
    with warnings.catch_warnings(), pairing.guard() as findings:
        warnings.simplefilter("ignore", pairing.PairingWarning)
        loss(outputs, target)
    assert [f.name for f in findings] == [name]


def test_the_floors_of_moved_logits_hold_for_every_answer():
    found = pairing.check(((scores(K).tanh() + 1) / 2).sigmoid(), BCE, BITS)[0]
    said = [float(x) for x in re.findall(r"below ([\d.]+) for.*and ([\d.]+) for", found.what)[0]]
    for target, floor in zip((1.0, 0.0), said, strict=True):
        best = F.binary_cross_entropy(torch.tensor(target).sigmoid(), torch.tensor(target))
        assert 0.1 < floor <= best.item()


PRIOR = torch.tensor([0.0, -3.0, 1.0, 2.0, -1.0])
PROTOTYPES = torch.randn(C, 6, generator=SEED)


def distances() -> torch.Tensor:
    """Squared distances [N, C], cut off at 0 where rounding makes them negative."""
    e = scores(6)
    products = e @ PROTOTYPES.T
    return (e.pow(2).sum(1, keepdim=True) + PROTOTYPES.pow(2).sum(1) - 2 * products).clamp(min=0)


HEALTHY = {
    "a prior added to probabilities": (
        F.log_softmax(scores().softmax(1) + PRIOR, 1),
        NLL,
        LABELS,
    ),
    "scaled and moved": (torch.sigmoid(20 * (scores(K).sigmoid() - 0.5)), BCE, BITS),
    "moved logits": (torch.sigmoid(scores(K) + 1), BCE, BITS),
    "residual": (F.log_softmax(scores() + scores().sigmoid(), 1), NLL, LABELS),
    "mean of scores": (
        torch.stack([scores() for _ in range(3)]).mean(0).log_softmax(1),
        NLL,
        LABELS,
    ),
    "mean of probabilities, log": (((scores().softmax(1) + SOFT) / 2).log(), NLL, LABELS),
    "prototypes": (-distances(), CE, LABELS),
    "prototypes, a temperature": (-distances() / 0.5, CE, LABELS),
    "prototypes, times -1": (distances() * -1, nn.CrossEntropyLoss(label_smoothing=0.1), LABELS),
    "prototypes, relu": (-F.relu(scores()), CE, LABELS),
    "prototypes, log_softmax": (F.log_softmax(-distances(), 1), NLL, LABELS),
    "prototypes, KL": (F.log_softmax(-distances() / 4, 1), KL, SOFT),
    "prototypes, own loss": (-distances(), lambda o, t: F.cross_entropy(o, t), LABELS),
    "logit clipping": (10 * torch.tanh(scores() / 10), CE, LABELS),
    "logit clipping, log_softmax": (F.log_softmax(10 * torch.tanh(scores()), 1), NLL, LABELS),
    "logit clipping, static": (
        Functions(lambda x: 30 * torch.tanh(x / 30), lambda x: F.log_softmax(x, 1)),
        NLL,
        LABELS,
    ),
    "learned scale": (
        F.log_softmax(scores().tanh() * nn.Parameter(torch.tensor(5.0)), 1),
        NLL,
        LABELS,
    ),
    "mixture of experts": (TwoHeads(), NLL, LABELS, X),
    "mixture of experts, static": (TwoHeads(), NLL, LABELS),
    "gate": (torch.sigmoid(scores(K).sigmoid() * scores(K)), BCE, BITS),
    "sigmoid, linear, sigmoid": (
        nn.Sequential(nn.Linear(6, 3), nn.Sigmoid(), nn.Linear(3, K), nn.Sigmoid()),
        BCE,
        BITS,
        X,
    ),
    "relu, linear": (
        nn.Sequential(nn.Linear(6, 3), nn.ReLU(), nn.Linear(3, C), nn.LogSoftmax(1)),
        NLL,
        LABELS,
    ),
    "attention": (F.log_softmax(scores().softmax(1) @ scores(6)[:C, :C], 1), NLL, LABELS),
    "log_softmax of log_softmax": (scores().log_softmax(1).log_softmax(1), NLL, LABELS),
    "clamped scores": (F.log_softmax(scores().clamp(-20, 20), 1), NLL, LABELS),
    "distillation": (F.log_softmax(scores() / 4, 1), KL, SOFT),
    "targets within reach, KL": (
        F.log_softmax(scores().sigmoid(), 1),
        KL,
        scores().detach().sigmoid().softmax(1),
    ),
    "targets within reach, BCE": (scores(K).sigmoid().sigmoid(), BCE, 0.55 + 0.1 * BITS),
    "product of probabilities": (scores(K).sigmoid() * scores(K).sigmoid(), BCE, BITS),
    "equal weights": (
        torch.full((N, C), 1 / C).requires_grad_().log_softmax(1),
        NLL,
        LABELS,
    ),
    "own loss, logits without a graph": (
        scores().detach(),
        lambda o, t: F.nll_loss(F.log_softmax(o, 1), t),
        LABELS,
    ),
    "evidence": (F.log_softmax(F.softplus(scores()), 1), NLL, LABELS),
    "variance": (scores(1), nn.GaussianNLLLoss(), (BITS[:, :1], F.softplus(scores(1)) + 1e-6)),
    "pooled relu": (
        F.log_softmax(F.relu(scores(C * 4)).view(N, C, 4).mean(2), 1),
        NLL,
        LABELS,
    ),
}


@pytest.mark.parametrize("case", HEALTHY.values(), ids=HEALTHY)
def test_what_is_meant_stays_silent(case):
    assert named(*case) == []


@pytest.mark.parametrize("case", HEALTHY.values(), ids=HEALTHY)
def test_what_is_meant_stays_silent_in_guard(case):
    outputs, loss, target, *inputs = case
    rest = target if isinstance(target, tuple) else (target,)
    with warnings.catch_warnings():
        warnings.simplefilter("error", pairing.PairingWarning)
        with pairing.guard() as findings:
            for _ in range(6):
                made = outputs(*(inputs or (X,))) if isinstance(outputs, nn.Module) else outputs
                loss(made, *rest)
    assert not findings


def test_scaling_up_is_a_suspicion_until_the_floor_is_negligible():
    severities = []
    for factor in (1, 1.5, 20):
        found = named(F.log_softmax(scores().tanh() * factor, 1), NLL, LABELS)
        severities.append([severity for _, severity in found])
    assert severities == [["error"], ["suspicion"], []]


def test_a_scaled_relu_is_a_suspicion_and_minus_a_relu_into_bce_an_error():
    assert named(F.relu(scores()), CE, LABELS) == [("relu-into-cross-entropy", "error")]
    assert named(F.relu(scores()) * 5, CE, LABELS) == [("relu-into-cross-entropy", "suspicion")]
    outputs = F.log_softmax(F.relu(scores()) / 3, 1)
    assert named(outputs, NLL, LABELS) == [(SOFTMAX, "suspicion")]
    outputs = -F.relu(scores(K))  # no probability above 0.5
    assert named(outputs, BCEL, BITS) == [("relu-into-bce-with-logits", "error")]


def test_two_equal_floors_are_said_once():
    what = pairing.check(scores(K).tanh().sigmoid(), BCE, BITS)[0].what
    assert what.endswith("cannot fall below 0.313")


def test_the_finding_names_both_activations_the_range_and_the_smallest_loss():
    found = pairing.check(scores().softmax(1).log_softmax(1), NLL, LABELS)[0]
    best = F.nll_loss(torch.eye(C).log_softmax(1), torch.arange(C)).item()
    assert found.what.startswith("softmax before log_softmax")
    assert "[0, 1]" in found.what
    assert f"below {best:.3g}" in found.what
    assert "F.log_softmax(logits" in found.remedy
    found = pairing.check(scores(K).sigmoid().sigmoid(), BCE, BITS)[0]
    for target in (0.0, 1.0):
        best = F.binary_cross_entropy(torch.tensor(target).sigmoid(), torch.tensor(target)).item()
        assert f"{best:.3g} for a target of {target:.0f}" in found.what


def test_the_floors_are_what_a_search_finds():
    for kinds, outputs in {
        ("sigmoid", "tanh"): lambda z: z.sigmoid().tanh(),
        ("relu", "sigmoid"): lambda z: z.relu().sigmoid(),
        ("tanh", "exp"): lambda z: z.tanh().exp(),
        ("exp", "softplus"): lambda z: F.softplus(z.exp()),
    }.items():
        head = None
        for kind in kinds:
            head = Head(kind, before=head)
        seen = outputs(torch.linspace(-30, 30, 2001, dtype=torch.float64))
        low, high = span(head)
        assert low == pytest.approx(seen.min().item(), abs=1e-6)
        assert math.isinf(high) or high == pytest.approx(seen.max().item(), abs=1e-3)
    corner = torch.tensor([[2.0, -1.0, -1.0]], dtype=torch.float64)
    assert class_floor(3.0, 3) == pytest.approx(F.cross_entropy(corner, torch.tensor([0])).item())
    for target, floor in enumerate(binary_floors(-1.0, 2.0)):
        logit = torch.tensor([2.0 if target else -1.0])
        value = F.binary_cross_entropy_with_logits(logit, torch.tensor([float(target)]))
        assert floor == pytest.approx(value.item())


def test_the_factor_is_read_without_unpacking_a_saved_tensor():
    def refuse(*_):
        raise AssertionError("a saved tensor was unpacked")

    factor = torch.full((N, C), 0.5)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (t,), refuse):
        outputs = F.log_softmax(DROP(scores().softmax(1)) * factor, 1)
        plain = F.log_softmax(scores().softmax(1), 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert named(outputs, NLL, LABELS) == []
        assert named(plain, NLL, LABELS) == [(SOFTMAX, "error")]
