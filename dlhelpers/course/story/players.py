"""Who plays without a tap? Three who follow a rule: a list, a profiler, the best known order."""

from __future__ import annotations

from dlhelpers.course.story.game import Position
from dlhelpers.course.story.settings import MENU, STEPS, Part

__all__ = ["BEST_KNOWN", "best_known", "diagnosing_player", "expected_gain", "in_order"]

BEST_KNOWN = (
    "logits into the loss",
    "one call stacks a batch",
    "small photographs in LMDB",
    "scoring in batches",
    "the fastest backend",
    "validation without graphs",
    "DALI prepares batches",
    "photographs decoded small",
    "BatchNorm folded",
)
_READING = ("small photographs in LMDB", "DALI prepares batches")
_REMEDIES: dict[tuple[Part, str], tuple[str, ...]] = {
    ("train", "slow-collate"): ("one call stacks a batch",),
    ("train", "slow-decoding"): _READING,
    ("train", "slow-transforms"): _READING,
    ("train", "slow-loading"): _READING,
    ("train", "repeated-transforms"): _READING,
    ("train", "no-workers"): ("DALI prepares batches",),
    ("valid", "evaluation-without-no-grad"): ("validation without graphs",),
    ("score", "python-loop"): ("scoring in batches",),
    ("score", "batch-of-one"): ("scoring in batches",),
    ("score", "slow-decoding"): ("photographs decoded small",),
    ("score", "batchnorm-unfused"): ("BatchNorm folded",),
}  # part, what diagnose names -> the changes on the menu that do what its remedy says


def in_order(position: Position) -> tuple[str, float] | None:
    """Follow ``STEPS``, and expect what ``diagnose`` says first, whatever the step does."""
    left = [name for name in STEPS if name in position.menu]
    if not left:
        return None
    part = MENU[left[0]].part
    found = [] if left[0] == "logits into the loss" else position.look(part)
    return left[0], expected_gain(position, part, found[0].speedup) if found else 1.0


def best_known(position: Position) -> tuple[str, float] | None:
    """Follow the best order that is known.

    Found by trying every change that was left and keeping the one after which the whole script
    was the fastest, on two cores of a server with AVX-512, DALI and ONNX Runtime; another machine
    may have a better one.
    """
    left = [name for name in BEST_KNOWN if name in position.menu]
    return (left[0], 1.0) if left else None


def diagnosing_player(position: Position) -> tuple[str, float] | None:
    """Do what the package itself says: check the pair first, then what ``diagnose`` names first.

    The part that takes longest is looked at first, the next one where nothing on the menu helps it.
    """
    fix = "logits into the loss"
    if fix in position.menu and position.mistakes():
        return fix, 1.0
    for part in position.parts:
        for finding in position.look(part):
            for name in _REMEDIES.get((part, finding.name), ()):
                if name in position.menu:
                    return name, expected_gain(position, part, finding.speedup)
    return None


def expected_gain(position: Position, part: Part, factor: float) -> float:
    """Return by how many times the whole script becomes faster, by Amdahl's law.

    Args:
        position: whose run says which share the part has.
        part: of the script.
        factor: time of the part before / after.
    """
    share = position.seconds()[part] / position.run.total_s
    return 1 / (1 - share + share / factor)
