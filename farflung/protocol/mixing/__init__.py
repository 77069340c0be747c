"""Mixing: what the members that a certificate lists do with each other before they train on (push-sum and pairs modes).

    settings.py   what a run agrees on
    notes.py      what members tell each other
    clockwork.py  a round's ticks: whom to send to, whom to wait for, and how long
    push_sum.py   the machine of one member's push-sum round, on top of the ledger
    meetings.py   the same for pairs
    account.py    what a member says of its round afterwards; it travels as the payload of its next announcement
    auditing.py   what the accounts of all say together: is all mass there?

Everything here is sans-I/O and knows no vector: masses and offsets are `aggregation`'s, sockets and threads the node's.
"""
