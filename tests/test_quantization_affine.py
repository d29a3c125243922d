"""Grids and integer kernels against float64, brute force, torch's kernels and ONNX's own tests."""

import importlib
import itertools
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from dlhelpers.quantization import Affine, choose_affine, dequantize, quantize
from dlhelpers.quantization.kernels import (
    conv_accumulate,
    fixed_point,
    linear_accumulate,
    requantize,
)

OPERATORS = [
    "QuantizeLinear",
    "DequantizeLinear",
    "DynamicQuantizeLinear",
    "QLinearConv",
    "QLinearMatMul",
    "ConvInteger",
    "MatMulInteger",
]
WHOLE = {f"{sign}int{bits}" for sign in ("", "u") for bits in (2, 4, 8, 16, 32)}


def drawn(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def grid(scale, zero, signed=False):
    low, high = (-128, 127) if signed else (0, 255)
    return Affine(torch.tensor(scale), torch.tensor(zero, dtype=torch.int32), low, high)


ranges = st.tuples(
    st.floats(-1e6, 1e6, allow_nan=False, width=32), st.floats(-1e6, 1e6, width=32)
).map(sorted)


@settings(deadline=None)
@given(
    ends=ranges,
    bits=st.integers(2, 16),
    signed=st.booleans(),
    symmetric=st.booleans(),
    narrow=st.booleans(),
)
def test_zero_is_exact_and_the_error_is_half_a_step_inside(ends, bits, signed, symmetric, narrow):
    affine = choose_affine(
        tuple(ends), bits=bits, signed=signed, symmetric=symmetric, narrow=narrow
    )
    assert dequantize(quantize(torch.zeros(1), affine), affine).item() == 0
    x = torch.linspace(min(ends[0], 0), max(ends[1], 0), 101)
    q = quantize(x, affine)
    assert affine.qmin <= q.min()
    assert q.max() <= affine.qmax
    step = affine.scale.double()
    # half a step inside; at the ends the zero point's own rounding costs as much again
    bound = step * (1.0 + 1e-3) + 1e-6 * x.abs().max()
    assert (dequantize(q, affine).double() - x.double()).abs().max() <= bound
    inside = (x >= affine.low) & (x <= affine.high)
    error = (dequantize(q, affine).double() - x.double()).abs()[inside]
    assert not len(error) or error.max() <= 0.5001 * step + 1e-6 * x.abs().max()


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("ends", [(-1.3, 4.7), (0.0, 6.0), (-3.0, -1.0), (2.0, 3.0)])
def test_the_asymmetric_grid_is_torchs_observers(ends, signed):
    from torch.ao.quantization.observer import MinMaxObserver

    dtype = torch.qint8 if signed else torch.quint8
    observer = MinMaxObserver(dtype=dtype, qscheme=torch.per_tensor_affine)
    observer(torch.tensor(ends))
    scale, zero_point = observer.calculate_qparams()
    affine = choose_affine(ends, signed=signed)
    assert affine.scale.item() == pytest.approx(scale.item(), rel=1e-6)
    assert affine.zero_point.item() == zero_point.item()


def test_the_grid_is_onnx_runtimes():
    quant = pytest.importorskip("onnxruntime.quantization.quant_utils")
    import numpy as np

    low, high = np.float32(-1.3), np.float32(4.7)
    zero, scale = quant.compute_scale_zp(low, high, np.int8(-127), np.int8(127), symmetric=True)
    affine = choose_affine((low, high), symmetric=True)
    assert affine.scale.item() == pytest.approx(float(scale), rel=1e-6)
    assert affine.zero_point.item() == int(zero)
    zero, scale = quant.compute_scale_zp(low, high, np.uint8(0), np.uint8(255))
    affine = choose_affine((low, high), signed=False)
    assert affine.scale.item() == pytest.approx(float(scale), rel=1e-6)
    assert affine.zero_point.item() == int(zero)


@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("signed", [True, False])
def test_integers_are_torchs_to_the_last_bit(axis, signed):
    dtype = torch.qint8 if signed else torch.quint8
    for seed in range(20):
        x = drawn(6, 5, 3, seed=seed, scale=3.0)
        affine = choose_affine(x, signed=signed, axis=axis)
        if axis is None:
            theirs = torch.quantize_per_tensor(
                x, affine.scale.item(), affine.zero_point.item(), dtype
            )
        else:
            theirs = torch.quantize_per_channel(
                x, affine.scale.double(), affine.zero_point.long(), axis, dtype
            )
        assert torch.equal(quantize(x, affine, kernel="torch"), theirs.int_repr())
        assert torch.equal(dequantize(theirs.int_repr(), affine), theirs.dequantize())


def test_groups_are_a_loop_over_groups():
    x = drawn(4, 12)
    affine = choose_affine(x, bits=4, symmetric=True, group_size=3)
    together = dequantize(quantize(x, affine), affine)
    for row, group in itertools.product(range(4), range(4)):
        part = x[row, 3 * group : 3 * group + 3]
        alone = choose_affine(part, bits=4, symmetric=True)
        wanted = dequantize(quantize(part, alone), alone)
        assert torch.equal(together[row, 3 * group : 3 * group + 3], wanted)


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_the_ratio_follows_the_textbook_formula(bits):
    """SQNR = 6.02 b + 4.77 - 20 log10(max / rms)."""
    x = drawn(200_000).double()
    affine = choose_affine(x, bits=bits, symmetric=True)
    error = dequantize(quantize(x, affine), affine).double() - x
    found = 10 * torch.log10(x.square().mean() / error.square().mean())
    # 2^b - 2 steps in place of 2^b
    steps = 20 * torch.log10(torch.tensor((2**bits - 2) / 2**bits))
    wanted = 6.02 * bits + 4.77 - 20 * torch.log10(x.abs().max() / x.square().mean().sqrt()) + steps
    assert found == pytest.approx(wanted.item(), abs=0.2)


def test_a_symmetric_full_range_uses_the_least_integer():
    affine = choose_affine((-1.0, 1.0), symmetric=True, narrow=False)
    assert quantize(torch.tensor([-1.001, 1.0]), affine).tolist() == [-128, 127]
    assert affine.scale.item() == pytest.approx(1 / 127.5)


def test_values_beyond_the_range_are_clipped_infinity_too():
    affine = choose_affine((0.0, 1.0), signed=False)
    assert quantize(torch.tensor([-5.0, 5.0, torch.inf, -torch.inf]), affine).tolist() == [
        0,
        255,
        255,
        0,
    ]


@pytest.mark.parametrize("x", [torch.zeros(4), torch.full((4,), 1e-42)])
def test_a_range_of_nothing_has_a_finite_step(x):
    affine = choose_affine(x)
    assert torch.isfinite(1 / affine.scale)
    assert dequantize(quantize(x, affine), affine).abs().max() < 1e-30


@pytest.mark.parametrize(
    ("arguments", "options", "says"),
    [
        ((torch.ones(3),), {"bits": 1}, "bits must lie between 2 and 16, got 1"),
        ((torch.tensor([1.0, torch.nan]),), {}, "finite"),
        ((torch.empty(0),), {}, "no values"),
        ((torch.ones(3, dtype=torch.int32),), {}, "torch.int32"),
        (((2.0, 1.0),), {}, "low=2.0 lies above high=1.0"),
        ((torch.ones(2, 5),), {"group_size": 2}, "group_size=2 does not divide"),
        ((torch.ones(2, 4),), {"group_size": 2, "axis": 0}, "not both"),
        ((torch.ones(2, 4),), {"axis": 2}, "axis=2 is no dimension"),
        (((0.0, 1.0),), {"axis": 0}, "neither axis nor groups"),
    ],
)
def test_bad_ranges_are_named(arguments, options, says):
    with pytest.raises(ValueError, match=says.replace("(", r"\(")):
        choose_affine(*arguments, **options)


def test_nan_and_other_channels_are_named():
    affine = choose_affine(torch.ones(3, 2), axis=0)
    with pytest.raises(ValueError, match="NaN has no integer"):
        quantize(torch.full((3, 2), torch.nan), affine)
    with pytest.raises(ValueError, match=r"3 scales along dimension 0 do not fit .*\[4, 2\]"):
        quantize(torch.ones(4, 2), affine)
    with pytest.raises(ValueError, match="groups of 2"):
        quantize(torch.ones(3, 6), choose_affine(torch.ones(3, 4), group_size=2))


@settings(max_examples=40, deadline=None)
@given(
    channels=st.integers(1, 4),
    outputs=st.integers(1, 4),
    groups=st.integers(1, 3),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.integers(0, 2),
    dims=st.integers(1, 3),
    x_zero=st.integers(0, 255),
    seed=st.integers(0, 1000),
)
def test_accumulators_are_the_integers_own(
    channels, outputs, groups, kernel, stride, padding, dims, x_zero, seed
):
    generator = torch.Generator().manual_seed(seed)
    sides = (6, 5, 4)[:dims]
    qx = torch.randint(0, 256, (2, channels * groups, *sides), generator=generator)
    qw = torch.randint(
        -128, 128, (outputs * groups, channels, *[kernel] * dims), generator=generator
    )
    w_zero = torch.randint(-5, 5, (outputs * groups,), generator=generator)
    if any(side + 2 * padding < kernel for side in sides):
        return
    options = {"stride": stride, "padding": padding, "groups": groups}
    found = conv_accumulate(qx, qw, x_zero=x_zero, w_zero=w_zero, **options)
    # int64 convolution is torch's own loop over integers
    convolve = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    moved = qw - w_zero.view(-1, *[1] * (dims + 1))
    padded = F.pad(qx - x_zero, [padding] * (2 * dims))
    wanted = convolve(padded.double(), moved.double(), stride=stride, groups=groups).long()
    assert torch.equal(found.long(), wanted)
    assert found.dtype == torch.int32
    # the whole sum by hand, with the four terms of the module's docstring, at one output
    if dims == 1 and groups == 1 and padding == 0:
        window, rows = qx[0, :, :kernel], qw[0]
        n = rows.numel()
        terms = (
            (window * rows).sum()
            - w_zero[0] * window.sum()
            - x_zero * rows.sum()
            + n * x_zero * w_zero[0]
        )
        assert found[0, 0, 0] == terms


def test_an_accumulator_beyond_int32_is_an_error():
    with pytest.raises(OverflowError, match="beyond int32"):
        linear_accumulate(torch.full((1, 40_000), 255), torch.full((1, 40_000), 255))
    with pytest.raises(ValueError, match="3 to 5 dimensions"):
        conv_accumulate(torch.ones(2, 2), torch.ones(2, 2))


ROUNDING = {"qnnpack": ("qnnpack",), "onednn": ("onednn",), "fbgemm": ("fbgemm",)}
# x86 takes one of two by the layer and the processor
ROUNDING["x86"] = ("fbgemm", "onednn")


@pytest.fixture
def engine(request):
    if request.param not in torch.backends.quantized.supported_engines:
        pytest.skip(f"this build of torch has no engine {request.param}")
    kept = torch.backends.quantized.engine
    torch.backends.quantized.engine = request.param
    yield request.param
    torch.backends.quantized.engine = kept


def ties(seed, linear):
    """Scales that are powers of two: many sums lie in the middle between two integers."""
    generator = torch.Generator().manual_seed(seed)
    shape = (5, 36) if linear else (2, 4, 7, 7)
    qx = torch.randint(0, 128, shape, generator=generator, dtype=torch.uint8)
    w_shape = (16, 36) if linear else (16, 4, 3, 3)
    qw = torch.randint(-9, 9, w_shape, generator=generator, dtype=torch.int8)
    bias = torch.randint(-100, 100, (16,), generator=generator).float() / 64
    return qx, qw, bias, 1 / 8, 1 / 8, 8.0


def random_scales(seed, linear):
    qx, qw, _, *_ = ties(seed, linear)
    return qx, qw, drawn(16, seed=seed), 0.0213 + seed * 1e-4, 0.0071, 0.37


@pytest.mark.parametrize("zero", [10, 11])
@pytest.mark.parametrize("make", [ties, random_scales])
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("engine", list(ROUNDING), indirect=True)
def test_an_integer_layer_is_torchs_kernel_to_the_last_bit(engine, linear, make, zero):
    exact = dict.fromkeys(ROUNDING[engine], True)
    most = 0
    for seed in range(12):
        qx, qw, bias, sx, sw, sy = make(seed, linear)
        x = torch._make_per_tensor_quantized_tensor(qx, sx, 5)
        w = torch._make_per_tensor_quantized_tensor(qw, sw, 0)
        if linear:
            packed = torch.ops.quantized.linear_prepack(w, bias)
            theirs = torch.ops.quantized.linear(x, packed, sy, zero).int_repr()
            sums = linear_accumulate(qx, qw, x_zero=5)
        else:
            packed = torch.ops.quantized.conv2d_prepack(w, bias, [1, 1], [1, 1], [1, 1], 1)
            theirs = torch.ops.quantized.conv2d(x, packed, sy, zero).int_repr()
            sums = conv_accumulate(qx, qw, x_zero=5, padding=1)
        options = {"bias": bias, "channel": -1 if linear else 1}
        for kernel in exact:
            ours = requantize(sums, sx, sw, grid(sy, zero), kernel=kernel, **options)
            exact[kernel] &= torch.equal(ours, theirs)
        fixed = requantize(sums, sx, sw, grid(sy, zero), kernel="fixed point", **options)
        most = max(most, (fixed.int() - theirs.int()).abs().max().item())
    assert any(exact.values())
    assert most <= 1


def test_kernels_differ_in_ties_alone():
    one, odd = grid(1.0, 0, signed=True), grid(1.0, 1, signed=True)
    sums = torch.tensor([[-3, -1, 1, 3]])

    def rounded(kernel, output):
        found = requantize(sums, 0.5, 1.0, output, kernel=kernel)
        return (found.int() - output.zero_point).flatten().tolist()

    # -1.5, -0.5, 0.5, 1.5: to even; to even with Z inside; up
    assert rounded("onnx", one) == [-2, 0, 0, 2]
    assert rounded("onednn", one) == [-2, 0, 0, 2]
    assert rounded("onednn", odd) == [-1, -1, 1, 1]
    assert rounded("fixed point", one) == [-1, 0, 1, 2]


@settings(deadline=None)
@given(value=st.integers(-(2**31), 2**31 - 1), multiplier=st.floats(1e-9, 0.999))
def test_the_fixed_point_multiplier_is_the_rounded_product(value, multiplier):
    """Against whole numbers of any size, as the paper's two rounded steps."""
    m0, n = fixed_point(multiplier)
    assert 2**30 <= m0 < 2**31
    assert Fraction(m0, 2**31) * Fraction(1, 2**n) == pytest.approx(multiplier, rel=1e-9)
    high = (value * m0 + 2**30) // 2**31
    right = min(n, 31)
    down, rest = high >> right, high & ((1 << right) - 1)
    wanted = down + (rest > ((1 << right) - 1 >> 1) + (high < 0))
    wide = Affine(torch.tensor(1.0), torch.tensor(0, dtype=torch.int32), -(2**31), 2**31 - 1)
    found = requantize(
        torch.tensor([[value]], dtype=torch.int32),
        float(torch.tensor(multiplier)),
        1.0,
        wide,
        kernel="fixed point",
    )
    m0_single, n_single = fixed_point(float(torch.tensor(multiplier)))
    if (m0_single, n_single) == (m0, n):
        assert found.item() == wanted
    assert abs(found.item() - value * multiplier) <= 1 + abs(value) * 1e-7


def test_bad_kernels_and_outputs_are_named():
    sums = torch.zeros(1, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match="kernel='gemmlowp' is not one of"):
        requantize(sums, 1.0, 1.0, grid(1.0, 0), kernel="gemmlowp")
    with pytest.raises(ValueError, match="one scale"):
        requantize(sums, 1.0, 1.0, choose_affine(torch.ones(2, 2), axis=0))
    for multiplier in (0.0, -1.0, float("inf")):
        with pytest.raises(ValueError, match="positive and finite"):
            fixed_point(multiplier)


def as_array(value):
    import onnx

    return onnx.numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value


def onnx_cases():
    """ONNX's own cases of whole numbers: name -> (operator, attributes, inputs, outputs)."""
    node = pytest.importorskip("onnx.backend.test.case.node")
    import onnx

    found = {}
    for operator in OPERATORS:
        importlib.import_module(f"onnx.backend.test.case.node.{operator.lower()}")
    for case in node._NodeTestCases:
        inner = case.model.graph.node
        if len(inner) != 1 or inner[0].op_type not in OPERATORS:
            continue
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in inner[0].attribute}
        ((inputs, outputs),) = (
            [[as_array(a) for a in part] for part in parts] for parts in case.data_sets
        )
        kinds = {str(a.dtype) for a in (*inputs, *outputs)}
        if kinds <= WHOLE | {"float32"}:
            found[case.name] = (inner[0].op_type, attributes, inputs, outputs)
    return found


def tensors(arrays):
    kinds = ["int64" if "int" in str(a.dtype) else "float32" for a in arrays]
    return [torch.tensor(a.astype(kind)) for a, kind in zip(arrays, kinds, strict=True)]


def of_type(array, scale, zero, **options):
    """The grid of an ONNX tensor's type."""
    import ml_dtypes

    info = ml_dtypes.iinfo(array.dtype)
    return Affine(scale, zero.int(), int(info.min), int(info.max), **options)


def run_quantize(attributes, inputs, outputs):
    x, scale, *zero = tensors(inputs)
    zero = zero[0] if zero else torch.zeros_like(scale)
    axis = attributes.get("axis", 1)
    block = attributes.get("block_size", 0)
    if block:
        x, scale, zero = (t.movedim(axis, -1) for t in (x, scale, zero))
        grid_of = of_type(outputs[0], scale, zero, group_size=block)
        return [quantize(x, grid_of).movedim(-1, axis)]
    return [quantize(x, of_type(outputs[0], scale, zero, axis=axis if scale.dim() else None))]


def run_dequantize(attributes, inputs, outputs):
    q, scale, *zero = tensors(inputs)
    zero = zero[0] if zero else torch.zeros_like(scale)
    axis = attributes.get("axis", 1)
    block = attributes.get("block_size", 0)
    if block:
        q, scale, zero = (t.movedim(axis, -1) for t in (q, scale, zero))
        return [dequantize(q, of_type(inputs[0], scale, zero, group_size=block)).movedim(-1, axis)]
    return [dequantize(q, of_type(inputs[0], scale, zero, axis=axis if scale.dim() else None))]


def run_dynamic(attributes, inputs, outputs):
    (x,) = tensors(inputs)
    affine = choose_affine(x, signed=False)
    return [quantize(x, affine), affine.scale, affine.zero_point]


def conv_options(attributes, kernel):
    pads = attributes.get("pads", [0] * 2 * (kernel.dim() - 2))
    half = len(pads) // 2
    assert pads[:half] == pads[half:]
    return {"padding": tuple(pads[:half]), "groups": attributes.get("group", 1)}


def run_qlinear_conv(attributes, inputs, outputs):
    x, sx, zx, w, sw, zw, sy, zy = tensors(inputs)
    sums = conv_accumulate(x, w, x_zero=int(zx), w_zero=zw, **conv_options(attributes, w))
    return [requantize(sums, sx, sw, of_type(outputs[0], sy, zy))]


def run_conv_integer(attributes, inputs, outputs):
    x, w, zx, *zw = tensors(inputs)
    options = conv_options(attributes, w)
    return [conv_accumulate(x, w, x_zero=int(zx), w_zero=zw[0] if zw else 0, **options)]


def products(a, b, za, zb):
    return torch.stack(
        [
            linear_accumulate(left, right.T, x_zero=int(za), w_zero=zb)
            for left, right in zip(
                a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:]), strict=True
            )
        ]
    ).reshape(*a.shape[:-1], b.shape[-1])


def run_qlinear_matmul(attributes, inputs, outputs):
    a, sa, za, b, sb, zb, sy, zy = tensors(inputs)
    return [requantize(products(a, b, za, zb), sa, sb, of_type(outputs[0], sy, zy))]


def run_matmul_integer(attributes, inputs, outputs):
    return [products(*tensors(inputs))]


RUN = dict(
    zip(
        OPERATORS,
        (
            run_quantize,
            run_dequantize,
            run_dynamic,
            run_qlinear_conv,
            run_qlinear_matmul,
            run_conv_integer,
            run_matmul_integer,
        ),
        strict=True,
    )
)


def test_onnx_own_cases_come_out_bit_exact():
    cases = onnx_cases()
    assert {operator for operator, *_ in cases.values()} == set(OPERATORS)
    for name, (operator, attributes, inputs, outputs) in cases.items():
        found = RUN[operator](attributes, inputs, outputs)
        for ours, theirs in zip(found, outputs, strict=True):
            wanted = torch.tensor(theirs.astype("float64"))
            assert torch.equal(ours.double().reshape(wanted.shape), wanted), name


@pytest.mark.parametrize("seed", range(8))
def test_a_second_reference_agrees_on_random_convolutions(seed):
    onnx = pytest.importorskip("onnx")
    import numpy as np
    from onnx.reference import ReferenceEvaluator

    groups = 1 + seed % 2
    qx, qw, bias, sx, _, sy = random_scales(seed, False)
    qw = qw[:, : 4 // groups].contiguous()
    sw = 0.003 + 0.001 * torch.rand(16, generator=torch.Generator().manual_seed(seed))
    whole = torch.round(bias / (torch.tensor(sx) * sw)).int()
    names = ("x", "sx", "zx", "w", "sw", "zw", "sy", "zy", "b")
    fed = dict(
        zip(
            names,
            (
                qx.numpy(),
                np.float32(sx),
                np.uint8(5),
                qw.numpy(),
                sw.numpy(),
                np.zeros(16, np.int8),
                np.float32(sy),
                np.uint8(11),
                whole.numpy(),
            ),
            strict=True,
        )
    )
    make = onnx.helper.make_node("QLinearConv", list(names), ["y"], pads=[1] * 4, group=groups)
    theirs = ReferenceEvaluator(make).run(None, fed)[0]
    sums = conv_accumulate(qx, qw, x_zero=5, padding=1, groups=groups)
    ours = requantize(sums, sx, sw, grid(sy, 11), bias=bias)
    assert (ours.int() - torch.from_numpy(theirs).int()).abs().max() == 0
