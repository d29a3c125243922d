"""Do eight bits pay? Small integers, the ranges that they cover, and the fastest right backend.

>>> import torch
>>> from torch import nn
>>> grid = choose_affine((-1.0, 3.0), signed=False)
>>> quantize(torch.tensor([0.0, 1.0, 3.0]), grid)
tensor([ 64, 128, 255], dtype=torch.uint8)
"""

from dlhelpers.quantization.affine import Affine, choose_affine, dequantize, quantize
from dlhelpers.quantization.aware import AwareModel, quantize_aware, simulate
from dlhelpers.quantization.calibrate import CALIBRATORS, Calibrator, split_error
from dlhelpers.quantization.dynamic import quantize_dynamic
from dlhelpers.quantization.noise import sample_sqnr_db, sqnr_db
from dlhelpers.quantization.report import QuantizationReport
from dlhelpers.quantization.sensitivity import SensitivityReport, sensitivity
from dlhelpers.quantization.static import ENGINES, quantize_static
from dlhelpers.quantization.taking import QuantizedModel
from dlhelpers.quantization.torch_backends import ENGINES as TORCH_ENGINES
from dlhelpers.quantization.torch_backends import engine_set

__all__ = [
    "CALIBRATORS",
    "ENGINES",
    "TORCH_ENGINES",
    "Affine",
    "AwareModel",
    "Calibrator",
    "QuantizationReport",
    "QuantizedModel",
    "SensitivityReport",
    "choose_affine",
    "dequantize",
    "engine_set",
    "quantize",
    "quantize_aware",
    "quantize_dynamic",
    "quantize_static",
    "sample_sqnr_db",
    "sensitivity",
    "simulate",
    "split_error",
    "sqnr_db",
]
