"""Which half of a program does a profiler see, and where is asynchronous work booked?"""

from __future__ import annotations

from dlhelpers.drawing.panel import GREY, ORANGE, RUST, Panel

__all__ = ["asynchronous", "two_halves"]


def two_halves() -> Panel:
    """Python above, operators and kernels below."""
    alt = """A program in two halves: Python calls above, torch's operators and kernels below.
    cProfile and samplers of Python see the upper half and take a whole operator for one call;
    torch.profiler sees operators and kernels, and of Python only what is labelled."""
    p = Panel(640, 200, alt, "Each profiler sees one half of the program")
    p.box(20, 56, 340, 54, "Python: your loop, the dataset, modules")
    p.arrow(190, 112, 190, 128)
    p.box(20, 130, 340, 54, "C++: operators, autograd, kernels", fill=ORANGE)
    p.text(384, 80, "cProfile, Python samplers", bold=True)
    p.text(384, 98, "an operator is one call")
    p.text(384, 154, "torch.profiler", bold=True)
    p.text(384, 172, "of Python only what is labelled")
    return p


def asynchronous(kernels: int = 3) -> Panel:
    """A CPU that launches kernels and then waits for them."""
    alt = """Two lanes. On the CPU three short launches, then one long wait in item(). On the GPU
    the three kernels run one after the other, the last ones long after their launches returned. A
    profiler of the CPU books the time of all kernels on item()."""
    p = Panel(640, 200, alt, "The CPU's clock books the kernels where it waits for them")
    p.text(16, 84, "CPU")
    p.text(16, 144, "GPU")
    launch, kernel = 54, 140
    for k in range(kernels):
        p.box(70 + launch * k, 62, launch - 4, 34, f"call {k + 1}", size=12)
        begin = 124 + kernel * k
        p.box(begin, 122, kernel - 4, 34, f"kernel {k + 1}", fill=ORANGE)
    begin = 70 + launch * kernels
    p.box(begin, 62, 124 + kernel * kernels - begin, 34, "item(): waits", fill=GREY)
    p.text(begin, 184, "item() gets the blame, the kernels took the time", colour=RUST)
    return p
