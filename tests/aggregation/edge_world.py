"""Members with real masses, ledgers and disks, and a network that loses, repeats, delays and reorders; some crash.

Two ways to move mass over the same ledger: parcels that carry a part of a mass, and flows by the copies of an edge
(`aggregation.flow`), which need a window of 1. What a step does is carried out effect by effect, so that a crash can
come between any two of them: `Persist` writes mass, copies, escrow and ledger as one, and a restart reads them back.
"""

import copy
import hashlib
import random
from dataclasses import dataclass, field, replace
from fractions import Fraction

import numpy as np
import torch

from farflung.aggregation.flow import FlowCodec, FlowMessage, InEdge, OutEdge
from farflung.aggregation.graphs import Share
from farflung.aggregation.mass import Mass, Sums, add_sums, mass_error
from farflung.protocol.identity import PeerId
from farflung.protocol.ledger.amounts import Amount
from farflung.protocol.ledger.audit import audit
from farflung.protocol.ledger.books import Ledger, Terms
from farflung.protocol.ledger.effects import Credit, Persist, Returned, Send, Settled
from farflung.protocol.ledger.messages import Parcel
from farflung.protocol.ledger.saved import decode_ledger, encode_ledger

D = 7
LOSS, REPEAT, CRASH = 0.3, 0.2, 0.06
PARTS = (0.25, 0.3, 0.5, 0.7)


def peer(index):
    return PeerId(index.to_bytes(20, "little"))


def rounded(bits):
    """A codec of so many bits: levels of the largest magnitude, and fp64 bytes that say them."""
    levels = 2 ** (bits - 1) - 1

    def encode(vector_d):
        scale = float(vector_d.abs().max()) / levels or 1.0
        return torch.cat([torch.tensor([scale]).double(), (vector_d / scale).round()]).numpy().tobytes()

    def decode(payload):
        values = torch.from_numpy(np.frombuffer(payload, np.float64).copy())
        return values[1:] * values[0]

    return FlowCodec(f"int{bits}", encode, decode, 1.0, bits)


def digest(payload):
    """What an amount says of the vector that goes with it."""
    if isinstance(payload, FlowMessage):
        return hashlib.sha256(payload.payload + payload.copy_hash).digest()
    return hashlib.sha256(payload.numerator_d.numpy().tobytes()).digest()


@dataclass
class Node:
    """What one member holds in memory, and on its disk (`World.disks`) as of the last `Persist`."""

    ledger: Ledger
    mass: Mass
    out: dict[PeerId, OutEdge] = field(default_factory=dict)
    into: dict[PeerId, InEdge] = field(default_factory=dict)
    escrow: dict[tuple[PeerId, int], Mass | FlowMessage] = field(default_factory=dict)
    """What left and may have to be said again or come home, by receiver and number."""

    def copy(self):
        ledger = replace(self.ledger, out=dict(self.ledger.out), into=dict(self.ledger.into))
        edges = [{to: copy.copy(edge) for to, edge in side.items()} for side in (self.out, self.into)]
        return Node(ledger, self.mass.copy(), *edges, dict(self.escrow))

    def restarted(self):
        """From a disk: the ledger from its bytes."""
        again = self.copy()
        again.ledger = decode_ledger(encode_ledger(self.ledger), self.ledger.terms)
        assert again.ledger == self.ledger
        return again


class World:
    """A seeded story. `flow`: a codec's rule, or None for parcels. `fresh`: mass is new in every round."""

    def __init__(self, seed, *, flow=None, fresh=False, people=4):
        self.dice, self.flow, self.crash, self.drops = random.Random(seed), flow, CRASH, True
        self.terms = Terms(fresh=fresh, window=1 if flow else 1 + seed % 4, mass_min=Fraction(1, 1 << 60))
        self.generator = np.random.default_rng(seed)
        self.nodes, self.disks, self.net, self.opened = {}, {}, [], {}
        self.counts, self.tip, self.leaving = {}, 1, None
        for index in range(people):
            self.admit(peer(index), [peer(other) for other in range(people) if other != index])

    def count(self, name):
        self.counts[name] = self.counts.get(name, 0) + 1

    # -- members ------------------------------------------------------------------------------------------------------

    def draw(self):
        """A member's own mass."""
        weight = self.dice.choice([1.0, 2.0, 0.5, 8.0, 0.0][: 5 if self.terms.fresh else 4])
        phi_d = torch.from_numpy(self.generator.standard_normal(D))
        return Mass.started(phi_d, torch.zeros_like(phi_d), weight)

    def admit(self, who, others):
        mass, fresh = self.draw(), self.terms.fresh
        ledger = Ledger(who, self.terms, self.tip - 1, Fraction(0 if fresh else mass.weight))
        opened = Fraction(mass.weight) if fresh else None
        ledger.open_round(self.tip, opened, admit=dict.fromkeys(others, self.tip))
        self.nodes[who] = Node(ledger, mass)
        self.new_edges(self.nodes[who], others)
        self.opened[who], self.disks[who] = mass.sums(), self.nodes[who].copy()

    def new_edges(self, node, peers):
        if self.flow:
            node.out |= {to: OutEdge(self.flow, torch.zeros(D, dtype=torch.float64)) for to in peers}
            node.into |= {to: InEdge(self.flow, torch.zeros(D, dtype=torch.float64)) for to in peers}

    # -- steps --------------------------------------------------------------------------------------------------------

    def carry_out(self, who, effects, payload=None):
        """Effect by effect; perhaps only the first few of them, and then the member is what its disk says."""
        crashes = bool(effects) and self.dice.random() < self.crash
        for effect in effects[: self.dice.randrange(len(effects) + 1) if crashes else None]:
            self.do(who, effect, payload)
        if crashes:
            self.count("crash")
            self.nodes[who] = self.disks[who].restarted()
            for to in sorted(self.nodes[who].ledger.out):
                for effect in self.nodes[who].ledger.resend(to):
                    self.do(who, effect)

    def do(self, who, effect, payload=None):
        node = self.nodes[who]
        self.count(type(effect).__name__)
        match effect:
            case Credit(sender, _, _, amount):
                assert amount.payload == digest(payload)
                if self.flow:
                    node.into[sender].receive(node.mass, payload, weight_max=100.0, peer=sender.short)
                else:
                    node.mass.absorb(payload.copy())
            case Settled(receiver, seq, _):
                del node.escrow[receiver, seq]
                if self.flow:
                    node.out[receiver].settled()
                    self.compare(who, receiver)
            case Returned(receiver, seq, _):
                left = node.escrow.pop((receiver, seq))
                if self.flow:
                    node.out[receiver].returned(node.mass)
                else:
                    node.mass.absorb(left.copy())
            case Persist():
                self.disks[who] = node.copy()
            case Send(to, message):
                said = node.escrow[to, message.seq] if isinstance(message, Parcel) else None
                self.net.append((who, to, message, said))

    def compare(self, sender, receiver):
        """I-15, at the moment of an acknowledgement: copies and hashes at both ends."""
        behind, ahead = self.nodes[sender], self.nodes[receiver]
        if behind.ledger.round_index == ahead.ledger.round_index or not self.terms.fresh:
            out, into = behind.out[receiver], ahead.into[sender]
            assert (out.copy_hash, out.copy_d.numpy().tobytes()) == (into.copy_hash, into.copy_d.numpy().tobytes())
            assert not out.busy
            self.count("compared")

    def give(self, who, to, part):
        """Send a part of what a member has."""
        node = self.nodes[who]
        assert not self.flow or node.out[to].busy == (node.ledger.room(to) == 0)
        if node.ledger.room(to) and node.mass.weight > 2.0**-20 and (part < 1 or not self.flow):
            if self.flow:
                left = node.out[to].send(node.mass, part * node.mass.weight)
                amount = Amount(Fraction(left.weight), digest(left))
            elif part < 1:
                left = node.mass.split([Share(0, part)])[0]
                amount = Amount(Fraction(left.weight), digest(left))
            else:  # all of it, before leaving
                left = Mass(node.mass.numerator_d.clone(), float(node.ledger.balance))
                amount, node.mass = Amount(node.ledger.balance, digest(left)), Mass(torch.zeros(D).double(), 0.0)
            node.escrow[to, node.ledger.out[to].next_seq] = left
            self.carry_out(who, node.ledger.send(to, amount))

    def deliver(self, at):
        sender, to, message, payload = self.net[at]
        if not self.drops or self.dice.random() > REPEAT:
            self.net[at] = self.net[-1]
            self.net.pop()
        if not (self.drops and self.dice.random() < LOSS) and {sender, to} <= self.nodes.keys():
            self.carry_out(to, self.nodes[to].ledger.hear(sender, message), payload)

    def step(self):
        """One event."""
        who, roll = self.dice.choice(sorted(self.nodes)), self.dice.random()
        to = self.dice.choice(sorted(self.nodes.keys() - {who}))
        if roll < 0.5 and self.net:
            self.deliver(self.dice.randrange(len(self.net)))
        elif roll < 0.8 and to != self.leaving:
            self.give(who, to, 1.0 if who == self.leaving else self.dice.choice(PARTS))
        elif roll < 0.9:
            ledger = self.nodes[who].ledger
            self.carry_out(who, ledger.fence(to) if self.dice.random() < 0.5 else ledger.resend(to))
        elif self.terms.fresh:
            self.open_next(who)
        else:
            self.change_members()

    # -- rounds -------------------------------------------------------------------------------------------------------

    def open_next(self, who):
        """Fresh mass for one member, unless it is a round ahead already: what it had is void, and copies restart."""
        node, latest = self.nodes[who], min(one.ledger.round_index for one in self.nodes.values())
        if node.ledger.round_index > latest:
            return
        mass = self.draw()
        effects = node.ledger.open_round(latest + 1, Fraction(mass.weight))
        node.mass, node.escrow, sums = mass, {}, mass.sums()
        self.new_edges(node, sorted(node.ledger.out))
        self.carry_out(who, effects)
        if self.nodes[who].ledger.round_index > latest:  # else it crashed, and is where it was
            self.opened[who] = sums

    def change_members(self):
        """Persistent mass: somebody joins; or wants to leave, hands over what it has, and at last is gone."""
        gone = self.leaving if self.leaving and self.has_left(self.leaving) else None
        joins = len(self.nodes) < 6 and self.dice.random() < 0.3
        if self.leaving is None and len(self.nodes) > 3 and not self.flow and self.dice.random() < 0.5:
            self.leaving = self.dice.choice(sorted(self.nodes))
        if not gone and not joins:
            return
        self.tip, crash, self.crash = self.tip + 1, self.crash, 0.0
        new = peer(100 + self.tip) if joins else None
        if gone:
            self.leaving = None
            self.count("left")
            del self.nodes[gone], self.disks[gone]
        for who, node in sorted(self.nodes.items()):
            if new:
                self.new_edges(node, [new])
            effects = node.ledger.open_round(
                self.tip, evict=[gone] if gone else [], admit={new: self.tip} if new else {}
            )
            self.carry_out(who, effects)
        if new:
            self.count("joined")
            self.admit(new, sorted(self.nodes))
        self.crash = crash

    def has_left(self, who):
        others = [node.ledger.out[who].escrow for to, node in self.nodes.items() if to != who]
        ledger = self.nodes[who].ledger
        return not ledger.balance and not ledger.unresolved and not any(others)

    # -- promises -----------------------------------------------------------------------------------------------------

    def under_way(self):
        """What left its sender and was not counted by its receiver, each once."""
        for who, node in self.nodes.items():
            for to, edge in node.ledger.out.items():
                for item in edge.escrow:
                    if self.nodes[to].ledger.into[who].receipt.decided(item.seq) is not True:
                        yield self.sums_of(node, to, item.seq)

    def sums_of(self, node, to, seq):
        left = node.escrow[to, seq]
        if isinstance(left, Mass):
            return left.sums()
        flown_d = left.weight * (node.out[to].copy_d + self.flow.codec.decode(left.payload))
        return Sums(left.weight, flown_d.sum().item(), flown_d.abs().sum().item(), flown_d.abs().max().item())

    def error(self):
        """By how much mass was made or lost, Σw or Σx; None while members are in different rounds of fresh mass."""
        if self.terms.fresh and len({node.ledger.round_index for node in self.nodes.values()}) > 1:
            return None
        self.count("audited")
        now = add_sums([*(node.mass.sums() for node in self.nodes.values()), *self.under_way()])
        return mass_error(add_sums(self.opened.values()), now)

    def finish(self):
        """The storm is over: all reach one round, ask back, and everything is counted or home."""
        self.crash, self.drops = 0.0, False
        latest = max(node.ledger.round_index for node in self.nodes.values())
        for who in sorted(self.nodes):
            while self.terms.fresh and self.nodes[who].ledger.round_index < latest:
                self.open_next(who)
        for _ in range(3):
            self.net = []
            for who, node in sorted(self.nodes.items()):
                for to in sorted(node.ledger.out):
                    self.carry_out(who, [*node.ledger.fence(to), *node.ledger.resend(to)])
            while self.net:
                self.deliver(0)
        ledgers = {who: node.ledger for who, node in self.nodes.items()}
        assert not any(ledger.unresolved for ledger in ledgers.values())
        assert not any(node.escrow or any(edge.busy for edge in node.out.values()) for node in self.nodes.values())
        masses = {who: Fraction(node.mass.weight) for who, node in self.nodes.items()}
        audit(ledgers, masses, Fraction(1, 10**12)).require()


def story(seed, events=80, **settings):
    """One seed from beginning to end, audited every few events; the largest error, and the world as it ended."""
    world, worst = World(seed, people=2 + seed % 3, **settings), 0.0
    for number in range(events):
        world.step()
        if number % 4 == 0:
            worst = max(worst, world.error() or 0.0)
    world.finish()
    return max(worst, world.error()), world
