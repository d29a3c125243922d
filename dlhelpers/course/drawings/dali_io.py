"""Who waits for whom in a pipeline of two stages?"""

from __future__ import annotations

from dlhelpers.course.drawings.panel import BLUE, ORANGE, Panel

__all__ = ["cpu_and_gpu", "who_waits"]


def schedule(load: float, train: float, batches: int) -> list[tuple[float, float]]:
    """Start of loading and of training of each batch, where one batch may wait between the stages.

    >>> schedule(2, 1, 3)  # the model waits for each batch
    [(0.0, 2.0), (2.0, 4.0), (4.0, 6.0)]
    >>> schedule(1, 2, 3)[2]  # the loader is ahead
    (2.0, 5.0)
    """
    starts: list[tuple[float, float]] = []
    for k in range(batches):
        begin = starts[-1][0] + load if starts else 0.0
        begin = max(begin, starts[-2][1]) if k > 1 else begin
        ready = max(begin + load, starts[-1][1] + train) if starts else begin + load
        starts.append((float(begin), float(ready)))
    return starts


def who_waits() -> Panel:
    """A loader-bound and a model-bound pipeline."""
    alt = """Two timelines, each with a lane for the loader and one for the model. Loader-bound: the
    loader never stops, and the model has gaps between its batches. Model-bound: the model never
    stops after its first batch, and the loader waits. The slower stage sets the pace."""
    p = Panel(640, 260, alt, "The slower stage sets the pace, the other one waits")
    cases = (("loader-bound: the model waits", 3, 1), ("model-bound: the loader waits", 1, 3))
    for case, (name, load, train) in enumerate(cases):
        y = 62 + 102 * case
        p.text(16, y - 8, name, bold=True)
        p.text(16, y + 22, "loader")
        p.text(16, y + 58, "model")
        for lane in (0, 1):
            p.line([(80, y + 34 + 36 * lane), (620, y + 34 + 36 * lane)], colour="#9a9a9a")
        for k, starts in enumerate(schedule(load, train, 5), 1):
            for lane, (start, took, fill) in enumerate(
                zip(starts, (load, train), (BLUE, ORANGE), strict=True)
            ):
                p.box(80 + 33 * start, y + 4 + 36 * lane, 33 * took, 28, str(k), fill=fill)
    return p


def cpu_and_gpu() -> Panel:
    """Which stages run where, with the preprocessing on the CPU or on the GPU."""
    alt = """The stages of an image: read, decode, crop and resize, train. With preprocessing on the
    CPU only training runs on the GPU. With DALI on the GPU decoding and cropping run there too:
    they leave the CPU, and take time from the training that shares the GPU."""
    p = Panel(640, 200, alt, "Moving a stage to the GPU frees the CPU and loads the GPU")
    for row, (name, first) in enumerate((("on the CPU", 3), ("on the GPU", 1))):
        y = 68 + 62 * row
        p.text(16, y + 24, name)
        for k, stage in enumerate(("read", "decode", "crop, resize", "train")):
            x = 110 + 132 * k
            p.box(x, y, 104, 38, stage, fill=ORANGE if k >= first else BLUE)
            if k:
                p.arrow(x - 27, y + 19, x - 2, y + 19)
    p.box(110, 180, 14, 12)
    p.text(130, 191, "CPU", size=12)
    p.box(190, 180, 14, 12, fill=ORANGE)
    p.text(210, 191, "GPU", size=12)
    return p
