"""Which pictures explain a mechanism? Two drawings for each lesson, written as SVG by hand."""

from dlhelpers.course.drawings.dali_io import cpu_and_gpu, who_waits
from dlhelpers.course.drawings.fusion import folding, folding_refused
from dlhelpers.course.drawings.lmdb_io import files_and_pages, random_access
from dlhelpers.course.drawings.memory import checkpointing, kept
from dlhelpers.course.drawings.pairing import loss_of_pairs, pairs
from dlhelpers.course.drawings.profiling import asynchronous, two_halves
from dlhelpers.course.drawings.quantization import clip_and_round, scales
from dlhelpers.course.drawings.shufflenet import connections, shuffle_unit
from dlhelpers.course.drawings.start import tip_to_verdict, verdicts

__all__ = [
    "asynchronous",
    "checkpointing",
    "clip_and_round",
    "connections",
    "cpu_and_gpu",
    "files_and_pages",
    "folding",
    "folding_refused",
    "kept",
    "loss_of_pairs",
    "pairs",
    "random_access",
    "scales",
    "shuffle_unit",
    "tip_to_verdict",
    "two_halves",
    "verdicts",
    "who_waits",
]
