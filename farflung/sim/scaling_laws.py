"""Losses of models that nobody trained here: published scaling laws, each answer marked as an estimate.

The laws are those of "Scaling Laws for DiLoCo" (arXiv:2503.09799): evaluation loss in nats per token on C4 after 20
tokens per parameter over all members together, tuned hyperparameters, H = 30, nothing compressed, everybody honest.
Farflung's codecs, rules and other H are not in them: to know their cost, train (fidelity "training").

How the loss falls on the way there is not in that paper. `loss_after` borrows the shape of Hoffmann et al. 2022
(arXiv:2203.15556, §3.3), L(N, D) = E + A / N^a + B / D^b, and scales it so that both laws meet at 20 tokens per
parameter (by 0.83 at 35M parameters to 0.97 at 1B: other data, other tokens). That law is about runs whose learning
rate decays to its end at D tokens; a longer run that passes D is somewhat higher.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from farflung.protocol.errors import ConfigError

TOKENS_PER_PARAM = 20.0
"""The token budget the laws were fitted at (Chinchilla)."""

PARAMS_FITTED = (35e6, 10e9)
"""Fitted up to 2.4e9 and checked at 4e9 and 10e9 by the authors; outside, an answer carries a caveat."""

PARAMS_MAX_RANGE = (1e7, 1e12)
"""Outside, there is no answer."""

MEMBERS_FITTED = 8
"""M = 1, 2, 4, 8 were fitted; more carry a caveat."""

MEMBERS_MAX = 1024
"""More get no answer: two decades beyond any data."""

BUDGET_SHARE = (1e-3, 1e2)
"""Tokens, as multiples of the budget, for which there is an answer."""

BUDGET_SHARE_FITTED = (0.1, 10.0)
"""Outside, the borrowed shape carries a caveat: Hoffmann's runs are mostly within."""

TOKENS_MIN = 1e7
"""Below, the borrowed shape exceeds what guessing costs."""

Training = Literal["diloco", "data_parallel"]

_LAWS = {1: (18.363, 0.0961), 2: (18.768, 0.0969), 4: (19.762, 0.0992), 8: (21.051, 0.1018)}
_HOFFMANN_E, _HOFFMANN_A, _HOFFMANN_B = 1.69, 406.4, 410.7
_HOFFMANN_PARAMS_POWER, _HOFFMANN_TOKENS_POWER = 0.34, 0.28

_DILOCO_SOURCE = "arXiv:2503.09799, joint law in N and M (20 tokens per parameter, H = 30, C4, uncompressed)"
_SINGLE_SOURCE = "arXiv:2503.09799, law in N at this M (20 tokens per parameter, H = 30, C4, uncompressed)"
_PARALLEL_SOURCE = "arXiv:2503.09799, data-parallel law (20 tokens per parameter, C4)"
_SHAPE_SOURCE = "; over tokens: shape of arXiv:2203.15556 §3.3, scaled to meet it at 20 tokens per parameter"
_TUNING_SOURCE = "arXiv:2503.09799, hyperparameter laws in N and M (20 tokens per parameter, H = 30, C4)"


@dataclass(frozen=True)
class Estimate:
    """A number from a published law, not from a run. Show it as one: `str(estimate)` begins with a tilde."""

    value: float
    """In the unit the function names."""

    source: str
    """Where the law is published, and under which conditions it was fitted."""

    caveats: tuple[str, ...] = ()
    """Why this answer is worth less than the law: empty within the fitted range."""

    @property
    def is_estimate(self) -> bool:
        """Always true, so that reports can ask any loss."""
        return True

    def __str__(self) -> str:
        return f"~{self.value:.4g} (estimate: {'; '.join((self.source, *self.caveats))})"


def final_loss(*, params: float, members: int = 1, training: Training = "diloco") -> Estimate:
    """Evaluation loss in nats per token after 20 tokens per parameter over all members together.

    DiLoCo: L(N, M) = 19.226 N^-0.0985 M^0.0116. The law is smooth in M: between and beyond the fitted 1, 2, 4, 8 it is
    its own interpolation. Data-parallel: 18.129 N^-0.0953, whatever the number of members. Raises ConfigError where no
    law reaches (PARAMS_MAX_RANGE, MEMBERS_MAX); between that and the fitted range the answer carries a caveat.
    """
    caveats = _caveats(params, members, training)
    if training == "data_parallel":
        return Estimate(18.129 * params**-0.0953, _PARALLEL_SOURCE, caveats)
    return Estimate(19.226 * params**-0.0985 * members**0.0116, _DILOCO_SOURCE, caveats)


def final_loss_single_law(*, params: float, members: int) -> Estimate:
    """Like `final_loss` for DiLoCo, by the law fitted at M = 1, 2, 4 or 8 alone.

    Its distance from the joint law is a hint at how far to trust either. Other M raise ConfigError.
    """
    caveats = _caveats(params, members, "diloco")
    if members not in _LAWS:
        raise ConfigError(f"laws were published for {', '.join(map(str, _LAWS))} members: choose one, got {members}")
    scale, power = _LAWS[members]
    return Estimate(scale * params**-power, _SINGLE_SOURCE, caveats)


def loss_after(*, params: float, tokens: float, members: int = 1, training: Training = "diloco") -> Estimate:
    """Evaluation loss in nats per token after `tokens` over all members together: `final_loss`, on Hoffmann's curve.

    An assumption, not a published law: neither paper has this product, and a run under way is higher than one whose
    schedule ends here. Raises ConfigError like `final_loss`, and for tokens outside `tokens_range`.
    """
    final = final_loss(params=params, members=members, training=training)
    least, most = tokens_range(params=params)
    if not least <= tokens <= most:
        raise ConfigError(f"for {params:.3g} parameters, tokens must lie in {least:.3g} .. {most:.3g}: got {tokens}")
    value = final.value * _hoffmann(params, tokens) / _hoffmann(params, TOKENS_PER_PARAM * params)
    caveats = final.caveats + _tokens_caveats(tokens / (TOKENS_PER_PARAM * params))
    return Estimate(value, final.source + _SHAPE_SOURCE, caveats)


def tokens_to_loss(*, params: float, loss: float, members: int = 1, training: Training = "diloco") -> Estimate:
    """Tokens over all members together until `loss_after` has fallen to `loss`: its inverse, with the same assumptions.

    Raises ConfigError if the model gets there before the first or not until after the last token of `tokens_range`.
    """
    least, most = tokens_range(params=params)
    highest = loss_after(params=params, tokens=least, members=members, training=training).value
    lowest = loss_after(params=params, tokens=most, members=members, training=training).value
    if not lowest <= loss <= highest:
        raise ConfigError(
            f"the estimate for {params:.3g} parameters runs from {highest:.3f} to {lowest:.3f}: "
            f"choose a loss in between or another size, got {loss}"
        )
    final = final_loss(params=params, members=members, training=training)
    shape = loss / final.value * _hoffmann(params, TOKENS_PER_PARAM * params)
    falling = shape - _HOFFMANN_E - _HOFFMANN_A * params**-_HOFFMANN_PARAMS_POWER
    tokens = (_HOFFMANN_B / falling) ** (1 / _HOFFMANN_TOKENS_POWER)
    tokens = min(max(tokens, least), most)  # at the ends, rounding may step over
    caveats = final.caveats + _tokens_caveats(tokens / (TOKENS_PER_PARAM * params))
    return Estimate(tokens, final.source + _SHAPE_SOURCE, caveats)


def tokens_range(*, params: float) -> tuple[float, float]:
    """The fewest and the most tokens `loss_after` answers for. Raises ConfigError for params outside the laws."""
    _caveats(params, 1, "diloco")
    budget = TOKENS_PER_PARAM * params
    return max(TOKENS_MIN, BUDGET_SHARE[0] * budget), BUDGET_SHARE[1] * budget


def tuned_batch_tokens(*, params: float, members: int) -> Estimate:
    """Global batch in tokens per inner step that tuning DiLoCo arrives at: 14.521 N^0.4695 M^0.3399."""
    caveats = _caveats(params, members, "diloco")
    return Estimate(14.521 * params**0.4695 * members**0.3399, _TUNING_SOURCE, caveats)


def tuned_learning_rate(*, params: float, members: int) -> Estimate:
    """Peak inner learning rate that tuning DiLoCo arrives at: 22256 N^-0.8827 M^0.2929."""
    caveats = _caveats(params, members, "diloco")
    return Estimate(22256 * params**-0.8827 * members**0.2929, _TUNING_SOURCE, caveats)


def _hoffmann(params: float, tokens: float) -> float:
    by_size: float = _HOFFMANN_A * params**-_HOFFMANN_PARAMS_POWER
    by_data: float = _HOFFMANN_B * tokens**-_HOFFMANN_TOKENS_POWER
    return _HOFFMANN_E + by_size + by_data


def _caveats(params: float, members: int, training: str) -> tuple[str, ...]:
    """Refuse what no law reaches; say what lies outside the fitted range."""
    least, most = PARAMS_MAX_RANGE
    if not (math.isfinite(params) and least <= params <= most):
        raise ConfigError(f"published laws say nothing below {least:.0e} or above {most:.0e} parameters: got {params}")
    if int(members) != members or not 1 <= members <= MEMBERS_MAX:
        raise ConfigError(f"members must be a whole number in 1 .. {MEMBERS_MAX} for a loss estimate, got {members}")
    if training not in ("diloco", "data_parallel"):
        raise ConfigError(f'training must be "diloco" or "data_parallel", got {training!r}')
    caveats = []
    if not PARAMS_FITTED[0] <= params <= PARAMS_FITTED[1]:
        caveats.append(f"{params / 1e9:g}B parameters: extrapolated, checked for 0.035B to 10B only")
    if training == "diloco" and members > MEMBERS_FITTED:
        caveats.append(f"{members} members: extrapolated, fitted for 1 to {MEMBERS_FITTED} only")
    return tuple(caveats)


def _tokens_caveats(budgets: float) -> tuple[str, ...]:
    """What a token count other than the budget means for the answer."""
    caveats = []
    if not math.isclose(budgets, 1.0):
        caveats.append("as if the schedule ended here: a run that goes on is higher")
    if not BUDGET_SHARE_FITTED[0] <= budgets <= BUDGET_SHARE_FITTED[1]:
        caveats.append(f"{budgets:.3g} times the fitted token budget: extrapolated")
    return tuple(caveats)
