"""What does autograd keep, and what does checkpointing compute again?"""

from __future__ import annotations

from dlhelpers.drawing.panel import BLUE, GREY, ORANGE, Panel

__all__ = ["checkpointing", "kept"]


def kept() -> Panel:
    """Layer by layer, the tensor that the backward pass wants."""
    alt = """A chain of convolution, BatchNorm, ReLU and linear layer. Below each, what autograd
    keeps for the backward pass: the convolution and the linear layer keep their input, BatchNorm
    its input too, ReLU its output, which the next layer keeps anyway."""
    p = Panel(640, 190, alt, "Most layers keep their input; ReLU keeps its output")
    layers = (("conv", "its input"), ("BatchNorm", "its input"), ("ReLU", "its output"))
    for k, (name, what) in enumerate((*layers, ("linear", "its input"))):
        x = 50 + 150 * k
        p.arrow(x - 36, 76, x - 2, 76)
        p.box(x, 56, 110, 40, name)
        p.box(x - 6 if "input" in what else x + 6, 128, 110, 34, what, fill=ORANGE)
        p.arrow(x + 50, 98, x + 50, 126)
    p.text(350, 182, "the same tensor, kept once", size=12)
    p.line([(452, 164), (452, 168), (500, 168), (500, 164)])
    return p


def checkpointing(blocks: int = 4, segments: int = 2) -> Panel:
    """The timeline of a checkpointed step, and what is alive after each of its parts."""
    alt = """A step of four blocks in two checkpointed segments. Forward runs all blocks and keeps
    only the input of each segment. Backward first runs blocks 3 and 4 forward again, then goes back
    through them, then the same for 1 and 2. Bars show the activations alive: the peak is lower, and
    each block ran forward twice."""
    p = Panel(640, 230, alt, "Checkpointing runs each block forward twice to keep less")
    size = blocks // segments
    steps: list[tuple[str, int, int]] = []  # what, block, activations that it needs alive
    steps += [("F", b, (b - 1) // size + 1) for b in range(1, blocks + 1)]
    for s in reversed(range(segments)):
        inside = range(s * size + 1, (s + 1) * size + 1)
        steps += [("again", b, s + 1 + k) for k, b in enumerate(inside)]
        steps += [("B", b, s + b - s * size) for b in reversed(inside)]
    wide = 540 / len(steps)
    fills = {"F": BLUE, "again": ORANGE, "B": GREY}
    for k, (what, block, alive) in enumerate(steps):
        p.box(84 + wide * k, 60, wide - 3, 32, str(block), fill=fills[what])
        p.box(84 + wide * k, 200 - 22 * alive, wide - 3, 22 * alive, fill=BLUE)
    p.text(16, 80, "block")
    p.text(16, 192, "kept")
    p.line([(84, 200), (624, 200)])
    p.line([(84, 200 - 22 * blocks), (624, 200 - 22 * blocks)], colour="#6b6b6b")
    p.text(84, 194 - 22 * blocks, f"peak without checkpointing: {blocks}", size=12)
    for x, name, fill in (
        (84, "forward", BLUE),
        (200, "forward again", ORANGE),
        (360, "backward", GREY),
    ):
        p.box(x, 210, 14, 12, fill=fill)
        p.text(x + 20, 221, name, size=12)
    return p
