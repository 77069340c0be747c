"""Draws: closed-form distributions, and many at once are the same as one by one."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from farflung.protocol.errors import ConfigError
from farflung.sim.draw import KINDS, Draw
from farflung.sim.rng import stream

ONE_OF_EACH = {
    "fixed": (3.0,),
    "uniform": (1.0, 5.0),
    "loguniform": (50.0, 500.0),
    "normal": (10.0, 2.0),
    "lognormal": (4.0, 0.5),
    "exponential": (7.0,),
    "weibull": (0.6, 40.0),
    "choice": (1.0, 2.0, 8.0),
}


def normal_cdf(x: float) -> float:
    return (1 + math.erf(x / math.sqrt(2))) / 2


CDF: dict[str, Callable[[float], float]] = {
    "uniform": lambda x: (x - 1) / 4,
    "loguniform": lambda x: math.log(x / 50) / math.log(10),
    "normal": lambda x: normal_cdf((x - 10) / 2),
    "lognormal": lambda x: normal_cdf(math.log(x / 4) / 0.5),
    "exponential": lambda x: 1 - math.exp(-x / 7),
    "weibull": lambda x: 1 - math.exp(-((x / 40) ** 0.6)),
}


def distance(values: list[float], cdf: Callable[[float], float]) -> float:
    """Kolmogorov's: the largest gap between the empirical and the true distribution."""
    n, ordered = len(values), sorted(values)
    return max(max(abs(cdf(x) - i / n), abs(cdf(x) - (i + 1) / n)) for i, x in enumerate(ordered))


def test_every_kind_is_covered_here():
    assert ONE_OF_EACH.keys() == KINDS.keys()
    assert CDF.keys() == KINDS.keys() - {"fixed", "choice"}


@pytest.mark.parametrize("kind", CDF)
def test_a_draw_follows_its_distribution(kind):
    draw = Draw(kind, ONE_OF_EACH[kind])
    values = draw.sample_many(stream(1, kind), 4000).tolist()
    assert distance(values, CDF[kind]) < 1.95 / math.sqrt(4000)  # a true one is beyond this once in a thousand
    # and the test can fail: a wrong parameter is seen
    assert distance([1.3 * value for value in values], lambda x: min(1.0, CDF[kind](x))) > 1.95 / math.sqrt(4000)


def test_a_choice_takes_each_value_equally_often():
    values = Draw("choice", (1.0, 2.0, 8.0)).sample_many(stream(2), 3000)
    assert [int((values == value).sum()) for value in (1, 2, 8)] == pytest.approx([1000] * 3, abs=110)


@pytest.mark.parametrize("kind", KINDS)
def test_many_at_once_are_the_same_as_one_by_one(kind):
    draw = Draw(kind, ONE_OF_EACH[kind])
    generator = stream(3, kind)
    assert draw.sample_many(stream(3, kind), 40).tolist() == [draw.sample(generator) for _ in range(40)]


def test_a_fixed_number_takes_nothing_from_the_stream():
    used, fresh = stream(4), stream(4)
    assert Draw.fixed(2).sample(used) == 2.0
    assert Draw.fixed(2).sample_many(used, 9).tolist() == [2.0] * 9
    assert used.random() == fresh.random()
    assert Draw.fixed(2).is_fixed
    assert not Draw("uniform", (1.0, 1.0)).is_fixed


def test_nothing_below_zero_is_drawn():
    values = Draw("normal", (0.1, 1.0)).sample_many(stream(5), 1000)
    assert values.min() == 0.0
    assert np.isfinite(values).all()


@pytest.mark.parametrize(
    ("kind", "numbers", "got"),
    [
        ("zipf", (1.0,), "'zipf'"),
        ("uniform", (1.0,), "[1.0]"),
        ("uniform", (2.0, 1.0), "[2.0, 1.0]"),
        ("loguniform", (0.0, 1.0), "[0.0, 1.0]"),
        ("exponential", (-1.0,), "[-1.0]"),
        ("normal", (math.nan, 1.0), "[nan, 1.0]"),
        ("choice", (), "[]"),
    ],
)
def test_an_impossible_draw_is_refused(kind, numbers, got):
    with pytest.raises(ConfigError) as error:
        Draw(kind, numbers)
    assert str(error.value).endswith(got)


def test_a_draw_reads_as_text():
    assert str(Draw.fixed(100)) == "100"
    assert str(Draw("loguniform", (50.0, 500.0))) == "loguniform(50, 500)"
