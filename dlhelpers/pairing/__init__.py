"""Does the loss want what the last layer gives, and are the targets what it takes?

``check`` looks at one prediction, loss and target (or runs a model once); ``guard`` looks at the
losses that a training loop calls. The one formula: with C classes, a softmax before
CrossEntropyLoss keeps the loss above ln(1 + (C-1)/e), whatever the network learns.
Source: documentation of ``torch.nn`` losses, https://pytorch.org/docs/stable/nn.html

``check`` also calls the loss once, on detached tensors, and one that is not torch's on a deep
copy: what it raises, and a value that is nan or inf, is an error with its cause.

Three kinds of evidence. *rule*: shape, dtype or range is broken. *trace*: the graph (``grad_fn``),
torch.fx or the module list shows the activation. *values*: no trace, at least two rows sum to 1
within rounding (or their exponentials do). The table's last column names the evidence of an
``error``; *hint* there means a ``suspicion``, of whatever evidence: a single row that sums to 1,
logits that all lie in [0, 1], or what is legitimate and mostly not meant.

=====================================================  ===================================  ======
mis-pairing                                            finding                              shown
=====================================================  ===================================  ======
softmax before CrossEntropyLoss                        softmax-into-cross-entropy           trace
softmax before CrossEntropyLoss, no graph              softmax-into-cross-entropy           values
sigmoid before CrossEntropyLoss                        sigmoid-into-cross-entropy           trace
all logits in [0, 1]                                   sigmoid-into-cross-entropy           hint
tanh before CrossEntropyLoss                           tanh-into-cross-entropy              trace
ReLU before CrossEntropyLoss                           relu-into-cross-entropy              trace
no logit negative, some exactly 0                      relu-into-cross-entropy              hint
LogSoftmax before CrossEntropyLoss (wasted)            log-softmax-into-cross-entropy       hint
softmax, log_softmax over another axis than classes    softmax-over-wrong-axis              trace
the same without a graph                               softmax-over-wrong-axis              values
nn.Softmax() without dim                               softmax-without-dim                  hint
bounded scores before log_softmax or softmax           activation-before-softmax            trace
bounded scores before sigmoid, BCELoss                 activation-before-sigmoid            trace
one logit with CrossEntropyLoss                        one-logit                            rule
softmax before NLLLoss                                 softmax-into-nll                     trace
softmax before NLLLoss, no graph                       softmax-into-nll                     values
sigmoid before NLLLoss                                 sigmoid-into-nll                     trace
raw logits into NLLLoss                                logits-into-nll                      trace
values above 0 into NLLLoss                            logits-into-nll                      rule
values below 0 that are not normalised into NLLLoss    logits-into-nll                      hint
log(softmax) in place of log_softmax                   log-of-softmax                       hint
sigmoid before BCEWithLogitsLoss                       sigmoid-into-bce-with-logits         trace
all logits in [0, 1] before BCEWithLogitsLoss          sigmoid-into-bce-with-logits         hint
softmax before BCEWithLogitsLoss                       softmax-into-bce-with-logits         trace
log_softmax before BCEWithLogitsLoss                   log-softmax-into-bce-with-logits     trace
ReLU before BCEWithLogitsLoss                          relu-into-bce-with-logits            trace
tanh before BCEWithLogitsLoss                          tanh-into-bce-with-logits            trace
raw logits into BCELoss                                logits-into-bce                      trace
values outside [0, 1] into BCELoss                     logits-into-bce                      rule
softmax before BCELoss, one label a sample             softmax-into-bce                     hint
softmax before BCELoss, several labels a sample        softmax-into-bce                     trace
probabilities into KLDivLoss                           softmax-into-kl-div                  trace
sigmoid before KLDivLoss                               sigmoid-into-kl-div                  trace
raw logits into KLDivLoss                              logits-into-kl-div                   trace
log-probability targets without log_target=True        log-target-not-declared              rule
probability targets with log_target=True               log-target-declared                  values
negative KLDivLoss targets that are no logarithms      target-not-probabilities             rule
KLDivLoss targets that sum to more than 1              target-not-probabilities             hint
KLDivLoss with reduction='mean'                        kl-div-mean-reduction                hint
probabilities into CTCLoss                             softmax-into-ctc                     trace
sigmoid before CTCLoss                                 sigmoid-into-ctc                     trace
raw logits into CTCLoss                                logits-into-ctc                      trace
lengths that do not fit log_probs (T, N, C)            ctc-lengths                          rule
fewer frames than CTC needs                            ctc-input-too-short                  rule
the blank among the targets                            blank-in-targets                     rule
softmax before a margin loss                           softmax-into-margin-loss             trace
sigmoid before a margin loss                           sigmoid-into-margin-loss             trace
0/1 targets in a loss of -1/+1 targets                 targets-not-plus-minus-one           rule
0/1 flags into MultiLabelMarginLoss                    multi-hot-into-multilabel-margin     hint
(N, 1) against (N) in a regression                     broadcast-target                     rule
ReLU, sigmoid or tanh cannot reach the targets         head-cannot-reach-targets            trace
softmax and a squared or absolute error on one-hot     softmax-into-regression              hint
exp, softplus, ReLU into PoissonNLLLoss(log_input)     positive-head-into-log-rate          trace
exp or softplus of a positive rate or variance         positive-head-twice                  hint
negative prediction with log_input=False               negative-rate                        rule
negative counts                                        negative-counts                      rule
negative variance                                      negative-variance                    rule
class index below 0 or not below C                     class-index-out-of-range             rule
class indices of another dtype than int64              class-index-dtype                    rule
integer one-hot targets with CrossEntropyLoss          integer-one-hot                      rule
(N, 1) targets with CrossEntropyLoss                   target-has-class-axis                rule
(N, L, C) logits with CrossEntropyLoss                 class-axis-last                      rule
the same where L equals C                              class-axis-ambiguous                 hint
(N, 1) against (N) in BCELoss, BCEWithLogitsLoss       target-shape                         rule
another floating dtype in BCELoss, HuberLoss           target-dtype                         rule
integer targets in BCELoss, BCEWithLogitsLoss          integer-target                       rule
targets below 0, far above 1 in binary cross entropy   target-outside-0-1                   rule
integer predictions (argmax before the loss)           integer-prediction                   rule
prediction and target swapped                          swapped-arguments                    rule
every target equals ignore_index                       all-targets-ignored                  rule
soft targets that do not sum to 1                      soft-targets-not-normalised          hint
a batch of nothing                                     empty-batch                          rule
nan in prediction or target                            not-finite                           rule
None, a number, a string in place of a tensor          not-a-tensor                         rule
a class or None in place of a loss                     not-a-loss                           rule
sparse, meta, quantised, complex tensors               values-not-readable                  hint
the model fails on its inputs                          model-raised                         rule
torch refuses the arguments or options of its loss     loss-raised                          rule
raw outputs into a loss that wants probabilities       logits-into-own-loss                 rule
an activation before a loss that wants logits          activation-into-own-loss             trace
triplets, InfoNCE of embeddings of any length          embeddings-not-normalised            hint
InfoNCE of cosines without a temperature               cosine-without-temperature           hint
a loss of the reader's own raises                      loss-raised                          rule
the loss is nan or inf                                 loss-not-finite                      rule
a weight of one number per class on another axis       weight-over-wrong-axis               hint
a rule fails on odd values                             check-failed                         hint
=====================================================  ===================================  ======

A loss that is not in :data:`LOSSES` (Dice, triplets, one of your own) is called once, and what its
recorded operations give for other outputs shows what it wants; where they show nothing, the answer
is "not looked at: no rule for this loss".

Not looked for: the saturation of Sigmoid + BCELoss (right, only less exact), BCELoss under CUDA
autocast (torch refuses it), ``LinearCrossEntropyLoss`` and ``AdaptiveLogSoftmaxWithLoss``, which
own their last layer.
"""

from __future__ import annotations

from .calls import LOSSES
from .equality import largest_difference
from .inspection import check
from .watch import PairingWarning, guard

__all__ = ["LOSSES", "PairingWarning", "check", "guard", "largest_difference"]
