"""Losses that the table does not know: recognised by what they give, or not looked at."""

import functools
import math
import random

import healthy_programs
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dlhelpers import pairing
from dlhelpers.pairing.calls import calls_inside
from dlhelpers.pairing.tape import Tape

SEED = torch.Generator().manual_seed(0)
B, C, N, D = 3, 4, 12, 8
NO_RULE = "not looked at: no rule for this loss"
LOGITS, DOUBLE = "logits-into-own-loss", "activation-into-own-loss"
LENGTH, COLD = "embeddings-not-normalised", "cosine-without-temperature"


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=SEED)


IMAGES = randn(B, 3, 6, 6)
MASK = (randn(B, 1, 6, 6) > 0.5).float()
CLASSES = torch.randint(0, C, (B, 6, 6), generator=SEED)
torch.manual_seed(0)
NET, WIDE = nn.Conv2d(3, 1, 1), nn.Conv2d(3, C, 1)
RAW, MANY = NET(IMAGES), WIDE(IMAGES)


def dice(p, t):
    return 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)


def dice_of_samples(p, t):
    p, t = p.flatten(1), t.flatten(1)
    return (1 - (2 * (p * t).sum(1) + 1e-6) / (p.sum(1) + t.sum(1) + 1e-6)).mean()


def squared_dice(p, t):
    return 1 - 2 * (p * t).sum() / ((p * p).sum() + (t * t).sum() + 1e-6)


def tversky(p, t, alpha=0.3, beta=0.7):
    p, t = p.reshape(-1), t.reshape(-1)
    tp, fp, fn = (p * t).sum(), ((1 - t) * p).sum(), (t * (1 - p)).sum()
    return 1 - (tp + 1) / (tp + alpha * fp + beta * fn + 1)


def jaccard(p, t):
    both = (p * t).sum()
    return 1 - (both + 1) / (p.sum() + t.sum() - both + 1)


def focal(p, t, eps=1e-8):
    hit, miss = t * (1 - p) ** 2 * (p + eps).log(), (1 - t) * p**2 * (1 - p + eps).log()
    return -(hit + miss).mean()


def clamped_focal(p, t):
    return focal(p.clamp(1e-6, 1 - 1e-6), t)


def binary(p, t):
    return -(t * p.log() + (1 - t) * (1 - p).log()).mean()


def dice_of_classes(p, t):
    y = F.one_hot(t, C).movedim(-1, 1).float()
    both = (p * y).sum((0, 2, 3))
    return 1 - ((2 * both + 1) / (p.sum((0, 2, 3)) + y.sum((0, 2, 3)) + 1)).mean()


class Dice(nn.Module):
    def __init__(self, activation=None):
        super().__init__()
        self.activation = activation
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, o, t):
        return dice(o if self.activation is None else self.activation(o), t)


OF_PROBABILITIES = [
    dice,
    dice_of_samples,
    squared_dice,
    tversky,
    functools.partial(tversky, alpha=0.5, beta=0.5),
    lambda p, t: tversky(p, t) ** 0.75,
    lambda p, t: -(1 - dice(p, t)),
    jaccard,
    focal,
    clamped_focal,
    binary,
    Dice(),
]


@pytest.mark.parametrize("loss", OF_PROBABILITIES)
def test_raw_outputs_in_a_loss_of_probabilities_are_an_error(loss):
    for outputs in (RAW, RAW.detach()):
        assert named(outputs, loss, MASK) == [(LOGITS, "error")]
    assert named(NET, loss, MASK, IMAGES) == [(LOGITS, "error")]
    right = pairing.check(RAW.sigmoid(), loss, MASK)
    assert str(right) == "nothing found: this loss wants probabilities"


@pytest.mark.parametrize("loss", OF_PROBABILITIES)
def test_a_second_sigmoid_inside_of_the_loss_is_an_error(loss):
    def with_sigmoid(o, t):
        return loss(o.sigmoid(), t)

    assert named(RAW.sigmoid(), with_sigmoid, MASK) == [(DOUBLE, "error")]
    assert named(RAW.tanh(), with_sigmoid, MASK) == [(DOUBLE, "error")]
    assert named(RAW.sigmoid().detach(), with_sigmoid, MASK) == [(DOUBLE, "suspicion")]
    assert str(pairing.check(RAW, with_sigmoid, MASK)) == "nothing found: this loss wants logits"


def test_classes_and_combined_losses_are_recognised_as_well():
    def both(o, t):
        return 0.5 * F.cross_entropy(o, t) + dice_of_classes(o, t)

    def right(o, t):
        return 0.5 * F.cross_entropy(o, t) + dice_of_classes(o.softmax(1), t)

    assert named(MANY, dice_of_classes, CLASSES) == [(LOGITS, "error")]
    assert named(MANY, both, CLASSES) == [(LOGITS, "error")]
    assert named(MANY.softmax(1), lambda o, t: dice_of_classes(o.softmax(1), t), CLASSES) == [
        (DOUBLE, "error")
    ]
    assert named(MANY, right, CLASSES) == named(MANY.softmax(1), dice_of_classes, CLASSES) == []
    assert named(RAW, lambda o, t: dice(o[:, 0], t), MASK[:, 0]) == [(LOGITS, "error")]


def test_the_finding_says_what_the_loss_gives():
    what = pairing.check(RAW, dice, MASK)[0].what
    assert f"{dice(3 * MASK, MASK).item():.3g} for 3 times the labels" in what
    assert f"{RAW.min().item():.4g} to {RAW.max().item():.4g}" in what
    what = pairing.check(RAW.sigmoid(), lambda o, t: dice(o.sigmoid(), t), MASK)[0].what
    assert f"the best loss of outputs in [0, 1] is {dice(MASK.sigmoid(), MASK).item():.3g}" in what


def test_a_large_output_is_played_with_fewer_samples(monkeypatch):
    mask = (randn(20, 1, 256, 256) > 0.5).float()
    played, play = [], Tape.play

    def counted(self, places, *rest):
        played.extend(new.numel() for _, new in places)
        return play(self, places, *rest)

    monkeypatch.setattr(Tape, "play", counted)
    raw = 2 * mask - 0.5
    for loss in (dice, dice_of_samples):
        assert named(raw, loss, mask) == [(LOGITS, "error")]
        assert named(raw.clamp(0, 1), loss, mask) == []
    assert played
    assert max(played) <= 2**20


def test_a_narrowed_call_has_the_value_of_fewer_samples():
    inside = calls_inside(lambda o, t: dice_of_classes(o.softmax(1), t), MANY, CLASSES)
    less = Tape(inside).narrowed(B, 2)
    torch.testing.assert_close(less.value, dice_of_classes(MANY.softmax(1)[:2], CLASSES[:2]))
    assert Tape(less).is_faithful
    inside = calls_inside(lambda o, t: ((o - t) ** 2).sum() / len(o), RAW, MASK)
    assert Tape(inside).narrowed(B, 2) is None  # it read how many there are


def unit(z):
    return F.normalize(z, dim=1)


def info_nce(a, b, temperature=1.0):
    return F.cross_entropy(a @ b.T / temperature, torch.arange(len(a)))


def nt_xent(z, temperature=1.0):
    """By hand, without a loss of torch's."""
    scores, half = torch.exp(z @ z.T / temperature), len(z) // 2
    positive = torch.exp((z * z.roll(half, 0)).sum(1) / temperature)
    return -torch.log(positive / (scores.sum(1) - scores.diagonal())).mean()


def triplet(a, p, n, margin=1.0):
    return F.relu((a - p).norm(dim=1) - (a - n).norm(dim=1) + margin).mean()


def pair(a, b, same):
    distance = (a - b).norm(dim=1)
    return (same * distance**2 + (1 - same) * F.relu(1 - distance) ** 2).mean()


def supervised(z, labels, temperature=0.1):
    scores = (z @ z.T / temperature).masked_fill(torch.eye(len(z)).bool(), -1e9)
    same = (labels[:, None] == labels).float().fill_diagonal_(0)
    return -((same * scores.log_softmax(1)).sum(1) / same.sum(1).clamp(min=1)).mean()


def hardest(z, labels, margin=0.3):
    distance, same = torch.cdist(z, z), labels[:, None] == labels
    far = distance.masked_fill(~same, 0).max(dim=1).values
    near = distance.masked_fill(same, 1e9).min(dim=1).values
    return F.relu(far - near + margin).mean()


A, P, Q = (2 * randn(N, D).requires_grad_() for _ in range(3))
LABELS = torch.randint(0, 3, (N,), generator=SEED)
EMBEDDED = {
    "InfoNCE, dot products": (A, info_nce, P, LENGTH),
    "InfoNCE, dot products, temperature": (A, lambda a, b: info_nce(a, b, 0.1), P, LENGTH),
    "InfoNCE, tuple": ((A, P), lambda o, _: info_nce(*o), LABELS, LENGTH),
    "InfoNCE, tuple, temperature": ((A, P), lambda o, _: info_nce(*o, 0.5), LABELS, LENGTH),
    "NT-Xent by hand": (torch.cat([A, P]) / 4, lambda z, _: nt_xent(z, 0.5), LABELS, LENGTH),
    "supervised": (A, supervised, LABELS, LENGTH),
    "triplet": ((A, P, Q), lambda o, _: triplet(*o), LABELS, LENGTH),
    "TripletMarginLoss": (A, nn.TripletMarginLoss(), (P, Q), LENGTH),
    "function": (A, F.triplet_margin_loss, (P, Q), LENGTH),
    "views": (
        torch.stack([A, P], 1),
        lambda z, y: supervised(z.flatten(0, 1), y.repeat_interleave(2)),
        LABELS,
        LENGTH,
    ),
    "hardest triplets": (A, hardest, LABELS, LENGTH),
    "dot product for cosine": (A, lambda a, b: 1 - (a * b).sum(1).mean(), P, LENGTH),
    "negative dot product": ((A, P), lambda o, _: -(o[0] * o[1]).sum(1).mean(), LABELS, LENGTH),
    "contrastive pairs": ((A, P), lambda o, y: pair(*o, y), (LABELS > 0).float(), LENGTH),
    "cosines": (A, lambda a, b: info_nce(unit(a), unit(b)), P, COLD),
    "cosines of units": (unit(A), info_nce, unit(P), COLD),
    "cosine_similarity": (
        A,
        lambda a, b: F.cross_entropy(
            F.cosine_similarity(a[:, None], b[None], dim=-1), torch.arange(N)
        ),
        P,
        COLD,
    ),
    "both directions": (
        A,
        lambda a, b: (info_nce(unit(a), unit(b)) + info_nce(unit(b), unit(a))) / 2,
        P,
        COLD,
    ),
    "NT-Xent of units": (torch.cat([A, P]), lambda z, _: nt_xent(unit(z)), LABELS, COLD),
    "cosines into CrossEntropyLoss": (
        unit(A) @ unit(P).T,
        nn.CrossEntropyLoss(),
        torch.arange(N),
        COLD,
    ),
}


@pytest.mark.parametrize("case", EMBEDDED.values(), ids=EMBEDDED)
def test_embeddings_without_length_or_temperature_are_a_suspicion(case):
    *arguments, name = case
    assert named(*arguments) == [(name, "suspicion")]


def test_the_smallest_loss_of_cosines_is_what_is_said():
    what = pairing.check(*EMBEDDED["cosines"][:3])[0].what
    best = F.cross_entropy(2 * torch.eye(N) - 1, torch.arange(N)).item()
    assert f"below {best:.3g}" in what


SCALE = nn.Parameter(torch.tensor(2.6))
PROXIES = nn.Parameter(randn(3, D))
COMPARED = "nothing found: this loss compares embeddings and does not depend on their length"
UNITS = "nothing found: this loss compares embeddings of length 1"
PRODUCTS = (
    "nothing found: this loss compares embeddings by their dot products, without a temperature"
)


def ranked(u, positive, negative):
    """BPR: Rendle et al. 2009."""
    return -F.logsigmoid((u * positive).sum(1) - (u * negative).sum(1)).mean()


def sampled(u, positive, negative):
    """Negative sampling of word2vec: Mikolov et al. 2013."""
    pulled = F.logsigmoid((u * positive).sum(1))
    return -(pulled + F.logsigmoid(-(u @ negative.T)).sum(1)).mean()


HEALTHY = {
    "InfoNCE": (A, lambda a, b: info_nce(unit(a), unit(b), 0.1), P, COMPARED),
    "InfoNCE of units": (unit(A), lambda a, b: info_nce(a, b, 0.1), unit(P), UNITS),
    "NT-Xent": (torch.cat([A, P]), lambda z, _: nt_xent(unit(z), 0.5), LABELS, COMPARED),
    "CLIP": (
        (A, P),
        lambda o, _: info_nce(unit(o[0]), unit(o[1]), 1 / SCALE.exp()),
        LABELS,
        COMPARED,
    ),
    "BPR": (A, ranked, (P, Q), PRODUCTS),
    "BPR, softplus": (
        A,
        lambda u, p, n: F.softplus((u * (n - p)).sum(1)).mean(),
        (P, Q),
        PRODUCTS,
    ),
    "negative sampling": (A, sampled, (P, Q[:5]), PRODUCTS),
    "negative sampling, BCE": (
        A,
        lambda u, v: F.binary_cross_entropy_with_logits(u @ v.T, torch.eye(N)),
        P,
        "nothing found",
    ),
    "supervised": (A, lambda z, y: supervised(unit(z), y), LABELS, COMPARED),
    "triplet of units": (unit(A), nn.TripletMarginLoss(margin=0.2), (unit(P), unit(Q)), UNITS),
    "ArcFace": (
        A,
        lambda z, y: F.cross_entropy(64 * (unit(z) @ unit(PROXIES).T - F.one_hot(y, 3) / 2), y),
        LABELS,
        "nothing found",
    ),
    "BYOL": (A, lambda a, b: 2 - 2 * (unit(a) * unit(b)).sum(1).mean(), P.detach(), NO_RULE),
    "distance": (A, lambda a, b: (a - b).norm(dim=1).mean(), P.detach(), NO_RULE),
    "robust distance": (
        A,
        lambda a, b: torch.log(1 + (a - b).square().sum(1)).mean(),
        P.detach(),
        NO_RULE,
    ),
    "divergence of kernels": (
        A,
        lambda a, b: sum(
            sign * torch.exp(-(torch.cdist(x, y) ** 2)).mean()
            for sign, x, y in ((1, a, a), (1, b, b), (-2, a, b))
        ),
        P.detach(),
        NO_RULE,
    ),
    "relations of distances": (
        A,
        lambda a, b: F.huber_loss(torch.cdist(a, a), torch.cdist(b, b)),
        P.detach(),
        "nothing found",
    ),
    "gradient penalty": (A, lambda a, _: ((a.norm(dim=1) - 1) ** 2).mean(), LABELS, NO_RULE),
    "squared error": (RAW, lambda o, t: ((o - t) ** 2).mean(), MASK, NO_RULE),
    "absolute error": (RAW.sigmoid(), lambda o, t: (o - t).abs().mean(), MASK, NO_RULE),
    "critic": (RAW, lambda o, t: -(o * t).mean(), MASK, NO_RULE),
    "likelihood of log-probabilities": (
        MANY.log_softmax(1),
        lambda o, t: -(F.one_hot(t, C).movedim(-1, 1) * o).sum(1).mean(),
        CLASSES,
        NO_RULE,
    ),
    "quantiles": (
        RAW,
        lambda o, t: torch.max(0.9 * (t - o), 0.1 * (o - t)).mean(),
        RAW * 2,
        NO_RULE,
    ),
    "hinge": (
        RAW,
        lambda o, t: F.relu(1 - (2 * t - 1) * o).mean(),
        MASK,
        "nothing found: this loss wants logits",
    ),
    "focal of cross entropy": (
        MANY,
        lambda o, t: (lambda ce: ((1 - torch.exp(-ce)) ** 2 * ce).mean())(
            F.cross_entropy(o, t, reduction="none")
        ),
        CLASSES,
        "nothing found",
    ),
    "BCE and Dice of logits": (
        RAW,
        lambda o, t: F.binary_cross_entropy_with_logits(o, t) + dice(o.sigmoid(), t),
        MASK,
        "nothing found: this loss wants logits",
    ),
    "weighted cross entropy": (
        MANY,
        lambda o, t: 2 * F.cross_entropy(o, t),
        CLASSES,
        "nothing found",
    ),
    "many classes": (
        torch.randn(64, 1000, generator=SEED).requires_grad_(),
        lambda o, t: F.cross_entropy(o, t),
        torch.arange(64),
        "nothing found",
    ),
    "mixture": (
        torch.stack([MANY, -MANY]),
        lambda o, t: F.nll_loss(torch.logsumexp(o.log_softmax(2), 0) - math.log(2), t),
        CLASSES,
        "nothing found",
    ),
    "ordinal": (
        MANY,
        lambda o, t: F.binary_cross_entropy_with_logits(
            o, (t[:, None] > torch.arange(C)[:, None, None]).float()
        ),
        CLASSES,
        "nothing found",
    ),
    "random": (RAW, lambda o, t: dice(F.dropout(o.sigmoid(), 0.5), t), MASK, NO_RULE),
}


@pytest.mark.parametrize("case", HEALTHY.values(), ids=HEALTHY)
def test_healthy_losses_stay_silent_and_the_unknown_is_not_looked_at(case):
    *arguments, scope = case
    found = pairing.check(*arguments)
    assert not found
    assert str(found) == scope


LOG_P = MANY.log_softmax(1)


@pytest.mark.parametrize(
    "case",
    [
        (randn(1)[0].requires_grad_(), nn.MSELoss(), randn(1)),
        (randn(1, 1).requires_grad_(), nn.L1Loss(), randn(1)),
        (randn(5).requires_grad_(), nn.HuberLoss(), randn(1, 5)),
        (randn(5, 1).requires_grad_(), nn.SmoothL1Loss(), torch.tensor(1.0)),
        ((1 - MANY.softmax(1)) ** 2 * LOG_P, nn.NLLLoss(), CLASSES),
        (torch.rand(C, 1, 1) * LOG_P, nn.NLLLoss(), CLASSES),
        (LOG_P - torch.full((C, 1, 1), 1 / C).log(), nn.NLLLoss(), CLASSES),
        (torch.log(MANY.softmax(1) + 1e-6), nn.NLLLoss(), CLASSES),
        (MANY, lambda o, t: F.nll_loss((1 - o.softmax(1)) ** 2 * o.log_softmax(1), t), CLASSES),
        (
            MANY.detach(),
            lambda o, t: F.nll_loss((1 - o.softmax(1)) ** 2 * o.log_softmax(1), t),
            CLASSES,
        ),
    ],
)
def test_what_fits_one_to_one_or_is_made_of_logarithms_is_no_suspicion(case):
    assert named(*case) == []


@pytest.mark.filterwarnings("ignore:Using a target size")
def test_what_is_really_broadcast_or_negated_is_still_found():
    for outputs, targets in ((randn(5, 1), randn(5)), (randn(5), randn(5, 1))):
        assert named(outputs, nn.MSELoss(), targets) == [("broadcast-target", "error")]
    assert named(randn(1), nn.MSELoss(), randn(5)) == [("broadcast-target", "suspicion")]
    assert named(-LOG_P, nn.NLLLoss(), CLASSES) == [("logits-into-nll", "error")]


def test_a_model_that_is_not_run_is_not_looked_at():
    layer = nn.TransformerEncoderLayer(8, 2, batch_first=True)
    for model, loss in ((NET, dice), (nn.TransformerEncoder(layer, 1), nn.CrossEntropyLoss())):
        found = pairing.check(model, loss, MASK)
        assert not found
        assert found.scope.startswith("not looked at")
        assert "pairing.check(model, loss, targets, inputs)" in found.scope
    known = pairing.check(nn.Linear(3, 4), nn.CrossEntropyLoss(), LABELS)
    assert str(known) == "nothing found"


def test_what_was_not_looked_at_stands_below_other_findings():
    unnamed = nn.Sequential(nn.Linear(6, C), nn.Softmax())
    found = pairing.check(unnamed, lambda o, t: (o - t).pow(2).mean(), randn(2, C), randn(2, 6))
    assert [f.name for f in found] == ["softmax-without-dim"]
    assert found.note == NO_RULE


def test_a_loss_runs_once_and_leaves_no_trace():
    calls = []

    class Counting(Dice):
        def forward(self, o, t):
            calls.append(random.random() + np.random.rand())
            self.calls += 1
            o.mul_(1.0)
            return super().forward(o, t)

    loss = Counting()
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tobytes()
    assert named(RAW, loss, MASK) == [(LOGITS, "error")]
    assert len(calls) == 1
    assert loss.calls == 0
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tobytes()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def test_a_tape_gives_what_the_loss_gives():
    def loss(o, t):
        y = torch.zeros_like(t)
        y[t > 0.5] = 1
        parts = torch.stack([o, y]).unbind(0)
        return dice(parts[0].sigmoid(), parts[1]) + 0.1 * (o.max(dim=1).values ** 2).mean()

    inside = calls_inside(loss, RAW.detach(), MASK)
    tape = Tape(inside)
    assert tape.is_faithful
    for other in (randn(*RAW.shape), 3 * randn(*RAW.shape)):
        expected = loss(other, MASK).item()
        assert tape.value([(inside.arguments[0], other)]) == pytest.approx(expected)


def test_a_tape_does_not_guess():
    kept = torch.zeros(())

    def branches(o, t):
        return (o * t).mean() if o.sum() > 0 else o.mean()

    def reads(o, t):
        return (o * t).mean() * o.max().item()

    def draws(o, t):
        return (o * t * torch.rand_like(o)).mean()

    def writes(o, t):
        kept.add_(1)
        return (o * t).mean() + kept

    for loss in (branches, reads, draws, writes):
        tape = Tape(inside := calls_inside(loss, torch.ones(4), torch.ones(4)))
        places = [(inside.arguments[0], torch.tensor([-1.0, -2.0, 0.5, 0.0]))]
        assert tape.value(places) is None or not tape.is_faithful
    assert kept == 1


def test_healthy_programs_own_no_false_findings_with_their_own_losses():
    images, labels = healthy_programs.digits()
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    for loss in (
        lambda o, t: F.cross_entropy(o, t, label_smoothing=0.1),
        lambda o, t: F.multi_margin_loss(o, t) + 0.01 * o.square().mean(),
        lambda o, t: -o.log_softmax(1).gather(1, t[:, None]).mean(),
    ):
        assert not pairing.check(net, loss, labels[:16], images[:16])


def named(*case) -> list[tuple[str, str]]:
    return [(f.name, f.severity) for f in pairing.check(*case)]
