"""A world in one process: real nodes in virtual time on a fluid network, or their timing alone for any model size.

Where things are: `scenario.py` is the question, `results.py` the answer. `world.py` runs real nodes (`loop.py` is their
clock, `fabric.py`, `transport.py` and `directory.py` their network, `trainee.py` their training); `timing.py` answers
without training. `network/` shares bandwidth, `compute.py`, `churn.py` and `attackers.py` make members what they are.
`sweep.py` runs many, `report/` shows them, `explore/` looks for broken promises, `calibrate.py` fits a live swarm.
"""
