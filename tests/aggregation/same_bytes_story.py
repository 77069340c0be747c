"""One event tape, told with so many threads; prints a digest of everything it leaves. Run as a program by its test.

python same_bytes_story.py 1 2 3 4
"""

import hashlib
import json
import random
import sys

import torch
from edge_world import rounded, story

from farflung.aggregation import pairs, persistent, push_sum
from farflung.aggregation.flow import Flow, InEdge, OutEdge, send_flows
from farflung.aggregation.graphs import parse_graph, plan_round
from farflung.aggregation.mass import Mass
from farflung.aggregation.persistent_post import Post
from farflung.aggregation.windows import WINDOW
from farflung.protocol.ledger.saved import encode_ledger

N, D = 5, 3 * WINDOW + 77
SPECS = (
    *("base(k=1)", "base(k=3)", "one-peer-exponential", "exponential", "od-equidyn", "ou-equidyn(eta=0.7)"),
    *("random-matching", "ring", "complete"),
)


def vectors(seed):
    return torch.randn(N, D, generator=torch.Generator().manual_seed(seed))


def plan_of(spec, ticks):
    return plan_round(parse_graph(spec), N, ticks, run_id=b"run", round_index=3)


def fate(tick, sender, receiver):
    dice = random.Random(repr((tick, sender, receiver)))
    return () if dice.random() < 0.2 else tuple(dice.randint(0, 2) for _ in range(dice.choice([1, 1, 2])))


def graphs():
    """Every graph's plans for many numbers of members."""
    for spec in SPECS:
        for n in range(1, 14):
            yield repr(plan_round(parse_graph(spec), n, 5, run_id=b"run", round_index=n)).encode()


def push_sums(threads):
    fragments, ref_d = (slice(0, WINDOW + 5), slice(WINDOW + 5, D)), vectors(1)[0]
    plan = plan_of("base(k=2)", 4)
    rounds = [
        push_sum.begin(i, plan, phi_d, ref_d, [1.0 + i, 1.0], fragments=fragments, threads=threads)
        for i, phi_d in enumerate(vectors(2))
    ]
    push_sum.mix_all(rounds, fate=fate)
    for member, theta_d in zip(rounds, vectors(3), strict=True):
        yield member.finish(theta_d, ref_d).numpy().tobytes()
        yield repr((member.sums(), [mass.weight for mass in member.masses])).encode()


def meetings(threads):
    ref_d = vectors(1)[0]
    rounds = [pairs.begin(phi_d, ref_d, 1.0, pairs.Radius(0.8), threads=threads) for phi_d in vectors(4)]
    pairs.mix_pairs(rounds, plan_of("random-matching", 6))
    for member in rounds:
        yield member.z_d.numpy().tobytes()
        yield repr((member.radius, member.movement)).encode()


def flows(threads):
    codec = rounded(8)._replace(encode=lambda vector_d: rounded(8).encode(vector_d.double()))
    codec = codec._replace(decode=lambda payload: rounded(8).decode(payload).float())
    flow, zero_d = Flow(codec), torch.zeros(D)
    masses = [Mass.started(phi_d, zero_d, 1.0 + i, threads=threads) for i, phi_d in enumerate(vectors(5))]
    edges = {(i, j): (OutEdge(flow, zero_d), InEdge(flow, zero_d)) for i in range(N) for j in range(N) if i != j}
    for mixing in plan_of("exponential", 3):
        for i, column in enumerate(mixing):
            mine = {share.to: edges[i, share.to][0] for share in column.sends}
            for to, message in send_flows(masses[i], column.sends, mine).items():
                edges[i, to][1].receive(masses[to], message, weight_max=100.0, peer=str(i))
                edges[i, to][0].settled()
                yield message.payload
    for mass in masses:
        yield mass.numerator_d.numpy().tobytes()
        yield repr((mass.weight, mass.sums())).encode()


def lasting(threads):
    """Persistent mass in bad weather."""
    rule, post = persistent.parse_persistent("nesterov(lr=0.3,momentum=0.5)"), Post()
    members = [persistent.begin(theta_d, rule, weight=1.0 + i, threads=threads) for i, theta_d in enumerate(vectors(6))]
    for tick in range(4):
        for member, delta_d in zip(members, 0.1 * vectors(10 + tick), strict=True):
            member.update(delta_d)
        post.carry(members, persistent.plan_tick(parse_graph("exponential"), N, tick, run_id=b"run"), fate=fate)
    for member in members:
        yield member.model().numpy().tobytes()
        yield repr((member.mass.weight, member.sums(), post.sums(members))).encode()


def ledgers():
    """Stories of loss, repeats, crashes and changing members, with every book, mass and copy they end with."""
    for seed in range(6):
        for settings in ({}, {"fresh": True}, {"flow": Flow(rounded(4))}):
            _, world = story(seed, **settings)
            for _, node in sorted(world.nodes.items()):
                yield encode_ledger(node.ledger)
                yield node.mass.numerator_d.numpy().tobytes()
                yield repr(node.mass.weight).encode()
                yield from (edge.copy_hash for _, edge in sorted(node.out.items()))


def digest(parts):
    whole = hashlib.sha256()
    for part in parts:
        whole.update(hashlib.sha256(part).digest())
    return whole.hexdigest()


def threaded(threads):
    """What the parts that use threads left behind, by name."""
    parts = {"push-sum": push_sums, "pairs": meetings, "flows": flows, "persistent": lasting}
    return {name: digest(part(threads)) for name, part in parts.items()}


def told(threads):
    """What each part of the tape left behind, by name."""
    return threaded(threads) | {"graphs": digest(graphs()), "ledgers": digest(ledgers())}


if __name__ == "__main__":
    print(json.dumps(told(int(sys.argv[1]))))
