"""The words of each finding: why it matters and the code that mends it, by its stable name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dlhelpers.findings import Finding, Severity

__all__ = ["ENTRIES", "Hit", "finding"]


@dataclass(frozen=True)
class Hit:
    """A rule that fired, before it is worded.

    Attributes:
        name: key of :data:`ENTRIES`.
        severity: ``error`` or ``suspicion``.
        what: what was seen, with the values.
        evidence: ``rule`` (shape, dtype, range), ``trace`` (the activation was seen) or
            ``values`` (read from the numbers alone).
        where: module path, file and line, or empty.
        why, remedy: in place of the catalog's, where this case allows better ones.
    """

    name: str
    severity: Severity
    what: str
    evidence: Literal["rule", "trace", "values"]
    where: str = ""
    why: str = ""
    remedy: str = ""


def finding(hit: Hit, where: str = "") -> Finding:
    """Word a hit."""
    why, remedy = ENTRIES[hit.name]
    why, remedy = hit.why or why, hit.remedy or remedy
    return Finding(hit.name, hit.severity, hit.what, why, remedy, where or hit.where)


_DROP_SOFTMAX = "loss = F.cross_entropy(logits, target)  # no softmax before it"
_RAW_BINARY = "loss = F.binary_cross_entropy_with_logits(logit, target)  # no sigmoid before it"
_LOG_SOFTMAX = "F.log_softmax(logits, dim={})"

ENTRIES: dict[str, tuple[str, str]] = {
    "softmax-into-cross-entropy": (
        "CrossEntropyLoss applies log_softmax itself; over probabilities it cannot fall below "
        "ln(1 + (C-1)/e) even for a perfect answer, and gradients shrink. Nothing is raised.",
        _DROP_SOFTMAX,
    ),
    "sigmoid-into-cross-entropy": (
        "CrossEntropyLoss wants unbounded logits; values in [0, 1] keep every class's probability "
        "between 1/(1+(C-1)e) and e/(e+C-1), so the loss has a floor.",
        "loss = F.cross_entropy(logits, target)  # no sigmoid before it",
    ),
    "tanh-into-cross-entropy": (
        "CrossEntropyLoss wants unbounded logits; values in [-1, 1] can be at most e*e times as "
        "probable as each other, so the loss has a floor.",
        "loss = F.cross_entropy(logits, target)  # no tanh before it",
    ),
    "relu-into-cross-entropy": (
        "A ReLU cannot push a wrong class below 0, and where all logits are 0 no gradient flows.",
        "loss = F.cross_entropy(logits, target)  # no ReLU after the last linear layer",
    ),
    "log-softmax-into-cross-entropy": (
        "log_softmax of a log_softmax is the same values: right, and one operation is wasted.",
        "loss = F.nll_loss(log_probs, target)  # or F.cross_entropy(logits, target)",
    ),
    "softmax-over-wrong-axis": (
        "The normalisation runs over something other than the classes, most often over the "
        "batch: samples compete with each other. Nothing is raised.",
        "F.log_softmax(logits, dim=class_axis)  # 1 for (N, C, ...), -1 for CTC's (T, N, C)",
    ),
    "activation-before-softmax": (
        "softmax and log_softmax expect unbounded scores. Applied to the values of another "
        "activation they cannot bring a probability near 0 or 1: the loss is cross entropy of "
        "that activation, has a floor, and its gradients shrink. Nothing is raised.",
        "log_probs = F.log_softmax(logits, dim=1)  # of the last linear layer's outputs\n"
        "loss = F.nll_loss(log_probs, target)  # or F.cross_entropy(logits, target)",
    ),
    "activation-before-sigmoid": (
        "A sigmoid expects an unbounded logit. Applied to the value of another activation it "
        "cannot bring the probability near 0 or 1: the loss is BCEWithLogitsLoss of that "
        "activation and has a floor. Nothing is raised.",
        "probability = torch.sigmoid(logit)  # of the last linear layer's output\n"
        "loss = F.binary_cross_entropy_with_logits(logit, target)  # or BCELoss of probability",
    ),
    "positive-head-twice": (
        "exp and softplus make any number positive. Applied to numbers that are positive already "
        "they put a floor under the rate or variance.",
        "var = F.softplus(raw)  # raw: the last linear layer's output",
    ),
    "logits-into-own-loss": (
        "The loss treats its first argument as probabilities. Outside [0, 1] an overlap score "
        "exceeds its best value, a logarithm is nan, and a clamp passes no gradient.",
        "loss_value = loss(torch.sigmoid(outputs), targets)  # softmax for exclusive classes",
    ),
    "activation-into-own-loss": (
        "The loss applies an activation itself. After a first one its best value is out of reach, "
        "and gradients shrink.",
        "loss_value = loss(logits, targets)  # no activation before it",
    ),
    "embeddings-not-normalised": (
        "The loss depends on the length of the embeddings: training can change lengths instead of "
        "angles, and a margin or temperature means something else at each length. If dot products "
        "or Euclidean distances are intended, this is right.",
        "embeddings = F.normalize(embeddings, dim=1)  # before the loss, if angles are meant",
    ),
    "cosine-without-temperature": (
        "Cosines lie in [-1, 1]. Without a temperature the softmax over them stays nearly flat "
        "however good the embeddings are, and hard negatives hardly count more than easy ones.",
        "loss = F.cross_entropy(cosines / 0.07, labels)  # a temperature, fixed or learned",
    ),
    "softmax-without-dim": (
        "Without dim torch guesses: axis 0 for 0, 1 and 3 dimensions, else axis 1.",
        "nn.Softmax(dim=1)  # name the class axis",
    ),
    "one-logit": (
        "The softmax of a single class is always 1: the loss is 0 and so is every gradient.",
        "loss = F.binary_cross_entropy_with_logits(logit.squeeze(1), target.float())",
    ),
    "softmax-into-nll": (
        "NLLLoss only picks and negates: over probabilities it lies between -1 and 0 instead of "
        "being a likelihood.",
        "loss = F.nll_loss(" + _LOG_SOFTMAX.format(1) + ", target)",
    ),
    "sigmoid-into-nll": (
        "NLLLoss wants log-probabilities; it only picks and negates, so the wrong classes are "
        "never pushed down.",
        "loss = F.nll_loss(" + _LOG_SOFTMAX.format(1) + ", target)",
    ),
    "logits-into-nll": (
        "NLLLoss only picks and negates: over raw scores it falls without limit and learns "
        "nothing about the other classes.",
        "loss = F.cross_entropy(logits, target)",
    ),
    "log-of-softmax": (
        "softmax underflows to 0 first, log makes -inf of it: the loss turns inf where "
        "log_softmax would be exact.",
        _LOG_SOFTMAX.format(1) + "  # in place of torch.log(F.softmax(logits, dim=1))",
    ),
    "sigmoid-into-bce-with-logits": (
        "BCEWithLogitsLoss applies the sigmoid itself; the second one keeps probabilities "
        "between 0.5 and 0.731: floors ln(1+1/e) = 0.313 (target 1) and ln 2 = 0.693 (target 0).",
        _RAW_BINARY,
    ),
    "softmax-into-bce-with-logits": (
        "BCEWithLogitsLoss applies a sigmoid itself: over probabilities that is squashed to "
        "[0.5, 0.731] and no class can be switched off.",
        _RAW_BINARY,
    ),
    "log-softmax-into-bce-with-logits": (
        "Log-probabilities are never positive: no sigmoid of them can pass 0.5.",
        _RAW_BINARY,
    ),
    "relu-into-bce-with-logits": (
        "A logit that cannot be negative is a probability that cannot fall below 0.5.",
        "loss = F.binary_cross_entropy_with_logits(logit, target)  # no ReLU before it",
    ),
    "tanh-into-bce-with-logits": (
        "Logits in [-1, 1] keep the probability between 0.269 and 0.731: the loss has a floor.",
        "loss = F.binary_cross_entropy_with_logits(logit, target)  # no tanh before it",
    ),
    "logits-into-bce": (
        "BCELoss wants probabilities. Outside [0, 1] it raises; a layer without a sigmoid only "
        "happens to lie inside.",
        "loss = F.binary_cross_entropy_with_logits(logit, target)",
    ),
    "softmax-into-bce": (
        "The outputs of a softmax share a sum of 1. Over two classes and one-hot targets this "
        "equals cross entropy; for several true labels at once it cannot be right.",
        "loss = F.cross_entropy(logits, class_index)  # one label a sample\n"
        "loss = F.binary_cross_entropy_with_logits(logits, target)  # several labels",
    ),
    "softmax-into-kl-div": (
        "KLDivLoss wants the logarithm of the model's probabilities: over probabilities it gives "
        "negative 'divergences', even for equal distributions.",
        "loss = F.kl_div(" + _LOG_SOFTMAX.format(1) + ", probs, reduction='batchmean')",
    ),
    "sigmoid-into-kl-div": (
        "KLDivLoss wants the logarithm of probabilities that sum to 1 over the classes: sigmoids "
        "are neither logarithms nor normalised.",
        "loss = F.kl_div(" + _LOG_SOFTMAX.format(1) + ", probs, reduction='batchmean')",
    ),
    "logits-into-kl-div": (
        "KLDivLoss wants log-probabilities (never above 0): over raw scores it falls without "
        "limit.",
        "loss = F.kl_div(" + _LOG_SOFTMAX.format(1) + ", probs, reduction='batchmean')",
    ),
    "log-target-not-declared": (
        "The targets are log-probabilities and are read as probabilities: the logarithm of a "
        "negative number makes the loss nan.",
        "loss = F.kl_div(log_probs, target_log_probs, reduction='batchmean', log_target=True)",
    ),
    "log-target-declared": (
        "log_target=True says that targets are logarithms; they are probabilities, and exp of "
        "them sums to more than C.",
        "loss = F.kl_div(log_probs, probs, reduction='batchmean')  # log_target=False",
    ),
    "kl-div-mean-reduction": (
        "reduction='mean' divides by N times C and is not the divergence: C times too small.",
        "loss = F.kl_div(log_probs, probs, reduction='batchmean')",
    ),
    "softmax-into-ctc": (
        "CTCLoss adds logarithms: over probabilities the loss goes negative, silently.",
        "loss = F.ctc_loss(" + _LOG_SOFTMAX.format(-1) + ", targets, in_lengths, out_lengths)",
    ),
    "sigmoid-into-ctc": (
        "CTCLoss adds logarithms of probabilities that sum to 1 over the classes: over sigmoids "
        "the loss goes negative, silently.",
        "loss = F.ctc_loss(" + _LOG_SOFTMAX.format(-1) + ", targets, in_lengths, out_lengths)",
    ),
    "logits-into-ctc": (
        "CTCLoss wants log-probabilities; raw scores make the sum over paths meaningless.",
        "loss = F.ctc_loss(" + _LOG_SOFTMAX.format(-1) + ", targets, in_lengths, out_lengths)",
    ),
    "ctc-lengths": (
        "CTCLoss wants log_probs as (T, N, C), one input length of at most T and one target "
        "length a sample.",
        "F.ctc_loss(log_probs.permute(1, 0, 2), targets, input_lengths, target_lengths)",
    ),
    "ctc-input-too-short": (
        "A path needs one frame a symbol and one blank between equal neighbours: with fewer "
        "frames no path exists, and the loss is inf (0, without gradient, under zero_infinity).",
        "keep = input_lengths >= target_lengths  # or downsample less before the loss",
    ),
    "blank-in-targets": (
        "The blank is the gap between symbols and never part of a transcript.",
        "loss = F.ctc_loss(log_probs, targets + 1, in_lengths, out_lengths, blank=0)",
    ),
    "softmax-into-margin-loss": (
        "Probabilities can never be a margin of 1 apart from each other: the loss never "
        "reaches 0 and its gradient fades.",
        "loss = loss_function(scores, target)  # raw scores, no softmax",
    ),
    "sigmoid-into-margin-loss": (
        "Values in [0, 1] can never be a margin of 1 apart, nor be negative.",
        "loss = loss_function(scores, target)  # raw scores, no sigmoid",
    ),
    "targets-not-plus-minus-one": (
        "This loss multiplies or selects by the sign of a target of -1 or +1: a 0 switches the "
        "sample off or counts it as neither. Nothing is raised.",
        "target = 2 * target - 1  # 0 and 1 become -1 and +1",
    ),
    "multi-hot-into-multilabel-margin": (
        "MultiLabelMarginLoss reads a row as class indices ended by -1, not as flags.",
        "loss = F.multilabel_soft_margin_loss(scores, multi_hot.float())",
    ),
    "broadcast-target": (
        "Shapes differ and are broadcast: (N, 1) against (N) compares each prediction with "
        "every target, and the best answer is the mean of all targets.",
        "loss = loss_function(prediction.squeeze(-1), target)",
    ),
    "head-cannot-reach-targets": (
        "The last activation cannot give these values: the loss stays high and units die.",
        "prediction = linear(features)  # no activation, or scale the targets into its range",
    ),
    "softmax-into-regression": (
        "A squared or absolute error over softmax outputs has gradients that vanish exactly "
        "where the model is wrong and sure of it.",
        "loss = F.cross_entropy(logits, class_index)",
    ),
    "positive-head-into-log-rate": (
        "log_input=True (the default) takes the exponential itself: exp(exp(x)), or a rate that "
        "cannot fall below 1.",
        "loss = F.poisson_nll_loss(log_rate, counts)  # or: rate and log_input=False",
    ),
    "negative-rate": (
        "log_input=False takes the logarithm of the prediction: below 0 it is nan.",
        "loss = F.poisson_nll_loss(log_rate, counts, log_input=True)",
    ),
    "negative-counts": (
        "A Poisson count cannot be negative: the likelihood has no meaning there.",
        "loss = F.mse_loss(prediction, target)  # targets that may be negative",
    ),
    "negative-variance": (
        "GaussianNLLLoss takes the logarithm of the variance and raises where it is negative.",
        "var = F.softplus(raw_var)  # or raw_log_var.exp()",
    ),
    "class-index-out-of-range": (
        "Class indices run from 0 to C-1: IndexError on the CPU, an assertion on the device "
        "that spoils the whole process on CUDA; CTCLoss reads past the classes, unchecked.",
        "assert ((target >= 0) & (target < logits.shape[1])).all()",
    ),
    "class-index-dtype": (
        "Class indices must be int64 (or uint8); torch raises otherwise.",
        "target = target.long()",
    ),
    "integer-one-hot": (
        "Integer targets of the prediction's shape are taken for class probabilities of the "
        "wrong type; torch raises.",
        "target = target.argmax(dim=1)  # or target.float() for probabilities",
    ),
    "target-has-class-axis": (
        "Class indices have the prediction's shape without its class axis; torch raises.",
        "target = target.squeeze(1)",
    ),
    "class-axis-last": (
        "torch takes axis 1 for the classes: (N, C, L), (N, C, H, W).",
        "loss = F.cross_entropy(logits.movedim(-1, 1), target)",
    ),
    "class-axis-ambiguous": (
        "Axis 1 and the last axis are of equal size, so (N, L, C) would pass for (N, C, L) "
        "without an error and train on nonsense.",
        "loss = F.cross_entropy(logits.movedim(-1, 1), target)  # if the classes come last",
    ),
    "target-shape": (
        "Prediction and target have to be of matching shapes; torch raises.",
        "target = target.view_as(prediction)",
    ),
    "target-dtype": (
        "This loss wants prediction and target of one floating dtype; torch raises.",
        "target = target.to(prediction.dtype)",
    ),
    "integer-target": (
        "This loss computes with its targets as floating numbers; torch raises on integers.",
        "target = target.float()",
    ),
    "integer-prediction": (
        "An integer or boolean prediction carries no gradient: it was rounded, compared or "
        "taken through argmax before the loss.",
        "loss = loss_function(logits, target)  # argmax and thresholds are for metrics",
    ),
    "swapped-arguments": (
        "The prediction comes first, the target second; swapped, the loss is another function "
        "and its gradient runs into the target.",
        "loss = loss_function(prediction, target)",
    ),
    "all-targets-ignored": (
        "The mean over no target is 0/0: the loss is nan and poisons every weight.",
        "loss = F.cross_entropy(logits, target, reduction='sum') / max(1, kept)",
    ),
    "soft-targets-not-normalised": (
        "Class probabilities should be in [0, 1] and sum to 1 along the class axis; torch does "
        "not check.",
        "target = target / target.sum(dim=1, keepdim=True)",
    ),
    "target-outside-0-1": (
        "A probability as target lies in [0, 1]; outside, binary cross entropy has no minimum "
        "and BCELoss raises.",
        "target = target.clamp(0, 1)",
    ),
    "target-not-probabilities": (
        "KLDivLoss takes probabilities as targets: they sum to 1, and a negative one makes the "
        "loss nan.",
        "loss = F.kl_div(log_probs, F.softmax(teacher_logits, dim=1), reduction='batchmean')",
    ),
    "empty-batch": (
        "The mean over an empty batch is nan.",
        "if len(target) == 0:\n    continue  # in the training loop: skip this batch",
    ),
    "not-finite": (
        "nan in, nan out: every weight is nan after one step.",
        "torch.autograd.set_detect_anomaly(True)  # find the operation that made it",
    ),
    "not-a-tensor": (
        "A loss compares tensors.",
        "target = torch.as_tensor(target)",
    ),
    "not-a-loss": (
        "A loss is an instance of nn.Module or a function of two tensors.",
        "loss = nn.CrossEntropyLoss()  # with brackets: an instance, not the class",
    ),
    "values-not-readable": (
        "Only shapes and dtypes could be looked at.",
        "pairing.check(outputs.to_dense().cpu(), loss, targets)",
    ),
    "model-raised": (
        "The model could not be run on these inputs, so its output was not looked at.",
        "outputs = model(inputs)  # fix this line, then pairing.check(outputs, loss, targets)",
    ),
    "loss-raised": (
        "The loss itself raises on these outputs and targets.",
        "loss_value = loss(outputs, targets)  # fix this line first",
    ),
    "loss-not-finite": (
        "The gradient of a loss that is nan or inf is nan: every weight is nan after one step.",
        "torch.autograd.set_detect_anomaly(True)  # find the operation that made it",
    ),
    "weight-over-wrong-axis": (
        "A weight is broadcast from the last axis on, whatever it is meant for. Nothing is raised.",
        "pos_weight = pos_weight[:, None, None]  # classes on axis 1 of (N, C, H, W)",
    ),
    "check-failed": (
        "A rule could not be applied; the others were.",
        "pairing.check(outputs, loss, targets)  # with plain tensors",
    ),
}
