"""Σw and Σx in every state, with real vectors and ledgers, under loss, repeats, delay, crashes, joins and leaves.

I-1, I-2 and I-20 together: `test_push_sum.py` has the weather without crashes and members that come and go,
`tests/protocol/test_ledger_chaos.py` the ledger's masses without vectors.
"""

import pytest
from edge_world import story

EVENTS = {"Credit", "Settled", "Returned", "Send", "Persist", "crash", "audited"}
"""What has to happen in some story or other."""


def totals_of(seeds, fresh):
    totals = {}
    for seed in seeds:
        error, world = story(seed, fresh=fresh)
        assert error <= 1e-12, seed
        for event, count in world.counts.items():
            totals[event] = totals.get(event, 0) + count
    return totals


@pytest.mark.parametrize("fresh", [False, True], ids=["persistent", "fresh"])
def test_mass_is_conserved_on_every_seed(fresh):
    totals = totals_of(range(160), fresh)
    assert not (EVENTS | ({"Lapsed", "Refused"} if fresh else {"joined", "left"})) - totals.keys()
    assert totals["crash"] > 150
    assert totals["audited"] > 500


@pytest.mark.soak
@pytest.mark.parametrize("fresh", [False, True], ids=["persistent", "fresh"])
@pytest.mark.parametrize("part", range(10))
def test_mass_is_conserved_on_ten_thousand_seeds(part, fresh):
    totals = totals_of(range(1000 + 500 * part, 1000 + 500 * (part + 1)), fresh)
    assert totals["crash"] > 500
