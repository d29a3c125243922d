"""What torch refuses, and what is nan, is found by pairing before the training starts."""

import functools
import random
import threading
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dlhelpers import pairing
from dlhelpers.pairing import causes
from dlhelpers.pairing.calls import bind, describe_call

SEED = torch.Generator().manual_seed(0)
N, C, T, S = 8, 3, 12, 5


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=SEED)


Z = (2 * randn(N, C)).requires_grad_()
Y = torch.randint(0, C, (N,), generator=SEED)
BITS = torch.randint(0, 2, (N, C), generator=SEED).float()
SIGNS = 2 * BITS - 1
SOFT = randn(N, C).softmax(1)
OTHER = randn(N, C)
IMAGE = (2 * randn(2, C, 6, 5)).requires_grad_()
MASK = torch.randint(0, 2, (2, C, 6, 5), generator=SEED).float()
REGIONS = torch.randint(0, C, (2, 6, 5), generator=SEED)
FRAMES = randn(T, 4, 7).requires_grad_().log_softmax(2)
SYMBOLS = torch.tensor([[1, 2, 3, 4, 5]] * 4)
INS, OUTS = torch.full((4,), T), torch.full((4,), S)
ONES = torch.ones


class Focal(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.ce = nn.CrossEntropyLoss(weight=weight, reduction="none")

    def forward(self, outputs, targets):
        each = self.ce(outputs, targets)
        return ((1 - (-each).exp()) ** 2 * each).mean()


def ce(**options):
    return functools.partial(F.cross_entropy, **options)


def bcel(**options):
    return nn.BCEWithLogitsLoss(**options)


# name -> (outputs, loss, targets, code that the remedy holds)
REFUSED = {
    "class weights of another length": (Z, nn.CrossEntropyLoss(weight=ONES(2)), Y, "minlength=3"),
    "class weights (1, C)": (Z, nn.CrossEntropyLoss(weight=ONES(1, C)), Y, "flatten"),
    "class weights (C, 1)": (Z.log_softmax(1), nn.NLLLoss(weight=ONES(C, 1)), Y, "flatten"),
    "float64 weights": (Z, nn.CrossEntropyLoss(weight=ONES(C).double()), Y, "weight.float()"),
    "integer weights": (Z, nn.CrossEntropyLoss(weight=ONES(C).long()), Y, "weight.float()"),
    "float32 weights, float64": (Z.double(), ce(weight=ONES(C)), Y, "prediction.dtype"),
    "a list of weights": (Z, ce(weight=[1.0, 2.0, 3.0]), Y, "torch.tensor"),
    "one weight per sample": (Z, ce(weight=ONES(N)), Y, 'reduction="none"'),
    "weights, images": (IMAGE, nn.CrossEntropyLoss(weight=ONES(4)), REGIONS, "minlength=3"),
    "NLL weights": (Z.log_softmax(1), nn.NLLLoss(weight=ONES(2)), Y, "minlength=3"),
    "MultiMargin weights": (Z, nn.MultiMarginLoss(weight=ONES(2)), Y, "minlength=3"),
    "MultiLabelSoftMargin weights": (
        Z,
        nn.MultiLabelSoftMarginLoss(weight=ONES(2)),
        BITS,
        "weight =",
    ),
    "a focal loss's weights": (Z, Focal(ONES(2)), Y, "minlength=3"),
    "pos_weight of another length": (Z, bcel(pos_weight=ONES(2)), BITS, "shape (3,)"),
    "two for one logit": (Z[:, :1], bcel(pos_weight=ONES(2)), BITS[:, :1], "(target == 0).sum()"),
    "pos_weight of images": (IMAGE, bcel(pos_weight=ONES(C)), MASK, "[:, None, None]"),
    "pos_weight of sequences": (IMAGE[..., 0], bcel(pos_weight=ONES(C)), MASK[..., 0], "[:, None]"),
    "pos_weight (C, 1)": (Z, bcel(pos_weight=ONES(C, 1)), BITS, "pos_weight.flatten()"),
    "pos_weight, a number": (
        Z,
        functools.partial(F.binary_cross_entropy_with_logits, pos_weight=3.0),
        BITS,
        "torch.tensor(3.0)",
    ),
    "a weight per sample": (Z, bcel(weight=ONES(N)), BITS, "[:, None]"),
    "the same, BCELoss": (Z.sigmoid(), nn.BCELoss(weight=ONES(N)), BITS, "[:, None]"),
    "the same, (N, 1)": (Z[:, :1], bcel(weight=ONES(N)), BITS[:, :1], "[:, None]"),
    "the same, images": (IMAGE, bcel(weight=ONES(2)), MASK, "[:, None, None, None]"),
    "a weight in MSE": (Z, functools.partial(F.mse_loss, weight=ONES(C)), BITS, "expand_as"),
    "ignore_index, soft targets": (Z, nn.CrossEntropyLoss(ignore_index=0), SOFT, "[keep]"),
    "label_smoothing": (Z, nn.CrossEntropyLoss(label_smoothing=1.5), Y, "label_smoothing=0.1"),
    "reduction='avg'": (Z, ce(reduction="avg"), Y, 'reduction="mean"'),
    "reduction=None": (Z, ce(reduction=None), Y, 'reduction="mean"'),
    "reduction of KL in MSE": (Z, nn.MSELoss(reduction="batchmean"), BITS, 'reduction="mean"'),
    "no such reduction of CTC": (
        FRAMES,
        nn.CTCLoss(reduction="batchmean"),
        (SYMBOLS, INS, OUTS),
        'reduction="mean"',
    ),
    "no variance": (Z, nn.GaussianNLLLoss(), OTHER, "(target, var)"),
    "no variance, in a tuple": (Z, F.gaussian_nll_loss, (OTHER,), "(target, var)"),
    "a variance per column": (Z, nn.GaussianNLLLoss(), (OTHER, ONES(C)), "expand_as"),
    "no lengths": (FRAMES, nn.CTCLoss(), SYMBOLS, "input_lengths"),
    "one length": (FRAMES, nn.CTCLoss(), (SYMBOLS, INS), "target_lengths"),
    "no target of pairs": (Z, nn.CosineEmbeddingLoss(), OTHER, "(input2, target)"),
    "no target of scores": (Z[:, 0], nn.MarginRankingLoss(), OTHER[:, 0], "(input2, target)"),
    "cosine target (N, 1)": (Z, nn.CosineEmbeddingLoss(), (OTHER, ONES(N, 1)), "squeeze"),
    "cosine of two widths": (Z, nn.CosineEmbeddingLoss(), (randn(N, 4), ONES(N)), "Linear(4, 3)"),
    "ranking (N, 1), (N)": (Z[:, :1], nn.MarginRankingLoss(), (OTHER[:, 0], ONES(N)), "first ="),
    "ranking target (N, 1)": (
        Z[:, 0],
        nn.MarginRankingLoss(),
        (OTHER[:, 0], ONES(N, 1)),
        "target = target.squeeze",
    ),
    "no negatives": (Z, nn.TripletMarginLoss(), OTHER, "(positive, negative)"),
    "a target length past the padding": (
        FRAMES,
        nn.CTCLoss(),
        (SYMBOLS, INS, OUTS + 3),
        "pad_sequence",
    ),
    "concatenated targets": (FRAMES, nn.CTCLoss(), (SYMBOLS.flatten()[:17], INS, OUTS), "cat("),
    "float lengths": (FRAMES, nn.CTCLoss(), (SYMBOLS, INS.float(), OUTS.float()), ".long()"),
    "targets of another batch": (FRAMES, nn.CTCLoss(), (SYMBOLS[:3], INS, OUTS), "transpose"),
    "blank=-1": (FRAMES, nn.CTCLoss(blank=-1), (SYMBOLS, INS, OUTS), "blank=0"),
    "blank=C": (FRAMES, nn.CTCLoss(blank=7), (SYMBOLS, INS, OUTS), "blank=6"),
    "targets of three axes": (FRAMES, nn.CTCLoss(), (SYMBOLS[None], INS, OUTS), "reshape"),
    "Huber's delta": (Z, nn.HuberLoss(delta=0.0), BITS, "delta=1.0"),
    "more arguments than it takes": (Z, nn.CrossEntropyLoss(), (Y, ONES(N)), "targets)"),
    "a margin's power": (Z, functools.partial(F.multi_margin_loss, p=3), Y, "fix the arguments"),
}
UNDERFLOWED = torch.tensor([[0.0, -200.0], [-200.0, 0.0]]).softmax(1).log()
NOT_FINITE = {
    "all classes weigh nothing": (Z, nn.CrossEntropyLoss(weight=torch.zeros(C)), Y, "sum of the"),
    "those present do": (Z, ce(weight=torch.tensor([0.0, 1, 1])), 0 * Y, "sum of the weights"),
    "those that are not ignored": (
        Z.log_softmax(1),
        nn.NLLLoss(weight=torch.tensor([0.0, 1, 1]), ignore_index=1),
        Y.clamp(max=1),
        "sum of the weights",
    ),
    "log(0)": (UNDERFLOWED, nn.NLLLoss(), torch.tensor([1, 0]), "log(0)"),
    "the target is masked out": (
        Z.masked_fill(F.one_hot(Y, C) > 0, -torch.inf),
        nn.CrossEntropyLoss(),
        Y,
        "masked out",
    ),
    "an infinite target": (Z, nn.MSELoss(), BITS + torch.inf, "target holds inf"),
    "pos_weight of a class never seen": (
        Z,
        bcel(pos_weight=torch.tensor([1.0, torch.inf, 1.0])),
        BITS,
        "pos_weight holds inf",
    ),
    "no path": (
        FRAMES.masked_fill(torch.arange(7) == 3, -torch.inf),
        nn.CTCLoss(),
        (SYMBOLS, INS, OUTS),
        "log(0)",
    ),
    "exp overflows": (Z + 100, nn.PoissonNLLLoss(), BITS, "overflows"),
    "16 bits": ((0 * Z + 300).half(), nn.MSELoss(reduction="sum"), BITS.half(), "65,504"),
    "in one's own": (Z, lambda p, t: 2 * F.cross_entropy(p, t, torch.zeros(C)), Y, "sum of the"),
    "one's own": (Z, lambda p, t: (0 * p).log().sum() * 0, Y, ""),
}


def _call(outputs, loss, targets):
    if targets is None:
        return loss(outputs)
    return loss(outputs, *(targets if isinstance(targets, tuple) else (targets,)))


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_torch_refuses_is_an_error_with_its_message_and_a_remedy(case):
    outputs, loss, targets, code = case
    with pytest.raises(Exception) as raised:  # noqa: PT011 (torch raises errors of every kind)
        _call(outputs, loss, targets)
    (found,) = pairing.check(outputs, loss, targets)
    assert (found.name, found.severity) == ("loss-raised", "error")
    assert raised.type.__name__ in found.what
    if raised.type is not TypeError:
        assert " ".join(str(raised.value).split())[:40] in found.what
    assert code in found.remedy


@pytest.mark.parametrize("case", NOT_FINITE.values(), ids=NOT_FINITE)
def test_nan_and_inf_are_an_error_that_names_the_cause(case):
    outputs, loss, targets, cause = case
    assert not _call(outputs, loss, targets).isfinite()
    found = {f.name: f for f in pairing.check(outputs, loss, targets)}
    assert found["loss-not-finite"].severity == "error"
    assert cause in found["loss-not-finite"].why


OTHER_CLASS = F.one_hot((Y + 1) % C, C).bool()
MASKED = {  # scores of which some are -inf, the loss, the target, the cause
    "smoothing": (OTHER_CLASS, {"label_smoothing": 0.1}, Y, "Label smoothing"),
    "one-hot": (OTHER_CLASS, {}, F.one_hot(Y, C).float(), "0 times -inf"),
    "soft targets": (OTHER_CLASS, {}, SOFT, "a masked class a probability above 0"),
    "the target itself": (F.one_hot(Y, C).bool(), {}, Y, "is the target of some sample"),
    "a whole row": ((torch.arange(N) == 2)[:, None].expand(N, C), {}, Y, "Every class"),
}


@pytest.mark.parametrize("case", MASKED.values(), ids=MASKED)
def test_the_cause_of_masked_scores_is_true_and_the_remedy_fixes_it(case):
    mask, options, target, cause = case
    mask = mask.clone()
    scores = Z.detach().masked_fill(mask, -torch.inf)
    assert not F.cross_entropy(scores, target, **options).isfinite()
    found = pairing.check(scores, nn.CrossEntropyLoss(**options), target)
    (found,) = (f for f in found if f.name == "loss-not-finite")
    assert cause in found.why
    scope = {"torch": torch, "F": F, "scores": scores, "mask": mask, "target": target}
    exec(found.remedy, scope)
    if "before masked_fill" in found.remedy:
        scope["scores"] = Z.detach().masked_fill(mask, -torch.inf)
    loss = scope.get("loss")
    loss = F.cross_entropy(scope["scores"], scope["target"], **options) if loss is None else loss
    assert loss.isfinite()


def test_a_masked_class_among_log_probabilities_is_no_log_of_zero():
    for mask, loss, target, cause in (
        (F.one_hot(Y, C).bool(), nn.NLLLoss(), Y, "is the target of some sample"),
        (OTHER_CLASS, nn.KLDivLoss(reduction="sum"), F.one_hot(Y, C).float(), "0 times -inf"),
    ):
        outputs = Z.masked_fill(mask, -torch.inf).log_softmax(1)
        found = pairing.check(outputs, loss, target)
        (why,) = (f.why for f in found if f.name == "loss-not-finite")
        assert cause in why
        assert "log(0)" not in why


def test_embeddings_of_different_sizes_in_a_loss_without_a_rule_are_named():
    sizes = randn(N, 5), randn(N, 5), randn(N, 6)
    for loss in (nn.TripletMarginLoss(), F.triplet_margin_loss):
        with pytest.raises(RuntimeError):
            loss(*sizes)
        (found,) = pairing.check(sizes[0], loss, sizes[1:])
        assert (found.name, found.severity) == ("loss-raised", "error")
        assert "(6, 5), (6, 5), (6, 6)" in found.what.replace(f"({N},", "(6,")
        assert "of 5 and of 6 numbers" in found.why
        scope = {"nn": nn, "embedding": sizes[2]}
        exec(found.remedy, scope)
        assert loss(*sizes[:2], scope["embedding"]).isfinite()


def test_an_empty_batch_is_said_per_reduction():
    for reduction, value in (("mean", "nan"), ("sum", "is 0"), ("none", "an empty tensor")):
        (found,) = pairing.check(Z[:0], nn.CrossEntropyLoss(reduction=reduction), Y[:0])
        assert value in found.why


def test_the_remedy_of_a_positive_head_names_what_it_is_of():
    positive = F.softplus(F.relu(Z))
    for outputs, loss, target, code in (
        (positive, nn.PoissonNLLLoss(log_input=False), BITS, "rate = "),
        (Z, nn.GaussianNLLLoss(), (OTHER, positive), "var = "),
    ):
        (found,) = pairing.check(outputs, loss, target)
        assert found.remedy.startswith(code)


REMEDIES = {  # function -> arguments by name, of which one is refused
    "class weights (1, C)": (F.cross_entropy, {"weight": ONES(1, C)}, Y),
    "class weights, float64": (F.cross_entropy, {"weight": ONES(C).double()}, Y),
    "class weights, a list": (F.cross_entropy, {"weight": [1.0, 2.0, 3.0]}, Y),
    "class weights of another length": (F.cross_entropy, {"weight": ONES(2)}, Y),
    "pos_weight (C, 1)": (F.binary_cross_entropy_with_logits, {"pos_weight": ONES(C, 1)}, BITS),
    "pos_weight, a number": (F.binary_cross_entropy_with_logits, {"pos_weight": 2.0}, BITS),
    "a weight per sample": (F.binary_cross_entropy_with_logits, {"weight": ONES(N)}, BITS),
    "a weight per column": (F.mse_loss, {"weight": ONES(C)}, OTHER),
    "a variance per column": (F.gaussian_nll_loss, {"var": ONES(C)}, OTHER),
    "a cosine's target (N, 1)": (F.cosine_embedding_loss, {"input2": OTHER}, ONES(N, 1)),
}


@pytest.mark.parametrize("case", REMEDIES.values(), ids=REMEDIES)
def test_the_code_of_a_remedy_fixes_the_call(case):
    function, options, target = case
    with pytest.raises(Exception):  # noqa: B017, PT011
        function(Z, target=target, **options)
    if "var" in options or "input2" in options:
        (value,) = options.values()
        pair = (target, value) if "var" in options else (value, target)
        (found,) = pairing.check(Z, function, pair)
    else:
        (found,) = pairing.check(Z, functools.partial(function, **options), target)
    scope = {"torch": torch, "prediction": Z, "target": target, "labels": Y, **options}
    exec(found.remedy, scope)
    options = {name: scope[name] for name in options}
    assert function(Z, target=scope["target"], **options).isfinite()


def test_an_error_that_a_rule_explains_is_said_once():
    for case, name in (
        ((Z, nn.CrossEntropyLoss(), Y + 3), "class-index-out-of-range"),
        ((Z, nn.CrossEntropyLoss(), Y.int()), "class-index-dtype"),
        ((Z, lambda p, t: F.cross_entropy(p, t), Y[:, None]), "target-has-class-axis"),
        ((Z.sigmoid(), nn.BCELoss(), 255 * BITS), "target-outside-0-1"),
        ((Z, nn.BCEWithLogitsLoss(), BITS[:, 0]), "target-shape"),
        ((Z, nn.CrossEntropyLoss(), torch.full((N,), -100)), "all-targets-ignored"),
        ((Z[:0], nn.CrossEntropyLoss(), Y[:0]), "empty-batch"),
        ((Z.log_softmax(1), nn.KLDivLoss(reduction="sum"), -SOFT), "target-not-probabilities"),
        ((FRAMES[:3], nn.CTCLoss(), (SYMBOLS, INS - 9, OUTS)), "ctc-input-too-short"),
        ((FRAMES, nn.CTCLoss(), (SYMBOLS, INS, -OUTS)), "ctc-lengths"),
    ):
        assert [f.name for f in pairing.check(*case)] == [name]


def test_two_faults_of_one_call_are_both_said():
    found = pairing.check(Z.softmax(1), nn.CrossEntropyLoss(weight=ONES(2)), Y)
    assert {f.name for f in found.errors} == {"softmax-into-cross-entropy", "loss-raised"}
    loss = bcel(pos_weight=ONES(2))
    found = pairing.check(Z, loss, 255 * BITS)
    assert {f.name for f in found.errors} == {"target-outside-0-1", "loss-raised"}
    net = nn.Linear(4, C)
    found = pairing.check(net, nn.CrossEntropyLoss(weight=ONES(2)), Y, randn(N, 4))
    assert [f.name for f in found] == ["loss-raised"]


def test_options_are_looked_at_where_there_is_only_a_model():
    for loss, targets in (
        (ce(reduction="avg"), Y),
        (nn.CrossEntropyLoss(label_smoothing=1.5), Y),
        (nn.CrossEntropyLoss(ignore_index=0), SOFT),
    ):
        assert [f.name for f in pairing.check(nn.Linear(4, C), loss, targets)] == ["loss-raised"]
    assert not pairing.check(nn.Linear(4, C), nn.CrossEntropyLoss(label_smoothing=1.0), Y)


def test_a_tensor_on_another_device_is_named():
    elsewhere = ONES(C, device="meta")
    for call, code in (
        (bind("cross_entropy", (Z, Y), {"weight": elsewhere}), "loss_function.to("),
        (bind("mse_loss", (Z, ONES(N, C, device="meta")), {}), "target.to("),
    ):
        why, remedy = causes.why_refused(call)
        assert "is on meta, the prediction on cpu" in why
        assert code in remedy


# A weight that torch broadcasts along an axis that it may not be meant for.


def _suspected(outputs, loss, targets, name="weight-over-wrong-axis"):
    return [f.remedy for f in pairing.check(outputs, loss, targets) if f.name == name]


SQUARE = torch.randint(0, 2, (2, 4, 4, 4), generator=SEED).float()
SQUARE_LOGITS = randn(2, 4, 4, 4)


def test_pos_weight_of_shape_c_weighs_columns_and_the_remedy_weighs_classes():
    weight = torch.tensor([1.0, 10, 20, 30])
    (remedy,) = _suspected(SQUARE_LOGITS, bcel(pos_weight=weight), SQUARE)
    scope = {"pos_weight": weight}
    exec(remedy, scope)
    fixed = F.binary_cross_entropy_with_logits(
        SQUARE_LOGITS, SQUARE, pos_weight=scope["pos_weight"], reduction="none"
    )
    for label in range(4):
        alone = F.binary_cross_entropy_with_logits(
            SQUARE_LOGITS[:, label], SQUARE[:, label], pos_weight=weight[label], reduction="none"
        )
        torch.testing.assert_close(fixed[:, label], alone)
    assert not pairing.check(SQUARE_LOGITS, bcel(pos_weight=scope["pos_weight"]), SQUARE)


AXES = {
    "weight": (SQUARE_LOGITS, bcel(weight=ONES(4)), SQUARE),
    "BCELoss": (SQUARE_LOGITS.sigmoid(), nn.BCELoss(weight=ONES(4)), SQUARE),
    "(N, C, L)": (SQUARE_LOGITS[0], bcel(pos_weight=ONES(4)), SQUARE[0]),
    "rows": (SQUARE_LOGITS[..., :3], bcel(pos_weight=ONES(4, 1)), SQUARE[..., :3]),
    "one's own": (
        SQUARE_LOGITS,
        lambda p, t: F.binary_cross_entropy_with_logits(p, t, pos_weight=ONES(4)),
        SQUARE,
    ),
    "as many samples as classes": (Z[:C], bcel(weight=ONES(C)), BITS[:C]),
    "a variance per row or column": (Z[:C], nn.GaussianNLLLoss(), (OTHER[:C], ONES(C))),
}


@pytest.mark.parametrize("case", AXES.values(), ids=AXES)
def test_a_weight_that_fits_two_axes_is_a_suspicion(case):
    found = pairing.check(*case)
    assert [(f.name, f.severity) for f in found] == [("weight-over-wrong-axis", "suspicion")]


def test_a_weight_that_meets_every_sample_is_an_error():
    loss = nn.MultiLabelSoftMarginLoss(weight=ONES(N))
    (found,) = pairing.check(Z[:, :1], loss, BITS[:, :1])
    assert (found.name, found.severity) == ("weight-over-wrong-axis", "error")
    assert "(8, 8)" in found.what


# Targets of the binary losses.


@pytest.mark.parametrize("loss", [nn.BCEWithLogitsLoss(), nn.MultiLabelSoftMarginLoss()])
def test_a_target_below_0_has_no_minimum_and_is_an_error(loss):
    for target in (SIGNS, BITS - 0.2, -SOFT, 255 * BITS):
        away = 1e6 * (target > 1) - 1e6 * (target < 0)
        assert loss(away, target) < -1e3
        assert [f.name for f in pairing.check(Z, loss, target).errors] == ["target-outside-0-1"]


@pytest.mark.parametrize("loss", [nn.BCELoss(), nn.BCEWithLogitsLoss()])
def test_targets_outside_0_1_are_an_error_where_the_arguments_are_swapped_too(loss):
    for logits in (Z, Z.detach()):
        found = {f.name: f for f in pairing.check(BITS, loss, logits)}
        assert set(found) == {"target-outside-0-1", "swapped-arguments"}
        assert found["target-outside-0-1"].severity == "error"
        assert found["target-outside-0-1"].remedy.startswith("loss = loss_function(prediction")
    probabilities = {f.name for f in pairing.check(BITS, loss, Z.sigmoid())}
    assert probabilities == {"swapped-arguments"}


def test_the_remedy_of_a_target_fits_its_values():
    for target, code in (
        (SIGNS, "target > 0"),
        (255 * BITS, "/ 255"),
        (Y[:, None].float().expand(N, C) * 2, "cross_entropy"),
        (OTHER, "mse_loss"),
        (1.2 * BITS, "clamp(0, 1)"),
    ):
        (remedy,) = _suspected(Z, nn.BCEWithLogitsLoss(), target, "target-outside-0-1")
        assert code in remedy
        allowed = (
            eval(remedy.split("#")[0].split("=", 1)[1], {"target": target, "F": F})
            if (remedy.startswith("target"))
            else BITS
        )
        assert not pairing.check(Z, nn.BCEWithLogitsLoss(), allowed)


def test_divergence_from_what_sums_to_more_than_1_is_a_suspicion():
    loss = nn.KLDivLoss(reduction="batchmean")
    for target in (0 * BITS + 0.9, SOFT.sigmoid()):
        assert _suspected(Z.log_softmax(1), loss, target, "target-not-probabilities")
    padded = torch.cat([SOFT[:6], 0 * SOFT[6:]])
    for target in (SOFT, padded, SOFT.bfloat16().float(), SOFT.where(SOFT > 0.3, 0.0)):
        assert not pairing.check(Z.log_softmax(1), loss, target)


# Healthy calls of every loss.

BATCH = {  # loss -> (prediction, targets)
    nn.L1Loss: (Z, OTHER),
    nn.MSELoss: (Z, OTHER),
    nn.SmoothL1Loss: (Z, OTHER),
    nn.HuberLoss: (Z, OTHER),
    nn.CrossEntropyLoss: (Z, Y),
    nn.NLLLoss: (Z.log_softmax(1), Y),
    nn.BCELoss: (Z.sigmoid(), BITS),
    nn.BCEWithLogitsLoss: (Z, BITS),
    nn.PoissonNLLLoss: (Z, BITS),
    nn.GaussianNLLLoss: (Z, (OTHER, SOFT)),
    nn.HingeEmbeddingLoss: (Z, SIGNS),
    nn.MultiMarginLoss: (Z, Y),
    nn.MultiLabelMarginLoss: (Z, torch.tensor([[2, 0, -1]] * N)),
    nn.MultiLabelSoftMarginLoss: (Z, BITS),
    nn.SoftMarginLoss: (Z, SIGNS),
    nn.CosineEmbeddingLoss: (Z, (OTHER, SIGNS[:, 0])),
    nn.MarginRankingLoss: (Z[:, 0], (OTHER[:, 0], SIGNS[:, 0])),
    nn.TripletMarginLoss: (F.normalize(Z), (F.normalize(OTHER), F.normalize(SOFT))),
    nn.TripletMarginWithDistanceLoss: (F.normalize(Z), (F.normalize(OTHER), F.normalize(SOFT))),
    nn.CTCLoss: (FRAMES, (SYMBOLS, INS, OUTS)),
    nn.KLDivLoss: (Z.log_softmax(1), SOFT),
}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", BATCH, ids=lambda kind: kind.__name__)
def test_every_loss_called_as_it_should_be_is_left_in_peace(kind, reduction):
    prediction, targets = BATCH[kind]
    found = pairing.check(prediction, kind(reduction=reduction), targets)
    assert {f.name for f in found} <= {"kl-div-mean-reduction"}


def test_every_loss_of_the_table_is_tried():
    calls = [describe_call(kind(), *case) for kind, case in BATCH.items()]
    assert {call.name for call in calls if call is not None} == set(pairing.LOSSES)


def test_there_is_an_error_exactly_where_torch_raises_or_gives_nan():
    draw = random.Random(0)

    def tensor(*sizes):
        """Zeros, or zeros and ones, of a shape and a dtype that may fit or not."""
        shape = draw.choice([*sizes, (C,), (N,), (1,), (C, 1), (N, 1), (1, C), (), (C, 1, 1)])
        dtype = draw.choice([torch.float32, torch.float32, torch.float64, torch.int64])
        return torch.randint(0, draw.choice([1, 2]), shape, generator=SEED).to(dtype)

    outcomes = set()
    for _ in range(400):
        name = draw.choice(["cross_entropy", "nll_loss", "multi_margin_loss", "l1_loss"])
        name = draw.choice([name, name, "binary_cross_entropy_with_logits", "gaussian_nll_loss"])
        outputs, targets = {
            "l1_loss": (Z, OTHER),
            "multi_margin_loss": (Z, Y),
            "nll_loss": draw.choice([(Z, Y), (IMAGE, REGIONS)]),
            "cross_entropy": draw.choice([(Z, Y), (Z, SOFT), (IMAGE, REGIONS)]),
            "binary_cross_entropy_with_logits": draw.choice([(Z, BITS), (IMAGE, MASK)]),
            "gaussian_nll_loss": (Z, (OTHER, tensor((N, C), (N, C)))),
        }[name]
        outputs = outputs.log_softmax(1) if name == "nll_loss" else outputs
        options = {"reduction": draw.choice(["mean", "mean", "sum", "avg"])}
        if name != "gaussian_nll_loss" and draw.random() < 0.7:
            options["weight"] = tensor()
        if "logits" in name and draw.random() < 0.5:
            options["pos_weight"] = tensor()
        if name in ("cross_entropy", "nll_loss") and draw.random() < 0.3:
            options["ignore_index"] = draw.choice([0, 255, -100])
        loss = functools.partial(pairing.LOSSES[name], **options)
        try:
            truth = "fine" if _call(outputs, loss, targets).isfinite() else "nan"
        except Exception:
            truth = "raises"
        outcomes.add(truth)
        for shape in (loss, lambda *args, loss=loss: loss(*args)):
            errors = pairing.check(outputs, shape, targets).errors
            assert bool(errors) is (truth != "fine"), (name, options, truth, errors)
    assert outcomes == {"fine", "nan", "raises"}


IGNORED = Y.clone()
IGNORED[:3] = 1
HEALTHY = {
    "class weights": (Z, nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1, 3])), Y),
    "a class weighs nothing": (Z, nn.CrossEntropyLoss(weight=torch.tensor([0.0, 1, 1])), Y),
    "weights, soft targets": (Z, nn.CrossEntropyLoss(weight=ONES(C)), SOFT),
    "weights, images": (IMAGE, nn.CrossEntropyLoss(weight=ONES(C), ignore_index=1), REGIONS),
    "weights, ignored": (Z, nn.CrossEntropyLoss(weight=ONES(C), ignore_index=1), IGNORED),
    "as many samples as classes": (Z[:C], nn.CrossEntropyLoss(weight=ONES(C)), Y[:C]),
    "no dimension": (Z[0], nn.CrossEntropyLoss(weight=ONES(C)), Y[0]),
    "float64": (Z.double(), nn.CrossEntropyLoss(weight=ONES(C).double()), Y),
    "bfloat16": (Z.bfloat16(), nn.CrossEntropyLoss(weight=ONES(C).bfloat16()), Y),
    "label smoothing": (Z, nn.CrossEntropyLoss(label_smoothing=1.0), Y),
    "soft targets, ignore_index below 0": (Z, nn.CrossEntropyLoss(ignore_index=-1), SOFT),
    "masked logits": (Z.masked_fill(F.one_hot((Y + 1) % C, C) > 0, -torch.inf), F.cross_entropy, Y),
    "nan targets, masked afterwards": (Z, nn.MSELoss(reduction="none"), OTHER / (BITS > 0)),
    "pos_weight": (Z, bcel(pos_weight=torch.tensor([1.0, 20, 3])), BITS),
    "pos_weight, one": (IMAGE, bcel(pos_weight=torch.tensor([7.0])), MASK),
    "pos_weight, a scalar": (IMAGE, bcel(pos_weight=torch.tensor(7.0)), MASK),
    "pos_weight, float64": (Z, bcel(pos_weight=ONES(C).double()), BITS),
    "pos_weight, integer": (Z, bcel(pos_weight=torch.tensor([4])), BITS),
    "pos_weight, images": (IMAGE, bcel(pos_weight=ONES(C, 1, 1)), MASK),
    "pos_weight, W == C": (SQUARE_LOGITS, bcel(pos_weight=ONES(4, 1, 1)), SQUARE),
    "pos_weight, N == C": (Z[:C], bcel(pos_weight=ONES(C)), BITS[:C]),
    "pos_weight, classes last": (IMAGE.movedim(1, 3), bcel(pos_weight=ONES(C)), MASK.movedim(1, 3)),
    "one weight per sample": (Z, bcel(weight=ONES(N, 1)), BITS),
    "one weight per column": (Z, bcel(weight=ONES(C)), BITS),
    "one weight per sample and class": (Z[:C], bcel(weight=ONES(C, C)), BITS[:C]),
    "one logit, one weight per sample": (Z[:, 0], bcel(weight=ONES(N)), BITS[:, 0]),
    "weight of pixels": (IMAGE, bcel(weight=ONES(2, 1, 6, 5)), MASK),
    "variance, a float": (Z, nn.GaussianNLLLoss(), (OTHER, 1.0)),
    "variance, one per sample": (Z, nn.GaussianNLLLoss(full=True), (OTHER, ONES(N))),
    "variance (N, 1)": (Z, nn.GaussianNLLLoss(), (OTHER, ONES(N, 1))),
    "variance 0": (Z, nn.GaussianNLLLoss(), (OTHER, torch.zeros(N, C))),
    "MSE weight": (Z, functools.partial(F.mse_loss, weight=ONES(N, C)), OTHER),
    "CTC, concatenated": (FRAMES, nn.CTCLoss(), (SYMBOLS.flatten(), INS, OUTS)),
    "CTC, padded by -1": (FRAMES, nn.CTCLoss(), (F.pad(SYMBOLS, (0, 2), value=-1), INS, OUTS)),
    "CTC, lists": (FRAMES, nn.CTCLoss(), (SYMBOLS, [T] * 4, [S] * 4)),
    "CTC, tuples": (FRAMES, F.ctc_loss, (SYMBOLS, (T,) * 4, (S,) * 4)),
    "CTC, int32": (FRAMES, nn.CTCLoss(), (SYMBOLS.int(), INS.int(), OUTS.int())),
    "CTC, last blank": (FRAMES, nn.CTCLoss(blank=6), (SYMBOLS, INS, OUTS)),
    "CTC, unbatched": (FRAMES[:, 0], nn.CTCLoss(), (SYMBOLS[0], INS[0], OUTS[0])),
    "CTC, an empty transcript": (FRAMES, nn.CTCLoss(), (SYMBOLS, INS, OUTS * 0)),
    "scores, one target": (Z[:, 0], nn.MarginRankingLoss(), (OTHER[:, 0], ONES(1))),
    "scores (N, 1)": (Z[:, :1], nn.MarginRankingLoss(), (OTHER[:, :1], ONES(N, 1))),
    "one pair": (Z[0], nn.CosineEmbeddingLoss(), (OTHER[0], torch.tensor(1.0))),
    "rates": (Z.exp(), nn.PoissonNLLLoss(log_input=False, full=True), BITS),
    "log targets": (
        Z.log_softmax(1),
        nn.KLDivLoss(reduction="batchmean", log_target=True),
        SOFT.log(),
    ),
    "saturated": (200 * SIGNS, nn.BCEWithLogitsLoss(), 1 - BITS),
    "saturated, BCELoss": (BITS.clone().requires_grad_(), nn.BCELoss(), BITS),
    "a focal loss": (Z, Focal(ONES(C)), Y),
    "one's own, unreduced": (Z, lambda p, t: F.cross_entropy(p, t, reduction="none"), Y),
    "one's own, a tuple": (Z, lambda p, t: (F.cross_entropy(p, t), {"nan": p / 0}), Y),
    "one's own, without targets": (Z, lambda p: p.square().mean(), None),
    "one's own, a number": (Z, lambda p, t: F.cross_entropy(p, t).item(), Y),
    "one's own, replaced": (
        Z,
        lambda p, t: torch.nan_to_num(F.cross_entropy(p, t, weight=torch.zeros(C))),
        Y,
    ),
    "one's own, keywords": (Z, lambda p, t, *, scale=1.0: scale * F.cross_entropy(p, t), Y),
    "a fallback of one's own": (Z, lambda p, t: _fallback(p, t), Y),
}


def _fallback(outputs, targets):
    try:
        return F.binary_cross_entropy_with_logits(outputs, targets)
    except (ValueError, RuntimeError):
        return F.cross_entropy(outputs, targets)


@pytest.mark.parametrize("case", HEALTHY.values(), ids=HEALTHY)
def test_options_that_are_allowed_are_left_in_peace(case):
    _call(*case)
    found = pairing.check(*case)
    if case is not HEALTHY["a fallback of one's own"]:  # its first try is a finding of its own
        assert not found
    assert "loss-raised" not in {f.name for f in found}


# guard: the loss raises by itself, and is nan by itself.


def _guarded(case, *, raises):
    outputs, loss, targets = case[:3]
    with warnings.catch_warnings(record=True), pairing.guard() as findings:
        if raises:
            with pytest.raises(Exception) as raised:  # noqa: PT011
                _call(outputs, loss, targets)
            assert "PairingWarning" not in raised.type.__name__
        else:
            _call(outputs, loss, targets)
    return findings


@pytest.mark.parametrize(
    "name",
    ["class weights (1, C)", "a focal loss's weights", "pos_weight of images", "float lengths"],
)
def test_the_guard_explains_what_is_raised_and_lets_it_through(name):
    (found,) = _guarded(REFUSED[name], raises=True)
    assert (found.name, found.severity) == ("loss-raised", "error")
    assert REFUSED[name][3] in found.remedy
    assert found.where.startswith("tests") or ".py:" in found.where


@pytest.mark.parametrize("name", ["those present do", "log(0)", "exp overflows", "in one's own"])
def test_the_guard_reports_a_loss_of_nan(name):
    found = {f.name: f for f in _guarded(NOT_FINITE[name], raises=False)}
    assert found["loss-not-finite"].severity == "error"
    assert NOT_FINITE[name][3] in found["loss-not-finite"].why


def test_the_guard_suspects_what_check_suspects():
    for case in AXES.values():
        found = _guarded(case, raises=False)
        assert [(f.name, f.severity) for f in found] == [("weight-over-wrong-axis", "suspicion")]
    found = _guarded((BITS, nn.BCEWithLogitsLoss(), Z.detach()), raises=False)
    assert [f.name for f in found.errors] == ["target-outside-0-1"]


def test_the_weight_that_torch_forgets_under_a_mode_still_counts():
    weight = torch.rand(N, C, generator=SEED)
    expected = F.l1_loss(Z, OTHER, weight=weight)
    with pairing.guard(steps=1) as findings:
        for _ in range(4):
            assert torch.equal(F.l1_loss(Z, OTHER, weight=weight), expected)
    assert not findings
    for case in (
        (Z, functools.partial(F.l1_loss, weight=ONES(C)), OTHER),
        (Z, lambda p, t: F.l1_loss(p, t, weight=ONES(C)), OTHER),
    ):
        assert [f.name for f in pairing.check(*case)] == ["loss-raised"]
        assert [f.name for f in _guarded(case, raises=True)] == ["loss-raised"]


def test_the_guard_leaves_healthy_options_in_peace():
    with warnings.catch_warnings():
        warnings.simplefilter("error", pairing.PairingWarning)
        for name, case in HEALTHY.items():
            if "replaced" in name or "fallback" in name:
                continue
            with pairing.guard() as findings:
                _call(*case)
            assert not findings, name


# A trial leaves no trace.


class Restless(nn.Module):
    """Changes all that a loss can change."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.history = []
        self.drop = nn.Dropout(0.5)

    def forward(self, outputs, targets):
        self.seen += 1
        self.history.append(float(random.random() + np.random.rand()))
        self.train(not self.training)
        targets.clamp_(max=1)
        outputs = self.drop(outputs)
        outputs.mul_(2)
        return F.cross_entropy(outputs, targets)


def _states():
    return (
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),
        torch.is_grad_enabled(),
    )


def test_a_loss_of_ones_own_is_called_on_a_copy_with_copies():
    loss, outputs, targets = Restless(), Z.detach().clone(), Y.clone()
    before = _states()
    assert not pairing.check(outputs, loss, targets)
    assert _states() == before
    assert (loss.seen.item(), loss.history, loss.training) == (0, [], True)
    assert torch.equal(outputs, Z)
    assert torch.equal(targets, Y)


def test_the_module_of_a_function_and_of_a_method_is_put_back():
    loss = Restless()

    def closure(outputs, targets):
        return loss(outputs, targets)

    for own in (closure, lambda p, t: loss(p, t), loss.forward, functools.partial(loss.forward)):
        before = _states()
        pairing.check(Z, own, Y.clone())
        assert loss.seen.item() == 0
        assert loss.training
        assert _states() == before


def test_a_loss_that_cannot_be_copied_is_still_called():
    class Locked(Restless):
        def __init__(self):
            super().__init__()
            self.lock = threading.Lock()

    loss = Locked()
    assert not pairing.check(Z, loss, Y)
    assert loss.seen.item() == 0


def test_a_loss_is_called_once():
    calls = []

    def own(outputs, targets):
        calls.append(outputs)
        raise RuntimeError("no")

    assert [f.name for f in pairing.check(Z, own, Y)] == ["loss-raised"]
    assert len(calls) == 1


def test_hooks_of_a_loss_are_not_called_and_nothing_runs_backward():
    loss, calls = nn.CrossEntropyLoss(weight=nn.Parameter(ONES(C))), []
    loss.register_forward_hook(lambda *_: calls.append("forward"))
    leaf = randn(N, C).requires_grad_()
    outputs = leaf * 1
    outputs.register_hook(lambda *_: calls.append("backward"))
    assert not pairing.check(outputs, loss, Y)
    assert not calls
    assert leaf.grad is None
    assert outputs.requires_grad
    assert loss.weight.requires_grad


def test_what_ones_own_loss_raises_is_said_with_its_line():
    def broken(outputs, targets):
        F.cross_entropy(outputs, targets)
        return outputs.mean() / undefined  # noqa: F821

    (found,) = pairing.check(Z, broken, Y)
    assert (found.name, found.severity) == ("loss-raised", "error")
    assert "NameError: name 'undefined' is not defined" in found.what
    assert found.where.endswith(f".py:{broken.__code__.co_firstlineno + 2}")


def test_nan_is_found_in_whatever_holds_the_loss():
    zero = torch.zeros(C)
    for own in (
        lambda p, t: (F.cross_entropy(p, t, zero), p),
        lambda p, t: {"loss": F.cross_entropy(p, t, zero), "outputs": p},
        lambda p, t: F.cross_entropy(p, t, zero).item(),
        lambda p, t: [p.sum() * torch.inf],
    ):
        assert [f.name for f in pairing.check(Z, own, Y).errors] == ["loss-not-finite"]


def test_a_loss_that_needs_more_arguments_says_which():
    def weighted(outputs, targets, weights):
        return (weights * F.cross_entropy(outputs, targets, reduction="none")).mean()

    (found,) = pairing.check(Z, weighted, Y)
    assert found.severity == "error"
    assert "weights" in found.what
    assert "(outputs, targets, weights)" in found.why
    assert found.remedy == "pairing.check(outputs, loss, (targets, weights))"
    assert not pairing.check(Z, weighted, (Y, ONES(N)))


def test_tensors_without_values_are_not_tried():
    with torch.device("meta"):
        outputs, targets = torch.empty(N, C), torch.empty(N, dtype=torch.long)
    found = pairing.check(outputs, nn.CrossEntropyLoss(weight=ONES(2)), targets)
    assert {f.name for f in found} == {"values-not-readable"}


def test_autocast_is_respected():
    loss = nn.CrossEntropyLoss(weight=ONES(C))
    with torch.autocast("cpu", torch.bfloat16):
        assert not pairing.check(Z.bfloat16(), loss, Y)
    assert [f.name for f in pairing.check(Z.bfloat16(), loss, Y)] == ["loss-raised"]


@pytest.mark.parametrize("blank", ["x", None, 2.5])
def test_odd_options_are_an_error_and_no_crash(blank):
    found = pairing.check(FRAMES, nn.CTCLoss(blank=blank), (SYMBOLS, INS, OUTS))
    assert found
    assert pairing.check(Z, ce(weight=object()), Y).errors
    assert pairing.check(Z, ce(label_smoothing="a lot"), Y).errors
