"""pairing.check: every row of its table fires, every legitimate pair is left in peace."""

import functools
import random
import re
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from dlhelpers import pairing
from dlhelpers.pairing.catalog import ENTRIES

SEED = torch.Generator().manual_seed(0)
N, C, K = 8, 5, 4


def randn(*shape: int, grad: bool = True) -> torch.Tensor:
    """Logits that come out of a linear layer, so that a graph shows where they are from."""
    x = torch.randn(*shape, generator=SEED)
    if not grad:
        return x
    weight = torch.eye(shape[-1], requires_grad=True)
    return x @ weight


LABELS = torch.randint(0, C, (N,), generator=SEED)
BITS = torch.randint(0, 2, (N, K), generator=SEED).float()
BITS[0], BITS[1] = 1, 0
ONE_HOT = F.one_hot(LABELS, C).float()
CE, NLL, BCE, BCEL, MSE = (
    nn.CrossEntropyLoss(),
    nn.NLLLoss(),
    nn.BCELoss(),
    nn.BCEWithLogitsLoss(),
    nn.MSELoss(),
)
KL = nn.KLDivLoss(reduction="batchmean")
CTC_TARGETS = torch.randint(1, C, (2, 3), generator=SEED)
CTC_TARGETS[:, 1] = CTC_TARGETS[:, 0] % (C - 1) + 1  # no equal neighbours
CTC_TARGETS[:, 2] = CTC_TARGETS[:, 1] % (C - 1) + 1
CTC = (CTC_TARGETS, torch.tensor([9, 9]), torch.tensor([3, 3]))


def first(x: torch.Tensor) -> torch.Tensor:
    return x.abs() + 0.1


class FunctionalHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, C)

    def forward(self, x):
        return F.softmax(self.fc(x), 1)


class Branching(FunctionalHead):
    """Not traceable by torch.fx: the path depends on values."""

    def forward(self, x):
        return torch.sigmoid(self.fc(x)) if x.sum() > 1e9 else F.softmax(self.fc(x), 1)


INPUTS = torch.randn(N, 6, generator=SEED)


def soft_dice(p, t):
    return 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)


UNNAMED = nn.Sequential(nn.Linear(6, C), nn.Softmax())


def raising(*_):
    raise RuntimeError("no")


# row of the docstring's table -> cases (arguments of check, severity); the finding's name is the
# table's own
CASES = {
    "softmax before CrossEntropyLoss": [
        (randn(N, C).softmax(1), CE, LABELS),
        (randn(N, C).softmax(-1), F.cross_entropy, LABELS),
        (randn(N, C).softmax(1).view(-1, C).float(), CE, LABELS),
        (randn(N, C).softmax(1).bfloat16(), CE, LABELS),
        (randn(N, C).softmax(1).half().float(), CE, LABELS),
        (randn(N, C).softmax(1)[2:].clone().contiguous(), CE, LABELS[2:]),
        (randn(N, C, 1).softmax(1).squeeze(-1), CE, LABELS),
        (randn(N, 6, C).softmax(-1).transpose(1, 2), CE, torch.zeros(N, 6).long()),
        (randn(N, 6, C).softmax(-1).permute(0, 2, 1), CE, torch.zeros(N, 6).long()),
        (randn(N, C, 3, 3).softmax(1), CE, torch.zeros(N, 3, 3).long()),
        (randn(2, N, C).softmax(-1).reshape(-1, C), CE, LABELS.repeat(2)),
        (randn(N, C).softmax(1), nn.CrossEntropyLoss(label_smoothing=0.1), LABELS),
        (randn(N, C).softmax(1), CE, ONE_HOT),
        (randn(N, C).softmax(1).clamp(1e-7, 1), CE, LABELS),
        (randn(N, C).log_softmax(1).exp(), CE, LABELS),
        (torch.cat([randn(N, C).softmax(1), randn(N, C).softmax(1)]), CE, LABELS.repeat(2)),
        (torch.stack([randn(N, C).softmax(1)] * 2)[0], CE, LABELS),
        (randn(N, C).softmax(1)[torch.arange(N) > 2], CE, LABELS[3:]),
        (randn(1, C).softmax(1), CE, LABELS[:1]),
        (randn(N, C)[0].softmax(0), CE, LABELS[0]),
        ((randn(N, C).softmax(1), "anything"), CE, LABELS),
        ({"logits": randn(N, C).softmax(1)}, CE, LABELS),
        (FunctionalHead(), CE, LABELS, INPUTS),
        (FunctionalHead(), CE, LABELS),
        (Branching(), CE, LABELS, INPUTS),
        (nn.Sequential(nn.Sequential(nn.Linear(6, C), nn.Softmax(1)), nn.Identity()), CE, LABELS),
        (nn.Sequential(nn.Linear(6, C), nn.Softmax(-1)).eval(), CE, LABELS, (INPUTS,)),
        (nn.Sequential(nn.Linear(6, C), nn.Softmax(1)).requires_grad_(False), CE, LABELS, INPUTS),
        (lambda x: F.softmax(x[:, :C], 1), CE, LABELS, INPUTS),
        (nn.DataParallel(FunctionalHead()), CE, LABELS, INPUTS),
        (randn(N, C).softmax(1), functools.partial(F.cross_entropy, label_smoothing=0.1), LABELS),
        (randn(N, C), lambda p, t: F.cross_entropy(p.softmax(1), t), LABELS),
        ({"out": randn(N, C)}, lambda p, t: F.cross_entropy(p["out"].softmax(1), t), LABELS),
        ((randn(N, C).softmax(1), None), lambda p, t: F.cross_entropy(p[0], t), LABELS),
        ((randn(N, C).softmax(1), None), lambda p, t: F.cross_entropy(p, t), LABELS),
        (randn(N, C).softmax(1), lambda p, t, w: F.cross_entropy(p, t), (LABELS, 1.0)),
        (randn(N, C).softmax(1), lambda p, t: F.cross_entropy(p, t[0]), (LABELS, 1.0)),
        (randn(N, C).softmax(1), CE, LABELS.tolist()),
        (randn(N, C).softmax(1), CE, LABELS.numpy()),
    ],
    "softmax before CrossEntropyLoss, no graph": [
        (randn(N, C).softmax(1).detach(), CE, LABELS),
        (randn(2, C).softmax(1).detach(), CE, LABELS[:2]),
        (randn(N, C).softmax(1).detach().bfloat16().float(), CE, LABELS),
        (randn(N, C).softmax(1).detach().half(), CE, LABELS),
        (randn(N, C).softmax(1).detach().double(), CE, LABELS),
        (randn(N, 1000, grad=False).softmax(1), CE, LABELS),
        (randn(N, C).softmax(1).detach().numpy(), CE, LABELS.numpy()),
        (randn(N, C).softmax(1).tolist(), CE, LABELS.tolist()),
        (randn(N, C, 3, 3, grad=False).softmax(1), CE, torch.zeros(N, 3, 3).long()),
        (torch.exp(x := randn(N, C)) / torch.exp(x).sum(1, keepdim=True), CE, LABELS),
    ],
    "sigmoid before CrossEntropyLoss": [
        (randn(N, C).sigmoid(), CE, LABELS),
        (randn(N, C).sigmoid().unsqueeze(-1).squeeze(-1), CE, LABELS),
        (randn(2, 4, C).sigmoid().permute(2, 0, 1).reshape(C, -1).t(), CE, LABELS),
        (nn.Sequential(nn.Linear(6, C), nn.Sigmoid()), CE, LABELS, INPUTS),
        (nn.Sequential(nn.Linear(6, C), nn.Sigmoid()), CE, LABELS),
    ],
    "all logits in [0, 1]": [(torch.rand(N, C, generator=SEED), CE, LABELS)],
    "tanh before CrossEntropyLoss": [(randn(N, C).tanh(), CE, LABELS)],
    "ReLU before CrossEntropyLoss": [
        (randn(N, C).relu(), CE, LABELS),
        (randn(N, C).clamp(min=0), CE, LABELS),
        (F.relu6(randn(N, C)), CE, LABELS),
    ],
    "no logit negative, some exactly 0": [(4 * randn(N, C).relu().detach(), CE, LABELS)],
    "LogSoftmax before CrossEntropyLoss (wasted)": [
        (randn(N, C).log_softmax(1), CE, LABELS),
        (randn(N, C).log_softmax(1).detach(), CE, LABELS),
        (nn.Sequential(nn.Linear(6, C), nn.LogSoftmax(1)), CE, LABELS),
    ],
    "softmax, log_softmax over another axis than classes": [
        (randn(N, C).log_softmax(0), NLL, LABELS),
        (randn(N, C).log_softmax(0), CE, LABELS),
        (randn(N, C).softmax(0), CE, LABELS),
        (randn(N, C, 7).log_softmax(2), NLL, torch.zeros(N, 7).long()),
        (randn(N, C, 3, 3).log_softmax(-1), NLL, torch.zeros(N, 3, 3).long()),
        (randn(C, N).log_softmax(1).T, NLL, LABELS),
        (randn(9, 2, C).log_softmax(0), nn.CTCLoss(), CTC),
        (randn(9, 2, C).log_softmax(1), nn.CTCLoss(), CTC),
        (randn(N, C).log_softmax(0), KL, ONE_HOT * 0.9 + 0.02),
        (nn.Sequential(nn.Linear(6, C), nn.LogSoftmax(0)), NLL, LABELS),
        (nn.Sequential(nn.Linear(6, C), nn.LogSoftmax(0)), NLL, LABELS, INPUTS),
    ],
    "the same without a graph": [
        (randn(N, C, grad=False).log_softmax(0), NLL, LABELS),
        (randn(N, C, grad=False).softmax(0), CE, LABELS),
        (randn(9, 2, C, grad=False).log_softmax(0), nn.CTCLoss(), CTC),
    ],
    "nn.Softmax() without dim": [(UNNAMED, CE, LABELS, INPUTS), (UNNAMED, CE, LABELS)],
    "bounded scores before log_softmax or softmax": [
        (randn(N, C).softmax(1).log_softmax(1), NLL, LABELS),
        (nn.Sequential(nn.Linear(6, C), nn.Sigmoid(), nn.LogSoftmax(1)), NLL, LABELS, INPUTS),
        (nn.Sequential(nn.Linear(6, C), nn.Sigmoid(), nn.LogSoftmax(1)), NLL, LABELS),
    ],
    "bounded scores before sigmoid, BCELoss": [
        (randn(N, K).sigmoid().sigmoid(), BCE, BITS),
        (nn.Sequential(nn.Linear(6, K), nn.Tanh(), nn.Sigmoid()), BCE, BITS),
    ],
    "one logit with CrossEntropyLoss": [
        (randn(N, 1), CE, torch.zeros(N).long()),
        (randn(N, 1, 4), CE, torch.zeros(N, 4).long()),
        (randn(N, 1), CE, torch.ones(N, 1)),
    ],
    "softmax before NLLLoss": [
        (randn(N, C).softmax(1), NLL, LABELS),
        (randn(N, C).softmax(1).double(), F.nll_loss, LABELS),
        (FunctionalHead(), NLL, LABELS, INPUTS),
    ],
    "softmax before NLLLoss, no graph": [(randn(N, C, grad=False).softmax(1), NLL, LABELS)],
    "sigmoid before NLLLoss": [(randn(N, C).sigmoid(), NLL, LABELS)],
    "raw logits into NLLLoss": [
        (randn(N, C), NLL, LABELS),
        (nn.Linear(6, C), NLL, LABELS, INPUTS),
        (nn.Conv1d(6, C, 1), NLL, LABELS[:, None], INPUTS[:, :, None]),
    ],
    "values above 0 into NLLLoss": [(randn(N, C, grad=False), NLL, LABELS)],
    "values below 0 that are not normalised into NLLLoss": [
        (-first(randn(N, C, grad=False)) * 3, NLL, LABELS)
    ],
    "log(softmax) in place of log_softmax": [
        (randn(N, C).softmax(1).log(), NLL, LABELS),
        (randn(N, C).softmax(1).clamp_min(1e-8).log(), NLL, LABELS),
    ],
    "sigmoid before BCEWithLogitsLoss": [
        (randn(N, K).sigmoid(), BCEL, BITS),
        (randn(N, 1).sigmoid().squeeze(1), BCEL, BITS[:, 0]),
        (randn(N, K).sigmoid(), nn.MultiLabelSoftMarginLoss(), BITS),
        (F.logsigmoid(randn(N, K)).exp(), BCEL, BITS),
    ],
    "all logits in [0, 1] before BCEWithLogitsLoss": [
        (randn(N, K, grad=False).sigmoid(), BCEL, BITS),
    ],
    "softmax before BCEWithLogitsLoss": [
        (randn(N, K).softmax(1), BCEL, BITS),
        (randn(N, K).softmax(1).detach(), BCEL, BITS),
    ],
    "log_softmax before BCEWithLogitsLoss": [
        (randn(N, K).log_softmax(1), BCEL, BITS),
        (randn(N, K).log_softmax(1).detach(), BCEL, BITS),
    ],
    "ReLU before BCEWithLogitsLoss": [(randn(N, K).relu(), BCEL, BITS)],
    "tanh before BCEWithLogitsLoss": [(randn(N, K).tanh(), BCEL, BITS)],
    "raw logits into BCELoss": [
        (0.01 * torch.rand(N, 6) @ torch.rand(6, K, requires_grad=True), BCE, BITS),
        (nn.Linear(6, K), BCE, BITS, INPUTS),
        (nn.Linear(6, K), BCE, BITS),
        (randn(N, K).tanh(), BCE, BITS),
        (randn(N, K).relu(), BCE, BITS),
    ],
    "values outside [0, 1] into BCELoss": [(randn(N, K, grad=False), BCE, BITS)],
    "softmax before BCELoss, one label a sample": [
        (randn(N, C).softmax(1), BCE, ONE_HOT),
        (randn(N, 2).softmax(1), BCE, F.one_hot(LABELS % 2, 2).float()),
        (randn(N, 2, grad=False).softmax(1), BCE, F.one_hot(LABELS % 2, 2).float()),
    ],
    "softmax before BCELoss, several labels a sample": [
        (randn(N, K).softmax(1), BCE, BITS),
        (randn(N, K, grad=False).softmax(1), BCE, BITS),
    ],
    "probabilities into KLDivLoss": [
        (randn(N, C).softmax(1), KL, ONE_HOT),
        (randn(N, C).softmax(1).detach(), KL, ONE_HOT),
    ],
    "raw logits into KLDivLoss": [
        (randn(N, C), KL, ONE_HOT),
        (randn(N, C).detach(), KL, ONE_HOT),
    ],
    "sigmoid before KLDivLoss": [
        (randn(N, C).sigmoid(), KL, ONE_HOT),
        (nn.Sequential(nn.Linear(6, C), nn.Sigmoid()), KL, ONE_HOT),
    ],
    "log-probability targets without log_target=True": [
        (randn(N, C).log_softmax(1), KL, randn(N, C).log_softmax(1).detach())
    ],
    "probability targets with log_target=True": [
        (
            randn(N, C).log_softmax(1),
            nn.KLDivLoss(reduction="batchmean", log_target=True),
            randn(N, C).softmax(1).detach(),
        )
    ],
    "negative KLDivLoss targets that are no logarithms": [
        (randn(N, C).log_softmax(1), KL, randn(N, C, grad=False))
    ],
    "KLDivLoss targets that sum to more than 1": [(randn(N, K).log_softmax(1), KL, 0 * BITS + 1)],
    "KLDivLoss with reduction='mean'": [
        (randn(N, C).log_softmax(1), nn.KLDivLoss(), ONE_HOT * 0.9 + 0.02)
    ],
    "probabilities into CTCLoss": [
        (randn(9, 2, C).softmax(-1), nn.CTCLoss(), CTC),
        (randn(9, 2, C).softmax(-1).detach(), F.ctc_loss, CTC),
        (randn(9, 2, C).softmax(-1), nn.CTCLoss(), CTC_TARGETS),
    ],
    "sigmoid before CTCLoss": [(randn(9, 2, C).sigmoid(), nn.CTCLoss(), CTC)],
    "raw logits into CTCLoss": [
        (randn(9, 2, C), nn.CTCLoss(), CTC),
        (randn(9, 2, C).detach(), nn.CTCLoss(), CTC),
    ],
    "lengths that do not fit log_probs (T, N, C)": [
        (randn(2, 9, C).log_softmax(-1), nn.CTCLoss(), CTC),
        (randn(8, 2, C).log_softmax(-1), nn.CTCLoss(), CTC),
    ],
    "fewer frames than CTC needs": [
        (randn(2, 2, C).log_softmax(-1), nn.CTCLoss(), (CTC_TARGETS, (2, 2), (3, 3))),
        (
            randn(5, 1, C).log_softmax(-1),
            nn.CTCLoss(),
            (torch.tensor([[1, 1, 1, 1]]), torch.tensor([5]), torch.tensor([4])),
        ),
        (
            randn(9, 2, C).log_softmax(-1),
            nn.CTCLoss(),
            (torch.tensor([1, 2, 1, 2, 1, 2, 1]), (9, 3), (2, 5)),
        ),
    ],
    "the blank among the targets": [
        (randn(9, 2, C).log_softmax(-1), nn.CTCLoss(), (CTC_TARGETS * 0, *CTC[1:])),
        (randn(9, 2, C).log_softmax(-1), nn.CTCLoss(blank=int(CTC_TARGETS[0, 0])), CTC),
    ],
    "softmax before a margin loss": [
        (randn(N, C).softmax(1), nn.MultiMarginLoss(), LABELS),
        (randn(N, C).softmax(1).detach(), nn.MultiMarginLoss(), LABELS),
    ],
    "sigmoid before a margin loss": [
        (randn(N, C).sigmoid(), nn.MultiMarginLoss(), LABELS),
        (randn(N).sigmoid(), nn.SoftMarginLoss(), 2 * BITS[:, 0] - 1),
    ],
    "0/1 targets in a loss of -1/+1 targets": [
        (randn(N, K), nn.SoftMarginLoss(), BITS),
        (randn(N, K), nn.HingeEmbeddingLoss(), BITS),
        (randn(N, C), nn.CosineEmbeddingLoss(), (randn(N, C), BITS[:, 0])),
        (randn(N), nn.MarginRankingLoss(), (randn(N), BITS[:, 0])),
        (randn(N, C), F.cosine_embedding_loss, (randn(N, C), BITS[:, 0].long())),
    ],
    "0/1 flags into MultiLabelMarginLoss": [
        (randn(N, K), nn.MultiLabelMarginLoss(), BITS.long()),
    ],
    "(N, 1) against (N) in a regression": [
        (randn(N, 1), loss(), randn(N, grad=False))
        for loss in (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss)
    ]
    + [(randn(N, 1), nn.GaussianNLLLoss(), (randn(N, grad=False), torch.ones(N)))],
    "ReLU, sigmoid or tanh cannot reach the targets": [
        (randn(N, 1).relu(), MSE, randn(N, 1, grad=False)),
        (randn(N, 1).sigmoid(), nn.L1Loss(), 3 * randn(N, 1, grad=False)),
        (randn(N, 1).tanh().squeeze(1), nn.HuberLoss(), 10 * randn(N, grad=False)),
        (F.softplus(randn(N, 1)), nn.SmoothL1Loss(), randn(N, 1, grad=False)),
        (nn.Sequential(nn.Linear(6, 1), nn.ReLU()), MSE, randn(N, 1, grad=False), INPUTS),
        (nn.Sequential(nn.Linear(6, 1), nn.ReLU()), MSE, randn(N, 1, grad=False)),
    ],
    "softmax and a squared or absolute error on one-hot": [
        (randn(N, C).softmax(1), MSE, ONE_HOT),
        (randn(N, C).softmax(1).detach(), MSE, ONE_HOT),
        (FunctionalHead(), nn.L1Loss(), ONE_HOT, INPUTS),
    ],
    "exp, softplus, ReLU into PoissonNLLLoss(log_input)": [
        (randn(N).exp(), nn.PoissonNLLLoss(), torch.ones(N)),
        (F.softplus(randn(N)), nn.PoissonNLLLoss(), torch.ones(N)),
        (randn(N).relu(), F.poisson_nll_loss, torch.ones(N)),
    ],
    "exp or softplus of a positive rate or variance": [
        (F.softplus(randn(N)).exp(), nn.PoissonNLLLoss(log_input=False), torch.ones(N)),
        (randn(N), nn.GaussianNLLLoss(), (randn(N, grad=False), F.softplus(randn(N).exp()))),
    ],
    "negative prediction with log_input=False": [
        (randn(N), nn.PoissonNLLLoss(log_input=False), torch.ones(N))
    ],
    "negative counts": [(randn(N), nn.PoissonNLLLoss(), -torch.ones(N))],
    "negative variance": [
        (randn(N), nn.GaussianNLLLoss(), (randn(N, grad=False), randn(N))),
        (randn(N), F.gaussian_nll_loss, (randn(N, grad=False), -1.0)),
    ],
    "class index below 0 or not below C": [
        (randn(N, C), CE, LABELS + 3),
        (randn(N, C), CE, LABELS - 3),
        (randn(N, C).log_softmax(1), NLL, LABELS + C),
        (randn(N, C), nn.MultiMarginLoss(), LABELS + C),
        (randn(9, 2, C).log_softmax(-1), nn.CTCLoss(), (CTC_TARGETS + C, *CTC[1:])),
        (randn(N, C), CE, torch.full((N,), 255, dtype=torch.uint8)),
    ],
    "class indices of another dtype than int64": [
        (randn(N, C), CE, LABELS.float()),
        (randn(N, C), CE, LABELS.int()),
        (randn(N, C), CE, LABELS > 2),
        (randn(N, C).log_softmax(1), NLL, LABELS.float()),
        (randn(N, C), nn.MultiMarginLoss(), LABELS.int()),
    ],
    "integer one-hot targets with CrossEntropyLoss": [(randn(N, C), CE, ONE_HOT.long())],
    "(N, 1) targets with CrossEntropyLoss": [(randn(N, C), CE, LABELS[:, None])],
    "(N, L, C) logits with CrossEntropyLoss": [
        (randn(N, 7, C), CE, torch.zeros(N, 7).long()),
        (randn(2, 4, 6, C), CE, torch.zeros(2, 4, 6).long()),
    ],
    "the same where L equals C": [(randn(N, C, C), CE, torch.zeros(N, C).long())],
    "(N, 1) against (N) in BCELoss, BCEWithLogitsLoss": [
        (randn(N, 1), BCEL, BITS[:, 0]),
        (randn(N, 1).sigmoid(), BCE, BITS[:, 0]),
    ],
    "another floating dtype in BCELoss, HuberLoss": [
        (randn(N, K).sigmoid(), BCE, BITS.double()),
        (randn(N, K), nn.HuberLoss(), BITS.double()),
    ],
    "integer targets in BCELoss, BCEWithLogitsLoss": [
        (randn(N, K), BCEL, BITS.long()),
        (randn(N, K), BCEL, BITS.bool()),
        (randn(N, K).sigmoid(), BCE, BITS.long()),
    ],
    "targets below 0, far above 1 in binary cross entropy": [
        (randn(N, K), BCEL, 2 * BITS - 1),
        (randn(N, K), BCEL, 255 * BITS),
        (randn(N, K).sigmoid(), BCE, 1.2 * BITS),
    ],
    "integer predictions (argmax before the loss)": [
        (randn(N, C).argmax(1), MSE, LABELS.float()),
        (randn(N, C).argmax(1), MSE, LABELS),
        (randn(N, C) > 0, BCEL, ONE_HOT),
    ],
    "prediction and target swapped": [
        (LABELS, CE, randn(N, C)),
        (LABELS, NLL, randn(N, C).log_softmax(1)),
        (ONE_HOT, CE, randn(N, C)),
        (BITS, BCE, randn(N, K).sigmoid()),
        (BITS, BCEL, randn(N, K)),
        (ONE_HOT * 0.9 + 0.02, KL, randn(N, C).log_softmax(1)),
        (BITS.long(), BCE, randn(N, K).sigmoid().detach()),
    ],
    "every target equals ignore_index": [
        (randn(N, C), CE, torch.full((N,), -100)),
        (randn(N, C), nn.CrossEntropyLoss(ignore_index=0), torch.zeros(N).long()),
        (randn(N, C).log_softmax(1), functools.partial(F.nll_loss, ignore_index=2), LABELS * 0 + 2),
    ],
    "soft targets that do not sum to 1": [
        (randn(N, C), CE, ONE_HOT * 2),
        (randn(N, C), CE, ONE_HOT / 2),
        (randn(N, C), CE, randn(N, C, grad=False)),
    ],
    "a batch of nothing": [(randn(0, C), CE, LABELS[:0]), (randn(0, 2), MSE, torch.ones(0, 2))],
    "nan in prediction or target": [
        (randn(N, C) * float("nan"), CE, LABELS),
        (randn(N, C), MSE, ONE_HOT * float("nan")),
    ],
    "None, a number, a string in place of a tensor": [
        (randn(N, C), CE, ["cat", "dog"]),
        (randn(N, C), CE, [[0, 1], [2]]),
        (None, CE, LABELS),
        ("logits", CE, LABELS),
        (randn(N, C), MSE, 3.0),
    ],
    "a class or None in place of a loss": [
        (randn(N, C), nn.CrossEntropyLoss, LABELS),
        (randn(N, C), None, LABELS),
        (randn(N, C), "cross_entropy", LABELS),
    ],
    "sparse, meta, quantised, complex tensors": [
        (randn(N, C, grad=False).to_sparse(), MSE, ONE_HOT),
        (torch.empty(N, C, device="meta"), CE, LABELS),
        (torch.complex(randn(N, C), randn(N, C)), MSE, ONE_HOT),
    ],
    "the model fails on its inputs": [(nn.Linear(7, C), CE, LABELS, INPUTS)],
    "torch refuses the arguments or options of its loss": [
        (randn(N, C), nn.CrossEntropyLoss(weight=torch.ones(2)), LABELS),
        (randn(N, C), nn.GaussianNLLLoss(), randn(N, C, grad=False)),
    ],
    "raw outputs into a loss that wants probabilities": [
        (randn(N, K), soft_dice, BITS),
        (nn.Linear(6, K), soft_dice, BITS, INPUTS),
    ],
    "an activation before a loss that wants logits": [
        (randn(N, K).sigmoid(), lambda o, t: soft_dice(o.sigmoid(), t), BITS),
    ],
    "triplets, InfoNCE of embeddings of any length": [
        (randn(N, C), nn.TripletMarginLoss(), (randn(N, C), randn(N, C))),
        (randn(N, C), lambda a, b: F.cross_entropy(a @ b.T / 0.1, torch.arange(N)), randn(N, C)),
    ],
    "InfoNCE of cosines without a temperature": [
        (F.normalize(randn(N, C)) @ F.normalize(randn(N, C)).T, CE, torch.arange(N)),
        (
            randn(N, C),
            lambda a, b: F.cross_entropy(F.normalize(a) @ F.normalize(b).T, torch.arange(N)),
            randn(N, C),
        ),
    ],
    "a loss of the reader's own raises": [(randn(N, C), raising, LABELS)],
    "the loss is nan or inf": [(randn(N, C), nn.CrossEntropyLoss(torch.zeros(C)), LABELS)],
    "a weight of one number per class on another axis": [
        (randn(2, 4, 4, 4), nn.BCEWithLogitsLoss(pos_weight=torch.ones(4)), torch.ones(2, 4, 4, 4))
    ],
    "a rule fails on odd values": [
        (randn(9, 2, C).log_softmax(-1), nn.CTCLoss(), (CTC[0], ["a", "b"], (3, 3)))
    ],
}
SUSPICIONS_OF_OTHER_ROWS = {  # cases of an error's row whose evidence is one row only
    ("softmax before CrossEntropyLoss", 18),
}


def _table() -> dict[str, tuple[str, str]]:
    rows = {}
    for line in pairing.__doc__.splitlines():
        match = re.fullmatch(r"(.+?)\s+([a-z0-9-]+)\s+(rule|trace|values|hint)", line)
        if match:
            rows[match[1]] = (match[2], match[3])
    return rows


TABLE = _table()
EACH_CASE = [
    pytest.param(row, case, id=f"{row}-{i}")
    for row, cases in CASES.items()
    for i, case in enumerate(cases)
]


def test_every_row_of_the_table_has_a_case():
    assert set(TABLE) == set(CASES)


def test_every_finding_stands_in_the_table():
    assert {name for name, _ in TABLE.values()} == set(ENTRIES)


@pytest.mark.parametrize(("row", "case"), EACH_CASE)
def test_each_row_is_found(row, case):
    name, rule = TABLE[row]
    found = {finding.name: finding for finding in pairing.check(*case)}
    assert name in found, f"found {list(found)}"
    assert found[name].severity == ("suspicion" if rule == "hint" else "error")
    assert found[name].what
    assert found[name].why
    assert found[name].remedy


class Bounded(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 1)

    def forward(self, x):
        return 10 * torch.sigmoid(self.fc(x)) - 5


class OwnCrossEntropy(nn.CrossEntropyLoss):
    """Takes probabilities, and says so by overriding forward."""

    def forward(self, probabilities, labels):
        return F.nll_loss(torch.log(probabilities + 1e-9), labels)


class Attention(nn.Module):
    """A softmax in the middle is nobody's business."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, C)

    def forward(self, x):
        return self.fc(x * F.softmax(x, dim=1))


MIXED = 0.3 * ONE_HOT + 0.7 * ONE_HOT.flip(0)
LEGITIMATE = {
    "logits, CE": (randn(N, C), CE, LABELS),
    "logits, CE, uint8": (randn(N, C), CE, LABELS.byte()),
    "logits, CE, label smoothing": (randn(N, C), nn.CrossEntropyLoss(label_smoothing=0.1), LABELS),
    "logits, CE, ignore_index": (
        randn(N, C),
        nn.CrossEntropyLoss(ignore_index=255),
        LABELS.masked_fill(LABELS == 1, 255),
    ),
    "logits, CE, -100": (randn(N, C), CE, LABELS.masked_fill(LABELS == 1, -100)),
    "segmentation": (randn(2, C, 4, 6), CE, torch.zeros(2, 4, 6).long()),
    "sequence": (randn(2, 7, C).transpose(1, 2), CE, torch.zeros(2, 7).long()),
    "soft targets": (randn(N, C), CE, MIXED),
    "soft targets, bf16": (randn(N, C).bfloat16(), CE, MIXED.bfloat16()),
    "soft targets, dense": (randn(2, C, 4), CE, randn(2, C, 4, grad=False).softmax(1)),
    "unbatched": (randn(N, C)[0], CE, LABELS[0]),
    "bf16 logits": (randn(N, C).bfloat16(), CE, LABELS),
    "fp16 logits": (randn(N, C).half(), CE, LABELS),
    "no graph": (randn(N, C, grad=False), CE, LABELS),
    "logits that lie in [0, 1], linear": (randn(N, C) * 0.01 + 0.5, CE, LABELS),
    "logits below 0": (-first(randn(N, C)), CE, LABELS),
    "zero logits": (torch.zeros(N, C), CE, LABELS),
    "masked logits": (randn(N, C).masked_fill(ONE_HOT.roll(1, 1) > 0, -torch.inf), CE, LABELS),
    "log_softmax, NLL": (randn(N, C).log_softmax(1), NLL, LABELS),
    "log_softmax, NLL, no graph": (randn(N, C, grad=False).log_softmax(1), NLL, LABELS),
    "log_softmax, NLL, bf16": (randn(N, C).bfloat16().log_softmax(1), NLL, LABELS),
    "log_softmax, NLL, bf16 no graph": (
        randn(N, 50).bfloat16().log_softmax(1).detach(),
        NLL,
        LABELS,
    ),
    "log_softmax over (N, L, C), NLL": (
        randn(2, 7, C).log_softmax(-1).transpose(1, 2),
        NLL,
        torch.zeros(2, 7).long(),
    ),
    "log_softmax, view, NLL": (randn(2, 4, C).log_softmax(-1).view(-1, C), NLL, LABELS),
    "log_softmax over axis 0 that becomes 1": (randn(C, N).log_softmax(0).t(), NLL, LABELS),
    "LogSoftmax model": (
        nn.Sequential(nn.Linear(6, C), nn.LogSoftmax(dim=-1)),
        NLL,
        LABELS,
        INPUTS,
    ),
    "LogSoftmax model, static": (
        nn.Sequential(nn.Linear(6, C), nn.LogSoftmax(dim=-1)),
        NLL,
        LABELS,
    ),
    "square batch": (randn(C, C).log_softmax(1), NLL, torch.arange(C)),
    "attention inside": (Attention(), CE, LABELS, INPUTS),
    "squeezenet's ReLU, then a mean": (
        nn.Sequential(nn.Conv1d(6, C, 1), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten()),
        CE,
        LABELS,
        INPUTS[:, :, None].repeat(1, 1, 4),
    ),
    "logit, BCEWithLogits": (randn(N), BCEL, BITS[:, 0]),
    "multi-label, BCEWithLogits": (randn(N, K), BCEL, BITS),
    "pos_weight": (randn(N, K), nn.BCEWithLogitsLoss(pos_weight=torch.ones(K)), BITS),
    "noisy labels": (randn(N, K), BCEL, BITS * 1.1),
    "sigmoid, BCE": (randn(N, K).sigmoid(), BCE, BITS),
    "sigmoid, BCE, grey values": (randn(N, K).sigmoid(), nn.BCELoss(reduction="sum"), BITS * 0.3),
    "saturated sigmoid, BCE": (
        100 * torch.sign(randn(N, K)).add(0).mul(5).sigmoid() / 100,
        BCE,
        BITS,
    ),
    "one softmax output, BCE": (randn(N, 2).softmax(1)[:, 1], BCE, BITS[:, 0]),
    "softmax, BCE, two classes": (randn(N, 2).softmax(1), BCE, F.one_hot(LABELS % 2, 2).float()),
    "MultiLabelSoftMargin": (randn(N, K), nn.MultiLabelSoftMarginLoss(), BITS),
    "regression": (randn(N, 1), MSE, randn(N, 1, grad=False)),
    "regression, double targets": (randn(N, 1), MSE, randn(N, 1, grad=False).double()),
    "bounded regression": (Bounded(), MSE, 4 * torch.rand(N, 1) - 2, INPUTS),
    "bounded regression, static": (Bounded(), MSE, 4 * torch.rand(N, 1) - 2),
    "ReLU, targets above 0": (randn(N, 1).relu(), MSE, first(randn(N, 1, grad=False))),
    "sigmoid, grey values": (randn(N, 64).sigmoid(), MSE, torch.rand(N, 64)),
    "tanh, [-1, 1]": (randn(N, 64).tanh(), nn.L1Loss(), 2 * torch.rand(N, 64) - 1),
    "consistency of two softmaxes": (randn(N, C).softmax(1), MSE, randn(N, C).softmax(1).detach()),
    "least squares GAN": (randn(N, 1), MSE, torch.ones(N, 1)),
    "scalar target": (randn(N, 1), MSE, torch.tensor(0.0)),
    "distillation": (F.log_softmax(randn(N, C) / 4, 1), KL, F.softmax(randn(N, C) / 4, 1).detach()),
    "distillation, log_target": (
        randn(N, C).log_softmax(1),
        nn.KLDivLoss(reduction="batchmean", log_target=True),
        randn(N, C).log_softmax(1).detach(),
    ),
    "KL over (N, L, C)": (randn(2, 7, C).log_softmax(-1), KL, randn(2, 7, C).softmax(-1).detach()),
    "CTC": (randn(9, 2, C).log_softmax(2), nn.CTCLoss(), CTC),
    "CTC, one sample": (
        randn(9, C).log_softmax(1),
        nn.CTCLoss(),
        (CTC_TARGETS[0], torch.tensor(9), torch.tensor(3)),
    ),
    "CTC, padded with the blank": (
        randn(9, 2, C).log_softmax(2),
        nn.CTCLoss(),
        (F.pad(CTC_TARGETS, (0, 2)), *CTC[1:]),
    ),
    "CTC, concatenated": (
        randn(9, 2, C).log_softmax(2),
        F.ctc_loss,
        (CTC_TARGETS.flatten(), (9, 9), (3, 3)),
    ),
    "Poisson": (randn(N), nn.PoissonNLLLoss(), torch.ones(N)),
    "Poisson, rate": (randn(N).exp(), nn.PoissonNLLLoss(log_input=False), torch.ones(N)),
    "Gaussian": (randn(N), nn.GaussianNLLLoss(), (randn(N, grad=False), F.softplus(randn(N)))),
    "multi margin": (randn(N, C), nn.MultiMarginLoss(), LABELS),
    "soft margin": (randn(N, K), nn.SoftMarginLoss(), 2 * BITS - 1),
    "hinge": (first(randn(N)), nn.HingeEmbeddingLoss(), 2 * BITS[:, 0] - 1),
    "cosine": (randn(N, C), nn.CosineEmbeddingLoss(), (randn(N, C), 2 * BITS[:, 0] - 1)),
    "ranking": (randn(N), nn.MarginRankingLoss(), (randn(N), torch.ones(N))),
    "multi-label margin": (
        randn(N, K),
        nn.MultiLabelMarginLoss(),
        torch.tensor([[1, 3, -1, 0]] * N),
    ),
    "triplet": (randn(N, C), nn.TripletMarginLoss(), (randn(N, C), randn(N, C))),
    "own loss": (randn(N, C).softmax(1), lambda p, t: (p - t).abs().mean(), ONE_HOT),
    "own loss with CE inside": (randn(N, C), lambda p, t: 2 * F.cross_entropy(p, t), LABELS),
    "own subclass": (randn(N, C).softmax(1), OwnCrossEntropy(), LABELS),
    "function, ignored labels": (
        randn(N, C),
        F.cross_entropy,
        LABELS.masked_fill(LABELS < 2, -100),
    ),
    "rows that sum to 1 and go below 0": (
        (x := randn(N, C, grad=False)) - x.mean(1, keepdim=True) + 1 / C,
        CE,
        LABELS,
    ),
    "rows that almost sum to 1": (1.001 * randn(N, C, grad=False).softmax(1), CE, LABELS),
    "two different parts": (torch.cat([randn(4, C).sigmoid(), randn(4, C)]), CE, LABELS),
    "gathered decoder outputs": (
        torch.stack([randn(N, C) for _ in range(3)], 2),
        CE,
        LABELS[:, None].expand(N, 3),
    ),
}


@pytest.mark.parametrize("case", LEGITIMATE.values(), ids=LEGITIMATE)
def test_legitimate_pairs_give_no_error(case):
    assert not pairing.check(*case).errors


def test_the_usual_pairs_give_no_suspicion_either():
    for name in (
        "logits, CE",
        "log_softmax, NLL",
        "sigmoid, BCE",
        "logit, BCEWithLogits",
        "regression",
        "distillation",
        "CTC",
        "Poisson",
        "soft targets",
    ):
        assert not pairing.check(*LEGITIMATE[name]), name


# What the findings say is what torch does.


def test_softmax_before_cross_entropy_has_the_floor_that_is_named():
    for classes, floor in [(2, 0.313), (10, 1.461), (100, 3.622), (1000, 5.909)]:
        perfect = torch.eye(classes, dtype=torch.float64)
        loss = F.cross_entropy(perfect, torch.arange(classes)).item()
        assert loss == pytest.approx(np.log(1 + (classes - 1) / np.e))
        assert loss == pytest.approx(floor, abs=1e-3)


def test_sigmoid_before_bce_with_logits_has_the_floors_that_are_named():
    one, zero = torch.ones(1), torch.zeros(1)
    assert F.binary_cross_entropy_with_logits(one, one).item() == pytest.approx(0.3133, abs=1e-4)
    assert F.binary_cross_entropy_with_logits(zero, zero).item() == pytest.approx(np.log(2))


def test_log_softmax_before_cross_entropy_is_idempotent():
    x = randn(N, C, grad=False).double()
    torch.testing.assert_close(
        F.cross_entropy(x.log_softmax(1), LABELS), F.cross_entropy(x, LABELS)
    )


def test_the_wrong_pairs_are_wrong_in_the_way_that_is_said():
    x = randn(N, C, grad=False).double()
    p = x.softmax(1)
    assert -1 <= F.nll_loss(p, LABELS).item() <= 0
    assert F.nll_loss(100 * x.abs(), LABELS).item() < -10
    assert F.kl_div(p, p, reduction="batchmean").item() < 0
    assert F.kl_div(p.log(), p.log(), reduction="batchmean").isnan()
    assert F.kl_div(p.log(), p, reduction="batchmean").item() == pytest.approx(0, abs=1e-12)
    assert F.cross_entropy(randn(N, 1), torch.zeros(N).long()).item() == 0
    assert F.cross_entropy(randn(N, C), torch.full((N,), -100)).isnan()
    assert F.ctc_loss(torch.rand(9, 2, C).softmax(2), *CTC).item() < 0
    assert F.ctc_loss(randn(2, 2, C).log_softmax(2), CTC_TARGETS, (2, 2), (3, 3)).isinf()
    assert torch.log(F.softmax(torch.tensor([0.0, 200.0]), 0))[0] == -torch.inf
    assert (
        F.binary_cross_entropy(torch.sigmoid(torch.tensor([200.0])), torch.zeros(1)).item() == 100
    )


@pytest.mark.filterwarnings("ignore:Using a target size")
def test_broadcasting_compares_every_prediction_with_every_target():
    target = torch.arange(float(N))
    assert F.mse_loss(target[:, None], target) > 1
    assert F.mse_loss(target[:, None], target[:, None]) == 0


LOUD = (
    "values outside [0, 1] into BCELoss",
    "negative variance",
    "class index below 0 or not below C",
    "class indices of another dtype than int64",
    "integer one-hot targets with CrossEntropyLoss",
    "(N, 1) targets with CrossEntropyLoss",
    "(N, L, C) logits with CrossEntropyLoss",
    "(N, 1) against (N) in BCELoss, BCEWithLogitsLoss",
    "another floating dtype in BCELoss, HuberLoss",
    "integer targets in BCELoss, BCEWithLogitsLoss",
)
UNCHECKED = (nn.CTCLoss, nn.MSELoss)  # reads past its classes; takes integers without a gradient


@pytest.mark.parametrize(
    "case",
    [case for row in LOUD for case in CASES[row] if not isinstance(case[1], UNCHECKED)],
)
def test_what_is_said_to_raise_raises(case):
    outputs, loss, targets = case
    rest = targets if isinstance(targets, tuple) else (targets,)
    with pytest.raises((RuntimeError, ValueError, IndexError, NotImplementedError)):
        loss(outputs, *rest).sum().backward()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", LEGITIMATE.values(), ids=LEGITIMATE)
def test_legitimate_pairs_run(case):
    outputs, loss, targets, *inputs = case
    if isinstance(outputs, nn.Module):
        outputs = outputs(inputs[0] if inputs else INPUTS)
    value = loss(outputs, *(targets if isinstance(targets, tuple) else (targets,)))
    assert not value.isnan().any()


# It leaves everything as it was.


class Restless(nn.Module):
    """Changes everything that a forward pass can change."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, C)
        self.norm = nn.BatchNorm1d(C)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        random.random(), np.random.rand()
        self.fc.weight.data.mul_(1.5)
        self.count = self.count + 1
        self.norm.eval()
        x += 1
        return self.drop(self.norm.train()(self.fc(x))).softmax(1)


def _bits(model: nn.Module) -> list:
    tensors = [*model.state_dict().values(), *(p.grad for p in model.parameters())]
    return [None if t is None else t.detach().numpy().tobytes() for t in tensors]


@pytest.mark.parametrize("training", [True, False])
def test_check_leaves_no_trace(training):
    model = Restless().train(training)
    model.norm.eval()
    model(INPUTS.clone()).sum().backward()
    model.norm.eval()
    parameters, buffers = list(model.parameters()), list(model.buffers())
    before = (
        _bits(model),
        [m.training for m in model.modules()],
        torch.get_rng_state().numpy().tobytes(),
        random.getstate(),
        np.random.get_state()[1].tobytes(),
        INPUTS.numpy().tobytes(),
        torch.is_grad_enabled(),
    )
    found = pairing.check(model, CE, LABELS, INPUTS)
    assert [f.name for f in found.errors] == ["softmax-into-cross-entropy"]
    after = (
        _bits(model),
        [m.training for m in model.modules()],
        torch.get_rng_state().numpy().tobytes(),
        random.getstate(),
        np.random.get_state()[1].tobytes(),
        INPUTS.numpy().tobytes(),
        torch.is_grad_enabled(),
    )
    assert before == after
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert all(a is b for a, b in zip(buffers, model.buffers(), strict=True))


def test_check_leaves_no_trace_where_the_model_raises():
    class Late(Restless):
        def forward(self, x):
            super().forward(x)
            raise KeyError("late")

    model = Late()
    before, modes = _bits(model), [m.training for m in model.modules()]
    assert pairing.check(model, CE, LABELS, INPUTS)[0].name == "model-raised"
    assert before == _bits(model)
    assert modes == [m.training for m in model.modules()]


def test_check_never_runs_backward():
    x = torch.randn(N, C, requires_grad=True)
    calls = []
    out = x * 1
    out.register_hook(calls.append)
    pairing.check(out.softmax(1), lambda p, t: F.cross_entropy(p, t), LABELS)
    assert not calls
    assert x.grad is None


def test_check_works_under_no_grad_and_inference_mode():
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert pairing.check(FunctionalHead(), CE, LABELS, INPUTS).errors


def test_lazy_modules_stay_lazy():
    model = nn.Sequential(nn.LazyLinear(C), nn.Softmax(1))
    assert pairing.check(model, CE, LABELS, INPUTS).errors
    assert isinstance(model[0].weight, nn.UninitializedParameter)


def test_the_graph_is_not_unpacked():
    def refuse(*_):
        raise AssertionError("a saved tensor was unpacked")

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, refuse):
        x = torch.randn(N, C, requires_grad=True)
        probabilities = torch.exp(F.relu(x).log_softmax(1)).clamp(0.0, 1.0).view(N, C)
    assert [f.name for f in pairing.check(probabilities, CE, LABELS)] == [
        "softmax-into-cross-entropy"
    ]


def test_a_module_is_named_by_its_path():
    model = nn.Sequential(nn.Linear(6, C), nn.Sequential(nn.Dropout(0), nn.Softmax(dim=1)))
    assert pairing.check(model, CE, LABELS, INPUTS)[0].where == "1.1"
    assert pairing.check(model, CE, LABELS)[0].where == "1.1"


def test_errors_come_first_and_names_once():
    found = pairing.check(UNNAMED, CE, LABELS, INPUTS)
    assert [f.severity for f in found] == ["error", "suspicion"]
    assert len({f.name for f in found}) == len(found)


def test_one_row_that_sums_to_one_is_a_suspicion():
    found = pairing.check(torch.tensor([[0.25, 0.75]]), CE, LABELS[:1] % 2)
    assert [(f.name, f.severity) for f in found] == [("softmax-into-cross-entropy", "suspicion")]


def test_zero_infinity_makes_short_inputs_a_suspicion():
    case = (
        randn(2, 2, C).log_softmax(-1),
        nn.CTCLoss(zero_infinity=True),
        (CTC_TARGETS, (2, 2), (3, 3)),
    )
    assert [(f.name, f.severity) for f in pairing.check(*case)] == [
        ("ctc-input-too-short", "suspicion")
    ]


LOSS_OBJECTS = [
    CE,
    NLL,
    BCE,
    BCEL,
    MSE,
    KL,
    nn.CTCLoss(),
    nn.PoissonNLLLoss(),
    nn.GaussianNLLLoss(),
    nn.MultiMarginLoss(),
    nn.MultiLabelMarginLoss(),
    nn.SoftMarginLoss(),
    nn.HuberLoss(),
    nn.HingeEmbeddingLoss(),
    nn.CosineEmbeddingLoss(),
    nn.MarginRankingLoss(),
    nn.MultiLabelSoftMarginLoss(),
    nn.TripletMarginLoss(),
    F.l1_loss,
    F.kl_div,
]
DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
    torch.complex64,
]


@st.composite
def odd_tensors(draw):
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    dtype = draw(st.sampled_from(DTYPES))
    x = (torch.randn(shape) * draw(st.sampled_from([0.1, 1, 100]))).to(dtype)
    kind = draw(
        st.sampled_from(["plain", "plain", "grad", "nan", "softmax", "sparse", "meta", "view"])
    )
    if kind == "nan" and x.numel() and x.is_floating_point():
        x.view(-1)[0] = float("nan")
    if kind == "softmax" and x.is_floating_point() and x.ndim:
        return x.softmax(-1)
    if kind == "grad" and x.is_floating_point():
        return x.requires_grad_().sigmoid()
    if kind == "sparse" and x.dtype != torch.bool and x.ndim:
        return x.to_sparse()
    if kind == "view" and x.ndim > 1:
        return x.transpose(0, -1)
    return torch.empty(shape, dtype=dtype, device="meta") if kind == "meta" else x


odd_things = st.one_of(
    odd_tensors(),
    st.none(),
    st.text(max_size=3),
    st.integers(),
    st.lists(st.integers(), max_size=2),
    st.tuples(odd_tensors(), odd_tensors()),
    st.tuples(odd_tensors(), odd_tensors(), odd_tensors()),
    st.just(nn.Linear(3, 2)),
    st.dictionaries(st.text(max_size=2), odd_tensors(), max_size=2),
)


@settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
@given(odd_things, st.sampled_from(LOSS_OBJECTS), odd_things, st.one_of(st.none(), odd_tensors()))
def test_nothing_makes_it_raise(outputs, loss, targets, inputs):
    for finding in pairing.check(outputs, loss, targets, inputs):
        assert finding.name in ENTRIES
        assert finding.name != "check-failed", finding.what


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.integers(2, 12),
    st.integers(2, 12),
    st.sampled_from([0.01, 1.0, 30.0]),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    st.sampled_from(["normal", "uniform", "negative", "zero", "integer"]),
    st.integers(0, 2**31),
)
def test_legitimate_logits_are_never_an_error(batch, classes, scale, dtype, kind, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, classes, generator=generator)
    x = {
        "normal": x,
        "uniform": torch.rand(batch, classes, generator=generator),
        "negative": -x.abs(),
        "zero": x * 0,
        "integer": x.round(),
    }[kind]
    x = (x * scale).to(dtype)
    labels = torch.randint(0, classes, (batch,), generator=generator)
    assert not pairing.check(x, CE, labels).errors
    assert not pairing.check(x, BCEL, F.one_hot(labels, classes).to(dtype)).errors
    assert not pairing.check(x.log_softmax(1), NLL, labels).errors


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.integers(2, 9),
    st.integers(2, 300),
    st.sampled_from([0.01, 1.0, 30.0]),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    st.integers(0, 2**31),
)
def test_a_softmax_without_a_graph_is_always_found(batch, classes, scale, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(batch, classes, generator=generator) * scale).to(dtype)
    labels = torch.randint(0, classes, (batch,), generator=generator)
    for cast in (dtype, torch.float32):
        p = x.softmax(1).to(cast)
        found = pairing.check(p, CE, labels)
        assert [f.name for f in found] == ["softmax-into-cross-entropy"]
        telling = int((p.count_nonzero(1) > 1).sum())
        assert found[0].severity == ("error" if telling > 1 else "suspicion")
        assert not pairing.check(x.log_softmax(1).to(cast), NLL, labels)


def test_coarse_rounding_of_a_square_batch_is_no_wrong_axis():
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(8, 8, generator=generator) * 0.01).bfloat16().log_softmax(1)
    assert not pairing.check(x, NLL, torch.arange(8)).errors


def test_a_linear_layer_is_believed():
    inside = 0.5 + 0.01 * randn(N, C)
    linear = inside.detach() @ torch.eye(C, requires_grad=True)
    assert not pairing.check(linear, CE, LABELS)
    assert pairing.check(linear.detach(), CE, LABELS)


def test_rows_with_all_their_mass_in_one_place_tell_nothing():
    hard = torch.tensor([[0.0, -30.0], [0.0, -30.0], [-30.0, 0.0]])
    labels = torch.tensor([0, 0, 1])
    for outputs, targets, loss in (
        (hard, labels, CE),
        (hard.T.contiguous(), labels[:2], CE),
        (hard, F.one_hot(labels).float(), BCEL),
        (torch.eye(3), torch.arange(3), CE),
        (torch.eye(3), torch.eye(3), MSE),
    ):
        assert not pairing.check(outputs, loss, targets).errors


def test_weights_in_read_only_memory_are_not_written_to(tmp_path):
    np.save(tmp_path / "weights.npy", np.random.default_rng(0).normal(size=(9, 4)).astype("f4"))
    mapped = np.load(tmp_path / "weights.npy", mmap_mode="r")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that the array is not writable
        weights = torch.from_numpy(mapped)
    embedding = nn.Embedding.from_pretrained(weights)
    net = nn.Sequential(embedding, nn.Flatten(), nn.Linear(8, C), nn.Softmax(1))
    for inputs in (torch.zeros(N, 2).long(), None):
        found = pairing.check(net, CE, LABELS, inputs)
        assert [f.name for f in found] == ["softmax-into-cross-entropy"]
    assert embedding.weight.data_ptr() == weights.data_ptr()


def _named(*case) -> list[tuple[str, str]]:
    return [(f.name, f.severity) for f in pairing.check(*case)]


@pytest.mark.parametrize(
    ("out", "loss"),
    [
        ((randn(N, C), randn(N, 3)), lambda out, t: F.cross_entropy(out[0], t)),
        (
            {"out": randn(N, C), "aux": randn(N, C)},
            lambda out, t: sum(CE(o, t) for o in out.values()),
        ),
        ((randn(N, 3), randn(N, C)), lambda out, t: F.cross_entropy(out[1], t)),
        ({"logits": randn(N, C)}, lambda logits, t: F.cross_entropy(logits, t)),
    ],
)
def test_a_loss_of_ones_own_gets_what_the_model_returns(out, loss):
    assert _named(out, loss, LABELS) == []
    assert _named(lambda x: out, loss, LABELS, INPUTS) == []


def test_similarities_and_mixtures_are_probabilities():
    distance = randn(N, K).square()
    assert _named(torch.exp(-distance), BCE, BITS) == []
    assert ("logits-into-bce", "error") in _named(torch.exp(distance), BCE, BITS)
    gates, experts = randn(N, 1, 3).softmax(-1), randn(N, 3, K).sigmoid()
    assert _named(torch.bmm(gates, experts)[:, 0], BCE, BITS) == []
    assert _named((randn(N, 3).softmax(1) @ randn(3, K).sigmoid()), BCE, BITS) == []
    order = torch.eye(N)[torch.randperm(N, generator=SEED)]
    assert _named(order @ randn(N, C).log_softmax(1), NLL, LABELS) == []
    assert ("logits-into-bce", "error") in _named(0.001 * randn(N, K), BCE, BITS)
    net = nn.utils.parametrizations.weight_norm(nn.Linear(6, K))
    assert ("logits-into-bce", "error") in _named(net(INPUTS), BCE, BITS)
    frozen = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, K).requires_grad_(False))
    nn.init.constant_(frozen[2].weight, 0.01)
    nn.init.constant_(frozen[2].bias, 0.1)
    assert _named(frozen, BCE, BITS, INPUTS) == [("logits-into-bce", "error")]


def test_what_a_regression_may_mean_is_a_suspicion():
    q, t = randn(N, 7), randn(N, 7, grad=False)
    for loss in (F.huber_loss, F.mse_loss):
        assert _named(q[:, :, None], loss, t[:, None, :]) == [("broadcast-target", "suspicion")]
    few = torch.rand(100, 1, generator=SEED)
    few[:3] = -1
    relu = randn(100, 1).relu()
    assert _named(relu, MSE, few) == [("head-cannot-reach-targets", "suspicion")]
    few[:20] = -1
    assert _named(relu, MSE, few) == [("head-cannot-reach-targets", "error")]
    assert _named(randn(100, 1).sigmoid(), MSE, few.clamp(0, 1) * 1.005) == []
