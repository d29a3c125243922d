"""Which pictures explain a mechanism? Two drawings for each lesson, written as SVG by hand."""

from dlhelpers.course.drawings.fusion import folding, folding_refused
from dlhelpers.course.drawings.pairing import loss_of_pairs, pairs
from dlhelpers.course.drawings.quantization import clip_and_round, scales

__all__ = ["clip_and_round", "folding", "folding_refused", "loss_of_pairs", "pairs", "scales"]
