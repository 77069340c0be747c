"""A seeded world of members with persistent mass: loss, repeats, reordering, delay, crashes, joins, leaves, steps.

What the members should hold together is noted apart from them: what they joined with, less the steps that reached a
disk. A crash loses everything since the last `Persist`; a restart goes through bytes.
"""

import random
from collections import Counter
from fractions import Fraction

import torch

from farflung.aggregation.mass import add_sums
from farflung.aggregation.persistent import FLOOR, begin, parse_persistent
from farflung.aggregation.persistent_member import PersistentMember, in_flight, total_of
from farflung.aggregation.persistent_saved import decode_member, encode_member
from farflung.protocol.identity import PeerId
from farflung.protocol.ledger.audit import audit
from farflung.protocol.ledger.books import Ledger, Terms
from farflung.protocol.ledger.effects import Persist, Send
from farflung.protocol.ledger.messages import Parcel

LOSS, REPEAT, CRASH = 0.3, 0.2, 0.06
LR = 0.5
D = 3


def peer(index):
    return PeerId(index.to_bytes(20, "little"))


class World:
    def __init__(self, seed, people):
        self.dice = random.Random(seed)
        self.rule = parse_persistent(f"sgd(lr={LR})", self.dice.choice([FLOOR, 1e-9]))
        self.terms = Terms(fresh=False, window=1 + seed % 3)
        self.chain = {1: ((), tuple(map(peer, range(people))))}
        self.members, self.taken, self.joined = {}, {}, {}
        self.weight, self.down, self.net, self.leaving = 0.0, {}, [], None
        self.events = Counter()
        for number in range(people):
            self.join(peer(number), 1)

    # Membership

    @property
    def tip(self):
        return max(self.chain)

    def join(self, who, round_index):
        """With (m θ, m), θ being the model of a member, or at first anything."""
        models = [item.sum.model() for item in self.members.values() if item.sum.mass.weight]
        theta_d = models[0] if models else torch.tensor([self.dice.gauss(0, 1) for _ in range(D)], dtype=torch.float64)
        held = begin(theta_d, self.rule, weight=self.dice.choice([0.5, 1.0, 3.0]))
        ledger = Ledger(who, self.terms, round_index - 1, Fraction(held.mass.weight))
        struck = {item for evicted, _ in self.chain.values() for item in evicted}
        others = {item for _, admitted in self.chain.values() for item in admitted} - struck - {who}
        member = PersistentMember(held, ledger)
        member.open_round(round_index, admit=dict.fromkeys(sorted(others), round_index))
        self.joined[who], self.taken[who] = held.mass.numerator_d.clone(), torch.zeros(D, dtype=torch.float64)
        self.weight += held.mass.weight
        self.members[who] = member

    def certify(self):
        """A new certificate: somebody joins, or the leaver, if nothing is owed to it, is struck."""
        if self.leaving is not None and not self.is_drained(self.leaving):
            return
        evict = (self.leaving,) if self.leaving is not None else ()
        admit = (peer(100 + self.tip),) if self.dice.random() < 0.5 and len(self.members) < 5 else ()
        self.chain[self.tip + 1] = (evict, admit)
        for who in evict:
            del self.members[who]
            self.down.pop(who, None)
            self.leaving = None
            self.events["left"] += 1
        for who in admit:
            self.join(who, self.tip)
            self.events["joined"] += 1

    def is_drained(self, who):
        member = self.members[who]
        owed = [item.ledger.out[who].escrow for item in self.members.values() if who in item.ledger.out]
        behind = member.ledger.round_index < self.tip  # a newcomer's parcels may still be on their way to it
        return not (member.sum.mass.weight or member.escrow or any(owed) or behind)

    def follow(self, who, *, lossy=True):
        member = self.members[who]
        at = member.ledger.round_index + 1
        if at <= self.tip:
            evict, admit = self.chain[at]
            new = {item: at for item in admit if item != who}
            self.act(who, lambda own: own.open_round(at, evict=evict, admit=new), lossy=lossy)

    # Events

    def step(self):
        self.down = {who: left - 1 for who, left in self.down.items() if left > 1}
        up = [who for who in sorted(self.members) if who not in self.down]
        if not up:
            return
        who, roll = self.dice.choice(up), self.dice.random()
        if roll < 0.45 and self.net:
            self.deliver(self.dice.randrange(len(self.net)), lossy=True)
        elif roll < 0.66:
            self.give(self.leaving if self.leaving in up and self.dice.random() < 0.5 else who)
        elif roll < 0.74:
            self.update(who)
        elif roll < 0.84:
            to, asks = self.dice.choice(sorted(self.members[who].ledger.out)), self.dice.random() < 0.5
            self.act(who, lambda own: own.ledger.fence(to) if asks else own.ledger.resend(to))
        elif roll < 0.92:
            self.follow(who)
        elif roll < 0.96:
            self.certify()
        elif self.leaving is None and len(self.members) > 2:
            self.leaving = who

    def deliver(self, at, *, lossy=False):
        sender, receiver, message, numerator_d = self.net[at]
        if not lossy or self.dice.random() > REPEAT:
            self.net.pop(at)
        if (lossy and self.dice.random() < LOSS) or receiver not in self.members or receiver in self.down:
            return
        if sender in self.members[receiver].ledger.out:
            copy_d = None if numerator_d is None else numerator_d.clone()
            self.act(receiver, lambda own: own.hear(sender, message, copy_d), lossy=lossy)

    def give(self, who):
        member = self.members[who]
        peers = [item for item in sorted(member.ledger.out) if item in self.members and item != self.leaving]
        if who == self.leaving:
            to = self.dice.choice(peers)
            self.act(who, lambda own: own.hand_over(to), lossy=bool(self.net))
        elif peers:
            some = self.dice.sample(peers, self.dice.randint(1, min(2, len(peers))))
            self.act(who, lambda own: own.give([(item, 0.1 + 0.35 * self.dice.random()) for item in some]))

    def update(self, who):
        delta_d = torch.tensor([self.dice.gauss(0, 1) for _ in range(D)], dtype=torch.float64)

        def take(own):
            if not own.sum.update(delta_d):
                return []
            self.taken[who] = self.taken[who] + own.sum.claim * LR * delta_d
            return [Persist()]

        self.act(who, take)

    def act(self, who, deed, *, lossy=True):
        """A step, or a crash somewhere in it: what no Persist had reached by then is undone."""
        crash = lossy and self.dice.random() < CRASH
        saved, taken = (encode_member(self.members[who]), self.taken[who]) if crash else (b"", None)
        effects = deed(self.members[who])
        if crash:
            effects = effects[: self.dice.randint(0, len(effects))]
            if any(isinstance(effect, Persist) for effect in effects):
                saved, taken = encode_member(self.members[who]), self.taken[who]
                self.events["crashed after"] += 1
            self.members[who], self.taken[who] = decode_member(saved, self.rule, self.terms), taken
            self.down[who] = self.dice.randint(1, 10)
            self.events["crash"] += 1
        for effect in effects:
            self.events[type(effect).__name__] += 1
            if isinstance(effect, Send):
                parcel = isinstance(effect.message, Parcel)
                payload_d = self.members[who].payload(effect.peer, effect.message.seq).clone() if parcel else None
                self.net.append((who, effect.peer, effect.message, payload_d))

    # Promises

    def check(self, tolerance=1e-9):
        """I-1 and I-2, and what the audit of all books says."""
        expected_d = sum(self.joined[who] - self.taken[who] for who in self.joined)
        masses = [*(item.sum.mass for item in self.members.values()), *in_flight(self.members)]
        size = sum(mass.numerator_d.abs().sum().item() for mass in masses)
        got_d = sum(mass.numerator_d for mass in masses)
        assert (got_d - expected_d).abs().max().item() <= tolerance * size
        assert abs(sum(mass.weight for mass in masses) - self.weight) <= 1e-12 * self.weight
        assert total_of(self.members).weight == add_sums(mass.sums() for mass in self.sorted_masses()).weight
        ledgers = {who: item.ledger for who, item in self.members.items()}
        held = {who: Fraction(item.sum.mass.weight) for who, item in self.members.items()}
        audit(ledgers, held, Fraction(1, 10**12)).require()

    def sorted_masses(self):
        return [*(self.members[who].sum.mass for who in sorted(self.members)), *in_flight(self.members)]

    def finish(self):
        """The storm is over: all follow the chain, ask back what is unresolved, and all mass is in somebody's hands."""
        self.settle()
        if self.leaving is not None:
            self.give(self.leaving)
            self.settle()
            self.certify()
            self.settle()
            assert self.leaving is None
        assert not any(item.escrow or item.ledger.unresolved for item in self.members.values())
        for edge in (edge for item in self.members.values() for edge in item.ledger.out.values()):
            self.events["counted"] += edge.settled.count
            self.events["came home"] += edge.next_seq - edge.settled.count

    def settle(self):
        """Calm weather, long enough."""
        for who in sorted(self.members):
            while self.members[who].ledger.round_index < self.tip:
                self.follow(who, lossy=False)
        self.down = {}
        for _ in range(2):
            for who in sorted(self.members):
                for to in sorted(self.members[who].ledger.out):
                    self.act(who, lambda own, to=to: own.ledger.fence(to), lossy=False)
                    self.act(who, lambda own, to=to: own.ledger.resend(to), lossy=False)
            while self.net:
                self.deliver(0)
        self.check()


def run(seed, events=100):
    world = World(seed, 2 + seed % 3)
    for number in range(events):
        world.step()
        if number % 13 == 0:
            world.check()
    world.finish()
    return world
