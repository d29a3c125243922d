"""Figures of two axes that a widget moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dlhelpers.drawing.style import FAILING, STYLE, TREATMENT, describe

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["pair_panel"]


def pair_panel(logit: float, right: Callable[..., Any], wrong: Callable[..., Any]) -> Figure:
    """Draw loss and pull of a right and a wrong pair side by side, for two classes.

    Args:
        logit: of the true class, against a fixed 0; a dot marks it.
        right, wrong: (logits [1, 2], targets [1]) -> scalar loss.
    """
    import matplotlib
    import torch
    from matplotlib.figure import Figure

    x = torch.linspace(-8, 8, 161)
    at = min(range(161), key=lambda i: abs(x[i].item() - logit))
    facts, pulls = [], []
    with matplotlib.rc_context(STYLE | {"figure.figsize": (8.4, 3.2)}):
        figure = Figure(layout="constrained")
        left, centre = figure.subplots(1, 2)
        for name, pair, colour in (("right", right, TREATMENT), ("wrong", wrong, FAILING)):
            loss, pull = _loss_and_pull(pair, x)
            for axes, y in ((left, loss), (centre, pull)):
                axes.plot(x, y, color=colour)
                axes.plot(x[at], y[at], "o", color=colour, markersize=9)
            facts.append(f"{name} pair: loss {loss[at]:.3f}, pull {pull[at]:.3g}")
            pulls.append(pull[at])
            centre.plot([], [], color=colour, label=f"{name}: pull {pull[at]:.3g}")
            left.plot([], [], color=colour, label=f"{name}: loss {loss[at]:.3f}")
        for axes, quantity in ((left, "loss (nats)"), (centre, "pull, -d loss / d logit")):
            axes.set(xlabel="logit of the true class", ylabel=quantity)
            axes.legend(frameon=False)
        facts.append(f"wrong / right pull {pulls[1] / pulls[0]:.3f}")
        figure.suptitle(f"logit {logit:g}: {facts[-1]}")
    return describe(figure, f"Logit {logit:g}. {'; '.join(facts)}.")


def _loss_and_pull(pair: Callable[..., Any], x: Any) -> tuple[list[float], list[float]]:
    import torch

    target, loss, pull = torch.tensor([0]), [], []
    for value in x:
        z = torch.stack([value, torch.zeros(())])[None].requires_grad_()
        result = pair(z, target)
        loss.append(result.item())
        pull.append(-torch.autograd.grad(result, z)[0][0, 0].item())
    return loss, pull
