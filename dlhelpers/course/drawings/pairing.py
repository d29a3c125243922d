"""What does a softmax before cross-entropy do to the loss, and which pairs belong together?"""

from __future__ import annotations

import math

from dlhelpers.drawing.panel import BLUE, GREY, INK, ORANGE, RUST, Panel
from dlhelpers.drawing.style import FAILING, TREATMENT

__all__ = ["loss_of_pairs", "pairs"]


def losses(margin: float, classes: int = 10) -> tuple[float, float]:
    """Cross-entropy of a sample whose true logit leads by the margin: on logits, on softmax.

    >>> losses(0.0)[0] == losses(0.0)[1]  # equal logits: the logarithm of the classes
    True
    """
    others = classes - 1
    right = math.log1p(others * math.exp(-margin))
    true = math.exp(-right)
    wrong = math.log1p(others * math.exp((1 - true) / others - true))
    return right, wrong


def loss_of_pairs() -> Panel:
    """The two losses over the lead of the true class."""
    alt = """Cross-entropy for ten classes against the lead of the true logit. On logits it rises
    steadily to the left, where the model is wrong, and falls to zero on the right. After a softmax
    it stays between a floor and a ceiling, and is flat where the model is most wrong."""
    p = Panel(640, 270, alt, "After a softmax the loss has a floor, and no slope where it is wrong")
    ends, top = (-10, 10), 12.5

    def at(margin: float, loss: float) -> tuple[float, float]:
        return 60 + (margin - ends[0]) * 20, 225 - loss / top * 170

    p.line([at(-10, 0), at(10, 0)])
    p.line([at(-10, 0), at(-10, top)])
    steps = [ends[0] + 0.25 * k for k in range(81)]
    for which, colour in ((0, TREATMENT), (1, FAILING)):
        p.line([at(m, losses(m)[which]) for m in steps], colour=colour, wide=2.5)
    for m in (-10, -5, 0, 5, 10):
        p.text(at(m, 0)[0], 242, str(m), anchor="middle", size=12)
    for loss in (0, 5, 10):
        p.text(52, at(0, loss)[1] + 4, str(loss), anchor="end", size=12)
    p.text(260, 262, "logit of the true class, less the others", anchor="middle", size=12)
    p.text(16, 46, "loss", size=12)
    p.text(200, 92, "on logits", bold=True)
    p.text(468, at(0, losses(10)[1])[1] - 10, "after softmax", colour=RUST, bold=True)
    p.text(468, at(0, losses(10)[1])[1] + 10, f"floor {losses(50)[1]:.2f}", colour=RUST)
    return p


def pairs() -> Panel:
    """Which loss applies which activation itself."""
    alt = """Which last layer belongs to which loss. One class of many: logits to CrossEntropyLoss,
    or LogSoftmax to NLLLoss. Yes or no: a logit to BCEWithLogitsLoss, or Sigmoid to BCELoss. A
    number: the plain output to MSELoss. Losses that take logits apply the activation themselves."""
    p = Panel(640, 250, alt, "Losses that take logits hold the activation already")
    rows = (
        ("one of many", "none (logits)", "CrossEntropyLoss", "softmax inside"),
        ("", "LogSoftmax", "NLLLoss", ""),
        ("yes or no", "none (a logit)", "BCEWithLogitsLoss", "sigmoid inside"),
        ("", "Sigmoid", "BCELoss", ""),
        ("a number", "none", "MSELoss", ""),
    )
    p.text(195, 56, "last activation", anchor="middle", bold=True)
    p.text(395, 56, "loss", anchor="middle", bold=True)
    for row, (task, last, loss, inside) in enumerate(rows):
        y = 68 + 35 * row
        p.text(16, y + 18, task)
        p.box(120, y, 150, 28, last, fill=GREY if "none" in last else BLUE)
        p.arrow(272, y + 14, 308, y + 14)
        p.box(310, y, 170, 28, loss, fill=ORANGE if inside else GREY)
        p.text(490, y + 18, inside, colour=INK)
    return p
