"""How many FLOPs does one operator do, and how little can a convolution move?

FLOPs are torch's own formulas, with rules for what it leaves out. A 1x1 convolution from c1 to c2
channels over hw pixels does B = hw c1 c2 multiply-adds and reads or writes at least so many
elements, the memory access cost (MAC):

    MAC = hw (c1 + c2) + c1 c2  >=  2 sqrt(hw B) + B / hw        (equal only where c1 = c2)

Source: Ma et al. 2018, arXiv:1807.11164, equations 1 and 2.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

__all__ = [
    "MemoryAccess",
    "conv_linear_flops",
    "flops_of",
    "is_element_wise",
    "mac_lower_bound",
    "memory_access_cost",
]

# FLOPs for each element of the first input
_PER_ELEMENT_READ = {
    "softmax": 5,  # maximum, difference, exponential, sum, quotient
    "_softmax": 5,
    "_log_softmax": 5,
    "native_layer_norm": 7,  # mean 1, variance 3, normalise 2, scale and shift 1 + 1 in pairs
    "native_group_norm": 7,
    "mean": 1,
    "sum": 1,
    "amax": 1,
    "amin": 1,
    "argmax": 1,
    "max": 1,
    "min": 1,
    "var": 3,
    "var_mean": 4,
    "cumsum": 1,
    "linalg_vector_norm": 2,
    "_adaptive_avg_pool2d": 1,
    "_adaptive_avg_pool3d": 1,
    "adaptive_max_pool2d": 1,
}
# data is moved, nothing is computed
_MOVES = {
    *("cat", "stack", "clone", "copy_", "_to_copy", "contiguous", "fill_", "zero_", "zeros"),
    *("zeros_like", "ones", "ones_like", "full", "full_like", "index", "index_select", "gather"),
    *("embedding", "slice_scatter", "select_scatter", "scatter", "constant_pad_nd", "roll"),
    *("repeat", "flip", "arange", "pixel_shuffle", "channel_shuffle", "im2col", "new_zeros"),
    *("index_put", "index_put_", "masked_fill", "where", "tril", "triu", "one_hot", "new_ones"),
    *("reflection_pad2d", "replication_pad2d", "upsample_nearest2d", "scalar_tensor"),
    *(
        "resize_",
        "set_",
        "bernoulli_",
        "index_copy",
        "index_copy_",
        "scatter_",
        "rand",
        "randn",
        "randint",
        "new_full",
    ),
}
# each element of the output is made of one of each input, and torch gives them no tag
_ELEMENT_WISE = {"hardswish", "hardswish_", "glu", "log_sigmoid_forward", "_prelu_kernel"}
_ELEMENT_WISE |= {"rrelu_with_noise", "rrelu_with_noise_"}


def is_element_wise(func: Any) -> bool:
    """Whether each element of the output is made of one of each input."""
    return torch.Tag.pointwise in func.tags or _name(func) in _ELEMENT_WISE


def conv_linear_flops(func: Any, args: Any, kwargs: Any, out: Any) -> int | None:
    """Return FLOPs as ``torch.utils.flop_counter`` counts them; None for what it does not.

    It leaves out the CPU's kernel of attention, recurrent layers that are one operator, and
    products with vectors; those are counted here as their other forms are.
    """
    name = _name(func)
    if name == "_scaled_dot_product_flash_attention_for_cpu":
        return sdpa_flop_count(*(args[i].shape for i in range(3)))
    if name in ("mkldnn_rnn_layer", "_cudnn_rnn"):  # a step's products, for each of its rows
        weights = args[1:3] if name == "mkldnn_rnn_layer" else args[1]
        return 2 * math.prod(args[0].shape[:-1]) * sum(w.numel() for w in weights if w.dim() == 2)
    if name in ("mv", "dot", "vdot"):
        return 2 * args[0].numel()
    if name in ("addmv", "addmv_"):
        return 2 * args[1].numel()
    if name in ("addbmm", "addbmm_"):
        return 2 * args[1].numel() * args[2].shape[-1]
    formula = flop_registry.get(func._overloadpacket)
    return None if formula is None else formula(*args, **kwargs, out_val=out)


def flops_of(func: Any, args: Any, kwargs: Any, out: Any) -> int | None:
    """Return FLOPs by the rules of policy ``all``; None where no rule knows the operator."""
    own = conv_linear_flops(func, args, kwargs, out)
    if own is not None:
        return own
    name = _name(func)
    first = out if isinstance(out, Tensor) else out[0]
    if name == "native_batch_norm" or name.startswith(("_native_batch_norm", "cudnn_batch_norm")):
        return args[0].numel() * (7 if _trains(func, args, kwargs) else 2)
    if name in ("avg_pool2d", "max_pool2d_with_indices", "avg_pool3d", "avg_pool1d"):
        return first.numel() * _window(args[1], args[0].dim() - 2)
    if name in _PER_ELEMENT_READ:
        return _PER_ELEMENT_READ[name] * args[0].numel()
    if name in _MOVES:
        return 0
    if is_element_wise(func):
        return first.numel()
    return None


def _name(func: Any) -> str:
    return func._schema.name.removeprefix("aten::")


def _trains(func: Any, args: Any, kwargs: Any) -> bool:
    names = [argument.name for argument in func._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    return bool(given.get("training", given.get("train", "no_training" not in str(func))))


def _window(kernel: Any, dimensions: int) -> int:
    sizes = [kernel] if isinstance(kernel, int) else list(kernel)
    if len(sizes) == 1:
        sizes *= dimensions
    return math.prod(sizes)


class MemoryAccess(NamedTuple):
    """What a layer reads and writes at least once."""

    elements: int
    bytes: int


def memory_access_cost(
    c1: int,
    c2: int,
    hw: int,
    *,
    kernel: int = 1,
    groups: int = 1,
    dtype: torch.dtype = torch.float32,
) -> MemoryAccess:
    """Return what a convolution with stride 1 and same size reads and writes: equations 1 and 2.

    Input hw c1, output hw c2, weights kernel^2 c1 c2 / groups; each once, as with a cache that
    holds all of them.

    Args:
        c1, c2: channels in and out.
        hw: pixels, height times width.
        kernel: side of a square kernel.
        groups: divides c1 and c2.
        dtype: of all three.

    Raises:
        ValueError: a size is not positive, or groups does not divide the channels.

    >>> memory_access_cost(128, 128, 56 * 56)
    MemoryAccess(elements=819200, bytes=3276800)
    """
    if min(c1, c2, hw, kernel, groups) < 1 or c1 % groups or c2 % groups:
        raise ValueError(
            f"sizes must be 1 or more and groups divide both channels, got c1={c1}, c2={c2}, "
            f"hw={hw}, kernel={kernel}, groups={groups}"
        )
    elements = hw * (c1 + c2) + kernel**2 * c1 * c2 // groups
    return MemoryAccess(elements, elements * dtype.itemsize)


def mac_lower_bound(multiply_adds: float, hw: float) -> float:
    """Return the fewest elements that a 1x1 convolution can read and write: equation 1's bound.

    Args:
        multiply_adds: B, which the paper calls FLOPs: hw c1 c2.
        hw: pixels.

    Raises:
        ValueError: multiply-adds are negative or no number, or there is no pixel.

    >>> mac_lower_bound(56 * 56 * 128 * 128, 56 * 56)
    819200.0
    """
    if not (multiply_adds >= 0 and hw > 0):
        raise ValueError(f"multiply_adds must be 0 or more, hw above 0: {multiply_adds!r}, {hw!r}")
    return 2 * math.sqrt(hw * multiply_adds) + multiply_adds / hw
