"""Who waits for whom in a pipeline of two stages?"""

from __future__ import annotations

from dlhelpers.drawing.panel import BLUE, ORANGE, Panel
from dlhelpers.stages import predict_stages

__all__ = ["cpu_and_gpu", "who_waits"]


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
        line = predict_stages({"loader": load, "model": train}, batches=5, depth=1)
        for span in line.spans:
            lane = line.stages.index(span.stage)
            x, wide = 80 + 33 * span.start_s, 33 * (span.end_s - span.start_s)
            label, fill = str(span.batch + 1), (BLUE, ORANGE)[lane]
            p.box(x, y + 4 + 36 * lane, wide, 28, label, fill=fill)
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
