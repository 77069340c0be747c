"""A message goes out at once; a sign of life waits for company, and is left out when it finds any."""

import asyncio

import pytest

from farflung.node import outbox as module
from farflung.node.outbox import SIGN_OF_LIFE, Outbox
from farflung.protocol.identity import PeerId

PEER = PeerId(bytes(20))


class Line:
    """A transport whose one peer takes `takes_s` for each message."""

    def __init__(self, takes_s: float = 0.0) -> None:
        self.heard, self.takes_s = [], takes_s

    async def deliver(self, record, envelope, *, deadline_s):
        await asyncio.sleep(self.takes_s)
        self.heard.append(envelope)


def said(script, line):
    """What the peer hears of (kind, envelope) messages and pauses in seconds."""

    async def play():
        box = Outbox(line, lambda peer: object(), 1.0)
        for step in script:
            if isinstance(step, float):
                await asyncio.sleep(step)
            else:
                box.put(PEER, *step)
        await box.flush(2.0)
        assert not box._tasks
        assert not box._alone
        return line.heard

    return asyncio.run(play())


@pytest.mark.parametrize("pause_s", [0.0, 0.02])
def test_any_message_is_a_sign_of_life(pause_s):
    assert said([(SIGN_OF_LIFE, b"life"), pause_s, ("Vote", b"vote")], Line()) == [b"vote"]


def test_a_sign_of_life_is_sent_when_nothing_else_is_said(monkeypatch):
    monkeypatch.setattr(module, "COMPANY_S", 0.01)
    assert said([(SIGN_OF_LIFE, b"old"), (SIGN_OF_LIFE, b"life"), 0.1], Line()) == [b"life"]


def test_what_was_said_before_is_no_company(monkeypatch):
    monkeypatch.setattr(module, "COMPANY_S", 0.01)
    assert said([("Vote", b"vote"), (SIGN_OF_LIFE, b"life")], Line()) == [b"vote", b"life"]
    assert said([("Vote", b"vote"), 0.02, (SIGN_OF_LIFE, b"life")], Line(0.05)) == [b"vote", b"life"]


def test_company_does_not_wait(monkeypatch):
    monkeypatch.setattr(module, "COMPANY_S", 60.0)
    assert said([(SIGN_OF_LIFE, b"life"), 0.02, ("Vote", b"vote")], Line()) == [b"vote"]
