"""The laws say what was published, agree with each other, bend the right way, and never pass for a measurement."""

import itertools
import math

import pytest

from farflung.protocol.errors import ConfigError
from farflung.sim.scaling_laws import (
    Estimate,
    final_loss,
    final_loss_single_law,
    loss_after,
    tokens_range,
    tokens_to_loss,
    tuned_batch_tokens,
    tuned_learning_rate,
)

SIZES = (35e6, 180e6, 550e6, 1.3e9, 2.4e9, 10e9)


@pytest.mark.parametrize("members", [1, 2, 4, 8])
@pytest.mark.parametrize("params", SIZES)
def test_two_published_fits_of_one_experiment_agree(params, members):
    """The joint law and the law at this M were fitted separately: a slip in a digit would tear them apart."""
    joint, single = final_loss(params=params, members=members), final_loss_single_law(params=params, members=members)
    assert joint.value == pytest.approx(single.value, rel=0.015)
    assert not joint.caveats + single.caveats


@pytest.mark.parametrize("params", SIZES)
def test_data_parallel_training_is_a_little_better_than_many_members(params):
    parallel = final_loss(params=params, training="data_parallel").value
    eight = final_loss(params=params, members=8).value
    assert parallel == pytest.approx(math.exp(math.log(18.129) - 0.0953 * math.log(params)), rel=1e-12)
    assert parallel < eight < 1.06 * parallel
    assert final_loss(params=params, members=7, training="data_parallel").value == parallel


def test_the_laws_on_paper():
    """By hand, in logarithms: one billion parameters, four members."""
    assert final_loss(params=1e9, members=4).value == pytest.approx(
        10 ** (1.283889 - 9 * 0.0985 + 0.0116 * 0.60206), 1e-5
    )
    assert final_loss_single_law(params=1e9, members=4).value == pytest.approx(10 ** (1.295831 - 9 * 0.0992), 1e-5)
    assert tuned_batch_tokens(params=1e9, members=4).value == pytest.approx(
        10 ** (1.161997 + 9 * 0.4695 + 0.3399 * 0.60206), 1e-5
    )
    assert tuned_learning_rate(params=1e9, members=4).value == pytest.approx(
        10 ** (4.347447 - 9 * 0.8827 + 0.2929 * 0.60206), 1e-5
    )


def test_hoffmanns_curve_meets_the_law_at_the_budget_and_is_never_rescaled_by_much():
    for params in SIZES:
        at_budget = loss_after(params=params, tokens=20 * params, members=4)
        assert at_budget.value == pytest.approx(final_loss(params=params, members=4).value, rel=1e-12)
        unscaled = 1.69 + 406.4 / params**0.34 + 410.7 / (20 * params) ** 0.28
        assert 0.8 < at_budget.value / unscaled < 1  # two labs, two data sets, two tokenisers
        assert at_budget.caveats == ()


def test_the_curve_over_tokens_keeps_hoffmanns_ratios():
    params = 1e9
    early, late = (loss_after(params=params, tokens=tokens).value for tokens in (4e9, 40e9))

    def hoffmann(tokens):
        return 1.69 + 406.4 / params**0.34 + 410.7 / tokens**0.28

    assert early / late == pytest.approx(hoffmann(4e9) / hoffmann(40e9), rel=1e-12)


@pytest.mark.parametrize("members", [1, 5, 40])
def test_more_tokens_bigger_models_and_fewer_members_lose_less(members):
    over_tokens = [loss_after(params=1e9, tokens=20e9 * 10**power, members=members).value for power in (-2, -1, 0, 1)]
    assert over_tokens == sorted(over_tokens, reverse=True)
    over_size = [final_loss(params=10**power, members=members).value for power in range(7, 13)]
    assert over_size == sorted(over_size, reverse=True)
    over_members = [final_loss(params=1e9, members=count).value for count in range(1, 100)]
    assert all(few < many for few, many in itertools.pairwise(over_members))


@pytest.mark.parametrize("params", [1e7, 35e6, 1e9, 1e11])
@pytest.mark.parametrize("share", [0.03, 0.5, 1.0, 30.0])
@pytest.mark.parametrize("training", ["diloco", "data_parallel"])
def test_tokens_to_a_loss_is_the_inverse_of_the_loss_after_tokens(params, share, training):
    tokens = max(1e7, share * 20 * params)
    loss = loss_after(params=params, tokens=tokens, members=3, training=training)
    back = tokens_to_loss(params=params, loss=loss.value, members=3, training=training)
    assert back.value == pytest.approx(tokens, rel=1e-6)
    assert back.source == loss.source


def test_the_ends_of_the_range_are_in_it():
    for params in (1e7, 1e9, 1e12):
        for tokens in tokens_range(params=params):
            loss = loss_after(params=params, tokens=tokens, members=2)
            assert 1 < loss.value < math.log(50_000)  # better than guessing among the tokens of a vocabulary
            assert tokens_to_loss(params=params, loss=loss.value, members=2).value == pytest.approx(tokens, rel=1e-6)


def test_an_estimate_says_that_it_is_one_and_why_to_doubt_it():
    plain = final_loss(params=1e9, members=2)
    assert plain.is_estimate
    assert str(plain).startswith("~")
    assert "2503.09799" in str(plain)
    far = loss_after(params=1e11, tokens=1e10, members=40)
    assert len(far.caveats) == 4
    for words in ("100B", "40 members", "higher", "0.005 times", "2203.15556"):
        assert words in str(far), words
    assert final_loss(params=1e9, members=40, training="data_parallel").caveats == ()
    with pytest.raises(AttributeError):
        plain.is_estimate = False
    assert Estimate(1.0, "x").is_estimate


@pytest.mark.parametrize(
    "ask",
    [
        lambda: final_loss(params=3e5),
        lambda: final_loss(params=2e12),
        lambda: final_loss(params=math.nan),
        lambda: final_loss(params=1e9, members=0),
        lambda: final_loss(params=1e9, members=1.5),
        lambda: final_loss(params=1e9, members=2000),
        lambda: final_loss(params=1e9, training="fedavg"),
        lambda: final_loss_single_law(params=1e9, members=3),
        lambda: loss_after(params=1e9, tokens=0),
        lambda: loss_after(params=1e9, tokens=1e15),
        lambda: loss_after(params=1e9, tokens=math.nan),
        lambda: tokens_to_loss(params=1e9, loss=1.0),
        lambda: tokens_to_loss(params=1e9, loss=20.0),
        lambda: tokens_to_loss(params=1e9, loss=math.nan),
        lambda: tokens_range(params=1.0),
        lambda: tuned_batch_tokens(params=1e9, members=-1),
        lambda: tuned_learning_rate(params=0, members=1),
    ],
)
def test_what_no_law_reaches_is_refused(ask):
    with pytest.raises(ConfigError):
        ask()
