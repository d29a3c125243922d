import math

import numpy as np
import pytest

from dlhelpers.course import data
from dlhelpers.shufflenet import (
    LatencyFormula,
    fit_latency,
    fit_power_law,
    held_out_error,
    predict_latency,
)
from dlhelpers.shufflenet.latency import CPUS

FILES = {"i9": "i9-10940X", "i7": "i7-12700H"}


def some_models(count=60, seed=0):
    rng = np.random.default_rng(seed)
    return rng.uniform(1e8, 1e10, count), rng.uniform(1e6, 5e7, count), rng.uniform(1e6, 1e8, count)


@pytest.mark.parametrize("reuse", [0.0, 0.8])
def test_a_fit_finds_the_coefficients_that_made_the_times(reuse):
    true = LatencyFormula(2.0, 0.5, 0.2, 1.5, reuse)
    models = some_models()
    found = fit_latency(*models, true.predict_s(*models))
    for name, value in vars(true).items():
        assert getattr(found, name) == pytest.approx(value, abs=1e-6)


def test_a_few_wild_times_do_not_move_the_fit():
    true = LatencyFormula(2.0, 0.5, 0.2, 1.5, 0.8)
    models = some_models()
    seconds = true.predict_s(*models)
    seconds[::10] *= 7
    found = fit_latency(*models, seconds)
    assert found.activations_ms == pytest.approx(0.5, rel=1e-4)


def test_no_coefficient_is_negative():
    models = some_models()
    falling = 1 / models[0]  # more work, less time: no sum of costs
    found = fit_latency(*models, falling / falling.mean())
    assert min(vars(found).values()) >= 0


def test_the_formula_is_computed_as_it_reads():
    formula = LatencyFormula(2.0, 0.5, 0.2, 1.0, 3.0)
    assert str(formula) == "t/ms = 2 G + 0.5 A + 0.2 P + 3 G sqrt(G/A) + 1"
    ms = 2 * 4 + 0.5 * 1 + 0.2 * 5 + 3 * 4 * 2 + 1
    assert formula.predict_s(4e9, 1e6, 5e6) == pytest.approx(ms / 1e3)
    both = formula.predict_s([4e9, 0], [1e6, 0], [5e6, 0])
    assert both.tolist() == pytest.approx([ms / 1e3, 1e-3])


@pytest.mark.parametrize("bad", [(-1, 1, 1), (1, float("nan"), 1), (1, 1, -5)])
def test_numbers_that_are_none_are_named(bad):
    with pytest.raises(ValueError, match="must be numbers, 0 or more"):
        predict_latency(*bad)


def test_too_few_models_and_other_processors_are_named():
    with pytest.raises(ValueError, match="5 models or more"):
        fit_latency([1e9] * 3, [1e6] * 3, [1e6] * 3, [1e-3] * 3)
    with pytest.raises(ValueError, match="one positive time each"):
        fit_latency([1e9] * 9, [1e6] * 9, [1e6] * 9, [0.0] * 9)
    with pytest.raises(ValueError, match=r"'i9-10940X'.* got 'm1'.* fit_latency"):
        predict_latency(1e9, 1e6, 1e6, cpu="m1")


@pytest.mark.parametrize("cpu", FILES)
def test_the_published_tables_are_read_whole(cpu):
    table = data.published_latencies(cpu)
    assert len(table["model"]) == {"i9": 1434, "i7": 1440}[cpu]  # one row of the i9 is empty
    assert all(len(column) == len(table["model"]) for column in table.values())
    at = table["model"].index("resnet18")
    assert table["params"][at] == pytest.approx(11.69e6)
    assert 0.5e9 < table["multiply_adds"][at] < 2.5e9  # 1.8e9 at 224 pixels, fewer at 160


def test_a_missing_table_says_where_it_lies(monkeypatch, tmp_path):
    monkeypatch.setenv("DLHELPERS_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="DLHELPERS_DATA"):
        data.published_latencies("i9")
    with pytest.raises(ValueError, match="got 'm1'"):
        data.published_latencies("m1")


@pytest.mark.parametrize("cpu", FILES)
def test_the_constants_are_the_fit_of_the_published_table(cpu):
    table = data.published_latencies(cpu)
    columns = (table[name] for name in ("multiply_adds", "activations", "params", "seconds"))
    fitted, kept = vars(fit_latency(*columns)), vars(CPUS[FILES[cpu]])
    assert kept == pytest.approx(fitted, rel=5e-3, abs=1e-6)


NAMES = ("multiply_adds", "activations", "params")


def as_a_law(half):
    return fit_power_law({name: half[name] for name in NAMES}, half["seconds"])


def as_a_sum(half):
    formula = fit_latency(*(half[name] for name in (*NAMES, "seconds")))
    return lambda rest: formula.predict_s(*(rest[name] for name in NAMES))


@pytest.mark.parametrize(
    ("cpu", "at_most"), [("i9", 0.19), pytest.param("i7", 0.091, marks=pytest.mark.slow)]
)
def test_times_add_up_better_than_they_multiply(cpu, at_most):
    table = data.published_latencies(cpu)
    by_law, by_sum = held_out_error(table, as_a_law), held_out_error(table, as_a_sum)
    assert by_sum < at_most
    assert by_sum < 0.8 * by_law


def test_the_error_is_taken_on_families_that_were_not_fitted():
    names = [f"{family}{size}_x" for family in ("res", "vit", "mlp", "net") for size in (1, 2, 3)]
    table = {"model": names, "seconds": [1.0, 2.0, 4.0] * 4}
    seen = []

    def fit(half):
        drawn = set(half["model"].tolist())
        seen.append(sorted({name[:3] for name in drawn}))

        def predict(rest):
            assert len(drawn) == len(rest["model"]) == 6
            assert not drawn & set(rest["model"].tolist())
            return np.full(6, 2.0)  # off by 1, 0 and 1/2 in every family

        return predict

    assert held_out_error(table, fit, splits=8) == 0.5
    assert len({tuple(families) for families in seen}) > 1
    assert all(len(families) == 2 for families in seen)
    with pytest.raises(ValueError, match=r"two families .* got \['vit'\]"):
        held_out_error({"model": ["vit_b", "vit_l"], "seconds": [1.0, 1.0]}, fit)


def test_a_power_law_finds_its_own_exponents():
    g, a, _ = some_models()
    law = fit_power_law({"g": g, "a": a}, 3e-9 * g**0.8 * a**0.3)
    assert law({"g": [1e9], "a": [1e6]})[0] == pytest.approx(3e-9 * 1e9**0.8 * 1e6**0.3)


@pytest.mark.parametrize(
    ("g", "seconds"), [([0.0, 1.0], [1.0, 2.0]), ([1.0, 2.0], [math.nan, 1.0])]
)
def test_a_power_law_refuses_what_has_no_logarithm(g, seconds):
    with pytest.raises(ValueError, match="must be positive numbers, got"):
        fit_power_law({"g": g}, seconds)


def test_a_power_law_does_not_depend_on_the_unit():
    g = [0.2, 0.5, 1.0, 3.0]
    law = fit_power_law({"g": g}, [x**0.7 for x in g])
    assert law({"g": [0.3]})[0] == pytest.approx(0.3**0.7)
