"""Which old rounds others may have dropped, against members that take snapshots and keep the two newest."""

from dataclasses import replace

import pytest

from farflung.node.state_sync import last_dropped_round
from farflung.protocol.genesis import Genesis
from farflung.protocol.manifest import first_manifest
from farflung.protocol.schema import Schema, TensorSpec


@pytest.mark.parametrize("each", [1, 2, 5])
@pytest.mark.parametrize("rounds", [0, 1, 4, 10, 13])
def test_payloads_are_gone_up_to_the_older_of_the_two_newest_snapshots(each, rounds):
    genesis = Genesis(
        name="old rounds",
        founder=bytes(32),
        state_digest=bytes(32),
        schema=Schema((TensorSpec("w", (8,), "float32"),)),
        secret_digest=bytes(32),
        snapshot_rounds=each,
        rounds=rounds,
    )
    snapshots = [0]
    for index in range(1, (rounds or 30) + 1):
        if index % each == 0 or index == rounds:
            snapshots.append(index)
        tip = replace(first_manifest(genesis), round_index=index, trained=index)
        assert last_dropped_round(genesis, tip) == (snapshots[-2] if len(snapshots) > 1 else 0)
