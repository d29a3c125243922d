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
    "_safe_softmax": 5,
    "_log_softmax": 5,
    "logsumexp": 4,
    "native_layer_norm": 7,  # mean 1, variance 3, normalise 2, scale and shift 1 + 1 in pairs
    "native_group_norm": 7,
    "mean": 1,
    "sum": 1,
    "amax": 1,
    "amin": 1,
    "argmax": 1,
    "max": 1,
    "min": 1,
    "argmin": 1,
    "topk": 1,
    "kthvalue": 1,
    "median": 1,
    "any": 1,
    "all": 1,
    "prod": 1,
    "nansum": 1,
    "aminmax": 2,
    "var": 3,
    "var_mean": 4,
    "std": 3,
    "std_mean": 4,
    "cumsum": 1,
    "cumprod": 1,
    "norm": 2,
    "linalg_vector_norm": 2,
    "_adaptive_avg_pool2d": 1,
    "_adaptive_avg_pool3d": 1,
    "adaptive_max_pool2d": 1,
    "adaptive_max_pool3d": 1,
    "col2im": 1,
    # losses: a difference, a function of it, a sum
    **dict.fromkeys(("mse_loss", "smooth_l1_loss", "huber_loss", "soft_margin_loss"), 3),
    **dict.fromkeys(("binary_cross_entropy", "binary_cross_entropy_with_logits"), 3),
}
# FLOPs for each element of the output: products with neighbours, and their sum
_PER_ELEMENT_WRITTEN = {
    "upsample_linear1d": 3,
    "upsample_bilinear2d": 7,
    "upsample_trilinear3d": 15,
    "upsample_bicubic2d": 31,
}
# data is moved, nothing is computed
_MOVES = {
    *("cat", "stack", "clone", "copy_", "_to_copy", "contiguous", "fill_", "zero_", "zeros"),
    *("zeros_like", "ones", "ones_like", "full", "full_like", "index", "index_select", "gather"),
    *("embedding", "slice_scatter", "select_scatter", "scatter", "constant_pad_nd", "roll"),
    *("repeat", "flip", "arange", "pixel_shuffle", "channel_shuffle", "im2col", "new_zeros"),
    *("index_put_", "masked_fill", "where", "tril", "triu", "one_hot", "new_ones", "take"),
    *("reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d"),
    *("replication_pad2d", "replication_pad3d", "upsample_nearest1d", "upsample_nearest2d"),
    *("upsample_nearest3d", "scalar_tensor", "resize_", "set_", "index_copy", "index_copy_"),
    *("scatter_", "rand", "randn", "randint", "new_full", "rand_like", "randn_like", "eye"),
    *("bernoulli_", "normal_", "uniform_", "random_", "exponential_", "linspace", "randperm"),
    *("index_put", "index_fill", "index_fill_", "masked_fill_", "masked_scatter", "sort"),
    *("masked_scatter_", "pixel_unshuffle", "block_diag", "diagonal_scatter", "diag_embed"),
    *("bucketize", "searchsorted", "tril_", "triu_", "repeat_interleave"),
}
# one sum per input element
_ADD_IN = {"index_add", "index_add_", "scatter_add", "scatter_add_"}
_ADD_IN |= {"scatter_reduce", "scatter_reduce_"}
# each element of the output is made of one of each input, and torch gives them no tag
_ELEMENT_WISE = {"hardswish", "hardswish_", "glu", "log_sigmoid_forward", "_prelu_kernel"}
_ELEMENT_WISE |= {"rrelu_with_noise", "rrelu_with_noise_", "polar"}
_ELEMENT_WISE |= {f"fake_quantize_per_{of}_affine_cachemask" for of in ("tensor", "channel")}


def is_element_wise(func: Any) -> bool:
    """Whether each element of the output is made of one of each input."""
    return torch.Tag.pointwise in func.tags or _name(func) in _ELEMENT_WISE


def conv_linear_flops(func: Any, args: Any, kwargs: Any, out: Any) -> int | None:
    """Return FLOPs as ``torch.utils.flop_counter`` counts them; None for what it does not.

    It leaves out the CPU's kernel of attention, recurrent layers that are one operator, and
    products with vectors or in place; those are counted here as their other forms are.
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
    if name in ("addr", "addr_"):
        return 2 * args[1].numel() * args[2].numel()
    if name == "_trilinear":  # nn.Bilinear's: all dimensions, before any is summed over
        sizes = torch.broadcast_shapes(*(_expanded(args[i], args[3 + i]) for i in range(3)))
        return 2 * math.prod(sizes)
    packet = func._overloadpacket
    if name in ("addmm_", "baddbmm_"):
        packet = getattr(torch.ops.aten, name.rstrip("_"))
    formula = flop_registry.get(packet)
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
    if name.startswith(("avg_pool", "max_pool")):
        return first.numel() * _window(args[1], int(name.partition("d")[0][-1]))
    if name in _PER_ELEMENT_READ:
        return _PER_ELEMENT_READ[name] * args[0].numel()
    if name in _PER_ELEMENT_WRITTEN:
        return _PER_ELEMENT_WRITTEN[name] * first.numel()
    if name in ("nll_loss_forward", "nll_loss2d_forward"):  # a product with a weight, a sum
        return 2 * args[1].numel()
    if name.startswith("_embedding_bag"):
        return args[1].numel() * args[0].shape[1]
    if name in _ADD_IN:
        return args[2].numel() * _slice_of(name, args)
    if name == "_cdist_forward":  # a difference, a power, a sum
        return 3 * first.numel() * args[0].shape[-1]
    if name.startswith("_fft_"):
        return _fft(name, args[0], first, args[1])
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


def _expanded(tensor: Tensor, places: list[int]) -> list[int]:
    """Return a tensor's sizes with ones in the places that an operator adds."""
    sizes = list(tensor.shape)
    for place in sorted(places):
        sizes.insert(place, 1)
    return sizes


def _slice_of(name: str, args: Any) -> int:
    """Return how many elements one index stands for."""
    if name.startswith("scatter") or not args[0].dim():
        return 1
    return args[0].numel() // max(1, args[0].shape[args[1]])


def _fft(name: str, x: Tensor, out: Tensor, dims: list[int]) -> int:
    """Return 5 n log2 n for each complex transform of n numbers, half of it for one of reals."""
    whole = out if name == "_fft_c2r" else x  # the other side has half of the numbers
    points = math.prod(whole.shape[dim] for dim in dims)
    flops = 5 * whole.numel() * math.log2(max(1, points))
    return round(flops if name == "_fft_c2c" else flops / 2)


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
