"""Which habits make the script slow, and which change fixes each of them?"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["BATCH", "MENU", "STEPS", "Part", "Settings", "Step", "after"]

BATCH = 16
Part = Literal["train", "valid", "score"]


@dataclass(frozen=True)
class Settings:
    """The habits; each default is the script as found.

    Attributes:
        softmax: the network ends in Softmax, before a loss that has its own.
        database: photographs come from an LMDB database of small ones, not from large files.
        stack: a batch is made by one call.
        dali: batches are prepared by DALI's threads; by a worker process where there is no DALI.
        no_grad: validation keeps neither graphs nor losses.
        depthwise: each convolution after the first is a depthwise one and a pointwise one.
        score_batch: photographs that are scored at a time.
        fold: BatchNorms are folded before scoring.
        int8: scoring takes the fastest backend that ``quantize_static`` finds.
        draft: scoring decodes photographs at a smaller scale, as JPEG allows.
    """

    softmax: bool = True
    database: bool = False
    stack: bool = False
    dali: bool = False
    no_grad: bool = False
    depthwise: bool = False
    score_batch: int = 1
    fold: bool = False
    int8: bool = False
    draft: bool = False


@dataclass(frozen=True)
class Step:
    """One change of one field.

    Attributes:
        field, value: what is set.
        lesson: stem of the notebook that treats it.
        part: of the script that it changes.
        condition: of the claim ``profiling.profile-first``; empty where it is in none.
    """

    field: str
    value: Any
    lesson: str
    part: Part
    condition: str = ""

    @property
    def code(self) -> str:
        """The change as an argument.

        >>> STEPS["small photographs in LMDB"].code
        'database=True'
        """
        return f"{self.field}={self.value!r}"

    def done(self, settings: Settings) -> Settings:
        """Return the settings with this change."""
        return dataclasses.replace(settings, **{self.field: self.value})


STEPS = {
    "logits into the loss": Step("softmax", False, "01_pairing", "train"),
    "one call stacks a batch": Step(
        "stack", True, "08_profiling", "train", "training on batches that one call stacks"
    ),
    "small photographs in LMDB": Step(
        "database", True, "02_lmdb_io", "train", "training from small photographs in LMDB"
    ),
    "DALI prepares batches": Step(
        "dali", True, "03_dali_io", "train", "training on DALI's batches"
    ),
    "validation without graphs": Step(
        "no_grad", True, "04_memory", "valid", "validation without graphs"
    ),
    "scoring in batches": Step("score_batch", BATCH, "08_profiling", "score", "scoring in batches"),
    "photographs decoded small": Step(
        "draft", True, "02_lmdb_io", "score", "scoring photographs that are decoded small"
    ),
    "BatchNorm folded": Step("fold", True, "06_fusion", "score", "scoring with BatchNorm folded"),
    "the fastest backend": Step(
        "int8", True, "07_quantization", "score", "scoring on the fastest backend"
    ),
}  # in the order in which notebook 08 measures them
MENU = STEPS | {"depthwise convolutions": Step("depthwise", True, "05_shufflenet", "train")}


def after(step: str) -> Settings:
    """Return the settings once this step and all before it in ``STEPS`` are done.

    Raises:
        ValueError: there is no such step.

    >>> after("logits into the loss").softmax
    False
    """
    if step not in STEPS:
        raise ValueError(f"there is no step {step!r}; there are {', '.join(STEPS)}")
    settings = Settings()
    for name, change in STEPS.items():
        settings = change.done(settings)
        if name == step:
            break
    return settings
