"""Where nobody may lie, what looks for liars gives the mean of all, to the bit (I-17)."""

import pytest
import torch

from farflung.aggregation.registry import parse_rule
from farflung.aggregation.rows import dense_rows
from farflung.aggregation.rule import Context

D = 60
CUTTING = ("trimmed-mean", "meamed", "phocas", "bulyan", "multi-krum", "cge", "mda", "smea", "caf", "dnc", "dstar")
MEANS = (
    *(f"{name}(f=0)" for name in CUTTING),
    *("nnm|multi-krum(f=0)", "nnm|trimmed-mean(f=0)", "arc|multi-krum(f=0)", "arc|mda(f=0)"),
    *(f"centered-clipping(f=0,tau={{far}}{more})" for more in ("", ",iterations=1", ",iterations=7")),
)


def result(spec, row_nd, weight_n):
    parsed = parse_rule(spec)
    size = parsed.state_size(row_nd.shape[1])
    context = Context(1, state_s=torch.zeros(size), next_state_s=torch.zeros(size)) if size else Context(1)
    return parsed.rule(dense_rows(row_nd), weight_n, f=parsed.f, context=context)


@pytest.mark.parametrize("n", [3, 5, 8, 16])
@pytest.mark.parametrize("spec", MEANS)
def test_without_anybody_to_leave_out_a_rule_is_the_mean(spec, n, random_rows):
    """Centered clipping, if its radius is no less than the distance of any row from where it starts."""
    row_nd = random_rows(n, n, D)
    far = row_nd.double().norm(dim=1).max().item() * 2 + 1e-3  # it starts at zero, and moves towards the mean
    found = result(spec.format(far=far), row_nd, torch.ones(n).double())
    assert found.update_d.numpy().tobytes() == result("mean", row_nd, torch.ones(n).double()).update_d.numpy().tobytes()
    assert [verdict.share for verdict in found.verdicts] == pytest.approx([1 / n] * n, rel=1e-12)


@pytest.mark.parametrize("spec", ["centered-clipping(f=0,tau=0.5)", "median(f=0)", "trimmed-mean(f=1)", "mda(f=1)"])
def test_a_small_radius_or_a_row_to_leave_out_is_something_else(spec):
    row_nd = torch.randn(7, D, generator=torch.Generator().manual_seed(1))
    apart_d = result(spec, row_nd, torch.ones(7).double()).update_d.double() - row_nd.double().mean(0)
    assert apart_d.norm() > 0.1 * row_nd.double().mean(0).norm()
