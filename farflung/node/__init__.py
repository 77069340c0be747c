"""One peer: local training, the round's shell, transports, directory, store, command line.

Impurities have their places: network in `transport/` and `directory.py`, disk in `store.py`, GPU and data in
`trainer.py`. The rest is pure or a sans-I/O machine in `protocol`.
"""
