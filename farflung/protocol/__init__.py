"""The words peers use. Pure: no torch, no sockets, no clock.

What goes here: identities, signed statements, the canonical bytes of genesis, manifests and certificates, the round
as a state machine, and every bound that protects a member from its peers. What does not: anything that touches the
network, the disk, the time of day or a tensor library.
"""
