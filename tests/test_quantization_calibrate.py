"""Calibrators against ONNX Runtime's, torch's observers, NumPy's quantiles and brute force."""

import contextlib
import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dlhelpers.quantization import CALIBRATORS, Calibrator, choose_affine, dequantize, quantize
from dlhelpers.quantization.calibrate import split_error
from dlhelpers.quantization.entropy import kl_threshold
from dlhelpers.quantization.histogram import Histogram


def stream(kind, seed=0, n=4000, batches=3):
    rng = np.random.default_rng(seed)
    draw = {
        "gauss": lambda i: rng.standard_normal(n),
        "relu": lambda i: np.maximum(rng.standard_normal(n), 0),
        "laplace": lambda i: rng.laplace(size=n),
        "heavy": lambda i: rng.standard_t(3, size=n),
        "negative": lambda i: -np.abs(rng.standard_normal(n)),
        "growing": lambda i: (1 + 2 * i) * rng.standard_normal(n),
        "shrinking": lambda i: rng.standard_normal(n) / (1 + 2 * i),
        "outlier": lambda i: np.append(rng.standard_normal(n), 40.0 * (i == 1)),
    }[kind]
    return [draw(i).astype("float32") for i in range(batches)]


KINDS = ["gauss", "relu", "laplace", "heavy", "negative", "growing", "shrinking", "outlier"]


def observed(batches, method, **options):
    calibrator = Calibrator(method, **options)
    for batch in batches:
        calibrator.observe(torch.from_numpy(batch))
    return calibrator


def sqnr(x, low, high, bits=8):
    affine = choose_affine((low, high), bits=bits, signed=False)
    y = dequantize(quantize(torch.from_numpy(x), affine), affine).numpy().astype("float64")
    return 10 * np.log10((x.astype("float64") ** 2).mean() / ((x - y) ** 2).mean())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("percentile", [99.0, 99.9, 99.999])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_percentiles_are_onnx_runtimes_within_a_bin(kind, symmetric, percentile, seed):
    calibrate = pytest.importorskip("onnxruntime.quantization.calibrate")
    batches = stream(kind, seed)
    theirs = calibrate.HistogramCollector("percentile", symmetric, 2048, 128, percentile, "same")
    with contextlib.redirect_stdout(io.StringIO()):
        for batch in batches:
            theirs.collect({"x": [batch]})
        wanted = theirs.compute_collection_result()["x"][:2]
    ours = observed(
        batches, "percentile", symmetric=symmetric, percentile=percentile, like="onnxruntime"
    )
    width = float(ours.histogram.edges[1] - ours.histogram.edges[0])
    assert ours.range() == pytest.approx(tuple(map(float, wanted)), abs=1.01 * width)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=[] if kind in ("gauss", "relu", "negative") else pytest.mark.slow)
        for kind in KINDS
    ],
)
def test_entropy_is_onnx_runtimes_within_a_bin(kind):
    calibrate = pytest.importorskip("onnxruntime.quantization.calibrate")
    batches = stream(kind)
    theirs = calibrate.HistogramCollector("entropy", False, 2048, 128, 99.999, "same")
    with contextlib.redirect_stdout(io.StringIO()):
        for batch in batches:
            theirs.collect({"x": [batch]})
        wanted = theirs.compute_collection_result()["x"][:2]
    ours = observed(batches, "entropy", like="onnxruntime")
    width = float(ours.histogram.edges[1] - ours.histogram.edges[0])
    assert ours.range() == pytest.approx(tuple(map(float, wanted)), abs=1.01 * width)


def test_entropy_with_onnx_runtimes_default_bins_is_the_plain_maximum():
    """Of 128 bins around 0 there is one candidate."""
    calibrate = pytest.importorskip("onnxruntime.quantization.calibrate")
    (batch,) = stream("outlier", batches=1)
    theirs = calibrate.HistogramCollector("entropy", False, 128, 128, 99.999, "same")
    with contextlib.redirect_stdout(io.StringIO()):
        theirs.collect({"x": [batch]})
        low, high = theirs.compute_collection_result()["x"][:2]
    assert (float(low), float(high)) == pytest.approx((batch.min(), batch.max()))
    ours = observed([batch], "entropy", bins=128, like="onnxruntime")
    assert ours.range() == pytest.approx((batch.min(), batch.max()))
    assert observed([batch], "entropy", like="onnxruntime").range()[1] < batch.max()


@settings(deadline=None)
@given(seed=st.integers(0, 10_000), parts=st.integers(1, 6))
def test_min_max_does_not_depend_on_how_the_data_are_cut(seed, parts):
    x = np.random.default_rng(seed).standard_normal(600).astype("float32")
    found = observed(np.array_split(x, parts), "min-max").range()
    assert found == (float(x.min()), float(x.max()))
    low, high = observed(np.array_split(x, parts), "min-max", symmetric=True).range()
    assert low == -high == -float(np.abs(x).max())


@pytest.mark.parametrize("momentum", [0.01, 0.1])
def test_the_moving_average_is_torchs(momentum):
    from torch.ao.quantization.observer import MovingAverageMinMaxObserver

    theirs = MovingAverageMinMaxObserver(averaging_constant=momentum)
    batches = stream("growing", batches=6)
    for batch in batches:
        theirs(torch.from_numpy(batch))
    ours = observed(batches, "moving average", momentum=momentum)
    assert ours.range() == pytest.approx((theirs.min_val.item(), theirs.max_val.item()), rel=1e-5)


@pytest.mark.parametrize("kind", ["gauss", "relu", "laplace", "negative"])
@pytest.mark.parametrize("percentile", [95.0, 99.0, 99.9])
def test_percentiles_are_numpys_quantiles(kind, percentile):
    batches = stream(kind)
    x = np.concatenate(batches)
    ours = observed(batches, "percentile", percentile=percentile)
    low, high = ours.range()
    width = float(ours.histogram.edges[1] - ours.histogram.edges[0])

    def is_quantile(found, share):
        """Between its neighbours in order, as in sparse tails they lie far apart."""
        place, ordered = share * (len(x) - 1), np.sort(x)
        first = ordered[max(0, math.floor(place) - 1)]
        last = ordered[min(len(x) - 1, math.ceil(place) + 1)]
        return first - width <= found <= last + width

    tail = 1 - percentile / 100
    if x.min() >= 0:
        assert low == x.min()
        assert is_quantile(high, 1 - tail)
    elif x.max() <= 0:
        assert high == x.max()
        assert is_quantile(low, tail)
    else:
        assert is_quantile(low, tail / 2)
        assert is_quantile(high, 1 - tail / 2)


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("kind", ["gauss", "relu", "laplace", "heavy", "outlier", "negative"])
def test_mse_is_hardly_beaten_by_trying_ranges_on_the_data_themselves(kind, bits):
    batches = stream(kind)
    x = np.concatenate(batches)
    ours = sqnr(x, *observed(batches, "mse", bits=bits).range(), bits=bits)
    shares = np.linspace(0.05, 1, 40)
    tried = [sqnr(x, x.min() * a, x.max() * b, bits) for a in shares for b in shares[::3]]
    assert ours > max(tried) - 0.5
    assert ours > sqnr(x, x.min(), x.max(), bits) - 0.1


def slow_kl(counts):
    """The slide's pseudocode, written out as loops."""
    best, found = math.inf, len(counts)
    for i in range(128, len(counts) + 1):
        p = [float(c) for c in counts[:i]]
        p[-1] += float(sum(counts[i:]))
        q = [0.0] * i
        for level in range(128):
            first, last = level * i // 128, (level + 1) * i // 128
            filled = [j for j in range(first, last) if counts[j]]
            for j in filled:
                q[j] = float(sum(counts[first:last])) / len(filled)
        total_p, total_q = sum(p), sum(q)
        if not total_q:
            continue
        divergence = 0.0
        for a, b in zip(p, q, strict=True):
            if a:
                ratio = a / total_p / (b / total_q) if b else math.inf
                divergence += a / total_p * math.log(ratio)
        if divergence < best:
            best, found = divergence, i
    return min(found + 0.5, len(counts))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), bins=st.integers(128, 300), kind=st.sampled_from(KINDS))
def test_the_slides_algorithm_is_its_pseudocode(seed, bins, kind):
    x = np.abs(stream(kind, seed, n=2000, batches=1)[0])
    counts, _ = np.histogram(x, bins, (0, x.max()))
    assert kl_threshold(counts) == slow_kl(counts)


def test_the_slides_algorithm_fails_behind_a_relu_and_the_repair_mends_it():
    x = np.maximum(np.random.default_rng(0).standard_normal(1_000_000), 0).astype("float32")
    counts, edges = np.histogram(x, 2048, (0, x.max()))
    plain = sqnr(x, 0, x.max())
    spike = sqnr(x, 0, kl_threshold(counts) * edges[1])
    mended = sqnr(x, 0, kl_threshold(counts, repair=True) * edges[1])
    assert spike < plain - 15
    assert mended > plain + 0.5


def test_a_few_filled_bins_do_not_mislead_the_repaired_algorithm():
    """Pixels of few grey levels: P and Q agree on a single bin."""
    pixels = np.repeat(np.arange(17) / 16, 100).astype("float32")
    low, high = observed([pixels], "entropy").range()
    assert low == 0
    assert high > 0.9
    counts, _ = np.histogram(pixels[pixels > 0], 2048, (0, 1))
    assert kl_threshold(counts) < 200


@settings(deadline=None)
@given(seed=st.integers(0, 1000), grow=st.sampled_from(["merge", "append"]))
def test_a_histogram_loses_no_value(seed, grow):
    rng = np.random.default_rng(seed)
    histogram = Histogram(64, grow=grow)
    total = 0
    for _ in range(5):
        batch = rng.standard_normal(50) * 10 ** rng.uniform(-1, 1)
        batch[:5] = 0
        histogram.add(batch)
        total += len(batch)
        assert histogram.full_counts.sum() == total
        assert np.abs(batch).max() <= histogram.edges[-1] * (1 + 1e-12)
    # the bins have one width and lie around 0
    assert np.diff(histogram.edges) == pytest.approx(np.diff(histogram.edges)[0])
    assert histogram.edges[0] == pytest.approx(-histogram.edges[-1])
    if grow == "merge":
        assert len(histogram.counts) == 64


def test_values_stay_in_their_place_when_bins_are_merged():
    histogram = Histogram(64)
    values = np.array([-0.9, -0.2, 0.3, 0.8])
    histogram.add(values)
    histogram.add(np.array([7.0]))
    width = histogram.edges[1] - histogram.edges[0]
    middles = (histogram.edges[:-1] + histogram.edges[1:]) / 2
    found = np.repeat(middles, histogram.counts)
    assert found == pytest.approx([*values, 7.0], abs=width / 2 + 1e-12)


def test_memory_stays_bounded_whatever_comes():
    tiny_first = Histogram(2048, grow="append")
    tiny_first.add(np.array([1e-9]))
    tiny_first.add(np.array([1e9]))
    assert len(tiny_first.counts) <= 2**20
    assert tiny_first.counts.sum() == 2
    assert tiny_first.edges[-1] >= 1e9


@pytest.mark.parametrize("bits", [3, 8])
def test_the_split_adds_up_to_the_true_error(bits):
    x = np.concatenate(stream("gauss", n=50_000)).astype("float64")
    histogram = Histogram(4096)
    histogram.add(x)
    for high in (1.0, 2.0, 3.5):
        affine = choose_affine((-high, high), bits=bits, signed=False)
        y = dequantize(quantize(torch.from_numpy(x), affine), affine).numpy()
        clipping, rounding = split_error(histogram, -high, high, bits=bits)
        assert clipping + rounding == pytest.approx(
            ((x - y) ** 2).mean(), rel=0.12 if bits == 3 else 0.03
        )
        beyond = np.abs(x) > high
        assert clipping == pytest.approx(((np.abs(x) - high)[beyond] ** 2).sum() / len(x), rel=0.01)


@pytest.mark.parametrize("method", CALIBRATORS)
def test_every_range_lies_within_what_was_seen(method):
    for kind in KINDS:
        batches = stream(kind)
        x = np.concatenate(batches)
        low, high = observed(batches, method).range()
        assert x.min() - 1e-6 <= low <= high <= x.max() + 1e-6
        constant = observed([np.full(10, 2.5, "float32")], method).range()
        assert constant == pytest.approx((2.5, 2.5)) or constant == pytest.approx((-2.5, 2.5))
        zeros = observed([np.zeros(10, "float32")], method).range()
        assert zeros == (0, 0)


def test_bad_options_and_values_are_named():
    for options, says in (
        ({"method": "kl"}, "method='kl' is not one of min-max"),
        ({"bins": 64}, "bins must be 256 or more"),
        ({"percentile": 0.999}, "percentile must lie above 50"),
        ({"momentum": 0.0}, "momentum must lie above 0"),
        ({"bits": 1}, "bits must lie between 2 and 16"),
        ({"like": "tensorrt"}, "like must be"),
    ):
        with pytest.raises(ValueError, match=says):
            Calibrator(**options)
    with pytest.raises(ValueError, match="nothing was observed"):
        Calibrator().range()
    with pytest.raises(ValueError, match="not finite"):
        Calibrator().observe(torch.tensor([1.0, torch.inf]))
    with pytest.raises(ValueError, match="128 bins at least, got 100"):
        kl_threshold(np.ones(100))
    with pytest.raises(ValueError, match="even number"):
        Histogram(7)
    calibrator = Calibrator()
    calibrator.observe(torch.empty(0))
    assert not calibrator.has_seen
